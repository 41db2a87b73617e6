"""The settings that define an experiment: what a resumed run may change, how configs differ, and default names."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

# Settings that do not change what a run has learned so far: a run may be resumed with other values of these, and its
# default name leaves them out. num_training_steps joins them under a schedule that never looks at it.
FREE_ON_RESUME = frozenset(
    'preset settings experiment_name ckpt_dir data_dir data_path skip_unreadable debug check same_code final_eval '
    'final_pictures raw_pictures num_workers accumulation_steps max_bad_steps '
    'log_every save_every keep_last keep_every sample_every eval_every eval_metrics_every '
    'wandb wandb_project wandb_entity solver num_sample_steps sample_nfe time_grid sde_noise sde_noise_scale '
    'sde_last_step guidance_scale guidance_interval guidance_rescale compile checkpointing'.split()
)
# Settings of a network that belong to its weights: a run that starts from weights takes these settings with them.
NETWORK_SETTINGS = (
    'network channels channel_mults num_res_blocks attention_resolutions padding '
    'dit_size dit_depth dit_width dit_heads dit_patch'
).split()
# Settings that may differ between the machines of a run.
MAY_DIFFER = ('data_dir', 'data_path', 'num_workers')
SCHEDULES_WITHOUT_END = ('constant', 'inverse_sqrt')
LONGEST_NAME = 60  # characters of a default name
LONGEST_OLD_NAME = 120  # characters of a default name in older versions
LONGEST_VALUE = 16  # characters of each value in a shortened name
# Order in a shortened name: these first, data_dir last, each only if there is room for it.
FIRST = 'preset data_path init_from process_name model_type target_type loss_weight network base_lr seed'.split()


def defines_experiment(name: str, config: Any) -> bool:
    """Whether another value of setting `name` would make this another experiment."""
    if name == 'num_training_steps':
        return config.lr_schedule_type not in SCHEDULES_WITHOUT_END
    return name not in FREE_ON_RESUME


def class_defaults(config: Any) -> dict[str, Any]:
    """The default of every setting in the class of `config`."""
    fields = dataclasses.fields(config)
    return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}


def migrated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings saved by an older version, in today's form."""
    settings = {'optimizer': 'adamw', **settings}  # the only one in old versions
    if isinstance(settings.get('image_size'), int):
        settings['image_size'] = (settings['image_size'],)
    if isinstance(settings.get('compile'), bool):
        settings['compile'] = 'on' if settings['compile'] else 'off'
    return settings


def changes(saved: Mapping[str, Any], config: Any, only: Collection[str] | None = None) -> dict[str, tuple]:
    """Setting -> (saved, now) where the values (of `only`, if given) make these two configs different experiments.

    `saved` is `dataclasses.asdict` of the other config, perhaps read from JSON (then tuples are lists). A setting that
    `saved` lacks is newer and counts as its class default; a setting that the class lacks is 'absent'.
    """
    saved, now = class_defaults(config) | migrated(saved), dataclasses.asdict(config)
    plain = lambda value: json.loads(json.dumps(value, default=vars))  # noqa: E731
    names = [name for name in {**now, **saved} if (defines_experiment(name, config) if only is None else name in only)]
    differ = [name for name in names if name not in now or plain(saved[name]) != plain(now[name])]
    return {name: (saved[name], now.get(name, 'absent')) for name in differ}


def differences(saved: Mapping[str, Any], config: Any, only: Collection[str] | None = None) -> list[str]:
    """`changes` as lines 'name: saved -> now'."""
    return [f'{name}: {before} -> {after}' for name, (before, after) in changes(saved, config, only).items()]


# ---------------------------------------------------------------- names of runs


def name_parts(config: Any, presets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The preset (or the data set, if that is not the preset's) and the settings that differ: the default name of a run
    is their `folder_name`, such as `digits_base_lr=0p0001`."""
    parts = [config.preset]
    if config.dataset != presets[config.preset].get('dataset', 'digits'):
        needs_preset = config.preset != 'digits' or config.dataset in presets
        parts = [config.dataset, *([f'preset={config.preset}'] if needs_preset else [])]
    parts += ['debug'] if config.debug else []
    for name, default in config.baseline().items():
        named = name in ('data_dir', 'data_path') or (name != 'dataset' and defines_experiment(name, config))
        value = getattr(config, name)
        if named and value != default:
            parts.append(in_name(name, Path(value).name if name == 'data_path' else value))
    return parts


def in_name(name: str, value: Any) -> str:
    """A setting as a part of a folder name: `channel_mults=1-2-2`."""
    text = '-'.join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f'{name}={re.sub(r"(?<=[0-9])[.](?=[0-9])", "p", text)}'


def plain(part: str) -> str:
    """`part` with - for every character that is not a letter, digit, _, =, + or -."""
    return re.sub('[^A-Za-z0-9_+=-]', '-', part)


def folder_name(parts: Sequence[str]) -> str:
    """The parts, joined by _. A name that would be too long is shortened: the first part, then as many others as fit,
    each cut (first those that are not settings, then those in FIRST), and a hash of all parts to keep names distinct.
    """
    folder = '_'.join(map(plain, parts))
    if len(folder) <= LONGEST_NAME:
        return folder
    end = '_' + hashlib.sha256('_'.join(parts).encode()).hexdigest()[:8]
    folder = plain(parts[0])[: LONGEST_NAME - len(end)]
    order = {'data_dir': 100} | {name: i for i, name in enumerate(FIRST)}
    rank = lambda part: order.get(part.split('=')[0], 99) if '=' in part else -1  # noqa: E731
    for part in map(cut, sorted(parts[1:], key=rank)):
        if len(folder) + 1 + len(part) + len(end) <= LONGEST_NAME:
            folder += f'_{part}'
    return folder + end


def cut(part: str) -> str:
    """A part for a long name. A path is cut to its last folder or file: `init_from=NAME` for ckpts/NAME/last.pt."""
    name, is_setting, value = part.partition('=')
    return plain(name + is_setting + cut_middle(Path(value.removesuffix('/last.pt')).name, LONGEST_VALUE))


def older_folder_name(parts: Sequence[str]) -> str:
    """`folder_name` of older versions, whose runs still have such names: long parts were cut in the middle."""
    folder = '_'.join(map(plain, parts))
    end, width = '_' + hashlib.sha256('_'.join(parts).encode()).hexdigest()[:8], 60
    if len(folder) <= LONGEST_OLD_NAME:
        return folder
    while len(folder) + len(end) > LONGEST_OLD_NAME and width > 2:
        folder = '_'.join('='.join(cut_middle(text, width) for text in plain(part).split('=')) for part in parts)
        width -= 1
    return folder[: LONGEST_OLD_NAME - len(end)] + end


def cut_middle(text: str, width: int) -> str:  # `width` characters long
    end = (width - 1) // 2
    return text if len(text) <= width else text[: width - 1 - end] + '+' + text[len(text) - end :]
