"""What the settings that name a choice can be, and which other settings each choice reads. Needs no torch."""

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from runtime.errors import SettingError, choose
from settings import words
from settings.rules import CHOICES

ROOT = Path(__file__).resolve().parents[1]
# setting -> (module, table): the keys of the table are its choices
TABLES = dict(
    dataset=('data_utils', 'DATASETS'),
    network=('networks.table', 'NETWORKS'),
    dit_size=('networks.transformer', 'DIT_SIZES'),
    time_input=('networks.table', 'TIME_INPUTS'),
    process_name=('processes', 'PROCESSES'),
    model_type=('prediction', 'ROWS'),
    target_type=('prediction', 'ROWS'),
    loss_weight=('prediction', 'LOSS_WEIGHTS'),
    time_sampler=('time_samplers', 'TIME_SAMPLERS'),
    optimizer=('optimizers', 'OPTIMIZERS'),
    lr_schedule_type=('optimizers', 'LR_SCHEDULES'),
    solver=('solvers.table', 'SOLVERS'),
    time_grid=('solvers.table', 'TIME_GRIDS'),
    sde_noise=('solvers.table', 'SDE_NOISES'),
    sde_last_step=('solvers.table', 'LAST_STEPS'),
)
# setting -> its value -> the settings that only this and some other values read. A value that is not here, such as a
# choice of yours, reads all of them. SDE settings are not here: next to an ODE sampler, a run draws with an SDE one.
FILES = 'data_path image_size background fit skip_unreadable cache'
NOTHING = 'digits mnist fashion_mnist cifar10 cifar100 moons spirals checkerboard eight_gaussians'
READS: dict[str, Mapping[Any, str]] = dict(
    dataset=dict.fromkeys(NOTHING.split(), '')
    | dict(image_folder=FILES, arrays='data_path array_layout value_range', hub=f'{FILES} columns'),
    network=dict(
        unet='channels channel_mults num_res_blocks attention_resolutions',
        mlp='channels num_res_blocks',
        dit='dit_size dit_depth dit_width dit_heads dit_patch',
    ),
    process_name=dict(rf='', cosine='', linear_vp='beta_min beta_max', ve='sigma_min sigma_max'),
    time_sampler=dict(uniform='', logit_normal='time_mean time_std', log_normal='time_mean time_std'),
    lr_schedule_type=dict(constant='', cosine='min_lr', inverse_sqrt='min_lr'),
    translate_prob={0.0: '', 'above 0': 'max_translation'},
)


def refuse(config: Any, argv: Sequence[str] | None, presets: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise SettingError if the flags `argv` of this config name an unknown choice, or settings that nothing reads."""
    _, given = words.read(argv, type(config), presets)
    for setting in given:
        known, value = names_of(setting), getattr(config, setting)
        if setting in TABLES and known and value not in known and not is_extended(TABLES[setting][1]):
            choose(setting, value, dict.fromkeys(known))
    texts = []
    for setting, reads in READS.items():
        unread = [name for name in given if unread_by(config, name) == setting]
        is_common = any({*unread} <= {*names.split()} for names in reads.values())
        for names in filter(None, [unread] if is_common else [[name] for name in unread]):
            values = ', '.join(f'{name}={getattr(config, name)!r}' for name in names)
            readers = [choice for choice, own in reads.items() if {*names} <= {*own.split()}]
            made_for = {v.get(setting): f' (--preset {p})' for p, v in presets.items() if setting == 'dataset'}
            remedy = ' or '.join(f'{choice}{made_for.get(choice, "")}' for choice in readers)
            what = f'{setting}={getattr(config, setting)!r} does not read {"it" if len(names) == 1 else "them"}'
            texts.append(f'{values}: {what}. Pass --{setting} {remedy}.')
    if texts:
        raise SettingError(' '.join(texts))


def unread_by(config: Any, name: str) -> str:
    """The setting whose value does not read setting `name`, as its other choices do; '' if there is none."""
    for setting, reads in READS.items():
        own = reads.get(getattr(config, setting))
        if own is not None and name not in own.split() and any(name in names.split() for names in reads.values()):
            return setting
    return ''


# ---------------------------------------------------------------- choices, read from the tables or from their files


def names_of(setting: str) -> list[str]:
    """The choices of a setting: with those of the user's script if the table is imported, else as its file has them.
    Empty if that cannot be read, or if the setting has no choices."""
    if setting not in TABLES:
        return list(CHOICES.get(setting, ()))
    module, table = TABLES[setting]
    try:
        imported = import_module(module) if module in sys.modules else None
        return list(getattr(imported, table, None) or keys_in(module, table))
    except (LookupError, OSError, SyntaxError):
        return []


@cache
def keys_in(module: str, table: str) -> list[str]:
    """The keys of a table that a module defines or imports. Raises LookupError if it is not a plain dict."""
    source = ROOT.joinpath(*module.split('.')).with_suffix('.py').read_text(encoding='utf-8')
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.AnnAssign(ast.Name(id=name), value=value):
                if name == table:
                    return keys_of(value, module)
            case ast.ImportFrom(module=str(other), names=names) if table in [alias.name for alias in names]:
                return keys_in(other, table)
    raise LookupError(table)


def keys_of(node: Any, module: str) -> list[str]:
    """The keys of a dict that is written as {...}, {name: ... for name in TABLE} or TABLE, joined by | or **."""
    match node:
        case ast.Dict(keys, values):
            pairs = zip(keys, values, strict=True)
            return [name for k, v in pairs for name in (keys_of(v, module) if k is None else [ast.literal_eval(k)])]
        case ast.BinOp(left=left, right=right):
            return keys_of(left, module) + keys_of(right, module)
        case ast.DictComp(generators=[ast.comprehension(iter=table)]):
            return keys_of(table, module)
        case ast.Call(func=ast.Attribute(attr='items', value=table)):
            return keys_of(table, module)
        case ast.Name(id=table):
            return keys_in(module, table)
    raise LookupError(type(node).__name__)


def is_extended(table: str) -> bool:
    """Whether a file of the project adds to this table elsewhere than where it is defined."""
    adds = re.compile(rf'^ *{table}(\[.+\] *=[^=]|\.update\(| *\|=)', re.MULTILINE)
    wings = [path.parent for path in ROOT.glob('*/__init__.py') if path.parent.name != 'tests']
    files = [*ROOT.glob('*.py'), *(file for wing in wings for file in wing.rglob('*.py'))]
    return any(adds.search(file.read_text(encoding='utf-8', errors='replace')) for file in files)
