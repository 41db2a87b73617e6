"""Data sets of scikit-learn and torchvision: digits, MNIST and its like, CIFAR."""

import importlib.util
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config
from data_loading.spec import Arrays
from runtime.errors import SettingError


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
                f"than torchvision's, and it {cause}. It is damaged, or was repacked, as in Debian's packages: "
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
