"""Rank, world size and agreement between processes. Every function gives the right answer with one process."""

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime import alive
from runtime.errors import SettingError

T = TypeVar('T')

_alone = ContextVar('alone', default=False)  # of each thread: a writer in the background is not meant


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not is_alone() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not is_alone() else 1


def is_main() -> bool:
    return rank() == 0


def is_alone() -> bool:
    """Whether this code runs inside `alone()`."""
    return _alone.get()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: rank 0 of 1. Collectives are local, and stop signals wait for the end.

    For work that only some ranks do, or that ranks do unequally often. `print_once` still prints on rank 0 only.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def print_once(text: str) -> None:
    """Print once, not once per process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        alive.say(text)


def setup() -> torch.device:
    """Join the process group that torchrun's variables describe, if any, and return this process's device.

    Tensors on the CPU go through gloo, also on GPU machines: agreeing on a stop then needs no CPU-GPU sync.
    Raises SettingError if there are GPUs that torch cannot use: training would go on, many times slower, on the CPU.
    """
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    gpus = torch.cuda.device_count()
    if gpus and not torch.cuda.is_available():
        raise SettingError(
            f'torch {torch.__version__} sees {gpus} GPU(s) but cannot use them: most likely the driver is too old for '
            f'its CUDA {torch.version.cuda}. Update the driver, install a torch for the CUDA that `nvidia-smi` shows, '
            "or set CUDA_VISIBLE_DEVICES='' to train on the CPU."
        )
    device = torch.device('cuda', local_rank) if torch.cuda.is_available() else torch.device('cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if 'WORLD_SIZE' in os.environ and not dist.is_initialized():
        if 'TORCHELASTIC_RUN_ID' not in os.environ:  # another launcher's, or left by one
            at = {name: os.environ.get(name) for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}
            print(f'joining the other processes, for half an hour at most: {at}', file=sys.stderr, flush=True)
        if device.type == 'cuda':
            dist.init_process_group('cpu:gloo,cuda:nccl', device_id=device)
        else:
            dist.init_process_group('gloo')
    return device


def close(code: int = 0, seconds: float = 10) -> None:
    """Leave the process group, once all have come here: leaving early closes sockets that others still read from.

    If the others do not come, because only this rank has failed, the process ends after `seconds` with code `code`.
    """
    if dist.is_initialized():
        timer = threading.Timer(seconds, os._exit, [code])
        timer.daemon = True
        timer.start()
        with suppress(RuntimeError):  # a process that is gone
            barrier()
        dist.destroy_process_group()
        timer.cancel()


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


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all processes, in order of rank. Small picklable objects only. `group` must hold all processes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def on_main(fn: Callable[[], T]) -> T:
    """The result of `fn`, run on rank 0 only and sent to all ranks; if it raises, all ranks raise its error.

    All ranks must call this together, and the others wait for rank 0, half an hour at most. So `fn` may read, write and
    compute, but not talk to other ranks: no collective, no `raise_if_stopped`. Hooks of an experiment may sample, which
    does both: use `on_main_alone` for them. The result must be picklable.
    """
    if world_size() == 1:
        return fn()
    outcome: list[Any] = list(attempt(fn)) if is_main() else [None, None]
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_main_alone(fn: Callable[[], T]) -> T:
    """`on_main`, with `fn` inside `alone()`: it may call whatever talks to other ranks elsewhere, such as `draw`."""
    return on_main(alone()(fn))


def attempt(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(result, None) of `fn`, or (None, error): only the error's text if it cannot be sent to other processes."""
    try:
        return fn(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            return None, error
        except Exception:  # reading it back calls the error's own class, which may raise anything
            return None, RuntimeError(f'{type(error).__name__}: {error}')


def on_each(fn: Callable[[], T], patient: bool = False) -> T:
    """The result of `fn`, run on every rank; if it raises on any rank, all ranks raise the first such error.

    A rank waits for the others half an hour at most, or if `patient` as long as it takes, for a download, say.
    """
    if world_size() == 1:
        return fn()
    group: Any = dist.new_group(backend='gloo', timeout=timedelta(days=30)) if patient else None
    result, error = attempt(fn)
    errors = [e for e in all_gather_objects(error, group) if e is not None]
    if group is not None:
        dist.destroy_process_group(group)
    if errors:
        raise errors[0]
    return result


def on_main_patiently(fn: Callable[[], T]) -> T:
    """`on_main`, where the others wait as long as it takes."""
    found = on_each(lambda: fn() if is_main() else None, patient=True)
    return on_main(lambda: cast(T, found))


def is_first_of_machine() -> bool:
    """Whether this is the process that writes files for all processes of its machine."""
    return is_alone() or os.environ.get('LOCAL_RANK', '0') == '0'


def cores_per_process() -> int:
    """CPU cores for each of this machine's training processes, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def in_turns(fn: Callable[[], T]) -> T:
    """The result of `fn`, run on rank 0 first, then on the first process of each other machine, whose disk may be its
    own, then on all others: one process downloads, the others find the files. What it raises is raised on all."""
    turn = 0 if is_main() else 1 if is_first_of_machine() else 2
    results = [on_each(lambda now=now: fn() if turn == now else None, patient=True) for now in range(3)]
    return cast(T, results[turn])


def my_items(n: int) -> list[int]:
    """This process's items of n: rank, rank + world size, ... The last item pads all to equal length."""
    return [min(i, n - 1) for i in range(rank(), -(-n // world_size()) * world_size(), world_size())]


def gather_items(mine: Tensor, n: int) -> Tensor:
    """(n, ...) on every process, from each one's rows `my_items(n)`."""
    if world_size() == 1:
        return mine
    mine = mine.contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(0, 1)[:n]
