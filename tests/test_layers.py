"""Who may import whom, so that each file can be read with those below it alone."""

import ast
from collections.abc import Iterator

import pytest
from conftest import ROOT

LAYERS = [
    'config utils distributed',
    'processes prediction time_samplers loss_weights augmentations unet dit data_utils optimizers ema logging_utils',
    'solvers sampling likelihood metrics networks saving run_folder',
    'trainer',
    'main generate evaluate check launch',
]
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
MATHS = 'processes prediction time_samplers loss_weights solvers sampling likelihood'.split()
FILES = sorted(ROOT.glob('*.py'))
EXAMPLES = sorted(ROOT.glob('examples/**/*.py'))
# Within layers 2 and 4 files may import each other; of the rest, these alone.
SAME_LAYER = {('prediction', 'processes'), ('time_samplers', 'processes'), ('loss_weights', 'processes')}


def tree_of(path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path) -> Iterator[str]:
    """Top-level names of all imported modules, also of imports inside functions."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path.name}: the layout is flat, a relative import fails'
            yield node.module.split('.')[0]


def test_every_file_has_a_layer():
    assert {path.stem for path in FILES} <= set(LAYER_OF)
    assert {'config', 'trainer', 'main'} <= {path.stem for path in FILES}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_imports_go_down_only(path):
    mine = LAYER_OF[path.stem]
    for other in set(imports(path)) & set(LAYER_OF):
        same = LAYER_OF[other] == mine and (mine in (2, 4) or (path.stem, other) in SAME_LAYER)
        assert LAYER_OF[other] < mine or same, f'{path.stem} (layer {mine}) imports {other} (layer {LAYER_OF[other]})'


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_no_file_imports_an_example(path):
    assert 'examples' not in imports(path)


def test_wandb_is_imported_in_one_file_and_only_when_it_is_used():
    assert [path.stem for path in FILES + EXAMPLES if 'wandb' in imports(path)] == ['logging_utils']
    at_the_top = [node for node in tree_of(ROOT / 'logging_utils.py').body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert 'wandb' not in {alias.name for node in at_the_top for alias in node.names}


def test_the_lowest_layer_imports_nothing_of_this_repo():
    for name in LAYERS[0].split():
        assert not set(imports(ROOT / f'{name}.py')) & set(LAYER_OF), name
    assert not {'torch', 'numpy', 'torchvision'} & set(imports(ROOT / 'config.py'))


@pytest.mark.parametrize('name', [name for name in MATHS if (ROOT / f'{name}.py').exists()])
def test_maths_never_print_log_or_ask_for_a_rank(name):
    path = ROOT / f'{name}.py'
    assert not {'distributed', 'logging_utils', 'logging', 'tqdm', 'wandb'} & set(imports(path))
    called = {getattr(node.func, 'id', getattr(node.func, 'attr', '')) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}
    assert not {'print', 'say', 'rank', 'is_main', 'get_rank', 'world_size'} & called


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_every_import_of_another_file_names_something_it_has(path):
    """Also in branches and functions that no test runs."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module in LAYER_OF:
            body = tree_of(ROOT / f'{node.module}.py').body
            defined = {item.name for item in body if isinstance(item, ast.ClassDef | ast.FunctionDef)}
            targets = [
                target for item in body if isinstance(item, ast.Assign | ast.AnnAssign) for target in getattr(item, 'targets', [getattr(item, 'target', 0)])
            ]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
            assert {alias.name for alias in node.names} <= defined, f'{path.stem}: from {node.module}'
