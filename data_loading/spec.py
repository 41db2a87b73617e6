"""A data set as the rest of the code sees it: `DataSpec` says what it is, `Part` is its training or held-out part."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from config import Config

Arrays = tuple[Tensor, ...]  # x (N, ...), label (N, ...), and, if the data are pairs, x1 (N, ...)


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
    # 'image': uint8, yielded in [0, 1]; 'float': floats of any range and rank, yielded as they are
    scale: str = 'image'
    flip_keeps_label: bool = True
    rotation_keeps_label: bool = True
    translation_keeps_label: bool = True
    classes: tuple[str, ...] = ()  # class names, in order; empty: numbers
    mean: tuple[float, ...] = ()  # of each channel of latents that prepare.py has stored
    std: tuple[float, ...] = ()
    skipped: str = ''  # files that were ignored, for the report
    digest: str = ''  # a hash of all data, if `load` knows it already

    def columns(self) -> int:
        """Columns of a grid of samples: one for each class if there are 2 to 20, repeated if there are few."""
        if 2 <= self.num_classes <= 20:
            return self.num_classes * max(1, 10 // self.num_classes)
        return 10 if self.num_classes > 20 else 8

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


class SizedDataset(Protocol):
    """A torch Dataset that has a length, which torch's own type does not promise."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


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

    def __init__(self, source: Arrays | SizedDataset, name: str = 'data'):
        self.name = name
        if isinstance(source, tuple):
            self.arrays, self.items = source, cast(SizedDataset, TensorDataset(*source))
        else:
            self.arrays, self.items = None, source

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> Any:
        """All labels, (N,); None if only reading every item of a Dataset would tell."""
        return getattr(self.items, 'labels', None) if self.arrays is None else self.arrays[1]

    @cached_property
    def has_pairs(self) -> bool:
        """Whether an item is (x, label, x1). Reads the first item of a Dataset."""
        return len(self.arrays or self.items[0]) == 3

    def first(self, n: int) -> 'Part':
        """The first n items."""
        source = Rows(self.items, 0, n) if self.arrays is None else tuple(array[:n] for array in self.arrays)
        return Part(source, self.name)

    def to(self, device: torch.device) -> 'Part':
        """The same part with its arrays on this device."""
        return self if self.arrays is None else Part(tuple(array.to(device) for array in self.arrays), self.name)

    def contents(self) -> list[Tensor | str]:
        """The contents to hash for a fingerprint, with types and shapes: all arrays, or the text that the Dataset's own
        `fingerprint()` returns, or else its first and last item."""
        own = getattr(self.items, 'fingerprint', None)
        if own is not None:
            return [own()]
        with torch.random.fork_rng(devices=[]):  # so that items that are drawn at random are the same every time
            torch.manual_seed(0)
            ends = (0, len(self) - 1)
            batches = [self.arrays] if self.arrays else [default_collate([self.items[i]]) for i in ends]
        return [thing for batch in batches for array in batch for thing in (describe(array), array)]


def describe(value: Any) -> str:
    """`value` in a few words: the types and shapes of arrays, the length of long tuples."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f'{str(value.dtype).removeprefix("torch.")} {tuple(value.shape)}'
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f'({", ".join(map(describe, value))})'
    if isinstance(value, (tuple, list)):
        return f'a {type(value).__name__} of {len(value)} entries'
    return type(value).__name__
