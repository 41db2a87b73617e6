"""Imports by the names of the old flat layout: each is found and given its new place, and nothing else is."""

import importlib
import re
import subprocess

import pytest

from launch import moved, start
from tests.helpers import ROOT, launch_env

# The modules of the old layout that are not top-level files any more.
OLD = (
    'array_files batches compare config_tools data_checks data_loaders detectors distances dit evaluate generate '
    'hub_images image_files likelihood loss_weights metrics mlp packed pictures point_plots prepare reference report '
    'sample_files sweep toy2d'
).split()
OLD_RUNTIME = (
    'bad_steps compiling dry_run launch machines meeting parallel resume run_folder run_record start'
).split()


@pytest.fixture
def old(tmp_path):
    """`old(code)`: the old names in a file mine.py of this code."""

    def find(code: str) -> list[str]:
        (tmp_path / 'mine.py').write_text(code)
        return [re.split(': | is now ', line)[1] for line in moved.old_imports(tmp_path / 'mine.py')]

    return find


def test_every_module_of_the_old_layout_is_in_the_table():
    assert {*OLD, *(f'runtime.{name}' for name in OLD_RUNTIME)} <= moved.moved().keys()


@pytest.mark.parametrize('name, new', moved.moved().items())
def test_every_new_place_exists(name, new):
    for place in re.findall(r'\b(?:[a-z_0-9]+\.)+[A-Za-z_0-9]+', new):
        owner, _, last = place.rpartition('.')
        if owner.split('.')[0] in ('config', 'trainer'):  # a method, or a part of a trainer
            continue
        try:
            importlib.import_module(place)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(owner), last), place


@pytest.mark.parametrize(
    ('code', 'names'),
    [
        ('from compare import side_by_side', ['compare']),
        ('from loss_weights import LOSS_WEIGHTS, get_loss_weight', ['loss_weights']),
        ('from config import Config, baseline', ['config.baseline']),
        ('import likelihood as ll', ['likelihood']),
        ('import runtime.run_record', ['runtime.run_record']),
        ('from runtime import ranks, run_folder', ['runtime.run_folder']),
        ('def f():\n    import toy2d, sweep', ['toy2d', 'sweep']),
        # what is where it was, and new names
        ('import evaluation\nfrom evaluation import likelihood, judge\nimport evaluation.likelihood', []),
        ('from networks import NETWORKS, get_network, mlp\nimport networks', []),
        ('from sampling import TIME_GRIDS\nfrom solvers import SOLVERS, Solver, Predict', []),
        ('from .compare import over\nfrom scripts.compare import over', []),
        ('try:\n    from scripts.compare import over\nexcept ImportError:\n    from compare import over', []),
        ('this is no Python', []),
    ],
)
def test_old_names(old, code, names):
    assert old(code) == names


def test_a_file_or_package_of_the_user_is_not_an_old_name(old, tmp_path, monkeypatch):
    code = 'import metrics\nfrom report import page\nfrom compare import over\nimport evaluate\nimport packed\n'
    assert len(old(code)) == 5
    (tmp_path / 'metrics.py').touch()
    (tmp_path / 'report').mkdir()
    (tmp_path / 'report/page.png').touch()
    assert len(old(code)) == 4  # a folder of pictures cannot be imported
    (tmp_path / 'report/__init__.py').touch()
    (tmp_path / 'compare').mkdir()
    (tmp_path / 'compare/__init__.py').touch()
    assert len(old(code)) == 2
    installed = tmp_path / 'site-packages'
    (installed / 'evaluate').mkdir(parents=True)
    (installed / 'evaluate/__init__.py').touch()
    monkeypatch.syspath_prepend(str(installed))
    assert old(code) == ['packed']


def test_a_file_of_the_user_in_the_folder_of_the_project_is_not_an_old_name(old, tmp_path, monkeypatch):
    """mine.py and the user's metrics.py are next to this project's config.py and evaluation/."""
    (tmp_path / 'CHANGELOG.md').write_text((ROOT / 'CHANGELOG.md').read_text())
    for name in ('config.py', 'metrics.py', 'evaluation/__init__.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(moved, 'ROOT', tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = 'import metrics\nfrom config import baseline\nfrom evaluation import final_metrics\nimport compare\n'
    assert old(code) == ['config.baseline', 'evaluation.final_metrics', 'compare']


SCRIPTS = [
    path for folder in ('', 'scripts/', 'examples/', 'tests/experiments/') for path in ROOT.glob(folder + '*.py')
]


def test_no_script_of_the_repo_is_refused():
    assert len(SCRIPTS) > 50
    for script in SCRIPTS:
        path = script.relative_to(ROOT).as_posix()
        assert not moved.old_imports(script, has_neighbours=start.module_of(path) is None), path


def test_run_sh_refuses_before_any_work(tmp_path):
    """Also for --help; from another folder; each line is one import."""
    (tmp_path / 'mine.py').write_text('"""Mine."""\n\nfrom compare import side_by_side\nimport likelihood\n1 / 0\n')
    for flag in ('--help', '--num=1'):
        command = ['sh', ROOT / 'run.sh', 'mine.py', flag]
        done = subprocess.run(command, cwd=tmp_path, env=launch_env(1), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.splitlines() == [
            'mine.py line 3: compare is now scripts.compare',
            'mine.py line 4: likelihood is now evaluation.likelihood',
        ]
