"""Loads images from a data set of Hugging Face `datasets`, or from parquet files."""

from dataclasses import dataclass
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from config import Config
from data_loading import packed
from data_loading.images import how_made, pixels_of, readable
from data_loading.labels import HELD_OUT, NAMES_OF_LABEL, TRAIN, classes_of, held_out_rows, one_for_each, random_order
from data_loading.spec import Loaded
from runtime.errors import SettingError
from runtime.ranks import print_once


@dataclass(frozen=True, eq=False)
class HubImages(Dataset):
    """The rows of one split in `order`: (uint8 (channels, H, W), class). Raises DataError for a broken image."""

    rows: Any  # datasets.Dataset, whose images are not decoded
    place: str  # name of the split in errors: '', or ' of split ...'
    image: str  # name of the image column
    classes: np.ndarray  # (N,), class of each row
    order: np.ndarray  # (N,), rows in the order of the items
    made: dict[str, Any]  # arguments of pixels_of

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        row = int(self.order[i])
        with readable(f'row {row}{self.place}, column {self.image!r}'):
            return pixels_of(image_file(self.rows[row][self.image]), **self.made), int(self.classes[row])


def image_file(image: dict[str, Any] | None) -> Path | BytesIO:
    """The encoded bytes of an image, or its file; no bytes if the image is missing."""
    if image is None:
        return BytesIO()
    return BytesIO(image['bytes']) if image.get('bytes') else Path(image['path'])


def load_hub(config: Config) -> Loaded:
    """(training part, held-out part, facts) from a data set of Hugging Face `datasets`, or from parquet files. Without
    a held-out split, a tenth, at most 1000, is held out. Raises SettingError."""
    where = f"dataset='hub', data_path={config.data_path!r}"
    try:
        import datasets
    except ImportError:
        raise SettingError(f'{where}: this needs the datasets package: pip install datasets.') from None
    found = splits_of(config, where)
    train = next(name for name in (*TRAIN, *found) if name in found)
    names = [*[name for name in HELD_OUT if name in found and name != train][:1], train]
    image, label = columns_of(found[train], config.columns, where)
    splits = [found[name].cast_column(image, datasets.Image(decode=False)) for name in names]
    made = how_made(config, (image_file(row[image]) for split in splits for row in cast(Any, split)))
    classes, facts = class_labels(splits, label, where)
    if len(splits) == 1:
        held_out = held_out_rows(config.held_out, len(splits[0]), where)
        places, orders = [''], [random_order(classes[0])]
    else:
        held_out = len(splits[0])
        places, orders = [f' of split {name!r}' for name in names], [np.arange(len(split)) for split in splits]
    items = ConcatDataset(list(map(HubImages, splits, places, repeat(image), classes, orders, repeat(made))))
    state = repr(([split._fingerprint for split in splits], 2, dict(image=image, label=label, **made)))
    return packed.decoded_once(config, items, held_out, facts, state, f'hub {Path(config.data_path).name}')


def splits_of(config: Config, where: str) -> Any:
    """The rows of each split, by its name in `datasets`. Raises SettingError."""
    import datasets

    if not config.data_path:
        raise SettingError("dataset='hub' needs the name of a data set, or a folder: --data_path NAME_OR_FOLDER.")
    path, cache = Path(config.data_path).expanduser(), str(Path(config.data_dir, 'hub'))
    if path.is_file() and path.suffix != '.parquet':
        raise SettingError(f'{where}: this file is not .parquet. Pass a parquet file, a folder of them, or a name.')
    try:
        if path.is_file():
            return datasets.load_dataset('parquet', data_files=str(path), cache_dir=cache)
        return datasets.load_dataset(config.data_path, cache_dir=cache)
    except Exception as error:  # many kinds: no network, no such data set, no data in a folder
        text = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
        remedy = 'Check the name and the network connection, or pass a folder of parquet files.'
        raise SettingError(f'{where} cannot be loaded ({text}). {remedy}') from None


def columns_of(rows: Any, named: tuple[str, ...], where: str) -> tuple[str, str | None]:
    """(image column, class column or None): those `named`, else the only column of each kind. Raises SettingError."""
    import datasets

    kinds = {name: str(getattr(kind, 'dtype', type(kind).__name__)) for name, kind in rows.features.items()}
    choice = f'Pass --columns IMAGE [CLASS]; columns: {", ".join(kinds)}.'

    def of_kind(kind: type) -> list[str]:
        return [name for name, feature in rows.features.items() if isinstance(feature, kind)]

    images = of_kind(datasets.Image) or [name for name, dtype in kinds.items() if dtype in ('binary', 'large_binary')]
    if not images:
        columns = ', '.join(f'{name} ({dtype})' for name, dtype in kinds.items())
        remedy = (
            'Store the bytes inside the dict as a separate column.'
            if 'dict' in kinds.values()
            else 'Use another data set.'
        )
        raise SettingError(f'{where}: no column holds images, as files or as bytes; columns: {columns}. {remedy}')
    if not named and len(images) > 1:
        raise SettingError(f'{where}: cannot tell which column holds the images; image columns: {images}. {choice}')
    image = named[0] if named else images[0]
    if image not in images:
        raise SettingError(f'{where}: column {image!r} does not hold images; image columns: {images}. {choice}')
    if len(named) == 2:
        if named[1] not in kinds:
            raise SettingError(f'{where}: {named[1]!r} does not hold classes. {choice}')
        return image, named[1]
    labels = of_kind(datasets.ClassLabel)
    if len(labels) > 1:
        raise SettingError(f'{where}: cannot tell which of {labels} holds the classes. {choice}')
    may_be = [name for name, dtype in kinds.items() if dtype.startswith(('int', 'uint', 'string', 'bool'))]
    labels = labels or [name for name in may_be if name.lower() in NAMES_OF_LABEL]
    if len(labels) != 1 and may_be:
        why = f'cannot tell which of {labels} holds them' if labels else 'no column is a ClassLabel or called label'
        print_once(f'hub: no classes: {why}. If {" or ".join(may_be)} holds them, pass --columns {image} CLASS')
    return image, labels[0] if len(labels) == 1 else None


def class_labels(splits: list[Any], label: str | None, where: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """(the classes (N,) of each split, facts about them), from the column `label`. Raises SettingError."""
    if label is None:
        return [np.zeros(len(split), np.int64) for split in splits], dict(num_classes=0)
    given = [np.array(split[label][:]) for split in splits]
    for values in given:
        if None in values.tolist():
            row = values.tolist().index(None)
            raise SettingError(f'{where}, column {label!r}: row {row} holds no class. Fill it, or leave it out.')
    names = getattr(splits[0].features[label], 'names', None)
    if names is not None:
        return given, dict(num_classes=len(names), classes=tuple(names))
    return classes_of([one_for_each(values, len(values), f'{where}, column {label!r}') for values in given])
