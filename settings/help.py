"""The page of --help: the sections of config.py as groups, and the choices of each setting. Needs no torch."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, get_type_hints

from settings.choices import names_of, unread_by

SECTION = re.compile(r'^ *# -{9,} (?:the )?(\w[\w ]*\w)[:( ]*(.*?)\)?$')


def page(config_class: type, defaults: Any, presets: Mapping[str, Any]) -> type:
    """A dataclass for tyro, with one inside for each section. Its values are those of `defaults`."""
    from tyro.conf import arg

    types, groups = get_type_hints(config_class), []
    for (title, about), texts in sections(config_class).items():
        fields = []
        for name, text in texts.items():
            if setting := unread_by(defaults, name):
                text += f' Not read with {setting}={getattr(defaults, setting)}.'
            choices = ','.join(filter(None, presets if name == 'preset' else names_of(name)))
            shown = arg(help=text, metavar=f'{{{choices}}}' if choices else None)
            value = dataclasses.field(default_factory=partial(getattr, defaults, name))
            fields.append((name, Annotated[types[name], shown], value))
        group = dataclasses.make_dataclass('Group', fields)
        group.__doc__ = about
        value = dataclasses.field(default_factory=group)
        groups.append((title.replace(' ', '_'), Annotated[group, arg(name=title, help=about)], value))
    return dataclasses.make_dataclass('Page', groups)


def sections(config_class: type) -> dict[tuple[str, str], dict[str, str]]:
    """(title, more) of each section -> setting -> its help. The settings of a subclass are a section of its name."""
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
    """Setting -> (its section, its help: the comment on its line, or the docstring below), as the source has them."""
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
