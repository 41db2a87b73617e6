"""Data sets from files of arrays: .npy, .npz, .zarr, .h5, .nc, and the .pt files of prepare.py."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from config import Config
from data_loading import packed, stores
from data_loading.checks import check_condition, check_values
from data_loading.labels import classes_of, held_out_rows, one_for_each, random_order
from data_loading.named import Named, parts_in
from data_loading.spec import DataSpec, Loaded, counted, type_and_shape
from runtime import files
from runtime.errors import DataError, SettingError
from runtime.ranks import print_once

LARGEST_SHUFFLED = 4e9  # bytes; a larger array is not shuffled in memory
AXES = {2: 'C x L', 3: 'C x H x W', 4: 'C x D x H x W'}
LAYOUTS = {  # array_layout -> x with the channels first
    'channels_first': lambda x: x,
    'channels_last': lambda x: np.moveaxis(x, -1, 1),
    'no_channels': lambda x: x[:, None],
}
LAYOUTS_BACK = {  # array_layout -> x with the axes of the file, from channels first
    'channels_last': lambda x: np.moveaxis(x, 1, -1),
    'no_channels': lambda x: x[:, 0],
}
IMAGE_RANGES = (0, 1), (-1, 1), (0, 255)  # common ranges of images stored as floats


class Column(NamedTuple):
    """An array (N, ...) of a file, with its name, and how its axes and values are read."""

    name: str
    array: Any  # numpy's, or a `Stored`
    layout: str = ''  # a key of LAYOUTS, or '': as it is
    low: int | None = 0  # as in `stored`

    def raw(self, rows: slice) -> np.ndarray:
        """Rows with the values of the file, and the channels first."""
        x = np.asarray(self.array[rows])
        return LAYOUTS[self.layout](x) if self.layout else x

    def rows(self, rows: slice = slice(None)) -> np.ndarray:
        return stored(self.raw(rows), self.low)


def columns_of(part: Named, layout: str = '', low: int | None = 0) -> list[Column]:
    """x, x1 and conditions. A condition with the same number of axes as images x, or of the shape of signals x without
    an axis of channels, is read in their layout."""
    columns = [Column(name, x, layout, low) for name, x in part.like_x()]
    for name, x in part.cond.items():
        same_axes = x.ndim == part.x.ndim > 2 or (layout == 'no_channels' and x.shape == part.x.shape)
        columns.append(Column(name, x, layout if same_axes else '', 0 if x.dtype == np.uint8 else None))
    return columns


def load_arrays(config: Config) -> Loaded:
    """(training part, held-out part, facts) from the file `data_path`. Raises SettingError.

    .npy                 one array, without labels
    .npz .zarr .h5 .nc   x under one of NAMES_OF_X, labels under one of NAMES_OF_LABEL, x1, and conditions cond_NAME.
                         Names such as x_train and test_labels, or train/x, make two parts
    .pt                  a file of prepare.py

    docs/data.md says how axes and values are read. If the file has one part, a tenth, at most 1000, is held
    out, the same in every run; a prepared file stores its own split.
    """
    path = Path(config.data_path).expanduser()
    where = f"dataset='arrays', data_path={config.data_path!r}"
    check_path(path, config, where)
    if path.suffix == '.pt':
        return packed.parts_of(packed.read(path))
    try:
        return read_parts(config, *parts_in(stores.arrays_in(path, where), where), where)
    except DataError as error:
        raise SettingError(f'{where}: {error}') from None
    finally:
        stores.close()


def read_parts(config: Config, parts: list[Named], names: list[str], skipped: str, where: str) -> Loaded:
    """(training part, held-out part, facts) from the result of `parts_in`. Raises SettingError or DataError."""
    size = sum(column.array.nbytes for part in parts for column in columns_of(part))
    held_out = held_out_rows(config.held_out, len(parts[0].x), where) if len(parts) == 1 else 0
    layout = layout_of(parts[0].x, config, where)
    by_rows = size > LARGEST_SHUFFLED and (held_out or isinstance(parts[0].x, stores.Stored))
    parts = parts if by_rows else [part.in_memory() for part in parts]
    low, facts = values_of(parts, config, where)
    labels = [one_for_each(part.label, len(part.x), where) for part in parts if part.label is not None]
    labels, classes = classes_of(labels, names) if labels else ([np.zeros(len(part.x), int) for part in parts], {})
    if classes.get('classes') == tuple(map(str, range(classes.get('num_classes', 0)))):
        del classes['classes']
    columns = [columns_of(part, layout, low) for part in parts]
    shape = columns[0][0].raw(slice(0)).shape[1:]
    facts |= dict(classes, skipped=skipped, shape=shape, layout=layout, reading=axes_text(shape, layout))
    facts['conditions'] = tuple(parts[0].cond)
    if facts.get('scale') == 'float' and len(shape) == 3 and shape[0] in (1, 3, 4):
        x = parts[0].x
        flag, fits = image_flag(x[:: max(1, len(x) // 1000)])
        if fits:
            print_once(f'arrays: to treat these floats as images, pass {flag}. Without it they are used as they are')
    split = np.split(random_order(labels[0]), [held_out])[::-1] if held_out else []
    if by_rows:
        print_once(about_rows(config, columns[0], size))
        orders = split or [np.arange(len(part.x)) for part in parts]
        both = zip(columns * 2, labels * 2, orders, strict=False)  # two parts, or one twice
        train, test = itertools.starmap(ShuffledRows, both)
        return train, test, facts
    spec = DataSpec(load_arrays, **facts)
    values = [tensors_of(*both, spec) for both in zip(columns, labels, strict=True)]
    train, test = ([array[rows] for array in values[0]] for rows in split) if split else values
    return tuple(train), tuple(test), facts


def tensors_of(columns: list[Column], label: np.ndarray, spec: DataSpec) -> list[Any]:
    """[x, label, x1, conditions] of a part, checked in the order of the file, so that errors name rows of the file.
    Raises DataError."""
    found = []
    for i, column in enumerate(columns):
        array = column.rows()
        x = torch.from_numpy(array if array.flags.writeable else array.copy())  # else torch warns
        is_condition = i >= len(columns) - len(spec.conditions)
        found.append(
            check_condition(x, tuple(x.shape[1:]), f'condition {column.name!r}', ())
            if is_condition
            else check_values(x, spec, column.name)
        )
    return [found[0], label, *found[1:]]


def stored(x: np.ndarray, low: int | None) -> np.ndarray:
    """Whole numbers as uint8, shifted so that `low` becomes 0, or as floats if `low` is None; floats as they are."""
    if x.dtype.kind == 'f' or (x.dtype == np.uint8 and low == 0):
        return x
    return x.astype(np.float32) if low is None else (x.astype(np.int64) - low).astype(np.uint8)


class ShuffledRows(Dataset):
    """Rows of columns, x first, of a file that is too large to shuffle in memory, in the order given."""

    def __init__(self, columns: list[Column], labels: np.ndarray, order: np.ndarray):
        self.columns = columns
        self.labels, self.file_rows = labels[order].tolist(), order

    def __len__(self) -> int:
        return len(self.file_rows)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        row = int(self.file_rows[i])
        x, *more = (torch.from_numpy(np.array(c.rows(slice(row, row + 1))[0])) for c in self.columns)
        return x, self.labels[i], *more

    def fingerprint(self) -> str:
        """A hash of the first, the last and a thousand rows between them."""
        n = len(self.columns[0].array)
        rows = np.linspace(0, n - 1, min(1000, n)).astype(int).tolist()
        found = [np.concatenate([c.raw(slice(i, i + 1)) for i in rows]) for c in self.columns]
        return files.digest(*map(torch.from_numpy, found), size=64)


def about_rows(config: Config, columns: list[Column], size: int) -> str:
    """A line on reading rows in random order, with what is faster."""
    text = f'{Path(config.data_path).name}: {size / 1e9:.3g} GB are read row by row, in random order.'
    chunks = max(getattr(column.array, 'chunk', 1) for column in columns)
    if chunks > 1:
        text += f' A chunk of it holds {chunks} rows, and is read whole for each row: small chunks are faster.'
    prepared = f'sh run.sh prepare.py --dataset arrays --data_path {config.data_path} --out FILE.pt'
    return text + f' A prepared file is faster: {prepared}' * (len(columns) == 1)


def check_path(path: Path, config: Config, where: str) -> None:
    """Raise SettingError if `path` is not a file of arrays, or if it stores the layout and range that are set."""
    why = ''
    if not config.data_path:
        why = 'no file is given'
    elif path.is_dir() and path.suffix != '.zarr':
        why = 'this is a folder; --preset small_images reads a folder of images'
    elif not path.exists():
        why = 'there is no such file'
    elif path.suffix not in stores.ENDINGS:
        why = f'its ending is not {", ".join(stores.ENDINGS[:-1])} or {stores.ENDINGS[-1]}'
    if why:
        raise SettingError(f'{where}: {why}. Pass X.npy, an .npz with images and labels, or a file of prepare.py.')
    if path.suffix == '.pt' and (config.array_layout or config.value_range):
        raise SettingError(f'{where}: a .pt file stores both. Leave out --array_layout and --value_range.')


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
    named = [array for part in parts for array in part.like_x()]
    xs, given = [x for _, x in named], config.value_range
    dtype = xs[0].dtype
    if dtype.kind == 'f' and not given:
        return None, dict(scale='float')
    if dtype == np.uint8 and not given and any(x[:100].max() > 16 or x.max() > 16 for x in xs):
        return 0, {}
    low, high = given or (0, max(int(x.max()) for x in xs) or int(dtype.kind == 'b'))
    facts: dict[str, Any] = dict(values=f'values {low:.12g} to {high:.12g}')
    if dtype.kind == 'f':
        return None, facts | dict(value_range=given)
    for name, x in named:
        least, largest = int(x.min()), int(x.max())
        span = f'{where}: {name} goes from {least} to {largest}'
        if given and (least < low or largest > high):
            row = next(i for i in range(len(x)) if x[i : i + 1].min() < low or x[i : i + 1].max() > high)
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
