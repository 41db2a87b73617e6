"""Data sets and their loaders. A loader yields (x, label): x (n, C, H, W) in [0, 1] and label (n,) int64, on the device.

The order of the training data is an endless stream of permutations, each a function of (seed, epoch); step s reads
positions [s B, (s + 1) B). A step's global batch is cut into `batch_shards` shards, and each process reads its share of
them, so the images of a step do not depend on the number of processes.
"""

import itertools
import signal
import urllib.error
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config, SettingError, choose
from runtime import ranks, stopping

Arrays = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64


@dataclass(frozen=True)
class DataSpec:
    """How to load a data set and what it is.

    `load(config)` returns the training and the held-out part, each either Arrays, which live on the device, or a
    torch Dataset of (uint8 (C, H, W), label), which loader processes read. It runs first on one process alone, which
    may download. Unlabelled data has num_classes 0 and labels 0.
    """

    load: Callable[[Config], tuple[Arrays | Dataset, Arrays | Dataset]]
    shape: tuple[int, int, int]  # C, H, W
    num_classes: int
    max_value: int = 255  # of a pixel: images are divided by it
    flip_keeps_label: bool = True
    rotation_keeps_label: bool = True
    translation_keeps_label: bool = True
    pixel_metrics: bool = False  # small grey images, which metrics.py can judge by their pixels


def load_digits(config: Config) -> tuple[Arrays, Arrays]:
    """scikit-learn's 1797 handwritten digits, 8x8, values 0 to 16; 1500 to train, 297 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(1797))
    images = torch.from_numpy(digits.images).to(torch.uint8)[order, None]
    labels = torch.from_numpy(digits.target).long()[order]
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


def from_torchvision(config: Config, name: str, files: str) -> list[Any]:
    """The training and the held-out part of a torchvision data set, downloaded as `files` if they are not there. Raises SettingError."""
    import torchvision

    try:
        return [
            getattr(torchvision.datasets, name)(config.data_dir, train=train, download=True) for train in (True, False)
        ]
    except (urllib.error.URLError, RuntimeError, ConnectionError, TimeoutError) as error:
        raise SettingError(
            f'dataset={config.dataset!r}: it is not in data_dir={config.data_dir!r} and cannot be downloaded ({error}). '
            f'With no network, copy {Path(config.data_dir, files)} from a machine that has it, or train on --dataset digits.'
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


@lru_cache(maxsize=1)  # listing a large folder takes long
def open_image_folder(config: Config) -> Dataset:
    """Images of any size in data_dir/image_folder/<class>/, resized and cropped to image_size."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    root = Path(config.data_dir, 'image_folder')
    side = config.image_size
    to_square = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()])
    try:
        return ImageFolder(str(root), to_square)
    except OSError as error:
        raise SettingError(
            f"dataset='image_folder', data_dir={config.data_dir!r}: {error} Put images into {root}/<class>/, also if there is one class."
        ) from None


def load_image_folder(config: Config) -> tuple[Dataset, Dataset]:
    """A fixed tenth of the images, at most 1000 of them, is held out."""
    images = open_image_folder(config)
    if len(images) < 2:
        raise SettingError(
            f"dataset='image_folder' needs two or more images, there is {len(images)} in data_dir={config.data_dir!r}. Put more into image_folder/<class>/."
        )
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    held_out = min(1000, max(1, len(order) // 10))
    return torch.utils.data.Subset(images, order[held_out:]), torch.utils.data.Subset(images, order[:held_out])


GREY_SYMBOLS = dict(num_classes=10, flip_keeps_label=False, rotation_keeps_label=False, pixel_metrics=True)
DATASETS: dict[str, DataSpec] = {
    'digits': DataSpec(load_digits, (1, 8, 8), max_value=16, **GREY_SYMBOLS),
    'mnist': DataSpec(load_mnist, (1, 28, 28), **GREY_SYMBOLS),
    'cifar10': DataSpec(load_cifar10, (3, 32, 32), num_classes=10),
    'image_folder': DataSpec(load_image_folder, (3, 0, 0), num_classes=0),  # sides and classes: see get_dataset
}


def get_dataset(config: Config) -> DataSpec:
    """Raises SettingError for an unknown `dataset`, and for an image folder that is not there."""
    spec = choose('dataset', config.dataset, DATASETS)
    if config.dataset == 'image_folder':
        classes = len(open_image_folder(config).classes)
        spec = replace(spec, shape=(3, config.image_size, config.image_size), num_classes=classes)
    return spec


class StreamSampler(Sampler):
    """Endless lists of image indices, one for each of this process's shards of each step, from `set_step` on."""

    def __init__(self, num_images: int, config: Config):
        self.num_images, self.seed, self.overfit = num_images, config.seed, config.overfit
        self.batch_size, self.num_shards = config.global_batch_size, config.batch_shards
        self.step = 0

    @property
    def my_shards(self) -> range:
        """This process's shards: a block of consecutive ones."""
        n = self.num_shards // ranks.world_size()
        return range(ranks.rank() * n, (ranks.rank() + 1) * n)

    def set_step(self, step: int) -> None:
        """Make the next iteration begin with this step."""
        self.step = step

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_images)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, int)
        shard_size = self.batch_size // self.num_shards
        for step in itertools.count(self.step):
            for shard in self.my_shards:
                first = (0 if self.overfit else step * self.batch_size) + shard * shard_size
                indices: list[int] = []
                for position in range(first, first + shard_size):
                    if position // self.num_images != epoch:
                        epoch = position // self.num_images
                        order = self.permutation(epoch)
                    indices.append(int(order[position % self.num_images]))
                yield indices


def ignore_stop_signals(worker: int) -> None:
    """In a loader process: a stop that is sent to all processes is the trainer's business, which ends its loaders itself."""
    for name in stopping.STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


class Loader:
    """Batches of `source` in the order of `batch_sampler`, scaled to [0, 1] on the device."""

    def __init__(
        self,
        source: Arrays | Dataset,
        batch_sampler: Iterable[list[int]],
        config: Config,
        spec: DataSpec,
        device: torch.device,
        rounds: int | None = None,
    ):
        """`rounds`: for the test loader, after how many batches all processes are through."""
        self.rounds = rounds
        self.batch_sampler, self.max_value, self.device = batch_sampler, spec.max_value, device
        self.resident = None
        if isinstance(source, tuple):
            self.resident = tuple(part.to(device) for part in source)
        else:
            self.workers = DataLoader(
                source,
                batch_sampler=batch_sampler,
                num_workers=config.num_workers,
                pin_memory=device.type == 'cuda',
                persistent_workers=config.num_workers > 0,
                worker_init_fn=ignore_stop_signals,
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, label in self.workers if self.resident is None else self._from_resident():
            x = x.to(self.device, non_blocking=True)
            yield x.float() / self.max_value, label.to(self.device, non_blocking=True)

    def start_workers(self) -> None:
        """Fork the loader processes now. Later, beside a thread that writes a checkpoint, a fork could copy a lock that nobody will release."""
        if self.resident is None and self.workers.persistent_workers:
            iter(self.workers)

    def everything(self) -> tuple[Tensor, Tensor]:
        """All images (N, C, H, W) in [0, 1] and labels of a resident data set, on the CPU, whatever the sampler says."""
        images, labels = (part.cpu() for part in self.resident)
        return images.float() / self.max_value, labels

    def _from_resident(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.resident
        for indices in self.batch_sampler:
            chosen = torch.tensor(indices)
            if self.device.type == 'cuda':  # only from pinned memory is a copy no CPU-GPU sync
                chosen = chosen.pin_memory().to(self.device, non_blocking=True)
            yield images[chosen], labels[chosen]


def load_once(config: Config, spec: DataSpec) -> tuple[Arrays | Dataset, Arrays | Dataset]:
    """`spec.load`, on rank 0 alone first, so that one process downloads and the others find the files.

    Raises SettingError on every rank if the data cannot be had.
    """

    def load() -> tuple[Arrays | Dataset, Arrays | Dataset]:
        try:
            Path(config.data_dir).mkdir(parents=True, exist_ok=True)
            return spec.load(config)
        except OSError as error:
            raise SettingError(
                f'data_dir={config.data_dir!r} cannot be written or read ({error}). Pass a folder of yours as --data_dir.'
            ) from error

    loaded = []
    ranks.on_main(lambda: loaded.append(load()))
    return ranks.on_each(lambda: loaded[0] if loaded else load())


def setup_data_train_and_test(config: Config, device: torch.device) -> tuple[Loader, StreamSampler, Loader]:
    """(train_loader, train_sampler, test_loader).

    The train loader is endless and yields this process's shards, step by step from `train_sampler.set_step`; the test
    loader yields the held-out batches rank, rank + world size, ... of one shard's size, once.
    Raises SettingError if the shards cannot be dealt to the processes, or the data cannot be had.
    """
    processes = ranks.world_size()
    if config.batch_shards % (processes * config.accumulation_steps):
        raise SettingError(
            f'batch_shards={config.batch_shards} is not divisible by {processes} processes x accumulation_steps={config.accumulation_steps}. '
            f'Use another number of processes (NPROC), or a --batch_shards that is a multiple of {processes * config.accumulation_steps} and divides --global_batch_size.'
        )
    spec = ranks.on_each(lambda: get_dataset(config))
    train, test = load_once(config, spec)
    train_size, test_size = (len(part[0]) if isinstance(part, tuple) else len(part) for part in (train, test))
    sampler = StreamSampler(train_size, config)
    n = config.global_batch_size // config.batch_shards
    held_out = [list(range(i, min(i + n, test_size))) for i in range(0, test_size, n)]
    mine = held_out[ranks.rank() :: processes]
    test_loader = Loader(test, mine, config, spec, device, rounds=-(-len(held_out) // processes))
    return Loader(train, sampler, config, spec, device), sampler, test_loader
