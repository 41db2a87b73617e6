"""The table of data sets, the loading of scikit-learn's and torchvision's, and the loaders of a run.

To add your own, write an entry of DATASETS. data_loading/checks.py checks what its `load` returns, and
data_loading/loader.py decides in which order it is read.
"""

import importlib.util
import os
import urllib.error
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, SettingError, choose
from data_loading.arrays import load_arrays
from data_loading.checks import check_parts
from data_loading.hub import load_hub
from data_loading.images import load_image_folder
from data_loading.loader import HeldOutSampler, LazyLoader, Loader, StreamSampler
from data_loading.spec import Arrays, DataSpec, Part, counted
from data_loading.toy2d import TOY2D, load_points
from runtime import files, ranks


def load_digits(config: Config) -> tuple[Arrays, Arrays]:
    """scikit-learn's 1797 handwritten digits, 8x8, values 0 to 16; 1500 to train, 297 held out."""
    package = importlib.util.find_spec('sklearn')  # not imported, which would add a second to every start
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
                f"than torchvision's, and it {cause}. It is damaged, or was repacked, as in Debian's packages: "
                f'{remedy}.'
            ) from error
        raise SettingError(
            f'dataset={config.dataset!r}: it is not in data_dir={config.data_dir!r} and {cause}. '
            f'With no network, copy {wanted} from a machine that has it, or train on --dataset digits.'
        ) from error


def load_torchvision(name: str, config: Config, files: str = '') -> tuple[Any, Any, dict[str, Any]]:
    """(training part, held-out part, facts) of CIFAR, whose archive is `files`, or of a data set like MNIST."""

    def arrays(part: Any) -> Arrays:
        x, label = torch.as_tensor(part.data), torch.as_tensor(part.targets)
        return (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()), label

    train, test = from_torchvision(config, name, files or f'{name}/raw/*.gz')
    return arrays(train), arrays(test), dict(classes=tuple(train.classes))


DATASETS: dict[str, DataSpec] = {
    'digits': DataSpec(load_digits, (1, 8, 8), 10, max_value=16, flip_keeps_label=False, rotation_keeps_label=False),
    'mnist': DataSpec(
        partial(load_torchvision, 'MNIST'), (1, 28, 28), 10, flip_keeps_label=False, rotation_keeps_label=False
    ),
    'fashion_mnist': DataSpec(partial(load_torchvision, 'FashionMNIST'), (1, 28, 28), 10),
    'cifar10': DataSpec(partial(load_torchvision, 'CIFAR10', files='cifar-10-python.tar.gz'), (3, 32, 32), 10),
    'cifar100': DataSpec(partial(load_torchvision, 'CIFAR100', files='cifar-100-python.tar.gz'), (3, 32, 32), 100),
    **{name: DataSpec(partial(load_points, name), (2,), toy.num_classes, scale='float') for name, toy in TOY2D.items()},
    'image_folder': DataSpec(load_image_folder),  # shape and classes of these three are read from the files
    'arrays': DataSpec(load_arrays),
    'hub': DataSpec(load_hub),
}


def get_dataset(config: Config) -> DataSpec:
    """The entry of DATASETS; the `spec` of a Loader also has what was found while loading. Raises SettingError."""
    spec = choose('dataset', config.dataset, DATASETS)
    if (config.array_layout or config.value_range) and spec.load is not load_arrays:
        raise SettingError(
            f'array_layout={config.array_layout!r}, value_range={config.value_range}: dataset={config.dataset!r} does '
            'not read these. Leave them out, or pass --dataset arrays.'
        )
    return spec


def load_data(config: Config) -> tuple[DataSpec, Part, Part]:
    """Load and check the data: (DataSpec with shape and facts, training part, held-out part).

    If `config.held_out` is above 0, only that many held-out items are kept, the first ones.

    Rank 0 loads first, then the first process of each other machine, which may have its own data_dir, then the rest:
    one process downloads, the others find the files. Raises SettingError on every rank if the data cannot be loaded.
    """

    def load() -> tuple[DataSpec, Part, Part]:
        spec = get_dataset(config)
        folder = Path(config.data_dir)
        files.refuse_folder('data_dir', config.data_dir, folder, to_write=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            loaded = spec.load(config)
        except OSError as error:
            where = f'data_dir={config.data_dir!r}, dataset={config.dataset!r}'
            raise SettingError(
                f'{where}: loading failed ({files.cause_of(error)}). Fix that file or folder.'
            ) from error
        spec, train, test = check_parts(spec, loaded, f'dataset={config.dataset!r}')
        n = config.held_out
        if n > len(test) and not config.skip_unreadable:  # which may have left out some
            raise SettingError(f'held_out={n}: {test.name} has {len(test)} held-out images. Use a smaller --held_out.')
        return spec, train, test.first(n) if 0 < n < len(test) else test

    return ranks.rank_0_first(load)


def describe_counts(dataset: str, parts: list[Part], spec: DataSpec) -> str:
    """One line: the numbers of items and classes, how arrays were read, and how many items each class has. Names only
    the largest and the smallest of more than 12 classes."""
    shape = (
        'x'.join(map(str, spec.shape or ()))
        + (spec.reading and f' ({spec.reading})')
        + (spec.values and f', {spec.values}')
    )
    text = f'{dataset}: {len(parts[0]):,} + {len(parts[1]):,} held-out items of shape {shape}'
    if not spec.num_classes:
        return f'{text}, no classes'
    known = [labels.numpy() for part in parts if (labels := part.classes(spec)) is not None]
    counts = np.bincount(np.concatenate([*known, np.zeros(0, np.int64)]), minlength=spec.num_classes)
    names = spec.classes or [str(i) for i in range(spec.num_classes)]
    shown = [f'{name} {count}' if known else name for name, count in zip(names, counts, strict=False)]
    if len(shown) > 12 and known:
        shown = [f'largest {shown[counts.argmax()]}', f'smallest {shown[counts.argmin()]}']
    elif len(shown) > 12:
        shown[12:] = [f'and {spec.num_classes - 12} more']
    return f'{text}, {counted(spec.num_classes, "class")}: {", ".join(shown)}'


def fingerprint(parts: list[Part], spec: DataSpec) -> str:
    """A short text that identifies the data: the numbers of items and classes, and a hash of both parts.

    Hashes `spec.digest` if it is known, else the `contents` of the parts, which are all bytes of arrays.
    """
    hashed = [spec.digest] if spec.digest else [thing for part in parts for thing in part.contents()]
    hashed += spec.conditions
    sizes = '+'.join(str(len(part)) for part in parts)
    values = spec.values and f'{spec.values}, '
    return f'{sizes} items, {spec.num_classes} classes, {values}{files.digest(*hashed, size=6)}'


def agreed_fingerprint(config: Config, parts: list[Part], spec: DataSpec) -> str:
    """`fingerprint` of rank 0. Raises SettingError on every rank if another machine has other data."""
    expected = ranks.on_main(lambda: fingerprint(parts, spec))

    def compare() -> None:
        machine = os.environ.get('GROUP_RANK', '0')  # set by torchrun
        if machine != '0' and os.environ['LOCAL_RANK'] == '0' and (here := fingerprint(parts, spec)) != expected:
            raise SettingError(
                f'data_dir={config.data_dir!r}: on machine {machine} it holds other data ({here}) than on machine 0 '
                f'({expected}). Copy the data of machine 0, or share the folder.'
            )

    ranks.on_each(compare)
    return expected


def setup_data_train_and_test(
    config: Config, device: torch.device, sampler: StreamSampler | None = None
) -> tuple[Loader, StreamSampler, Loader]:
    """(train_loader, train_sampler, test_loader).

    The train loader is endless and yields this process's shards, step by step from `train_sampler.set_step`; the test
    loader yields this process's pieces of the held-out part, once, in the order of its HeldOutSampler.
    Raises SettingError if the shards cannot be split among the processes, or the data cannot be loaded or used.
    """
    processes = ranks.world_size()
    least = processes * config.accumulation_steps
    if config.batch_shards % least:
        raise SettingError(
            f'batch_shards={config.batch_shards} is not divisible by {processes} processes x '
            f'accumulation_steps={config.accumulation_steps}. Use another number of processes (NPROC), or a '
            f'--batch_shards that is a multiple of {least} and divides --global_batch_size.'
        )
    spec, train, test = load_data(config)
    if config.dequantize and (spec.scale == 'float' or spec.value_range):
        raise SettingError(
            f'dequantize=True adds noise of one grey level, and dataset={config.dataset!r} has floats. '
            'Use --no_dequantize.'
        )
    labels = train.classes(spec)
    if labels is not None:
        spec = replace(spec, counts=tuple(torch.bincount(labels, minlength=spec.num_classes).tolist()))
    counts = describe_counts(config.dataset, [train, test], spec)
    sampler = sampler or StreamSampler(0, config)
    sampler.num_images = len(train)
    train_loader = Loader(train, sampler, spec, device, config.num_workers)
    test_loader = Loader(test, HeldOutSampler(len(test), config), spec, device, config.num_workers)
    train_loader.fingerprint = test_loader.fingerprint = agreed_fingerprint(config, [train, test], spec)
    conditions = f'conditions: {spec.named_conditions}' if spec.conditions else ''
    train_loader.about = '; '.join(filter(None, [counts, conditions, spec.skipped]))
    ranks.print_once('\n'.join(filter(None, [counts, conditions])))
    untrained = [spec.classes[i] if spec.classes else i for i, number in enumerate(spec.counts) if not number]
    if untrained:
        named = f'{", ".join(map(str, untrained[:5]))}{" ..." if len(untrained) > 5 else ""}'
        ranks.print_once(
            f'warning: {len(untrained)} of {counted(spec.num_classes, "class")} have no training items ({named}). '
            'They are not learned, sampled or judged. Add items of these classes, or remove the classes.'
        )
    return train_loader, sampler, test_loader


def setup_data_later(
    config: Config, device: torch.device, checkpoint: Mapping[str, Any]
) -> tuple[Loader, StreamSampler, Loader]:
    """`setup_data_train_and_test` for a run that is opened read-only: data are loaded when something reads them.

    They are loaded now if the checkpoint, of an older version, has no `facts`. Raises SettingError.
    """
    if not checkpoint.get('facts'):
        try:
            return setup_data_train_and_test(config, device)
        except SettingError as error:
            why = 'the checkpoint is of an older version and does not describe the data, so they must be loaded'
            raise SettingError(f'{why}: {error}') from None
    sampler = StreamSampler(0, config)
    load = cache(lambda: setup_data_train_and_test(config, device, sampler))
    return LazyLoader(checkpoint, lambda: load()[0]), sampler, LazyLoader(checkpoint, lambda: load()[2])
