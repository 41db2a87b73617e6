"""The origin of a run: code and class of its trainer, and the entry of each start in run.json."""

import json
import os
import subprocess
import sys

import pytest
import torch

from config import Config, SettingError
from runtime import files
from runtime.errors import SaveError
from runtime.importing import import_class
from tests.helpers import ROOT
from training import run_record
from training.run_record import identity_of, read_start, write_start

CPU = torch.device('cpu')
EXPERIMENT = """
import sys
from runtime.importing import import_class
from training.run_record import identity_of, import_arguments

class Base: ...
class Common(Base): ...

from other import Mixin, helped

class Mine(Mixin, Common):
    class Inner: ...

if __name__ == '__main__':
    identity = identity_of(Mine, Base, 'f00d')
    assert identity.trainer == 'mine.py:Mine' and identity.data == 'f00d'
    assert list(identity.code) == ['mine.py', 'other.py:Mixin'], list(identity.code)
    assert identity.code['mine.py'] == open(__file__).read()
    assert identity.code['other.py:Mixin'] == 'class Mixin:\\n    factor = 2\\n'
    assert import_class(**import_arguments(Mine)) is Mine  # also while it is the script itself
    assert 'mine' not in sys.modules
    print('ran')
"""


@pytest.fixture
def experiment(tmp_path):
    """A user's script, which imports another file from its folder."""
    (tmp_path / 'other.py').write_text('def helped(): ...\n\n\nclass Mixin:\n    factor = 2\n')
    path = tmp_path / 'mine.py'
    path.write_text(EXPERIMENT)
    yield path
    for name in ('mine', 'other', f'{tmp_path.name}_mine'):
        sys.modules.pop(name, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


# ---------------------------------------------------------------- code


def test_code_is_the_users_script_and_the_classes_of_other_files(experiment):
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, experiment], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == 'ran\n', done.stderr


def test_without_a_script_code_is_the_classes_below_the_base():
    """Here the script is pytest, which is not an experiment."""
    import trainer

    class Mine(trainer.ExampleDiffusionTrainer):
        marker = 1

    identity = identity_of(Mine, trainer.BaseDiffusionTrainer, '')
    here = 'test_run_record.py:test_without_a_script_code_is_the_classes_below_the_base.<locals>.Mine'
    assert identity.trainer == here
    assert list(identity.code) == [here, 'trainer.py:ExampleDiffusionTrainer']
    assert 'marker = 1' in identity.code[here]
    assert identity.code['trainer.py:ExampleDiffusionTrainer'] in (ROOT / 'trainer.py').read_text()


def test_main_py_is_not_a_users_script(monkeypatch):
    class Main:
        __spec__ = None
        __file__ = str(ROOT / 'main.py')

    monkeypatch.setitem(sys.modules, '__main__', Main)
    assert run_record.users_script() is None
    Main.__file__ = str(ROOT / 'unet.py')
    assert run_record.users_script() == ROOT / 'unet.py'
    Main.__spec__ = object()  # python -m
    assert run_record.users_script() is None
    del Main.__file__  # a notebook
    Main.__spec__ = None
    assert run_record.users_script() is None


def test_a_class_without_source_is_left_out():
    names = {}
    exec('class Typed: ...', names)
    assert identity_of(names['Typed'], object, 'x') == run_record.Identity('Typed', {}, 'x')
    with pytest.raises(SettingError, match='Typed was not defined in a file'):
        import_class(**run_record.import_arguments(names['Typed']))


# ---------------------------------------------------------------- run.json


def test_each_start_adds_an_entry(tiny_config, monkeypatch):
    config = tiny_config(experiment_name='run')
    config.run_dir.mkdir(parents=True)
    monkeypatch.setattr(sys, 'argv', ['mine.py', '--seed', '1'])
    first = write_start(config, run_record.Identity, CPU)
    monkeypatch.setattr(sys, 'argv', ['mine.py', '--seed', '1', '--same_code'])
    second = write_start(config, run_record.Identity, CPU, step=40)
    assert json.loads((config.run_dir / 'run.json').read_text()) == [first, second]
    assert read_start(config.run_dir) == second
    assert (first['step'], second['step']) == (0, 40) and first['argv'] == ['mine.py', '--seed', '1']
    assert second['trainer'] == dict(file='training/run_folder.py', name='Identity')
    assert second['config'] == dict(file='config.py', name='Config')
    assert second['host'] == os.uname().nodename and second['processes'] == 1 and second['device'].startswith('cpu')
    assert second['versions']['torch'] in torch.__version__ and sys.version.startswith(second['versions']['python'])
    assert [path.name for path in config.run_dir.iterdir()] == ['run.json']


@pytest.mark.parametrize(
    'env, argv, command',
    [
        ({}, ['main.py', '--seed', '1'], 'sh run.sh --seed 1'),
        ({'NPROC': '2'}, ['a b.py', '--channel_mults', '1', '2'], "NPROC=2 sh run.sh 'a b.py' --channel_mults 1 2"),
        ({'TORCHRUN_ARGS': '--nnodes 2'}, ['main.py'], "TORCHRUN_ARGS='--nnodes 2' sh run.sh"),
        (
            {'NNODES': '2', 'NODE_RANK': '0', 'MASTER_ADDR': 'h1'},
            ['main.py'],
            'NNODES=2 NODE_RANK=0 MASTER_ADDR=h1 sh run.sh',
        ),
        (
            {'NNODES': '2', 'NODE_RANK': '0', 'MASTER_ADDR': 'h1', 'MASTER_PORT': '4', 'RUN_PORT': '29600'},
            ['main.py'],
            'NNODES=2 NODE_RANK=0 MASTER_ADDR=h1 MASTER_PORT=29600 sh run.sh',
        ),
        ({'MASTER_ADDR': '127.0.0.1'}, ['main.py'], 'sh run.sh'),  # torchrun's
        ({'RUN_REPORTS': None}, ['mine.py', '--seed', '1'], 'python mine.py --seed 1'),
    ],
)
def test_the_command_is_what_was_typed(monkeypatch, env, argv, command):
    monkeypatch.setattr(sys, 'argv', argv)
    for name in ('NPROC', 'TORCHRUN_ARGS', 'NNODES', 'NODE_RANK', 'MASTER_ADDR', 'RUN_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({'RUN_REPORTS': '/tmp'} | env).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert run_record.command_line() == command


def test_git_gives_the_commit_and_the_diff_to_it(tmp_path, monkeypatch):
    def git(*arguments):
        who = ('-c', 'user.name=a', '-c', 'user.email=a@b')
        return subprocess.run(
            ['git', *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    monkeypatch.setattr(run_record, 'ROOT', tmp_path)
    nothing = dict(commit=None, diff=None)
    assert run_record.git_state() == nothing  # no repository
    git('init', '-q')
    (tmp_path / 'other').write_text('')
    git('add', '.')
    git('commit', '-qm', 'other')
    (tmp_path / 'config.py').write_text('a = 1\n')
    assert run_record.git_state() == nothing  # a repository that does not contain the project
    git('add', '.')
    git('commit', '-qm', 'first')
    assert run_record.git_state() == (state := dict(commit=git('rev-parse', 'HEAD').strip(), diff=''))
    with monkeypatch.context() as patch:
        patch.setenv('GIT_TEST_ASSUME_DIFFERENT_OWNER', '1')  # as in a container with another user
        assert run_record.git_state() == state
        assert run_record.output_of('git', 'rev-parse', 'HEAD') is None
    (tmp_path / 'config.py').write_text('a = 2\n')
    assert '-a = 1\n+a = 2' in run_record.git_state()['diff']
    monkeypatch.setattr(run_record, 'LONGEST_DIFF', 50)
    cut = run_record.git_state()['diff']
    assert cut[:50] == git('diff', 'HEAD')[:50] and cut.endswith('more characters') and len(cut) < 100
    monkeypatch.setenv('PATH', '')
    assert run_record.git_state() == nothing  # no git


def test_a_start_that_cannot_be_written_is_an_error_and_leaves_the_earlier_ones(tiny_config, monkeypatch):
    config = tiny_config(experiment_name='run')
    config.run_dir.mkdir(parents=True)
    entry = write_start(config, Config, CPU)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(SaveError, match=r'run\.json cannot be written.*No space'):
        write_start(config, Config, CPU)
    assert read_start(config.run_dir) == entry


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(SettingError, match=f'{tmp_path} has no run.json'):
        read_start(tmp_path)
