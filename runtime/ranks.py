"""Rank, world size and collectives. Every function also works with a single process."""

import functools
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

_one_process = ContextVar('one_process', default=False)  # one value per thread: a background writer is not affected


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not acts_as_one_process() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not acts_as_one_process() else 1


def is_main() -> bool:
    return rank() == 0


def acts_as_one_process() -> bool:
    """Whether this code runs inside `as_one_process()`."""
    return _one_process.get()


@contextmanager
def as_one_process() -> Iterator[None]:
    """Inside this block the process acts as rank 0 of 1. Collectives are local; stop signals wait for its end.

    For work that only some ranks do, or that some ranks do more often. `print_once` still prints on rank 0 only.
    """
    token = _one_process.set(True)
    try:
        yield
    finally:
        _one_process.reset(token)


def print_once(text: str) -> None:
    """Print on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        alive.say(text)


print_first_time = functools.cache(print_once)  # prints each text once in this process


def setup() -> torch.device:
    """Join the process group that torchrun's variables describe, if any, and return this process's device.

    CPU tensors use gloo even with GPUs, so that agreeing on a stop needs no CPU-GPU sync. Raises SettingError if there
    are GPUs that torch cannot use: otherwise training would silently run on the CPU, many times slower.
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
    is_single, is_hidden = os.environ.get('WORLD_SIZE', '1') == '1', os.environ.get('CUDA_VISIBLE_DEVICES') == ''
    if device.type == 'cpu' and torch.backends.mps.is_available() and is_single and not is_hidden:
        device = torch.device('mps')  # gloo does not average its tensors, so several processes use the CPU
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if 'WORLD_SIZE' in os.environ and not dist.is_initialized():
        if 'TORCHELASTIC_RUN_ID' not in os.environ:  # not torchrun: another launcher, or leftover variables
            at = {name: os.environ.get(name) for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}
            print(f'joining the other processes, for half an hour at most: {at}', file=sys.stderr, flush=True)
        if device.type == 'cuda':
            dist.init_process_group('cpu:gloo,cuda:nccl', device_id=device)
        else:
            dist.init_process_group('gloo')
    return device


def close(code: int = 0, seconds: float = 10) -> None:
    """Leave the process group once all ranks are here: leaving early closes sockets that others still read from.

    If the others do not come, because only this rank has failed, exit with `code` after `seconds`.
    """
    if dist.is_initialized():
        timer = threading.Timer(seconds, os._exit, [code])
        timer.daemon = True
        timer.start()
        with suppress(RuntimeError):  # another process has already exited
            barrier()
        dist.destroy_process_group()
        timer.cancel()


def barrier() -> None:
    """Wait for all processes, on the CPU."""
    all_reduce(torch.zeros(1))


def all_reduce(value: Tensor, op: str = 'SUM') -> Tensor:
    """Reduce `value` over the processes in place, and return it; op is SUM, MAX or MIN."""
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
    """Run `fn` on rank 0 only and send its result to all ranks; if it raises, all ranks raise its error.

    All ranks must call this together, and the others wait for rank 0, half an hour at most. So `fn` may read, write and
    compute, but must not communicate: no collective, no `raise_if_stopped`. Hooks of an experiment may sample, which
    does both: use `on_main_as_one_process` for them. The result must be picklable.
    """
    if world_size() == 1:
        return fn()
    outcome: list[Any] = list(attempt(fn)) if is_main() else [None, None]
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_main_as_one_process(fn: Callable[[], T]) -> T:
    """`on_main`, with `fn` inside `as_one_process()`: it may call functions that normally communicate, as `draw`."""
    return on_main(as_one_process()(fn))


def attempt(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(result, None) of `fn`, or (None, error). An error that cannot be pickled becomes a RuntimeError of its text."""
    try:
        return fn(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            return None, error
        except Exception:  # unpickling calls the error's own class, which may raise anything
            return None, RuntimeError(f'{type(error).__name__}: {error}')


def on_each(fn: Callable[[], T], patient: bool = False) -> T:
    """Run `fn` on every rank; if it raises on any rank, all ranks raise the error of the lowest such rank.

    A rank waits for the others for half an hour at most; with `patient` as long as it takes, say for a download.
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
    """`on_main` without the time limit: the others wait as long as it takes."""
    result = on_each(lambda: fn() if is_main() else None, patient=True)
    return on_main(lambda: cast(T, result))


def is_first_of_machine() -> bool:
    """Whether this is the process that writes files for all processes of its machine."""
    return acts_as_one_process() or os.environ.get('LOCAL_RANK', '0') == '0'


def cores_per_process() -> int:
    """CPU cores for each of this machine's training processes, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def rank_0_first(fn: Callable[[], T]) -> T:
    """Run `fn` on rank 0 first, then on the first process of each other machine, which may have its own disk, then on
    the rest: one process downloads, the others find the files. An error on any rank is raised on all."""
    turn = 0 if is_main() else 1 if is_first_of_machine() else 2
    results = [on_each(lambda now=now: fn() if turn == now else None, patient=True) for now in range(3)]
    return cast(T, results[turn])


def my_items(n: int) -> list[int]:
    """Indices of this rank's share of n items: rank, rank + world size, ... The last item fills up shorter shares."""
    return [min(i, n - 1) for i in range(rank(), -(-n // world_size()) * world_size(), world_size())]


def gather_items(rows: Tensor, n: int) -> Tensor:
    """(n, ...) on every rank, assembled from each rank's rows `my_items(n)`."""
    if world_size() == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.stack(parts, 1).flatten(0, 1)[:n]
