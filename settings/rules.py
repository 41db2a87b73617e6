"""Which values the settings may have: rules for single settings and for several together."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from runtime.errors import SettingError, choose

# Choices of the settings that have no table.
CHOICES = dict(
    precision=('auto', 'float32', 'tf32', 'bfloat16'),
    fit=('crop', 'pad', 'stretch'),
    compile=('auto', 'on', 'off', 'graphs'),
    wandb=('auto', 'online', 'offline', 'disabled'),
    padding=('zeros', 'circular'),
    array_layout=('', 'channels_first', 'channels_last', 'no_channels'),
)
# Rules for single settings: (settings, does this value obey the rule?, the rule as text).
RULES: list[tuple[str, Callable[[Any], Any], str]] = [
    ('global_batch_size batch_shards accumulation_steps num_training_steps max_bad_steps keep_last num_sample_steps '
     'num_res_blocks dit_patch', lambda n: n >= 1, 'must be at least 1'),
    ('columns', lambda names: len(names) <= 2, 'must be one or two names: image column, class column'),
    ('value_range', lambda vs: not vs or (len(vs) == 2 and vs[0] < vs[1]), 'must be two numbers, LOW < HIGH'),
    ('image_size', lambda ns: len(ns) in (1, 2) and min(ns) >= 1, 'must be height and width, or one number for both'),
    ('seed held_out log_every save_every keep_every sample_every eval_every eval_metrics_every warmup_steps '
     'num_workers max_translation sample_nfe dit_depth dit_width dit_heads weight_decay grad_clip_norm min_lr '
     'sde_noise_scale guidance_scale beta_min', lambda x: x >= 0, 'must be 0 or more'),
    ('flip_prob rotate_prob translate_prob crop_prob geometric_prob label_dropout guidance_rescale',
     lambda p: 0 <= p <= 1, 'must lie between 0 and 1'),
    ('dropout', lambda p: 0 <= p < 1, 'must be at least 0 and below 1'),
    ('base_lr time_std sigma_data sigma_min adam_eps', lambda x: x > 0, 'must be positive'),
    ('channels', lambda n: n >= 2 and n % 2 == 0, 'must be positive and even: half of them are cosines of the time'),
    ('channel_mults', lambda ms: len(ms) > 0 and min(ms) >= 1, 'needs one or more positive whole numbers'),
    ('adam_betas', lambda bs: len(bs) == 2 and all(0 <= b < 1 for b in bs), 'must be two numbers in [0, 1)'),
    ('ema_decays', lambda ds: all(0 < d < 1 for d in ds), 'must lie between 0 and 1'),
    ('ema_decays', lambda ds: len(set(ds)) == len(ds), 'holds the same decay twice'),
    ('guidance_interval', lambda ts: 0 <= ts[0] <= ts[1] <= 1, 'must be two times, 0 <= from <= to <= 1'),
    ('experiment_name', lambda name: re.fullmatch(r'([A-Za-z0-9_][A-Za-z0-9_+=-]*)?', name),
     'must be a plain folder name: letters, digits and _ - + = only, no slash and no dots'),
]  # fmt: skip


def only(config: Any, **values: Any) -> None:
    """For an experiment whose formulas hold only for these values of settings: raise SettingError for others."""
    for name, value in values.items():
        if (given := getattr(config, name)) != value:
            text = f'{name}={given!r}: the formulas of this experiment hold only for {name}={value!r}'
            raise SettingError(f'{text}. Leave out --{name}.')


def nearest(value: int, choices: Collection[int]) -> str:
    """The choices just below and just above `value`, as text: '96 or 104'."""
    below, above = [n for n in choices if n < value], [n for n in choices if n > value]
    return ' or '.join(map(str, sorted(below)[-1:] + sorted(above)[:1]))


def batch_size_near(c: Any) -> str:
    """Advice: the nearest values of global_batch_size that give equal shards, and even ones for antithetic times."""
    unit = c.batch_shards * (2 if c.antithetic else 1)
    return f'use --global_batch_size {nearest(c.global_batch_size, range(unit, c.global_batch_size + 2 * unit, unit))}'


# Rules for several settings: (settings, does the config obey it?, the rule as text or as a function of the config).
RULES_OF_SEVERAL: list[tuple[str, Callable[[Any], bool], str | Callable[[Any], str]]] = [
    ('min_lr base_lr', lambda c: c.min_lr <= c.base_lr, 'min_lr must not be above base_lr'),
    ('warmup_steps num_training_steps', lambda c: c.warmup_steps < c.num_training_steps,
     'the warm-up must be shorter than the training: lower --warmup_steps'),
    ('t_min t_max', lambda c: 0 <= c.t_min < c.t_max <= 1, 'times need 0 <= t_min < t_max <= 1'),
    ('beta_min beta_max', lambda c: c.beta_max >= c.beta_min and c.beta_max > 0,
     'beta_max must be positive and not below beta_min'),
    ('sigma_min sigma_max', lambda c: c.sigma_max > c.sigma_min, 'sigma_max must be above sigma_min'),
    ('global_batch_size batch_shards', lambda c: c.global_batch_size % c.batch_shards == 0,
     lambda c: f'the batch must be divisible by its shards: {batch_size_near(c)}'),
    ('batch_shards accumulation_steps', lambda c: c.batch_shards % c.accumulation_steps == 0,
     lambda c: 'accumulation_steps times the processes must divide the shards: use --accumulation_steps '
     + nearest(c.accumulation_steps, [n for n in range(1, c.batch_shards + 1) if c.batch_shards % n == 0])),
    ('antithetic global_batch_size batch_shards',
     lambda c: not c.antithetic or c.global_batch_size // c.batch_shards % 2 == 0,
     lambda c: f'mirrored pairs need an even number of images in a shard: {batch_size_near(c)}'),
    ('stratified antithetic', lambda c: not (c.stratified and c.antithetic),
     'times are drawn in one way or the other: add --no_stratified'),
    ('ema_type ema_decays', lambda c: c.ema_type != 'power' or all(0.01 <= d <= 0.25 for d in c.ema_decays),
     'for power averages, ema_decays are widths from 0.01 to 0.25: add --ema_decays 0.05'),
    ('dit_size dit_depth dit_width dit_heads',
     lambda c: c.dit_size == 'S' or not (c.dit_depth and c.dit_width and c.dit_heads),
     'nothing is left for dit_size to decide: leave one of the three at 0, or add --dit_size S'),
    ('guidance_scale label_dropout', lambda c: c.guidance_scale == 1 or 0 < c.label_dropout < 1,
     'guidance needs a trained null class, or null values of conditions (null_cond of the trainer class): train with '
     '--label_dropout 0.1, or use --guidance_scale 1'),
]  # fmt: skip


PLAIN = (
    'Make it a str (the path, or the name of an Enum or of an entry of a table), a number, a bool, or a tuple, list, '
    'dict or dataclass of these.'
)


def unsavable(value: Any) -> str:
    """The part of a value, as text, that JSON or torch.load(weights_only=True) could not restore; '' if none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return 'a dict whose keys are not all strings'
    if isinstance(value, (tuple, list, dict)):
        return next(filter(None, map(unsavable, value.values() if isinstance(value, dict) else value)), '')
    return '' if value is None or type(value) in (str, int, float, bool) else f'a value of type {type(value).__name__}'


def refuse_non_settings(kind: type) -> None:
    """Raise SettingError for an attribute of a config class that looks like a setting and that nothing would read: only
    `name: type = value` in a dataclass is a setting."""
    for cls in (cls for cls in kind.__mro__ if hasattr(cls, '__dataclass_fields__')):
        typed, is_decorated = inspect.get_annotations(cls), '__dataclass_params__' in vars(cls)
        values = [n for n, v in vars(cls).items() if n.islower() and n[0] != '_' and not hasattr(v, '__get__')]
        if names := [name for name in [*typed, *values] if not (is_decorated and name in typed)]:
            raise SettingError(
                f'{cls.__name__}.{names[0]} is not a setting: write {names[0]}: type = value, and '
                f'@dataclass(frozen=True) above class {cls.__name__}.'
            )


def validate(config: Any, presets: Mapping[str, Any]) -> None:
    """Raise SettingError for the first value that breaks a rule."""
    refuse_non_settings(type(config))
    choose('preset', config.preset, presets)
    for name, values in CHOICES.items():
        choose(name, getattr(config, name), dict.fromkeys(values))

    def require(kept: object, names: str, rule: str | Callable[[Any], str]) -> None:
        if not kept:
            rule = rule if isinstance(rule, str) else rule(config)
            given = ', '.join(f'{name}={getattr(config, name)!r}' for name in names.split())
            raise SettingError(f'{given}: {rule}.')

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if bad := unsavable(value):
            raise SettingError(f'{field.name}={value!r}: config.json and checkpoints cannot hold {bad}. {PLAIN}')
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, float)]
        require(all(map(math.isfinite, numbers)), field.name, 'must be a finite number')
    for names, keeps, rule in RULES:
        for name in names.split():
            require(keeps(getattr(config, name)), name, rule)
    for names, keeps, rule in RULES_OF_SEVERAL:
        require(keeps(config), names, rule)
