"""Checkpoints: one file of named objects, written atomically and loadable with weights_only=True.

A training checkpoint holds:
version, config        of the format; the settings, as a dict
trainer, code, data    what made it: 'file.py:Class', the experiment's source text, the data's fingerprint
shape, num_classes, cond                  what the network was built for
classes, about_data                       the names of the classes; sizes and counts in words
step, finished, wandb_id, bad_steps, record
network, ema, optimizer                   and modules, emas, optimizers: what an experiment adds; state: its `state()`
Nothing random is stored: randomness is a function of (seed, step).
"""

import contextlib
import dataclasses
import errno
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config import Config, SettingError
from ema import posthoc_mixture
from networks import NETWORK_SETTINGS, NETWORKS, TIME_INPUTS, get_network
from prediction import ROWS
from processes import PROCESSES, GaussianProcess, get_process
from runtime.ranks import print_once
from settings.same_run import differences, migrated

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
    """A temporary file in the folder of `path` that holds the objects and is on the disk.

    It is removed at the end if it is still there.
    """
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
    """The objects of `save`, by name.

    Raises SettingError if the file cannot be read, DamagedCheckpoint if it is not whole.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(
            f'checkpoint {str(path)!r} does not exist. Pass the path of a .pt file of ckpts/<experiment_name>/, or '
            'wait until this run has saved one.'
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself would accept flipped bits
            odd = [
                entry.filename
                for entry in archive.infolist()
                if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr
            ]
        if damaged is not None or odd:  # zip directory fields without a checksum that change how torch reads an entry
            raise zipfile.BadZipFile(f'bad checksum or entry of {damaged or odd[0]}')
        found = torch.load(path, map_location=map_location, weights_only=True)
        if isinstance(found, dict) and isinstance(found.get('config'), dict):
            found['config'] = migrated(found['config'])
        return found
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
        # EINVAL: a seek to where a damaged file points; EIO: a bad disk
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EIO):
            raise SettingError(f'checkpoint {str(path)!r} cannot be read ({error}).') from error
        raise DamagedCheckpoint(
            f'checkpoint {str(path)!r} is damaged ({error}). Use another .pt file of its folder.'
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """`load` of a training checkpoint.

    Raises SettingError if it is of a newer version, DamagedCheckpoint if it is something else.
    """
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or 'config' not in checkpoint:
        raise DamagedCheckpoint(
            f'{str(path)!r} is not a checkpoint of this program. Pass a .pt file of ckpts/<experiment_name>/.'
        )
    version = checkpoint.get('version', 1)
    if version > VERSION:
        raise SettingError(
            f'checkpoint {str(path)!r} has format version {version}; this program reads up to {VERSION}. '
            'Update the program (git pull).'
        )
    return checkpoint


# ---------------------------------------------------------------- networks


def load_weights(
    network: nn.Module,
    weights: dict[str, Any],
    saved_config: dict[str, Any],
    config: Config,
    path: str | Path,
    other_classes: bool = False,
) -> None:
    """Copy `weights` into `network`. Raises SettingError, which names what differs, if they do not fit.

    With `other_classes` the class embedding of another number of classes is left as it is in `network`, and said so.
    """
    now = network.state_dict()
    other = [
        name
        for name in weights.keys() & now.keys()
        if name.endswith('class_embedding.weight') and weights[name].shape[0] != now[name].shape[0]
    ]
    if other and other_classes:
        print_once(f'warning: {misfits(weights, now)[0]}: it begins anew, and the rest comes from {path}')
        weights = weights | {name: now[name] for name in other}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        usual = {field.name for field in dataclasses.fields(Config)}
        own = (saved_config.keys() | dataclasses.asdict(config).keys()) - usual  # of the experiment's config class
        changed = differences(saved_config, config, only={*NETWORK_SETTINGS, *own})
        causes = [f'{line} (checkpoint -> now)' for line in changed] + misfits(weights, network.state_dict())[:1]
        raise SettingError(
            f'checkpoint {str(path)!r} is of another network: {"; ".join(causes) or error}. '
            'Use the settings of the checkpoint, and data of the same shape, classes and conditions.'
        ) from error


def misfits(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two state dicts in names and shapes, in words; another number of classes first."""
    found = []
    for name in now | saved:
        old, new = (tuple(weights[name].shape) if name in weights else None for weights in (saved, now))
        if old is None or new is None:
            found.append(f'{name} is missing {"in the checkpoint" if old is None else "now"}')
        elif old != new and name.endswith('class_embedding.weight') and old[1:] == new[1:]:
            rows = f'the class embedding has {old[0]} rows in the checkpoint, {new[0]} now'
            found.insert(0, f'{rows} (one for each class and one for no label)')
        elif old != new:
            found.append(f'{name} has shape {old} in the checkpoint, {new} now')
    return found


def network_settings(path: str) -> dict[str, Any]:
    """The settings of the network in a checkpoint, for `parse_config`: a run that begins with its weights must have
    them. None of them if there is no such file, which the run will say itself. Raises SettingError."""
    if not Path(path).is_file():
        return {}
    saved = load_checkpoint(path)['config']
    return {name: saved[name] for name in (*NETWORK_SETTINGS, 'time_input', 'model_type') if name in saved}


def best_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The weights of the first moving average, the raw ones if there is none."""
    averages = checkpoint['ema']['networks']
    return next(iter(averages.values())) if averages else checkpoint['network']


POSTHOC = 'posthoc_'  # posthoc_0.1: weights by the name of their relative width


def posthoc_weights(checkpoint: Path, name: str, network: nn.Module) -> dict[str, Any]:
    """Averaged weights of `network` of a length chosen after training: `name` is posthoc_WIDTH, WIDTH the standard
    deviation of the averaged steps in units of the training so far, as 0.1. They are mixed from all averages in the
    run's checkpoints up to this one (ema.posthoc_mixture), and how well that went is printed. Buffers are those of the
    checkpoint.

    Raises SettingError if the name is not such, or there are too few averages for this width.
    """
    width = float(name.removeprefix(POSTHOC)) if re.fullmatch(r'posthoc_0?[.]\d+', name) else 0.0
    if not 0.01 <= width <= 0.25:
        raise SettingError(f'weights={name!r}: write posthoc_ and a width from 0.01 to 0.25, such as posthoc_0.1.')
    last = load_checkpoint(checkpoint)
    n = last['ema']['num_updates']
    others = sorted({*checkpoint.parent.glob('step_*.pt'), *checkpoint.parent.glob('last*.pt')} - {checkpoint})
    saved: dict[tuple[float, int], Path] = {}
    for path in [*others, checkpoint]:
        ema = (last if path == checkpoint else load_checkpoint(path))['ema']
        if 0 < ema['num_updates'] <= n:
            saved |= {(decay, ema['num_updates']): path for decay in (0.0, *ema['networks'])}
    keys = list(saved)
    factors, error = posthoc_mixture(keys, width, n) if len(keys) > 1 else (np.ones(1), 1.0)
    print_once(f'{name}: {len(keys)} averages of {checkpoint.parent} come within {error:.1%} of this profile')
    if error > 0.3:
        raise SettingError(
            f'weights={name!r}: the averages in {checkpoint.parent} give this profile with an error of {error:.0%}. '
            'Choose another width, or save more in training: a lower --keep_every, or --ema_decays as long as that.'
        )
    mixed = {key for key, _ in network.named_parameters(remove_duplicate=False)}
    total = {key: value.double() * 0 if key in mixed else value for key, value in last['network'].items()}
    for path in dict.fromkeys(saved.values()):
        found = last if path == checkpoint else load_checkpoint(path)
        for (decay, updates), factor in zip(keys, factors, strict=True):
            if saved[decay, updates] == path:
                weights = found['ema']['networks'][decay] if decay else found['network']
                for key in mixed:
                    total[key] = total[key] + factor * weights[key].double()
    return {key: value.to(last['network'][key].dtype) for key, value in total.items()}


def config_of(checkpoint: dict[str, Any], config_class: type[Config] = Config) -> Config:
    """The config of a checkpoint; settings that `config_class` does not have are left out."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in checkpoint['config'].items() if name in names})


def load_for_sampling(
    path: str | Path, device: str | torch.device = 'cpu', config_class: type[Config] = Config
) -> tuple[nn.Module, GaussianProcess, Config]:
    """(network, process, config) ready for `sampling.sample`: EMA weights, eval mode.

    Pass the experiment's own `config_class` if its network or process reads settings of its own, and import its file
    first if that adds a network or a process to the tables. Raises SettingError.
    """
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, config_class)
    script = (checkpoint.get('trainer') or '').rpartition(':')[0]
    if script in ('', 'trainer.py'):  # not known, or one of this repo
        script = 'the script of the run'
    tables = dict(network=NETWORKS, time_input=TIME_INPUTS, process_name=PROCESSES, model_type=ROWS)
    for setting, table in tables.items():
        value = getattr(config, setting)
        if value not in table:
            raise SettingError(
                f'checkpoint {str(path)!r}: {setting}={value!r} is registered by {script}: import that file first. '
                f'Known without it: {", ".join(table)}.'
            )
    try:
        process = get_process(config)
        network = get_network(config, tuple(checkpoint['shape']), checkpoint['num_classes'], checkpoint.get('cond'))
    except AttributeError as error:
        if error.obj is not config or error.name not in checkpoint['config']:
            raise
        raise SettingError(
            f'checkpoint {str(path)!r}: its network or process reads the setting {error.name!r}, which '
            f'{config_class.__name__} does not have. Pass config_class, the config class of {script}.'
        ) from error
    load_weights(network, best_weights(checkpoint), checkpoint['config'], config, path)
    return network.to(device).eval().requires_grad_(False), process, config
