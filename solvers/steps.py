"""How samples go from noise to data: steps of the ODE and the SDE, from time t to s < t.

The ODE dx/dt = velocity(x, t) and, for any noise level w(t), the reverse-time SDE

    dx = (velocity - w^2/2 score) dt + w dw = (velocity + w^2 / (2 sigma) x1) dt + w dw        (dt < 0)

have the same marginals (Song et al. 2021, eq. 13; Albergo et al. 2023, section 2). The drift is written through x1 and
not the score, and SDE_NOISES holds w^2 / (2 sigma). In a step, the part of the SDE that is not the ODE shrinks the
noise that is in xt by e^-eta and draws the rest anew,

    x1 -> e^-eta x1 + sqrt(1 - e^(-2 eta)) z,    eta = integral of w^2 / (2 sigma^2) dt,

which stays finite where w does not: at both ends of every process.

Below, l = log(alpha / sigma) is half the log-SNR and theta = atan(sigma / alpha) the angle between data and noise.
A solver's cost is counted in network evaluations (NFE). Of papers of one year, Song et al. 2021 is on score SDEs and
2021a on DDIM, Lu et al. 2022 on DPM-Solver and 2022b on DPM-Solver++.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from prediction import Prediction
from processes import Coefs, GaussianProcess, log_snr


@dataclass(frozen=True)
class Noise:
    level: Callable[[Coefs], Tensor]  # coefs -> w^2 / (2 sigma), (B,); a value of SDE_NOISES
    scale: float = 1.0  # factor on it


def coefs_at(process: GaussianProcess, t: float) -> Coefs:
    """The process at one time, in float64 on the CPU; every tensor is (1,)."""
    return process(torch.tensor([t], dtype=torch.float64))


class Level(NamedTuple):
    """The process at one time, as floats."""

    alpha: float
    sigma: float
    half_log_snr: float  # l above; infinite at an end where alpha or sigma is 0


class Reached(NamedTuple):
    """What an adaptive solver hands to the step that goes on from x."""

    x: Tensor  # (B, ...)
    velocity: Tensor  # (B, ...), there
    step: Tensor  # scalar, in t


class Predict:
    """`predict(x, t, s=None)`: the network, guided, at x (B, ...) and time t of `process`, as a Prediction.

    `s` is the time to which the step goes: a solver that passes it is for networks of two times, which get it as the
    condition `s`; none of SOLVERS does. Such a network of the average velocity (Geng et al. 2025, MeanFlow) is sampled
    by the step x + (s - t) predict(x, t, s).velocity.
    `past` holds the (time, Prediction) of the last `memory` calls, the newest first; `nfe` counts the calls;
    `steps_left` is the number of steps to the end, this one included, as far as it is known. `taken` is (a, b) of the
    step x(s) = a x(t) + b that led here, if a multistep method took it; `reached` is what an adaptive solver knows.
    """

    def __init__(self, evaluate: Callable[..., Prediction], process: GaussianProcess, memory: int = 0):
        """`evaluate(x, t)`, or `evaluate(x, t, s)` for a solver that passes s."""
        self.evaluate, self.process, self.nfe, self.steps_left = evaluate, process, 0, sys.maxsize
        self.past: deque[tuple[float, Prediction]] = deque(maxlen=memory)
        self.levels: dict[float, Level] = {}
        self.taken: tuple[float, Tensor] | None = None
        self.reached: Reached | None = None

    def __call__(self, x: Tensor, t: float, s: float | None = None) -> Prediction:
        prediction = self.evaluate(x, t) if s is None else self.evaluate(x, t, s)
        self.past.appendleft((t, prediction))
        self.nfe += 1
        return prediction

    def level(self, t: float) -> Level:
        if t not in self.levels:
            time = torch.tensor([t], dtype=torch.float64)
            alpha, sigma = self.process.alpha(time), self.process.sigma(time)
            self.levels[t] = Level(alpha.item(), sigma.item(), log_snr(alpha, sigma).item() / 2)
        return self.levels[t]


StepFn = Callable[[Tensor, float, float, Predict, Noise], Tensor]  # (x, t, s, predict, noise) -> x at s < t


@dataclass(frozen=True)
class Solver:
    step: StepFn
    nfe: int | None  # network evaluations per step; None: it depends
    # The error is O(h^order) in the step h, of an SDE in distribution. This is the global order: the first steps of a
    # multistep method, and the last ones with `taper`, are of lower order.
    order: int
    stochastic: bool = False
    memory: int = 0  # earlier predictions that a step looks back at
    few: StepFn | None = None  # used instead of `step` where all of the path is at most FEW_STEPS steps


# ---------------------------------------------------------------- Runge-Kutta on the velocity


def euler(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """x(s) = x + (s - t) velocity(x, t)."""
    return x + (s - t) * predict(x, t).velocity


def heun(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """The trapezoidal rule on an Euler step (Karras et al. 2022, algorithm 1, without its last Euler step)."""
    h, here = s - t, predict(x, t).velocity
    there = predict(x + h * here, s).velocity
    return x + h / 2 * (here + there)


def midpoint(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """The midpoint rule on half an Euler step (Hairer et al. 1993, section II.1)."""
    h, middle = s - t, (t + s) / 2
    return x + h * predict(x + h / 2 * predict(x, t).velocity, middle).velocity


def rk4(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """The classical Runge-Kutta method (Hairer et al. 1993, section II.1)."""
    h, middle = s - t, (t + s) / 2
    k1 = predict(x, t).velocity
    k2 = predict(x + h / 2 * k1, middle).velocity
    k3 = predict(x + h / 2 * k2, middle).velocity
    k4 = predict(x + h * k3, s).velocity
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def dopri5(x: Tensor, t: float, s: float, predict: Predict, noise: Noise, tolerance: float = 1e-5) -> Tensor:
    """As many Dormand-Prince steps between t and s as keep the error within the tolerance (torchdiffeq).

    The error is a mean over the batch. The last evaluation, at s, is the first of the step that goes on from there, and
    that step begins with the step size that was reached here (Hairer et al. 1993, section II.4).
    """
    from torchdiffeq import odeint

    reached = predict.reached if predict.reached is not None and predict.reached.x is x else None
    first = None if reached is None else reached.velocity
    times = torch.tensor([t, s], dtype=torch.float64, device=x.device)
    options = within(times) | ({} if reached is None else dict(first_step=reached.step))
    last, size = x, options['first_step']

    def velocity(time: Tensor, x: Tensor) -> Tensor:
        nonlocal first, last
        last, first = predict(x, time.item()).velocity if first is None else first, None
        return last

    def remember_size(time: Tensor, x: Tensor, step: Tensor) -> None:
        nonlocal size
        size = step  # as it was meant, before the end at s cuts it short

    velocity.callback_step = remember_size  # torchdiffeq calls it before each attempt
    path = odeint(velocity, x, times, rtol=tolerance, atol=tolerance, method='dopri5', options=options)
    end = cast(Tensor, path)[-1]
    predict.reached = Reached(end, last, size)
    return end


def within(times: Tensor) -> dict[str, Tensor]:
    """Options that keep torchdiffeq's adaptive methods from looking beyond the ends, where a process need not exist."""
    return dict(first_step=(times[-1] - times[0]).abs() / 100, step_t=times[-1:])


# ---------------------------------------------------------------- multistep methods


Formula = Callable[[Level, Level, tuple[Level, ...], float, float], tuple[float, list[float]]]
remembered = lru_cache(maxsize=4096)  # sampling asks for the same weights again and again


@remembered
def exponential(
    here: Level, there: Level, nodes: tuple[Level, ...], tau2: float, sigma_data: float
) -> tuple[float, list[float]]:
    """(a, b) of x(s) = a x(t) + sum_j b_j x0_j, exact for an x0 that is a polynomial in l.

    `here` is t, `there` s. The polynomial goes through the values of x0 at `nodes`.

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


@remembered
def angular(
    here: Level, there: Level, nodes: tuple[Level, ...], tau2: float, sigma_data: float
) -> tuple[float, list[float]]:
    """(a, b) of x(s) = a x(t) + sum_j b_j v_j, exact for a v / n that is a polynomial in the angle theta.

    The polynomial goes through the values of v / n at `nodes`. With n = sqrt(alpha^2 + sigma^2) any process
    turns, from noise to data, by d(x / n) / dtheta = v / n (Salimans and Ho 2022, appendix D).
    Neither end is singular: theta runs from pi / 2 to 0, and v is bounded. Of the ODE alone: tau2 is not used.
    """

    start, end, *angles = (math.atan2(level.sigma, level.alpha) for level in (here, there, *nodes))
    length, length_s, *lengths = (math.hypot(level.sigma, level.alpha) for level in (here, there, *nodes))
    moments = np.array([(end - start) ** (k + 1) / (k + 1) for k in range(len(nodes))])
    weights = weights_of([angle - start for angle in angles], moments)
    return length_s / length, [length_s / n * w for w, n in zip(weights, lengths, strict=True)]


@remembered
def gaussian(
    here: Level, there: Level, nodes: tuple[Level, ...], tau2: float, sigma_data: float,
    widths: tuple[float, float] = (1 / 20, 2.5),
) -> tuple[float, list[float]]:  # fmt: skip
    """(a, b) of x(s) = a x(t) + sum_j b_j x0_j, with the least expected error on Gaussian data.

    Where the data have the standard deviation d in some direction, the ODE leads to the end point d along

        x = hypot(alpha d, sigma),    x0 = alpha d^2 / hypot(alpha d, sigma),

    and an error at s grows to d / x(s) times its size. The weights minimise the mean square of that error over all d
    between `widths`, in units of sigma_data, uniform in log d, and over a mean, along which x = alpha and x0 = 1. Real
    data are mixtures of such directions, so weights that suit all of them suit the data, and they stay moderate in long
    steps, where those of a polynomial do not. Neither end is singular. Of the ODE alone: tau2 is not used.
    The widths were chosen on mixtures and on trained networks (benchmarks/RESULTS.md).
    """
    std = sigma_data * np.geomspace(*widths, 32)

    def path(level: Level) -> tuple[np.ndarray, np.ndarray]:
        x = np.hypot(level.alpha * std, level.sigma)
        return np.append(x, level.alpha), np.append(level.alpha * std**2 / x, 1.0)

    target, _ = path(there)
    growth = np.append(std, 1.0) / target
    columns = np.stack([path(here)[0], *(path(node)[1] for node in nodes)], 1) * growth[:, None]
    unit = np.linalg.norm(columns, axis=0)  # for the condition of the system
    a, *b = (np.linalg.lstsq(columns / unit, target * growth, rcond=None)[0] / unit).tolist()
    return a, b


def weights_of(nodes: Sequence[float], moments: np.ndarray) -> list[float]:
    """w with sum_j w_j u_j^k = moments_k at the nodes u: the integral of a polynomial, given by its values there."""
    unit = max(map(abs, nodes)) or 1.0  # for the condition of the system
    powers = np.vander(np.array(nodes) / unit, increasing=True).T
    return np.linalg.solve(powers, moments / unit ** np.arange(len(nodes))).tolist()


def multistep(
    x: Tensor,
    t: float,
    s: float,
    predict: Predict,
    noise: Noise,
    *,
    formula: Formula,
    given: str,
    order: int,
    corrector: int = 0,
    taper: bool = False,
    stochastic: bool = False,
) -> Tensor:
    """Adams' method on the prediction type `given`, with the weights of `formula`; one evaluation a step.

    The first steps have no past and are of lower order; with `taper` the last ones are too, where predictions change
    fastest. With a corrector, x at t is first corrected: the step that led there is made once more, by a formula of
    `corrector` predictions, of which the first is the one now computed at t (Zhao et al. 2023, algorithm 1).
    """
    past, taken, sigma_data = list(predict.past), predict.taken, predict.process.sigma_data
    past.insert(0, (t, predict(x, t)))
    nodes = tuple(predict.level(time) for time, _ in past)
    values = [getattr(prediction, given) for _, prediction in past]
    if corrector and taken is not None:
        scale, weights = formula(nodes[1], nodes[0], nodes[:corrector], 0.0, sigma_data)
        x = scale / taken[0] * (x - taken[1]) + weighted_sum(weights, values)
    tau2 = relative_noise(predict, t, s, noise) if stochastic else 0.0
    known = min(order, predict.steps_left + 1) if taper else order
    scale, weights = formula(nodes[0], predict.level(s), nodes[:known], tau2, sigma_data)
    predict.taken = scale, weighted_sum(weights, values)
    x = scale * x + predict.taken[1]
    return x + fresh_noise(x, predict, t, s, tau2) if stochastic else x


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j values_j; values beyond the last weight are left out."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=False):
        total.add_(value, alpha=weight)
    return total


# ---------------------------------------------------------------- noise


def relative_noise(predict: Predict, t: float, s: float, noise: Noise, limit: float = 0.1) -> float:
    """tau2 = w^2 / g^2 in the middle of the step: the variance of the noise over that of the process's own; 0: the ODE.

    Any w leaves the marginals right, but only while a step changes little: so where a noise level would exchange more
    noise in one step than eta = `limit`, and more than the process's own does, it is lowered to the greater of these
    (the constant level near the data), before the scale.
    """
    middle = coefs_at(predict.process, (t + s) / 2)
    step = predict.level(s).half_log_snr - predict.level(t).half_log_snr
    return noise.scale * min((noise.level(middle) * middle.sigma / middle.delta).item(), max(1.0, limit / step))


def shrinkage(here: Level, there: Level, tau2: float) -> float:
    """e^-eta, with eta = tau2 (l(s) - l(t))."""
    return math.exp(-tau2 * (there.half_log_snr - here.half_log_snr)) if tau2 else 1.0


def fresh_noise(x: Tensor, predict: Predict, t: float, s: float, tau2: float) -> Tensor:
    """sigma_s sqrt(1 - e^(-2 eta)) z."""
    keep = shrinkage(predict.level(t), predict.level(s), tau2)
    return predict.level(s).sigma * math.sqrt(1 - keep**2) * torch.randn_like(x)


def euler_maruyama(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """An Euler step of the ODE, then the exchange of noise of the SDE, exactly.

    It is Euler and Maruyama's step but for terms of higher order.
    """
    here, tau2 = predict(x, t), relative_noise(predict, t, s, noise)
    lost = (1 - shrinkage(predict.level(t), predict.level(s), tau2)) * predict.level(s).sigma
    return x + (s - t) * here.velocity - lost * here.x1 + fresh_noise(x, predict, t, s, tau2)


def posterior_mean(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """E[x0 | xt]: what is left of the noise is removed, not carried to t_min."""
    return predict(x, t).x0


# ---------------------------------------------------------------- tables

FEW_STEPS = 10  # up to this number a polynomial is no good guide between predictions

# Song et al. 2021a, eq. 12 with sigma = 0, for any process
ddim = partial(multistep, formula=exponential, given='x0', order=1)

SOLVERS: dict[str, Solver] = {
    'euler': Solver(euler, nfe=1, order=1),
    'heun': Solver(heun, nfe=2, order=2),
    'midpoint': Solver(midpoint, nfe=2, order=2),
    'rk4': Solver(rk4, nfe=4, order=4),
    'dopri5': Solver(dopri5, nfe=None, order=5),
    'ddim': Solver(ddim, nfe=1, order=1),
    # Lu et al. 2022b, algorithm 2 with exact integrals, and its third order
    'dpmpp_2m': Solver(partial(multistep, formula=exponential, given='x0', order=2), nfe=1, order=2, memory=1),
    'dpmpp_3m': Solver(partial(multistep, formula=exponential, given='x0', order=3), nfe=1, order=3, memory=2),
    # Zhao et al. 2023, p = 3 with exact integrals
    'unipc': Solver(
        partial(multistep, formula=exponential, given='x0', order=3, corrector=4), nfe=1, order=4, memory=3
    ),
    # the predictor-corrector of Adams, Bashforth and Moulton (Hairer et al. 1993, section III.1) in the angle
    'adams': Solver(
        partial(multistep, formula=angular, given='v', order=4, corrector=5, taper=True),
        nfe=1,
        order=5,
        memory=4,
        few=partial(multistep, formula=gaussian, given='x0', order=3, corrector=3),
    ),
    'euler_maruyama': Solver(euler_maruyama, nfe=1, order=1, stochastic=True),
    # Lu et al. 2022b, SDE-DPM-Solver++(2M); Xue et al. 2023 for other noise than the natural
    'sde_dpmpp_2m': Solver(
        partial(multistep, formula=exponential, given='x0', order=2, stochastic=True),
        nfe=1,
        order=2,
        stochastic=True,
        memory=1,
    ),
}

# name -> w^2 / (2 sigma) of the SDE.
SDE_NOISES: dict[str, Callable[[Coefs], Tensor]] = {
    'natural': lambda c: c.delta / c.sigma,  # w = g, the noise of the process itself (Song et al. 2021, eq. 6)
    'sigma': lambda c: c.sigma,  # w = sqrt(2) sigma
    # w^2 = alpha sigma_dot - sigma alpha_dot: constant in time for rf (1) and cosine (pi / 2), and the same SDE on
    # other processes. Near the data it is more than steps can bear, and lowered there by `relative_noise`
    'constant': lambda c: (c.alpha * c.sigma_dot - c.sigma * c.alpha_dot) / (2 * c.sigma),
}

# name -> the last step of a stochastic solver: noise added there would stay in the image.
LAST_STEPS: dict[str, StepFn] = {'mean': posterior_mean, 'ode': ddim}
