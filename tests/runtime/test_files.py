"""Atomic file writes, links, hashes of tensors, and locks between processes."""

import contextlib
import errno
import io
import os
import random
import signal
import stat
import subprocess
import sys

import pytest
import torch

from runtime import files
from runtime.errors import SettingError
from tests.helpers import ROOT, wait_until


@pytest.fixture
def python(tmp_path):
    """`python(code, *arguments)`: a process that runs the code in an empty folder, killed at the end of the test."""
    started = []

    def start(code: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, '-c', code, *map(str, arguments)]
        env = os.environ | {'PYTHONPATH': str(ROOT)}
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('durable', [False, True])
def test_whole_replaces_the_file_at_the_end_only(tmp_path, durable):
    path = tmp_path / 'new folder/numbers.txt'
    with files.atomic_write(path, durable) as temporary:
        temporary.write_text('first')
        assert not path.exists()
    with files.atomic_write(path, durable) as temporary:
        temporary.write_text('second')
        assert path.read_text() == 'first'
    assert path.read_text() == 'second' and os.listdir(path.parent) == ['numbers.txt']


def test_whole_leaves_nothing_behind_after_an_error(tmp_path):
    files.write_text(tmp_path / 'numbers.txt', 'before')
    with pytest.raises(OSError, match='disk'), files.atomic_write(tmp_path / 'numbers.txt') as temporary:
        temporary.write_text('half')
        raise OSError('the disk is full')
    assert (tmp_path / 'numbers.txt').read_text() == 'before' and os.listdir(tmp_path) == ['numbers.txt']


WRITER = """
import sys
from pathlib import Path
from runtime import files
from runtime.errors import SettingError
for i in range(10**6):
    with files.atomic_write(Path('numbers.txt')) as temporary, open(temporary, 'w') as file:
        for _ in range(1000):
            file.write(f'{i % 10}' * 100)
            file.flush()
    print(i, flush=True)
"""


def test_whole_survives_a_kill_in_the_middle_of_a_write(python, tmp_path):
    writer = python(WRITER)
    writer.stdout.readline()
    assert wait_until(lambda: any(tmp_path.glob('.*.tmp')), 20)
    writer.send_signal(signal.SIGSTOP)  # at a random place, mostly within a write
    writer.kill()
    writer.wait()
    text = (tmp_path / 'numbers.txt').read_text()
    assert len(text) == 100_000 and len(set(text)) == 1
    (left,) = {path.name for path in tmp_path.iterdir()} - {'numbers.txt'} or {f'.numbers.txt.{writer.pid}-.tmp'}
    assert left.startswith(f'.numbers.txt.{writer.pid}-') and left.endswith('.tmp')


def test_whole_in_two_containers_never_uses_the_same_temporary_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'getpid', lambda: 7)
    with files.atomic_write(tmp_path / 'a') as first, files.atomic_write(tmp_path / 'a') as second:
        assert first != second and {first.parent, second.parent} == {tmp_path}
        first.write_text('first')
        second.write_text('second')
    assert (tmp_path / 'a').read_text() == 'first' and os.listdir(tmp_path) == ['a']  # the outer block ended last


def test_link_as_gives_a_second_name_that_outlives_the_first(tmp_path, monkeypatch):
    first, second, copy = tmp_path / 'last.pt', tmp_path / 'step_1.pt', tmp_path / 'step_2.pt'
    first.write_bytes(b'weights')
    second.write_bytes(b'of an earlier run')
    files.link_as(first, second)
    assert first.samefile(second)
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    files.link_as(first, copy)
    assert not first.samefile(copy)
    with files.atomic_write(first) as temporary:
        temporary.write_bytes(b'new weights')
    assert second.read_bytes() == copy.read_bytes() == b'weights'


def test_digest_depends_on_all_bytes_in_order():
    x = torch.arange(12.0).reshape(3, 4)
    assert files.digest(x) == files.digest(x[:1], x[1:]) == files.digest(x.T.contiguous().T)  # another memory layout
    other = [x.double(), x.flip(0), x[:2], x + torch.eye(3, 4) * 1e-6]
    assert len({files.digest(y) for y in [x, *other]}) == 5
    assert files.digest('a', x) != files.digest('b', x) and len(files.digest(x, size=16)) == 32
    assert files.digest(torch.tensor(1.5)) == files.digest(torch.tensor([1.5]))


def test_digest_of_a_large_tensor_equals_the_digest_of_its_parts(monkeypatch):
    x = torch.arange(2**23, dtype=torch.int32).reshape(2**11, 2**12)  # 32 MB: two parts
    assert files.digest(x) == files.digest(*x.split(100))


LOCKER = """
import sys, time
from pathlib import Path
from runtime import files
from runtime.errors import SettingError
with files.locked(Path('lock'), lambda: print('waits', flush=True)) as is_locked:
    print('inside' if is_locked else 'no locks', flush=True)
    time.sleep(float(sys.argv[1]))
print('out', flush=True)
"""


def test_locked_lets_one_process_in_at_a_time_and_outlives_a_kill(python):
    first = python(LOCKER, 60)
    assert first.stdout.readline() == 'inside\n'
    second = python(LOCKER, 0)
    assert second.stdout.readline() == 'waits\n'
    first.kill()
    assert second.communicate(timeout=20)[0] == 'inside\nout\n'
    third = python(LOCKER, 0)
    assert third.communicate(timeout=20)[0] == 'inside\nout\n'


def test_locked_yields_false_where_there_are_no_locks(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(files.fcntl, 'lockf', refuse)
    with files.locked(tmp_path / 'lock', lambda: pytest.fail('it waits')) as is_locked:
        assert not is_locked


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS])
def test_locked_lets_in_who_may_only_read(monkeypatch, tmp_path, number):
    """A cache that another user made, or that is mounted read-only, can be used."""

    def refuse(path, mode):
        assert (path, mode) == (tmp_path / 'lock', 'a')
        raise OSError(number, 'refused')

    with monkeypatch.context() as patch:
        patch.setattr('builtins.open', refuse)
        with files.locked(tmp_path / 'lock', lambda: pytest.fail('it waits')) as is_locked:
            assert not is_locked
    with pytest.raises(IsADirectoryError), files.locked(tmp_path, lambda: pytest.fail('it waits')):
        pytest.fail('it is locked')


def test_load_errors_cover_every_error_of_a_damaged_file():
    """torch raises errors of many types; 3000 files, each with one changed byte, cause them all."""
    file = io.BytesIO()
    torch.save({'a': torch.arange(3.0), 'b': [1, 'two', None], 'c': (torch.zeros(2), 3.0)}, file)
    good, draw = file.getvalue(), random.Random(0)
    for _ in range(3000):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] = draw.randrange(256)
        with contextlib.suppress(files.LOAD_ERRORS):
            torch.load(io.BytesIO(damaged), weights_only=True)


def test_durable_syncs_the_file_and_then_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / 'numbers.txt', []
    monkeypatch.setattr(files, 'sync', lambda place: synced.append((place.suffix or place, path.exists())))
    files.write_text(path, 'first', durable=True)
    assert synced == [('.tmp', False), (tmp_path, True)]
    files.write_text(path, 'second')
    assert len(synced) == 2


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_that_syncs_no_folder_is_written_to(tmp_path, monkeypatch, number):
    """EINVAL and EOPNOTSUPP, as on CIFS, VirtualBox and WSL, are ignored; EIO is a real error."""

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, 'refused')

    monkeypatch.setattr(os, 'fsync', refuse)
    with pytest.raises(OSError, match='refused') if number == errno.EIO else contextlib.nullcontext():
        files.write_text(tmp_path / 'x', 'text', durable=True)


@pytest.mark.parametrize(
    ('number', 'outcome'),
    [(errno.EAGAIN, False), (errno.EACCES, False), (errno.ENOLCK, None), (errno.EOPNOTSUPP, None)],
)
def test_try_lock_distinguishes_a_held_lock_from_a_file_system_without_locks(monkeypatch, number, outcome):
    def refuse(*_):
        raise OSError(number, 'refused')

    monkeypatch.setattr(files.fcntl, 'lockf', refuse)
    assert files.try_lock(io.BytesIO()) is outcome


def test_a_folder_that_cannot_be_made_or_written_is_named_with_its_cause(tmp_path, monkeypatch):
    """The check creates nothing."""
    (tmp_path / 'link').symlink_to(tmp_path / 'purged')
    (tmp_path / 'file').write_text('')
    before = sorted(tmp_path.iterdir())
    for name, text in {
        'link': rf'^x={str(tmp_path / "link")!r}: .*link is a link to .*purged, and there is no such folder\. Make it, '
        r'remove the link, or pass another --x\.$',
        'link/below': r'link is a link to .*purged',
        'file/below': r'file is not a folder\. Move it away',
        'new/' + 'ü' * 128: r'a name of 256 bytes is too long for this disk, which takes 255',
    }.items():
        with pytest.raises(SettingError, match=text):
            files.refuse_folder('x', str(tmp_path / name), tmp_path / name)
    for name in ('', 'new/below', 'n' * 255):
        files.refuse_folder('x', name, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(os, 'access', lambda path, mode: False)  # chmod would not stop root, who may run this test
    with pytest.raises(SettingError, match=f'{tmp_path} cannot be written'):
        files.refuse_folder('x', 'new', tmp_path / 'new')
    files.refuse_folder('x', '', tmp_path, to_write=False)
    with pytest.raises(SettingError, match=f'{tmp_path} cannot be written'):  # the folder has to be created
        files.refuse_folder('x', 'new', tmp_path / 'new', to_write=False)


def test_the_cause_of_an_error_of_torch_is_the_systems_error():
    try:
        with open('/dev/full', 'w') as file:
            torch.save(torch.zeros(10**6), file.buffer)
    except Exception as error:
        assert 'the disk is full: [Errno 28]' in files.cause_of(error)
    assert files.cause_of(OSError(errno.EDQUOT, 'no')).startswith('your quota of the disk is used up: ')
    assert files.cause_of(PermissionError(13, 'no', 'x')) == "[Errno 13] no: 'x'"
    assert files.cause_of(RuntimeError('other')) == 'other'
