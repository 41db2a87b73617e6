"""Checkpoints: one file of named objects, written atomically and loadable with weights_only=True.

A training checkpoint holds: version, config (dict), shape, num_classes, step, finished, wandb_id, bad_steps, network, ema,
optimizer, record. Nothing random is stored: randomness is a function of (seed, step).
"""

import contextlib
import dataclasses
import errno
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import Config, SettingError, differences
from networks import NETWORK_SETTINGS, get_network
from processes import GaussianProcess, get_process

VERSION = 1  # of the format; a file without one is of version 1


class DamagedCheckpoint(SettingError):
    """A checkpoint that is not whole."""


def save(path: str | Path, **objects: Any) -> None:
    """Write objects under their names: the state_dict of what has one, plain values as they are.

    Atomic: a temporary file in the same folder, fsync, rename, fsync of the folder. A kill at any moment leaves the old
    file or the new one. Raises OSError or RuntimeError if the disk is full; the old file is then untouched.
    """
    path = Path(path)
    with written_beside(path, **objects) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


def states(objects: dict[str, Any]) -> dict[str, Any]:
    """The state_dict of what has one, plain values as they are."""
    return {name: value.state_dict() if hasattr(value, 'state_dict') else value for name, value in objects.items()}


@contextlib.contextmanager
def written_beside(path: Path, **objects: Any) -> Iterator[Path]:
    """A temporary file in the folder of `path` that holds the objects and is on the disk; removed at the end if it is still there."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(states(objects), file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load(path: str | Path, map_location: str | torch.device = 'cpu') -> dict[str, Any]:
    """The objects of `save`, by name. Raises SettingError if the file cannot be read, DamagedCheckpoint if it is not whole."""
    path = Path(path)
    if not path.is_file():
        raise SettingError(
            f'checkpoint {str(path)!r} does not exist. Pass the path of a .pt file of ckpts/<experiment_name>/.'
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself would accept flipped bits
            odd = [
                entry.filename
                for entry in archive.infolist()
                if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr
            ]
        if damaged is not None or odd:  # bits of the directory that checksums do not cover, but torch obeys
            raise zipfile.BadZipFile(f'bad checksum or entry of {damaged or odd[0]}')
        return torch.load(path, map_location=map_location, weights_only=True)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        LookupError,
        ValueError,
    ) as error:
        if isinstance(error, OSError) and error.errno not in (
            errno.EINVAL,
            errno.EIO,
        ):  # a seek to where a damaged file points; a bad disk
            raise SettingError(f'checkpoint {str(path)!r} cannot be read ({error}).') from error
        raise DamagedCheckpoint(
            f'checkpoint {str(path)!r} is damaged ({error}). Use another .pt file of its folder.'
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """`load` of a training checkpoint. Raises SettingError if it is of a newer version, DamagedCheckpoint if it is something else."""
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or 'config' not in checkpoint:
        raise DamagedCheckpoint(
            f'{str(path)!r} is not a checkpoint of this program. Pass a .pt file of ckpts/<experiment_name>/.'
        )
    version = checkpoint.get('version', 1)
    if version > VERSION:
        raise SettingError(
            f'checkpoint {str(path)!r} has format version {version}; this program reads up to {VERSION}. Update the program (git pull).'
        )
    return checkpoint


# ---------------------------------------------------------------- networks


def load_weights(
    network: nn.Module, weights: dict[str, Any], saved_config: dict[str, Any], config: Config, path: str | Path
) -> None:
    """Copy `weights` into `network`. Raises SettingError, with the first setting that differs, if they do not fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        changed = differences(saved_config, config, only=NETWORK_SETTINGS) or [str(error).splitlines()[-1].strip()]
        raise SettingError(
            f'checkpoint {str(path)!r} is of another network: {changed[0]} (checkpoint -> now). Use the value of the checkpoint.'
        ) from error


def best_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The weights of the first moving average, the raw ones if there is none."""
    averages = checkpoint['ema']['networks']
    return next(iter(averages.values())) if averages else checkpoint['network']


def config_of(checkpoint: dict[str, Any], config_class: type[Config] = Config) -> Config:
    """The config of a checkpoint; settings that `config_class` does not have are left out."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in checkpoint['config'].items() if name in names})


def load_for_sampling(
    path: str | Path, device: str | torch.device = 'cpu', config_class: type[Config] = Config
) -> tuple[nn.Module, GaussianProcess, Config]:
    """(network, process, config) ready for `sampling.sample`: EMA weights, eval mode. Raises SettingError.

    Pass the experiment's own `config_class` if its network or process reads settings of its own.
    """
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, config_class)
    network = get_network(config, tuple(checkpoint['shape']), checkpoint['num_classes'])
    load_weights(network, best_weights(checkpoint), checkpoint['config'], config, path)
    return network.to(device).eval().requires_grad_(False), get_process(config), config
