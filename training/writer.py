"""Writes the checkpoints of a run in a thread: training waits only while the state is copied, not for the disk."""

import dataclasses
import itertools
import threading
import time
from typing import Any

import torch
from torch import Tensor

import saving
from config import Config
from runtime import stopping
from runtime.errors import SaveError
from runtime.files import link_as, sync, whole
from runtime.ranks import print_once
from training.run_folder import last_path

RETRY_AFTER = (1, 3, 6)  # seconds after which a write that failed is tried again: a full disk may have room by then


def write_checkpoint(config: Config, objects: dict[str, Any], keep: bool = False, again: bool = False) -> None:
    """Write the run's last.pt: these plain objects, its config and the version of the format. `keep`: also step_N.pt.

    The checkpoints before it become last-1.pt (the previous one), last-2.pt, ...: keep_last in all. A kill at any
    moment leaves them whole. `again`: last.pt is already of the same step, so the previous ones keep their names.
    """
    last = last_path(config)
    names = [last, *(last.with_name(f'last-{i}.pt') for i in range(1, config.keep_last))]
    with whole(last) as temporary:
        saving.write(temporary, version=saving.VERSION, config=dataclasses.asdict(config), **objects)
        for newer, older in reversed(list(itertools.pairwise(names))):
            if newer.exists() and not again:
                link_as(newer, older)
    if keep:
        link_as(last, config.run_dir / f'step_{objects["step"]:07d}.pt')
    for path in set(config.run_dir.glob('last-*.pt')) - set(names):  # keep_last was higher
        path.unlink()
    sync(config.run_dir)


def to_host(value: Any, reuse: Any = None) -> Any:
    """A copy in main memory of tensors in dicts, lists and tuples; into the tensors of `reuse`, an earlier copy."""
    if isinstance(value, Tensor):
        layout = value.shape, value.stride(), value.dtype
        if not isinstance(reuse, Tensor) or (reuse.shape, reuse.stride(), reuse.dtype) != layout:
            reuse = torch.empty_like(value, device='cpu', pin_memory=value.is_cuda, requires_grad=False)
        return reuse.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        old = reuse if isinstance(reuse, dict) else {}
        return {name: to_host(item, old.get(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        olds = reuse if isinstance(reuse, (list, tuple)) and len(reuse) == len(value) else [None] * len(value)
        return type(value)(to_host(item, old) for item, old in zip(value, olds, strict=True))
    return value


class Writer:
    """Writes one checkpoint at a time. Only rank 0 uses it."""

    def __init__(self, config: Config):
        self.config = config
        self.copy: dict[str, Any] | None = None  # the last state; its memory is reused, which is faster than new memory
        self.thread: threading.Thread | None = None
        self.error: SaveError | None = None
        self.step: int | None = None  # the step of the last.pt that this writer has written

    def write(self, objects: dict[str, Any], keep: bool) -> None:
        """Begin to write the objects as they are now, like `write_checkpoint`. Raises SaveError if an earlier write
        failed."""
        self.wait()
        self.copy = to_host(objects, self.copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.thread = threading.Thread(target=self._write, args=(self.copy, keep))
        self.thread.start()

    def join(self) -> None:
        """Return when nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """`join`, and raise SaveError if a write failed."""
        self.join()
        if self.error is not None:
            raise self.error

    def _write(self, objects: dict[str, Any], keep: bool) -> None:
        step = objects['step']
        for seconds in (*RETRY_AFTER, None):
            try:
                write_checkpoint(self.config, objects, keep, again=self.step == step)
                self.step = step
                return
            except Exception as error:
                # torch raises RuntimeError for a full disk
                if seconds is None or not isinstance(error, (OSError, RuntimeError)):
                    cause = error.__context__ if isinstance(error.__context__, OSError) else error
                    self.error = SaveError(
                        f'ckpt_dir={self.config.ckpt_dir!r}: the checkpoint of step {step} cannot be written '
                        f'({cause}). Earlier checkpoints in {self.config.run_dir} are untouched. Make room there, and '
                        'the same command resumes from the last of them.'
                    )
                    stopping.ask_to_stop()  # on all ranks, at the end of this step
                    return
                print_once(f'the checkpoint of step {step} could not be written ({error}); trying again in {seconds} s')
                time.sleep(seconds)
