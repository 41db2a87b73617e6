"""The choices of settings, the other settings that each choice reads, and the page of --help.

The choices and the page are read from the source files, without importing torch. The sections of config.py are the
groups of the page.
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from functools import cache, partial
from importlib import import_module
from typing import Annotated, Any, get_type_hints

from runtime.files import ROOT
from settings.rules import CHOICES

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
    ema_type=('ema', 'EMA_TYPES'),
    solver=('solvers.table', 'SOLVERS'),
    time_grid=('solvers.table', 'TIME_GRIDS'),
    sde_noise=('solvers.table', 'SDE_NOISES'),
    sde_last_step=('solvers.table', 'LAST_STEPS'),
)
# setting -> value -> settings that this value reads and some other values do not. A value that is not listed, such as
# one of your own, reads all of them. SDE settings are not here: a run with an ODE solver draws with an SDE solver too.
FILES = 'data_path image_size background fit skip_unreadable cache'
NOTHING = 'digits mnist fashion_mnist cifar10 cifar100 moons spirals checkerboard eight_gaussians'
READS: dict[str, Mapping[Any, str]] = dict(
    dataset=dict.fromkeys(NOTHING.split(), '')
    | dict(image_folder=FILES, arrays='data_path array_layout value_range', hub=f'{FILES} columns'),
    network=dict(
        unet='channels channel_mults num_res_blocks attention_resolutions padding',
        mlp='channels num_res_blocks',
        dit='dit_size dit_depth dit_width dit_heads dit_patch',
    ),
    process_name=dict(rf='', cosine='', linear_vp='beta_min beta_max', ve='sigma_min sigma_max'),
    time_sampler=dict(uniform='', logit_normal='time_mean time_std', log_normal='time_mean time_std'),
    optimizer=dict.fromkeys('adadelta adafactor adagrad asgd'.split(), 'weight_decay')
    | dict.fromkeys(['rmsprop', 'sgd'], 'weight_decay adam_betas')
    | dict.fromkeys('adamw muon adam adamax nadam radam'.split(), 'weight_decay adam_eps adam_betas'),
    lr_schedule_type=dict(constant='') | dict.fromkeys('cosine inverse_sqrt linear wsd'.split(), 'min_lr'),
    translate_prob={0.0: '', 'above 0': 'max_translation'},
)


def unread_by(config: Any, name: str) -> str:
    """The setting whose value does not read setting `name`, though other choices do; '' if there is none."""
    for setting, reads in READS.items():
        own = reads.get(getattr(config, setting))
        if own is not None and name not in own.split() and any(name in names.split() for names in reads.values()):
            return setting
    return ''


# ---------------------------------------------------------------- choices, read from the tables or from their files


def known_choices(setting: str) -> list[str]:
    """The choices of a setting: from its table if that is imported, with additions of the user's script, else from the
    source file of the table. Empty if that cannot be read, or if the setting has no choices."""
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
    """Whether a file of the project adds to this table outside the table's definition."""
    adds = re.compile(rf'^ *{table}(\[.+\] *=[^=]|\.update\(| *\|=)', re.MULTILINE)
    wings = [path.parent for path in ROOT.glob('*/__init__.py') if path.parent.name != 'tests']
    files = [*ROOT.glob('*.py'), *(file for wing in wings for file in wing.rglob('*.py'))]
    return any(adds.search(file.read_text(encoding='utf-8', errors='replace')) for file in files)


# ---------------------------------------------------------------- the page of --help

SECTION = re.compile(r'^ *# -{9,} (?:the )?(\w[\w ]*\w)[:( ]*(.*?)\)?$')


def flags_class(config_class: type, defaults: Any, presets: Mapping[str, Any]) -> type:
    """A dataclass for tyro that holds one dataclass for each section. Its defaults are the values in `defaults`."""
    from tyro.conf import arg

    types, groups = get_type_hints(config_class), []
    for (title, about), texts in sections(config_class).items():
        fields = []
        for name, text in texts.items():
            if setting := unread_by(defaults, name):
                text += f' Not read with {setting}={getattr(defaults, setting)}.'
            choices = ','.join(filter(None, presets if name == 'preset' else known_choices(name)))
            shown = arg(help=text, metavar=f'{{{choices}}}' if choices else None)
            value = dataclasses.field(default_factory=partial(getattr, defaults, name))
            fields.append((name, Annotated[types[name], shown], value))
        group = dataclasses.make_dataclass('Group', fields)
        group.__doc__ = about
        value = dataclasses.field(default_factory=group)
        groups.append((title.replace(' ', '_'), Annotated[group, arg(name=title, help=about)], value))
    return dataclasses.make_dataclass('Page', groups)


def sections(config_class: type) -> dict[tuple[str, str], dict[str, str]]:
    """(title, more) of each section -> setting -> its help. The settings of a subclass form a section with its name."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    section_of: dict[str, tuple[str, str]] = {}
    names = {field.name for field in dataclasses.fields(config_class)}
    for base in reversed(config_class.__mro__):
        unknown = dict.fromkeys(vars(base).get('__annotations__', {}), ((base.__name__, ''), ''))
        for name, (section, text) in (unknown | source_of(base)).items():
            if name in names:
                texts = found.setdefault(section_of.setdefault(name, section), {})
                texts[name] = text or texts.get(name, '')
    return found


def source_of(base: type) -> dict[str, tuple[tuple[str, str], str]]:
    """Setting -> (its section, its help), from the source; help is the comment on its line or the docstring below."""
    try:
        source = textwrap.dedent(inspect.getsource(base))
        body = ast.parse(source).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, TypeError, SyntaxError):
        return {}
    lines, found = source.splitlines(), {}
    headings = {i: match for i, line in enumerate(lines, 1) if (match := SECTION.match(line))}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = [i for i in headings if i < node.lineno]
            section = headings[above[-1]].groups() if above else (base.__name__, '')
            text = lines[(node.end_lineno or 1) - 1][node.end_col_offset :].partition('#')[2]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = str(after.value.value)
            found[node.target.id] = section, ' '.join(text.split())
    return found
