"""The folder of a run: its name, its lock, and the checkpoint that the run resumes from.

It contains last.pt, the checkpoints before it (last-1.pt, ...), step_N.pt, config.json and a lock, as well as the
record (logging_utils.py, run_record.py). checkpoints.py writes the checkpoints.
"""

import dataclasses
import difflib
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import saving
from config import Config, SettingError
from runtime import ranks
from runtime.files import cause_of, link_as, refuse_folder, try_lock, write_text
from runtime.ranks import print_once
from settings.same_run import SCHEDULES_WITHOUT_END, changes, in_name

T = TypeVar('T')


def last_path(config: Config) -> Path:
    return config.run_dir / 'last.pt'


def settle_name(config: Config, trainer_class: type | None = None) -> Config:
    """`config` with the name of its run. All ranks must call this together, once, after ranks.setup.

    A name that the user gave stays. A default name gets the trainer class's name appended, so that another trainer is
    another run, and, as long as the folder of that name holds another experiment's config, the settings that differ
    from it. An existing run keeps the name that an older version gave it.
    """
    if config.experiment_name != config.default_name():
        return config

    def other_in(name: str) -> dict[str, tuple] | None:
        """Setting -> (saved, now) where the run in this folder differs; None if there is none that can be compared."""
        try:
            return changes(json.loads(Path(config.ckpt_dir, name, 'config.json').read_text()), config)
        except (OSError, ValueError):  # no run, or one whose checkpoints `claim` compares
            return None

    def free_name() -> str:
        more, taken = [trainer_class.__name__] if trainer_class is not None else [], ''
        while True:
            name, older = config.default_name(*more), config.older_name(*more)
            other = other_in(name)
            if other is None and other_in(older) == {}:
                name = older
            if not other:
                if taken:
                    print_once(f'{taken}, so this run is called {name}')
                return name
            what = '; '.join(f'{setting}: {before} -> {now}' for setting, (before, now) in other.items())
            taken = taken or f'{Path(config.ckpt_dir, name)} holds a run with other settings ({what})'
            more.extend(in_name(setting, now) for setting, (_, now) in other.items())

    return dataclasses.replace(config, experiment_name=ranks.on_main(free_name))


# ---------------------------------------------------------------- its lock and its checkpoints

_locks: dict[Path, IO[str]] = {}  # kept open: the kernel releases the locks when this process ends, however it ends


def lock_run(folder: Path) -> None:
    """Keep other processes out of a run's folder as long as this one lives. Raises SettingError, which names the
    process that has the lock."""
    path = folder.resolve() / 'lock'
    file = _locks.get(path) or open(path, 'a+')  # noqa: SIM115
    has_lock = try_lock(file)
    if has_lock is False:
        file.seek(0)
        holder = file.read().strip() or 'another process'
        file.close()
        raise SettingError(f'{folder} is in use by {holder}. Wait for it or end it, or pass another --experiment_name.')
    if has_lock is None:
        print_once(f'warning: {folder} cannot be locked (its file system has no locks): start only one run in it')
    _locks[path] = file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()


def newest_intact(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that the run resumes from: last.pt, else the newest that is whole; None if there never was one.

    Raises SettingError if there are checkpoints but none is whole: a run never starts over on top of damaged files.
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
        print_once(f'{"; ".join(damaged)}: resuming from {newest[0].name}, step {newest[1]["step"]}')
    return newest


# ---------------------------------------------------------------- which run it is


@dataclass(frozen=True)
class Identity:
    """The identity of a run besides its config. run_record.identity_of makes it, and every checkpoint holds it."""

    trainer: str  # file and class, 'mine.py:MyTrainer'
    code: dict[str, str]  # name -> source text of what defines the experiment
    data: str  # fingerprint of the data set


def refuse_other(config: Config, checkpoint: dict[str, Any], identity: Identity | None = None) -> None:
    """Raise SettingError if a checkpoint is from another experiment than `config` and `identity`: another config,
    trainer class, data set, or, without same_code, other code. Entries that an older checkpoint lacks are skipped."""

    folder, saved = config.run_dir, checkpoint['config']

    def refuse(what: str, how: str, remedy: str) -> None:
        raise SettingError(
            f'{what} (saved -> now): {how}. To resume it, use {remedy}. For a new run pass another --experiment_name, '
            f'with --init_from {last_path(config)} to start it from these weights.'
        )

    if changed := changes(saved, config):
        how, remedy = '; '.join(f'{name}: {old} -> {new}' for name, (old, new) in changed.items()), 'the saved values'
        if 'num_training_steps' in changed:
            ends = f'{config.lr_schedule_type} ends at the last step, {" and ".join(SCHEDULES_WITHOUT_END)} do not'
            remedy += f' (only schedules without an end can be trained longer: {ends})'
        refuse(f'{folder} holds a run with another config', how, remedy)
    if identity is None:
        return
    trainer, data = checkpoint.get('trainer', identity.trainer), checkpoint.get('data', identity.data)
    if trainer != identity.trainer:
        how = f'{trainer} -> {identity.trainer}'
        refuse(f'{folder} holds a run of another trainer', how, "the saved trainer's script")
    if data != identity.data:
        place = 'data_path' if config.data_path or saved.get('data_path') else 'data_dir'
        what = f'{place}={getattr(config, place)!r}: the data are not those that the run in {folder} was trained on'
        refuse(what, f'{data} -> {identity.data}', 'the old data')
    diff = code_diff(checkpoint.get('code', identity.code), identity.code)
    if diff and not config.same_code:
        more = [f'... and {len(diff) - 40} more lines'] if len(diff) > 40 else []
        raise SettingError(
            f'the code of the run in {config.run_dir} has changed since its step {checkpoint["step"]}. Pass another '
            '--experiment_name for a new run, or --same_code to resume it with the code as it is now:\n'
            + '\n'.join(diff[:40] + more)
        )
    if diff:
        print_once(f'the code has changed since step {checkpoint["step"]}: with --same_code it is used as it is now')


def code_diff(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """The lines of a unified diff between the texts of these names."""
    lines: list[str] = []
    for name in {**now, **saved}:
        before, after = saved.get(name, '').splitlines(), now.get(name, '').splitlines()
        lines += difflib.unified_diff(before, after, f'{name} (saved)', f'{name} (now)', lineterm='')
    return lines


# ---------------------------------------------------------------- where a run starts

_made: set[Path] = set()  # folders that this process created


def open_folder(config: Config, identity: Identity | None = None) -> dict[str, Any] | None:
    """The run's newest checkpoint that is whole, None if it has none yet; the same outcome on every rank.

    Locks the folder and writes config.json. Raises SettingError if the folder cannot be written, is in use, holds
    another run (see refuse_other), or has only damaged checkpoints.
    """
    last = last_path(config)

    def claim_first() -> dict[str, Any] | None:
        refuse_folders(config)
        try:
            return claim(config, identity)
        except OSError as error:
            text = f'ckpt_dir={config.ckpt_dir!r} cannot be used ({cause_of(error)}).'
            raise SettingError(f'{text} Fix that, or pass another --ckpt_dir.') from error

    def refuse_elsewhere() -> None:
        if last.exists():
            raise SettingError(
                f'{last} is on {socket.gethostname()}, but not on the machine of rank 0, where a run starts. Copy the '
                'folder there, put ckpt_dir on a disk that all machines share, or pass another --experiment_name.'
            )

    found = load_on_all(last, lambda: saving.load(last), claim_first)
    return ranks.on_each(refuse_elsewhere) if found is None else found


def refuse_folders(config: Config) -> None:
    """Raise SettingError if the run's folder cannot be made or written."""
    refuse_folder('ckpt_dir', config.ckpt_dir, Path(config.ckpt_dir))
    refuse_folder('experiment_name', config.experiment_name, config.run_dir)


def claim(config: Config, identity: Identity | None) -> dict[str, Any] | None:
    """Make and lock the folder, and write config.json. The checkpoint to resume from, which then is last.pt.

    Raises OSError, and SettingError like `open_folder`.
    """
    folder, last = config.run_dir, last_path(config)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock_run(folder)
    if is_new:
        _made.add(folder)
    for leftover in folder.glob('.*.tmp'):  # from a write that was killed
        leftover.unlink(missing_ok=True)
    path, checkpoint = newest_intact(config) or (last, None)
    if checkpoint is not None:
        refuse_other(config, checkpoint, identity)
    if path != last:
        if last.exists():
            link_as(last, last.with_name('last.pt.damaged'))
        link_as(path, last)
    is_finished = checkpoint and checkpoint.get('finished', False) and checkpoint['step'] >= config.num_training_steps
    if not is_finished:  # a finished run keeps the settings that made its samples
        write_text(folder / 'config.json', json.dumps(dataclasses.asdict(config), indent=2) + '\n')
    return checkpoint


def load_on_all(path: Path, load: Callable[[], T], load_first: Callable[[], T] | None = None) -> T:
    """On every rank, the checkpoint or None that `load_first()` (default: `load`) returns on rank 0; an error there is
    raised on all ranks. The other ranks `load` it if every machine has the same file, else rank 0 sends it.
    """
    if ranks.world_size() == 1:
        return (load_first or load)()
    loaded: list[T] = []

    def first() -> tuple[int, int] | None:
        loaded.append((load_first or load)())
        return None if loaded[0] is None else mark_of(path)

    mark = ranks.on_main(first)
    if mark is not None:
        if not ranks.any_rank(not path.exists() or mark_of(path) != mark):
            return ranks.on_each(lambda: loaded[0] if loaded else load())
        print_once(f'not all machines have the {path} of {socket.gethostname()}, so it is sent to them')
    return ranks.on_main(lambda: loaded[0])


def mark_of(path: Path) -> tuple[int, int]:
    """Size and checksum of the end of a checkpoint, where a zip archive has the checksums of its entries."""
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**20))
        return size, zlib.crc32(file.read())


def discard_new(config: Config) -> None:
    """Remove the run's folder if this process created it and trained nothing: a refused run leaves nothing behind."""
    folder = config.run_dir
    empty = config.run_dir / 'metrics.jsonl'  # the rehearsal has opened it
    if empty.exists() and folder in _made and not empty.stat().st_size:
        empty.unlink()
    if folder in _made and {path.name for path in folder.iterdir()} <= {'config.json', 'run.json', 'lock'}:
        _locks.pop(folder.resolve() / 'lock').close()
        shutil.rmtree(folder)
        _made.discard(folder)
