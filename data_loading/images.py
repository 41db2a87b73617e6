"""A folder of images of any kind and size as a data set: decodes, crops and resizes what folders.py finds."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from os import stat_result
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from torch.utils.data import Dataset

from config import Config
from data_loading import packed
from data_loading.folders import find, printable
from runtime.errors import DataError, SettingError
from runtime.ranks import print_once
from utils import is_out_of_memory

ORIENTATION = 0x112  # EXIF's
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LETTERS = 'letter|symbol|text|digit|number|sign|alphabet|character|font|^[0-9a-z]$'  # classes that may show letters
LOOKED_AT = 1000  # images whose sizes are read at the start


# ---------------------------------------------------------------- from a file to pixels


@contextlib.contextmanager
def readable(image: Path | str) -> Iterator[None]:
    """Raises a DataError that names the image, a file or a row, for whatever goes wrong inside."""
    try:
        yield
    except Exception as error:  # what PIL raises depends on the format
        if is_out_of_memory(error):
            raise
        if isinstance(image, Path):
            image = image.parent.resolve() / image.name  # the user's folder, also where --check has linked to it
        text = f'{image} cannot be read as an image ({type(error).__name__}: {error}). Replace it by a whole one, '
        text += 'remove it from the data, or leave such images out with --skip_unreadable.'
        raise DataError(printable(text)) from None


def pixels_of(
    path: Path | BytesIO,
    size: tuple[int, int],
    channels: int,
    background: tuple[int, int, int],
    fit: str = 'crop',
    white: int = 0,
) -> Tensor:
    """An image file as uint8 (channels, H, W): turned as its EXIF data say, transparent parts laid on `background`, and
    brought to `size` as `fit` says. An animation gives its first frame. `white`: of 16-bit images, see `eight_bits`."""
    with Image.open(path) as image:
        image.load()  # a TIFF is turned by this
        if (turn := TURNS.get(image.getexif().get(ORIENTATION, 1))) is not None:
            image = image.transpose(turn)
        if image.mode.startswith(('I', 'F')):
            image = eight_bits(image, white)
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, (*background, 255)), image)
        array = np.array(fitted(image.convert('L' if channels == 1 else 'RGB'), size, fit, background))
    return torch.from_numpy(array.reshape(*size, -1)).permute(2, 0, 1).contiguous()


def fitted(image: Any, size: tuple[int, int], fit: str, background: tuple[int, int, int]) -> Any:
    """`image` in `size` (height, width), resized with antialiasing: its middle in these proportions ('crop'), all of it
    on `background` ('pad'), or all of it in other proportions ('stretch')."""
    height, width = size
    scales = image.width / width, image.height / height  # pixels of the file for each pixel of ours
    if fit == 'crop':
        kept = max(1, round(width * min(scales))), max(1, round(height * min(scales)))
        left, top = (image.width - kept[0]) // 2, (image.height - kept[1]) // 2
        image = image.crop((left, top, left + kept[0], top + kept[1]))
    if fit != 'pad':
        return image.resize((width, height), Image.Resampling.LANCZOS)
    inside = max(1, round(image.width / max(scales))), max(1, round(image.height / max(scales)))
    whole = Image.new('RGB', (width, height), background).convert(image.mode)
    image = image.resize(inside, Image.Resampling.LANCZOS)
    whole.paste(image, ((width - inside[0]) // 2, (height - inside[1]) // 2))
    return whole


def eight_bits(image: Any, white: int) -> Any:
    """A grey image of more than 8 bits with 8 bits per pixel: `white`, 255 or 65535, becomes 255; 0: the former if no
    value is above it. Raises ValueError if the values need more."""
    values = np.asarray(image)
    white = white or (255 if values.max() <= 255 else 65535)
    if values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f'grey levels from {values.min():g} to {values.max():g} ({values.dtype}) are not an 8-bit or 16-bit image: '
            'use --dataset arrays for such data'
        )
    if values.max() > white:
        raise ValueError(f'grey levels to {values.max()}, where others end at {white}: bring all to one range')
    return Image.fromarray(np.round(values / (white / 255)).astype(np.uint8))


@dataclass(frozen=True)
class Head:
    """An image file before it is decoded: its name, whether it has no colours, and its size as it is shown."""

    name: str
    is_grey: bool
    width: int
    height: int
    deep: int = 0  # largest value of a grey image of more than 8 bits


def head(file: Path | BytesIO, levels: bool = True) -> Head | None:
    """The size and colours of an image file; None if it cannot be read, which `readable` reports later."""
    try:
        with Image.open(file) as image:
            deep = image.mode.startswith(('I', 'F'))
            has_exif = image.format in ('JPEG', 'MPO', 'WEBP')  # a TIFF has its size turned; a PNG would be decoded
            turned = has_exif and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            is_grey = deep or image.mode in ('1', 'L', 'LA', 'La')
            highest = int(np.asarray(image).max()) if deep and levels else 0
            return Head(getattr(file, 'name', ''), is_grey, width, height, highest)
    except Exception:  # what PIL raises depends on the format
        return None


def how_made(config: Config, files: Iterable[Path | BytesIO]) -> dict[str, Any]:
    """The arguments of `pixels_of` for these images: one channel if all of them are grey. Warns of sizes that do not
    suit. Raises SettingError."""
    try:
        background = ImageColor.getrgb(config.background)[:3]
    except ValueError:
        raise SettingError(
            f"background={config.background!r} is not a colour. Use a name, such as white or black, or '#rrggbb'."
        ) from None
    size = (config.image_size[0], config.image_size[-1])
    heads, grey = [], True
    for file in files:  # ends after the first in colour
        if not grey and len(heads) == LOOKED_AT:
            break
        found = head(file, levels=len(heads) < 100)
        grey = grey and (found is None or found.is_grey)
        if found and len(heads) < LOOKED_AT:
            heads.append(found)
    warn_of_sizes(config, heads, size)
    deep = max((found.deep for found in heads), default=0)
    if 0 < deep < 16384:
        become = 'are taken as 8-bit ones' if deep <= 255 else 'become dark: scale them to 0 ... 65535'
        print_once(f'warning: {config.dataset}: images of 16 bits have values to {deep} only, and {become}.')
    white = 0 if not deep else 255 if deep <= 255 else 65535
    return dict(size=size, channels=1 if grey else 3, background=background, fit=config.fit, white=white)


def warn_of_sizes(config: Config, heads: list[Head], size: tuple[int, int]) -> None:
    """Print how much cropping cuts, and a warning of images that are far too small or long."""
    height, width = size
    scales = [(found.width / width, found.height / height) for found in heads]
    cut = np.array([1 - min(scale) / max(scale) for scale in scales] or [0])
    if config.fit == 'crop' and cut.max() >= 0.01:
        most = printable(heads[int(cut.argmax())].name)
        print_once(
            f'{config.dataset}: cropping cuts {cut.mean():.0%} of the pixels on average, {cut.max():.0%} at most'
            f'{f" ({most})" if most else ""}; --fit pad keeps all'
        )
    smaller = max if config.fit == 'pad' else min
    odd = [i for i, scale in enumerate(scales) if smaller(scale) < 1 / 4 or cut[i] > 0.9]
    if odd:
        first = heads[odd[0]]
        print_once(
            f'warning: {config.dataset}: {len(odd)} of {len(heads)} images are enlarged more than 4 times, or more '
            f'than 10 times too long, for {width}x{height} pixels, such as '
            f'{printable(first.name)} ({first.width}x{first.height}). Leave them out, or use another --image_size.'
        )


# ---------------------------------------------------------------- a folder


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset):
    """The images of a folder: (uint8 (channels, H, W), class). Raises DataError for a broken file."""

    root: Path
    files: list[str]  # paths below root
    labels: list[int]
    made: dict[str, Any]  # arguments of pixels_of
    facts: dict[str, Any]  # classes, and which files were skipped
    held_out: int  # the first images: a held-out part of the folder's own; 0: it has none

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path = self.root / self.files[i]
        with readable(path):
            return pixels_of(path, **self.made), self.labels[i]

    def fingerprint(self) -> str:
        """The names, sizes and classes of all files and how they are decoded, wherever the folder is."""
        files = sorted(zip(self.files, [self.stat(name).st_size for name in self.files], self.labels, strict=True))
        return repr((files, self.facts['classes'], tuple(self.made.values())))

    def state(self) -> str:
        """`fingerprint` with the times of change: the cache of these pixels is valid while this is the same."""
        return repr([self.fingerprint(), self.files, [self.stat(name).st_mtime_ns for name in self.files]])

    def stat(self, name: str) -> stat_result:
        try:
            return (self.root / name).stat()
        except OSError:  # a link to nowhere, which decoding will name
            return stat_result((0,) * 10)


def list_images(config: Config) -> ImageFiles:
    """All images below the folder `config.data_path`, or else data_dir/image_folder, as folders.py finds them; the
    held-out part is at the beginning. Raises SettingError."""
    root = Path(config.data_path or Path(config.data_dir, 'image_folder')).expanduser()
    found = find(root, where_of(config, root))
    flips = ' '.join(f'--{name} 0' for name in ('flip_prob', 'rotate_prob') if getattr(config, name))
    if flips:
        letters = [f' ({name!r})' for name in found.classes if re.search(LETTERS, name, re.IGNORECASE)][:1]
        print_once(
            f'{"warning: " if letters else ""}image_folder: images are mirrored or turned: add {flips} if there are '
            f'letters{"".join(letters)}, or if left and right differ'
        )
    facts = dict(classes=found.classes, num_classes=len(found.classes), skipped=found.skipped)
    made = how_made(config, (root / name for name in found.files))
    return ImageFiles(root, found.files, found.labels, made, facts, found.held_out)


def where_of(config: Config, root: Path) -> str:
    """The name of the folder in errors."""
    return f"dataset='image_folder', {'data_path' if config.data_path else 'data_dir'}={str(root)!r}"


def load_image_folder(config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of a folder of images, of which a tenth is held out by default. Each class
    keeps an image to train on. Raises SettingError."""
    images = list_images(config)
    n = images.held_out
    if not n:
        where, classes = where_of(config, images.root), max(1, images.facts['num_classes'])
        n, most = packed.held_out_rows(config.held_out, len(images), where), len(images) - classes
        if n > most and (config.held_out or not most):
            wanted = f'held_out={n}: ' if config.held_out else ''
            raise SettingError(
                f'{where}: {wanted}of {len(images)} images of {classes} classes at most {most} can be held out, as '
                'each class needs one to train on. Use a smaller --held_out, or add images.'
            )
        n = min(n, most)
    title = f'image_folder {printable(images.root.resolve().name)}'
    return packed.decoded_once(config, images, n, images.facts, images.state(), title)
