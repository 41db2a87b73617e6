"""Loader processes: makes batches of items, sends them, and limits each wait for them."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from data_loading.spec import type_and_shape
from runtime import stopping
from runtime.errors import DataError, SettingError

# Linux: the processes share the data's memory, and items of your own need not be picklable, as torch's loaders had it
# before Python 3.14. Elsewhere forking is not safe: the default there sends them the data set.
START_METHOD = 'fork' if sys.platform == 'linux' else None


class PipedTuple(tuple):
    """A tuple whose tensors a loader process sends through its pipe, as numpy arrays; it arrives as a tuple of tensors.

    torch would send each tensor as a file in /dev/shm, by a descriptor and a socket in TMPDIR. If one of these is full,
    torch only prints an error and sends nothing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return from_bytes, (list(map(as_bytes, self)),)


def as_bytes(value: Any) -> tuple[Any, Any, Any]:
    """(bytes, type, shape) of a tensor, or (value, None, None). Bytes, because numpy has no bfloat16."""
    if not isinstance(value, Tensor):
        return value, None, None
    return value.detach().contiguous().flatten().view(torch.uint8).numpy(), value.dtype, value.shape


def from_bytes(parts: list[tuple[Any, Any, Any]]) -> tuple[Any, ...]:
    """The tuple whose entries `as_bytes` has taken apart."""
    return tuple(v if kind is None else torch.from_numpy(v).view(kind).view(shape) for v, kind, shape in parts)


def stack_items(items: list[Any], where: str, numbers: Sequence[int] = ()) -> Any:
    """torch's default_collate, but in this process's own memory: in a loader process, torch's uses /dev/shm. Raises
    DataError if items do not fit together, which calls the data `where` and items by their `numbers`; else torch's
    errors."""
    stack: dict[Any, Any] = {Tensor: lambda tensors, **_: torch.stack(tensors)}
    try:
        return collate(items, collate_fn_map={**default_collate_fn_map, **stack})
    except (TypeError, RuntimeError) as error:
        first = dict[str, int]()  # description -> index of the first such item
        for i, item in enumerate(items):
            first.setdefault(type_and_shape(item), i)
        kinds = [f'{kind} (item {numbers[i]})' if numbers and len(first) > 1 else kind for kind, i in first.items()]
        if isinstance(error, RuntimeError) and len(kinds) == 1:  # another cause than the items, such as memory
            raise
        hint = ' transforms.PILToTensor() converts a PIL image.' if '(Image' in str(kinds) else ''
        wanted = '(x, label) or (x, label, x1): x a tensor, label a whole number, all of the same types and shapes'
        found = f'cannot make a batch of {" and ".join(kinds[:3])}'
        raise DataError(f'{where}: {found}. Every item must be {wanted}.{hint}') from None


def started(loader: DataLoader) -> Iterator[Any]:
    """`iter(loader)`, which starts its processes. Raises SettingError if the system's limits prevent it."""
    try:
        return iter(loader)
    except OSError as error:
        raise SettingError(
            f'num_workers={loader.num_workers}: loader processes cannot be started ({error}). They need a little room '
            'in /dev/shm, and files and processes (ulimit -n, ulimit -u). Make room, or pass --num_workers 0.'
        ) from error


def read(loader: DataLoader, what: str) -> Iterator[Any]:
    """The batches of the loader. `stopping.waiting` limits each wait, and calls the data `what`."""
    batches, end = started(loader), object()
    by = f'by {loader.num_workers} loader processes' if loader.num_workers else 'by this process'
    while True:
        with stopping.waiting(f'data of {what}, read {by} (num_workers)'):
            batch = next(batches, end)
        if batch is end:
            return
        yield batch
