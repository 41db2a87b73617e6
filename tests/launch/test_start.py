"""The script that run.sh starts: its path, and the modules that it can import; errors and reports of the launcher."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import launcher, start
from runtime import command, errors, stopping
from tests.helpers import ROOT, launch_env, wait_until

# prints its path, its flags, and which `evaluate` and `training` it imports
SCRIPT = """
import os, sys
import evaluate, training
files = [os.path.relpath(path, os.environ['BASE']) for path in (__file__, evaluate.__file__, training.__file__)]
print(*files, *sys.argv[1:], os.environ.get('RANK', 'direct'), flush=True)
"""


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A repo of scripts that all print their path, a folder elsewhere, and an installed `evaluate`."""
    base = tmp_path_factory.mktemp('base')
    for folder in ('launch', 'runtime', 'settings'):
        shutil.copytree(ROOT / folder, base / 'repo' / folder)
    for name in ('run.sh', 'pyproject.toml'):
        shutil.copy(ROOT / name, base / 'repo')
    scripts = (
        'repo/main.py repo/mine.py repo/other.py repo/examples/mine.py repo/scripts/generate.py '
        'repo/scripts/evaluate.py repo/scripts/sweep.py repo/tests/probe.py elsewhere/mine.py elsewhere/sub/generate.py'
    )
    packages = 'repo/training repo/scripts repo/tests repo/tests/training installed/evaluate'
    for path in [*scripts.split(), *(f'{package}/__init__.py' for package in packages.split())]:
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_text(SCRIPT if path in scripts else '')
    return base


def run(base, cwd, *words, **env):
    env = launch_env(1) | dict(BASE=str(base), PYTHONPATH=str(base / 'installed')) | env
    command = ['sh', base / 'repo/run.sh', *words]
    return subprocess.run(command, cwd=base / cwd, env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    'given, cwd, runs',
    [
        ('mine.py', 'elsewhere', 'elsewhere/mine.py'),  # the caller's comes first
        ('other.py', 'elsewhere', 'repo/other.py'),
        ('examples/mine.py', 'elsewhere', 'repo/examples/mine.py'),
        ('mine.py', 'repo', 'repo/mine.py'),
        ('{base}/elsewhere/mine.py', 'repo', 'elsewhere/mine.py'),
        ('generate.py', 'repo', 'repo/scripts/generate.py'),
        ('generate.py', 'elsewhere', 'repo/scripts/generate.py'),
        ('generate.py', 'repo/scripts', 'repo/scripts/generate.py'),
        ('generate.py', 'elsewhere/sub', 'elsewhere/sub/generate.py'),  # the user's own
        ('scripts/generate.py', 'repo', 'repo/scripts/generate.py'),
        ('./scripts/generate.py', 'repo', 'repo/scripts/generate.py'),
        ('scripts/generate.py', 'elsewhere', 'repo/scripts/generate.py'),
        ('../repo/scripts/generate.py', 'elsewhere', 'repo/scripts/generate.py'),
        ('{base}/repo/scripts/generate.py', 'elsewhere', 'repo/scripts/generate.py'),
        ('tests/probe.py', 'repo', 'repo/tests/probe.py'),
        ('nowhere.py', 'elsewhere', None),
    ],
)
def test_a_script_is_looked_for_where_the_caller_is_then_in_the_repo_and_its_scripts(base, given, cwd, runs):
    """It imports an installed `evaluate` and the repo's `training`, whatever is next to it in scripts/ and tests/."""
    result = run(base, cwd, given.format(base=base), '--flag', '--help')
    if runs:
        found = 'installed/evaluate/__init__.py repo/training/__init__.py'
        assert result.stdout == f'{runs} {found} --flag --help direct\n', result.stderr
    else:
        where = f'no script nowhere.py in {base}/elsewhere or {base}/repo'
        assert result.returncode == 1 and where in result.stderr


@pytest.mark.parametrize(
    'given, rank',
    [
        pytest.param('generate.py', '0', marks=pytest.mark.slow),
        ('sweep.py', 'direct'),
        pytest.param('tests/probe.py', '0', marks=pytest.mark.slow),
        pytest.param('mine.py', '0', marks=pytest.mark.slow),
    ],
)
def test_the_same_modules_are_in_reach_under_torchrun(base, given, rank):
    """A program of scripts/ that is always one process runs without it, by whatever path it is called."""
    result = run(base, 'repo', given, '--flag')
    path = given if given[0] in 'tm' else f'scripts/{given}'
    found = f'repo/{path} installed/evaluate/__init__.py repo/training/__init__.py --flag {rank}\n'
    assert found in result.stdout, result.stderr
    assert (rank == 'direct') == (result.stdout == found) or 'ended without a run' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('path', ['scripts/sweep.py', '../repo/scripts/sweep.py', '{base}/repo/scripts/sweep.py'])
def test_a_program_of_one_process_is_known_by_any_path(base, path):
    assert run(base, 'repo', path.format(base=base)).stdout.endswith('direct\n')


def test_a_stop_signal_in_start_up_is_answered_by_a_line(base):
    command = ['sh', base / 'repo/run.sh', 'mine.py', '--help']
    process = subprocess.Popen(command, cwd=base / 'repo', env=launch_env(1), stderr=subprocess.PIPE, text=True)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    assert wait_until(children.read_text, 10)  # its traps are set, and it looks for packages
    process.terminate()
    assert process.communicate(timeout=20)[1] == 'run.sh: stopped\n' and process.returncode == 75


def test_scripts_of_folders_that_would_hide_packages_are_modules():
    expected = {
        'scripts/generate.py': 'scripts.generate',
        'tests/oracle.py': 'tests.oracle',
        'tests/experiments/gan.py': None,
        'examples/edm.py': None,
        'main.py': None,
        '/elsewhere/scripts/mine.py': None,
    }
    assert {path: start.module_of(path) for path in expected} == expected
    hidden = {path.stem for folder in start.RUN_AS_MODULES for path in (ROOT / folder).glob('*')}
    assert {'evaluate', 'training', 'runtime'} <= hidden


@pytest.mark.parametrize(('nnodes', 'left'), [('1', {}), ('2', dict(RANK='3', WORLD_SIZE='4', MASTER_PORT='29999'))])
def test_a_program_of_one_process_waits_for_no_others(monkeypatch, nnodes, left):
    """A cluster or an earlier program may have set variables that torch would take for a group of processes."""
    found = {}

    def execv(*_):
        found.update({name: os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT') if name in os.environ})
        raise InterruptedError

    monkeypatch.setattr(os, 'execv', execv)
    for name, value in dict(NNODES=nnodes, RANK='3', WORLD_SIZE='4', MASTER_PORT='29999').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InterruptedError):
        start.start('scripts/sweep.py', is_direct=True)
    assert found == left


def test_neighbours_of_a_script_that_runs_as_a_module_excuse_no_old_import(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(start, 'old_imports', lambda path, has_neighbours: asked.append(has_neighbours) or ['old'])
    assert [start.start(path) for path in ('scripts/generate.py', 'examples/edm.py')] == [errors.EXIT_BAD_SETTING] * 2
    assert asked == [False, True] and capsys.readouterr().err == 'old\nold\n'


@pytest.mark.parametrize(('user', 'levels'), [('', ['FATAL', 'ERROR']), ('INFO', ['INFO', 'INFO'])])
def test_the_start_sets_the_log_level_and_warns_about_a_single_machine(monkeypatch, capsys, user, levels):
    """The log level of torch at its import and in workers; and the warning if a cluster may have meant several."""
    streams, seen, note = [], [], lambda: seen.append(os.environ['TORCH_CPP_LOG_LEVEL'])

    class Launcher:
        @property
        def launch(self):
            note()
            return lambda argv, module: (note(), streams.extend([sys.stdout, sys.stderr]))

    for stream in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    monkeypatch.setitem(sys.modules, 'launch.launcher', Launcher())
    monkeypatch.setenv('TORCH_CPP_LOG_LEVEL', user)
    monkeypatch.setenv('WORLD_SIZE', '4')
    for name in ('NNODES', 'SLURM_STEP_ID', 'TORCHRUN_ARGS'):
        monkeypatch.delenv(name, raising=False)
    start.start(str(ROOT / 'examples/edm.py'))
    assert seen == levels and all(isinstance(stream, command.SafeStream) for stream in streams) and len(streams) == 2
    assert 'run.sh: this run sees 1 machine, though WORLD_SIZE=4' in capsys.readouterr().err


# ---------------------------------------------------------------- the launcher


@pytest.mark.parametrize('nproc', ['0', '-1', 'two', '1.5'])
def test_the_launcher_refuses_a_bad_number_of_processes(nproc, monkeypatch, capsys):
    monkeypatch.setenv('NPROC', nproc)
    monkeypatch.setattr(os, 'setsid', lambda: None)
    assert launcher.launch(['main.py']) == errors.EXIT_BAD_SETTING
    assert f'NPROC={nproc!r}' in capsys.readouterr().err


def test_the_first_cause_is_the_killed_rank_else_the_first_report(tmp_path, monkeypatch):
    """The other ranks report that their connection broke."""
    for rank, when, text in ((0, 7.5, 'RuntimeError: connection closed'), (1, 7.4, 'KeyError: broken')):
        report = dict(time=when, rank=rank, text=text, follows=False)
        (tmp_path / f'failed_{rank}').write_text(json.dumps(report))
    assert min(stopping.causes({0: 1}, tmp_path))[1] == 'rank 1 failed first: KeyError: broken'
    monkeypatch.setenv('RUN_REPORTS', str(tmp_path))
    monkeypatch.setenv('RANK', '2')
    stopping.report_failure(errors.RankFailed('another rank failed'))
    heard = json.loads((tmp_path / 'failed_2').read_text())
    (tmp_path / 'failed_2').write_text(json.dumps(heard | dict(time=7.3)))
    assert min(stopping.causes({0: 1}, tmp_path))[1] == 'rank 1 failed first: KeyError: broken'
    assert 'rank 2 was killed by signal 9 (SIGKILL)' in min(stopping.causes({0: 1, 2: -9}, tmp_path))[1]


def test_a_torch_that_renamed_its_signal_handler_is_an_error(monkeypatch, tmp_path):
    monkeypatch.delattr(launcher.api, '_terminate_process_handler')
    with pytest.raises(RuntimeError, match=r'has no _terminate_process_handler: update launch/launcher\.py'):
        launcher.obey_once(tmp_path)


@pytest.mark.slow
def test_a_script_reads_the_input_of_run_sh(base):
    """For breakpoint(), for instance: a command in the background of a shell would read /dev/null."""
    (base / 'elsewhere/asks.py').write_text('print("got", input(), flush=True)')
    command = ['sh', base / 'repo/run.sh', 'asks.py']
    kept = dict(cwd=base / 'elsewhere', env=launch_env(1), text=True, timeout=100)
    assert 'got this\n' in subprocess.run(command, input='this\n', stdout=subprocess.PIPE, **kept).stdout
