"""The environment that run.sh makes: launch/environment.sh, with tiny packages and without a network."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def fresh(tmp_path):
    """A copy of environment.sh whose requirements are two tiny wheels, and a function that runs only that."""
    import zipfile

    folder = tmp_path / 'fresh'
    (folder / 'launch').mkdir(parents=True)
    for name in ('run.sh', 'launch/environment.sh', 'pyproject.toml', 'requirements.lock'):
        (folder / name).write_text((ROOT / name).read_text())
    for name in ('alpha', 'beta'):
        with zipfile.ZipFile(folder / f'{name}-1.0-py3-none-any.whl', 'w') as wheel:
            info = f'{name}-1.0.dist-info'
            wheel.writestr(f'{name}.py', 'value = 1')
            wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
            wheel.writestr(
                f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
            )
            wheel.writestr(f'{info}/RECORD', f'{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n')
    (folder / 'requirements.txt').write_text('./alpha-1.0-py3-none-any.whl\n')

    def start(command='echo "uses $python"', **env):
        clean = {k: v for k, v in os.environ.items() if k not in ('VIRTUAL_ENV', 'CONDA_PREFIX', 'PYTHONPATH')}
        clean |= {'PYTHON': sys._base_executable, 'PIP_NO_INDEX': '1'} | env
        script = f'set -eu; . ./launch/environment.sh; find_python; {command}'
        pipe = subprocess.PIPE
        return subprocess.Popen(['/bin/sh', '-c', script], cwd=folder, env=clean, stdout=pipe, stderr=pipe, text=True)

    def setup(*command, **env):
        with start(*command, **env) as process:
            out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    setup.folder, setup.start = folder, start
    return setup


def test_environment_is_made_once_finished_if_cut_off_and_updated(fresh):
    first = fresh('"$python" -c "import alpha; print(alpha.value)"')
    assert first.returncode == 0 and '1' in first.stdout.split() and 'installing' in first.stdout, first.stderr
    second = fresh()
    assert second.stdout == f'uses {fresh.folder}/.venv/bin/python\n'
    (fresh.folder / 'requirements.txt').write_text('./alpha-1.0-py3-none-any.whl\n./beta-1.0-py3-none-any.whl\n')
    assert fresh('"$python" -c "import beta"').returncode == 0
    # cut off while pip was writing: pip takes the package for installed, but it is not whole
    (next(fresh.folder.glob('.venv/lib/python*/site-packages/alpha.py'))).unlink()
    (fresh.folder / '.venv/.installing').touch()
    again = fresh('"$python" -c "import alpha, beta"')
    assert again.returncode == 0 and 'installing' in again.stdout, again.stderr


def test_no_network_is_one_clear_line(fresh):
    (fresh.folder / 'requirements.txt').write_text('no-such-package==1.0\n')
    result = fresh()
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'pip could not install' in result.stderr and 'network' in result.stderr
    assert (fresh.folder / '.venv/.installing').exists()  # so the next start does not trust a partial install


@pytest.mark.parametrize(
    'python, words',
    [
        ('/nowhere/python3', ('/nowhere/python3 is not installed', 'PYTHON=')),
        (
            '#!/bin/sh\ncase $1 in --version) echo Python 3.8.1;; *) exit 1;; esac',
            ('Python 3.8.1 is not 3.11 to 3.14', 'PYTHON='),
        ),
        ('#!/bin/sh\ncase $2 in *ensurepip*) exit 1;; esac', ('no venv module', 'apt install python3-venv')),
    ],
)
def test_unusable_python_is_one_clear_line(fresh, python, words):
    if python.startswith('#!'):
        fake = fresh.folder / 'python3'
        fake.write_text(python)
        fake.chmod(0o755)
        python = str(fake)
    result = fresh(PYTHON=python)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    for word in words:
        assert word in result.stderr
    assert not (fresh.folder / '.venv').exists()


def test_an_environment_of_the_user_is_named_and_not_changed(fresh):
    mine = fresh.folder / 'mine'
    subprocess.run([sys._base_executable, '-m', 'venv', '--without-pip', mine], check=True)
    before = sorted(path.name for path in mine.rglob('*'))
    result = fresh(VIRTUAL_ENV=str(mine))
    assert result.returncode == 0 and result.stdout.endswith(f'uses {fresh.folder}/.venv/bin/python\n')
    assert str(mine) in result.stderr and 'lacks: torch, torchvision' in result.stderr
    assert sorted(path.name for path in mine.rglob('*')) == before
    packages = next(mine.glob('lib/python*/site-packages'))
    (packages / 'torch-2.1.0.dist-info').mkdir()
    (packages / 'torch-2.1.0.dist-info' / 'METADATA').write_text('Name: torch\nVersion: 2.1.0\n')
    assert 'torch 2.10 or newer (it has 2.1.0)' in fresh(VIRTUAL_ENV=str(mine)).stderr


def test_a_fitting_environment_of_the_user_is_used(fresh, tmp_path):
    """Also if a start-up file prints something into the output of its python."""
    (tmp_path / 'sitecustomize.py').write_text('print("welcome to the cluster")')
    result = fresh(VIRTUAL_ENV=sys.prefix, PYTHONPATH=str(tmp_path))
    assert result.stdout == f'uses {sys.prefix}/bin/python\n' and not result.stderr
    assert not (fresh.folder / '.venv').exists()


def test_a_venv_of_the_user_in_the_folder_is_never_replaced(fresh):
    subprocess.run([sys._base_executable, '-m', 'venv', '--without-pip', fresh.folder / '.venv'], check=True)
    before = sorted(path.name for path in (fresh.folder / '.venv').rglob('*'))
    (fresh.folder / '.venv.lock').mkdir()
    result = fresh()
    assert result.returncode == 1 and '.venv was not made by run.sh and lacks: torch' in result.stderr
    assert sorted(path.name for path in (fresh.folder / '.venv').rglob('*')) == before


def test_two_first_starts_at_once_make_one_environment(fresh):
    """The second waits, prints for which process, and finds all done; neither leaves the lock behind."""
    starts = [fresh.start('"$python" -c "import alpha"; echo "uses $python"') for _ in range(2)]
    ends = [start.communicate(timeout=100) for start in starts]
    assert [start.returncode for start in starts] == [0, 0], ends
    assert sum('installing the packages' in out for out, _ in ends) == 1
    maker = next(start for start, (out, _) in zip(starts, ends, strict=True) if 'installing' in out)
    waiter = next(out for out, _ in ends if 'installing' not in out)
    assert f'waiting for process {maker.pid} on {os.uname().nodename}, which is making .venv' in waiter
    assert all(out.endswith(f'uses {fresh.folder}/.venv/bin/python\n') for out, _ in ends)
    assert not (fresh.folder / '.venv.lock').exists()


def test_a_stopped_or_failed_first_start_gives_the_lock_back(fresh):
    slow = fresh.folder / 'python3'
    slow.write_text(f'#!/bin/sh\ncase "$*" in "-m venv"*) sleep 60;; *) exec {sys._base_executable} "$@";; esac')
    slow.chmod(0o755)
    start = fresh.start(PYTHON=str(slow))
    assert wait_until((fresh.folder / '.venv/install.log').exists, 30)
    lock = fresh.folder / '.venv.lock'
    assert (lock / 'owner').read_text() == f'process {start.pid} on {os.uname().nodename}\n'
    os.utime(lock, (0, 0))
    assert wait_until(lambda: time.time() - lock.stat().st_mtime < 60, 20)  # a heartbeat for other hosts
    start.send_signal(signal.SIGTERM)
    start.communicate(timeout=20)
    assert start.returncode == 75 and not (fresh.folder / '.venv.lock').exists()
    (fresh.folder / 'requirements.txt').write_text('no-such-package==1.0\n')
    assert fresh().returncode == 1 and not (fresh.folder / '.venv.lock').exists()


@pytest.mark.parametrize('minutes, host, taken', [(0, 'here', True), (3, 'node7', False), (7, 'node7', True)])
def test_a_lock_left_behind_is_taken_over(fresh, minutes, host, taken):
    """At once if its process is dead on this host; on another host an owner that is alive touches its lock."""
    dead = subprocess.Popen(['true'])
    dead.wait()
    owner = f'process {dead.pid} on {os.uname().nodename if host == "here" else host}'
    lock = fresh.folder / '.venv.lock'
    lock.mkdir()
    (lock / 'owner').write_text(f'{owner}\n')
    os.utime(lock, (time.time() - 60 * minutes,) * 2)
    start = fresh.start()
    if not taken:
        assert f'waiting for {owner}' in start.stdout.readline()
        assert (lock / 'owner').read_text() == f'{owner}\n'
        start.kill()
    out, err = start.communicate(timeout=100)
    assert (f'taking over .venv.lock, which {owner} left behind' in out) == taken == (not lock.exists()), err
    assert (start.returncode == 0) == taken, err


def test_a_copy_of_run_sh_without_the_project_is_an_error(tmp_path):
    """`sbatch run.sh` makes such a copy, in a folder of Slurm's."""
    (tmp_path / 'run.sh').write_text((ROOT / 'run.sh').read_text())
    result = subprocess.run(['sh', tmp_path / 'run.sh'], capture_output=True, text=True, timeout=20)
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert f'no launch/environment.sh in {tmp_path}' in result.stderr
