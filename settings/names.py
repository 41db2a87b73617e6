"""Names of runs: the preset and the settings that differ from it, as a folder name."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from settings.same_run import defines_experiment

LONGEST_NAME = 120  # characters


def default_name(config: Any, presets: Mapping[str, Mapping[str, Any]], *more: str) -> str:
    """The preset (or the data set, if that is not the preset's) and the settings that differ, as a folder name.

    `digits_base_lr=0p0001`. `more`: parts to add at the end.
    """
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
    return folder_name([*parts, *more])


def in_name(name: str, value: Any) -> str:
    """A setting as a part of a folder name: `channel_mults=1-2-2`."""
    text = '-'.join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f'{name}={re.sub(r"(?<=[0-9])[.](?=[0-9])", "p", text)}'


def folder_name(parts: list[str]) -> str:
    """The parts, joined by _, with - for every character that is not a letter, digit, _, =, + or -.

    In a name that would be too long, the longest settings and values are cut in the middle, marked by +, and a hash of
    the whole is added: every part can still be seen, and no two names are the same.
    """
    plain = [re.sub('[^A-Za-z0-9_+=-]', '-', part) for part in parts]
    folder = '_'.join(plain)
    if len(folder) <= LONGEST_NAME:
        return folder
    end, width = '_' + hashlib.sha256('_'.join(parts).encode()).hexdigest()[:8], 60
    while len(folder) + len(end) > LONGEST_NAME and width > 2:
        folder = '_'.join('='.join(cut_middle(text, width) for text in part.split('=')) for part in plain)
        width -= 1
    return folder[: LONGEST_NAME - len(end)] + end


def cut_middle(text: str, width: int) -> str:  # `width` characters long
    end = (width - 1) // 2
    return text if len(text) <= width else text[: width - 1 - end] + '+' + text[len(text) - end :]
