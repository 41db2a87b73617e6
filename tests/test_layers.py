"""Who may import whom, so that each file can be read with those below it alone: imports go down, never round."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From the lowest up; a file may import those below its own layer, and within a layer those to its left.
LAYERS = [
    'config_tools utils',
    'config',
    'runtime.ranks runtime.stopping runtime.machines runtime.meeting runtime.compiling',
    'processes prediction time_samplers loss_weights augmentations unet mlp dit data_checks data_loaders '
    'packed image_files array_files hub_images toy2d data_utils '
    'optimizers ema logging_utils',
    'solvers sampling likelihood distances metrics detectors networks saving',
    'runtime.bad_steps runtime.command runtime.parallel runtime.run_folder runtime.run_record runtime.resume',
    'batches report point_plots pictures sample_files reference evaluation',
    'trainer',
    'runtime.dry_run',
    'main',
    'generate evaluate compare prepare sweep runtime.launch',
    'runtime.start',
]
PLACE = {name: (i, k) for i, names in enumerate(LAYERS) for k, name in enumerate(names.split())}
MATHS = 'processes prediction time_samplers loss_weights solvers sampling likelihood'.split()
FILES = sorted([*ROOT.glob('*.py'), *ROOT.glob('runtime/*.py')])
EXAMPLES = sorted(ROOT.glob('examples/**/*.py'))


def name_of(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_from(node: ast.ImportFrom) -> Iterator[str]:
    """The modules that `from x import a, b` reads: x, or x.a and x.b where x is a folder of ours."""
    assert node.level == 0, 'a relative import fails in a flat layout'
    assert node.module
    if node.module == 'runtime':
        yield from (f'runtime.{alias.name}' for alias in node.names)
    else:
        yield node.module


def imports(path: Path) -> set[str]:
    """Names of all imported modules, also of imports in functions; not those of `if TYPE_CHECKING`, which never run."""
    tree = tree_of(path)
    never = {n for node in ast.walk(tree) if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test)
             for n in ast.walk(node)}  # fmt: skip
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in never:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= set(imported_from(node))
    return {name if name in PLACE else name.split('.')[0] for name in found}


def test_every_file_has_a_layer():
    assert set(map(name_of, FILES)) <= set(PLACE)
    assert {'config', 'trainer', 'main', 'runtime.launch'} <= set(map(name_of, FILES))


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_imports_go_down_only(path):
    mine = PLACE[name_of(path)]
    for other in imports(path) & set(PLACE):
        assert PLACE[other] < mine, f'{name_of(path)} {mine} imports {other} {PLACE[other]}'


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_file_imports_an_example(path):
    assert 'examples' not in imports(path)


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_no_file_is_too_long_to_be_read(path):
    """Nor is a line: 120 columns."""
    lines = path.read_text().splitlines()
    assert len(lines) < (300 if path.stem == 'trainer' else 401)
    assert max(map(len, lines)) <= 120


def test_what_keeps_a_run_alive_never_uses_the_maths():
    for path in ROOT.glob('runtime/*.py'):
        assert not imports(path) & {*MATHS, 'networks', 'metrics', 'unet'}, path.name


def test_wandb_is_imported_in_one_file_and_only_when_it_is_used():
    assert [path.stem for path in FILES + EXAMPLES if 'wandb' in imports(path)] == ['logging_utils']
    body = tree_of(ROOT / 'logging_utils.py').body
    at_the_top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert 'wandb' not in {alias.name for node in at_the_top for alias in node.names}


def test_the_lowest_layer_imports_nothing_of_this_repo():
    for name in LAYERS[0].split():
        assert not imports(ROOT / f'{name}.py') & set(PLACE), name
    assert not {'torch', 'numpy', 'torchvision'} & imports(ROOT / 'config.py')


@pytest.mark.parametrize('name', MATHS)
def test_maths_never_print_log_or_ask_for_a_rank(name):
    path = ROOT / f'{name}.py'
    assert not {'runtime.ranks', 'runtime.stopping', 'logging_utils', 'logging', 'tqdm', 'wandb'} & imports(path)
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    called = {getattr(func, 'id', getattr(func, 'attr', '')) for func in calls}
    assert not {'print', 'print_once', 'rank', 'is_main', 'get_rank', 'world_size'} & called


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_every_import_of_another_file_names_something_it_has(path):
    """Also in branches and functions that no test runs."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module in PLACE:
            body = tree_of(ROOT / f'{node.module.replace(".", "/")}.py').body
            defined = {item.name for item in body if isinstance(item, ast.ClassDef | ast.FunctionDef)}
            assigned = [item for item in body if isinstance(item, ast.Assign | ast.AnnAssign)]
            targets = [target for item in assigned for target in getattr(item, 'targets', [getattr(item, 'target', 0)])]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
            assert {alias.name for alias in node.names} <= defined, f'{path.stem}: from {node.module}'
