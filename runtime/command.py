"""How every program of this project begins and ends.

Its flags are parsed, and an error that the user can fix is printed once, without a traceback. runtime/errors.py has the
exit codes; read runtime/stopping.py next.
"""

import atexit
import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from runtime import errors
from runtime.errors import DataError, NonFiniteLoss, SaveError, SettingError, Stopped
from runtime.files import from_caller

T = TypeVar('T')

# launch/launcher.py sets it for its workers; this is for notebooks that import torch later.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
# Whoever starts several processes sets LOCAL_RANK too. What a cluster sets, or an earlier program left, does not apply:
# torch would wait for the others.
dropped = {} if 'LOCAL_RANK' in os.environ else {n: os.environ.pop(n, '1') for n in ('WORLD_SIZE', 'RANK')}


def options(kind: type[T], argv: Sequence[str] | None, about: str | None, *paths: str) -> T:
    """The flags of a program as the dataclass `kind`. Its fields `paths` are seen from the caller's folder."""
    import tyro

    def parse() -> Any:
        made: Any = tyro.cli(kind, args=argv, use_underscores=True, description=about)
        seen: dict[str, Any] = {}
        for name in paths:
            value = getattr(made, name)
            many = isinstance(value, tuple)
            seen[name] = tuple(map(from_caller, value)) if many else value and from_caller(value, name)
        return dataclasses.replace(made, **seen)

    return parsed(parse)


def parsed(parse: Callable[[], T]) -> T:
    """The result of `parse()`, which reads the flags. A wrong flag is printed once for all processes, and exits."""
    for name in ('stdout', 'stderr'):  # run.sh does this by the environment
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a notebook's own
            getattr(sys, name).reconfigure(errors='backslashreplace')
    is_rank_0, printed = os.environ.get('RANK', '0') == '0', io.StringIO()
    try:
        with contextlib.nullcontext() if is_rank_0 else contextlib.redirect_stderr(printed):
            return parse()
    except (SettingError, SystemExit) as error:
        if not is_rank_0:
            if os.environ.get('LOCAL_RANK') == '0':  # this machine may have been given other flags or other code
                from runtime.stopping import report_failure

                report_failure(SettingError(printed.getvalue().strip() or str(error)))
            time.sleep(5)  # torchrun ends all processes when the first one exits: let rank 0 print its message
        if isinstance(error, SystemExit):
            raise
        show(error)
        sys.exit(errors.EXIT_BAD_SETTING)


def run(do: Callable[[], None]) -> None:
    """Join the other processes, `do` the work and leave them; exits with a code of runtime/errors.py, if not 0."""
    exit_code = 1
    if 'RANK' in os.environ:
        sys.stdout, sys.stderr = cast(Any, Output(sys.stdout)), cast(Any, Output(sys.stderr))
        # Skip torch's C++ destructors: in a process that had a process group, one of them aborts now and then.
        # Handlers run in reverse order, so this one comes after all that are registered from here on.
        atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(exit_code)))
    from runtime import ranks, stopping  # they import torch, and --help need not wait for it

    if dropped.get('WORLD_SIZE', '1') != '1':
        print(f'this process runs alone: WORLD_SIZE={dropped["WORLD_SIZE"]} without LOCAL_RANK', file=sys.stderr)
    stopping.end_with_parent()
    stopping.exit_on_stop_signals()
    error = None
    try:
        ranks.setup()
        do()
        exit_code = 0
    except SettingError as wrong:
        error, exit_code = wrong, errors.EXIT_BAD_SETTING
    except NonFiniteLoss as diverged:
        error, exit_code = diverged, errors.EXIT_NOT_FINITE
    except Stopped:
        exit_code = errors.EXIT_STOPPED
    except SaveError as failed:
        error = failed
    except DataError as failed:  # only this rank reads that file, so it leaves without waiting for the others
        if not stopping.report_failure(failed):
            show(failed)
        sys.exit(1)
    except Exception as failed:
        stopping.report_failure(failed)
        raise  # without leaving the group: ranks that wait for this one would block it before its traceback is shown
    stopping.set_outcome(exit_code)
    if error is not None and not stopping.report_failure(error):  # the launcher prints it, last
        show(error)
    ranks.close(exit_code)
    stopping.limit_exit(exit_code)  # wandb's exit handler waits for its server, and for its own process
    if exit_code:
        sys.exit(exit_code)


class Output:
    """A stream that may break without ending the program: training continues after `head` or a full disk closed it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def show(error: BaseException) -> None:
    """Print an error's class and text to stderr, on rank 0 only."""
    if os.environ.get('RANK', '0') == '0':
        print(f'{type(error).__name__}: {error}', file=sys.stderr, flush=True)
