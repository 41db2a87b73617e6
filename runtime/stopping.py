"""How a process ends: signals that ask it to stop, exit codes, and what it tells the launcher."""

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime import ranks
from runtime.errors import RankFailed, Stopped

STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]

# What a rank tells the others; the greatest of all is what they agree on.
FINE, STOP_ASKED, FAILED = 0, 1, 2


_stop_asked = False
_asks_nobody = False  # see asking_nobody
_under_way: tuple[Tensor, dist.Work] | None = None  # the reduction that `poll_stop` began and has not read yet


def ask_to_stop(signum: int = 0, frame: Any = None) -> None:
    """Make the next `raise_if_stopped`, or the next but one `poll_stop`, raise on all ranks."""
    global _stop_asked
    _stop_asked = True


def die_of_stop_signals() -> None:
    """Stop signals end a process that torchrun started, at once, as long as there is nothing to save."""
    if 'RANK' in os.environ:
        for name in STOP_SIGNALS:
            signal.signal(name, signal.SIG_DFL)


def catch_stop_signals() -> None:
    """From now on, in processes that torchrun started, stop signals only set a flag, which `raise_if_stopped` reads.

    All ranks must call this together.
    """
    if 'RANK' in os.environ:  # a notebook keeps its own
        for name in STOP_SIGNALS:
            signal.signal(name, ask_to_stop)
        ranks.barrier()  # nobody trains while a signal could still end one rank alone
        set_outcome(1)  # from now on an end without a recorded outcome counts as a failure


def agree(code: int) -> int:
    """The greatest of the ranks' codes FINE, STOP_ASKED and FAILED. All ranks must call this together."""
    return int(ranks.all_reduce(torch.tensor(code), 'MAX'))


def raise_if_stopped(failed: bool = False) -> None:
    """Raise, on every rank, RankFailed if any rank passes `failed`, else Stopped if any was asked to stop.

    All ranks must call this together, and equally often. In a loop that all run through and that calls this once a
    round, a rank that cannot go on (out of memory, say) makes its next call with `failed=True`, and so ends the loop of
    all the others, which would else wait for it.
    """
    if _asks_nobody and not failed:
        return
    code = max(agree(FAILED if failed else int(_stop_asked)), finish_poll())
    if code == FAILED:
        raise RankFailed('this rank or another one failed, and all give up; the error of that rank says why')
    if code == STOP_ASKED:
        raise Stopped


@contextlib.contextmanager
def asking_nobody() -> Iterator[None]:
    """Within, `raise_if_stopped` does nothing: for work that not all ranks do, or not equally often."""
    global _asks_nobody
    _asks_nobody = True
    try:
        yield
    finally:
        _asks_nobody = False


def poll_stop() -> None:
    """`raise_if_stopped` for every training step: without waiting for the other ranks, and one step later.

    It begins to reduce this step's flags in the background and reads the reduction that the step before began. All
    ranks must call this together; they raise Stopped in the same step. With one process it raises at once.
    """
    global _under_way
    mine = torch.tensor(int(_stop_asked))
    if ranks.world_size() == 1:
        code = int(mine)
    else:
        work = dist.all_reduce(mine, dist.ReduceOp.MAX, async_op=True)
        code = finish_poll()
        _under_way = mine, work
    if code:
        finish_poll()  # nothing may be left unread when the group is left
        raise Stopped


def finish_poll() -> int:
    """What the ranks agreed on in the reduction that `poll_stop` has begun; FINE if there is none that was not read."""
    global _under_way
    if _under_way is None:
        return FINE
    (code, work), _under_way = _under_way, None
    work.wait()
    return int(code)


def set_outcome(code: int) -> None:
    """Tell the launcher the exit code of the run if a signal ends it: torchrun itself cannot say how workers ended."""
    if os.environ.get('LOCAL_RANK') == '0' and 'RUN_REPORTS' in os.environ:
        Path(os.environ['RUN_REPORTS'], 'outcome').write_text(str(code))


def report_failure(error: BaseException) -> bool:
    """Tell the launcher, if there is one, of an error and when it came: of ranks that fail, the first has the cause."""
    if 'RUN_REPORTS' not in os.environ:
        return False
    if isinstance(error, RankFailed) and error.__context__ is not None:  # the rank that failed tells why
        error = error.__context__
    text = ''.join(traceback.format_exception_only(error)).strip()
    report = dict(time=time.time(), rank=int(os.environ.get('RANK', 0)), text=text)
    Path(os.environ['RUN_REPORTS'], f'failed_{report["rank"]}').write_text(json.dumps(report))
    return True


def end_soon(code: int, seconds: int = 5) -> None:
    """End this process with `code` in `seconds` at most, whatever threads and exit handlers still wait for."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
    signal.alarm(seconds)


def end_with_parent() -> None:
    """Have this process end within a second of the process that started it, whose number is in RUN_PARENT, or of the
    launcher's order to give up (launch/meeting.py).

    Workers and launcher are in sessions of their own, so that whoever kills run.sh or the launcher does not reach them.
    They must not train on: they would hold the run's lock and write checkpoints behind the next one.
    """
    parent = int(os.environ.pop('RUN_PARENT', 0))

    give_up = Path(os.environ.get('RUN_REPORTS', '/nowhere'), 'give_up')

    def watch() -> None:
        while os.getppid() == parent and not give_up.exists():
            time.sleep(0.5)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
