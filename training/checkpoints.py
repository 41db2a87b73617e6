"""What a trainer leaves in its checkpoints, and how it goes on from them.

`trainer` is a BaseDiffusionTrainer. Its type is Any here, because `restore` gives it attributes that the class does not
declare: `identity` and `writer`.
"""

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import saving
from config import SettingError
from runtime import ranks
from runtime.ranks import print_once
from settings.same_run import differences
from training import run_folder, run_record

_reading: Path | None = None  # the checkpoint of trainers that are built now


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Trainers built meanwhile are those of a checkpoint: they lock nothing, write nothing and cannot be trained."""
    global _reading
    before, _reading = _reading, checkpoint  # one may open another, as a student its teacher
    try:
        yield
    finally:
        _reading = before


def refuse(*args: Any, **kwargs: Any) -> None:
    raise SettingError('this run was opened to read (load_run). To train it on, call `main` or run.sh with its flags.')


def objects_of(trainer: Any) -> dict[str, Any]:
    """All that a checkpoint holds beside the config, by name."""

    def others(things: dict[str, Any]) -> dict[str, Any]:
        return {name: thing.state_dict() for name, thing in things.items() if name != 'network'}

    return dict(
        shape=trainer.shape,
        num_classes=trainer.data.num_classes,
        classes=list(trainer.data.classes),
        about_data=trainer.train_loader.about,
        cond={name: tuple(value.shape[1:]) for name, value in trainer.example.cond.items()},
        step=trainer.step,
        finished=trainer.finished,
        wandb_id=trainer.wandb_id,
        bad_steps=trainer.bad_steps,
        network=trainer.network,
        ema=trainer.ema,
        optimizer=trainer.optimizers['network'],
        modules=others(trainer.modules),
        emas=others(trainer.emas),
        optimizers=others(trainer.optimizers),
        state=trainer.state(),
    )


def check_state(trainer: Any) -> None:
    """Raise SettingError if what an experiment adds to the checkpoint could be written and never be read again."""
    objects = objects_of(trainer)
    for name in ('state', 'optimizers'):
        file = io.BytesIO()
        torch.save(objects[name], file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).split('WeightsUnpickler error: ')[-1].splitlines()[0]
            raise SettingError(
                f'{type(trainer).__name__}: a checkpoint cannot hold what `{name}` gives ({reason}). It holds tensors, '
                'numbers, strings, lists and dicts of them: write float(x) for a number of numpy.'
            ) from None


def save(trainer: Any, wait: bool = False) -> None:
    """Write last.pt, and step_N.pt at every keep_every-th step: the state as it is now.

    It is written in the background unless `wait`. Raises, on every rank, SaveError if this (with `wait`) or an earlier
    write failed, and NonFiniteLoss if the run has gone bad.
    """
    trainer.bad_steps.raise_if_too_many()
    record = trainer.means.over_ranks()
    every, step = trainer.config.keep_every, trainer.step
    keep = every > 0 and step > 0 and step % every == 0

    def write() -> None:
        identity = vars(trainer.identity)  # trainer, code, data
        trainer.writer.write(keep_as=step if keep else None, **objects_of(trainer), **identity, record=record)
        if wait:
            trainer.writer.wait()

    ranks.on_main(write)


def restore(trainer: Any) -> None:
    """Go on from the run's last whole checkpoint, or begin from the weights of init_from if that is set."""
    c = trainer.config
    trainer.identity = run_record.identity_of(type(trainer), trainer.train_loader.fingerprint)
    trainer.writer = run_folder.Writer(c)
    if _reading is None:
        path, checkpoint = run_folder.last_path(c), run_folder.load_run(c, trainer.identity)
    else:
        trainer.train_loop = trainer.save = refuse
        path, checkpoint = _reading, saving.load_checkpoint(_reading)
        if checkpoint.get('data', trainer.identity.data) != trainer.identity.data:
            print_once(f'warning: {path} was trained on other data than are here now: look at dataset and data_dir')
    if checkpoint is not None:
        load(trainer, checkpoint, path)
        trainer.finished = checkpoint['finished'] and trainer.step >= c.num_training_steps
        if _reading is not None or not trainer.finished:
            print_once(f'{"resuming" if _reading is None else "reading"} {c.run_dir} at step {trainer.step}')
    elif c.init_from:
        other = run_folder.load_on_all(Path(c.init_from), lambda: saving.load_checkpoint(c.init_from))
        saving.load_weights(
            trainer.network, saving.best_weights(other), other['config'], c, c.init_from, other_classes=True
        )
        trainer.ema.reset(trainer.network)
        print_once(f'starting from the weights of {c.init_from}')
        changed = differences(other['config'], c, only=('model_type', 'time_input', 'process_name', 'sigma_data'))
        if changed:
            print_once(f'warning: they were trained with other settings (then -> now): {"; ".join(changed)}')


def load(trainer: Any, checkpoint: dict[str, Any], path: Path) -> None:
    """Put all that `objects_of` gave back in its place; `path` is for messages."""
    saving.load_weights(trainer.network, checkpoint['network'], checkpoint['config'], trainer.config, path)
    trainer.ema.load_state_dict(checkpoint['ema'])
    trainer.optimizers['network'].load_state_dict(checkpoint['optimizer'])
    for kind in ('modules', 'emas', 'optimizers'):
        saved, mine = checkpoint[kind], {k: v for k, v in getattr(trainer, kind).items() if k != 'network'}
        if saved.keys() != mine.keys():
            raise SettingError(
                f'checkpoint {str(path)!r} has {kind} {sorted(saved)} beside the network, {type(trainer).__name__} has '
                f'{sorted(mine)}. Pass another --experiment_name.'
            )
        for name, thing in mine.items():
            thing.load_state_dict(saved[name])
    trainer.load_state(checkpoint['state'])
    trainer.means.load(checkpoint['record'])
    trainer.bad_steps.load_state_dict(checkpoint['bad_steps'])
    trainer.step, trainer.wandb_id = checkpoint['step'], checkpoint['wandb_id']


def close(trainer: Any) -> None:
    """At the end of training, in whatever way it came: wait for the checkpoint that is being written."""
    trainer.writer.join()
    trainer.progress.close()
    trainer.logger.close()
    trainer.train_loader.close()
    trainer.test_loader.close()
