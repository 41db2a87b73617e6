"""A data set of Hugging Face `datasets` with a column of images."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from config import Config
from data_loading import packed
from data_loading.images import how_made, pixels_of, readable
from runtime.errors import SettingError

HELD_OUT_SPLITS = ('validation', 'valid', 'val', 'test', 'eval')


@dataclass(frozen=True, eq=False)
class HubImages(Dataset):
    """The rows of one split: (uint8 (channels, H, W), class). Raises DataError for a broken image."""

    rows: Any  # datasets.Dataset, whose images are not decoded
    image: str  # columns
    label: str | None
    made: dict[str, Any]  # arguments of pixels_of

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        row = self.rows[i]
        with readable(f'row {i}, column {self.image!r}'):
            return pixels_of(file_of(row[self.image]), **self.made), 0 if self.label is None else int(row[self.label])


def file_of(image: dict[str, Any] | None) -> Path | BytesIO:
    """The bytes of an image that was not decoded, or its file; no bytes if the image is missing."""
    if image is None:
        return BytesIO()
    return BytesIO(image['bytes']) if image.get('bytes') else Path(image['path'])


def load_hub(config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of a data set of Hugging Face `datasets`. Without a held-out split the
    items are shuffled, and a tenth is held out by default. Raises SettingError."""
    where = f"dataset='hub', data_path={config.data_path!r}"
    try:
        import datasets
    except ImportError:
        raise SettingError(f'{where}: this needs the package datasets: pip install datasets.') from None
    if not config.data_path:
        raise SettingError("dataset='hub' needs the name of a data set, or a folder: --data_path NAME_OR_FOLDER.")
    try:
        found = datasets.load_dataset(config.data_path, cache_dir=str(Path(config.data_dir, 'hub')))
    except Exception as error:  # many kinds: no network, no such data set, no data in a folder
        text = ' '.join(str(error).split())[:300]
        raise SettingError(
            f'{where} cannot be loaded ({type(error).__name__}: {text}). Check the name, and that there is a network; '
            'or pass a folder of parquet files.'
        ) from None
    train = found['train'] if 'train' in found else next(iter(found.values()))
    own = next((found[name] for name in HELD_OUT_SPLITS if name in found and found[name] is not train), None)
    image, label, classes = columns_of(train, config.columns, where)
    splits = [train.shuffle(seed=0)] if own is None else [own, train]
    splits = [split.cast_column(image, datasets.Image(decode=False)) for split in splits]
    made = how_made(config, (file_of(row[image]) for split in splits for row in cast(Any, split)))
    items = ConcatDataset([HubImages(split, image, label, made) for split in splits])
    facts, held_out = dict(classes=classes, num_classes=len(classes)), 0 if own is None else len(own)
    state = repr(([split._fingerprint for split in splits], dict(image=image, label=label, **made)))
    return packed.decoded_once(config, items, held_out, facts, state, f'hub {Path(config.data_path).name}')


def columns_of(rows: Any, named: tuple[str, ...], where: str) -> tuple[str, str | None, tuple[str, ...]]:
    """(image column, class column or None, class names): the columns `named`, else the only ones of their kind.
    Raises SettingError."""
    import datasets

    kinds = rows.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    choice = f'Name them by --columns IMAGE [CLASS]; there are {", ".join(kinds)}.'
    image = named[0] if named else images[0] if len(images) == 1 else None
    if image is None or image not in images:
        found = f'column {image!r} does not hold images' if image else 'cannot tell which column holds the images'
        raise SettingError(f'{where}: {found}; image columns: {images}. {choice}')
    if len(named) < 2 and len(labels) > 1:
        raise SettingError(f'{where}: cannot tell which of {labels} holds the classes. {choice}')
    if len(named) < 2 and not labels:
        return image, None, ()
    label = named[1] if len(named) == 2 else labels[0]
    if label in labels:
        return image, label, tuple(kinds[label].names)
    values = list(rows[label]) if label in kinds else []
    if not values or not all(isinstance(value, int) and value >= 0 for value in values):
        raise SettingError(f'{where}: {label!r} does not hold classes, whole numbers from 0. {choice}')
    return image, label, tuple(map(str, range(max(values) + 1)))
