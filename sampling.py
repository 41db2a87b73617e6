"""From noise to data: time grids, guidance and `sample`. t runs from t_max down to t_min; solvers.py has the steps.

x is of any shape (B, ...).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from config import Config, SettingError, choose
from prediction import Prediction, check_ends, get_model_convert_fn
from processes import Coefs, GaussianProcess
from solvers import FEW_STEPS, LAST_STEPS, SDE_NOISES, SOLVERS, Noise, Predict, coefs_at
from utils import bcast_right

# model_fn(xt, t, label=None, **cond) -> what the network approximates, or a tuple of that and anything else
ModelFn = Callable[..., Tensor | tuple]

# ---------------------------------------------------------------- time grids

# (sigma / alpha, sigma_data) -> a variable u that rises from noise to data, and its inverse: (u, sigma_data) -> ratio
Variable = tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]


def logistic(centre: float, scale: float = 1.2) -> Variable:
    """Equal shares of a logistic distribution of log(alpha / sigma), centred where sigma = centre sigma_data alpha."""
    return (
        lambda ratio, std: 1 / (1 + (ratio / (centre * std)) ** (1 / scale)),
        lambda u, std: centre * std * (1 / u - 1) ** scale,
    )


GRID_VARIABLES: dict[str, Variable] = {
    'log_snr': (lambda ratio, std: -ratio.log(), lambda u, std: (-u).exp()),  # Lu et al. 2022, section 3.3
    'edm': (lambda ratio, std: -(ratio ** (1 / 7)), lambda u, std: (-u) ** 7),  # Karras et al. 2022, eq. 5, rho = 7
    'cosine': (lambda ratio, std: -ratio.atan(), lambda u, std: (-u).tan()),  # equal angles
    # dense where images form, between what `uniform` is for rf (scale 1) and log_snr (scale infinite)
    'logistic': logistic(centre=0.6),
}


def equal_steps(
    name: str, process: GaussianProcess, t_max: float, t_min: float, n: int, variable: Variable | None = None
) -> Tensor:
    """n + 1 times, float64, at equal steps of a variable, that of GRID_VARIABLES with this name if none is given.

    Raises SettingError if it is infinite at an end.
    """
    forward, inverse = variable or GRID_VARIABLES[name]
    ends = torch.tensor([t_max, t_min], dtype=torch.float64)
    first, last = forward((-process.log_snr(ends) / 2).exp(), process.sigma_data).tolist()
    if not (math.isfinite(first) and math.isfinite(last)):
        raise SettingError(
            f'time_grid={name!r} is infinite at t_max={t_max:g} or t_min={t_min:g}. Use --t_min 0.001 --t_max 0.999.'
        )
    inner = inverse(torch.linspace(first, last, n + 1, dtype=torch.float64)[1:-1], process.sigma_data)
    return torch.cat([ends[:1], process.time_of_log_snr(-2 * inner.log()), ends[1:]])


# name -> (process, t_max, t_min, n) -> n + 1 decreasing times, float64.
TIME_GRIDS: dict[str, Callable[[GaussianProcess, float, float, int], Tensor]] = {
    'uniform': lambda process, t_max, t_min, n: torch.linspace(t_max, t_min, n + 1, dtype=torch.float64),
} | {name: partial(equal_steps, name) for name in GRID_VARIABLES}

# ---------------------------------------------------------------- guidance


def first_part(out: Tensor | tuple) -> Tensor:
    """The prediction: a network may return a tuple, with other outputs after it."""
    return out[0] if isinstance(out, tuple) else out


def nulled(cond: Mapping[str, Tensor], null_cond: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """`cond` with the null value for each condition that has one, broadcast to (B, ...). Raises SettingError."""
    out = dict(cond)
    for name in cond.keys() & null_cond.keys():
        like, null = cond[name], null_cond[name]
        dtype = like.dtype if like.is_floating_point() else None  # a null value 0.5 of whole numbers stays 0.5
        if not isinstance(null, Tensor):
            null = torch.full((), null, dtype=dtype, device=like.device)
        try:
            out[name] = null.to(like.device, dtype).expand_as(like)
        except RuntimeError:
            raise SettingError(
                f'null_cond[{name!r}] has shape {tuple(null.shape)}, and the condition {tuple(like.shape)}. '
                'Pass a number, or a tensor of the shape of one item.'
            ) from None
    return out


def check_cond(cond: Mapping[str, Tensor], batch: int) -> None:
    """Raise SettingError unless all conditions are tensors (batch, ...)."""
    for name, value in cond.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (batch,):
            given = f'shape {tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)
            raise SettingError(f'cond[{name!r}] is {given}. Pass a tensor of {batch} items: shape ({batch}, ...).')


def guided(
    model_fn: ModelFn,
    label: Tensor | None,
    cond: Mapping[str, Tensor],
    convert: Callable[[Tensor, Tensor, Tensor, Coefs], Prediction],
    *,
    scale: float,
    null_label: int | None,
    null_cond: Mapping[str, Tensor | float],
    guide_fn: ModelFn | None,
    interval: tuple[float, float],
    rescale: float,
) -> Callable[[Tensor, float, float | None, Coefs], Prediction]:
    """(xt, t, s, coefs) -> Prediction of guide + scale (model - guide).

    The guide is the network without label and conditions (Ho and Salimans 2022, eq. 6), in the same batched call, or
    `guide_fn`, a worse model (Karras et al. 2024). The rule is linear, so it is the same for every model type. Outside
    the interval of t the plain network is evaluated alone (Kynkaanniemi et al. 2024). `rescale` is the phi of Lin et
    al. 2023, eq. 14-16, here on x0: 1 gives each predicted x0 the standard deviation that it has without guidance.
    """
    null, nulls = label, nulled(cond, null_cond)
    if label is not None and null_label is not None and not label.is_floating_point():
        null = torch.full_like(label, null_label)

    def predict(xt: Tensor, time: float, s: float | None, coefs: Coefs) -> Prediction:
        dtype = torch.promote_types(xt.dtype, torch.float32)  # bfloat16 has too few digits for a time
        t = torch.full((len(xt),), time, dtype=dtype, device=xt.device)
        goal = {} if s is None else {'s': torch.full_like(t, s)}
        given = {**cond, **goal}
        if scale == 1 or not interval[0] <= time <= interval[1]:
            return convert(first_part(model_fn(xt, t, label, **given)), t, xt, coefs)
        if guide_fn is not None:
            plain, guide = (first_part(fn(xt, t, label, **given)) for fn in (model_fn, guide_fn))
        else:
            without = {**nulls, **nulled(goal, null_cond)}
            labels = None if label is None or null is None else torch.cat([label, null])
            conds = {name: torch.cat([value, without[name]]) for name, value in given.items()}
            plain, guide = first_part(model_fn(torch.cat([xt, xt]), torch.cat([t, t]), labels, **conds)).chunk(2)
        prediction = convert(guide + scale * (plain - guide), t, xt, coefs)
        if rescale == 0:
            return prediction
        wide, usual = (
            bcast_right(p.x0.reshape(len(xt), -1).std(1, correction=0), xt.ndim)
            for p in (prediction, convert(plain, t, xt, coefs))
        )
        return Prediction(xt, coefs, x0=prediction.x0 * (1 + rescale * (torch.where(wide > 0, usual / wide, 1) - 1)))

    return predict


def on_device_of(x: Tensor, coefs: Coefs) -> Coefs:
    """Coefs (1,) on the CPU, with the device and type of x. Filled in there, not copied: copies make the CPU wait."""
    values = {name: value for name, value in vars(coefs).items() if isinstance(value, Tensor)}
    return dataclasses.replace(coefs, **{name: x.new_full((1,), value.item()) for name, value in values.items()})


def get_predict(
    model_fn: ModelFn,
    process: GaussianProcess,
    label: Tensor | None,
    *,
    model_type: str,
    cond: Mapping[str, Tensor] | None = None,
    sampling_process: GaussianProcess | None = None,
    memory: int = 0,
    guidance_scale: float = 1.0,
    null_label: int | None = None,
    null_cond: Mapping[str, Tensor | float] | None = None,
    guide_fn: ModelFn | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
) -> Predict:
    """The guided network as a function of x and t on the path of `sampling_process`, by default that of its training.

    Another process visits the same distributions at other times and scales: the network is asked at the time of equal
    log-SNR, about x scaled to match (Karras et al. 2022, section 3; Kingma et al. 2021, appendix); so is the `s` of
    `predict(x, t, s)`. A solver's `s` takes the place of a condition of that name in `cond`.
    """
    cond, null_cond = cond or {}, null_cond or {}
    if guidance_scale != 1 and guide_fn is None:
        has_null_label = label is not None and null_label is not None and not label.is_floating_point()
        unknown = sorted(null_cond.keys() - cond.keys() - {'s'})
        if unknown:
            raise SettingError(
                f'null_cond has a value for {unknown[0]!r}, which is not among the conditions: '
                f'{", ".join(cond) or "none"}. Pass it in cond too, or leave it out of null_cond.'
            )
        if not has_null_label and not null_cond:
            raise SettingError(
                f'guidance_scale={guidance_scale:g} needs something that a second evaluation leaves out: whole-number '
                'labels and their null_label, of a network trained with label_dropout above 0; or a condition and its '
                'value in null_cond; or a guide_fn, a second network.'
            )
    if guidance_scale == 1 and guide_fn is not None:
        raise SettingError('guidance_scale=1 makes nothing of guide_fn. Pass a scale above 1, or no guide_fn.')
    low, high = guidance_interval
    if not (0 <= low <= high <= 1 and 0 <= guidance_rescale <= 1):
        raise SettingError(
            f'guidance_interval=({low:g}, {high:g}), guidance_rescale={guidance_rescale:g}: need two times, '
            '0 <= from <= to <= 1, and a number between 0 and 1.'
        )
    predict = guided(
        model_fn,
        label,
        cond,
        get_model_convert_fn(model_type),
        scale=guidance_scale,
        null_label=null_label,
        null_cond=null_cond,
        guide_fn=guide_fn,
        interval=guidance_interval,
        rescale=guidance_rescale,
    )
    path = sampling_process or process

    def evaluate(x: Tensor, t: float, s: float | None = None) -> Prediction:
        here = coefs_at(path, t)
        if path is process:
            return predict(x, t, s, on_device_of(x, here))
        time = process.time_of_log_snr(here.log_snr)
        trained = process(time)
        scale = torch.hypot(trained.alpha, trained.sigma) / torch.hypot(here.alpha, here.sigma)
        if s is not None:
            s = process.time_of_log_snr(coefs_at(path, s).log_snr).item()
        prediction = predict(scale.item() * x, time.item(), s, on_device_of(x, trained))
        return Prediction(x, on_device_of(x, here), x0=prediction.x0, x1=prediction.x1)

    return Predict(evaluate, path, memory)


# ---------------------------------------------------------------- sampling


def get_grid(
    process: GaussianProcess, sampling_process: GaussianProcess | None, *, model_type: str, solver: str,
    num_steps: int, nfe: int, time_grid: str, t_min: float, t_max: float,
) -> list[float]:  # fmt: skip
    """The times that a solver visits, from high to low, after all checks that need no network. Raises SettingError.

    A solver with a way of its own to take few steps takes them at more noise on the grid logistic, the more the fewer.
    """
    method = choose('solver', solver, SOLVERS)
    cost = method.nfe
    make_grid = choose('time_grid', time_grid, TIME_GRIDS)
    if not 0 <= t_min < t_max <= 1:
        raise SettingError(f't_min={t_min:g}, t_max={t_max:g}: times need 0 <= t_min < t_max <= 1.')
    if num_steps < 1:
        raise SettingError(f'num_steps={num_steps}: must be at least 1.')
    if nfe and (cost is None or nfe < cost):
        need = (
            f'at least {cost} evaluations a step. Use {cost} or more'
            if cost
            else 'as many evaluations as its tolerance asks for. Set a number of steps instead'
        )
        raise SettingError(f'nfe={nfe} (--sample_nfe) with solver={solver!r}, which needs {need}, or another solver.')
    # a solver of one evaluation a step never looks at t_min
    check_ends(process, model_type, (t_max,) if cost == 1 else (t_max, t_min))
    if sampling_process is not None:
        t_max, t_min = sampling_process.time_of_log_snr(
            process.log_snr(torch.tensor([t_max, t_min], dtype=torch.float64))
        ).tolist()
        check_ends(sampling_process, 'v', (t_max,) if cost == 1 else (t_max, t_min), ('velocity',))
    n = nfe // cost if nfe and cost else num_steps
    if time_grid == 'logistic' and method.few and n <= FEW_STEPS:
        make_grid = partial(equal_steps, 'logistic', variable=logistic(centre=1.64 - 0.08 * n))
    return make_grid(sampling_process or process, t_max, t_min, n).tolist()


@torch.no_grad()
def sample(
    model_fn: ModelFn,
    process: GaussianProcess,
    x1: Tensor,
    label: Tensor | None = None,
    *,
    cond: Mapping[str, Tensor] | None = None,
    model_type: str = 'velocity',
    solver: str = 'adams',
    num_steps: int = 20,
    nfe: int = 0,
    time_grid: str = 'logistic',
    t_min: float = 0.001,
    t_max: float = 0.999,
    sampling_process: GaussianProcess | None = None,
    sde_noise: str = 'natural',
    sde_noise_scale: float = 1.0,
    sde_last_step: str = 'mean',
    guidance_scale: float = 1.0,
    null_label: int | None = None,
    null_cond: Mapping[str, Tensor | float] | None = None,
    guide_fn: ModelFn | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """x (B, ...) at t_min, from the base sample `x1` of that shape; label (B,) int64; cond: name -> (B, ...).

    Starts from sigma(t_max) x1 and takes exactly `num_steps` steps, each of `SOLVERS[solver].nfe` network evaluations;
    if `nfe` is not 0, as many steps as cost no more than that. Every call of the network gets label and cond. With
    `sampling_process`, another than the one trained with, t_min and t_max are still times of `process`: its path covers
    the same log-SNRs, as far as it has them. `sde_last_step` ends a stochastic solver, see LAST_STEPS.
    After step i, from 1, `callback(i, t, x)` is called.
    Guidance by `guidance_scale` compares the network with itself without label and conditions: it gets `null_label`,
    the class that means 'no label', and from `null_cond` the value of each condition that means 'none' (a number, or a
    tensor of the shape of one item). Conditions that have none there, and labels that are not whole numbers, are the
    same in both. Or it compares with `guide_fn`, a second model. `guidance_interval` of t, `guidance_rescale`: see
    `guided`.
    Neither label None nor null_label suits a network trained with label_dropout 0; `get_sample_fn` refuses that.
    Raises SettingError for an unknown choice, for a singular end that the solver would touch, for conditions that are
    not (B, ...), and for guidance with nothing to leave out.
    """
    cond = cond or {}
    check_cond(cond, len(x1))
    grid = get_grid(
        process, sampling_process, model_type=model_type, solver=solver, num_steps=num_steps, nfe=nfe,
        time_grid=time_grid, t_min=t_min, t_max=t_max,
    )  # fmt: skip
    method, last_step = SOLVERS[solver], choose('sde_last_step', sde_last_step, LAST_STEPS)
    noise = Noise(choose('sde_noise', sde_noise, SDE_NOISES), sde_noise_scale)
    predict = get_predict(
        model_fn,
        process,
        label,
        model_type=model_type,
        cond=cond,
        sampling_process=sampling_process,
        memory=method.memory,
        guidance_scale=guidance_scale,
        null_label=null_label,
        null_cond=null_cond,
        guide_fn=guide_fn,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
    )

    usual = method.few if method.few and len(grid) - 1 <= FEW_STEPS else method.step
    x = coefs_at(predict.process, grid[0]).sigma.item() * x1
    for i, (t, s) in enumerate(itertools.pairwise(grid), 1):
        predict.steps_left = len(grid) - i
        step = last_step if method.stochastic and predict.steps_left == 1 else usual
        x = step(x, t, s, predict, noise)
        if callback is not None:
            callback(i, s, x)
    return x


def get_sample_fn(
    config: Config,
    process: GaussianProcess,
    null_label: int,
    null_cond: Mapping[str, Tensor | float] | None = None,
) -> Callable[..., Tensor]:
    """`sample` with the config's settings: `fn(model_fn, x1=..., label=..., cond=...)`, or others by keyword.

    `null_label`: the number of classes, which means 'no label'. Raises SettingError, now or in the call.
    """
    path: dict[str, Any] = dict(
        model_type=config.model_type,
        solver=config.solver,
        num_steps=config.num_sample_steps,
        nfe=config.sample_nfe,
        time_grid=config.time_grid,
        t_min=config.t_min,
        t_max=config.t_max,
    )
    get_grid(process, None, **path)
    null_class_is_trained = 0 < config.label_dropout < 1 and null_label != 0  # 0: the data have no classes
    settings: dict[str, Any] = dict(
        process=process,
        **path,
        sde_noise=config.sde_noise,
        sde_noise_scale=config.sde_noise_scale,
        sde_last_step=config.sde_last_step,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        guidance_rescale=config.guidance_rescale,
        null_label=null_label if null_class_is_trained else None,
        null_cond=null_cond,
    )

    def configured_sample(model_fn: ModelFn, x1: Tensor, label: Tensor | None = None, **others: Any) -> Tensor:
        chosen = settings | others
        scale, guide = chosen['guidance_scale'], chosen.get('guide_fn') or chosen['null_cond']
        if scale != 1 and not guide and not null_class_is_trained:
            raise SettingError(
                f'guidance_scale={scale:g}: with {null_label} classes and label_dropout={config.label_dropout:g} the '
                'network did not learn both classes and their absence. Train with classes and --label_dropout 0.1, '
                'pass null_cond or a guide_fn (a second network), or use guidance_scale=1.'
            )
        return sample(model_fn, x1=x1, label=label, **chosen)

    return configured_sample
