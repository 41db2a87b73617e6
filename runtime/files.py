"""Atomic file writes, hashes of tensors, locks between processes, and paths from the command line."""

import contextlib
import errno
import fcntl
import os
import pickle
import secrets
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime import alive
from runtime.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

# Errors that torch.load raises for a file that is damaged, truncated, or from another program.
LOAD_ERRORS = (
    zipfile.BadZipFile, zlib.error, pickle.PickleError, struct.error, EOFError, OSError, RuntimeError, LookupError,
    ValueError, TypeError, AttributeError, AssertionError,
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]  # the project's folder


def from_caller(path: str, flag: str = '') -> str:
    """Resolve a path from the command line. run.sh changes from the caller's folder RUN_CALLER to the project's.

    A relative path is resolved against the caller's folder or, if it only exists in the project, against the project
    (never for the flag `out`). A `data_path` that exists in neither may be a name on the hub, and is returned as it is.
    """
    caller = Path(os.environ.get('RUN_CALLER') or ROOT)
    there = caller / path
    is_ours = flag != 'out' and not there.exists() and ((ROOT / path).exists() or flag == 'data_path')
    if caller == ROOT or not path or path.startswith(('/', '~')) or is_ours:
        return path
    there = there.resolve() if '..' in there.parts else there
    return str(there.relative_to(ROOT) if there.is_relative_to(ROOT) else there)


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which replaces `path` at the end and is deleted after an error.
    `durable`: sync to disk, to survive a power cut. Creates the folder if needed.

    The temporary name is hidden and ends in .tmp, so that leftovers of a killed process can be found. It has a random
    part because two containers that share the folder may have the same process id and host name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp')
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    with atomic_write(path, durable) as temporary:
        temporary.write_text(text, encoding='utf-8', errors='backslashreplace')


def refuse_folder(setting: str, value: str, folder: Path, to_write: bool = True) -> None:
    """Raise SettingError if `folder` cannot be created or, with `to_write`, cannot be written. Creates nothing."""
    folder = folder.absolute()
    nearest = next(parent for parent in [folder, *folder.parents] if os.path.isdir(parent))
    rest = folder.relative_to(nearest).parts  # still to be created
    first, most = nearest.joinpath(*rest[:1]), os.pathconf(nearest, 'PC_NAME_MAX')
    longest = max((len(os.fsencode(name)) for name in rest), default=0)
    if rest and os.path.islink(first):
        why = f'{first} is a link to {os.readlink(first)}, and there is no such folder. Make it, remove the link'
    elif rest and os.path.lexists(first):
        why = f'{first} is not a folder. Move it away'
    elif 0 < most < longest:
        why = f'a name of {longest} bytes is too long for this disk, which takes {most}. Shorten it'
    elif (rest or to_write) and not os.access(nearest, os.W_OK | os.X_OK):
        why = f'{nearest} cannot be written. Make it a folder of yours'
    else:
        return
    raise SettingError(f'{setting}={value!r}: {why}, or pass another --{setting}.')


def cause_of(error: BaseException) -> str:
    """The reason why a file could not be written. torch hides the system's error behind its own."""
    cause = error if isinstance(error, OSError) else error.__context__
    full = {errno.ENOSPC: 'the disk is full: ', errno.EDQUOT: 'your quota of the disk is used up: '}
    return f'{full.get(cause.errno or 0, "")}{cause}' if isinstance(cause, OSError) else str(error)


def sync(path: Path) -> None:
    """fsync a file, or the entries of a folder, so that they survive a power cut, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # CIFS, VirtualBox and WSL cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def link_as(path: Path, second: Path) -> None:
    """Give a file a second name: a hard link, or a copy where links are impossible."""
    with atomic_write(second) as temporary:  # os.link cannot replace an existing file, the rename can
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)


def digest(*things: 'Tensor | str', size: int = 8) -> str:
    """A hash of texts and of all bytes of tensors, as 2 `size` hexadecimal digits."""
    import torch

    hasher = blake2b(digest_size=size)
    for thing in things:
        if isinstance(thing, str):
            hasher.update(thing.encode())
        else:  # in parts: the tensor may be a memory-mapped file, larger than memory
            rows = thing.reshape(1) if thing.ndim == 0 else thing
            per_row = max(1, rows[:1].numel() * rows.element_size())
            for part in rows.split(max(1, 2**24 // per_row)):
                hasher.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def try_lock(file: IO) -> bool | None:
    """Lock an open file for this process, without waiting: True; False if another process holds the lock; None if the
    file system has no locks. A POSIX record lock ends with its process, also across machines on shared file systems."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Admit one process of this machine at a time; `waiting` is called once if another process is inside. Yields False
    if the file system has no locks, or the lock file cannot be written: then other processes may be inside too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = open(path, 'a')  # noqa: SIM115
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield False
        return
    with lock:
        has_lock = try_lock(lock)
        if has_lock is False:
            waiting()
        with alive.print_while(f'waiting for the process that has locked {path}'):
            while has_lock is False:
                time.sleep(0.5)
                has_lock = try_lock(lock)
        yield bool(has_lock)
