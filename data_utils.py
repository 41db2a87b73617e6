"""Data sets: how to load them, and what they are. Yours is one more entry of DATASETS.

What `load` returns is checked by data_checks.py, and read in the order of data_loaders.py.
"""

import importlib.util
import os
import urllib.error
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import Config, SettingError, choose
from data_checks import Arrays, DataError, SizedDataset, check_parts, fingerprint
from data_loaders import HeldOutSampler, Loader, StreamSampler
from runtime import ranks


@dataclass(frozen=True)
class DataSpec:
    """How to load a data set and what it is.

    `load(config)` returns the training and the held-out part. Each is a tuple of tensors or numpy arrays, which live on
    the device, or a torch Dataset, which loader processes read. The entries of the tuple, or of an item of the Dataset:

    x          (N, *shape): uint8 for scale 'image', floats for scale 'float'
    label      (N,) whole numbers from 0 to num_classes - 1; if num_classes is 0, anything with N rows
    x1         optional, like x: the data are pairs, and a loader yields (x, label, x1)

    A Dataset must give the same item each time: augmentation belongs into the trainer. `load` runs first on one process
    of each machine, which may download.
    """

    load: Callable[[Config], tuple[Any, Any]]
    shape: tuple[int, ...] | None = None  # of one x, (C, H, W) for images; None: that of the data
    num_classes: int = 0  # 0: the data have no classes
    max_value: int = 255  # of a pixel: images are divided by it
    # 'image': uint8, yielded in [0, 1]; 'float': floats of any range and rank, yielded as they are
    scale: str = 'image'
    flip_keeps_label: bool = True
    rotation_keeps_label: bool = True
    translation_keeps_label: bool = True
    pixel_metrics: bool = False  # small grey images, which metrics.py can judge by their pixels


def load_digits(config: Config) -> tuple[Arrays, Arrays]:
    """scikit-learn's 1797 handwritten digits, 8x8, values 0 to 16; 1500 to train, 297 held out."""
    package = importlib.util.find_spec('sklearn')  # found, not imported: that takes a second of every start
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / 'datasets/data/digits.csv.gz', delimiter=',', dtype=np.uint8)
    table = torch.from_numpy(table[np.random.default_rng(0).permutation(1797)])
    images, labels = table[:, :64].reshape(-1, 1, 8, 8), table[:, 64].long()
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def from_torchvision(config: Config, name: str, files: str) -> list[Any]:
    """The training and the held-out part of a torchvision data set, downloaded as `files` if they are not there.

    Raises SettingError.
    """
    import torchvision
    from torchvision.datasets.utils import check_integrity

    kind = getattr(torchvision.datasets, name)
    try:
        return [kind(config.data_dir, train=train, download=True) for train in (True, False)]
    except (urllib.error.URLError, RuntimeError, ConnectionError, TimeoutError) as error:
        cause = f'cannot be downloaded ({" ".join(str(error).split())})'
        wanted = Path(config.data_dir, files)
        sums = dict(getattr(kind, 'resources', [])) | {getattr(kind, 'filename', ''): getattr(kind, 'tgz_md5', None)}
        there = [path for path in sorted(wanted.parent.glob(wanted.name)) if sums.get(path.name)]
        other = [path.name for path in there if not check_integrity(str(path), sums[path.name])]
        if other:
            remedy = f'unpack it: gunzip -k {wanted}' if wanted.name == '*.gz' else 'copy it again'
            raise SettingError(
                f'dataset={config.dataset!r}: {", ".join(other)} in {wanted.parent}: there, but with other checksums '
                f"than torchvision's, and it {cause}. It is damaged, or was packed anew, as in Debian's packages: "
                f'{remedy}.'
            ) from error
        raise SettingError(
            f'dataset={config.dataset!r}: it is not in data_dir={config.data_dir!r} and {cause}. '
            f'With no network, copy {wanted} from a machine that has it, or train on --dataset digits.'
        ) from error


def load_mnist(config: Config) -> tuple[Arrays, Arrays]:
    train, test = (
        (part.data[:, None], part.targets.long()) for part in from_torchvision(config, 'MNIST', 'MNIST/raw/*.gz')
    )
    return train, test


def load_cifar10(config: Config) -> tuple[Arrays, Arrays]:
    parts = from_torchvision(config, 'CIFAR10', 'cifar-10-python.tar.gz')
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    )
    return train, test


IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset):
    """Images of any size, resized and cropped: (uint8 (3, side, side), class). Raises DataError for a broken file."""

    root: Path
    classes: list[str]
    files: list[tuple[str, int]]  # path below root, class
    side: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image
        from torchvision.transforms import functional

        name, label = self.files[i]
        path = self.root / name
        try:
            with Image.open(path) as image:
                rgb = cast(Any, image.convert('RGB'))  # torchvision's annotations know tensors alone
                square = functional.center_crop(functional.resize(rgb, [self.side]), [self.side])
            return functional.pil_to_tensor(square), label
        except Exception as error:  # what PIL raises depends on the format
            path = path.parent.resolve() / path.name  # in the user's folder, also where --check has linked it
            raise DataError(
                f'{path} cannot be read as an image ({type(error).__name__}: {error}). '
                'Replace it by a whole one, or remove it from the data.'
            ) from None

    def part(self, chosen: Iterable[int]) -> 'ImageFiles':
        return replace(self, files=[self.files[i] for i in chosen])

    def fingerprint(self) -> str:
        """The names and sizes of all files, wherever the folder is."""
        try:
            return repr(sorted((name, (self.root / name).stat().st_size) for name, _ in self.files))
        except OSError as error:
            raise SettingError(f'{error}: an image cannot be read. Mend or remove it.') from None


def is_hidden(path: str) -> bool:
    return any(name.startswith('.') for name in path.split(os.sep))


@lru_cache(maxsize=1)  # listing a large folder takes long
def open_image_folder(config: Config) -> ImageFiles:
    """Images in data_dir/image_folder/<class>/ and the folders below, without hidden ones. Raises SettingError."""
    root = Path(config.data_dir, 'image_folder')
    name = f"dataset='image_folder', data_dir={config.data_dir!r}"
    remedy = f'Put images into {root}/<class>/, also if there is one class.'
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise SettingError(f'{name}: {error}. {remedy}') from None
    if not classes:
        raise SettingError(f'{name}: there is no folder of a class in {root}. {remedy}')
    files = []
    for label, of_class in enumerate(classes):
        before = len(files)
        for folder, _, names in sorted(os.walk(root / of_class, followlinks=True)):
            below = (os.path.relpath(os.path.join(folder, name), root) for name in sorted(names))
            files += [(path, label) for path in below if path.lower().endswith(IMAGE_ENDINGS) and not is_hidden(path)]
        if len(files) == before:
            raise SettingError(
                f'{name}: no image in {root / of_class}. Put some into it ({", ".join(IMAGE_ENDINGS)}), or remove it.'
            )
    return ImageFiles(root, classes, files, config.image_size)


def load_image_folder(config: Config) -> tuple[ImageFiles, ImageFiles]:
    """A fixed tenth of the images, at most 1000 of them, is held out. Prints what was found."""
    images = open_image_folder(config)
    if len(images) < 2:
        raise SettingError(
            f"dataset='image_folder' needs two or more images, there is {len(images)} in data_dir={config.data_dir!r}. "
            'Put more into image_folder/<class>/.'
        )
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    held_out = min(1000, max(1, len(order) // 10))
    counts = np.bincount([label for _, label in images.files])
    shown = [f'{name} {count}' for name, count in zip(images.classes, counts, strict=True)]
    more = [f'and {len(shown) - 8} more'] if len(shown) > 8 else []
    size = f'{len(order) - held_out} + {held_out} images, {len(shown)} classes'
    ranks.print_once(f'image_folder: {size}: {", ".join(shown[:8] + more)}')
    return images.part(order[held_out:]), images.part(order[:held_out])


GREY_SYMBOLS: dict[str, Any] = dict(
    num_classes=10, flip_keeps_label=False, rotation_keeps_label=False, pixel_metrics=True
)
DATASETS: dict[str, DataSpec] = {
    'digits': DataSpec(load_digits, (1, 8, 8), max_value=16, **GREY_SYMBOLS),
    'mnist': DataSpec(load_mnist, (1, 28, 28), **GREY_SYMBOLS),
    'cifar10': DataSpec(load_cifar10, (3, 32, 32), num_classes=10),
    'image_folder': DataSpec(load_image_folder, (3, 0, 0)),  # sides and classes: see get_dataset
}


def get_dataset(config: Config) -> DataSpec:
    """The entry of DATASETS; a Loader's `spec` has a shape also where the entry has None.

    Raises SettingError for an unknown `dataset`, and for an image folder that is not there.
    """
    spec = choose('dataset', config.dataset, DATASETS)
    if config.dataset == 'image_folder':
        classes = len(open_image_folder(config).classes)
        spec = replace(spec, shape=(3, config.image_size, config.image_size), num_classes=classes)
    return spec


def load_in_turns(config: Config, spec: DataSpec) -> tuple[DataSpec, Arrays | SizedDataset, Arrays | SizedDataset]:
    """`spec` with its shape, and the parts that `spec.load` returns, checked.

    Rank 0 loads first, then the first process of each other machine, whose data_dir may be its own, then all others:
    one process downloads, the others find the files. Raises SettingError on every rank if the data cannot be had.
    """

    def load() -> tuple[DataSpec, Arrays | SizedDataset, Arrays | SizedDataset]:
        try:
            Path(config.data_dir).mkdir(parents=True, exist_ok=True)
            loaded = spec.load(config)
        except OSError as error:
            raise SettingError(
                f'data_dir={config.data_dir!r} cannot be written or read ({error}). '
                'Pass a folder of yours as --data_dir.'
            ) from error
        return check_parts(spec, loaded, config)

    turn = 0 if ranks.is_main() else 1 if os.environ.get('LOCAL_RANK', '0') == '0' else 2
    loaded = [ranks.on_each(lambda now=now: load() if turn == now else None) for now in range(3)]
    mine = loaded[turn]
    assert mine is not None
    return mine


def agreed_fingerprint(config: Config, parts: list[Arrays | SizedDataset], num_classes: int) -> str:
    """`fingerprint` of rank 0. Raises SettingError on every rank if another machine has other data."""
    mine = ranks.on_main(lambda: fingerprint(parts, num_classes))

    def compare() -> None:
        machine = os.environ.get('GROUP_RANK', '0')  # torchrun's
        if machine == '0' or os.environ['LOCAL_RANK'] != '0':
            return
        here = fingerprint(parts, num_classes)
        if here != mine:
            raise SettingError(
                f'data_dir={config.data_dir!r}: on machine {machine} it holds other data ({here}) than on machine 0 '
                f'({mine}). Copy the data of machine 0, or share the folder.'
            )

    ranks.on_each(compare)
    return mine


def setup_data_train_and_test(config: Config, device: torch.device) -> tuple[Loader, StreamSampler, Loader]:
    """(train_loader, train_sampler, test_loader).

    The train loader is endless and yields this process's shards, step by step from `train_sampler.set_step`; the test
    loader yields this process's pieces of the held-out part, once, as its HeldOutSampler says.
    Raises SettingError if the shards cannot be dealt to the processes, or the data cannot be had or used.
    """
    processes = ranks.world_size()
    if config.batch_shards % (processes * config.accumulation_steps):
        least = processes * config.accumulation_steps
        raise SettingError(
            f'batch_shards={config.batch_shards} is not divisible by {processes} processes x '
            f'accumulation_steps={config.accumulation_steps}. Use another number of processes (NPROC), or a '
            f'--batch_shards that is a multiple of {least} and divides --global_batch_size.'
        )
    spec = ranks.on_each(lambda: get_dataset(config))
    spec, train, test = load_in_turns(config, spec)
    if spec.scale == 'float' and config.dequantize:
        raise SettingError(
            f'dequantize=True adds noise of one grey level, and dataset={config.dataset!r} has floats. '
            'Use --no_dequantize.'
        )
    mark = agreed_fingerprint(config, [train, test], spec.num_classes)
    train_size, test_size = (len(part[0]) if isinstance(part, tuple) else len(part) for part in (train, test))
    sampler = StreamSampler(train_size, config)
    test_loader = Loader(test, HeldOutSampler(test_size, config), config, spec, device, mark)
    return Loader(train, sampler, config, spec, device, mark), sampler, test_loader
