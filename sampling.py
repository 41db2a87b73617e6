"""Sampling from noise to data, and guidance. t runs from t_max down to t_min; solvers/ has the steps and time grids.

`sample` is for notebooks; `get_sample_fn` gives it the settings of a run. x may have any shape (B, ...).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from config import Config, SettingError, choose
from prediction import Prediction, get_model_convert_fn
from processes import Coefs, GaussianProcess
from solvers import LAST_STEPS, SDE_NOISES, SOLVERS, Noise, Predict, Predictor, Steps, shift_of
from solvers import TIME_GRIDS as TIME_GRIDS  # users import it from here too
from solvers.path import Callback, follow, on_path
from utils import bcast_right

# model_fn(xt, t, label=None, **cond) -> what the network approximates, or a tuple of that and anything else
ModelFn = Callable[..., Tensor | tuple]

# ---------------------------------------------------------------- guidance


@dataclass(frozen=True)
class Guidance:
    """guide + scale (model - guide), for t in the interval; it is linear, so it is the same rule for every model type.

    The guide is the network without label and conditions (Ho and Salimans 2022, eq. 6), in the same batched call, or
    `guide_fn`, a worse model (Karras et al. 2024). Outside the interval only the plain network is evaluated
    (Kynkaanniemi et al. 2024). Raises SettingError for impossible values.
    """

    scale: float = 1.0  # 1: no guidance
    null_label: int | None = None  # the class that means 'no label'
    null_cond: Mapping[str, Tensor | float] = field(default_factory=dict)  # condition -> its value for 'not given'
    guide_fn: ModelFn | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0  # phi of Lin et al. 2023, eq. 14-16, on x0: with 1 each x0 has its unguided standard deviation

    def __post_init__(self) -> None:
        low, high = self.interval
        if self.scale == 1 and self.guide_fn is not None:
            raise SettingError('guidance_scale=1: guide_fn has no effect. Pass a scale above 1, or no guide_fn.')
        if not (0 <= low <= high <= 1 and 0 <= self.rescale <= 1):
            raise SettingError(
                f'guidance_interval=({low:g}, {high:g}), guidance_rescale={self.rescale:g}: need two times, '
                '0 <= from <= to <= 1, and a number between 0 and 1.'
            )

    def null_of(self, label: Tensor | None) -> Tensor | None:
        """The null class for each item of `label`; `label` itself if there is no null class or labels are floats."""
        if label is None or self.null_label is None or label.is_floating_point():
            return label
        return torch.full_like(label, self.null_label)

    def check(self, label: Tensor | None, cond: Mapping[str, Tensor]) -> None:
        """Raise SettingError if there is nothing that the second evaluation of guidance could leave out."""
        if self.scale == 1 or self.guide_fn is not None:
            return
        unknown = sorted(self.null_cond.keys() - cond.keys() - {'s'})
        if unknown:
            raise SettingError(
                f'null_cond has a value for {unknown[0]!r}, which is not among the conditions: '
                f'{", ".join(cond) or "none"}. Pass it in cond too, or leave it out of null_cond.'
            )
        if self.null_of(label) is label and not self.null_cond:
            raise SettingError(
                f'guidance_scale={self.scale:g} needs something that a second evaluation leaves out: whole-number '
                'labels and their null_label, of a network trained with label_dropout above 0; or a condition and its '
                'value in null_cond; or a guide_fn, a second network.'
            )

    def predictor(
        self, model_fn: ModelFn, label: Tensor | None, cond: Mapping[str, Tensor], model_type: str
    ) -> Predictor:
        """The guided network with this label and these conditions. Raises SettingError."""
        self.check(label, cond)
        convert = get_model_convert_fn(model_type)
        null, nulls = self.null_of(label), nulled(cond, self.null_cond)

        def predict(xt: Tensor, time: float, s: float | None, coefs: Coefs) -> Prediction:
            dtype = torch.promote_types(xt.dtype, torch.float32)  # bfloat16 has too few digits for a time
            t = torch.full((len(xt),), time, dtype=dtype, device=xt.device)
            goal = {} if s is None else {'s': torch.full_like(t, s)}
            given = {**cond, **goal}
            if self.scale == 1 or not self.interval[0] <= time <= self.interval[1]:
                return convert(model_fn(xt, t, label, **given), t, xt, coefs)
            if self.guide_fn is not None:
                plain, guide = (first_part(fn(xt, t, label, **given)) for fn in (model_fn, self.guide_fn))
            else:
                without = {**nulls, **nulled(goal, self.null_cond)}
                labels = None if label is None or null is None else torch.cat([label, null])
                conds = {name: torch.cat([value, without[name]]) for name, value in given.items()}
                plain, guide = first_part(model_fn(torch.cat([xt, xt]), torch.cat([t, t]), labels, **conds)).chunk(2)
            guided = convert(guide + self.scale * (plain - guide), t, xt, coefs)
            return rescaled(guided, convert(plain, t, xt, coefs), self.rescale) if self.rescale else guided

        return predict


def first_part(out: Tensor | tuple) -> Tensor:
    """The prediction: a network may return a tuple, with other outputs after it."""
    return out[0] if isinstance(out, tuple) else out


def rescaled(guided: Prediction, plain: Prediction, share: float) -> Prediction:
    """`guided`, with the standard deviation of each x0 as it is (share 0) or as in `plain` (share 1)."""
    xt = guided.xt
    wide, target = (bcast_right(p.x0.reshape(len(xt), -1).std(1, correction=0), xt.ndim) for p in (guided, plain))
    ratio = torch.where(wide > 0, target / torch.where(wide > 0, wide, 1), 1)  # also without 0 / 0 in its gradient
    return Prediction(xt, guided.coefs, x0=guided.x0 * (1 + share * (ratio - 1)))


def nulled(cond: Mapping[str, Tensor], null_cond: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """`cond` with the null value for each condition that has one, broadcast to (B, ...). Raises SettingError."""
    out = dict(cond)
    for name in cond.keys() & null_cond.keys():
        like, null = cond[name], null_cond[name]
        dtype = like.dtype if like.is_floating_point() else None  # whole numbers may have a null value of 0.5
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


def check_given(label: Tensor | None, cond: Mapping[str, Tensor], batch: int) -> None:
    """Raise SettingError unless the label, if there is one, and all conditions are tensors (batch, ...)."""
    named: dict[str, object] = {f'cond[{name!r}]': value for name, value in cond.items()}
    for name, value in (named if label is None else named | {'label': label}).items():
        if not isinstance(value, Tensor) or value.shape[:1] != (batch,):
            given = f'shape {tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)
            raise SettingError(f'{name} is {given}. Pass a tensor of {batch} items: shape ({batch}, ...).')


# ---------------------------------------------------------------- sampling


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
    callback: Callback | None = None,
    on_prediction: Callable[[float, Prediction], None] | None = None,
    grad: bool = False,
) -> Tensor:
    """x (B, ...) at t_min, from the base sample `x1` of that shape; label (B,) int64; cond: name -> (B, ...).

    Starts from sigma(t_max) x1, or later if the output says nothing about x0 there (`Steps.start`). Takes exactly
    `num_steps` steps of `SOLVERS[solver].nfe` network evaluations each; if `nfe` is not 0, it is the budget of
    evaluations that sets the number of steps. Every call of the network gets label and cond; a solver for networks of
    two times replaces the condition `s`. `sampling_process` is a process other than the trained one: t_min and t_max
    are still times of `process`, and the path covers the same log-SNRs, as far as it has them. The grid logistic is at
    more noise for images of more than 8 x 8 pixels (`solvers.shift_of`). `sde_last_step` is the last step of a
    stochastic solver, see LAST_STEPS. `callback(i, t, x)` is called after step i, from 1, and `on_prediction(t,
    prediction)` after each evaluation of the network at time t.
    If `guidance_scale` is not 1, the network is compared with itself without label and conditions. It then gets
    `null_label`, the class that means 'no label', and for each condition its value in `null_cond`, which means 'not
    given' (a number, or a tensor of the shape of one item). Conditions without a null value, and labels that are
    floats, are the same in both. Or the network is compared with `guide_fn`, a second model. For `guidance_interval` of
    t and `guidance_rescale` see `Guidance`.
    A network trained with label_dropout 0 knows no null class: pass labels. `get_sample_fn` refuses such guidance.
    With `grad`, x can be differentiated by x1, conditions and weights, also by a caller under torch.no_grad; memory
    grows with the number of evaluations. The noise of a stochastic solver and adaptive step sizes are constants then.
    Raises SettingError for an unknown choice, for a singular end that the solver would evaluate, for a label or
    conditions that are not (B, ...), for guidance with nothing to leave out, and for `grad` where x has no gradient.
    """
    cond, sampling_process = cond or {}, sampling_process or process
    check_given(label, cond, len(x1))
    steps = Steps(solver, num_steps, nfe, time_grid, t_min, t_max, shift_of(x1.shape[1:]))
    times = steps.times(process, sampling_process, model_type)
    last_step = choose('sde_last_step', sde_last_step, LAST_STEPS)
    noise = Noise(choose('sde_noise', sde_noise, SDE_NOISES), sde_noise_scale, last_step)
    guidance = Guidance(guidance_scale, null_label, null_cond or {}, guide_fn, guidance_interval, guidance_rescale)
    method = SOLVERS[solver]
    is_late = steps.start(process, model_type) < t_max
    with torch.set_grad_enabled(grad):
        evaluate = on_path(guidance.predictor(model_fn, label, cond, model_type), process, sampling_process)
        predict = Predict(evaluate, sampling_process, method.memory, on_prediction)
        x = follow(method, times, x1, predict, noise, callback, is_late)
    if grad and not x.requires_grad:
        raise SettingError(
            f'grad=True: samples of solver={solver!r} have no gradient. Call requires_grad_() on x1, a condition or '
            'the weights; or, if one of them has it, use a solver and a network that do not detach their results.'
        )
    return x


# settings that the config and `sample` share
SETTINGS = (
    'model_type solver time_grid t_min t_max sde_noise sde_noise_scale sde_last_step '
    'guidance_scale guidance_interval guidance_rescale'
).split()


def get_sample_fn(
    config: Config, process: GaussianProcess, null_label: int, null_cond: Mapping[str, Tensor | float] | None = None
) -> Callable[..., Tensor]:
    """`sample` with the config's settings: `fn(model_fn, x1=..., label=..., cond=...)`; keywords override them.

    `null_label`: the number of classes, which means 'no label'. Raises SettingError, now or in the call.
    """
    null_is_trained = 0 < config.label_dropout < 1 and null_label != 0
    of_run: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS}
    of_run |= dict(process=process, num_steps=config.num_sample_steps, nfe=config.sample_nfe, null_cond=null_cond)
    of_run['null_label'] = null_label if null_is_trained else None
    steps = Steps(config.solver, of_run['num_steps'], of_run['nfe'], config.time_grid, config.t_min, config.t_max)
    steps.times(process, process, config.model_type)  # impossible settings fail now, not when the run first samples

    def sample_fn(model_fn: ModelFn, x1: Tensor, label: Tensor | None = None, **given: Any) -> Tensor:
        chosen = of_run | given
        if 'num_steps' in given:  # which the run's nfe would override
            chosen['nfe'] = given.get('nfe', 0)
        scale, guide = chosen['guidance_scale'], chosen.get('guide_fn') or chosen['null_cond']
        if scale != 1 and not guide and not null_is_trained:
            raise SettingError(
                f'guidance_scale={scale:g}: with {null_label} classes and label_dropout={config.label_dropout:g} '
                'the network did not learn both classes and their absence. Train with classes and --label_dropout 0.1, '
                'give conditions a null value (null_cond of the trainer class), pass a guide_fn (a second network), or '
                'use guidance_scale=1.'
            )
        return sample(model_fn, x1=x1, label=label, **chosen)

    return sample_fn
