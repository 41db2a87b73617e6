"""The step of a solver: (x, t, s, predict, noise) -> x at time s < t. Read one_step.py next.

The ODE dx/dt = velocity(x, t) and, for any noise level w(t), the reverse-time SDE

    dx = (velocity - w^2/2 score) dt + w dw = (velocity + w^2 / (2 sigma) x1) dt + w dw        (dt < 0)

have the same marginals (Song et al. 2021, eq. 13; Albergo et al. 2023, section 2). The drift is written with x1 in
place of the score, and SDE_NOISES holds w^2 / (2 sigma). In a step, the part of the SDE that is not the ODE shrinks the
noise in xt by e^-eta and draws new noise,

    x1 -> e^-eta x1 + sqrt(1 - e^(-2 eta)) z,    eta = integral of w^2 / (2 sigma^2) dt,

which stays finite where w does not: at both ends of every process.

In all files of solvers/, l = log(alpha / sigma) is half the log-SNR and theta = atan(sigma / alpha) the angle between
data and noise. The cost of a solver is counted in network evaluations (NFE). Citations: Song et al. 2021 is the paper
on score SDEs and 2021a is DDIM, Lu et al. 2022 is DPM-Solver and 2022b is DPM-Solver++.
"""

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prediction import Prediction
from processes import Coefs, GaussianProcess, log_snr


def coefs_at(process: GaussianProcess, t: float) -> Coefs:
    """The process at one time, in float64 on the CPU; every tensor is (1,)."""
    return process(torch.tensor([t], dtype=torch.float64))


class TimePoint(NamedTuple):
    """The process at one time, as floats."""

    alpha: float
    sigma: float
    half_log_snr: float  # l above; infinite at an end where alpha or sigma is 0


class Reached(NamedTuple):
    """The end of an adaptive step, where the next one starts."""

    x: Tensor  # (B, ...)
    velocity: Tensor  # (B, ...), at x
    step: Tensor  # scalar, in t


class Predict:
    """`predict(x, t, s=None)`: the network, guided, at x (B, ...) and time t of `process`, as a Prediction.

    `s` is the end of the step. A solver passes it only to networks of two times, which get it as the condition `s`;
    no solver in SOLVERS does. For instance, a network of the average velocity (Geng et al. 2025, MeanFlow) is sampled
    by the step x + (s - t) predict(x, t, s).velocity.
    `past` holds the (time, Prediction) of the last `memory` calls, the newest first; `nfe` counts the calls;
    `steps_left` is the number of steps to the end, including this one, if it is known. `taken` is (a, b) of the step
    x(s) = a x(t) + b that led here, if a multistep method took it; `reached` is where an adaptive solver's step ended.
    """

    def __init__(
        self, evaluate: Callable[..., Prediction], process: GaussianProcess, memory: int = 0,
        watch: Callable[[float, Prediction], None] | None = None,
    ):  # fmt: skip
        """`evaluate(x, t)`, or `evaluate(x, t, s)` for a solver that passes s; `watch(t, prediction)` follows."""
        self.evaluate, self.process, self.nfe, self.steps_left = evaluate, process, 0, sys.maxsize
        self.watch = watch or (lambda t, prediction: None)
        self.past: deque[tuple[float, Prediction]] = deque(maxlen=memory)
        self.levels: dict[float, TimePoint] = {}
        self.taken: tuple[float, Tensor] | None = None
        self.reached: Reached | None = None
        self.known: Prediction | None = None  # returned by the next call, if its x is this tensor

    def __call__(self, x: Tensor, t: float, s: float | None = None) -> Prediction:
        if self.known is not None and self.known.xt is x:
            prediction, self.known = self.known, None
        else:
            prediction = self.evaluate(x, t) if s is None else self.evaluate(x, t, s)
            self.watch(t, prediction)
            self.nfe += 1
        self.past.appendleft((t, prediction))
        return prediction

    def level(self, t: float) -> TimePoint:
        if t not in self.levels:
            time = torch.tensor([t], dtype=torch.float64)
            alpha, sigma = self.process.alpha(time), self.process.sigma(time)
            self.levels[t] = TimePoint(alpha.item(), sigma.item(), log_snr(alpha, sigma).item() / 2)
        return self.levels[t]


StepFn = Callable[[Tensor, float, float, Predict, 'Noise'], Tensor]  # (x, t, s, predict, noise) -> x at s < t


@dataclass(frozen=True)
class Noise:
    """The noise of a stochastic solver; a solver of the ODE ignores it."""

    level: Callable[[Coefs], Tensor]  # coefs -> w^2 / (2 sigma), (B,); a value of SDE_NOISES
    scale: float = 1.0  # factor on it
    last_step: StepFn | None = None  # takes the place of the solver's last step; a value of LAST_STEPS


# ---------------------------------------------------------------- the noise of the SDE: how much of it a step exchanges


def relative_noise(predict: Predict, t: float, s: float, noise: Noise, limit: float = 0.1) -> float:
    """tau2 = w^2 / g^2 in the middle of the step: the variance of the noise relative to the process's own noise.

    0 is the ODE. Any w keeps the marginals right, but only if a step changes little. So a noise level that would
    exchange more noise in one step than eta = `limit` and more than the process's own noise does is lowered to the
    greater of these two, before it is scaled. Near the data this lowers the constant level.
    """
    middle = coefs_at(predict.process, (t + s) / 2)
    step = predict.level(s).half_log_snr - predict.level(t).half_log_snr
    return noise.scale * min((noise.level(middle) * middle.sigma / middle.delta).item(), max(1.0, limit / step))


def shrinkage(here: TimePoint, there: TimePoint, tau2: float) -> float:
    """e^-eta, with eta = tau2 (l(s) - l(t))."""
    return math.exp(-tau2 * (there.half_log_snr - here.half_log_snr)) if tau2 else 1.0


def fresh_noise(x: Tensor, predict: Predict, t: float, s: float, tau2: float) -> Tensor:
    """sigma_s sqrt(1 - e^(-2 eta)) z."""
    keep = shrinkage(predict.level(t), predict.level(s), tau2)
    return predict.level(s).sigma * math.sqrt(1 - keep**2) * torch.randn_like(x)
