"""Stop signals and the end of a process: ranks agree to stop, report to the launcher, and end loader processes."""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime import ranks
from runtime.errors import DataError, RankFailed, SaveError, Stopped

STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]

# A rank sends one of these codes to the others; all act on the maximum.
FINE, STOP_ASKED, FAILED = 0, 1, 2

# Seconds of waiting for data: between checks of the stop flag, until a line is printed, until it fails. The last is
# the time limit of a collective, too.
TICK, LINE_AFTER, LIMIT = 5, 30, 1800

_stop_asked = False
_pending: tuple[Tensor, dist.Work] | None = None  # the reduction that `poll_stop` began and that is still unread


def ask_to_stop(signum: int = 0, frame: Any = None) -> None:
    """Make the next `raise_if_stopped`, or the second `poll_stop` from now, raise on all ranks."""
    global _stop_asked
    _stop_asked = True


def exit_on_stop_signals() -> None:
    """Let stop signals end a torchrun worker immediately: there is nothing to save yet."""
    if 'RANK' in os.environ:
        for name in STOP_SIGNALS:
            signal.signal(name, signal.SIG_DFL)


def catch_stop_signals() -> None:
    """From now on, a stop signal to a torchrun worker only sets a flag, which `raise_if_stopped` reads.

    All ranks must call this together.
    """
    if 'RANK' in os.environ:  # a notebook keeps its own signal handlers
        for name in STOP_SIGNALS:
            signal.signal(name, ask_to_stop)
        ranks.barrier()  # no rank may train while a signal could still kill another one
        set_outcome(1)  # from now on, exiting without a recorded outcome counts as a failure


def agree(code: int) -> int:
    """The maximum over ranks of the codes FINE, STOP_ASKED and FAILED. All ranks must call this together."""
    return int(ranks.all_reduce(torch.tensor(code), 'MAX'))


def raise_if_stopped(failed: bool = False) -> None:
    """Raise, on every rank, RankFailed if any rank passes `failed`, else Stopped if any received a stop signal.

    All ranks must call this together, and equally often. If all ranks run a loop that calls this once per iteration, a
    rank that cannot continue (out of memory, say) makes its next call with `failed=True`. That ends the loop on the
    other ranks too, which would otherwise wait for it.

    Inside `ranks.as_one_process()` only `failed` raises, on this rank: a stop signal waits for the next call outside.
    """
    if ranks.acts_as_one_process() and not failed:
        return
    code = max(agree(FAILED if failed else int(_stop_asked)), finish_poll())
    if code == FAILED:
        raise RankFailed('this rank or another one failed, so all ranks stop; the error of that rank says why')
    if code == STOP_ASKED:
        raise Stopped


def poll_stop() -> None:
    """`raise_if_stopped` for every training step: it does not wait for the other ranks, and acts one step later.

    Starts reducing this step's flags in the background, and reads the reduction that the previous step started. All
    ranks must call this together; they raise Stopped in the same step. With one process it raises immediately, and
    inside `ranks.as_one_process()` never.
    """
    global _pending
    if ranks.acts_as_one_process():
        return
    flag = torch.tensor(int(_stop_asked))
    if ranks.world_size() == 1:
        code = int(flag)
    else:
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        code = finish_poll()
        _pending = flag, work
    if code:
        finish_poll()  # no reduction may be pending when the process group is left
        raise Stopped


def finish_poll() -> int:
    """Wait for the reduction that `poll_stop` started last and return its code; FINE if it was read already."""
    global _pending
    if _pending is None or ranks.acts_as_one_process():
        return FINE
    (code, work), _pending = _pending, None
    work.wait()
    return int(code)


def set_outcome(code: int) -> None:
    """Write down the run's exit code for the launcher: when a signal ends the run, torchrun does not know it."""
    if os.environ.get('LOCAL_RANK') == '0' and 'RUN_REPORTS' in os.environ:
        Path(os.environ['RUN_REPORTS'], 'outcome').write_text(str(code))


def report_failure(error: BaseException) -> bool:
    """Send an error and its time to the launcher, which takes the first as the cause; False without a launcher."""
    if 'RUN_REPORTS' not in os.environ:
        return False
    if isinstance(error, RankFailed) and error.__context__ is not None:  # this rank knows why it failed
        error = error.__context__
    text = ''.join(traceback.format_exception_only(error)).strip().removeprefix('runtime.errors.')
    if isinstance(error, (DataError, SaveError)):  # the message is complete without the class name
        text = str(error)
    report = dict(time=time.time(), rank=int(os.environ.get('RANK', 0)), text=text)
    report |= dict(follows=isinstance(error, RankFailed))  # this rank only heard of the failure of another
    Path(os.environ['RUN_REPORTS'], f'failed_{report["rank"]}').write_text(json.dumps(report))
    return True


def causes(codes: dict[int, int], report_dir: Path) -> list[tuple[tuple[int, float], str]]:
    """(order, text) for each failure of a worker: the lowest order is the cause, the others follow from it.

    Killed workers come first, then reported errors by time, then errors of ranks that heard of another rank's failure
    or lost the connection to it, and last exits without a report. `codes`: rank -> exit code.
    """
    failures = []
    for rank, code in codes.items():
        if code < 0 and -code not in STOP_SIGNALS:
            memory = '; is there enough memory?' if code == -signal.SIGKILL else ''
            name = signal.Signals(-code).name
            failures.append(((0, 0.0), f'rank {rank} was killed by signal {-code} ({name}){memory}'))
        how = (
            f'signal {-code} ({signal.Signals(-code).name})' if code < 0 else f'exit code {code}; its message is above'
        )
        failures.append(((3, 0.0), f'rank {rank} failed first ({how}).'))
    for failure in [json.loads(path.read_text()) for path in report_dir.glob('failed_*')]:
        lost = any(word in failure['text'] for word in ('gloo/transport', 'ncclRemoteError'))
        order = 1 + (failure['follows'] or lost), failure['time']
        failures.append((order, f'rank {failure["rank"]} failed first: {failure["text"]}'))
    return failures


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`, even while Python waits for a lock or a socket.

    Works in the main thread only, because it uses a signal; in other threads there is no limit.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f'no answer in {seconds:g} s')

    with alarm(stop, seconds):
        yield


@contextlib.contextmanager
def alarm(handler: Callable[..., None], seconds: float, again: float = 0.0) -> Iterator[None]:
    """Call `handler` after `seconds` in the block, then every `again` seconds. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, handler)  # handler and timer of an outer alarm, which is restored below
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Wrap a wait for data: print a line every LINE_AFTER seconds, and raise DataError after LIMIT seconds.

    After a stop signal the wait lasts TICK to 2 TICK seconds more. Then a single process raises Stopped, and saves.
    Of several processes the others wait for this one's gradients, so none can save: DataError. In the main thread only.
    """
    ticks, began = [False], time.monotonic()  # for each tick: had a stop signal arrived?

    def tick(*_: Any) -> None:
        ticks.append(_stop_asked)
        seconds = time.monotonic() - began
        if ticks[-2]:  # not at the first tick after the signal: the data may still come
            if ranks.world_size() == 1:
                raise Stopped
            raise DataError(f'asked to stop while waiting for {what}: the same command resumes from the last save')
        if seconds > LIMIT:
            raise DataError(f'{what}: nothing came in {seconds / 60:.0f} minutes. Check the disk or network share.')
        if len(ticks) % (LINE_AFTER // TICK) == 1:
            print(f'... rank {ranks.rank()} is waiting for {what}: nothing for {seconds:.0f} s', flush=True)

    with alarm(tick, TICK, TICK):
        yield


def limit_exit(code: int, seconds: int = 10) -> None:
    """When this process exits, end it with `code` within `seconds`, even if other exit handlers hang."""

    def begin() -> None:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.alarm(seconds)

    atexit.register(begin)


def end_with_parent() -> None:
    """End this process within a second after its parent (process id in RUN_PARENT) ends, or the launcher gives up
    (launch/rows.py).

    Workers and launcher run in sessions of their own, so killing run.sh or the launcher does not reach them. If they
    kept training, they would hold the run's lock and overwrite the checkpoints of the next start.
    """
    parent = int(os.environ.pop('RUN_PARENT', 0))
    give_up = Path(os.environ.get('RUN_REPORTS', '/nowhere'), 'give_up')

    def watch() -> None:
        while os.getppid() == parent and not give_up.exists():
            time.sleep(0.5)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def ignore_signals_except_from_parent(worker: int) -> None:
    """In a loader process: ignore stop signals that are sent to all processes, for example by Slurm or Ctrl-C.

    They are meant for the training process, which still reads data and saves. A SIGTERM from the parent is obeyed:
    multiprocessing sends it at exit and then waits for the process without a time limit.
    """
    for name in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(name, signal.SIG_IGN)
    if hasattr(signal, 'sigtimedwait'):  # it names the sender of a signal; macOS lacks it and obeys any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process()  # not getppid(): the parent may have ended already
        assert parent is not None
        threading.Thread(target=exit_with_parent, args=(parent.pid,), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """End this process when process `parent` sends it SIGTERM, or within a second of the parent's end."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 0.5)
        if received and received.si_pid == parent:
            break
    os._exit(0)
