"""Multistep methods: one evaluation per step, combined with earlier predictions. The formulas give the weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from solvers.step import Noise, Predict, TimePoint, fresh_noise, relative_noise, shrinkage

# (here, there, nodes, tau2, sigma_data) -> (a, b) of x(s) = a x(t) + sum_j b_j y_j; `here` is t, `there` is s, and y_j
# is the prediction at node j
Formula = Callable[[TimePoint, TimePoint, tuple[TimePoint, ...], float, float], tuple[float, list[float]]]
cached = lru_cache(maxsize=4096)  # every batch of samples needs the same weights


@cached
def exponential(
    here: TimePoint, there: TimePoint, nodes: tuple[TimePoint, ...], tau2: float, sigma_data: float
) -> tuple[float, list[float]]:
    """(a, b) of x(s) = a x(t) + sum_j b_j x0_j, exact for an x0 that is a polynomial in l.

    The polynomial goes through the values of x0 at `nodes`.

    x(s) = sigma_s / sigma_t e^-eta x(t) + alpha_s (integral of e^-v x0 dv),    v = (1 + tau2) (l_s - l),
    with noise of tau2 times the natural variance (Lu et al. 2022b, eq. 8 and, for tau2 = 1, appendix; Xue et al. 2023,
    eq. 14).
    """
    v = [(1 + tau2) * (there.half_log_snr - node.half_log_snr) for node in nodes]
    v = list(filter(math.isfinite, v)) or [1.0]  # from alpha = 0 or to sigma = 0, x0 is taken to be constant
    reach = torch.tensor((1 + tau2) * (there.half_log_snr - here.half_log_snr), dtype=torch.float64)
    orders = torch.arange(1.0, len(v) + 1, dtype=torch.float64)
    moments = orders.lgamma().exp() * torch.special.gammainc(orders, reach)  # integrals of e^-v v^k, from 0 to reach
    weights = [there.alpha * w for w in weights_of(v, moments.numpy())]
    return there.sigma / here.sigma * shrinkage(here, there, tau2), weights + [0.0] * (len(nodes) - len(v))


@cached
def angular(
    here: TimePoint, there: TimePoint, nodes: tuple[TimePoint, ...], tau2: float, sigma_data: float
) -> tuple[float, list[float]]:
    """(a, b) of x(s) = a x(t) + sum_j b_j v_j, exact for a v / n that is a polynomial in the angle theta.

    The polynomial goes through the values of v / n at `nodes`. With n = sqrt(alpha^2 + sigma^2) any process
    turns, from noise to data, by d(x / n) / dtheta = v / n (Salimans and Ho 2022, appendix D).
    Neither end is singular: theta runs from pi / 2 to 0, and v is bounded. ODE only: tau2 is ignored.
    """

    start, end, *angles = (math.atan2(level.sigma, level.alpha) for level in (here, there, *nodes))
    length, length_s, *lengths = (math.hypot(level.sigma, level.alpha) for level in (here, there, *nodes))
    moments = np.array([(end - start) ** (k + 1) / (k + 1) for k in range(len(nodes))])
    weights = weights_of([angle - start for angle in angles], moments)
    return length_s / length, [length_s / n * w for w, n in zip(weights, lengths, strict=True)]


@cached
def gaussian(
    here: TimePoint, there: TimePoint, nodes: tuple[TimePoint, ...], tau2: float, sigma_data: float,
    widths: tuple[float, float] = (1 / 20, 2.5),
) -> tuple[float, list[float]]:  # fmt: skip
    """(a, b) of x(s) = a x(t) + sum_j b_j x0_j, with the least expected error on Gaussian data.

    In a direction in which the data have the standard deviation d, the ODE leads to the end point d along

        x = hypot(alpha d, sigma),    x0 = alpha d^2 / hypot(alpha d, sigma),

    and an error at s grows to d / x(s) times its size. The weights minimise the mean square of that error over all d
    between `widths`, in units of sigma_data, uniform in log d, and over a mean, along which x = alpha and x0 = 1. Real
    data are mixtures of such directions, so weights that suit all of them suit the data. They also stay moderate in
    long steps, unlike the weights of a polynomial. Neither end is singular. ODE only: tau2 is ignored.
    The widths were chosen on mixtures and on trained networks (docs/log.md).
    """
    std = sigma_data * np.geomspace(*widths, 32)

    def path(level: TimePoint) -> tuple[np.ndarray, np.ndarray]:
        x = np.hypot(level.alpha * std, level.sigma)
        return np.append(x, level.alpha), np.append(level.alpha * std**2 / x, 1.0)

    target, _ = path(there)
    growth = np.append(std, 1.0) / target
    columns = np.stack([path(here)[0], *(path(node)[1] for node in nodes)], 1) * growth[:, None]
    unit = np.linalg.norm(columns, axis=0)  # scales the columns, for a well-conditioned system
    a, *b = (np.linalg.lstsq(columns / unit, target * growth, rcond=None)[0] / unit).tolist()
    return a, b


def weights_of(nodes: Sequence[float], moments: np.ndarray) -> list[float]:
    """w with sum_j w_j u_j^k = moments_k at the nodes u: the integral of a polynomial, given by its values there."""
    unit = max(map(abs, nodes)) or 1.0  # scales the nodes, for a well-conditioned system
    powers = np.vander(np.array(nodes) / unit, increasing=True).T
    return np.linalg.solve(powers, moments / unit ** np.arange(len(nodes))).tolist()


@dataclass(frozen=True)
class Multistep:
    """A step of Adams' method on the prediction type `given`, with the weights of `formula`.

    The first steps have no past and are of lower order; with `taper` so are the last steps, where predictions change
    fastest. With a corrector, x at t is first corrected: the step that led there is repeated with `corrector`
    predictions, the newest of them at t itself (Zhao et al. 2023, algorithm 1).
    """

    formula: Formula
    given: str
    order: int
    corrector: int = 0
    taper: bool = False
    stochastic: bool = False

    def __call__(self, x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
        past, taken, sigma_data = list(predict.past), predict.taken, predict.process.sigma_data
        past.insert(0, (t, predict(x, t)))
        nodes = tuple(predict.level(time) for time, _ in past)
        values = [getattr(prediction, self.given) for _, prediction in past]
        if self.corrector and taken is not None:
            scale, weights = self.formula(nodes[1], nodes[0], nodes[: self.corrector], 0.0, sigma_data)
            x = scale / taken[0] * (x - taken[1]) + weighted_sum(weights, values)
        tau2 = relative_noise(predict, t, s, noise) if self.stochastic else 0.0
        known = min(self.order, predict.steps_left + 1) if self.taper else self.order
        scale, weights = self.formula(nodes[0], predict.level(s), nodes[:known], tau2, sigma_data)
        predict.taken = scale, weighted_sum(weights, values)
        x = scale * x + predict.taken[1]
        return x + fresh_noise(x, predict, t, s, tau2) if self.stochastic else x


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j values_j; ignores values beyond the last weight."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=False):
        total.add_(value, alpha=weight)
    return total
