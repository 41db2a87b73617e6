"""Layers of the code: imports only go down the tiers, also under TYPE_CHECKING, and never in a circle."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT

WINGS = 'settings networks solvers data_loading training evaluation reports scripts runtime launch'.split()
# From the lowest tier to the highest. Within a tier, imports may go in any direction, but not in a circle.
TIERS = [
    'settings runtime utils',
    'config',
    'processes',
    'prediction time_samplers data_loading logging_utils optimizers unet ema augmentations',
    'solvers networks data_utils',
    'sampling saving',
    'training',
    'evaluation',
    'reports',
    'trainer',
    'main',
    'launch scripts examples benchmarks',
]
TIER = {name: i for i, names in enumerate(TIERS) for name in names.split()}
MATHS = ['processes', 'prediction', 'time_samplers', 'sampling', 'unet']
FILES = sorted([*ROOT.glob('*.py'), *(path for wing in WINGS for path in ROOT.glob(f'{wing}/**/*.py'))])
PAGES = sorted([*ROOT.glob('examples/**/*.py'), *ROOT.glob('benchmarks/*.py')])


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


OURS = {name_of(path): path for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def modules_in(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that an import statement loads: x, and x.a if a is a file in the folder x."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0 and node.module, 'a relative import fails in a flat layout'
    inside = [f'{node.module}.{alias.name}' for alias in node.names]
    files = [name for name in inside if name in OURS]
    yield from files
    if len(files) < len(inside):
        yield node.module


@cache
def imports(path: Path) -> set[str]:
    """Names of all imported modules, also in functions and under TYPE_CHECKING."""
    nodes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {module for node in nodes for module in modules_in(node)}


def ours(path: Path) -> set[str]:
    return imports(path) & OURS.keys() - {name_of(path)}


def test_the_top_level_has_the_files_that_the_user_named_and_no_other():
    assert sorted(path.stem for path in ROOT.glob('*.py')) == sorted(
        'config main trainer processes prediction time_samplers sampling unet optimizers ema augmentations data_utils '
        'logging_utils saving utils'.split()
    )


def test_every_folder_is_a_package_that_says_what_is_in_it():
    """Otherwise an installed package of the same name would be imported instead."""
    for wing in [*WINGS, 'tests']:
        text = ast.get_docstring(ast.parse((ROOT / wing / '__init__.py').read_text()))
        assert text, wing
        if wing != 'tests':
            missing = [path.name for path in ROOT.glob(f'{wing}/[a-z]*.*') if path.name not in text]
            assert not missing, f'{wing}/__init__.py does not mention {missing}'


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_imports_go_down_only(path):
    mine = TIER[name_of(path).split('.')[0]]
    up = [name for name in ours(path) if TIER[name.split('.')[0]] > mine]
    assert not up, f'{name_of(path)} imports {up}'


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, ' -> '.join([*above[above.index(name) :], name])
        if name not in done:
            for other in ours(OURS[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in OURS:
        visit(name, ())


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_file_imports_an_example_or_a_test(path):
    assert not {name.split('.')[0] for name in imports(path)} & {'examples', 'tests', 'benchmarks'}


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_file_is_too_long_to_be_read(path):
    """No line is longer than 120 columns either."""
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST.get(name_of(path), 300)
    assert max(map(len, lines), default=0) <= 120


LONGEST = {'trainer': 260}


def test_each_file_can_be_imported_first():
    """Each in a fresh process, which shows a circle even if other orders of imports hide it."""
    names = [path.stem for path in ROOT.glob('*.py')] + WINGS
    program = (
        'import os, sys\nimport torch, numpy\n'  # once, for all of the children
        'for name in sys.argv[1:]:\n'
        '    pid = os.fork()\n'
        '    if not pid:\n'
        '        __import__(name)\n'
        '        os._exit(0)\n'
        '    if os.waitpid(pid, 0)[1]:\n'
        '        sys.exit(f"import {name} fails")\n'
    )
    done = subprocess.run([sys.executable, '-c', program, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_start_reads_few_files():
    """From reports/ and evaluation/ it reads only the two parts that a trainer owns; others are read when used."""
    program = (
        'import json, sys, trainer\n'
        'files = [getattr(m, "__file__", None) or "" for m in sys.modules.values()]\n'
        'print(json.dumps([f for f in files if f.startswith(sys.argv[1]) and not f.endswith("__init__.py")]))'
    )
    done = subprocess.run([sys.executable, '-c', program, str(ROOT)], cwd=ROOT, capture_output=True, text=True)
    files = [name_of(Path(file)) for file in json.loads(done.stdout) if Path(file).parts[-2] != 'site-packages']
    mine = [name for name in files if name in OURS and name != 'trainer']
    assert len(mine) <= 45, sorted(mine)
    assert {name for name in mine if name.startswith(('reports', 'evaluation'))} == {
        'reports.pictures',
        'evaluation.judge',
    }


def test_what_keeps_a_run_alive_never_uses_the_maths():
    for path in [*ROOT.glob('runtime/*.py'), *ROOT.glob('launch/*.py')]:
        assert not imports(path) & {*MATHS, 'networks', 'solvers'}, path.name


def test_wandb_is_imported_in_one_file_and_only_when_it_is_used():
    assert [path.stem for path in FILES + PAGES if 'wandb' in imports(path)] == ['wandb_run']
    body = tree_of(ROOT / 'runtime/wandb_run.py').body
    at_the_top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert 'wandb' not in {alias.name for node in at_the_top for alias in node.names}


def test_settings_need_no_torch():
    for path in [ROOT / 'config.py', *ROOT.glob('settings/*.py'), ROOT / 'runtime/errors.py']:
        assert not {'torch', 'numpy', 'torchvision'} & imports(path), path.name


MATHS_FILES = [ROOT / f'{name}.py' for name in MATHS] + sorted(
    [*ROOT.glob('solvers/*.py'), *ROOT.glob('networks/*.py')]
)


@pytest.mark.parametrize('path', MATHS_FILES, ids=name_of)
def test_maths_never_print_log_or_ask_for_a_rank(path):
    assert not {'runtime.ranks', 'runtime.stopping', 'logging_utils', 'logging', 'tqdm', 'wandb'} & imports(path)
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    called = {getattr(func, 'id', getattr(func, 'attr', '')) for func in calls}
    assert not {'print', 'print_once', 'rank', 'is_main', 'get_rank', 'world_size'} & called


@pytest.mark.parametrize('path', [*FILES, *PAGES], ids=name_of)
def test_no_function_takes_a_trainer(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            typed = [arg.arg for arg in args if 'Trainer' in ast.dump(arg.annotation or ast.Pass())]
            assert not typed and 'trainer' not in {arg.arg for arg in args}, f'{path.name}: {node.name}'


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_nothing_is_decided_by_the_name_of_a_class_or_module(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Compare):
            seen = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            guesses = seen & {'__module__', '__name__', '__qualname__'}
            assert not (guesses and strings), f'{path.name}:{node.lineno}'
    assert 'sys.modules.get(' not in path.read_text()


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_every_import_of_another_file_names_something_it_has(path):
    """This includes branches and functions that no test runs."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module in OURS:
            body = tree_of(OURS[node.module]).body
            defined = {item.name for item in body if isinstance(item, ast.ClassDef | ast.FunctionDef)}
            assigned = [item for item in body if isinstance(item, ast.Assign | ast.AnnAssign)]
            targets = [target for item in assigned for target in getattr(item, 'targets', [getattr(item, 'target', 0)])]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
            brought = [item for item in body if isinstance(item, ast.ImportFrom)]
            defined |= {alias.asname or alias.name for item in brought for alias in item.names}
            names = {alias.name for alias in node.names if f'{node.module}.{alias.name}' not in OURS}
            assert names <= defined, f'{path.stem}: from {node.module} import {names - defined}'
