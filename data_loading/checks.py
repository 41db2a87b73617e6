"""What data must be like: checked in one place before training, and again in every batch that loader processes read."""

import hashlib
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from config import Config, SettingError
from runtime.errors import DataError

if TYPE_CHECKING:
    from data_utils import DataSpec

Arrays = tuple[Tensor, ...]  # x (N, ...), label (N, ...), and, if the data are pairs, x1 (N, ...)


class SizedDataset(Protocol):
    """A torch Dataset that has a length, which torch's own type does not say."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Rows(Dataset):
    """Items `start` to `stop` of a Dataset, with its fingerprint and labels if it has them."""

    def __init__(self, items: SizedDataset, start: int, stop: int):
        self.items, self.rows = items, range(start, stop)
        whole: Any = items
        if hasattr(whole, 'fingerprint'):
            self.fingerprint = lambda: f'{whole.fingerprint()} {self.rows}'
        if hasattr(whole, 'labels'):
            self.labels = whole.labels[start:stop]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.items[self.rows[i]]


HOW_TO_RETURN = (
    'It must return the training and the held-out part, each (x, label), (x, label, x1) or a torch Dataset of such '
    'items: return (x, label), (held_out_x, held_out_label)'
)


def check_parts(
    spec: 'DataSpec', loaded: Any, config: Config
) -> tuple['DataSpec', Arrays | SizedDataset, Arrays | SizedDataset]:
    """What `spec.load` returned, ready for a Loader: `spec` with the shape of the data, training and held-out part.

    Arrays come out as `check_arrays` says. Of a Dataset the first item is read and checked. Raises SettingError.
    """
    name = f'dataset={config.dataset!r}'
    if spec.scale not in ('image', 'float'):
        raise SettingError(f"{name}: scale={spec.scale!r} of its DataSpec must be 'image' or 'float'.")
    if not isinstance(loaded, (tuple, list)) or len(loaded) != 2 or not all(map(may_be_part, loaded)):
        raise SettingError(f'{name}: load returned {describe(loaded)}. {HOW_TO_RETURN}.')
    parts, entries = [], []
    for part, where in zip(loaded, ('training', 'held-out'), strict=True):
        where = f'{name}, {where} part'
        if isinstance(part, (tuple, list)):
            part = first = check_arrays(part, spec, where)
        else:
            first = first_item(part, spec, where)
        spec = replace(spec, shape=tuple(first[0].shape[1:]))
        parts.append(part)
        entries.append(len(first))
    if entries[0] != entries[1]:
        raise SettingError(
            f'{name}: {entries[0]} entries in the training part, {entries[1]} in the held-out part. {HOW_TO_RETURN}.'
        )
    return spec, *parts


def may_be_part(part: Any) -> bool:
    """Whether `part` is a tuple of arrays, or a Dataset of known length."""
    if isinstance(part, (Tensor, np.ndarray, dict, str)):
        return False
    return hasattr(part, '__len__') and hasattr(part, '__getitem__')


def describe(value: Any) -> str:
    """`value` in a few words: the types and shapes of arrays, the length of what has many entries."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f'{str(value.dtype).removeprefix("torch.")} {tuple(value.shape)}'
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f'({", ".join(map(describe, value))})'
    if isinstance(value, (tuple, list)):
        return f'a {type(value).__name__} of {len(value)} entries'
    return type(value).__name__


def first_item(part: SizedDataset, spec: 'DataSpec', where: str) -> Arrays:
    """The first item of a Dataset as a batch of one. Raises SettingError."""
    if len(part) == 0:
        raise SettingError(f'{where}: it is empty. Put at least one item into it.')
    if spec.pixel_metrics:
        raise SettingError(
            f'{where}: pixel_metrics=True of the DataSpec needs arrays, but load returned a torch Dataset.'
        )
    try:
        return collate([part[0]], spec, f'{where}, first item')
    except DataError as error:
        raise SettingError(str(error)) from None


def collate(items: list, spec: 'DataSpec', where: str) -> Arrays:
    """A batch from items of a Dataset, checked. Raises DataError."""
    try:
        return check_arrays(default_collate(items), spec, where)
    except SettingError as error:
        raise DataError(str(error)) from None
    except (TypeError, RuntimeError):  # of default_collate
        kinds = list(dict.fromkeys(map(describe, items)))
        raise DataError(
            f'{where}: no batch can be made of {" and ".join(kinds[:3])}. Every item must be (x, label) or '
            '(x, label, x1): x a tensor, label a whole number, all of the same types and shapes.'
        ) from None


def check_arrays(arrays: Any, spec: 'DataSpec', where: str) -> Arrays:
    """Tensors from tensors or numpy arrays: x and x1 uint8 (scale 'image') or float32 ('float'), class labels int64.

    Raises SettingError, with what was found, what is expected and how to mend it.
    """
    if (
        not isinstance(arrays, (tuple, list))
        or len(arrays) not in (2, 3)
        or not all(isinstance(array, (Tensor, np.ndarray)) and array.ndim for array in arrays)
    ):
        raise SettingError(
            f'{where}: {describe(arrays)}. It must be (x, label) or (x, label, x1), of tensors or numpy arrays.'
        )
    try:
        arrays = [torch.from_numpy(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a for a in arrays]
    except TypeError as error:
        raise SettingError(f'{where}: {describe(arrays)}: {error} Convert it to uint8, int64 or float32.') from None
    x, label, *x1 = arrays
    if len({len(array) for array in arrays}) > 1:
        counts = [f'{len(array)} {name}' for array, name in zip(arrays, ('x', 'labels', 'x1'), strict=False)]
        raise SettingError(f'{where}: {", ".join(counts)}. There must be as many of each.')
    if len(x) == 0:
        raise SettingError(f'{where}: it is empty. Put at least one item into it.')
    x = check_values(x, spec, f'{where}: x')
    check_shape(tuple(x.shape[1:]), spec, f'{where}: x')
    x1 = [check_values(values, spec, f'{where}: x1') for values in x1]
    if x1 and x1[0].shape != x.shape:
        raise SettingError(
            f'{where}: x1 is {describe(x1[0])}, x is {describe(x)}. A pair is mixed, so both must have one shape.'
        )
    return x, check_labels(label, spec.num_classes, f'{where}: label') if spec.num_classes else label, *x1


def check_values(x: Tensor, spec: 'DataSpec', where: str) -> Tensor:
    """`x` as uint8 up to max_value for scale 'image', as finite float32 for scale 'float'."""
    if spec.scale == 'image':
        if x.dtype != torch.uint8:
            raise SettingError(
                f'{where} is {describe(x)}, from {x.double().min():.4g} to {x.double().max():.4g}. Images must be '
                f"uint8, 0 to max_value={spec.max_value}: convert them, or pass scale='float' to the DataSpec if the "
                'values are meant as they are.'
            )
        if spec.max_value < 255 and x.max() > spec.max_value:
            raise SettingError(
                f'{where} goes up to {x.max()}, but max_value={spec.max_value}, which becomes 1. '
                f'Pass max_value={x.max()} to the DataSpec, or 255 if all values may occur.'
            )
        return x
    if not x.is_floating_point():
        raise SettingError(
            f"{where} is {describe(x)}, but scale='float' takes floats as they are. Convert it to float32, in the "
            "range that the trainer is to see, or pass scale='image' to the DataSpec for uint8 images."
        )
    x = x.float()
    if not x.isfinite().all():
        bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise SettingError(
            f'{where}: {len(bad)} of {len(x)} items hold NaN or infinite values, the first is number {bad[0]}. '
            'Mend them or leave them out.'
        )
    return x


def check_shape(found: tuple[int, ...], spec: 'DataSpec', where: str) -> None:
    """That an item has the spec's shape, or, where this is None, a shape that images can have."""
    wanted = spec.shape
    if wanted is None and spec.scale == 'image':
        if len(found) < 3:
            wanted = ('C', 'H', 'W')
        elif len(found) == 3 and found[2] <= 4 < found[0]:
            wanted = found[2:] + found[:2]
    if wanted is None or tuple(wanted) == found:
        return
    if len(found) == len(wanted) - 1:
        remedy = 'If the channel is missing, add it: images[:, None]'
    elif found[-1:] + found[:-1] == tuple(wanted):
        remedy = 'If the channels come last, put them first: images.permute(0, 3, 1, 2)'
    else:
        remedy = 'Resize the data in load'
    raise SettingError(
        f'{where} has items of shape {found}, expected is ({", ".join(map(str, wanted))}). '
        f'{remedy}. If this shape is meant, pass shape={found} to the DataSpec.'
    )


def check_labels(label: Tensor, num_classes: int, where: str) -> Tensor:
    """`label` as int64, one class from 0 to num_classes - 1 for each item."""
    if label.ndim != 1 or label.is_floating_point() or label.is_complex():
        raise SettingError(
            f'{where} is {describe(label)}, but num_classes={num_classes} needs one whole number for each item, shape '
            f'({len(label)},). With num_classes=0 it may be anything.'
        )
    label = label.long()
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= num_classes:
        raise SettingError(
            f'{where} goes from {low} to {high}, but num_classes={num_classes} allows 0 to {num_classes - 1} '
            f"({num_classes} means 'no label'). Number the classes from 0, or pass num_classes={max(high, 0) + 1} to "
            'the DataSpec.'
        )
    return label


def describe_counts(dataset: str, parts: list[Arrays | SizedDataset], spec: 'DataSpec') -> str:
    """How many items and classes there are, in one line: with the names of the first classes, and how many of each."""
    sizes = [len(part[0]) if isinstance(part, tuple) else len(part) for part in parts]
    text = f'{dataset}: {sizes[0]:,} + {sizes[1]:,} held-out items of shape {"x".join(map(str, spec.shape or ()))}'
    if not spec.num_classes:
        return f'{text}, no classes'
    labels = [part[1].tolist() if isinstance(part, tuple) else getattr(part, 'labels', []) for part in parts]
    counts = np.bincount([*labels[0], *labels[1]], minlength=spec.num_classes)
    names = spec.classes or [str(i) for i in range(spec.num_classes)]
    known = bool(counts.any())
    shown = [f'{name} {count}' if known else name for name, count in zip(names[:12], counts, strict=False)]
    more = [f'and {spec.num_classes - 12} more'] if spec.num_classes > 12 else []
    return f'{text}, {spec.num_classes} classes: {", ".join(shown + more)}'


def fingerprint(parts: list[Arrays | SizedDataset], spec: 'DataSpec') -> str:
    """A short text that other data would change: how many items and classes, and a hash of the data of all parts.

    Of arrays all bytes count, unless `spec` has their digest. A Dataset may have a method `fingerprint() -> str`; else
    its first and last item count.
    """
    digest = hashlib.blake2b(digest_size=6)
    sizes = [len(part[0]) if isinstance(part, tuple) else len(part) for part in parts]
    digest.update(spec.digest.encode())
    for part, size in zip(parts, sizes, strict=True):
        if spec.digest:
            continue
        its_own = getattr(part, 'fingerprint', None)
        if its_own is not None:
            digest.update(its_own().encode())
            continue
        with torch.random.fork_rng(devices=[]):  # items that are drawn at random are the same ones every time
            torch.manual_seed(0)
            batches = [part] if isinstance(part, tuple) else [default_collate([part[i]]) for i in (0, size - 1)]
        for array in itertools.chain.from_iterable(batches):
            digest.update(describe(array).encode())
            digest.update(array.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f'{"+".join(map(str, sizes))} items, {spec.num_classes} classes, {digest.hexdigest()}'
