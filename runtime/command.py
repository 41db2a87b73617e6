"""Start and end of every program of this project.

Parses the flags, runs the work, and prints an error that the user can fix once, without a traceback. The exit codes are
in runtime/errors.py; read runtime/stopping.py next.
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

# Keeps waiting OpenMP threads from spinning on shared cores. The launcher sets it for its workers; here it is for
# notebooks that import torch later.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
os.environ.setdefault('PYTORCH_ENABLE_MPS_FALLBACK', '1')  # what torch lacks for Apple's GPU runs on the CPU
# A real launcher sets LOCAL_RANK too. Without it, WORLD_SIZE and RANK come from a cluster or an earlier program, and
# torch would wait for processes that do not exist.
dropped = {} if 'LOCAL_RANK' in os.environ else {n: os.environ.pop(n, '1') for n in ('WORLD_SIZE', 'RANK')}


def options(kind: type[T], argv: Sequence[str] | None, about: str | None, *paths: str) -> T:
    """Parse the flags into the dataclass `kind`. Its fields `paths` are relative to the caller's folder."""
    import tyro

    def parse() -> Any:
        flags: Any = tyro.cli(kind, args=argv, use_underscores=True, description=about)
        resolved: dict[str, Any] = {}
        for name in paths:
            value = getattr(flags, name)
            many = isinstance(value, tuple)
            resolved[name] = tuple(map(from_caller, value)) if many else value and from_caller(value, name)
        return dataclasses.replace(flags, **resolved)

    return parsed(parse)


def parsed(parse: Callable[[], T]) -> T:
    """The result of `parse()`, which reads the flags. A wrong flag ends all processes, with one message."""
    for name in ('stdout', 'stderr'):  # run.sh sets PYTHONIOENCODING to the same effect
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a notebook's stream cannot be reconfigured
            getattr(sys, name).reconfigure(errors='backslashreplace')
    is_rank_0, printed = os.environ.get('RANK', '0') == '0', io.StringIO()
    try:
        with contextlib.nullcontext() if is_rank_0 else contextlib.redirect_stderr(printed):
            return parse()
    except (SettingError, SystemExit) as error:
        if not is_rank_0:
            if os.environ.get('LOCAL_RANK') == '0':  # this machine may have other flags or other code than rank 0
                from runtime.stopping import report_failure

                report_failure(SettingError(printed.getvalue().strip() or str(error)))
            time.sleep(5)  # torchrun ends all processes when the first one exits: let rank 0 print its message
        if isinstance(error, SystemExit):
            raise
        show(error)
        sys.exit(errors.EXIT_BAD_SETTING)


def run(do: Callable[[], None]) -> None:
    """Join the process group, `do` the work and leave the group; on failure, exit with a code of runtime/errors.py."""
    exit_code = 1
    if 'RANK' in os.environ:
        sys.stdout, sys.stderr = cast(Any, SafeStream(sys.stdout)), cast(Any, SafeStream(sys.stderr))
        # Skip torch's C++ destructors: after a process group was used, one of them occasionally aborts the process.
        # Exit handlers run in reverse order, so this one runs after all that are registered later.
        atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(exit_code)))
    from runtime import ranks, stopping  # not at the top: they import torch, and --help need not wait for it

    if dropped.get('WORLD_SIZE', '1') != '1':
        print(f'running as one process: WORLD_SIZE={dropped["WORLD_SIZE"]} without LOCAL_RANK', file=sys.stderr)
    stopping.end_with_parent()
    stopping.exit_on_stop_signals()
    error = None
    try:
        ranks.setup()
        with contextlib.redirect_stdout(cast(Any, SafeStream(sys.stdout))):  # `| head` does not end the program
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
    except DataError as failed:  # only this rank reads that file, so it exits without waiting for the others
        if not stopping.report_failure(failed):
            show(failed)
        sys.exit(1)
    except Exception as failed:
        stopping.report_failure(failed)
        raise  # without leaving the group: waiting for the other ranks there would delay the traceback
    stopping.set_outcome(exit_code)
    if error is not None and not stopping.report_failure(error):  # the launcher prints a reported error, last
        show(error)
    ranks.close(exit_code)
    stopping.limit_exit(exit_code)  # wandb's exit handler may wait for its server, or for its own process
    if exit_code:
        sys.exit(exit_code)


class SafeStream:
    """A stream whose errors are ignored: training continues when `head` or a full disk has closed it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.ignoring_errors(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self.ignoring_errors(self.stream.flush)

    def ignoring_errors(self, do: Callable[[], object]) -> None:
        with contextlib.suppress(OSError):
            try:
                do()
            except BrokenPipeError:  # discard what is still in the buffer, or Python complains when it exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def show(error: BaseException) -> None:
    """Print an error's class and text to stderr, on rank 0 only."""
    if os.environ.get('RANK', '0') == '0':
        print(f'{type(error).__name__}: {error}', file=sys.stderr, flush=True)
