"""A folder of images of any kind and size as a data set: which files it holds, and what becomes of them."""

import os
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import Config, SettingError
from runtime.errors import DataError

IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm')


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset):
    """Images of any size, resized and cropped: (uint8 (channels, H, W), class). Raises DataError for a broken file."""

    root: Path
    files: list[str]  # paths below root
    labels: list[int]
    classes: list[str]  # names; empty if there are none
    size: tuple[int, int]  # H, W
    channels: int
    background: tuple[int, int, int]
    passed_over: str = ''  # in words

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path = self.root / self.files[i]
        try:
            return pixels_of(path, self.size, self.channels, self.background), self.labels[i]
        except Exception as error:  # what PIL raises depends on the format
            path = path.parent.resolve() / path.name  # in the user's folder, also where --check has linked it
            raise DataError(
                f'{path} cannot be read as an image ({type(error).__name__}: {error}). Replace it by a whole one, '
                'remove it from the data, or leave such files out by --skip_unreadable.'
            ) from None

    def fingerprint(self) -> str:
        """The names and sizes of all files and what is made of them, wherever the folder is."""
        made = (self.size, self.channels, self.background if self.channels else None)
        return repr((sorted((name, self.stat(name).st_size) for name in self.files), made))

    def state(self) -> str:
        """`fingerprint` with the times of change: what the cache of these pixels is good for."""
        return repr([self.fingerprint(), [self.stat(name).st_mtime_ns for name in self.files]])

    def stat(self, name: str) -> os.stat_result:
        try:
            return (self.root / name).stat()
        except OSError:  # a link to nowhere: decoding says so
            return os.stat_result((0,) * 10)


def pixels_of(path: Path | BytesIO, size: tuple[int, int], channels: int, background: tuple[int, int, int]) -> Tensor:
    """An image file as uint8 (channels, H, W): turned as its EXIF data say, transparent parts laid on `background`, the
    middle cut out in the proportions of `size`, and resized with antialiasing. Of an animation, the first picture."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(('I', 'F')):
            image = eight_bits(image)
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, (*background, 255)), image)
        image = image.convert('L' if channels == 1 else 'RGB')
        height, width = size
        scale = min(image.width / width, image.height / height)  # pixels of the file for one of ours
        kept = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (image.width - kept[0]) // 2, (image.height - kept[1]) // 2
        middle = image.crop((left, top, left + kept[0], top + kept[1]))
        array = np.array(middle.resize((width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1).contiguous()


def eight_bits(image: Any) -> Any:
    """A grey image of 16 bits a pixel with 8. Raises ValueError if its values need more than 16 bits."""
    from PIL import Image

    values = np.asarray(image)
    if values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f'grey levels from {values.min():g} to {values.max():g} ({values.dtype}) are no image of 8 or 16 bits: '
            'use --dataset arrays for such data'
        )
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def is_grey(path: Path | BytesIO) -> bool:
    """Whether a file says that its image has no colours; also True for what cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ('1', 'L', 'LA', 'La') or image.mode.startswith(('I', 'F'))
    except Exception:
        return True


def list_images(config: Config) -> ImageFiles:
    """All images below the folder `config.data_path`, or else data_dir/image_folder.

    The class of an image is the first folder below that it is in. Images that lie in the folder itself, or in one
    folder alone, have no class. What is hidden (.name) and what has no ending of an image is passed over. Prints what
    was found. Raises SettingError.
    """
    root = Path(config.data_path or Path(config.data_dir, 'image_folder')).expanduser()
    where = f"dataset='image_folder', {'data_path' if config.data_path else 'data_dir'}={str(root)!r}"
    remedy = 'Pass a folder of images, or of one folder for each class, as --data_path.'
    if not root.is_dir():
        raise SettingError(f'{where}: there is no such folder. {remedy}')
    files, others = walk(root, where)
    if not files:
        found = f', only {counts_in_words(others)}' if others else ''
        raise SettingError(f'{where}: it holds no image ({", ".join(IMAGE_ENDINGS)}){found}. {remedy}')
    folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else '' for name in files]
    classes = sorted(set(folders))
    if '' in classes and len(classes) > 1:
        raise SettingError(
            f'{where}: {folders.count("")} images lie in it beside folders ({", ".join(classes[1:4])}), so that their '
            'class is not known. Move them into a folder, or pass a folder with images alone.'
        )
    classes = classes if len(classes) > 1 else []
    labels = [classes.index(folder) if classes else 0 for folder in folders]
    size = (config.image_size[0], config.image_size[-1])
    channels = 1 if all(is_grey(root / name) for name in files) else 3
    passed_over = ''
    if others:
        from runtime.ranks import print_once

        passed_over = f'passed over {sum(others.values())} files that are no images: {counts_in_words(others)}'
        print_once(f'image_folder: {passed_over}')
    return ImageFiles(root, files, labels, classes, size, channels, background_of(config), passed_over)


def walk(root: Path, where: str) -> tuple[list[str], Counter[str]]:
    """(paths below root of all images; how many other files there are of each ending). Raises SettingError.

    The paths are in the order of a hash of each, of which the first are held out: the same ones in every run, for every
    seed, and mostly also when images are added.
    """
    files: list[str] = []
    others: Counter[str] = Counter()
    above: set[tuple[int, int]] = set()  # folders that were entered, so that a circle of links ends

    def refuse(error: OSError) -> None:
        raise SettingError(f'{where}: {error}. Make it readable, or move it elsewhere.') from None

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            below.clear()
            continue
        above.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith('.'))
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), root)
            if name.startswith('.'):
                continue
            if name.lower().endswith(IMAGE_ENDINGS):
                files.append(path)
            else:
                others[Path(name).suffix or name] += 1
    return sorted(files, key=lambda name: blake2b(os.fsencode(name)).digest()), others


def counts_in_words(counts: Counter[str]) -> str:
    """'.svg 410, .txt 12', the most frequent first."""
    shown = [f'{name} {count}' for name, count in counts.most_common(8)]
    return ', '.join(shown + ([f'and {len(counts) - 8} more kinds'] if len(counts) > 8 else []))


def background_of(config: Config) -> tuple[int, int, int]:
    """The colour that `background` names. Raises SettingError."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(config.background)[:3]  # pyright: ignore[reportReturnType]
    except ValueError:
        raise SettingError(
            f"background={config.background!r} is no colour. Use a name, such as white or black, or '#rrggbb'."
        ) from None
