"""Rank, world size and agreement between processes; how a process ends. Every function gives the right answer with one process."""

import json
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar('T')
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]

# Exit codes of a worker that has itself said why it ends, so that the launcher stays quiet.
EXIT_BAD_SETTING = 2
EXIT_NOT_FINITE = 3  # NaN loss
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: asked to stop, state saved, run me again


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def setup() -> torch.device:
    """Join the process group that torchrun's variables describe, if any, and return this process's device.

    Tensors on the CPU go through gloo, also on GPU machines: agreeing on a stop then needs no CPU-GPU sync.
    """
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    device = torch.device('cuda', local_rank) if torch.cuda.is_available() else torch.device('cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if 'WORLD_SIZE' in os.environ and not dist.is_initialized():
        on_gpu = dict(backend='cpu:gloo,cuda:nccl', device_id=device)
        dist.init_process_group(**on_gpu if device.type == 'cuda' else dict(backend='gloo'))
    return device


def close(code: int = 0, seconds: float = 10) -> None:
    """Leave the process group, once all have come here: what one leaves unread would break the connection under another.

    If the others do not come, because this rank alone has failed, the process ends after `seconds` with exit code `code`.
    """
    if dist.is_initialized():
        alone = threading.Timer(seconds, os._exit, [code])
        alone.daemon = True
        alone.start()
        with suppress(RuntimeError):  # a process that is gone
            barrier()
        dist.destroy_process_group()
        alone.cancel()


def barrier() -> None:
    """Wait for all processes, on the CPU."""
    all_reduce(torch.zeros(1))


def all_reduce(value: Tensor, op: str = 'SUM') -> Tensor:
    """`value`, reduced over the processes in place; op is SUM, MAX or MIN."""
    if world_size() > 1:
        dist.all_reduce(value, getattr(dist.ReduceOp, op))
    return value


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any process."""
    return bool(all_reduce(torch.tensor(float(flag)), 'MAX'))


def all_gather_objects(value: T) -> list[T]:
    """The processes' values, in order of rank. Small picklable objects only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(fn: Callable[[], T]) -> T:
    """The result of `fn`, run on rank 0 only and sent to all; what it raises is raised on every rank."""
    outcome: tuple[bool, Any] = (True, None)
    if is_main():
        try:
            outcome = (True, fn())
        except Exception as error:
            if world_size() == 1:
                raise
            outcome = (False, portable(error))
    if world_size() > 1:
        box = [outcome]
        dist.broadcast_object_list(box, src=0)
        outcome = box[0]
    ok, value = outcome
    if not ok:
        raise value
    return value


def portable(error: Exception) -> Exception:
    """`error`, or its text if it cannot be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')


def on_each(fn: Callable[[], T]) -> T:
    """The result of `fn`, run on every rank; if it raises on any, the first such error is raised on all."""
    result, error = None, None
    try:
        result = fn()
    except Exception as caught:
        if world_size() == 1:
            raise
        error = portable(caught)
    errors = [e for e in all_gather_objects(error) if e is not None]
    if errors:
        raise errors[0]
    return result


def share(n: int) -> list[int]:
    """This process's items of n: rank, rank + world size, ... All shares are equally long, the last item fills them up."""
    return [min(i, n - 1) for i in range(rank(), -(-n // world_size()) * world_size(), world_size())]


def gather_shares(mine: Tensor, n: int) -> Tensor:
    """(n, ...) on every process, from each one's rows `share(n)`."""
    if world_size() == 1:
        return mine
    mine = mine.contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


# ---------------------------------------------------------------- how a process ends


class Stopped(Exception):
    """This run was asked to stop (SIGTERM, SIGINT, ...)."""


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
        barrier()  # nobody trains while a signal could still end one rank alone
        set_outcome(1)  # from here on, how it ends must be said


def raise_if_stopped() -> None:
    """Raise Stopped on every rank if any rank was asked to stop. All ranks must call this together."""
    if any_rank(_stop_asked):
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
