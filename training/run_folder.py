"""The folder of a run: its name, who is in it, its checkpoints, and the thread that writes them.

It holds last.pt, the saves before it (last-1.pt, ...), step_N.pt and a lock, beside the record (logging_utils.py,
run_record.py).
"""

import dataclasses
import difflib
import fcntl
import itertools
import json
import os
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import saving
from config import Config, SettingError
from runtime import ranks, stopping
from runtime.errors import SaveError
from runtime.ranks import print_once
from settings.names import in_name
from settings.same_run import changes, differences

RETRY_AFTER = (1, 3, 6)  # seconds after which a write that failed is tried again: a full disk may have room by then


def last_path(config: Config) -> Path:
    return config.run_dir / 'last.pt'


def link_as(path: Path, second: Path) -> None:
    """Keep a checkpoint under a second name, without a second copy on the disk where links are possible."""
    temporary = second.with_name(f'.{second.name}.{os.getpid()}.tmp')
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)
        os.replace(temporary, second)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if both were links to one file


def save_run(config: Config, keep_as: int | None, again: bool = False, **objects: Any) -> None:
    """Write the run's last.pt, with its config, and step_N.pt if this step is to be kept.

    The saves before it are last-1.pt (the one before), last-2.pt, ...: keep_last in all. A kill at any moment leaves
    them whole. `again`: last.pt is of the same step already, so that the ones before it stay where they are.
    """
    last = last_path(config)
    saves = [last, *(last.with_name(f'last-{i}.pt') for i in range(1, config.keep_last))]
    with saving.written_beside(last, version=saving.VERSION, config=dataclasses.asdict(config), **objects) as temporary:
        for newer, older in reversed(list(itertools.pairwise(saves))):
            if newer.exists() and not again:
                link_as(newer, older)
        os.replace(temporary, last)
    if keep_as is not None:
        link_as(last, config.run_dir / f'step_{keep_as:07d}.pt')
    for path in set(config.run_dir.glob('last-*.pt')) - set(saves):  # keep_last was higher
        path.unlink()
    saving.sync_folder(config.run_dir)


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
    """Writes a run's checkpoints in a thread, one at a time. Training waits only while the state is copied."""

    def __init__(self, config: Config):
        self.config = config
        self.copy: dict[str, Any] | None = None  # of the last state; its memory is used again: faster than new memory
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.written: int | None = None  # the step of last.pt

    def write(self, keep_as: int | None, **objects: Any) -> None:
        """Begin to write the objects as they are now, as `save_run` does. Raises the SaveError of an earlier write.

        Among them are those of the run's Identity, under the names of its fields: trainer, code and data.
        """
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
        assert self.copy is not None
        step = self.copy['step']
        for seconds in (*RETRY_AFTER, None):
            try:
                save_run(self.config, keep_as, again=self.written == step, **self.copy)
                self.written = step
                break
            except Exception as error:
                # torch raises RuntimeError for a full disk
                if seconds is None or not isinstance(error, (OSError, RuntimeError)):
                    cause = error.__context__ if isinstance(error.__context__, OSError) else error
                    self.error = SaveError(
                        f'ckpt_dir={self.config.ckpt_dir!r}: the checkpoint of step {step} cannot be written '
                        f'({cause}). Those before it in {self.config.run_dir} are untouched. Make room there, and the '
                        'same command goes on from the last of them.'
                    )
                    stopping.ask_to_stop()  # on all ranks, at the end of this step
                    break
                print_once(f'the checkpoint of step {step} could not be written ({error}); trying again in {seconds} s')
                time.sleep(seconds)


_locks: dict[Path, IO[str]] = {}  # open, so locked, until this process ends, in whatever way


def lock_run(folder: Path) -> None:
    """Keep other processes out of a run's folder for as long as this one lives. Raises SettingError, naming who is in.

    A POSIX record lock: the system takes it back from a process that dies, on shared file systems also from one on
    another machine.
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
    """The checkpoint that the run goes on from: last.pt, else the newest that is whole; None if there never was one.

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
            f'{config.run_dir} has no checkpoint that is whole: {"; ".join(damaged)}. '
            'Put back a copy of one, or pass another --experiment_name.'
        )
    if newest is not None and damaged:
        print_once(f'{"; ".join(damaged)}: going on from {newest[0].name}, step {newest[1]["step"]}')
    return newest


# ---------------------------------------------------------------- which run it is


@dataclass(frozen=True)
class Identity:
    """What a run is beside its config. run_record.identity_of makes it, and every checkpoint holds it."""

    trainer: str  # file and class, 'mine.py:MyTrainer'
    code: dict[str, str]  # name -> source text of what defines the experiment
    data: str  # fingerprint of the data set


def refuse_other(config: Config, checkpoint: dict[str, Any], identity: Identity | None = None) -> None:
    """Raise SettingError if a checkpoint is of another experiment than `config` and `identity`.

    That is another config, trainer class, data set, or, without same_code, other code. What an older checkpoint does
    not hold is not compared.
    """
    changed = differences(checkpoint['config'], config)
    if changed:
        raise SettingError(
            f'{config.run_dir} holds a run with another config (saved -> now): {"; ".join(changed)}. '
            'Pass another --experiment_name, or the saved values to go on with it.'
        )
    if identity is None:
        return
    trainer, data = checkpoint.get('trainer', identity.trainer), checkpoint.get('data', identity.data)
    if trainer != identity.trainer:
        raise SettingError(
            f'{config.run_dir} holds a run of another trainer (saved -> now): {trainer} -> {identity.trainer}. '
            'Pass another --experiment_name, or run the script of the saved one to go on with it.'
        )
    if data != identity.data:
        raise SettingError(
            f'data_dir={config.data_dir!r}: the data are not those that the run in {config.run_dir} was trained on '
            f'(saved -> now): {data} -> {identity.data}. Pass another --experiment_name, or the old data to go on.'
        )
    diff = code_diff(checkpoint.get('code', identity.code), identity.code)
    if diff and not config.same_code:
        more = [f'... and {len(diff) - 40} more lines'] if len(diff) > 40 else []
        raise SettingError(
            f'the code of the run in {config.run_dir} has changed since its step {checkpoint["step"]}. Pass another '
            '--experiment_name for a new run, or --same_code to go on with the code as it is now:\n'
            + '\n'.join(diff[:40] + more)
        )
    if diff:
        print_once(f'the code has changed since step {checkpoint["step"]}: taken as it is now, as --same_code says')


def code_diff(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """The lines of a unified diff between the texts of these names."""
    lines: list[str] = []
    for name in {**now, **saved}:
        before, after = saved.get(name, '').splitlines(), now.get(name, '').splitlines()
        lines += difflib.unified_diff(before, after, f'{name} (saved)', f'{name} (now)', lineterm='')
    return lines


def settle_name(config: Config, trainer_class: type | None = None) -> Config:
    """`config` under the name of its run. All ranks must call this together, once, after ranks.setup.

    A name that was given stays. A default one gets the class's name, so that another trainer is another run, and, as
    long as the folder of that name holds the config of another experiment, the settings that differ from that.
    """
    if config.experiment_name != config.default_name():
        return config
    more = [trainer_class.__name__] if trainer_class is not None else []

    def free_name() -> str:
        taken = ''
        while True:
            name = config.default_name(*more)
            folder = Path(config.ckpt_dir, name)
            try:
                other = changes(json.loads((folder / 'config.json').read_text()), config)
            except (OSError, ValueError):  # no run, or none that load_run could not tell by its checkpoints
                other = {}
            if not other:
                break
            what = '; '.join(f'{setting}: {before} -> {now}' for setting, (before, now) in other.items())
            taken = taken or f'{folder} holds a run with other settings ({what})'
            more.extend(in_name(setting, now) for setting, (_, now) in other.items())
        if taken:
            print_once(f'{taken}, so this run is called {name}')
        return name

    return dataclasses.replace(config, experiment_name=ranks.on_main(free_name))


# ---------------------------------------------------------------- where a run begins

_made: set[Path] = set()  # folders that this process made


def load_run(config: Config, identity: Identity | None = None) -> dict[str, Any] | None:
    """The run's newest checkpoint that is whole, None if it has none yet; the same outcome on every rank.

    Locks the folder and writes config.json. Raises SettingError if the folder cannot be written, is in use, holds
    another run (see refuse_other), or damaged checkpoints only.
    """
    loaded: list[dict[str, Any]] = []
    last = last_path(config)

    def find() -> Path | None:
        found = newest_whole(config)
        if found is None:
            return None
        refuse_other(config, found[1], identity)
        loaded.append(found[1])
        return found[0]

    def prepare() -> Path | None:
        try:
            new = not config.run_dir.exists()
            config.run_dir.mkdir(parents=True, exist_ok=True)
            lock_run(config.run_dir)
            if new:
                _made.add(config.run_dir)
            for leftover in config.run_dir.glob('.*.tmp'):  # of a save that was killed
                leftover.unlink(missing_ok=True)
            path = find()
            if path is not None and path != last:
                if last.exists():
                    link_as(last, last.with_name('last.pt.damaged'))
                link_as(path, last)
            finished = loaded and loaded[0].get('finished', False) and loaded[0]['step'] >= config.num_training_steps
            if not finished:  # a finished run keeps the settings that made its samples
                temporary = config.run_dir / '.config.json.tmp'
                temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
                os.replace(temporary, config.run_dir / 'config.json')
        except OSError as error:
            raise SettingError(
                f'ckpt_dir={config.ckpt_dir!r} cannot be written ({error}). Pass a folder of yours as --ckpt_dir.'
            ) from error
        return last if loaded else None

    def refuse_elsewhere() -> None:
        if last.exists():
            raise SettingError(
                f'{last} is on {socket.gethostname()}, and not on the machine of rank 0, where a run begins. Copy the '
                'folder there, put ckpt_dir on a disk that all machines share, or pass another --experiment_name.'
            )

    path = ranks.on_main(prepare)
    if path is None:
        return ranks.on_each(refuse_elsewhere)
    return load_on_all(path, lambda: loaded[0] if loaded else saving.load(path))


def load_on_all(path: Path, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint that `load()` gives on rank 0, on every rank; what it raises there is raised on all.

    It is read from the disk where every machine has the same file, and else sent by rank 0.
    """
    if ranks.world_size() == 1:
        return load()
    mine: list[dict[str, Any]] = []

    def load_first() -> tuple[int, int]:
        mine.append(load())
        return mark_of(path)

    mark = ranks.on_main(load_first)
    if not ranks.any_rank(not path.exists() or mark_of(path) != mark):
        return ranks.on_each(lambda: mine[0] if mine else load())
    print_once(f'not all machines have the {path} of {socket.gethostname()}, which sends it to them')
    return ranks.on_main(lambda: mine[0])


def mark_of(path: Path) -> tuple[int, int]:
    """Size and checksum of the end of a checkpoint: there, a zip archive has the checksums of all that is in it."""
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**20))
        return size, zlib.crc32(file.read())


def discard_new(config: Config) -> None:
    """Remove the run's folder if this process made it and nothing was trained in it: a refused run leaves nothing."""
    folder = config.run_dir
    if folder in _made and {path.name for path in folder.iterdir()} <= {'config.json', 'run.json', 'lock'}:
        _locks.pop(folder.resolve() / 'lock').close()
        shutil.rmtree(folder)
        _made.discard(folder)
