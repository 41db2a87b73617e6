"""Checkpoint files: named objects in one file, loadable with weights_only=True.

A training checkpoint holds:
version, config        the version of the format; the settings as a dict
trainer, code, data    what made it: 'file.py:Class', the experiment's source text, the data's fingerprint
shape, num_classes, cond                  what the network was built for
classes, about_data, facts                the names of the classes; sizes and counts as text; what sampling without the
                                          data needs: the DataSpec, has_pairs, independent, are_images
step, finished, wandb_id, bad_steps, record
network, ema, optimizer                   and modules, emas, optimizers: what an experiment adds; state: its `state()`
Nothing random is stored: randomness is a function of (seed, step). training/checkpoints.py says what goes in and how
it is restored.
"""

import dataclasses
import errno
import os
import typing
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import Config, SettingError
from prediction import ROWS
from processes import PROCESSES, GaussianProcess, get_process
from runtime.files import LOAD_ERRORS
from runtime.ranks import print_once
from settings.same_run import NETWORK_SETTINGS, differences, migrated

VERSION = 1  # version of the format; a file that names none has version 1


class DamagedCheckpoint(SettingError):
    """A checkpoint that is incomplete or corrupted."""


def write(path: Path, **objects: Any) -> None:
    """Write plain objects under their names into a new file; it is on the disk when this returns.

    Raises OSError or RuntimeError if the disk is full.
    """
    with open(path, 'wb') as file:
        torch.save(objects, file)
        file.flush()
        os.fsync(file.fileno())


def load(path: str | Path, map_location: str | torch.device = 'cpu') -> dict[str, Any]:
    """The objects of `write`, by name.

    Raises SettingError if the file cannot be read, DamagedCheckpoint if it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(
            f'checkpoint {str(path)!r} does not exist. Pass the path of a .pt file of ckpts/<experiment_name>/, or '
            'wait until this run has saved one.'
        )
    try:
        check_archive(path)
        objects = torch.load(path, map_location=map_location, weights_only=True)
        if isinstance(objects, dict) and isinstance(objects.get('config'), dict):
            objects['config'] = migrated(objects['config'])
        return objects
    except LOAD_ERRORS as error:
        # EINVAL: a seek to where a damaged file points; EIO: a bad disk
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EIO):
            raise SettingError(f'checkpoint {str(path)!r} cannot be read ({error}).') from error
        raise DamagedCheckpoint(
            f'checkpoint {str(path)!r} is damaged ({error}). Use another .pt file of its folder.'
        ) from error


def check_archive(path: Path) -> None:
    """Raise BadZipFile if bits of a torch file were flipped, which torch.load itself would accept."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        # fields of the zip directory that have no checksum but change how torch reads an entry
        odd = [e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED or e.external_attr]
    if damaged is not None or odd:
        raise zipfile.BadZipFile(f'bad checksum or entry of {damaged or odd[0]}')


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """`load` of a training checkpoint.

    Raises SettingError if it has a newer version, DamagedCheckpoint if it is something else.
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
    network: nn.Module, weights: dict[str, Any], saved_config: dict[str, Any], config: Config, path: str | Path,
    other_classes: bool = False,
) -> None:  # fmt: skip
    """Copy `weights` into `network`. Raises SettingError, which names what differs, if they do not fit.

    With `other_classes`, a class embedding for another number of classes is not copied, and there is a warning; an
    embedding of the augmentation is copied if both have one.
    """
    now, label = network.state_dict(), '.mlp_augmentation.'  # a new run may have an augmentation with a label, or none
    if other_classes:
        weights = {name: w for name, w in weights.items() if label not in name or name in now}
        weights |= {name: w for name, w in now.items() if label in name and name not in weights}
    embeddings = [name for name in weights.keys() & now.keys() if name.endswith('class_embedding.weight')]
    other = {name: now[name] for name in embeddings if weights[name].shape[0] != now[name].shape[0]}
    if other and other_classes:
        print_once(f'warning: {mismatches(weights, now)[0]}: it starts untrained, and the rest comes from {path}')
        weights = weights | other
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        ours = {field.name for field in dataclasses.fields(Config)}
        added = (saved_config.keys() | dataclasses.asdict(config).keys()) - ours  # by the experiment's config class
        changed = differences(saved_config, config, only={*NETWORK_SETTINGS, *added})
        causes = [f'{line} (checkpoint -> now)' for line in changed] + mismatches(weights, now)[:1]
        raise SettingError(
            f'checkpoint {str(path)!r} is of another network: {"; ".join(causes) or error}. '
            'Use the settings of the checkpoint, and data of the same shape, classes and conditions.'
        ) from error


def mismatches(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences of two state dicts in names and shapes, as text; another number of classes first."""
    lines = []
    for name in now | saved:
        old, new = (tuple(weights[name].shape) if name in weights else None for weights in (saved, now))
        if old is None or new is None:
            lines.append(f'{name} is missing {"in the checkpoint" if old is None else "now"}')
        elif old != new and name.endswith('class_embedding.weight') and old[1:] == new[1:]:
            rows = f'the class embedding has {old[0]} rows in the checkpoint, {new[0]} now'
            lines.insert(0, f'{rows} (one for each class and one for no label)')
        elif old != new:
            lines.append(f'{name} has shape {old} in the checkpoint, {new} now')
    return lines


def network_settings(path: str) -> dict[str, Any]:
    """The settings of a checkpoint's network, for `parse_config`: a run that starts from its weights must have them.

    Empty if there is no such file: the run itself refuses that. Raises SettingError.
    """
    if not Path(path).is_file():
        return {}
    saved = load_checkpoint(path)['config']
    return {name: saved[name] for name in (*NETWORK_SETTINGS, 'time_input', 'model_type') if name in saved}


def best_weights(checkpoint: dict[str, Any], module: str = 'network') -> dict[str, Any]:
    """The weights of a module's first moving average, or the raw weights if there is none."""
    averages = checkpoint['ema'] if module == 'network' else checkpoint['emas'].get(module, {})
    if averages.get('networks'):
        return next(iter(averages['networks'].values()))
    return checkpoint['network'] if module == 'network' else checkpoint['modules'][module]


def config_of(checkpoint: dict[str, Any], config_class: type[Config] = Config) -> Config:
    """The config of a checkpoint; settings that `config_class` does not have are left out."""
    return from_dict(config_class, checkpoint['config'])


def from_dict(kind: Any, values: dict[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict`, also for dataclasses inside; what `kind` does not have is left out."""
    hints, arguments = typing.get_type_hints(kind), {}
    for name in [field.name for field in dataclasses.fields(kind) if field.name in values]:
        arguments[name] = value = values[name]
        inner = [hint for hint in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(hint)]
        if isinstance(value, dict) and inner:  # also for a hint like `Own | None`
            arguments[name] = from_dict(inner[0], value)
    return kind(**arguments)


def load_for_sampling(
    path: str | Path, device: str | torch.device = 'cpu', config_class: type[Config] = Config
) -> tuple[nn.Module, GaussianProcess, Config]:
    """(network, process, config) ready for `sampling.sample`: EMA weights, eval mode.

    Pass the experiment's own `config_class` if its network or process reads settings of its own, and import its file
    first if that adds a network or a process to the tables. Raises SettingError.
    """
    from networks import NETWORKS, TIME_INPUTS, get_network

    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, config_class)
    # its whole text is in the checkpoint; other entries of `code` are 'file.py:Class'
    script = next((name for name in checkpoint.get('code', {}) if name.endswith('.py')), 'the script of the run')
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
