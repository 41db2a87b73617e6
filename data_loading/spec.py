"""A data set as the rest of the code sees it: `DataSpec` says what it is, `Part` is its training or held-out part.

What `load` returns is checked once before training, and again in every batch that loader processes read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from config import Config
from runtime.errors import DataError, SettingError

Arrays = tuple[Tensor, ...]  # x (N, ...), label (N, ...), and, if the data are pairs, x1 (N, ...)
HOW_TO_RETURN = (
    'It must return the training and the held-out part, each (x, label), (x, label, x1) or a torch Dataset of such '
    'items: return (x, label), (held_out_x, held_out_label)'
)
EMPTY = 'it is empty. Put at least one item into it.'


@dataclass(frozen=True)
class DataSpec:
    """How to load a data set and what it is.

    `load(config)` returns the training and the held-out part. Each is a tuple of tensors or numpy arrays, which live on
    the device, or a torch Dataset, which loader processes read. The entries of the tuple, or of an item of the Dataset:

    x          (N, *shape): uint8 for scale 'image', floats for scale 'float'
    label      (N,) whole numbers from 0 to num_classes - 1; if num_classes is 0, anything with N rows
    x1         optional, like x: the data are pairs, and a loader yields (x, label, x1)

    A third entry next to the two parts, a dict, holds facts found while loading, which replace fields of this.
    A Dataset must give the same item each time: augmentation belongs in the trainer. `load` runs first on one process
    of each machine, which may download.
    """

    load: Callable[[Config], tuple[Any, ...]]
    shape: tuple[int, ...] | None = None  # of one x, (C, H, W) for images; None: read from the data
    num_classes: int = 0  # 0: the data have no classes
    max_value: int = 255  # of a pixel: images are divided by it
    scale: str = 'image'  # uint8, yielded in [0, 1]; 'float': floats of any range and rank, yielded as they are
    flip_keeps_label: bool = True
    rotation_keeps_label: bool = True
    translation_keeps_label: bool = True
    classes: tuple[str, ...] = ()  # class names, in order; empty: numbers
    mean: tuple[float, ...] = ()  # of each channel of latents that prepare.py has stored
    std: tuple[float, ...] = ()
    skipped: str = ''  # files that were ignored, for the report
    digest: str = ''  # a hash of all data, if `load` knows it already
    counts: tuple[int, ...] = ()  # training items of each class, if they are known; found when data are loaded

    @property
    def trained_classes(self) -> tuple[int, ...]:
        """The classes of which there are training items, which are sampled and judged; all if that is not known."""
        return tuple(i for i in range(self.num_classes) if not self.counts or self.counts[i])

    def columns(self) -> int:
        """Columns of a grid of samples: one for each class if there are 2 to 20, repeated if there are few."""
        n = len(self.trained_classes)
        return n * max(1, 10 // n) if 2 <= n <= 20 else 10 if n > 20 else 8

    def known_classes(self, label: Tensor | None, label_dropout: float) -> Tensor | None:
        """`label` (n,) if it holds classes that the network has learned, or num_classes (no class); else None."""
        if label is None or label.ndim != 1 or self.num_classes < 2 or label_dropout == 1:
            return None
        whole = not (label.is_floating_point() or label.is_complex()) and len(label) > 0
        return label if whole and label.min() >= 0 and label.max() <= self.num_classes else None

    def class_names(self, label: Tensor | None, label_dropout: float) -> list[str]:
        """The class name of each sample (n,); empty if the network has learned no classes."""
        known = self.known_classes(label, label_dropout)
        names = [*(self.classes or map(str, range(self.num_classes))), 'none']
        return [] if known is None else [names[i] for i in known.tolist()]


class Rows(Subset):
    """Items `start` to `stop` of a Dataset, with its fingerprint and labels if it has them."""

    def __init__(self, items: Any, start: int, stop: int):
        rows = range(start, stop)
        super().__init__(items, rows)
        if hasattr(items, 'fingerprint'):
            self.fingerprint = lambda: f'{items.fingerprint()} {rows}'
        if hasattr(items, 'labels'):
            self.labels = items.labels[start:stop]


class Part:
    """One part of a data set: arrays in memory, or a torch Dataset that is read item by item.

    `arrays` are (x, label) or (x, label, x1), or None for a Dataset; `items` is a Dataset in both cases. `name` is what
    errors call the data set.
    """

    def __init__(self, source: Arrays | Any, name: str = 'data'):
        self.name = name
        self.arrays: Arrays | None = source if isinstance(source, tuple) else None
        self.items: Any = TensorDataset(*source) if isinstance(source, tuple) else source

    def __len__(self) -> int:
        return len(self.items)

    def classes(self, spec: DataSpec) -> Tensor | None:
        """All labels, (N,) int64 on the CPU; None without classes, or if only reading every item would tell."""
        try:  # `labels` of a Dataset of the user's may be anything
            labels = torch.as_tensor(getattr(self.items, 'labels', None) if self.arrays is None else self.arrays[1])
        except (TypeError, ValueError, RuntimeError):
            return None
        classes = labels.cpu().long().clamp(0, max(spec.num_classes, 1) - 1)
        is_known = spec.num_classes and classes.shape == (len(self),) and classes.eq(labels.cpu()).all()
        return classes if is_known else None

    @cached_property
    def has_pairs(self) -> bool:
        """Whether an item is (x, label, x1). Reads the first item of a Dataset."""
        return len(self.arrays or self.items[0]) == 3

    def first(self, n: int) -> 'Part':
        """The first n items."""
        source = Rows(self.items, 0, n) if self.arrays is None else tuple(array[:n] for array in self.arrays)
        return Part(source, self.name)

    def contents(self) -> list[Tensor | str]:
        """The contents to hash for a fingerprint, with types and shapes: all arrays, or the text that the Dataset's own
        `fingerprint()` returns, or else its first and last item."""
        own = getattr(self.items, 'fingerprint', None)
        if own is not None:
            return [own()]
        with torch.random.fork_rng(devices=[]):  # so that items that are drawn at random are the same every time
            torch.manual_seed(0)
            batches = [self.arrays] if self.arrays else [default_collate([self.items[i]]) for i in (0, len(self) - 1)]
        return [thing for batch in batches for array in batch for thing in (describe(array), array)]


def describe(value: Any) -> str:
    """`value` in a few words: the types and shapes of arrays, the length of long tuples."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f'{str(value.dtype).removeprefix("torch.")} {tuple(value.shape)}'
    if not isinstance(value, (tuple, list)):
        return type(value).__name__
    few = f'({", ".join(map(describe, value[:4]))})'
    return few if len(value) <= 4 else f'a {type(value).__name__} of {len(value)} entries'


# ---------------------------------------------------------------- checks


def check_parts(spec: DataSpec, loaded: Any, where: str) -> tuple[DataSpec, Part, Part]:
    """What `spec.load` returned, ready for a Loader: `spec` with the shape of the data and the facts that came with
    them, the training and the held-out part. `where` names the data set in errors.

    Arrays are converted by `check_arrays`. The first item of a Dataset is read and checked. Raises SettingError.
    """
    if isinstance(loaded, tuple) and len(loaded) == 3 and isinstance(loaded[2], dict):
        spec, loaded = replace(spec, **loaded[2]), loaded[:2]
    if spec.scale not in ('image', 'float'):
        raise SettingError(f"{where}: scale={spec.scale!r} of its DataSpec must be 'image' or 'float'.")
    if not isinstance(loaded, (tuple, list)) or len(loaded) != 2 or not all(map(may_be_part, loaded)):
        raise SettingError(f'{where}: load returned {describe(loaded)}. {HOW_TO_RETURN}.')
    parts, entries = [], []
    for source, name in zip(loaded, ('training', 'held-out'), strict=True):
        here = f'{where}, {name} part'
        try:
            if isinstance(source, (tuple, list)):
                source = first = check_arrays(source, spec, here)
            elif len(source) == 0:
                raise DataError(f'{here}: {EMPTY}')
            else:
                first = collate([source[0]], spec, f'{here}, first item')
        except DataError as error:
            raise SettingError(str(error)) from None
        spec = replace(spec, shape=tuple(first[0].shape[1:]))
        parts.append(Part(source, where))
        entries.append(len(first))
    if entries[0] != entries[1]:
        counted = f'{entries[0]} entries in the training part, {entries[1]} in the held-out part'
        raise SettingError(f'{where}: {counted}. {HOW_TO_RETURN}.')
    return spec, *parts


def may_be_part(part: Any) -> bool:
    """Whether `part` is a tuple of arrays, or a Dataset of known length."""
    has_both = hasattr(part, '__len__') and hasattr(part, '__getitem__')
    return has_both and not isinstance(part, (Tensor, np.ndarray, dict, str))


def collate(items: list, spec: DataSpec, where: str) -> Arrays:
    """A batch from items of a Dataset, checked. Raises DataError."""
    try:
        arrays = default_collate(items)
    except (TypeError, RuntimeError):
        kinds = list(dict.fromkeys(map(describe, items)))
        raise DataError(
            f'{where}: no batch can be made of {" and ".join(kinds[:3])}. Every item must be (x, label) or '
            '(x, label, x1): x a tensor, label a whole number, all of the same types and shapes.'
        ) from None
    return check_arrays(arrays, spec, where)


def check_arrays(arrays: Any, spec: DataSpec, where: str) -> Arrays:
    """Tensors from tensors or numpy arrays: x and x1 uint8 (scale 'image') or float32 ('float'), class labels int64.

    Raises DataError, which says what was found, what is expected and how to fix it.
    """
    is_tuple = isinstance(arrays, (tuple, list)) and len(arrays) in (2, 3)
    if not is_tuple or not all(isinstance(array, (Tensor, np.ndarray)) and array.ndim for array in arrays):
        wanted = 'It must be (x, label) or (x, label, x1), of tensors or numpy arrays'
        raise DataError(f'{where}: {describe(arrays)}. {wanted}.')
    try:
        arrays = [torch.from_numpy(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a for a in arrays]
    except TypeError as error:
        raise DataError(f'{where}: {describe(arrays)}: {error} Convert it to uint8, int64 or float32.') from None
    x, label, *x1 = arrays
    if len({len(array) for array in arrays}) > 1:
        counts = [f'{len(array)} {name}' for array, name in zip(arrays, ('x', 'labels', 'x1'), strict=False)]
        raise DataError(f'{where}: {", ".join(counts)}. x, labels and x1 must have the same length.')
    if len(x) == 0:
        raise DataError(f'{where}: {EMPTY}')
    x = check_values(x, spec, f'{where}: x')
    check_shape(tuple(x.shape[1:]), spec, f'{where}: x')
    x1 = [check_values(values, spec, f'{where}: x1') for values in x1]
    if x1 and x1[0].shape != x.shape:
        raise DataError(f'{where}: x1 is {describe(x1[0])}, x is {describe(x)}. x and x1 must have the same shape.')
    return x, check_labels(label, spec.num_classes, f'{where}: label') if spec.num_classes else label, *x1


def check_values(x: Tensor, spec: DataSpec, where: str) -> Tensor:
    """`x` as uint8 up to max_value for scale 'image', as finite float32 for scale 'float'."""
    if spec.scale == 'image':
        if x.dtype != torch.uint8:
            raise DataError(
                f'{where} is {describe(x)}, from {x.double().min():.4g} to {x.double().max():.4g}. Images must be '
                f"uint8, 0 to max_value={spec.max_value}: convert them, or pass scale='float' to the DataSpec if the "
                'values are meant as they are.'
            )
        if spec.max_value < 255 and x.max() > spec.max_value:
            raise DataError(
                f'{where} goes up to {x.max()}, but max_value={spec.max_value}, which becomes 1. '
                f'Pass max_value={x.max()} to the DataSpec, or 255 if all values may occur.'
            )
        return x
    if not x.is_floating_point():
        raise DataError(
            f"{where} is {describe(x)}, but scale='float' takes floats as they are. Convert it to float32, in the "
            "range that the trainer is to see, or pass scale='image' to the DataSpec for uint8 images."
        )
    x = x.float()
    if not x.isfinite().all():
        bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise DataError(
            f'{where}: {len(bad)} of {len(x)} items hold NaN or infinite values, the first is number {bad[0]}. '
            'Fix them or leave them out.'
        )
    return x


def check_shape(found: tuple[int, ...], spec: DataSpec, where: str) -> None:
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
    raise DataError(
        f'{where} has items of shape {found}, expected is ({", ".join(map(str, wanted))}). '
        f'{remedy}. If this shape is meant, pass shape={found} to the DataSpec.'
    )


def check_labels(label: Tensor, num_classes: int, where: str) -> Tensor:
    """`label` as int64, one class from 0 to num_classes - 1 for each item."""
    if label.ndim != 1 or label.is_floating_point() or label.is_complex():
        raise DataError(
            f'{where} is {describe(label)}, but num_classes={num_classes} needs one whole number for each item, shape '
            f'({len(label)},). With num_classes=0 it may be anything.'
        )
    label = label.long()
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f'{where} goes from {low} to {high}, but num_classes={num_classes} allows 0 to {num_classes - 1} '
            f"({num_classes} means 'no label'). Number the classes from 0, or pass num_classes={max(high, 0) + 1} to "
            'the DataSpec.'
        )
    return label
