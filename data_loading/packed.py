"""A data set as one file that is read in place: what decoding made of it, labels, class names and a digest.

The file is torch's own: `torch.load(path, mmap=True)` is a dict with x (N, ...), label (N,) and facts. Its first
`held_out` rows are the held-out part.
"""

import contextlib
import errno
import fcntl
import glob
import itertools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import SettingError
from data_loading.checks import SizedDataset
from data_loading.loader import cores_per_process, obey_the_parent_alone
from runtime.errors import DataError
from runtime.ranks import print_once

FORMAT = 1


class NoRoomError(SettingError):
    """The disk has no room for a packed file."""


class Attempts(Dataset):
    """The items of a Dataset, or the text of the DataError where one cannot be read."""

    def __init__(self, items: SizedDataset):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | str:
        try:
            return self.items[i]
        except DataError as error:
            return str(error)


def build(items: SizedDataset, path: Path, held_out: int, skip: bool, title: str, **facts: Any) -> None:
    """Read all items (x, label), x of one shape and type, in parallel and with a bar, and write them to `path`.

    Items that cannot be read are an error after the last has been tried, which names them; with `skip` they are left
    out, counted and named. What is left of the first `held_out` items is the held-out part. Raises SettingError.
    """
    loader = DataLoader(
        Attempts(items),
        batch_size=32,
        num_workers=cores_per_process() if len(items) > 256 else 0,
        collate_fn=list,
        worker_init_fn=obey_the_parent_alone,
    )
    unread: list[str] = []
    facts['held_out'] = held_out

    def readable() -> Iterator[tuple[Tensor, int]]:
        for i, item in enumerate(item for batch in loader for item in batch):
            if isinstance(item, str):
                unread.append(item)
                facts['held_out'] -= i < held_out
            else:
                yield item
        named = ' '.join(unread[:3]) + (f' And {len(unread) - 3} more.' if len(unread) > 3 else '')
        if unread and not skip:
            raise SettingError(f'{title}: {len(unread)} of {len(items)} cannot be read. {named}')
        facts['left_out'] = len(unread)
        if unread:
            cut = [text.split(' Replace it')[0].split(' Mend it')[0] for text in unread[:3]]  # the remedy was taken
            print_once(f'{title}: left out {len(unread)} that cannot be read. {" ".join(cut)}')

    write_rows(path, readable(), len(items), title, facts)


def write_rows(path: Path, rows: Iterator[tuple[Tensor, int]], most: int, title: str, facts: dict[str, Any]) -> None:
    """Write up to `most` items (x, label) to `path`, with a bar; the file appears whole or not at all.

    It may be larger than memory. `facts` may be completed while the last row is read. Raises SettingError if there are
    none, or no room.
    """
    first = next(rows, None)
    if first is None:
        raise SettingError(f'{title}: there is nothing that can be read.')
    x = first[0]
    size = most * x.numel() * x.element_size()
    path.parent.mkdir(parents=True, exist_ok=True)
    if space_for(path) < 2 * size:
        raise NoRoomError(
            f'{path}: this takes {2 * size / 1e9:.3g} GB for a while and half of it afterwards; '
            f'{space_for(path) / 1e9:.3g} GB are free there. Make room, or take another place.'
        )
    labels: list[int] = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=building(path)) as folder:
        whole = torch.from_file(f'{folder}/x', True, most * x.numel(), dtype=x.dtype).view(most, *x.shape)
        with tqdm(total=most, desc=title, unit='item', disable=None, leave=False) as bar:
            for value, label in itertools.chain([first], rows):
                whole[len(labels)] = value
                labels.append(int(label))
                bar.update()
        # a second view of the same file, as long as what is in it: torch.save would write the whole of a slice
        kept = torch.from_file(f'{folder}/x', True, len(labels) * x.numel(), dtype=x.dtype).view(-1, *x.shape)
        write(path, kept, torch.tensor(labels), **facts)


def building(path: Path) -> str:
    """How the names of the folders begin in which `path` is built."""
    return f'.building-{path.name}-'


def remove_remains(path: Path) -> None:
    """Remove what a build of `path` that was killed has left: nothing has been written there for an hour. For a process
    that is alone with it; where locks are those of a machine, another may still build."""
    for folder in path.parent.glob(f'{glob.escape(building(path))}*'):
        with contextlib.suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (folder, *folder.iterdir())) > 3600:
                shutil.rmtree(folder, ignore_errors=True)


def write(path: Path, x: Tensor, label: Tensor, **facts: Any) -> None:
    """Write a packed file, whole or not at all; `digest` is added to the facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        torch.save(dict(format=FORMAT, x=x, label=label, digest=digest_of(x, label, facts), **facts), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The file's dict, its tensors memory-mapped. Raises SettingError if it is no packed file."""
    try:
        found = torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # what torch raises for other files is of many kinds
        raise SettingError(f'{path} cannot be read ({type(error).__name__}: {error}). Make it anew.') from None
    if not isinstance(found, dict) or found.get('format') != FORMAT:
        raise SettingError(f'{path} was not written by prepare.py of this version. Make it anew.')
    return found


def cached(path: Path) -> dict[str, Any] | None:
    """`read`, or None if the file is not there or, as a cache may be, damaged."""
    try:
        return read(path)
    except SettingError:
        return None


def digest_of(x: Tensor, label: Tensor, facts: dict[str, Any]) -> str:
    """A hash of all bytes and facts."""
    digest = blake2b(repr((x.dtype, tuple(x.shape), sorted(facts.items()))).encode(), digest_size=8)
    for rows in (*x.split(max(1, 2**24 // max(1, math.prod(x.shape[1:])))), label):
        digest.update(rows.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def space_for(path: Path) -> int:
    """Free bytes where `path` is to be."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """While one process of this machine builds `path`, others wait here, and say so. Yields whether it is alone: a file
    system may have no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f'.{path.name}.lock'), 'a') as lock:
        said, locked = False, True
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    locked = False  # each builds for itself, and the last one stays
                    break
                if not said:
                    print(f'waiting for another process of this machine, which builds {path}', flush=True)
                said = True
                time.sleep(0.5)
        yield locked


def held_out_rows(asked: int, n: int, where: str) -> int:
    """How many of n items are held out: `asked`, or a tenth and at most 1000 if that is 0. Raises SettingError."""
    if n < 2:
        raise SettingError(f'{where}: there are {n} images, and at least two are needed: one is held out. Add some.')
    if asked >= n:
        raise SettingError(f'{where}: held_out={asked}, but there are {n} images. Use a smaller --held_out.')
    return asked or min(1000, max(1, n // 10))


def parts_of(found: dict[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(training, held-out) part of a packed file, memory-mapped."""
    x, label, held_out = cast(Tensor, found['x']), cast(Tensor, found['label']), found['held_out']
    if not 0 < held_out < len(x):
        raise SettingError(
            f'{held_out} of {len(x)} images are held out: at least one, and not all, must be left. Add some.'
        )
    return (x[held_out:], label[held_out:]), (x[:held_out], label[:held_out])
