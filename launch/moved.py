"""Refuses scripts that import modules by their old names. The table of old and new names is in CHANGELOG.md."""

import ast
import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r'^\| `([\w.]+)` \| (.+) \|$', re.MULTILINE)


def moved() -> dict[str, str]:
    """Old module, or module.name -> its new place. Empty in a project that has deleted CHANGELOG.md."""
    path = ROOT / 'CHANGELOG.md'
    text = path.read_text() if path.exists() else ''
    return {old: new.replace('`', '') for old, new in ROW.findall(text.partition('### An experiment')[0])}


def old_imports(script: Path, has_neighbours: bool = True) -> list[str]:
    """A line for each import by an old name: 'mine.py line 3: compare is now scripts.compare'.

    Names that Python finds, installed or next to the script (if `has_neighbours`), are not old ones, nor are imports
    whose failure the script handles.
    """
    try:
        tree = ast.parse(script.read_bytes())
    except (SyntaxError, ValueError):  # python will show it
        return []
    table, folder = moved(), script.resolve().parent
    neighbours = [str(folder)] if has_neighbours and folder != ROOT else []
    handled = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in handled:
            for name in names_in(node):
                if name in table and not is_found(name, neighbours):
                    found.setdefault(name, node.lineno)
    return [f'{script.name} line {line}: {name} is now {table[name]}' for name, line in found.items()]


def names_in(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules of an import, and module.name for each name that it takes from one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module and not node.level:
        yield from (node.module, *(f'{node.module}.{alias.name}' for alias in node.names))


def is_found(name: str, neighbours: list[str]) -> bool:
    """Whether an import finds a file of the user, or an installed package of this name; ours do not count.

    Ours are the modules of which only single names have moved: `config` of `config.baseline`. No other has a file here,
    so one in the project's folder is the user's.
    """
    module, _, rest = name.partition('.')
    specs = [PathFinder.find_spec(module, neighbours), None if rest else PathFinder.find_spec(module)]
    return any(spec and spec.origin for spec in specs)
