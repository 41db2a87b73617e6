"""How a process ends: signals that ask it to stop, exit codes, and what it tells the launcher."""

import json
import os
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from runtime import ranks

STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]

# Exit codes of a worker that has itself said why it ends, so that the launcher stays quiet.
EXIT_BAD_SETTING = 2
EXIT_NOT_FINITE = 3  # NaN loss
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: asked to stop, state saved, run me again


class Stopped(Exception):
    """This run was asked to stop (SIGTERM, SIGINT, ...)."""


class SaveError(RuntimeError):
    """Something that a run leaves on the disk could not be written; what was there before is untouched."""


_stop_asked = False


def ask_to_stop(signum: int = 0, frame: Any = None) -> None:
    """Make the next `raise_if_stopped` raise, on all ranks."""
    global _stop_asked
    _stop_asked = True


def die_of_stop_signals() -> None:
    """Stop signals end a process that torchrun started, at once, as long as there is nothing to save."""
    if 'RANK' in os.environ:
        for name in STOP_SIGNALS:
            signal.signal(name, signal.SIG_DFL)


def catch_stop_signals() -> None:
    """From now on, in processes that torchrun started, stop signals only set a flag, which `raise_if_stopped` reads. All ranks must call this together."""
    if 'RANK' in os.environ:  # a notebook keeps its own
        for name in STOP_SIGNALS:
            signal.signal(name, ask_to_stop)
        ranks.barrier()  # nobody trains while a signal could still end one rank alone
        set_outcome(1)  # from here on, how it ends must be said


def raise_if_stopped() -> None:
    """Raise Stopped on every rank if any rank was asked to stop. All ranks must call this together."""
    if ranks.any_rank(_stop_asked):
        raise Stopped


def set_outcome(code: int) -> None:
    """Tell the launcher which exit code the run is to have if a signal ends it: torchrun itself cannot say how workers ended."""
    if os.environ.get('LOCAL_RANK') == '0' and 'RUN_REPORTS' in os.environ:
        Path(os.environ['RUN_REPORTS'], 'outcome').write_text(str(code))


def report_failure(error: BaseException) -> bool:
    """Tell the launcher, if there is one, of an error and when it came: of several ranks that fail, the first has the cause."""
    if 'RUN_REPORTS' not in os.environ:
        return False
    text = ''.join(traceback.format_exception_only(error)).strip()
    report = dict(time=time.time(), rank=int(os.environ.get('RANK', 0)), text=text)
    Path(os.environ['RUN_REPORTS'], f'failed_{report["rank"]}').write_text(json.dumps(report))
    return True


def end_soon(code: int, seconds: int = 5) -> None:
    """End this process with `code` in `seconds` at most, whatever threads and exit handlers still wait for."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
    signal.alarm(seconds)


def end_with_parent() -> None:
    """Have this process killed within a second of the process that started it, whose number is in RUN_PARENT.

    Workers and launcher are in sessions of their own, so that whoever kills run.sh or the launcher does not reach them.
    They must not train on: they would hold the run's lock and write checkpoints behind the next one.
    """
    parent = int(os.environ.pop('RUN_PARENT', 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
