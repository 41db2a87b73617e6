"""Annealed importance sampling with a drift: weighted samples of a density that is known up to a constant.

Walkers follow Langevin dynamics in an energy that changes in time, and a drift b, which may be learned:

    dx = (b - e grad U) ds + sqrt(2 e) dW                                     s = 1 - t, from the start to the target

Their weights exp(A) correct every error of the drift and of the finite steps. For any function f, the expected value of
f(x) exp(A) is the mean of f under the density exp(-U) / Z at the last time, times Z(last) / Z(first). A step from x to
y multiplies the weight by exp(-U(y)) p(x | y) / (exp(-U(x)) p(y | x)), with the Gaussian densities of the step back,
along -b, and of the step forth. With small steps this is Jarzynski's equality with a drift (Vaikuntanathan and
Jarzynski 2008; Albergo and Vanden-Eijnden 2025).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Energy = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # x (n, D), t (n,) -> U (n,), its gradient in x (n, D), ...
Drift = Callable[[Tensor, Tensor], Tensor]  # x (n, D), t (n,) -> (n, D)


def no_drift(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


def walk(energy: Energy, drift: Drift, x: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (K, n, D) at the falling `times` (K,) of walkers that start at x (n, D), and their A (n,) at the last.

    x must be drawn from exp(-U) at the first time. `noise` (K,): e at each time, above 0.
    """
    path, forces, drifts, energies = [x], [], [], []
    steps = torch.cat([-times.diff(), times[:1] * 0])
    for t, ds, e in zip(times, steps, noise, strict=True):
        u, force, *_ = energy(path[-1], t.expand(len(x)))
        b = drift(path[-1], t.expand(len(x)))
        path.append(path[-1] + ds * (b - e * force) + (2 * e * ds).sqrt() * torch.randn_like(x))
        for values, value in ((energies, u), (forces, force), (drifts, b)):
            values.append(value)
    positions, force, b = torch.stack(path[:-1]), torch.stack(forces), torch.stack(drifts)
    ds, e = steps[:-1, None, None], noise[:, None, None]
    forth = positions.diff(dim=0) - ds * (b - e * force)[:-1]
    back = positions.diff(dim=0) - ds * (b + e * force)[1:]
    gain = forth.square() / e[:-1] - back.square() / e[1:]
    a = energies[0] - energies[-1] + (gain / (4 * ds)).sum((0, 2)) + x.shape[1] / 2 * (noise[0] / noise[-1]).log()
    return positions, a


def log_mean_weight(a: Tensor) -> Tensor:
    """log Z(last) / Z(first), estimated from the log-weights a (n,)."""
    return a.logsumexp(0) - torch.tensor(float(len(a))).log()


def effective_sample_size(a: Tensor) -> Tensor:
    """(mean weight)^2 / mean squared weight: 1 if all weights are equal, 1 / n if one walker has all the weight."""
    return (2 * a.logsumexp(0) - (2 * a).logsumexp(0)).exp() / len(a)
