"""Checkpoints: one file of named objects, written atomically and loadable with weights_only=True.

A training checkpoint holds: config (dict), shape, num_classes, step, finished, wandb_id, network, ema, optimizer, record.
Nothing random is stored: randomness is a function of (seed, step).
"""

import dataclasses
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distributed
from config import Config, SettingError, differences
from networks import NETWORK_SETTINGS, get_network
from processes import GaussianProcess, get_process


def save(path: str | Path, **objects: Any) -> None:
    """Write objects under their names: the state_dict of what has one, plain values as they are.

    Atomic: a temporary file in the same folder, fsync, rename, fsync of the folder. A kill at any moment leaves the old
    file or the new one. Raises OSError or RuntimeError if the disk is full; the old file is then untouched.
    """
    path = Path(path)
    state = {name: value.state_dict() if hasattr(value, 'state_dict') else value for name, value in objects.items()}
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def keep(path: Path, kept: Path) -> None:
    """Keep a checkpoint under a second name, without a second copy on the disk where links are possible."""
    temporary = kept.with_name(f'.{kept.name}.{os.getpid()}.tmp')
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copy2(path, temporary)
    os.replace(temporary, kept)


def load(path: str | Path, map_location: str | torch.device = 'cpu') -> dict[str, Any]:
    """The objects of `save`, by name. Raises SettingError if the file is missing or not whole."""
    path = Path(path)
    if not path.is_file():
        raise SettingError(f'checkpoint {str(path)!r} does not exist. Pass the path of a .pt file of ckpts/<experiment_name>/.')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself would accept flipped bits
        if damaged is not None:
            raise zipfile.BadZipFile(f'bad checksum of {damaged}')
        return torch.load(path, map_location=map_location, weights_only=True)
    except PermissionError as error:
        raise SettingError(f'checkpoint {str(path)!r} cannot be read ({error}).') from error
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, pickle.UnpicklingError, LookupError, ValueError) as error:
        raise SettingError(f'checkpoint {str(path)!r} is damaged ({error}). Copy a step_N.pt of its folder over it, or delete it.') from error


def last_path(config: Config) -> Path:
    return config.run_dir / 'last.pt'


def save_run(config: Config, keep_as: int | None, **objects: Any) -> None:
    """Write the run's last.pt, with its config, and step_N.pt if this step is to be kept."""
    save(last_path(config), config=dataclasses.asdict(config), **objects)
    if keep_as is not None:
        keep(last_path(config), config.run_dir / f'step_{keep_as:07d}.pt')


def load_run(config: Config) -> dict[str, Any] | None:
    """The run's last.pt, None if it has none yet; writes config.json. The same outcome on every rank.

    Raises SettingError if the folder cannot be written, or holds a run with another config or a damaged checkpoint.
    """
    path = last_path(config)

    def prepare() -> bool:
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            for leftover in config.run_dir.glob('.*.tmp'):  # of a save that was killed
                leftover.unlink(missing_ok=True)
            found, finished = path.exists(), False
            if found:
                checkpoint = load_checkpoint(path)
                finished = checkpoint.get('finished', False) and checkpoint['step'] >= config.num_training_steps
                changed = differences(checkpoint['config'], config)
                if changed:
                    raise SettingError(
                        f'{config.run_dir} holds a run with another config (saved -> now): {"; ".join(changed)}. '
                        'Pass another --experiment_name, or the saved values to go on with it.'
                    )
            if not finished:  # a finished run keeps the settings that made its samples
                (config.run_dir / 'config.json').write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
        except OSError as error:
            raise SettingError(f'ckpt_dir={config.ckpt_dir!r} cannot be written ({error}). Pass a folder of yours as --ckpt_dir.') from error
        return found

    return distributed.on_each(lambda: load(path)) if distributed.on_main(prepare) else None


def load_weights(network: nn.Module, weights: dict[str, Any], saved_config: dict[str, Any], config: Config, path: str | Path) -> None:
    """Copy `weights` into `network`. Raises SettingError, with the first setting that differs, if they do not fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        changed = differences(saved_config, config, only=NETWORK_SETTINGS) or [str(error).splitlines()[-1].strip()]
        raise SettingError(f'checkpoint {str(path)!r} is of another network: {changed[0]} (checkpoint -> now). Use the value of the checkpoint.') from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """`load` of a training checkpoint. Raises SettingError if it is something else."""
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or 'config' not in checkpoint:
        raise SettingError(f'{str(path)!r} is not a checkpoint of this program. Pass a .pt file of ckpts/<experiment_name>/.')
    return checkpoint


def best_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The weights of the first moving average, the raw ones if there is none."""
    averages = checkpoint['ema']['networks']
    return next(iter(averages.values())) if averages else checkpoint['network']


def config_of(checkpoint: dict[str, Any], config_class: type[Config] = Config) -> Config:
    """The config of a checkpoint; settings that `config_class` does not have are left out."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in checkpoint['config'].items() if name in names})


def load_for_sampling(path: str | Path, device: str | torch.device = 'cpu', config_class: type[Config] = Config) -> tuple[nn.Module, GaussianProcess, Config]:
    """(network, process, config) ready for `sampling.sample`: EMA weights, eval mode. Raises SettingError.

    Pass the experiment's own `config_class` if its network or process reads settings of its own.
    """
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, config_class)
    network = get_network(config, tuple(checkpoint['shape']), checkpoint['num_classes'])
    load_weights(network, best_weights(checkpoint), checkpoint['config'], config, path)
    return network.to(device).eval().requires_grad_(False), get_process(config), config
