"""Data sets: how to load them, and what they are. Yours is one more entry of DATASETS.

What `load` returns is checked by data_checks.py, and read in the order of data_loaders.py.
"""

import importlib.util
import os
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, SettingError, choose
from data_loading import packed
from data_loading.arrays import load_arrays
from data_loading.checks import Arrays, Rows, SizedDataset, check_parts, describe_counts, fingerprint
from data_loading.hub import open_hub
from data_loading.image_folder import list_images
from data_loading.loader import HeldOutSampler, Loader, StreamSampler
from data_loading.toy2d import LOADERS
from runtime import ranks


@dataclass(frozen=True)
class DataSpec:
    """How to load a data set and what it is.

    `load(config)` returns the training and the held-out part. Each is a tuple of tensors or numpy arrays, which live on
    the device, or a torch Dataset, which loader processes read. The entries of the tuple, or of an item of the Dataset:

    x          (N, *shape): uint8 for scale 'image', floats for scale 'float'
    label      (N,) whole numbers from 0 to num_classes - 1; if num_classes is 0, anything with N rows
    x1         optional, like x: the data are pairs, and a loader yields (x, label, x1)

    A third entry beside the two parts, a dict, says what was found out about the data: it replaces fields of this.
    A Dataset must give the same item each time: augmentation belongs into the trainer. `load` runs first on one process
    of each machine, which may download.
    """

    load: Callable[[Config], tuple[Any, ...]]
    shape: tuple[int, ...] | None = None  # of one x, (C, H, W) for images; None: that of the data
    num_classes: int = 0  # 0: the data have no classes
    max_value: int = 255  # of a pixel: images are divided by it
    # 'image': uint8, yielded in [0, 1]; 'float': floats of any range and rank, yielded as they are
    scale: str = 'image'
    flip_keeps_label: bool = True
    rotation_keeps_label: bool = True
    translation_keeps_label: bool = True
    pixel_metrics: bool = False  # small grey images, which metrics.py can judge by their pixels
    classes: tuple[str, ...] = ()  # their names, in order; empty: numbers
    mean: tuple[float, ...] = ()  # of each channel of latents that prepare.py has stored
    std: tuple[float, ...] = ()
    passed_over: str = ''  # in words, what of the files was left out
    digest: str = ''  # a hash of all data, if `load` knows it already


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


def load_mnist(name: str, config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """MNIST, or a data set of torchvision in its format."""
    parts = from_torchvision(config, name, f'{name}/raw/*.gz')
    train, test = ((part.data[:, None], part.targets.long()) for part in parts)
    return train, test, dict(classes=tuple(parts[0].classes))


def load_cifar(name: str, file: str, config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """CIFAR-10 or CIFAR-100, of which `file` is the archive."""
    parts = from_torchvision(config, name, file)
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    )
    return train, test, dict(classes=tuple(parts[0].classes))


def load_image_folder(config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """A folder of images (image_files.py), of which a tenth is held out."""
    images = list_images(config)
    facts = dict(classes=tuple(images.classes), num_classes=len(images.classes), passed_over=images.passed_over)
    return decoded_once(config, images, 0, facts, images.state(), f'image_folder {images.root.resolve().name}')


def load_hub(config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """A data set of Hugging Face `datasets` (hub_images.py)."""
    items, held_out, facts, state = open_hub(config)
    return decoded_once(config, items, held_out, facts, state, f'hub {Path(config.data_path).name}')


def decoded_once(
    config: Config, items: SizedDataset, held_out: int, facts: dict[str, Any], state: str, title: str
) -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of images that are decoded into data_dir/cache, in parallel, and read from
    there as long as `state` is the same. Without `cache`, or without room, the parts are Datasets.

    Held out are the first `held_out` items; if that is 0, as many as the config says, or a tenth.
    """
    mark = blake2b(repr((state, held_out, config.held_out, config.skip_unreadable)).encode(), digest_size=8).hexdigest()
    path = Path(config.data_dir, 'cache', f'{title.split()[-1]}-{mark}.pt')

    n = held_out or packed.held_out_rows(config.held_out, len(items), f'dataset={config.dataset!r}')
    found = None
    if config.cache:
        stored = {name: fact for name, fact in facts.items() if name != 'passed_over'}  # it is not of the data
        with packed.alone(path) as locked:
            found = packed.cached(path)
            if found is None:
                if locked:
                    packed.remove_remains(path)
                try:
                    packed.build(items, path, n, config.skip_unreadable, title, **stored)
                    found = packed.read(path)
                except packed.NoRoomError as error:
                    ranks.print_once(f'no room for a cache, so that images are decoded in every epoch anew: {error}')
    if found is not None:
        left_out = found.get('left_out') and f'left out {found["left_out"]} that cannot be read'
        passed_over = '; '.join(filter(None, [facts.get('passed_over'), left_out]))
        return *packed.parts_of(found), facts | dict(digest=found['digest'], passed_over=passed_over)
    return Rows(items, n, len(items)), Rows(items, 0, n), facts


GREY_SYMBOLS: dict[str, Any] = dict(
    num_classes=10, flip_keeps_label=False, rotation_keeps_label=False, pixel_metrics=True
)
DATASETS: dict[str, DataSpec] = {
    'digits': DataSpec(load_digits, (1, 8, 8), max_value=16, **GREY_SYMBOLS),
    'mnist': DataSpec(partial(load_mnist, 'MNIST'), (1, 28, 28), **GREY_SYMBOLS),
    'fashion_mnist': DataSpec(partial(load_mnist, 'FashionMNIST'), (1, 28, 28), num_classes=10, pixel_metrics=True),
    'cifar10': DataSpec(partial(load_cifar, 'CIFAR10', 'cifar-10-python.tar.gz'), (3, 32, 32), num_classes=10),
    'cifar100': DataSpec(partial(load_cifar, 'CIFAR100', 'cifar-100-python.tar.gz'), (3, 32, 32), num_classes=100),
    **{name: DataSpec(load, (2,), classes, scale='float') for name, (load, classes) in LOADERS.items()},
    'image_folder': DataSpec(load_image_folder),  # what they are is read off the files
    'arrays': DataSpec(load_arrays),
    'hub': DataSpec(load_hub),
}


def get_dataset(config: Config) -> DataSpec:
    """The entry of DATASETS, which may have less in it than the `spec` of a Loader. Raises SettingError."""
    return choose('dataset', config.dataset, DATASETS)


def load_in_turns(config: Config, spec: DataSpec) -> tuple[DataSpec, Arrays | SizedDataset, Arrays | SizedDataset]:
    """`spec` with its shape, and the parts that `spec.load` returns, checked.

    Rank 0 loads first, then the first process of each other machine, whose data_dir may be its own, then all others:
    one process downloads, the others find the files. Raises SettingError on every rank if the data cannot be had.
    """

    def load() -> tuple[DataSpec, Arrays | SizedDataset, Arrays | SizedDataset]:
        try:
            Path(config.data_dir).mkdir(parents=True, exist_ok=True)
            loaded = spec.load(config)
            has_facts = isinstance(loaded, tuple) and len(loaded) == 3 and isinstance(loaded[2], dict)
            facts = loaded[2] if has_facts else {}
        except OSError as error:
            raise SettingError(
                f'data_dir={config.data_dir!r} cannot be written or read ({error}). '
                'Pass a folder of yours as --data_dir.'
            ) from error
        known, *parts = check_parts(replace(spec, **facts), loaded[:2] if has_facts else loaded, config)
        return known, parts[0], with_held_out(parts[1], config)

    return ranks.in_turns(load)


def with_held_out(part: Arrays | SizedDataset, config: Config) -> Arrays | SizedDataset:
    """The held-out part, or its first `config.held_out` items if that is not 0. Raises SettingError."""
    n, size = config.held_out, len(part[0]) if isinstance(part, tuple) else len(part)
    if n > size and not config.skip_unreadable:  # with it, some of them may have been left out
        raise SettingError(f'held_out={n}: dataset={config.dataset!r} has {size} held-out images. Ask for no more.')
    if n == 0 or n >= size:
        return part
    return tuple(array[:n] for array in part) if isinstance(part, tuple) else Rows(part, 0, n)


def agreed_fingerprint(config: Config, parts: list[Arrays | SizedDataset], spec: DataSpec) -> str:
    """`fingerprint` of rank 0. Raises SettingError on every rank if another machine has other data."""
    mine = ranks.on_main(lambda: fingerprint(parts, spec))

    def compare() -> None:
        machine = os.environ.get('GROUP_RANK', '0')  # torchrun's
        if machine == '0' or os.environ['LOCAL_RANK'] != '0':
            return
        here = fingerprint(parts, spec)
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
    mark = agreed_fingerprint(config, [train, test], spec)
    train_size, test_size = (len(part[0]) if isinstance(part, tuple) else len(part) for part in (train, test))
    counts = describe_counts(config.dataset, [train, test], spec)
    ranks.print_once(counts)
    sampler = StreamSampler(train_size, config)
    test_loader = Loader(test, HeldOutSampler(test_size, config), config, spec, device, mark)
    train_loader = Loader(train, sampler, config, spec, device, mark)
    train_loader.about = '; '.join(filter(None, [counts, spec.passed_over]))
    ranks.print_once(f'  {train_loader.place()}')
    return train_loader, sampler, test_loader
