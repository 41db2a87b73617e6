"""Command-line flags to settings.

Later wins: field default < preset < settings of the network in --init_from < debug < command line.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from runtime.errors import SettingError, choose

C = TypeVar('C')


def parse(
    argv: Sequence[str] | None,
    config_class: type[C],
    presets: Mapping[str, Mapping[str, Any]],
    debug: Mapping[str, Any],
    settings_in: Callable[[str], dict[str, Any]] | None = None,
    about: str = '',
) -> C:
    """A `config_class` from `argv` (default: `sys.argv[1:]`). `about` heads the text of --help.

    `settings_in(path)` gives the settings that the checkpoint of --init_from holds; they replace the preset's. Raises
    SettingError for a wrong value; a wrong flag or type prints its message and exits with 2.
    """
    import tyro

    fields: Any = config_class
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('--preset', default=fields.preset)
    first.add_argument('--init_from', '--init-from', default=fields.init_from)
    first.add_argument('--debug', action='store_true', default=fields.debug)
    first.add_argument('--no_debug', '--no-debug', dest='debug', action='store_false')
    known, _ = first.parse_known_args(argv)

    values = {'preset': known.preset, 'debug': known.debug, **choose('preset', known.preset, presets)}
    if settings_in is not None and known.init_from:
        values |= settings_in(known.init_from)
    defaults = config_class(**{**values, **(debug if known.debug else {})})
    # the name was derived from the defaults; let it be derived from the flags too
    object.__setattr__(defaults, 'experiment_name', fields.experiment_name)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(config_class, args=argv, default=defaults, use_underscores=True, description=about)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, SettingError):
            cause = cause.__context__
        if cause is not None:  # tyro would print it in a box, cut into short lines
            raise cause from None
        sys.stderr.write(shown.getvalue())
        raise
