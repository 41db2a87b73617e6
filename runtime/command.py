"""How every program of this project begins and ends: its flags are read, and what the user can mend is said once,
without a traceback. Exit codes are those of runtime/stopping.py."""

import atexit
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from config import SettingError

T = TypeVar('T')

# As launch/launcher.py does for its workers: of use in a notebook, if torch is imported later.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')


def parsed(parse: Callable[[], T]) -> T:
    """What `parse` makes of the flags; a wrong one is said once, not once for each process, and ends the program."""
    is_rank_0, said = os.environ.get('RANK', '0') == '0', io.StringIO()
    try:
        with contextlib.nullcontext() if is_rank_0 else contextlib.redirect_stderr(said):
            return parse()
    except (SettingError, SystemExit) as error:
        if not is_rank_0:
            if os.environ.get('LOCAL_RANK') == '0':  # on its machine alone the flags, or the code, may be others
                from runtime.stopping import report_failure

                report_failure(SettingError(said.getvalue().strip() or str(error)))
            time.sleep(5)  # the first process must have said it before torchrun ends all for the first that leaves
        if isinstance(error, SystemExit):
            raise
        show(error)
        sys.exit(2)  # EXIT_BAD_SETTING


def run(do: Callable[[], None], undo: Callable[[], None] = lambda: None) -> None:
    """Join the other processes, `do` the work and end, with `undo` if a setting was wrong."""
    exit_code = 1
    if 'RANK' in os.environ:
        sys.stdout, sys.stderr = cast(Any, Output(sys.stdout)), cast(Any, Output(sys.stderr))
        # Leave out the C++ destructors of torch: one of them aborts now and then in a process that had a process group.
        # (Registered early, so run late: after what registers itself from here on.)
        atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(exit_code)))
    from runtime import errors, ranks, stopping  # they import torch, which --help need not wait for

    stopping.end_with_parent()
    stopping.die_of_stop_signals()
    from runtime.errors import DataError, NonFiniteLoss

    error = None
    try:
        ranks.setup()
        do()
        exit_code = 0
    except SettingError as bad:
        undo()
        error, exit_code = bad, errors.EXIT_BAD_SETTING
    except NonFiniteLoss as diverged:
        error, exit_code = diverged, errors.EXIT_NOT_FINITE
    except errors.Stopped:
        exit_code = errors.EXIT_STOPPED
    except errors.SaveError as failed:
        error = failed
    except DataError as failed:  # a file, read by this rank alone: it leaves without waiting for the others
        if not stopping.report_failure(failed):
            show(failed)
        sys.exit(1)
    except Exception as failed:
        stopping.report_failure(failed)
        raise  # without leaving the group: ranks that wait for this one would block it before its traceback is shown
    stopping.set_outcome(exit_code)
    if error is not None and not (stopping.report_failure(error) and exit_code == 1):  # which the launcher shows last
        show(error)
    ranks.close(exit_code)
    if getattr(sys.modules.get('logging_utils'), 'wandb_hangs', False):
        stopping.end_soon(exit_code)
    if exit_code:
        sys.exit(exit_code)


class Output:
    """A stream that may break without ending the program: a run trains on where `head` or a full disk took it."""

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


def show(message: BaseException) -> None:
    """Say why it ends, on the first process."""
    if os.environ.get('RANK', '0') == '0':
        print(f'{type(message).__name__}: {message}', file=sys.stderr, flush=True)
