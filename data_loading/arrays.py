"""Arrays in files as a data set: .npy, .npz, and the .pt files of prepare.py."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import Config
from data_loading import packed
from data_loading.checks import check_values
from data_loading.labels import HELD_OUT_SPLITS, NAMES_OF_LABEL, classes_of, one_for_each
from data_loading.spec import DataSpec, describe
from runtime import files
from runtime.errors import DataError, SettingError
from runtime.ranks import print_once

NAMES_OF_X = ('images', 'x', 'data', 'samples', 'arr_0')
NAMES_OF_CLASSES = ('class_names', 'label_names', 'names', 'classes')
LARGEST_SHUFFLED = 4e9  # bytes of an array that is shuffled in memory
AXES = {2: 'C x L', 3: 'C x H x W', 4: 'C x D x H x W'}
LAYOUTS = {  # array_layout -> x with the channels first
    'channels_first': lambda x: x,
    'channels_last': lambda x: np.moveaxis(x, -1, 1),
    'no_channels': lambda x: x[:, None],
}
IMAGE_RANGES = (0, 1), (-1, 1), (0, 255)  # of floats that are images


class Named(NamedTuple):
    """A part of the data in a file, and what x is called there."""

    name: str
    x: np.ndarray
    label: np.ndarray | None


def load_arrays(config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of the file `data_path`. Raises SettingError.

    .npy     one array, without labels
    .npz     x under one of NAMES_OF_X, labels under one of NAMES_OF_LABEL. Names such as x_train and test_labels make
             two parts
    .pt      a file of prepare.py

    How axes and values are read is in docs/data.md. Where the file has one part, a tenth is held out, of each class its
    share, the same in every run; a prepared file stores its own split.
    """
    path = Path(config.data_path).expanduser()
    where = f"dataset='arrays', data_path={config.data_path!r}"
    check_path(path, config, where)
    if path.suffix == '.pt':
        return packed.parts_of(packed.read(path))
    parts, names, skipped = parts_in(read_numpy(path, where), where)
    held_out = packed.held_out_rows(config.held_out, len(parts[0].x), where) if len(parts) == 1 else 0
    layout = layout_of(parts[0].x, config, where)
    low, facts = values_of(parts, config, where)
    parts = [part._replace(x=LAYOUTS.get(layout, LAYOUTS['channels_first'])(part.x)) for part in parts]
    shape = parts[0].x.shape[1:]
    facts |= dict(skipped=skipped, shape=shape, reading=in_words(shape, layout))
    hint_at_images(parts[0].x, config)
    labels, classes = labels_of(parts, names, where)
    facts |= classes
    if held_out and parts[0].x.nbytes > LARGEST_SHUFFLED:
        print_once(
            f'{path.name}: {parts[0].x.nbytes / 1e9:.3g} GB are read row by row, in random order. Faster is one '
            f'prepared file: sh run.sh prepare.py --dataset arrays --data_path {config.data_path} --out FILE.pt'
        )
        test, train = (ShuffledRows(parts[0].x, labels[0], rows, low) for rows in split(labels[0], held_out))
        return train, test, facts
    spec = DataSpec(load_arrays, **facts)
    x = [checked(stored(part.x, low), spec, f'{where}: {part.name}') for part in parts]
    if not held_out:
        return (x[0], labels[0]), (x[1], labels[1]), facts
    test, train = ((x[0][rows], labels[0][rows]) for rows in split(labels[0], held_out))
    return train, test, facts


def split(label: np.ndarray, held_out: int) -> list[np.ndarray]:
    """[the rows that are held out, all others], at random, of each class its share, the same every time."""
    order = np.random.default_rng(0).permutation(len(label))
    order = order[packed.held_out_choice(label[order], len(label))]
    return [order[:held_out], order[held_out:]]


def labels_of(parts: list[Named], names: Any, where: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """(the classes (N,) of each part, facts about them). Raises SettingError."""
    given = [one_for_each(part.label, len(part.x), where) for part in parts if part.label is not None]
    if not given:
        return [np.zeros(len(part.x), np.int64) for part in parts], {}
    label, classes = classes_of(np.concatenate(given), names)
    numbers = tuple(map(str, range(len(classes))))
    facts = dict(num_classes=len(classes), classes=() if classes == numbers else classes)
    return np.split(label, [len(given[0])])[: len(parts)], facts


def checked(x: np.ndarray, spec: DataSpec, where: str) -> Tensor:
    """`check_values` of arrays in the order of the file, so that errors name its rows. Raises SettingError."""
    try:
        return check_values(torch.from_numpy(x if x.flags.writeable else x.copy()), spec, where)  # torch warns of a map
    except DataError as error:
        raise SettingError(str(error)) from None


def stored(x: np.ndarray, low: int | None) -> np.ndarray:
    """Whole numbers as uint8 from 0, which `low` becomes, or as floats if `low` is None; floats as they are."""
    if x.dtype.kind == 'f' or (x.dtype == np.uint8 and low == 0):
        return x
    return x.astype(np.float32) if low is None else (x.astype(np.int64) - low).astype(np.uint8)


def check_path(path: Path, config: Config, where: str) -> None:
    """Raises SettingError if `path` is not a file of arrays, or brings its own layout and range and some are given."""
    why = ''
    if not config.data_path:
        why = 'no file is given'
    elif path.is_dir():
        why = 'this is a folder; --preset small_images reads a folder of images'
    elif not path.is_file():
        why = 'there is no such file'
    elif path.suffix not in ('.npy', '.npz', '.pt'):
        why = 'its ending is none of .npy, .npz and .pt'
    if why:
        raise SettingError(f'{where}: {why}. Pass X.npy, an .npz with images and labels, or a file of prepare.py.')
    if path.suffix == '.pt' and (config.array_layout or config.value_range):
        raise SettingError(f'{where}: the file has its own. Leave out --array_layout and --value_range.')


def read_numpy(path: Path, where: str) -> dict[str, np.ndarray]:
    """The arrays in a file, by name; memory-mapped if there is only one. Raises SettingError."""
    try:
        with path.open('rb') as file:
            begins = file.read(6)
        if not begins.startswith((b'\x93NUMPY', b'PK')):
            raise ValueError(f'it is not a file of numpy, and begins with {begins}')
        found = np.load(path, mmap_mode='r', allow_pickle=False)
        return {'x': found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        remedy = 'Copy it again.' if 'file size' in str(error) else 'Write plain numbers by np.save or np.savez.'
        remedy += ' Of Python objects, np.stack(images) and labels.astype(str) make some.' * ('bject' in str(error))
        raise SettingError(f'{where} cannot be read ({error}). {remedy}') from None


def by_split(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """Split, such as 'train', 'test' or '' -> name without it, in lower case -> name in the file."""
    found: dict[str, dict[str, str]] = {'': {}}
    for name in arrays:
        words = name.lower().split('_')
        at = next((i for i in (0, -1) if words[i] in ('train', *HELD_OUT_SPLITS)), None)
        here = '' if at is None else words.pop(at)
        found.setdefault(here, {}).setdefault('_'.join(words), name)
    return found


def parts_in(arrays: dict[str, np.ndarray], where: str) -> tuple[list[Named], list[str], str]:
    """([all data], or [the training part, the held-out part]; class names, if the file has them; what is not used, as
    text). Raises SettingError."""
    there = by_split(arrays)

    def find(here: str, names: tuple[str, ...]) -> str:
        return next((there[here][name] for name in names if name in there.get(here, {})), '')

    splits = [next((here for here in ('', 'train') if find(here, NAMES_OF_X)), None)]
    splits += [here for here in HELD_OUT_SPLITS if find(here, NAMES_OF_X)][:1]
    if splits[0] is None:
        raise SettingError(
            f'{where} holds {", ".join(arrays)}. Name the data one of {", ".join(NAMES_OF_X)}, or x_train and x_test.'
        )
    n = len(arrays[find(splits[0], NAMES_OF_X)])
    texts = [name for name in NAMES_OF_CLASSES if name in there[''] and arrays[there[''][name]].dtype.kind in 'US']
    named = [there[''].pop(name) for name in texts if arrays[there[''][name]].shape != (n,)][:1]
    used = [(find(here, NAMES_OF_X), find(here, NAMES_OF_LABEL)) for here in splits if here is not None]
    parts = [Named(x, native(arrays[x]), native(arrays[label]) if label else None) for x, label in used]
    for name, x, label in parts:
        if x.ndim < 2 or x.dtype.kind not in 'biuf' or x.dtype != parts[0].x.dtype or 0 in x.shape[1:]:
            raise SettingError(
                f'{where}: {name}: the data are {describe(x)}. They must be whole numbers or floats, with the items '
                'along the first of two or more axes; a training and a held-out part of the same type.'
            )
        if (label is None) != (parts[0].label is None) or (len(parts) == 2 and len(x) == 0):
            raise SettingError(f'{where}: {name}: it has no labels, or no items, and another part has. Add them.')
    skipped = [name for name in arrays if name not in {*named, *(name for pair in used for name in pair)}]
    text = ', '.join(f'{name} {describe(arrays[name])}' for name in skipped)
    maybe = [name for name in skipped if arrays[name].shape[:1] == (n,) and arrays[name].dtype.kind in 'biuUS']
    hint = f'. If {maybe[0]} holds the classes, name it labels' if maybe and parts[0].label is None else ''
    text = f'not used: {text}{hint}' if skipped else ''
    if text:
        print_once(f'arrays: {text}')
    return parts, [str(name) for key in named for name in arrays[key]], text


def native(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder('='))


# ---------------------------------------------------------------- how axes and values are read


def layout_of(x: np.ndarray, config: Config, where: str) -> str:
    """Where the channels of items (N, ...) are: a key of LAYOUTS, or '' for points, and for the MLP for all that the
    rule does not decide. Raises SettingError."""
    if config.array_layout:
        return config.array_layout
    shape, is_float = x.shape[1:], x.dtype.kind == 'f'
    first, last, axes = shape[0], shape[-1], len(shape)
    if axes == 2 and not is_float and last > 4:
        return 'no_channels'
    if axes == 3 or (is_float and axes in (2, 4)):
        if first <= 4 < last:
            return 'channels_first'
        if last <= 4 < first and axes > 2 and (config.value_range or not is_float):
            return 'channels_last'
    if config.network == 'mlp' or (axes == 1 and is_float):
        return ''
    if axes == 1:
        raise SettingError(
            f'{where}: {x.dtype} data of shape {x.shape} are not images. Give flat images their sides, '
            'x.reshape(-1, H, W); convert points to floats.'
        )
    ways = ', '.join(f'{name} ({in_words(way(x[:0]).shape[1:], name)})' for name, way in LAYOUTS.items())
    float_images = is_float and axes == 3 and not config.value_range
    raise SettingError(
        f"array_layout='', {where}: {describe(x)} can be read in several ways. Pass --array_layout {ways}; --network "
        'mlp needs none.'
        + ' Images of floats, with channels first or last, only need --value_range BLACK WHITE.' * float_images
        + ' A single image? np.stack makes one array of several.' * (axes == 2 and last <= 4)
    )


def in_words(shape: tuple[int, ...], layout: str) -> str:
    """How items of `shape`, with the channels first, are read: 'C x H x W: 3 channels of 32x32'."""
    if not layout or len(shape) == 1:
        return 'as they are' if len(shape) > 1 else ''
    sides = 'x'.join(map(str, shape[1:]))
    return f'{AXES.get(len(shape), "C x ...")}: {shape[0]} channel{"s" * (shape[0] > 1)} of {sides}'


def values_of(parts: list[Named], config: Config, where: str) -> tuple[int | None, dict[str, Any]]:
    """(`low` for `stored`, facts: what is black and white in whole numbers, and in floats with a value_range). Raises
    SettingError."""
    xs, given = [part.x for part in parts], config.value_range
    dtype = xs[0].dtype
    if dtype.kind == 'f' and not given:
        return None, dict(scale='float')
    if dtype == np.uint8 and not given and any(x[:100].max() > 16 or x.max() > 16 for x in xs):
        return 0, {}
    low, high = given or (0, max(int(x.max()) for x in xs) or int(dtype.kind == 'b'))
    facts: dict[str, Any] = dict(values=f'values {low:.12g} to {high:.12g}')
    if dtype.kind == 'f':
        return None, facts | dict(value_range=given)
    for name, x, _ in parts:
        least, largest = int(x.min()), int(x.max())
        span = f'{where}: {name} goes from {least} to {largest}'
        if given and (least < low or largest > high):
            row = ((x < low) | (x > high)).reshape(len(x), -1).any(1).argmax()
            raise SettingError(f'value_range=({low:g}, {high:g}), {span}, and row {row} is outside. Widen the range.')
        if least < low or high == 0 or (dtype == np.uint8 and not given):
            raise SettingError(
                f'{span}. What is black, what is white? Pass --value_range {min(least, 0)} {max(largest, 1)}, or '
                'another LOW HIGH.' + ' (uint8 images go to 255.)' * (dtype == np.uint8)
            )
    if high - low <= 255 and float(low).is_integer() and float(high).is_integer():
        return int(low), facts | dict(max_value=int(high - low))
    return None, facts | dict(value_range=(float(low), float(high)))


def hint_at_images(x: np.ndarray, config: Config) -> None:
    """Print the flag for images, if x (N, C, H, W) are floats that look like some."""
    if x.dtype.kind != 'f' or config.value_range or x.ndim != 4 or x.shape[1] not in (1, 3, 4):
        return
    some = x[:: max(1, len(x) // 1000)]
    low, high = float(some.min()), float(some.max())
    found = next((wide for wide in IMAGE_RANGES if wide[0] <= low and wide[1] / 2 < high <= wide[1]), None)
    if found:
        print_once(
            f'arrays: floats from {low:.4g} to {high:.4g} in the shape of images are taken as they are. If they are '
            f'images, pass --value_range {found[0]} {found[1]}'
        )


class ShuffledRows(Dataset):
    """Rows of a file that is too large to be shuffled in memory, in this order; `low` as in `stored`."""

    def __init__(self, x: np.ndarray, labels: np.ndarray, order: np.ndarray, low: int | None = 0):
        self.x, self.labels, self.file_rows, self.low = x, labels[order].tolist(), order, low

    def __len__(self) -> int:
        return len(self.file_rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(stored(np.array(self.x[self.file_rows[i]]), self.low)), self.labels[i]

    def fingerprint(self) -> str:
        """A hash of the first, the last and a thousand rows between them."""
        rows = np.linspace(0, len(self.x) - 1, min(1000, len(self.x))).astype(int)
        return files.digest(torch.from_numpy(np.array(self.x[rows])), size=64)
