"""Imports by names of the old flat layout, files that hide ours, and scripts that are imported as modules."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from config import Config, SettingError
from launch import start
from main import load_run
from runtime import importing
from runtime.importing import import_class, refuse_to_train
from tests.helpers import ROOT, launch_env
from training import run_record

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
    """`old(code)`: the old names that a file mine.py with this code imports."""

    def find(code: str) -> list[str]:
        (tmp_path / 'mine.py').write_text(code)
        return [re.split(': | is now ', line)[1] for line in importing.old_imports(tmp_path / 'mine.py')]

    return find


def test_every_module_of_the_old_layout_is_in_the_table():
    assert {*OLD, *(f'runtime.{name}' for name in OLD_RUNTIME)} <= importing.moved().keys()


@pytest.mark.parametrize('name, new', importing.moved().items())
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
        ('from solvers import SOLVERS, multistep\nfrom evaluation import reference', []),  # now files
        # names that have not moved, and new names
        ('import evaluation\nfrom evaluation import likelihood, judge\nimport evaluation.likelihood', []),
        ('from networks import NETWORKS, get_network, mlp\nimport networks', []),
        ('from sampling import TIME_GRIDS\nfrom solvers import SOLVERS, Solver, Predict', []),
        ('from solvers.multistep import Multistep\nimport solvers.multistep', []),
        ('from .compare import over\nfrom scripts.compare import over', []),
        ('try:\n    from scripts.compare import over\nexcept ImportError:\n    from compare import over', []),
        ('this is not Python', []),
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


def test_a_folder_of_python_files_without_init_is_a_package_of_the_user(old, tmp_path):
    code = 'from compare import over\nfrom evaluation import final_metrics\n'
    for folder in ('compare', 'evaluation'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'over.py').touch()
    assert old(code) == ['evaluation.final_metrics']  # our package comes before a folder without __init__.py


def test_a_file_of_the_user_in_the_folder_of_the_project_is_not_an_old_name(old, tmp_path, monkeypatch):
    """mine.py and the user's metrics.py are next to the project's config.py and evaluation/."""
    (tmp_path / 'CHANGELOG.md').write_text((ROOT / 'CHANGELOG.md').read_text())
    for name in ('config.py', 'metrics.py', 'evaluation/__init__.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(importing, 'ROOT', tmp_path)
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
        assert not importing.old_imports(script, has_neighbours=start.module_of(path) is None), path
        if start.module_of(path) is None:
            importing.refuse_hidden([str(script.parent)])


def test_run_sh_refuses_before_any_work(tmp_path):
    """Also with --help, and from another folder. Each line of the message is one import."""
    (tmp_path / 'mine.py').write_text('"""Mine."""\n\nfrom compare import side_by_side\nimport likelihood\n1 / 0\n')
    for flag in ('--help', '--num=1'):
        command = ['sh', ROOT / 'run.sh', 'mine.py', flag]
        done = subprocess.run(command, cwd=tmp_path, env=launch_env(1), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.splitlines() == [
            'mine.py line 3: compare is now scripts.compare',
            'mine.py line 4: likelihood is now evaluation.likelihood',
        ]


# ---------------------------------------------------------------- files that hide the project's


def test_the_list_of_modules_is_complete():
    there = [path.stem for path in ROOT.glob('*.py')] + [path.parent.name for path in ROOT.glob('*/__init__.py')]
    assert sorted(importing.OURS) == sorted(set(there) - {'tests', 'examples', 'benchmarks'})


HIDING = ['utils.py', 'config.py', 'ema.py', 'evaluation/__init__.py', 'runtime/__init__.py', 'main.py']


@pytest.mark.parametrize('name', HIDING)
def test_a_file_that_hides_a_module_of_the_project_is_refused_before_any_work(tmp_path, name, experiment):
    """By run.sh and, for imports at a later time, by `load_run`. Files with other names are not refused."""
    for other in ('metrics.py', 'train.py', 'wandb/x.py', 'data/x.py', 'evaluation/notes.py', 'tests/__init__.py'):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    importing.refuse_hidden([str(tmp_path)])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('X = 1\n')
    with pytest.raises(SettingError, match=f'{tmp_path}: {name.partition("/")[0]} would be imported in place of'):
        importing.refuse_hidden([str(tmp_path)])
    with pytest.raises(SettingError, match='in place of'):
        import_class(str(experiment), 'Mine')


@pytest.mark.parametrize('script', ['mine.py', 'trainer.py'])
def test_run_sh_refuses_a_script_with_such_a_name_or_next_to_such_a_file(tmp_path, script):
    (tmp_path / script).write_text('1 / 0\n')
    (tmp_path / 'utils.py').touch()
    command = ['sh', ROOT / 'run.sh', script]
    done = subprocess.run(command, cwd=tmp_path, env=launch_env(1), capture_output=True, text=True, timeout=60)
    hidden = ', '.join(sorted({script, 'utils.py'} - {'mine.py'}))
    assert done.returncode == 2 and not done.stdout and f'{tmp_path}: {hidden} would be imported' in done.stderr


@pytest.mark.slow
def test_a_program_started_without_run_sh_refuses_too(tmp_path):
    """By then main is imported, and its later imports would get the user's file."""
    (tmp_path / 'mine.py').write_text('from main import main\n\nmain()\n')
    (tmp_path / 'evaluation.py').touch()
    command, env = [sys.executable, 'mine.py'], launch_env(1) | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'evaluation.py would be imported in place' in done.stderr
    assert 'Traceback' not in done.stderr


# ---------------------------------------------------------------- the script as a module


@pytest.fixture
def experiment(tmp_path):
    """A user's script, which imports another file from its folder."""
    (tmp_path / 'other.py').write_text('def helped(): ...\n\n\nclass Mixin:\n    factor = 2\n')
    path = tmp_path / 'mine.py'
    path.write_text('from other import Mixin, helped\n\n\nclass Mine(Mixin):\n    class Inner: ...\n')
    yield path
    for name in ('mine', 'other', f'{tmp_path.name}_mine'):
        sys.modules.pop(name, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def test_a_class_of_the_project_is_imported_only_once():
    import trainer

    assert run_record.import_arguments(Config) == dict(file='config.py', name='Config')
    assert import_class('config.py', 'Config') is Config
    assert import_class('trainer.py', 'BaseDiffusionTrainer') is trainer.BaseDiffusionTrainer


def test_a_file_is_imported_as_a_module_only_once(experiment, capsys):
    cls = import_class(str(experiment), 'Mine')
    assert cls.factor == 2 and cls.__module__ == 'mine' and capsys.readouterr().out == ''
    assert import_class(str(experiment), 'Mine') is cls is sys.modules['mine'].Mine
    assert import_class(str(experiment), 'Mine.Inner') is cls.Inner
    assert run_record.import_arguments(cls) == dict(file=str(experiment), name='Mine')


def test_another_module_of_the_same_name_is_not_replaced(experiment):
    other = sys.modules['mine'] = type(sys)('mine')
    assert import_class(str(experiment), 'Mine').factor == 2
    assert sys.modules['mine'] is other


def test_a_missing_file_or_class_is_named(experiment):
    with pytest.raises(SettingError, match=r'mine\.py has no class Missing'):
        import_class(str(experiment), 'Missing')
    with pytest.raises(SettingError, match=r'mine\.py has no class helped'):
        import_class(str(experiment), 'helped')  # a function
    with pytest.raises(SettingError, match=r'gone\.py, which started the run, is gone'):
        import_class(str(experiment.with_name('gone.py')), 'Mine')


def test_a_file_whose_import_failed_can_be_imported_again(experiment):
    experiment.write_text('1 / 0\n')
    with pytest.raises(ZeroDivisionError):
        import_class(str(experiment), 'Mine')
    experiment.write_text('class Mine: ...  # fixed\n')
    assert import_class(str(experiment), 'Mine').__name__ == 'Mine'


def test_a_script_that_trains_when_it_is_imported_is_refused(experiment):
    experiment.write_text('from runtime.importing import refuse_to_train\nrefuse_to_train()\n')  # as main.main does
    with pytest.raises(
        SettingError, match=r'mine\.py trains when it is imported: put its main\(\.\.\.\) under if __name'
    ):
        import_class(str(experiment), 'Mine')
    refuse_to_train()  # nothing is being imported now


def test_a_run_whose_script_has_old_imports_is_refused_as_by_run_sh(experiment):
    experiment.write_text('import likelihood\nfrom compare import over\n\nclass Mine: ...\n')
    where = dict(file=str(experiment), name='Mine')
    (experiment.parent / 'run.json').write_text(json.dumps([dict(script=None, trainer=where, config=where)]))
    with pytest.raises(SettingError) as refused:
        load_run(experiment.parent, trust=True)
    assert str(refused.value).splitlines() == [
        'mine.py line 1: likelihood is now evaluation.likelihood',
        'mine.py line 2: compare is now scripts.compare',
    ]


# ---------------------------------------------------------------- code of other people


def test_code_from_elsewhere_is_imported_only_if_it_is_trusted(experiment, tmp_path, monkeypatch):
    """Trusted are the project, the folder where run.sh was called and, in a notebook, the working directory, whatever
    run.json claims. A file that is imported already, or gone, is not refused."""
    folder = tmp_path / 'run'
    where = [None, 'trainer.py', str(experiment)]
    with pytest.raises(SettingError, match=rf'run names {experiment} as its code, which is outside .* pass --trust'):
        importing.refuse_foreign(where, folder)
    with pytest.raises(SettingError, match='trust=True'):
        importing.refuse_foreign([os.path.relpath(experiment, ROOT)], folder)
    monkeypatch.setenv('RUN_CALLER', str(tmp_path))
    importing.refuse_foreign(where, folder)
    with pytest.raises(SettingError, match='--trust'):  # it came with the run
        importing.refuse_foreign(where, tmp_path)
    monkeypatch.delenv('RUN_CALLER')
    monkeypatch.chdir(tmp_path)
    importing.refuse_foreign(where, folder)
    monkeypatch.chdir('/usr')
    importing.refuse_foreign([str(tmp_path / 'gone.py'), 'config.py'], folder)
    with monkeypatch.context() as patch:  # the running script is in the same folder
        patch.setattr(sys.modules['__main__'], '__file__', str(tmp_path / 'compare_runs.py'), raising=False)
        importing.refuse_foreign(where, folder)
    importing.import_file(str(experiment))
    importing.refuse_foreign(where, folder)


@pytest.mark.slow
def test_run_sh_trusts_the_folder_that_it_is_called_from(tmp_path, run_sh):
    script = tmp_path / 'home/of_mine.py'
    script.parent.mkdir()
    script.write_text("from main import main\n\nif __name__ == '__main__':\n    main()\n")
    assert run_sh(str(script), num_training_steps=3).returncode == 0
    for folder, flags, code in ((tmp_path, [], 2), (script.parent, [], 0), (tmp_path, ['--trust'], 0)):
        folder = folder if code == 0 else ROOT
        command = ['sh', ROOT / 'run.sh', 'generate.py', '--run', tmp_path / 'ckpts/run', '--out', tmp_path / 'x.npz']
        done = subprocess.run(
            [*command, '--num', '2', *flags], cwd=folder, env=launch_env(1), capture_output=True, text=True, timeout=99
        )
        assert done.returncode == code, done.stderr
        assert code == 0 or 'of_mine.py as its code, which is outside' in done.stderr
