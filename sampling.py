"""From noise to data: ODE and SDE solvers and classifier-free guidance. t runs from t_max down to t_min.

The ODE dx/dt = velocity(x, t) and, for any noise level w(t), the reverse-time SDE

    dx = (velocity - w^2/2 score) dt + w dw = (velocity + w^2 / (2 sigma) x1) dt + w dw        (dt < 0)

have the same marginals (Song et al. 2021, eq. 13; Albergo et al. 2023, section 2). The drift is written through x1 and not the
score, and SDE_NOISES holds w^2 / (2 sigma), so nothing diverges at either end. A solver's cost is counted in network evaluations (NFE).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from config import Config, SettingError, choose
from prediction import Prediction, get_model_convert_fn
from processes import Coefs, GaussianProcess
from utils import bcast_right

ModelFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (xt, t, label) -> what the network approximates
PredictFn = Callable[[Tensor, Tensor], Prediction]  # (xt, t) -> the same, guided, as every prediction type
NoiseFn = Callable[[Coefs], Tensor]  # coefs -> w^2 / (2 sigma), (B,)


def euler(x: Tensor, t: Tensor, s: Tensor, predict: PredictFn, noise: NoiseFn, last: bool) -> Tensor:
    """x(s) = x + (s - t) velocity(x, t); order 1."""
    return x + bcast_right(s - t, x.ndim) * predict(x, t).velocity


def heun(x: Tensor, t: Tensor, s: Tensor, predict: PredictFn, noise: NoiseFn, last: bool) -> Tensor:
    """The trapezoidal rule on an Euler step; order 2 (Karras et al. 2022, algorithm 1, without its last Euler step)."""
    h, here = bcast_right(s - t, x.ndim), predict(x, t).velocity
    there = predict(x + h * here, s).velocity
    return x + h / 2 * (here + there)


def euler_maruyama(x: Tensor, t: Tensor, s: Tensor, predict: PredictFn, noise: NoiseFn, last: bool) -> Tensor:
    """One step of the reverse-time SDE; weak order 1. The last step is the ODE's: noise added there would stay."""
    here, h = predict(x, t), bcast_right(s - t, x.ndim)
    if last:
        return x + h * here.velocity
    rate = bcast_right(noise(here.coefs), x.ndim)
    w = (2 * rate * bcast_right(here.coefs.sigma, x.ndim)).sqrt()
    return x + h * (here.velocity + rate * here.x1) + w * (-h).sqrt() * torch.randn_like(x)


@dataclass(frozen=True)
class Solver:
    step: Callable[[Tensor, Tensor, Tensor, PredictFn, NoiseFn, bool], Tensor]  # (x, t, s, predict, noise, last) -> x at s < t
    nfe: int  # network evaluations per step
    stochastic: bool = False


SOLVERS: dict[str, Solver] = {
    'euler': Solver(euler, nfe=1),
    'heun': Solver(heun, nfe=2),
    'euler_maruyama': Solver(euler_maruyama, nfe=1, stochastic=True),
}

# name -> w^2 / (2 sigma) of the SDE.
SDE_NOISES: dict[str, NoiseFn] = {
    'sigma': lambda c: c.sigma,  # w = sqrt(2) sigma, as in Ma et al. 2024 (SiT), section 3.2, up to the factor
    'growth': lambda c: c.sigma_dot.abs(),  # w^2 = d(sigma^2)/dt, the natural g^2 of `ve`
}

# name -> (process, t_max, t_min, n) -> n + 1 decreasing times, float64.
TIME_GRIDS: dict[str, Callable[[GaussianProcess, float, float, int], Tensor]] = {
    'uniform': lambda process, t_max, t_min, n: torch.linspace(t_max, t_min, n + 1, dtype=torch.float64),
    'log_snr': lambda process, t_max, t_min, n: log_snr_grid(process, t_max, t_min, n),
}


def log_snr_grid(process: GaussianProcess, t_max: float, t_min: float, n: int) -> Tensor:
    """Times at equal steps of log-SNR (Lu et al. 2022, section 3.3). Both ends need a finite log-SNR."""
    ends = torch.tensor([t_max, t_min], dtype=torch.float64)
    low, high = process.log_snr(ends).tolist()
    if not abs(low) < float('inf') or not abs(high) < float('inf'):
        raise SettingError(f"time_grid='log_snr': the log-SNR is infinite at t_max={t_max:g} or t_min={t_min:g}. Use --t_min 0.001 --t_max 0.999.")
    grid = process.time_of_log_snr(torch.linspace(low, high, n + 1, dtype=torch.float64))
    grid[0], grid[-1] = ends
    return grid


def guided_predict_fn(
    model_fn: ModelFn, process: GaussianProcess, label: Tensor | None, model_type: str, guidance_scale: float, null_label: int | None
) -> PredictFn:
    """`predict(x, t)` with classifier-free guidance, null + scale (label - null) (Ho and Salimans 2022), in one batched call.

    Guidance is a linear rule, so it is the same for every model type.
    """
    convert = get_model_convert_fn(model_type)
    if guidance_scale != 1 and (label is None or null_label is None):
        raise SettingError(f'guidance_scale={guidance_scale:g} needs a label and a null_label, from a model trained with label_dropout above 0.')

    def predict(x: Tensor, t: Tensor) -> Prediction:
        t = t.to(x).expand(len(x))
        if guidance_scale == 1:
            out = model_fn(x, t, label)
        else:
            labels = torch.cat([label, torch.full_like(label, null_label)])
            conditional, null = model_fn(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
            out = null + guidance_scale * (conditional - null)
        return convert(out, t, x, process(t))

    return predict


@torch.no_grad()
def sample(
    model_fn: ModelFn,
    process: GaussianProcess,
    x1: Tensor,
    label: Tensor | None = None,
    *,
    model_type: str = 'velocity',
    solver: str = 'heun',
    num_steps: int = 50,
    time_grid: str = 'uniform',
    t_min: float = 0.001,
    t_max: float = 0.999,
    sde_noise: str = 'sigma',
    sde_noise_scale: float = 1.0,
    guidance_scale: float = 1.0,
    null_label: int | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Images (B, C, H, W) at t_min, from base noise `x1` ~ N(0, I) of that shape; label (B,) int64.

    Starts from sigma(t_max) x1 and takes exactly `num_steps` steps, `num_steps * SOLVERS[solver].nfe` evaluations.
    After step i, from 1, `callback(i, t, x)` is called. `null_label` is the class that means 'no label'.
    Raises SettingError for an unknown choice, and for guidance without labels.
    """
    step = choose('solver', solver, SOLVERS).step
    level = choose('sde_noise', sde_noise, SDE_NOISES)
    grid = choose('time_grid', time_grid, TIME_GRIDS)(process, t_max, t_min, num_steps).to(x1)
    predict = guided_predict_fn(model_fn, process, label, model_type, guidance_scale, null_label)

    def noise(coefs: Coefs) -> Tensor:
        return sde_noise_scale * level(coefs)

    x = bcast_right(process.sigma(grid[:1]), x1.ndim) * x1
    for i in range(num_steps):
        x = step(x, grid[i : i + 1], grid[i + 1 : i + 2], predict, noise, i == num_steps - 1)
        if callback is not None:
            callback(i + 1, grid[i + 1], x)
    return x


def get_sample_fn(config: Config, process: GaussianProcess, null_label: int) -> Callable[..., Tensor]:
    """`sample` with the config's settings: `fn(model_fn, x1=..., label=..., callback=...)`, or others by keyword."""
    return partial(
        sample,
        process=process,
        model_type=config.model_type,
        solver=config.solver,
        num_steps=config.num_sample_steps,
        time_grid=config.time_grid,
        t_min=config.t_min,
        t_max=config.t_max,
        sde_noise=config.sde_noise,
        sde_noise_scale=config.sde_noise_scale,
        guidance_scale=config.guidance_scale,
        null_label=null_label,
    )
