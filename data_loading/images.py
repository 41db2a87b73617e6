"""A folder of images of any kind and size as a data set: finds, decodes, crops and resizes them."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from config import Config
from data_loading import packed
from runtime.errors import DataError, SettingError
from runtime.ranks import print_once

IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm')


# ---------------------------------------------------------------- from a file to pixels


@contextlib.contextmanager
def readable(image: Path | str) -> Iterator[None]:
    """Raises a DataError that names the image, a file or a row, for whatever goes wrong inside."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # what PIL raises depends on the format
        if isinstance(image, Path):
            image = image.parent.resolve() / image.name  # the user's folder, also where --check has linked to it
        raise DataError(
            f'{image} cannot be read as an image ({type(error).__name__}: {error}). Replace it by a whole one, '
            'remove it from the data, or leave such images out with --skip_unreadable.'
        ) from None


def pixels_of(path: Path | BytesIO, size: tuple[int, int], channels: int, background: tuple[int, int, int]) -> Tensor:
    """An image file as uint8 (channels, H, W): turned as its EXIF data say, transparent parts laid on `background`, the
    middle cut out in the proportions of `size`, and resized with antialiasing. An animation gives its first frame."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(('I', 'F')):
            image = eight_bits(image)
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, (*background, 255)), image)
        image = image.convert('L' if channels == 1 else 'RGB')
        height, width = size
        scale = min(image.width / width, image.height / height)  # pixels of the file for each pixel of ours
        kept = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (image.width - kept[0]) // 2, (image.height - kept[1]) // 2
        middle = image.crop((left, top, left + kept[0], top + kept[1]))
        array = np.array(middle.resize((width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1).contiguous()


def eight_bits(image: Any) -> Any:
    """A 16-bit grey image with 8 bits per pixel. Raises ValueError if its values need more than 16 bits."""
    values = np.asarray(image)
    if values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f'grey levels from {values.min():g} to {values.max():g} ({values.dtype}) are not an 8-bit or 16-bit image: '
            'use --dataset arrays for such data'
        )
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def is_grey(path: Path | BytesIO) -> bool:
    """Whether the image of a file has no colours; also True if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.mode in ('1', 'L', 'LA', 'La') or image.mode.startswith(('I', 'F'))
    except Exception:  # what PIL raises depends on the format; `readable` names the image later
        return True


def how_made(config: Config, files: Iterable[Path | BytesIO]) -> dict[str, Any]:
    """The arguments of `pixels_of` for these images: one channel if all of them are grey. Raises SettingError."""
    try:
        background = ImageColor.getrgb(config.background)[:3]
    except ValueError:
        raise SettingError(
            f"background={config.background!r} is not a colour. Use a name, such as white or black, or '#rrggbb'."
        ) from None
    size = (config.image_size[0], config.image_size[-1])
    channels = 1 if all(map(is_grey, files)) else 3  # ends at the first in colour
    return dict(size=size, channels=channels, background=background)


# ---------------------------------------------------------------- a folder


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset):
    """The images of a folder: (uint8 (channels, H, W), class). Raises DataError for a broken file."""

    root: Path
    files: list[str]  # paths below root
    labels: list[int]
    made: dict[str, Any]  # arguments of pixels_of
    facts: dict[str, Any]  # classes, and which files were skipped

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path = self.root / self.files[i]
        with readable(path):
            return pixels_of(path, **self.made), self.labels[i]

    def fingerprint(self) -> str:
        """The names and sizes of all files and how they are decoded, independent of where the folder is."""
        return repr((sorted((name, self.stat(name).st_size) for name in self.files), tuple(self.made.values())))

    def state(self) -> str:
        """`fingerprint` with the times of change: the cache of these pixels is valid while this is the same."""
        return repr([self.fingerprint(), [self.stat(name).st_mtime_ns for name in self.files]])

    def stat(self, name: str) -> os.stat_result:
        try:
            return (self.root / name).stat()
        except OSError:  # a link to nowhere, which decoding will name
            return os.stat_result((0,) * 10)


def list_images(config: Config) -> ImageFiles:
    """All images below the folder `config.data_path`, or else data_dir/image_folder.

    The class of an image is the first folder on its path below that. Images that lie in the folder itself, or all in
    one folder, have no class. Hidden files (.name) and files without the ending of an image are skipped; the latter are
    printed. Raises SettingError.
    """
    root = Path(config.data_path or Path(config.data_dir, 'image_folder')).expanduser()
    where = f"dataset='image_folder', {'data_path' if config.data_path else 'data_dir'}={str(root)!r}"
    remedy = 'Pass a folder of images, or of one folder for each class, as --data_path.'
    if not root.is_dir():
        raise SettingError(f'{where}: there is no such folder. {remedy}')
    files, others = walk(root, where)
    counts = [f'{ending} {count}' for ending, count in others.most_common(8)]
    more = [f'and {len(others) - 8} more kinds'] if len(others) > 8 else []
    ignored = ', '.join(counts + more)
    if not files:
        only = ignored and f', only {ignored}'
        raise SettingError(f'{where}: it holds no image ({", ".join(IMAGE_ENDINGS)}){only}. {remedy}')
    folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else '' for name in files]
    classes = sorted(set(folders))
    if '' in classes and len(classes) > 1:
        raise SettingError(
            f'{where}: {folders.count("")} images lie in it next to folders ({", ".join(classes[1:4])}), so that their '
            'class is not known. Move them into a folder, or pass a folder that holds only images.'
        )
    classes = classes if len(classes) > 1 else []
    labels = [classes.index(folder) if classes else 0 for folder in folders]
    skipped = ignored and f'skipped {sum(others.values())} files that are not images: {ignored}'
    if skipped:
        print_once(f'image_folder: {skipped}')
    facts = dict(classes=tuple(classes), num_classes=len(classes), skipped=skipped)
    return ImageFiles(root, files, labels, how_made(config, (root / name for name in files)), facts)


def load_image_folder(config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of a folder of images, of which a tenth is held out by default."""
    images = list_images(config)
    title = f'image_folder {images.root.resolve().name}'
    return packed.decoded_once(config, images, 0, images.facts, images.state(), title)


def walk(root: Path, where: str) -> tuple[list[str], Counter[str]]:
    """(paths below root of all images; how many other files there are of each ending). Raises SettingError.

    The paths are in the order of their hashes. The first ones are held out: the same ones in every run, for every seed,
    and mostly also when images are added.
    """
    files: list[str] = []
    others: Counter[str] = Counter()
    above: set[tuple[int, int]] = set()  # folders that were entered: ends a circle of links

    def refuse(error: OSError) -> None:
        raise SettingError(f'{where}: {error}. Make it readable, or move it elsewhere.') from None

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            below.clear()
            continue
        above.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith('.'))
        for name in (name for name in names if not name.startswith('.')):
            if name.lower().endswith(IMAGE_ENDINGS):
                files.append(os.path.relpath(os.path.join(folder, name), root))
            else:
                others[Path(name).suffix or name] += 1
    return sorted(files, key=lambda name: blake2b(os.fsencode(name)).digest()), others
