"""The noise of the SDE: how much of it a step exchanges, and the steps that draw some or remove it. See step.py."""

import math

import torch
from torch import Tensor

from solvers.step import Level, Noise, Predict, coefs_at


def relative_noise(predict: Predict, t: float, s: float, noise: Noise, limit: float = 0.1) -> float:
    """tau2 = w^2 / g^2 in the middle of the step: the variance of the noise over that of the process's own noise.

    0 is the ODE. Any w leaves the marginals right, but only while a step changes little: so where a noise level would
    exchange more noise in one step than eta = `limit`, and more than the process's own noise does, it is lowered to the
    greater of these two (the constant level near the data), before the scale.
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
    """An Euler step of the ODE, then the exact exchange of noise of the SDE.

    It differs from Euler and Maruyama's step by terms of higher order.
    """
    here, tau2 = predict(x, t), relative_noise(predict, t, s, noise)
    lost = (1 - shrinkage(predict.level(t), predict.level(s), tau2)) * predict.level(s).sigma
    return x + (s - t) * here.velocity - lost * here.x1 + fresh_noise(x, predict, t, s, tau2)


def posterior_mean(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """E[x0 | xt]: the rest of the noise is removed, not carried to t_min."""
    return predict(x, t).x0
