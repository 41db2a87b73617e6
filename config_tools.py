"""What config.py needs beside the settings: rules that their values keep, what makes two configs different experiments,
and names of runs."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

# ---------------------------------------------------------------- rules

# Rules that each of some settings keeps by itself: (settings, does this value keep it?, the rule in words).
RULES: list[tuple[str, Callable[[Any], Any], str]] = [
    ('global_batch_size batch_shards accumulation_steps num_training_steps', lambda n: n >= 1, 'must be at least 1'),
    ('max_bad_steps keep_last num_sample_steps num_res_blocks', lambda n: n >= 1, 'must be at least 1'),
    ('columns', lambda names: len(names) <= 2, 'must be one or two names: of images, and of classes'),
    ('image_size', lambda ns: len(ns) in (1, 2) and min(ns) >= 1, 'must be one or two positive numbers of pixels'),
    ('seed held_out log_every save_every keep_every sample_every', lambda n: n >= 0, 'must be 0 or more'),
    ('eval_every eval_metrics_every', lambda n: n >= 0, 'must be 0 or more'),
    ('warmup_steps num_workers max_translation sample_nfe', lambda n: n >= 0, 'must be 0 or more'),
    ('flip_prob rotate_prob translate_prob label_dropout', lambda p: 0 <= p <= 1, 'must lie between 0 and 1'),
    ('guidance_rescale', lambda x: 0 <= x <= 1, 'must lie between 0 and 1'),
    ('dropout', lambda p: 0 <= p < 1, 'must be at least 0 and below 1'),
    ('base_lr time_std sigma_data sigma_min adam_eps', lambda x: x > 0, 'must be positive'),
    ('weight_decay grad_clip_norm min_lr sde_noise_scale', lambda x: x >= 0, 'must not be negative'),
    ('guidance_scale beta_min', lambda x: x >= 0, 'must not be negative'),
    ('dit_depth dit_width dit_heads', lambda n: n >= 0, 'must be 0 or more'),
    ('dit_patch', lambda n: n >= 1, 'must be at least 1'),
    ('channels', lambda n: n >= 2 and n % 2 == 0, 'must be positive and even: half of them are cosines of the time'),
    ('channel_mults', lambda ms: len(ms) > 0 and min(ms) >= 1, 'needs one or more positive whole numbers'),
    ('adam_betas', lambda bs: len(bs) == 2 and all(0 <= b < 1 for b in bs), 'must be two numbers in [0, 1)'),
    ('ema_decays', lambda ds: all(0 < d < 1 for d in ds), 'must lie between 0 and 1'),
    ('ema_decays', lambda ds: len(set(ds)) == len(ds), 'holds the same decay twice'),
    ('guidance_interval', lambda ts: 0 <= ts[0] <= ts[1] <= 1, 'must be two times, 0 <= from <= to <= 1'),
    (
        'experiment_name',
        lambda name: re.fullmatch(r'([A-Za-z0-9_][A-Za-z0-9_+=-]*)?', name),
        'must be a plain folder name: letters, digits and _ - + = only, no slash and no dots',
    ),
]


def nearest(value: int, choices: Collection[int]) -> str:
    """The choices just below and just above `value`, in words: '96 or 104'."""
    below = max((n for n in choices if n < value), default=None)
    above = min((n for n in choices if n > value), default=None)
    return ' or '.join(str(n) for n in (below, above) if n is not None)


def batch_size_near(c: Any) -> str:
    """Values of global_batch_size that its shards divide, and with antithetic times into even shards."""
    unit = c.batch_shards * (2 if c.antithetic else 1)
    return f'use --global_batch_size {nearest(c.global_batch_size, range(unit, c.global_batch_size + 2 * unit, unit))}'


def accumulation_near(c: Any) -> str:
    """Values of accumulation_steps that divide the shards."""
    parts = [n for n in range(1, c.batch_shards + 1) if c.batch_shards % n == 0]
    return f'use --accumulation_steps {nearest(c.accumulation_steps, parts)}'


# Rules for several settings together: (settings, does the config keep it?, the rule in words, or those of a config).
RULES_OF_SEVERAL: list[tuple[str, Callable[[Any], bool], str | Callable[[Any], str]]] = [
    ('min_lr base_lr', lambda c: c.min_lr <= c.base_lr, 'min_lr must not be above base_lr'),
    (
        'warmup_steps num_training_steps',
        lambda c: c.warmup_steps < c.num_training_steps,
        'the warm-up must be shorter than the training: lower --warmup_steps',
    ),
    ('t_min t_max', lambda c: 0 <= c.t_min < c.t_max <= 1, 'times need 0 <= t_min < t_max <= 1'),
    (
        'beta_min beta_max',
        lambda c: c.beta_max >= c.beta_min and c.beta_max > 0,
        'beta_max must be positive and not below beta_min',
    ),
    ('sigma_min sigma_max', lambda c: c.sigma_max > c.sigma_min, 'sigma_max must be above sigma_min'),
    (
        'global_batch_size batch_shards',
        lambda c: c.global_batch_size % c.batch_shards == 0,
        lambda c: f'the batch must be divisible by its shards: {batch_size_near(c)}',
    ),
    (
        'batch_shards accumulation_steps',
        lambda c: c.batch_shards % c.accumulation_steps == 0,
        lambda c: f'accumulation_steps times the processes must divide the shards: {accumulation_near(c)}',
    ),
    (
        'antithetic global_batch_size batch_shards',
        lambda c: not c.antithetic or c.global_batch_size // c.batch_shards % 2 == 0,
        lambda c: f'mirrored pairs need an even number of images in a shard: {batch_size_near(c)}',
    ),
    (
        'stratified antithetic',
        lambda c: not (c.stratified and c.antithetic),
        'times are drawn in one way or the other: add --no_stratified',
    ),
    (
        'dit_size dit_depth dit_width dit_heads',
        lambda c: c.dit_size == 'S' or not (c.dit_depth and c.dit_width and c.dit_heads),
        'nothing is left for dit_size to decide: add --dit_depth 0 --dit_width 0 --dit_heads 0, or drop --dit_size',
    ),
    (
        'guidance_scale label_dropout',
        lambda c: c.guidance_scale == 1 or 0 < c.label_dropout < 1,
        'guidance needs a trained null class: train with --label_dropout 0.1, or use --guidance_scale 1',
    ),
]


# ---------------------------------------------------------------- what makes two configs different experiments

# Settings that do not change what a run has learned so far: a run may be resumed with other values of these,
# and they do not show in its default name. num_training_steps joins them under a schedule that never looks at it.
FREE_ON_RESUME = frozenset(
    'preset experiment_name ckpt_dir data_dir data_path skip_unreadable debug check same_code final_eval '
    'final_pictures num_workers accumulation_steps max_bad_steps '
    'log_every save_every keep_last keep_every sample_every eval_every eval_metrics_every '
    'wandb wandb_project wandb_entity solver num_sample_steps sample_nfe time_grid sde_noise sde_noise_scale '
    'sde_last_step guidance_scale guidance_interval guidance_rescale compile'.split()
)
SCHEDULES_WITHOUT_END = ('constant', 'inverse_sqrt')


def defines_experiment(name: str, config: Any) -> bool:
    """Whether another value of setting `name` would make this another experiment."""
    if name == 'num_training_steps':
        return config.lr_schedule_type not in SCHEDULES_WITHOUT_END
    return name not in FREE_ON_RESUME


def class_defaults(config: Any) -> dict[str, Any]:
    """The default of every setting, as its class has it."""
    fields = dataclasses.fields(config)
    return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}


def renewed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an older version saved, as they are now."""
    settings = {'optimizer': 'adamw', **settings}  # there was no other
    if isinstance(settings.get('image_size'), int):
        settings['image_size'] = (settings['image_size'],)
    if isinstance(settings.get('compile'), bool):
        settings['compile'] = 'on' if settings['compile'] else 'off'
    return settings


def changes(saved: Mapping[str, Any], config: Any, only: Collection[str] | None = None) -> dict[str, tuple]:
    """Setting -> (saved, now) where the values (of `only`, if given) make these two configs different experiments.

    `saved` is `dataclasses.asdict` of the other config, perhaps after a trip through JSON (tuples are lists then).
    A setting that `saved` lacks is newer than it and counts as its class default; one that the class lacks is 'absent'.
    """
    saved, now = class_defaults(config) | renewed(saved), dataclasses.asdict(config)
    names = [name for name in {**now, **saved} if (defines_experiment(name, config) if only is None else name in only)]
    pairs = {name: (saved[name], now.get(name, 'absent')) for name in names}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {name: pair for name, pair in pairs.items() if name not in now or plain(pair[0]) != plain(pair[1])}


def differences(saved: Mapping[str, Any], config: Any, only: Collection[str] | None = None) -> list[str]:
    """`changes` as lines 'name: saved -> now'."""
    return [f'{name}: {before} -> {after}' for name, (before, after) in changes(saved, config, only).items()]


# ---------------------------------------------------------------- names of runs

LONGEST_NAME = 120  # characters


def in_name(name: str, value: Any) -> str:
    """A setting as a part of a folder name: `channel_mults=1-2-2`."""
    text = '-'.join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f'{name}={re.sub(r"(?<=[0-9])[.](?=[0-9])", "p", text)}'


def folder_name(parts: list[str]) -> str:
    """The parts, joined by _, with - for what is no letter, digit, _, =, + or -.

    A name that would be too long gets a hash of the whole, and of its settings and values the longest are cut in the
    middle, where + stands for what is left out: so every part is still there to be seen, and no two names are the same.
    """
    plain = [re.sub('[^A-Za-z0-9_+=-]', '-', part) for part in parts]
    folder = '_'.join(plain)
    if len(folder) <= LONGEST_NAME:
        return folder
    end = '_' + hashlib.sha256('_'.join(parts).encode()).hexdigest()[:8]
    for width in range(60, 2, -1):
        cut = ['='.join(cut_middle(text, width) for text in part.split('=')) for part in plain]
        folder = '_'.join(cut) + end
        if len(folder) <= LONGEST_NAME:
            return folder
    return folder[: LONGEST_NAME - len(end)] + end


def cut_middle(text: str, width: int) -> str:
    """`text`, or its beginning and end around a +, `width` characters long."""
    end = (width - 1) // 2
    return text if len(text) <= width else text[: width - 1 - end] + '+' + text[len(text) - end :]
