"""End of a program: exit codes, printed and reported errors, and flags that are wrong on one of several processes."""

import io
import json
import os
import subprocess
import sys

import pytest

from runtime import command
from runtime.errors import SettingError
from tests.helpers import ROOT

PROGRAM = """
import sys
from runtime import command, errors

def do():
    kind = sys.argv[1]
    if kind != 'done':
        raise getattr(errors, kind, RuntimeError)('lr=1: too large. Try 1e-3.')

command.run(do)
"""


def run(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(('RUN_', 'RANK', 'LOCAL_RANK'))}
    env = clean | {'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''} | env
    return subprocess.run([sys.executable, '-c', code, *arguments], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    'kind, code, out, err',
    [
        ('done', 0, '', ''),
        ('SettingError', 2, '', 'SettingError: lr=1: too large. Try 1e-3.\n'),
        ('NonFiniteLoss', 3, '', 'NonFiniteLoss: lr=1: too large. Try 1e-3.\n'),
        ('Stopped', 75, '', ''),
        ('SaveError', 1, '', 'SaveError: lr=1: too large. Try 1e-3.\n'),
        ('DataError', 1, '', 'DataError: lr=1: too large. Try 1e-3.\n'),
    ],
)
def test_each_error_has_its_exit_code_and_is_printed_in_one_line(kind, code, out, err):
    done = run(PROGRAM, kind)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_other_errors_keep_their_traceback():
    done = run(PROGRAM, 'unexpected')
    assert done.returncode == 1 and done.stderr.startswith('Traceback') and 'RuntimeError: lr=1' in done.stderr


@pytest.mark.slow
def test_the_launcher_gets_the_error_and_prints_it(tmp_path):
    """As its last line, on every machine."""
    for kind in ('SaveError', 'SettingError', 'NonFiniteLoss'):
        done = run(PROGRAM, kind, RANK='0', LOCAL_RANK='0', RUN_REPORTS=str(tmp_path))
        report = json.loads((tmp_path / 'failed_0').read_text())
        assert report['rank'] == 0 and report['text'].endswith('lr=1: too large. Try 1e-3.')
        assert report['text'].startswith('lr=1') == (kind == 'SaveError')  # its class name would tell a user nothing
        assert 'lr=1' not in done.stderr
        assert (tmp_path / 'outcome').read_text() == str(done.returncode)


NAMES = """
import os, sys
from runtime import command

name = command.parsed(lambda: os.fsdecode(b'caf\\xe9'))
command.run(lambda: print(name, flush=True))
print(name, file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_a_name_that_cannot_be_encoded_and_a_closed_output_end_no_program():
    strict = dict(PYTHONIOENCODING='utf-8:strict')
    done = run(NAMES, **strict)
    assert (done.returncode, done.stdout, done.stderr) == (0, 'caf\\udce9\n', 'caf\\udce9\n')
    for closed in ('>&-', '2>&-', '>&- 2>&-'):
        for ranks in ({}, dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')):
            shell = f"""import subprocess, sys
sys.exit(subprocess.call(['sh', '-c', 'exec "$@" {closed}', 'sh', sys.executable, '-c', {NAMES!r}]))"""
            done = run(shell, **strict | ranks)
            assert done.returncode == 0, done.stderr


def wrong_flag():
    print('usage: main.py', file=sys.stderr)
    raise SystemExit(2)


def wrong_setting():
    raise SettingError('lr=1: too large.')


@pytest.mark.parametrize('parse, text', [(wrong_flag, 'usage: main.py'), (wrong_setting, 'lr=1: too large.')])
def test_a_wrong_flag_is_printed_by_the_first_process_only(parse, text, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    monkeypatch.setenv('RUN_REPORTS', str(tmp_path))
    assert command.parsed(lambda: 5) == 5
    for rank, local_rank in (('0', '0'), ('1', '1'), ('2', '0')):  # rank 2 is the first of a second machine
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('LOCAL_RANK', local_rank)
        with pytest.raises(SystemExit) as ended:
            command.parsed(parse)
        assert ended.value.code == 2
        assert (text in capsys.readouterr().err) == (rank == '0')
    assert [path.name for path in tmp_path.iterdir()] == ['failed_2']
    assert text in json.loads((tmp_path / 'failed_2').read_text())['text']


def test_help_does_not_wait_for_torch():
    done = run('from runtime import command\nimport sys\nassert "torch" not in sys.modules\nprint("ok")')
    assert done.stdout == 'ok\n', done.stderr


def test_a_broken_stream_does_not_end_the_program():
    class Full(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    out = command.SafeStream(Full('seen'))
    assert out.write('text') == 4
    out.flush()
    assert out.getvalue() == 'seen'  # other attributes are passed through


def test_a_reader_that_has_read_enough_does_not_end_the_program(tmp_path):
    """As in `compare.py ... | head`: the rest of the work is done, and Python does not complain at the end."""
    work = f'[print(i, flush=True) for i in range(9999)] and open({str(tmp_path / "done")!r}, "w")'
    (tmp_path / 'program.py').write_text(f'from runtime import command\ncommand.run(lambda: {work})\n')
    words = f'{{ "{sys.executable}" "{tmp_path}/program.py"; echo "exit code $?" >&2; }} | head -n 1'
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(['sh', '-c', words], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ('0\n', 'exit code 0\n') and (tmp_path / 'done').exists()


def test_paths_are_relative_to_the_callers_folder(tmp_path, monkeypatch):
    from scripts.evaluate import Evaluate
    from scripts.generate import Generate

    (tmp_path / 'data').mkdir()
    monkeypatch.setenv('RUN_CALLER', str(tmp_path))
    for kind in (Evaluate, Generate):
        flags = ['--run', 'r', '--data_path', 'data', *(['--out', 'o.npz'] if kind is Generate else [])]
        options = command.options(kind, flags, None, 'run', 'data_path', 'data_dir')
        assert (options.run, options.data_path, options.data_dir) == (f'{tmp_path}/r', f'{tmp_path}/data', None)
