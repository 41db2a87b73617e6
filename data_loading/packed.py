"""Packed files: a decoded data set in one file, read in place. `prepare.py` writes such files, and so does the cache.

`torch.load(path, mmap=True)` reads one: a dict with x (N, ...), label (N,) and facts, among them a digest of
everything. The first `held_out` rows are the held-out part.
"""

import contextlib
import glob
import itertools
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config import Config
from data_loading import workers
from data_loading.spec import Loaded, Rows, type_and_shape
from runtime import alive, files
from runtime.errors import DataError, SettingError
from runtime.ranks import cores_per_process, print_once
from runtime.stopping import ignore_signals_except_from_parent

FORMAT = 1
# The zip entries in which torch stores the first two tensors of a file. x comes first: after 30 bytes of zip header, 14
# for this name and 20 for zip64 sizes, so at byte 64, where torch would align it, too.
X, LABEL, X_BEGINS = 'archive/data/0', 'archive/data/1', 64


class NoRoomError(SettingError):
    """The disk has no room for a packed file."""


# ---------------------------------------------------------------- from a Dataset to a file


def decoded_once(config: Config, items: Any, held_out: int, facts: dict[str, Any], state: str, title: str) -> Loaded:
    """(training part, held-out part, facts) from images `items`; the first `held_out` are held out. Decodes them into
    data_dir/cache, in parallel, and reads them from there while `state` is the same. Without `cache`, or if the disk is
    full, the parts are Datasets."""
    mark = files.digest(repr((state, held_out, config.held_out, config.skip_unreadable)))
    path = Path(config.data_dir, 'cache', f'{title.split()[-1]}-{mark}.pt')
    stored = {name: fact for name, fact in facts.items() if name != 'skipped'}  # skipped files are not in the data
    make = partial(build, items, path, held_out, config.skip_unreadable, title, **stored)
    found = read_or_build(path, make) if config.cache else None
    if found is None:
        return Rows(items, held_out, len(items)), Rows(items, 0, held_out), facts
    left_out = found.get('left_out') and f'left out {found["left_out"]} that cannot be read'
    skipped = '; '.join(filter(None, [facts.get('skipped'), left_out]))
    train, test, known = parts_of(found)
    return train, test, known | dict(skipped=skipped)


def read_or_build(path: Path, build: Callable[[], None]) -> dict[str, Any] | None:
    """The contents of the packed file `path`, which `build` writes if there is none; None if there is no room for it.

    Only one process per machine builds, if the file system has locks; else each does, and the last file stays.
    """
    waiting = f'waiting for another process on this machine, which builds {path}'
    with files.locked(path.with_name(f'.{path.name}.lock'), lambda: print(waiting, flush=True)) as has_lock:
        with contextlib.suppress(SettingError):  # missing, or a damaged cache
            return read(path)
        # A killed build leaves its temporary file. A lock may hold on one machine only, so a file that is not an hour
        # old may be one that another machine is still building.
        for remains in path.parent.glob(f'.{glob.escape(path.name)}.*.tmp') if has_lock else ():
            with contextlib.suppress(OSError):
                if time.time() - remains.stat().st_mtime > 3600:
                    remains.unlink()
        try:
            build()
        except NoRoomError as error:
            print_once(f'no room for a cache, so images are decoded again in every epoch: {error}')
            return None
        return read(path)


def attempts(items: Any, indices: list[int]) -> list[tuple[Tensor, int] | str]:
    """These items, with the text of the DataError in place of an item that cannot be read."""
    found = []
    for i in indices:
        try:
            found.append(workers.PipedTuple(items[i]))
        except DataError as error:
            found.append(str(error))
    return found


def build(items: Any, path: Path, held_out: int, skip: bool, title: str, **facts: Any) -> None:
    """Read all items (x, label), x of one shape and type, in parallel, with a progress bar, and write them to `path`.

    After all items have been tried, raises SettingError that names unreadable ones; with `skip` they are left out,
    counted and named. The held-out part is what remains of the first `held_out` items.
    """
    number = cores_per_process() if len(items) > 256 else 0
    loader = DataLoader(
        cast(Any, range(len(items))),
        batch_size=32,
        num_workers=number,
        collate_fn=partial(attempts, items),
        worker_init_fn=ignore_signals_except_from_parent,
        multiprocessing_context=workers.START_METHOD if number else None,
    )
    unread: list[str] = []
    facts['held_out'] = held_out

    def readable() -> Iterator[tuple[Tensor, int]]:
        for i, item in enumerate(item for batch in workers.read(loader, title) for item in batch):
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
            causes = [text.split(' Replace it')[0] for text in unread[:3]]  # without the remedy, which `skip` has taken
            print_once(f'{title}: left out {len(unread)} that cannot be read. {" ".join(causes)}')

    write_rows(path, readable(), len(items), title, facts)


# ---------------------------------------------------------------- the file


def write_rows(path: Path, rows: Iterator[tuple[Tensor, int]], most: int, title: str, facts: dict[str, Any]) -> None:
    """Write up to `most` items (x, label) to `path`, with a progress bar; the file appears whole or not at all.

    It may be larger than memory. `facts` is read after the last row, so `rows` may add to it. Raises SettingError if
    there are no items, if their shapes or types differ, or if the disk is full.
    """
    first = next(rows, None)
    if first is None:
        raise SettingError(f'{title}: no item can be read. Check its files.')
    x, size, free = first[0], most * first[0].nbytes, space_for(path)
    if free < size:
        room = f'this takes {size / 1e9:.3g} GB; {free / 1e9:.3g} GB are free there'
        raise NoRoomError(f'{path}: {room}. Make room, or choose another place.')
    labels: list[int] = []
    with files.atomic_write(path) as temporary:
        with zipfile.ZipFile(temporary, 'w') as archive, archive.open(X, 'w', force_zip64=True) as file:
            rows = itertools.chain([first], rows)
            for value, label in alive.with_progress(rows, title, most):
                if value.shape != x.shape or value.dtype != x.dtype:
                    found = f'item {len(labels)} is {type_and_shape(value)}, the first one {type_and_shape(x)}'
                    raise SettingError(f'{title}: {found}. All must have the same shape and type.')
                file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
                labels.append(int(label))
        written = np.memmap(temporary, np.uint8, 'c', X_BEGINS, len(labels) * x.nbytes)  # c: torch needs writable
        add_contents(temporary, torch.from_numpy(written).view(x.dtype).view(-1, *x.shape), torch.tensor(labels), facts)


def contents(x: Tensor, label: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """The dict that a packed file holds; `digest` is a hash of all bytes and facts."""
    digest = files.digest(repr((x.dtype, tuple(x.shape), sorted(facts.items()))), x, label)
    return dict(format=FORMAT, x=x, label=label, digest=digest, **facts)


def add_contents(path: Path, x: Tensor, label: Tensor, facts: dict[str, Any]) -> None:
    """Turn the zip file `path`, which holds only the entry X, into a file for torch.load: add all its other entries."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder, 'archive')
        with torch.serialization.skip_data():  # tensors are holes in this file, which take no space on the disk
            torch.save(contents(x, label, facts), frame)
        with zipfile.ZipFile(frame) as source, zipfile.ZipFile(path, 'a') as archive:
            for name in source.namelist():
                if name != X:
                    archive.writestr(name, label.numpy().tobytes() if name == LABEL else source.read(name))


def write(path: Path, x: Tensor, label: Tensor, **facts: Any) -> None:
    """Write a packed file from tensors, whole or not at all."""
    with files.atomic_write(path) as temporary:
        torch.save(contents(x, label, facts), temporary)


def read(path: Path) -> dict[str, Any]:
    """The dict in a packed file, its tensors memory-mapped. Raises SettingError if it is not a packed file."""
    try:
        found = torch.load(path, mmap=True, weights_only=True)
    except files.LOAD_ERRORS as error:
        raise SettingError(f'{path} cannot be read ({type(error).__name__}: {error}). Make it again.') from None
    if not isinstance(found, dict) or found.get('format') != FORMAT:
        raise SettingError(f'{path} was not written by prepare.py of this version. Make it again.')
    return found


def space_for(path: Path) -> int:
    """Free bytes on the disk of `path`, whose folder need not exist yet."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free


def parts_of(found: dict[str, Any]) -> Loaded:
    """(training part, held-out part, facts) of a packed file, memory-mapped. Raises SettingError if a part is empty."""
    x, label, held_out = found['x'], found['label'], found['held_out']
    if not 0 < held_out < len(x):
        raise SettingError(f'{held_out} of {len(x)} items are held out. It must be at least one, and not all.')
    names = ('num_classes', 'classes', 'scale', 'max_value', 'value_range', 'digest', 'mean', 'std')
    facts = {name: found[name] for name in names if name in found}
    return (x[held_out:], label[held_out:]), (x[:held_out], label[:held_out]), facts
