"""Command-line flags to settings.

Later wins: field default < preset < --settings FILE < settings of the network in --init_from < debug < command line.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import SettingError, choose
from settings import help, words
from settings.same_run import class_defaults, migrated

C = TypeVar('C')
# the examples are written with =, so that `--name ` is found first where its help is
ABOUT = """Train on digits, or as the settings say. Later wins: default, preset, settings of another run, debug, flags.

  sh run.sh --preset=small_images --data_path=DIR     your images
  sh run.sh --dataset=spirals --network=mlp           other data, another network
  sh run.sh --settings=ckpts/NAME --seed=1            like another run, with another seed

With --preset NAME, the defaults are those of the preset. docs/settings.md explains the settings.
"""
# Settings that say which run it is and what is done with it, not how it trains: not taken from --settings.
OF_ONE_RUN = 'experiment_name ckpt_dir check debug same_code settings'.split()


def parse(
    argv: Sequence[str] | None,
    config_class: type[C],
    presets: Mapping[str, Mapping[str, Any]],
    debug: Mapping[str, Any],
    settings_in: Callable[[str], dict[str, Any]] | None = None,
) -> C:
    """A `config_class` from `argv` (default: `sys.argv[1:]`).

    `settings_in(path)` gives the settings that the checkpoint of --init_from holds; they replace the preset's. Raises
    SettingError for a wrong value; a wrong flag or type prints its message and exits with 2.
    """
    import tyro

    fields: Any = config_class
    argv, flags = words.read(argv, config_class, presets)
    given = {name: value[0] for name, value in flags.items() if isinstance(value, list) and value}
    path = given.get('settings', fields.settings)
    saved = read_settings(path, config_class) if path else {}
    preset, is_debug = given.get('preset', saved.get('preset', fields.preset)), flags.get('debug', fields.debug)
    values = {**choose('preset', preset, presets), **saved, 'preset': preset, 'debug': is_debug}
    init_from = given.get('init_from', values.get('init_from', fields.init_from))
    if settings_in is not None and init_from:
        values |= settings_in(init_from)
    defaults = config_class(**{**values, **(debug if is_debug else {})})
    # the name was derived from the defaults; let it be derived from the flags too
    object.__setattr__(defaults, 'experiment_name', fields.experiment_name)
    if {'-h', '--help'} & {*argv}:
        shown = help.page(config_class, defaults, presets)
        tyro.cli(shown, args=argv, use_underscores=True, description=ABOUT, config=(tyro.conf.OmitArgPrefixes,))
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(config_class, args=argv, default=defaults, use_underscores=True, description='')
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, SettingError):
            cause = cause.__context__
        if cause is not None:  # tyro would print it in a box, cut into short lines
            raise cause from None
        sys.stderr.write(shown.getvalue())
        raise


def read_settings(file: str, config_class: type) -> dict[str, Any]:
    """The settings in a JSON file, or in the config.json of a run's folder, without those in OF_ONE_RUN.

    Raises SettingError for a file that cannot be read, a setting that `config_class` lacks, a value of another type.
    """
    path = Path(file).expanduser()
    path = path / 'config.json' if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(found, dict):
            raise ValueError('not an object of settings')
    except (OSError, ValueError) as error:
        why = f'{path} cannot be read ({error}). Pass the folder of a run, or a file such as its config.json'
        raise SettingError(f'settings={file!r}: {why}.') from error
    known = class_defaults(config_class)
    if 'experiment_name' in found:  # of a run; a setting that is newer than it has its class default
        found = known | migrated(found)
    if unknown := [name for name in found if name not in known]:
        why = f'{config_class.__name__} has no {", ".join(unknown)}'
        raise SettingError(f'settings={file!r}: {why}. Start the script that has, or remove them from a copy.')
    return {name: of_type(known[name], value, f'settings={file!r}: {name}') for name, value in found.items()
            if name not in OF_ONE_RUN}  # fmt: skip


def of_type(default: Any, value: Any, where: str) -> Any:
    """A value from JSON, where tuples are lists, as a setting with this default. Raises SettingError."""
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(of_type(default[0], x, where) if default else x for x in value)
    value = float(value) if isinstance(default, float) and type(value) is int else value
    if isinstance(default, bool | int | float | str | tuple) and type(value) is not type(default):
        raise SettingError(f'{where}={value!r} is of another type than its default, {default!r}.')
    return value
