"""Rank, world size and agreement between processes. Every function gives the right answer with one process.

Run as a program it is the launcher that run.sh calls: torchrun with one process per GPU, or one on a CPU machine.
"""

import logging
import os
import pickle
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
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


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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


class Stopped(Exception):
    """This run was asked to stop (SIGTERM, SIGINT, ...)."""


_stop_asked = False


def _ask_to_stop(signum: int, frame: Any) -> None:
    global _stop_asked
    _stop_asked = True


def catch_stop_signals() -> None:
    """From now on SIGTERM, SIGINT, SIGHUP and SIGUSR1 only set a flag, which `raise_if_stopped` reads."""
    for name in STOP_SIGNALS:
        signal.signal(name, _ask_to_stop)


def set_outcome(code: int) -> None:
    """Tell the launcher which exit code the run is to have if a signal ends it: torchrun itself cannot say how workers ended."""
    if is_main() and 'RUN_OUTCOME_FILE' in os.environ:
        with open(os.environ['RUN_OUTCOME_FILE'], 'w') as file:
            file.write(str(code))


def raise_if_stopped() -> None:
    """Raise Stopped on every rank if any rank was asked to stop. All ranks must call this together."""
    if any_rank(_stop_asked):
        raise Stopped


def launch(argv: list[str]) -> int:
    """torchrun `argv` (a script and its flags) and return an exit code.

    NPROC: processes on this machine. TORCHRUN_ARGS: instead of --standalone, for several machines.
    The code of a worker that has said why it ends (EXIT_...) is passed on without torchrun's traceback.
    """
    os.setsid()  # Ctrl-C reaches run.sh alone, which forwards it once
    try:
        nproc = int(os.environ.get('NPROC') or max(1, torch.cuda.device_count()))
    except ValueError:
        nproc = 0
    gpus = torch.cuda.device_count()
    if nproc < 1 or (gpus and nproc > gpus):
        print(f'NPROC={os.environ["NPROC"]!r}: must be a whole number of processes, at least 1 and no more than GPUs ({gpus or "none here"}).', file=sys.stderr)
        return EXIT_BAD_SETTING
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // nproc)))  # torchrun would set 1
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # waiting threads spin so long otherwise that two programs on the same cores stall each other
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')  # without it a restart cannot meet again
    logging.disable(logging.CRITICAL)  # torchrun would report each worker's end once more; what matters is said below
    flags = shlex.split(os.environ.get('TORCHRUN_ARGS', '--standalone'))
    signals = '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1'
    with tempfile.NamedTemporaryFile('w+', prefix='outcome') as outcome:
        outcome.write(str(EXIT_STOPPED))  # until a worker begins there is nothing to lose
        outcome.flush()
        os.environ['RUN_OUTCOME_FILE'] = outcome.name
        return run_workers([*flags, f'--nproc-per-node={nproc}', signals, *argv], outcome.name)


def run_workers(arguments: list[str], outcome: str) -> int:
    """torchrun with these arguments; the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except SignalException:
        with open(outcome) as file:
            return int(file.read() or 1)
    except ChildFailedError as error:
        first_rank, failure = error.get_first_failure()
        if failure.exitcode not in (EXIT_BAD_SETTING, EXIT_NOT_FINITE, EXIT_STOPPED):
            killed = f'was killed by signal {-failure.exitcode}; is there enough memory?'
            how = killed if failure.exitcode < 0 else f'failed first (exit code {failure.exitcode}); its message is above.'
            print(f'rank {first_rank} {how}', file=sys.stderr)
            return 1
        return failure.exitcode
    return 0


if __name__ == '__main__':
    sys.exit(launch(sys.argv[1:]))
