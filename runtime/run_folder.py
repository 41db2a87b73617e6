"""The folder of a run: who is in it, its checkpoints, and the thread that writes them.

It holds last.pt, the saves before it (last-1.pt, ...), step_N.pt and a lock, beside the record (logging_utils.py).
"""

import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import saving
from config import Config, SettingError, differences
from runtime import ranks, stopping
from runtime.ranks import print_once
from runtime.stopping import SaveError

RETRY_AFTER = (1, 3, 6)  # seconds after which a write that failed is tried again: a full disk may have room by then


def last_path(config: Config) -> Path:
    return config.run_dir / 'last.pt'


def keep(path: Path, kept: Path) -> None:
    """Keep a checkpoint under a second name, without a second copy on the disk where links are possible."""
    temporary = kept.with_name(f'.{kept.name}.{os.getpid()}.tmp')
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)
        os.replace(temporary, kept)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if both were links to one file


def save_run(config: Config, keep_as: int | None, again: bool = False, **objects: Any) -> None:
    """Write the run's last.pt, with its config, and step_N.pt if this step is to be kept.

    The saves before it are last-1.pt (the one before), last-2.pt, ...: keep_last in all. A kill at any moment leaves them whole.
    `again`: last.pt is of the same step already, so that the ones before it stay where they are.
    """
    last = last_path(config)
    saves = [last, *(last.with_name(f'last-{i}.pt') for i in range(1, config.keep_last))]
    with saving.written_beside(last, version=saving.VERSION, config=dataclasses.asdict(config), **objects) as temporary:
        for newer, older in reversed(list(itertools.pairwise(saves))):
            if newer.exists() and not again:
                keep(newer, older)
        os.replace(temporary, last)
    if keep_as is not None:
        keep(last, config.run_dir / f'step_{keep_as:07d}.pt')
    for path in set(config.run_dir.glob('last-*.pt')) - set(saves):  # keep_last was higher
        path.unlink()
    saving.sync_folder(config.run_dir)


def to_host(value: Any, old: Any = None) -> Any:
    """A copy in main memory of tensors in dicts, lists and tuples; into the tensors of `old`, an earlier copy, where they fit."""
    if isinstance(value, Tensor):
        fits = isinstance(old, Tensor) and (old.shape, old.stride(), old.dtype) == (
            value.shape,
            value.stride(),
            value.dtype,
        )
        host = old if fits else torch.empty_like(value, device='cpu', pin_memory=value.is_cuda, requires_grad=False)
        return host.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {name: to_host(item, old.get(name) if isinstance(old, dict) else None) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        olds = old if isinstance(old, (list, tuple)) and len(old) == len(value) else [None] * len(value)
        return type(value)(to_host(item, before) for item, before in zip(value, olds, strict=True))
    return value


class Writer:
    """Writes a run's checkpoints in a thread, one at a time. Training waits only while the state is copied to main memory."""

    def __init__(self, config: Config):
        self.config = config
        self.copy: dict[str, Any] | None = (
            None  # of the last state; its memory is used again, which is much faster than new memory
        )
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.written: int | None = None  # the step of last.pt

    def write(self, keep_as: int | None, **objects: Any) -> None:
        """Begin to write the objects as they are now, as `save_run` does. Raises the SaveError of an earlier write."""
        self.wait()
        self.copy = to_host(saving.states(objects), self.copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.thread = threading.Thread(target=self._write, args=(keep_as,))
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

    def _write(self, keep_as: int | None) -> None:
        step = self.copy['step']
        for seconds in (*RETRY_AFTER, None):
            try:
                save_run(self.config, keep_as, again=self.written == step, **self.copy)
                self.written = step
                break
            except Exception as error:
                if seconds is None or not isinstance(
                    error, (OSError, RuntimeError)
                ):  # torch reports a full disk as RuntimeError
                    cause = error.__context__ if isinstance(error.__context__, OSError) else error
                    self.error = SaveError(
                        f'ckpt_dir={self.config.ckpt_dir!r}: the checkpoint of step {step} cannot be written ({cause}). '
                        f'Those before it in {self.config.run_dir} are untouched. Make room there, and the same command goes on from the last of them.'
                    )
                    stopping.ask_to_stop()  # on all ranks, at the end of this step
                    break
                print_once(f'the checkpoint of step {step} could not be written ({error}); trying again in {seconds} s')
                time.sleep(seconds)


_locks: dict[Path, IO[str]] = {}  # open, so locked, until this process ends, in whatever way


def lock_run(folder: Path) -> None:
    """Keep other processes out of a run's folder for as long as this one lives. Raises SettingError, naming who is in.

    A POSIX record lock: the system takes it back from a process that dies, on shared file systems also from one on another machine.
    """
    path = folder.resolve() / 'lock'
    file = _locks.get(path) or open(path, 'a+')  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or 'another process'
        file.close()
        raise SettingError(
            f'{folder} is in use by {holder}. Wait for it or end it, or pass another --experiment_name.'
        ) from None
    except OSError as error:
        print_once(f'warning: {folder} cannot be locked ({error}): see to it yourself that no second run uses it')
    _locks[path] = file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()


def newest_whole(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that the run goes on from: last.pt, else the newest before it that is whole; None if there never was one.

    Raises SettingError if there are checkpoints but none is whole: a run never begins anew over its remains.
    """
    last = last_path(config)
    damaged: list[str] = []
    newest: tuple[Path, dict[str, Any]] | None = None
    for path in [last, *sorted({*config.run_dir.glob('last-*.pt'), *config.run_dir.glob('step_*.pt')})]:
        if path.exists():
            try:
                checkpoint = saving.load_checkpoint(path)
            except saving.DamagedCheckpoint as error:
                damaged.append(str(error).rpartition('. ')[0])
                continue
            if newest is None or checkpoint['step'] > newest[1]['step']:
                newest = path, checkpoint
            if path == last:
                break
    if newest is None and damaged:
        raise SettingError(
            f'{config.run_dir} has no checkpoint that is whole: {"; ".join(damaged)}. Put back a copy of one, or pass another --experiment_name.'
        )
    if damaged:
        print_once(f'{"; ".join(damaged)}: going on from {newest[0].name}, step {newest[1]["step"]}')
    return newest


def refuse_other(config: Config, checkpoint: dict[str, Any]) -> None:
    """Raise SettingError if a checkpoint is of another experiment than `config`."""
    changed = differences(checkpoint['config'], config)
    if changed:
        raise SettingError(
            f'{config.run_dir} holds a run with another config (saved -> now): {"; ".join(changed)}. '
            'Pass another --experiment_name, or the saved values to go on with it.'
        )


def load_run(config: Config) -> dict[str, Any] | None:
    """The run's newest checkpoint that is whole, None if it has none yet; locks the folder and writes config.json. The same outcome on every rank.

    Raises SettingError if the folder cannot be written, is in use, holds a run with another config, or damaged checkpoints only.
    """
    loaded: list[dict[str, Any]] = []
    last = last_path(config)

    def prepare() -> bool:
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            lock_run(config.run_dir)
            for leftover in config.run_dir.glob('.*.tmp'):  # of a save that was killed
                leftover.unlink(missing_ok=True)
            found, finished = newest_whole(config), False
            if found:
                path, checkpoint = found
                finished = checkpoint.get('finished', False) and checkpoint['step'] >= config.num_training_steps
                refuse_other(config, checkpoint)
                loaded.append(checkpoint)
                if path != last:
                    if last.exists():
                        keep(last, last.with_name('last.pt.damaged'))
                    keep(path, last)
            if not finished:  # a finished run keeps the settings that made its samples
                temporary = config.run_dir / '.config.json.tmp'
                temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
                os.replace(temporary, config.run_dir / 'config.json')
        except OSError as error:
            raise SettingError(
                f'ckpt_dir={config.ckpt_dir!r} cannot be written ({error}). Pass a folder of yours as --ckpt_dir.'
            ) from error
        return found is not None

    return ranks.on_each(lambda: loaded[0] if loaded else saving.load(last)) if ranks.on_main(prepare) else None
