"""Arrays in files as a data set: .npy, .npz, and what prepare.py wrote (.pt)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import packed
from config import Config, SettingError

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
    held out; a prepared file says itself which are.
    """
    path = Path(config.data_path).expanduser()
    where = f"dataset='arrays', data_path={config.data_path!r}"
    if not path.is_file() or path.suffix not in ('.npy', '.npz', '.pt'):
        why = 'there is no such file' if not path.is_file() else 'its ending is none of .npy, .npz and .pt'
        raise SettingError(f'{where}: {why}. Pass X.npy, an .npz with images and labels, or a file of prepare.py.')
    if path.suffix == '.pt':
        return load_packed(path, config.held_out)
    x, label = read_numpy(path, where)
    facts: dict[str, Any] = dict(scale='image' if x.dtype == np.uint8 else 'float')
    if facts['scale'] == 'image':
        x = channels_first(x, where)
    if label is not None:
        whole = label.dtype.kind in 'iu' and label.ndim == 1 and len(label) == len(x)
        if not whole or label.min() < 0:
            found = f'{label.dtype} {label.shape}' + (f', from {label.min()}' if whole else '')
            raise SettingError(f'{where}: labels are {found}. One whole number from 0 for each of {len(x)} is needed.')
        facts['num_classes'] = int(label.max()) + 1
    held_out = packed.held_out_rows(config.held_out, len(x), where)
    if x.nbytes > LARGEST_SHUFFLED:
        raise SettingError(
            f'{where}: {x.nbytes / 1e9:.3g} GB are too many to be shuffled in memory. Write them into one file that is '
            f'read in place: sh run.sh prepare.py --dataset arrays --data_path {config.data_path} --out FILE.pt'
        )
    order = np.random.default_rng(0).permutation(len(x))
    label = np.zeros(len(x), np.int64) if label is None else label
    chosen = order[held_out:], order[:held_out]
    train, test = ((torch.from_numpy(x[rows]), torch.from_numpy(label[rows])) for rows in chosen)
    return train, test, facts


def read_numpy(path: Path, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(x, memory-mapped if it is alone in its file; labels or None). Raises SettingError."""
    try:
        found = np.load(path, mmap_mode='r', allow_pickle=False)
        if isinstance(found, np.ndarray):
            arrays, x, label = {}, found, None
        else:
            arrays = {name: found[name] for name in found.files}
            x = next((arrays[name] for name in NAMES_OF_X if name in arrays), None)
            label = next((arrays[name] for name in NAMES_OF_LABEL if name in arrays), None)
    except (ValueError, OSError, EOFError) as error:
        raise SettingError(f'{where} cannot be read ({error}). Write plain numbers by np.save or np.savez.') from None
    if x is None:
        raise SettingError(f'{where} holds {", ".join(arrays)}. Name the data one of {", ".join(NAMES_OF_X)}.')
    if x.ndim < 2 or (x.dtype != np.uint8 and x.dtype.kind != 'f'):
        raise SettingError(
            f'{where}: the data are {x.dtype} {x.shape}. They must be uint8 images or floats, with the items along the '
            'first of two or more axes.'
        )
    return x, label


def channels_first(x: np.ndarray, where: str) -> np.ndarray:
    """uint8 images as (N, C, H, W). Raises SettingError."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] <= 4 < x.shape[1]:
        return np.moveaxis(x, -1, 1)
    if x.ndim != 4:
        raise SettingError(
            f'{where}: uint8 data of shape {x.shape} are no images, which are (N, H, W), (N, C, H, W) or (N, H, W, C). '
            'Convert other data to floats, in the range that the trainer is to see.'
        )
    return x


def load_packed(path: Path, held_out: int) -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of a file of prepare.py, memory-mapped. Raises SettingError."""
    found = packed.read(path)
    held_out = packed.held_out_rows(held_out or found['held_out'], len(found['x']), f'data_path={str(path)!r}')
    known = ('num_classes', 'classes', 'scale', 'max_value', 'digest', 'mean', 'std')
    facts = {name: found[name] for name in known if name in found}
    return *packed.parts_of(found, held_out), facts
