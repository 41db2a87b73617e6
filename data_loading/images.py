"""Loads a folder of images of any format and size: decodes, crops and resizes the files that folders.py finds."""

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
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from config import Config
from data_loading import packed
from data_loading.folders import find, printable
from data_loading.labels import held_out_rows
from data_loading.spec import Loaded, counted
from runtime.errors import DataError, SettingError
from runtime.ranks import print_once
from utils import is_out_of_memory

Colour = tuple[int, ...]  # red, green, blue

ORIENTATION = 0x112  # EXIF's
TURNS = dict(  # its value -> the method of Image.transpose
    enumerate('FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90'.split(), 2)
)
LETTERS = 'letter|symbol|text|digit|number|sign|alphabet|character|font|^[0-9a-z]$'  # class names that hint at letters
HEIC = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'mif1', b'msf1')  # bytes 8 to 12 of a HEIC file
LOOKED_AT = 1000  # images whose sizes are read at the start


# ---------------------------------------------------------------- from a file to pixels


@contextlib.contextmanager
def readable(image: Path | str) -> Iterator[None]:
    """Raise a DataError that names the image, a file or a row, for any error inside the block."""
    try:
        yield
    except Exception as error:  # what PIL raises depends on the format
        if is_out_of_memory(error):
            raise
        text = f'{display_name(image)} cannot be read as an image ({type(error).__name__}: {printable(str(error))}). '
        text += 'Replace it by an intact one, remove it from the data, or leave such images out with --skip_unreadable.'
        raise DataError(text) from None


def display_name(image: Path | str) -> str:
    """The path of an image in the user's folder, even if --check uses a link to it; or the name of a row."""
    return printable(str(image.parent.resolve() / image.name if isinstance(image, Path) else image))


def opened(file: Path | BytesIO) -> Image.Image:
    """The image in a file. Raises Pillow's errors, or ValueError for HEIC and the like, whatever the file's name."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        begins = (file.read_bytes() if isinstance(file, Path) else file.getvalue())[4:12]
        if begins[:4] != b'ftyp':
            raise
        kind = 'HEIC' if begins[4:] in HEIC else repr(begins[4:].decode('ascii', 'replace'))
        raise ValueError(f'it is of the format {kind}: convert it to JPEG or PNG') from None


def pixels_of(
    path: Path | BytesIO, size: tuple[int, int], channels: int, background: Colour, fit: str = 'crop', white: int = 0
) -> Tensor:
    """An image file as uint8 (channels, H, W): turned by its EXIF orientation, transparent parts laid on `background`,
    and resized to `size` as in `fitted`. An animation gives its first frame. `white`: see `eight_bits`."""
    with opened(path) as image:
        image.load()  # also turns a TIFF
        if turn := TURNS.get(image.getexif().get(ORIENTATION, 1)):
            image = image.transpose(Image.Transpose[turn])
        if image.mode.startswith(('I', 'F')):
            image = eight_bits(image, white)
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, (*background, 255)), image)
        array = np.array(fitted(image.convert('L' if channels == 1 else 'RGB'), size, fit, background))
    return torch.from_numpy(array.reshape(*size, -1)).permute(2, 0, 1).contiguous()


def fitted(image: Any, size: tuple[int, int], fit: str, background: Colour) -> Any:
    """`image` resized to `size` (height, width) with antialiasing: its middle ('crop'), all of it on `background`
    ('pad'), or all of it distorted ('stretch')."""
    height, width = size
    scales = image.width / width, image.height / height  # pixels of the file per pixel of the result
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
    """A grey image with more than 8 bits per pixel, converted to 8 bits: `white`, 255 or 65535, becomes 255. white=0
    means 255 if no value is above it, else 65535. Raises ValueError for values that need more than 16 bits."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    white = white or (255 if high <= 255 else 65535)
    if values.dtype.kind == 'f' or low < 0 or high > 65535:
        raise ValueError(
            f'grey levels from {low:g} to {high:g} ({values.dtype}) are not an 8-bit or 16-bit image: stack such '
            'images in an .npy file for --dataset arrays --value_range LOW HIGH'
        )
    if high > white:
        raise ValueError(f'its grey levels go up to {high}, other images end at {white}: rescale all to one range')
    return Image.fromarray(np.round(values / (white / 255)).astype(np.uint8))


@dataclass(frozen=True)
class Head:
    """Facts about an image file that are read before it is decoded."""

    name: Path | str
    width: int  # as displayed, after the EXIF rotation
    height: int
    is_grey: bool
    is_deep: bool  # grey with more than 8 bits
    largest: int  # largest value of a grey image whose pixels were read, else 0


def head(file: Path | BytesIO, nth: int = 0) -> Head | None:
    """The size and colours of the nth image file; None if it cannot be read, which `readable` reports later. Also reads
    the pixels of the first grey images."""
    try:
        with Image.open(file) as image:
            has_exif = image.format in ('JPEG', 'MPO', 'WEBP')  # Pillow turns a TIFF's size; getexif decodes a PNG
            turned = has_exif and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            is_deep = image.mode.startswith(('I', 'F'))
            largest = int(np.asarray(image).max()) if nth < (100 if is_deep else 10 * (image.mode == 'L')) else 0
            name = file if isinstance(file, Path) else ''
            return Head(name, width, height, is_deep or image.mode in ('1', 'L', 'LA', 'La'), is_deep, largest)
    except Exception:  # what PIL raises depends on the format
        return None


def how_made(config: Config, files: Iterable[Path | BytesIO]) -> dict[str, Any]:
    """The arguments of `pixels_of` for these images: one channel if all of them are grey. Warns of unsuitable sizes and
    grey levels. Raises SettingError."""
    try:
        background = ImageColor.getrgb(config.background)[:3]
    except ValueError:
        raise SettingError(
            f"background={config.background!r} is not a colour. Use a name, such as white or black, or '#rrggbb'."
        ) from None
    size = (config.image_size[0], config.image_size[-1])
    heads, grey = [], True
    for file in files:  # all of them, unless one is in colour: then LOOKED_AT are enough
        if not grey and len(heads) == LOOKED_AT:
            break
        found = head(file, len(heads))
        grey = grey and (found is None or found.is_grey)
        if found and len(heads) < LOOKED_AT:
            heads.append(found)
    warn_of_sizes(config, heads, size)
    deep = max((found.largest for found in heads if found.is_deep), default=0)
    white = 65535 if deep > 255 else 255
    largest = deep or max((found.largest for found in heads if grey), default=0)
    if 0 < largest < (16384 if deep > 255 else 17):
        print_once(
            f'warning: {config.dataset}: grey levels end at {largest}, but {white} is white, so images are almost '
            f'black. Stack them in an .npy file and pass --dataset arrays --value_range 0 {largest}, or rescale them.'
        )
    elif 0 < deep <= 255:
        print_once(f'warning: {config.dataset}: grey levels of 16-bit images end at {deep}, so 255 is taken as white.')
    return dict(size=size, channels=1 if grey else 3, background=background, fit=config.fit, white=white if deep else 0)


def warn_of_sizes(config: Config, heads: list[Head], size: tuple[int, int]) -> None:
    """Print how much cropping cuts off, and warn of images that are far too small or too long."""
    height, width = size
    scales = [(found.width / width, found.height / height) for found in heads]
    cut = np.array([1 - min(scale) / max(scale) for scale in scales] or [0])
    if config.fit == 'crop' and cut.max() >= 0.01:
        most = f' ({display_name(name)})' if (name := heads[cut.argmax()].name) else ''
        text = f'cropping cuts {cut.mean():.0%} of the pixels on average, {cut.max():.0%} at most{most}'
        print_once(f'{config.dataset}: {text}; --fit pad keeps all of them')
    smaller = max if config.fit == 'pad' else min
    odd = [
        found for found, scale, lost in zip(heads, scales, cut, strict=False) if smaller(scale) < 1 / 4 or lost > 0.9
    ]
    if odd:
        print_once(
            f'warning: {config.dataset}: {len(odd)} of {counted(len(heads), "image")}, such as '
            f'{display_name(odd[0].name)} ({odd[0].width}x{odd[0].height}), are enlarged more '
            f'than 4 times, or more than 10 times too long, for {width}x{height} pixels. Leave them out, or use '
            'another --image_size.'
        )


# ---------------------------------------------------------------- a folder


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset):
    """The images of a folder: (uint8 (channels, H, W), class). Raises DataError for a broken file."""

    root: Path
    where: str  # name of the data set in errors
    files: list[str]  # paths below root
    labels: list[int]
    made: dict[str, Any]  # arguments of pixels_of
    facts: dict[str, Any]  # the classes, and a text on skipped files
    held_out: int  # size of the folder's own held-out part, which comes first; 0: it has none

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path = self.root / self.files[i]
        with readable(path):
            return pixels_of(path, **self.made), self.labels[i]

    def fingerprint(self) -> str:
        """The names, sizes and classes of all files, and how they are decoded; the same if the folder moves."""
        files = sorted(zip(self.files, [self.stat(name).st_size for name in self.files], self.labels, strict=True))
        return repr((files, self.facts['classes'], tuple(self.made.values())))

    def state(self) -> str:
        """`fingerprint` with modification times: the cache of these pixels is valid while this is the same."""
        return repr([self.fingerprint(), self.files, [self.stat(name).st_mtime_ns for name in self.files]])

    def stat(self, name: str) -> stat_result:
        try:
            return (self.root / name).stat()
        except OSError:  # a broken link: decoding will name it
            return stat_result((0,) * 10)


def list_images(config: Config) -> ImageFiles:
    """All images that folders.py finds below `config.data_path`, or else data_dir/image_folder; the held-out part comes
    first. Raises SettingError."""
    root = Path(config.data_path or Path(config.data_dir, 'image_folder')).expanduser()
    where = f"dataset='image_folder', {'data_path' if config.data_path else 'data_dir'}={str(root)!r}"
    if not config.data_path and not root.exists():
        raise SettingError("dataset='image_folder': pass your folder of images as --data_path.")
    files, labels, held_out, facts = find(root, where)
    if flips := ' '.join(f'--{name} 0' for name in ('flip_prob', 'rotate_prob') if getattr(config, name)):
        letters = [f' ({name!r})' for name in facts['classes'] if re.search(LETTERS, name, re.IGNORECASE)][:1]
        print_once(
            f'{"warning: " if letters else ""}image_folder: images are mirrored or turned: add {flips} if they show '
            f'letters{"".join(letters)}, or if left and right differ'
        )
    made = how_made(config, (root / name for name in files))
    return ImageFiles(root, where, files, labels, made, facts, held_out)


def load_image_folder(config: Config) -> Loaded:
    """(training part, held-out part, facts) from a folder of images; by default a tenth is held out. Each class keeps
    an image to train on. Raises SettingError."""
    images = list_images(config)
    classes = max(1, images.facts['num_classes'])
    n = images.held_out or held_out_rows(config.held_out, len(images), images.where, keep=classes)
    title = f'image_folder {printable(images.root.resolve().name)}'
    return packed.decoded_once(config, images, n, images.facts, images.state(), title)
