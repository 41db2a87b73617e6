"""Checks and imports of the user's script: old module names, files that hide ours, untrusted code. Needs no torch.

run.sh and `main.load_run` refuse a script that imports by old names, and print the new ones from CHANGELOG.md's table.
"""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from runtime.errors import SettingError
from runtime.files import ROOT

ROW = re.compile(r'^\| `([\w.]+)` \| (.+) \|$', re.MULTILINE)

OURS = (  # modules and packages that a run imports; users may have scripts of their own next to them
    'augmentations config data_utils ema logging_utils main optimizers prediction processes sampling saving '
    'time_samplers trainer unet utils '
    'data_loading evaluation launch networks reports runtime scripts settings solvers training'
).split()

_script: ContextVar[Path | None] = ContextVar('script', default=None)  # the file that `import_file` is importing

# ---------------------------------------------------------------- old names


def moved() -> dict[str, str]:
    """Old module or module.name -> its new name. Empty if the user has deleted CHANGELOG.md."""
    path = ROOT / 'CHANGELOG.md'
    text = path.read_text() if path.exists() else ''
    return {old: new.replace('`', '') for old, new in ROW.findall(text.partition('### An experiment')[0])}


def old_imports(script: Path, has_neighbours: bool = True) -> list[str]:
    """A line for each import by an old name: 'mine.py line 3: compare is now scripts.compare'.

    A name that Python finds, installed or next to the script (if `has_neighbours`), does not count as old. Imports
    inside a `try` are skipped: the script handles their failure.
    """
    try:
        tree = ast.parse(script.read_bytes())
    except (SyntaxError, ValueError):  # Python will report it when the script runs
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


def names_in(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules of an import, and module.name for each name imported from them, without those that are files today.

    So `from solvers import multistep`, formerly a function, silently imports the file.
    """
    modules, names = [alias.name for alias in node.names], []
    if isinstance(node, ast.ImportFrom):
        modules = [node.module] if node.module and not node.level else []
        names = [f'{module}.{alias.name}' for module in modules for alias in node.names]
    return [name for name in modules + names if not Path(ROOT, *name.split('.')).with_suffix('.py').exists()]


def is_found(name: str, neighbours: list[str]) -> bool:
    """Whether an import of `name` finds a file or package of the user, or an installed one.

    For a name inside a module, such as `config.baseline`, our own module does not count. A module that moved as a whole
    has left no file of ours, so a file of that name is the user's. A folder without __init__.py is a package if it has
    Python files, but Python prefers our module of the same name.
    """
    module, _, rest = name.partition('.')
    for spec in (PathFinder.find_spec(module, neighbours), None if rest else PathFinder.find_spec(module)):
        folders = (spec and not rest and spec.submodule_search_locations) or []
        if spec and (spec.origin or any(file for folder in folders for file in Path(folder).rglob('*.py'))):
            return True
    return False


def refuse_hidden(path: Sequence[str] | None = None) -> None:
    """Raise SettingError if files in these folders (default: sys.path) hide modules of the project, such as a utils.py
    next to the user's script, or a script called main.py: Python would import them instead."""
    specs = [PathFinder.find_spec(name, path) for name in OURS]
    found = [Path(spec.origin) for spec in specs if spec and spec.origin]
    found = [file.parent if file.name == '__init__.py' else file for file in found]
    hidden = [file for file in found if file.resolve().parent != ROOT]
    if hidden:
        names = ', '.join(sorted(file.name for file in hidden))
        what = f'{hidden[0].parent}: {names} would be imported in place of modules of the project with the same name'
        raise SettingError(f'{what}. Rename them, or move the script to a folder of its own.')


# ---------------------------------------------------------------- the script as a module


def import_class(file: str | None, name: str) -> type:
    """Import a trainer or config class that run.json names: `import_class(**read_start(run_dir)['trainer'])`.

    Raises SettingError like `import_file`, and if the class is gone.
    """
    if file is None:
        raise SettingError(f'{name} was not defined in a file, so it cannot be imported. Put it into a file.')
    value: Any = import_file(file)
    for part in name.split('.'):
        value = getattr(value, part, None)
    if not isinstance(value, type):
        raise SettingError(f'{file} has no class {name} at its top level (any more). Put it back there.')
    return value


def import_file(file: str) -> Any:
    """Import a file, or return its module if it was imported or run before. A relative path starts at the project.

    Its folder is put on sys.path, as when it is run as a script; its `if __name__ == '__main__'` part does not run.
    Raises SettingError if it is gone, imports modules by their old names, or calls `main` outside that part.
    """
    path = (ROOT / file).resolve()
    if (known := imported(path)) is not None:
        return known
    if not path.is_file():
        raise SettingError(
            f'{path}, which started the run, is gone. Put it back, or link to its new place: ln -s NEW {path}'
        )
    if outdated := old_imports(path):
        raise SettingError('\n'.join(outdated))
    refuse_hidden([str(path.parent)])
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module_name = path.stem if path.stem not in sys.modules else f'{path.parent.name}_{path.stem}'
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, 'a Python file has a loader'
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    token = _script.set(path)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    finally:
        _script.reset(token)
    return module


def imported(path: Path) -> Any:
    """The module of this file if it was imported or run before, else None."""
    files = ((module, getattr(module, '__dict__', {}).get('__file__')) for module in list(sys.modules.values()))
    same_name = ((module, file) for module, file in files if isinstance(file, str) and Path(file).name == path.name)
    return next((module for module, file in same_name if Path(file).resolve() == path), None)


def refuse_foreign(files: Iterable[str | None], run_dir: Path) -> None:
    """Raise SettingError for a code file that may be someone else's: one in the run's own folder, or outside the
    project, the folder that run.sh was called from and the folder of the running script. Imported files are allowed."""
    script = getattr(sys.modules['__main__'], '__file__', None)
    homes = [ROOT, Path(os.environ.get('RUN_CALLER') or Path.cwd()).resolve()]
    homes += [Path(script).resolve().parent] if script else []
    for file in files:
        path = (ROOT / (file or '')).resolve()
        is_own = any(path.is_relative_to(home) for home in homes) and not path.is_relative_to(run_dir.resolve())
        if file and not is_own and path.is_file() and imported(path) is None:
            what = f'{run_dir} names {path} as its code, which is outside the project and the folder you are in'
            raise SettingError(f'{what}. If you trust that file, pass --trust, or load_run(..., trust=True).')


def refuse_to_train() -> None:
    """Raise SettingError if called during `import_file`: a script imported to read its run must not train."""
    if (script := _script.get()) is not None:
        raise SettingError(f"{script} trains when it is imported: put its main(...) under if __name__ == '__main__'")
