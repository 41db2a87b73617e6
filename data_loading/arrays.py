"""Data sets from files of arrays: .npy, .npz, and the .pt files of prepare.py."""

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
from data_loading.labels import HELD_OUT, NAMES_OF_LABEL, TRAIN, classes_of, held_out_rows, one_for_each, random_order
from data_loading.spec import DataSpec, Loaded, counted, type_and_shape
from runtime import files
from runtime.errors import DataError, SettingError
from runtime.ranks import print_once

NAMES_OF_X = ('images', 'x', 'data', 'samples', 'arr_0')
NAMES_OF_CLASSES = ('class_names', 'label_names', 'names', 'classes')
LARGEST_SHUFFLED = 4e9  # bytes; a larger array is not shuffled in memory
AXES = {2: 'C x L', 3: 'C x H x W', 4: 'C x D x H x W'}
LAYOUTS = {  # array_layout -> x with the channels first
    'channels_first': lambda x: x,
    'channels_last': lambda x: np.moveaxis(x, -1, 1),
    'no_channels': lambda x: x[:, None],
}
IMAGE_RANGES = (0, 1), (-1, 1), (0, 255)  # common ranges of images stored as floats


class Named(NamedTuple):
    """One part of the data in a file, with the name of its x."""

    name: str
    x: np.ndarray
    label: np.ndarray | None


def load_arrays(config: Config) -> Loaded:
    """(training part, held-out part, facts) from the file `data_path`. Raises SettingError.

    .npy     one array, without labels
    .npz     x under one of NAMES_OF_X, labels under one of NAMES_OF_LABEL. Names such as x_train and test_labels make
             two parts
    .pt      a file of prepare.py

    docs/data.md says how axes and values are read. If the file has one part, a tenth, at most 1000, is held
    out, the same in every run; a prepared file stores its own split.
    """
    path = Path(config.data_path).expanduser()
    where = f"dataset='arrays', data_path={config.data_path!r}"
    check_path(path, config, where)
    if path.suffix == '.pt':
        return packed.parts_of(packed.read(path))
    parts, names, skipped = parts_in(read_numpy(path, where), where)
    held_out = held_out_rows(config.held_out, len(parts[0].x), where) if len(parts) == 1 else 0
    layout = layout_of(parts[0].x, config, where)
    low, facts = values_of(parts, config, where)
    parts = [part._replace(x=LAYOUTS[layout](part.x) if layout else part.x) for part in parts]
    labels = [one_for_each(part.label, len(part.x), where) for part in parts if part.label is not None]
    labels, classes = classes_of(labels, names) if labels else ([np.zeros(len(part.x), int) for part in parts], {})
    if classes.get('classes') == tuple(map(str, range(classes.get('num_classes', 0)))):
        del classes['classes']
    x = parts[0].x
    facts |= dict(classes, skipped=skipped, shape=x.shape[1:], reading=axes_text(x.shape[1:], layout))
    if facts.get('scale') == 'float' and x.ndim == 4 and x.shape[1] in (1, 3, 4):
        flag, fits = image_flag(x[:: max(1, len(x) // 1000)])
        if fits:
            print_once(f'arrays: to treat these floats as images, pass {flag}. Without it they are used as they are')
    split = np.split(random_order(labels[0]), [held_out]) if held_out else []
    if held_out and x.nbytes > LARGEST_SHUFFLED:
        print_once(
            f'{path.name}: {x.nbytes / 1e9:.3g} GB are read row by row, in random order. A prepared file is faster: '
            f'sh run.sh prepare.py --dataset arrays --data_path {config.data_path} --out FILE.pt'
        )
        test, train = (ShuffledRows(x, labels[0], rows, low) for rows in split)
        return train, test, facts
    spec = DataSpec(load_arrays, **facts)
    values = [checked(stored(part.x, low), spec, f'{where}: {part.name}') for part in parts]
    if split:
        test, train = ((values[0][rows], labels[0][rows]) for rows in split)
    else:
        train, test = zip(values, labels, strict=True)
    return train, test, facts


def checked(x: np.ndarray, spec: DataSpec, where: str) -> Tensor:
    """`check_values` of arrays in the order of the file, so that errors name rows of the file. Raises SettingError."""
    try:
        return check_values(torch.from_numpy(x if x.flags.writeable else x.copy()), spec, where)  # else a warning
    except DataError as error:
        raise SettingError(str(error)) from None


def stored(x: np.ndarray, low: int | None) -> np.ndarray:
    """Whole numbers as uint8, shifted so that `low` becomes 0, or as floats if `low` is None; floats as they are."""
    if x.dtype.kind == 'f' or (x.dtype == np.uint8 and low == 0):
        return x
    return x.astype(np.float32) if low is None else (x.astype(np.int64) - low).astype(np.uint8)


class ShuffledRows(Dataset):
    """Rows of a file that is too large to shuffle in memory, in the order given; `low` as in `stored`."""

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


# ---------------------------------------------------------------- what is in the file


def check_path(path: Path, config: Config, where: str) -> None:
    """Raise SettingError if `path` is not a file of arrays, or if it stores the layout and range that are set."""
    why = ''
    if not config.data_path:
        why = 'no file is given'
    elif path.is_dir():
        why = 'this is a folder; --preset small_images reads a folder of images'
    elif not path.is_file():
        why = 'there is no such file'
    elif path.suffix not in ('.npy', '.npz', '.pt'):
        why = 'its ending is not .npy, .npz or .pt'
    if why:
        raise SettingError(f'{where}: {why}. Pass X.npy, an .npz with images and labels, or a file of prepare.py.')
    if path.suffix == '.pt' and (config.array_layout or config.value_range):
        raise SettingError(f'{where}: a .pt file stores both. Leave out --array_layout and --value_range.')


def read_numpy(path: Path, where: str) -> dict[str, np.ndarray]:
    """The arrays in a file, by name; memory-mapped if there is only one. Raises SettingError."""
    try:
        with path.open('rb') as file:
            begins = file.read(6)
        if not begins.startswith((b'\x93NUMPY', b'PK')):
            raise ValueError(f'it is not a numpy file: it begins with {begins}')
        found = np.load(path, mmap_mode='c', allow_pickle=False)  # 'r' maps the file shared, which some disks refuse
        arrays = {'x': found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        return {name: x if x.dtype.isnative else x.astype(x.dtype.newbyteorder('=')) for name, x in arrays.items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        remedy = 'Copy it again.' if 'file size' in str(error) else 'Write plain numbers by np.save or np.savez.'
        remedy += ' np.stack(images) and labels.astype(str) convert Python objects.' * ('bject' in str(error))
        raise SettingError(f'{where} cannot be read ({error}). {remedy}') from None


def parts_in(arrays: dict[str, np.ndarray], where: str) -> tuple[list[Named], list[str], str]:
    """([all data], or [the training part, the held-out part]; class names, if the file has them; a text that lists
    unused arrays). Raises SettingError."""
    there: dict[tuple[str, str], str] = {}  # (split, name without it), in lower case -> name in the file
    for name in arrays:
        words = name.lower().split('_')
        at = next((i for i in (0, -1) if words[i] in TRAIN + HELD_OUT), None)
        split = '' if at is None else words.pop(at)
        there.setdefault((split, '_'.join(words)), name)

    def named(splits: tuple[str, ...], names: tuple[str, ...]) -> list[tuple[str, str]]:
        return [(split, name) for split in splits for name in names if (split, name) in there]

    found = [*named(('', *TRAIN), NAMES_OF_X)[:1], *named(HELD_OUT, NAMES_OF_X)[:1]]
    if not found or found[0][0] in HELD_OUT:
        wanted = f'Name the data one of {", ".join(NAMES_OF_X)}, or x_train and x_test'
        raise SettingError(f'{where} holds {", ".join(arrays)}. {wanted}.')
    n = len(arrays[there[found[0]]])
    texts = [there[key] for key in named(('',), NAMES_OF_CLASSES) if arrays[there[key]].dtype.kind in 'US']
    texts = [name for name in texts if arrays[name].shape != (n,)][:1]
    parts, used = [], set(texts)
    for split, name in found:
        x = there[split, name]
        label = next((there[key] for key in named((split,), NAMES_OF_LABEL) if there[key] not in texts), None)
        parts.append(Named(x, arrays[x], arrays[label] if label else None))
        used |= {x, label}
    for name, x, label in parts:
        if x.ndim < 2 or x.dtype.kind not in 'biuf' or x.dtype != parts[0].x.dtype or 0 in x.shape[1:]:
            raise SettingError(
                f'{where}: {name}: the data are {type_and_shape(x)}. They must be whole numbers or floats, with two or '
                'more axes, the first over items; the training and the held-out part must have the same type.'
            )
        if (label is None) != (parts[0].label is None) or (len(parts) == 2 and len(x) == 0):
            raise SettingError(f'{where}: {name}: both parts need items, and labels if one of them has labels.')
    unused = {name: array for name, array in arrays.items() if name not in used}
    maybe = [name for name, array in unused.items() if array.shape[:1] == (n,) and array.dtype.kind in 'biuUS']
    text = (
        f'not used: {", ".join(f"{name} {type_and_shape(array)}" for name, array in unused.items())}' if unused else ''
    )
    if maybe and parts[0].label is None:
        text += f'. If {maybe[0]} holds the classes, rename it to labels'
    if text:
        print_once(f'arrays: {text}')
    return parts, [str(name) for key in texts for name in arrays[key]], text


# ---------------------------------------------------------------- how axes and values are read


def layout_of(x: np.ndarray, config: Config, where: str) -> str:
    """Where the channels of items (N, ...) are: a key of LAYOUTS. '' for points, and for the MLP wherever the rule
    leaves it open. Raises SettingError."""
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
            f'{where}: {x.dtype} data of shape {x.shape} are not images. Reshape flattened images, '
            'x.reshape(-1, H, W); convert points to floats.'
        )
    layouts = ', '.join(f'{name} ({axes_text(move(x[:0]).shape[1:], name)})' for name, move in LAYOUTS.items())
    image, single = '', ' Is it a single image? np.stack joins several into one array.' * (axes == 2 and last <= 4)
    if is_float and axes == 3 and last <= 4 < first and not config.value_range:
        image = f'{image_flag(x)[0]} if they are images, else '
    raise SettingError(
        f"array_layout='', {where}: {type_and_shape(x)} can be read in several ways. Pass {image}--array_layout "
        f'{layouts}; --network mlp needs no layout.{single}'
    )


def axes_text(shape: tuple[int, ...], layout: str) -> str:
    """The axes of items of `shape`, channels first, as text: 'C x H x W: 3 channels of 32x32'."""
    if not layout or len(shape) == 1:
        return 'as they are' if len(shape) > 1 else ''
    return f'{AXES.get(len(shape), "C x ...")}: {counted(shape[0], "channel")} of {"x".join(map(str, shape[1:]))}'


def values_of(parts: list[Named], config: Config, where: str) -> tuple[int | None, dict[str, Any]]:
    """(`low` for `stored`; facts: the values of black and white, for whole numbers, and for floats with a value_range).
    Raises SettingError."""
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
            full = ', or --value_range 0 255, as in uint8 images' if dtype == np.uint8 else ', or another LOW HIGH'
            flag = f'--value_range {min(least, 0)} {max(largest, 1)}'
            raise SettingError(f'{span}. Which values are black and white? Pass {flag}{full}.')
    if high - low <= 255 and float(low).is_integer() and float(high).is_integer():
        return int(low), facts | dict(max_value=int(high - low))
    return None, facts | dict(value_range=(float(low), float(high)))


def image_flag(x: np.ndarray) -> tuple[str, bool]:
    """(the flag that treats these floats as images, whether its range is one of IMAGE_RANGES and not just theirs)."""
    least, largest = float(np.float32(x.min())), float(np.float32(x.max()))
    fitting = (wide for wide in IMAGE_RANGES if wide[0] <= least and wide[1] / 2 < largest <= wide[1])
    found = next(fitting, (least, largest))
    text = f'--value_range {found[0]:.9g} {found[1]:.9g} (the values go from {least:.4g} to {largest:.4g})'
    return text, found in IMAGE_RANGES
