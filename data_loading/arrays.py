"""Arrays in files as a data set: .npy, .npz, and the .pt files of prepare.py."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from config import Config
from data_loading import packed
from runtime import files
from runtime.errors import SettingError
from runtime.ranks import print_once

NAMES_OF_X = ('images', 'x', 'data', 'samples', 'arr_0')
NAMES_OF_LABEL = ('labels', 'label', 'y', 'targets', 'arr_1')
LARGEST_SHUFFLED = 4e9  # bytes of an array that is shuffled in memory


def load_arrays(config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of the file `data_path`. Raises SettingError.

    .npy     one array, without labels
    .npz     the array under images, x, data or samples, whole-number labels (N,) under labels, label, y or targets
    .pt      a file of prepare.py

    uint8 arrays are images: (N, H, W), (N, C, H, W), or (N, H, W, C) with up to four channels. Floats of any shape
    (N, ...) and range are taken as they are. Of .npy and .npz a tenth, drawn at random and the same in every run, is
    held out; a prepared file stores its own split.
    """
    path = Path(config.data_path).expanduser()
    where = f"dataset='arrays', data_path={config.data_path!r}"
    if not path.is_file() or path.suffix not in ('.npy', '.npz', '.pt'):
        why = 'there is no such file' if not path.is_file() else 'its ending is none of .npy, .npz and .pt'
        raise SettingError(f'{where}: {why}. Pass X.npy, an .npz with images and labels, or a file of prepare.py.')
    if path.suffix == '.pt':
        return packed.parts_of(packed.read(path))
    x, label = read_numpy(path, where)
    held_out = packed.held_out_rows(config.held_out, len(x), where)
    is_image = x.dtype == np.uint8
    x = channels_first(x, where) if is_image else x
    num_classes = 0 if label is None else count_classes(label, len(x), where)
    facts = dict(scale='image' if is_image else 'float', num_classes=num_classes)
    label = np.zeros(len(x), np.int64) if label is None else label
    order = np.random.default_rng(0).permutation(len(x))
    rows = order[held_out:], order[:held_out]
    if x.nbytes > LARGEST_SHUFFLED:
        print_once(
            f'{path.name}: {x.nbytes / 1e9:.3g} GB are read row by row, in random order. Faster is one prepared file: '
            f'sh run.sh prepare.py --dataset arrays --data_path {config.data_path} --out FILE.pt'
        )
        train, test = (ShuffledRows(x, label, chosen) for chosen in rows)
    else:
        train, test = ((torch.from_numpy(x[chosen]), torch.from_numpy(label[chosen])) for chosen in rows)
    return train, test, facts


def read_numpy(path: Path, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(x, memory-mapped if the file holds nothing else; labels or None). Raises SettingError."""
    try:
        found = np.load(path, mmap_mode='r', allow_pickle=False)
        arrays = {'x': found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SettingError(f'{where} cannot be read ({error}). Write plain numbers by np.save or np.savez.') from None
    x, label = (
        next((arrays[name] for name in names if name in arrays), None) for names in (NAMES_OF_X, NAMES_OF_LABEL)
    )
    if x is None:
        raise SettingError(f'{where} holds {", ".join(arrays)}. Name the data one of {", ".join(NAMES_OF_X)}.')
    if x.ndim < 2 or (x.dtype != np.uint8 and x.dtype.kind != 'f'):
        raise SettingError(
            f'{where}: the data are {x.dtype} {x.shape}. They must be uint8 images or floats, with the items along the '
            'first of two or more axes.'
        )
    return (x if x.dtype.isnative else x.astype(x.dtype.newbyteorder('='))), label


def channels_first(x: np.ndarray, where: str) -> np.ndarray:
    """uint8 images as (N, C, H, W). Raises SettingError."""
    if x.ndim not in (3, 4):
        raise SettingError(
            f'{where}: uint8 data of shape {x.shape} are not images, which are (N, H, W), (N, C, H, W) or '
            '(N, H, W, C). Convert other data to floats, in the range that the trainer is to see.'
        )
    if x.ndim == 3:
        return x[:, None]
    return np.moveaxis(x, -1, 1) if x.shape[-1] <= 4 < x.shape[1] else x


def count_classes(label: np.ndarray, n: int, where: str) -> int:
    """The number of classes of n items with these labels. Raises SettingError."""
    whole = label.dtype.kind in 'iu' and label.ndim == 1 and len(label) == n
    if not whole or label.min() < 0:
        found = f'{label.dtype} {label.shape}' + (f', from {label.min()}' if whole else '')
        raise SettingError(f'{where}: labels are {found}. One whole number from 0 for each of {n} is needed.')
    classes, there = int(label.max()) + 1, len(np.unique(label))
    if classes > 2 * there + 10:
        raise SettingError(
            f'{where}: labels go up to {label.max()}, and only {there} of {classes} classes occur. Number those '
            'that occur from 0: np.unique(labels, return_inverse=True)[1].'
        )
    return classes


class ShuffledRows(Dataset):
    """Rows of a file that is too large to be shuffled in memory, in this order."""

    def __init__(self, x: np.ndarray, labels: np.ndarray, order: np.ndarray):
        self.x, self.labels, self.order = x, labels[order].tolist(), order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.x[self.order[i]])), self.labels[i]

    def fingerprint(self) -> str:
        """A hash of the first, the last and a thousand rows between them."""
        rows = np.linspace(0, len(self.x) - 1, min(1000, len(self.x))).astype(int)
        return files.digest(torch.from_numpy(np.array(self.x[rows])), size=64)
