"""Solvers that remember nothing: Runge-Kutta methods for the ODE, and a step of the SDE. Read step.py first."""

from typing import cast

import torch
from torch import Tensor

from solvers.step import Noise, Predict, Reached, fresh_noise, relative_noise, shrinkage


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
    """Adaptive Dormand-Prince steps from t to s, which keep the error within the tolerance (torchdiffeq).

    The error is a mean over the batch. The next call reuses the last evaluation, at s, and starts with the step size
    that was reached here (Hairer et al. 1993, section II.4).
    """
    from torchdiffeq import odeint

    reached = predict.reached if predict.reached is not None and predict.reached.x is x else None
    first = None if reached is None else reached.velocity
    times = torch.tensor([t, s], dtype=torch.float64, device=x.device)
    options = torchdiffeq_options(times) | ({} if reached is None else dict(first_step=reached.step))
    last, size = x, options['first_step']

    def velocity(time: Tensor, x: Tensor) -> Tensor:
        nonlocal first, last
        last, first = predict(x, time.item()).velocity if first is None else first, None
        return last

    def remember_size(time: Tensor, x: Tensor, step: Tensor) -> None:
        nonlocal size
        size = step  # before the end at s cuts it short

    velocity.callback_step = remember_size  # torchdiffeq calls it before each attempt
    try:
        path = odeint(velocity, x, times, rtol=tolerance, atol=tolerance, method='dopri5', options=options)
        end = cast(Tensor, path)[-1]
    except AssertionError:
        if last is None or last.isfinite().all():
            raise
        end = torch.full_like(x, torch.nan)  # torchdiffeq finds no step size if the velocity is not finite
    predict.reached = Reached(end, last, size)
    return end


def torchdiffeq_options(times: Tensor) -> dict[str, Tensor]:
    """Options that keep torchdiffeq's adaptive methods between the ends: beyond them a process may be undefined."""
    return dict(first_step=(times[-1] - times[0]).abs() / 100, step_t=times[-1:])


# ---------------------------------------------------------------- the SDE


def euler_maruyama(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """An Euler step of the ODE, then the exact exchange of noise of the SDE.

    It differs from Euler and Maruyama's step by terms of higher order.
    """
    here, tau2 = predict(x, t), relative_noise(predict, t, s, noise)
    lost = (1 - shrinkage(predict.level(t), predict.level(s), tau2)) * predict.level(s).sigma
    return x + (s - t) * here.velocity - lost * here.x1 + fresh_noise(x, predict, t, s, tau2)


def posterior_mean(x: Tensor, t: float, s: float, predict: Predict, noise: Noise) -> Tensor:
    """E[x0 | xt]: removes the remaining noise instead of carrying it to t_min."""
    return predict(x, t).x0
