"""The interface of a data set: `DataSpec` describes it, `Part` is its training or held-out part.

checks.py checks what `load` returns.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from config import Config

Arrays = tuple[Tensor, ...]  # x (N, ...), label (N, ...), x1 (N, ...) if the data are pairs, and the conditions
Loaded = tuple[Any, Any, dict[str, Any]]  # training part, held-out part, facts


@dataclass(frozen=True)
class DataSpec:
    """The description of a data set, and the function that loads it.

    `load(config)` returns the training and the held-out part. Each is a tuple of tensors or numpy arrays, which live on
    the device, or a torch Dataset, which loader processes read. The entries of the tuple, or of an item of the Dataset:

    x          (N, *shape): uint8 for scale 'image', or any numbers with a value_range; floats for scale 'float'
    label      (N,) whole numbers from 0 to num_classes - 1; if num_classes is 0, anything with N rows
    x1         optional, like x: the data are pairs, and a loader yields (x, label, x1)
    conditions (N, ...) numbers, one entry for each name in `conditions`: inputs of the network, used as they are

    `load` may return a third entry, a dict of facts found while loading, which replace fields of this DataSpec.
    A Dataset must return the same item each time: augmentation belongs in the trainer. `load` runs first on one process
    of each machine, which may download.
    """

    load: Callable[[Config], tuple[Any, ...]]
    shape: tuple[int, ...] | None = None  # shape of one x, (C, H, W) for images; None: read from the data
    num_classes: int = 0  # 0: the data have no classes
    max_value: int = 255  # largest value of a pixel: images are divided by it
    value_range: tuple[float, ...] = ()  # values of black and of white in images that are not uint8
    scale: str = 'image'  # uint8, yielded in [0, 1]; 'float': floats of any range and rank, yielded as they are
    flip_keeps_label: bool = True
    rotation_keeps_label: bool = True
    translation_keeps_label: bool = True
    conditions: tuple[str, ...] = ()  # names of the last entries
    condition_shapes: tuple[tuple[int, ...], ...] = ()  # shape of one item of each; set when data are loaded
    classes: tuple[str, ...] = ()  # class names, in order; empty: numbers
    mean: tuple[float, ...] = ()  # mean of each channel of latents, stored by prepare.py
    std: tuple[float, ...] = ()  # their standard deviation
    skipped: str = ''  # files that were ignored, for the report
    layout: str = ''  # axes of arrays in a file, a key of arrays.LAYOUTS
    reading: str = ''  # how the axes of arrays in a file were read, for the printed line
    values: str = ''  # their values of black and white if not 0 and 255, for this line and the fingerprint
    digest: str = ''  # a hash of all data, if `load` knows it already
    counts: tuple[int, ...] = ()  # number of training items of each class, if known; set when data are loaded

    @property
    def trained_classes(self) -> tuple[int, ...]:
        """The classes that have training items: only these are sampled and judged. All, if counts are unknown."""
        return tuple(i for i in range(self.num_classes) if not self.counts or self.counts[i])

    @property
    def named_conditions(self) -> str:
        """The conditions with the shape of one item, as text: 'temperature (), wind (2,)'."""
        pairs = zip(self.conditions, self.condition_shapes, strict=True)
        return ', '.join(f'{name} {tuple(shape)}' for name, shape in pairs)

    def scaled(self, x: Tensor) -> Tensor:
        """x as the trainer receives it: images in [0, 1], floats as they are."""
        low, high = self.value_range or (0, self.max_value if self.scale == 'image' else 1)
        return ((x.float() - low) / (high - low)).clamp(0, 1) if self.value_range else x.float() / high

    def columns(self) -> int:
        """Columns of a grid of samples: one for each class if there are 2 to 20 classes, repeated if there are few."""
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


class Batch(tuple):
    """(x, label), or (x, label, x1) if the data are pairs. `cond` has the conditions, each (B, ...), by name."""

    cond: dict[str, Tensor]

    def __new__(cls, arrays: Arrays, names: tuple[str, ...] = ()) -> 'Batch':
        first = len(arrays) - len(names)
        batch = super().__new__(cls, arrays[:first])
        batch.cond = dict(zip(names, arrays[first:], strict=True))
        return batch


def fingerprint_of(items: Any, rows: range) -> str:
    return f'{items.fingerprint()} {rows}'


class Rows(Subset):
    """Items `start` to `stop` of a Dataset, with its fingerprint, labels and file_rows if it has them."""

    def __init__(self, items: Any, start: int, stop: int):
        rows = range(start, stop)
        super().__init__(items, rows)
        if hasattr(items, 'fingerprint'):
            self.fingerprint = functools.partial(fingerprint_of, items, rows)  # not a lambda: it may be pickled
        for name in ('labels', 'file_rows'):
            if hasattr(items, name):
                setattr(self, name, getattr(items, name)[start:stop])


class Part:
    """One part of a data set: arrays in memory, or a torch Dataset that is read item by item.

    `arrays` are the entries that DataSpec lists, or None for a Dataset; `items` is a Dataset in both cases. `name` is
    the data set's name in errors, and the last `conditions` entries are conditions.
    """

    def __init__(self, source: Arrays | Any, name: str = 'data', conditions: int = 0):
        self.name, self.conditions = name, conditions
        self.arrays: Arrays | None = source if isinstance(source, tuple) else None
        self.items: Any = TensorDataset(*source) if isinstance(source, tuple) else source

    def __len__(self) -> int:
        return len(self.items)

    def classes(self, spec: DataSpec) -> Tensor | None:
        """All labels, (N,) int64 on the CPU; None without classes, or if one would have to read every item."""
        try:  # `labels` of a user's Dataset may be anything
            labels = torch.as_tensor(getattr(self.items, 'labels', None) if self.arrays is None else self.arrays[1])
        except (TypeError, ValueError, RuntimeError):
            return None
        classes = labels.cpu().long().clamp(0, max(spec.num_classes, 1) - 1)
        is_known = spec.num_classes and classes.shape == (len(self),) and classes.eq(labels.cpu()).all()
        return classes if is_known else None

    @cached_property
    def has_pairs(self) -> bool:
        """Whether an item has x1. Reads the first item of a Dataset."""
        return len(self.arrays or self.items[0]) == 3 + self.conditions

    def first(self, n: int) -> 'Part':
        """The first n items."""
        source = Rows(self.items, 0, n) if self.arrays is None else tuple(array[:n] for array in self.arrays)
        return Part(source, self.name, self.conditions)

    def contents(self) -> list[Tensor | str]:
        """The contents to hash for a fingerprint, with types and shapes: all arrays, or the text that the Dataset's own
        `fingerprint()` returns, or else its first and last item."""
        own = getattr(self.items, 'fingerprint', None)
        if own is not None:
            return [own()]
        with torch.random.fork_rng(devices=[]):  # so that a random item is the same every time
            torch.manual_seed(0)
            batches = [self.arrays] if self.arrays else [default_collate([self.items[i]]) for i in (0, len(self) - 1)]
        return [thing for batch in batches for array in batch for thing in (type_and_shape(array), array)]


def type_and_shape(value: Any) -> str:
    """A short text on `value`: types and shapes of arrays, lengths of long tuples."""
    if hasattr(value, 'dtype') and hasattr(value, 'shape') and not isinstance(value, np.generic):
        return f'{str(value.dtype).removeprefix("torch.")} {tuple(value.shape)}'
    if not isinstance(value, (tuple, list)):
        return type(value).__name__
    few = f'({", ".join(map(type_and_shape, value[:4]))})'
    return few if len(value) <= 4 else f'a {type(value).__name__} of {len(value)} entries'


def counted(n: int, name: str) -> str:
    """'1 image', '2 images', '2 classes'."""
    return f'{n} {name}' if n == 1 else f'{n} {name}{"e" * name.endswith("s")}s'
