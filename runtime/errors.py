"""Errors that end a run on purpose, and the exit codes by which the launcher tells them apart."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar('T')

# Exit codes of a worker that has already printed why it exits: the launcher adds nothing.
EXIT_BAD_SETTING = 2
EXIT_NOT_FINITE = 3  # too many steps in a row with a NaN or infinite loss or gradient
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal and saved; the same command resumes


class SettingError(ValueError):
    """A setting that cannot work. The text names setting, value and remedy, and is printed without a traceback."""


class DataError(RuntimeError):
    """A file or item of the data that cannot be used. The text is one line, which names it.

    torch re-raises an error of a loader process with that process's traceback in front; it is cut off here.
    """

    def __init__(self, text: str):
        super().__init__(text.rpartition('DataError: ')[2].strip())


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was NaN or infinite in too many steps in a row."""


class Stopped(Exception):
    """The run received a stop signal (SIGTERM, SIGINT, ...)."""


class RankFailed(RuntimeError):
    """One rank failed in work that all ranks do together, so all ranks give up."""


class SaveError(RuntimeError):
    """A file of the run could not be written; the previous version is untouched."""


def choose(setting: str, value: str, table: Mapping[str, T]) -> T:
    """`table[value]`; raises SettingError, with the choices and the closest match, for an unknown value."""
    if value in table:
        return table[value]
    near = difflib.get_close_matches(str(value), table, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise SettingError(f'{setting}={value!r} is not a choice of --{setting}. Choose one of: {", ".join(table)}.{hint}')
