"""Which settings define an experiment: what a resumed run may change, and how two configs differ."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

# Settings that do not change what a run has learned so far: a run may be resumed with other values of these, and its
# default name leaves them out. num_training_steps joins them under a schedule that never looks at it.
FREE_ON_RESUME = frozenset(
    'preset experiment_name ckpt_dir data_dir data_path skip_unreadable debug check same_code final_eval '
    'final_pictures num_workers accumulation_steps max_bad_steps '
    'log_every save_every keep_last keep_every sample_every eval_every eval_metrics_every '
    'wandb wandb_project wandb_entity solver num_sample_steps sample_nfe time_grid sde_noise sde_noise_scale '
    'sde_last_step guidance_scale guidance_interval guidance_rescale compile'.split()
)
# Settings that shape a network's weights: they must be the same to load weights.
NETWORK_SETTINGS = (
    'network channels channel_mults num_res_blocks attention_resolutions '
    'dit_size dit_depth dit_width dit_heads dit_patch'
).split()
# Settings that the machines of one run may differ in.
MAY_DIFFER = ('data_dir', 'data_path', 'num_workers')
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


def migrated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings saved by an older version, in today's form."""
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
    saved, now = class_defaults(config) | migrated(saved), dataclasses.asdict(config)
    plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    names = [name for name in {**now, **saved} if (defines_experiment(name, config) if only is None else name in only)]
    differ = [name for name in names if name not in now or plain(saved[name]) != plain(now[name])]
    return {name: (saved[name], now.get(name, 'absent')) for name in differ}


def differences(saved: Mapping[str, Any], config: Any, only: Collection[str] | None = None) -> list[str]:
    """`changes` as lines 'name: saved -> now'."""
    return [f'{name}: {before} -> {after}' for name, (before, after) in changes(saved, config, only).items()]
