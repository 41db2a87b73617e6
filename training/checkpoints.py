"""Checkpoints of a run: what is saved, how, and back.

save      the state of everything that is held -> one dict of plain objects -> writer.py writes it in a thread
restore   run_folder.py finds the newest whole file and refuses another experiment's -> its states are put back

saving.py lists the names in a file, and reads files without a run.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import saving
from config import Config, SettingError
from runtime import ranks
from runtime.ranks import print_once
from settings.same_run import differences
from training import run_folder
from training.run_folder import Identity
from training.writer import Writer

# dicts of held objects; in the file, the state of each one's 'network' has a name of its own
GROUPS = {'modules': 'network', 'emas': 'ema', 'optimizers': 'optimizer'}


class Checkpoints:
    """Saves and restores what it holds. As a context it waits, at the end, for the file that is being written."""

    def __init__(self, config: Config, identity: Identity, held: Mapping[str, Any]):
        """`held`:

        modules, emas, optimizers   dicts of objects with state_dict and load_state_dict, which may be filled later
        record, bad_steps           objects with state_dict and load_state_dict; the record also has a wandb_id
        experiment                  an object with state and load_state
        about                       a function that returns shape, num_classes, classes, about_data and cond
        """
        self.config, self.identity, self.held = config, identity, held
        self.writer = Writer(config)
        self.read_from: Path | None = None  # the checkpoint of a run that was opened to read
        self.finished = False  # is there nothing left to train?

    # ---------------------------------------------------------------- save

    def save(self, step: int, wait: bool = False, finished: bool = False) -> None:
        """Write last.pt, and step_N.pt at every keep_every-th step: the state as it is now.

        It is written in the background unless `wait`. All ranks must call this together. Raises, on every rank,
        SaveError if this (with `wait`) or an earlier write failed, NonFiniteLoss if the run has gone bad, and
        SettingError if the run was opened to read.
        """
        self.refuse_if_read_only()
        self.held['bad_steps'].raise_if_too_many()
        objects, every = self.objects(step, finished), self.config.keep_every
        ranks.on_main(lambda: self.writer.write(objects, keep=every > 0 and step > 0 and step % every == 0))
        if wait:
            self.wait()
        self.finished = finished

    def objects(self, step: int, finished: bool) -> dict[str, Any]:
        """The content of a checkpoint without version and config. All ranks must call this together."""
        held, found = self.held, dict(self.held['about'](), step=step, finished=finished)
        found |= dict(bad_steps=held['bad_steps'].state_dict(), record=held['record'].state_dict())
        for group, name in GROUPS.items():
            found[group] = {key: thing.state_dict() for key, thing in held[group].items()}
            found[name] = found[group].pop('network')
        found |= dict(state=held['experiment'].state(), wandb_id=held['record'].wandb_id)
        return found | vars(self.identity)

    def check(self) -> None:
        """Raise SettingError if what an experiment adds could be written but not loaded again. All ranks together."""
        objects = self.objects(0, False)
        for name in ('state', 'optimizers'):
            file = io.BytesIO()
            torch.save(objects[name], file)
            file.seek(0)
            try:
                torch.load(file, weights_only=True)
            except pickle.UnpicklingError as error:
                reason = str(error).split('WeightsUnpickler error: ')[-1].splitlines()[0]
                raise SettingError(
                    f'{self._experiment}: a checkpoint cannot hold what `{name}` gives ({reason}). It holds tensors, '
                    'numbers, strings, lists and dicts of them: write float(x) for a number of numpy.'
                ) from None

    def refuse_if_read_only(self) -> None:
        """Raise SettingError if the run was opened to read."""
        if self.read_from is not None:
            raise SettingError(
                'this run was opened to read (load_run). To train it on, call `main` or run.sh with its flags.'
            )

    def wait(self) -> None:
        """Return when nothing is being written. Raises SaveError, on every rank, if a write failed."""
        ranks.on_main(self.writer.wait)

    def close(self) -> None:
        """Return when nothing is being written, in whatever way training has ended."""
        self.writer.join()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _experiment(self) -> str:  # for messages
        return type(self.held['experiment']).__name__

    # ---------------------------------------------------------------- restore

    def restore(self, read_from: str | Path | None = None) -> int:
        """Put back the state of the run's last whole checkpoint; the step to continue at. All ranks must call this.

        A new run starts at step 0, with the averaged weights of init_from if that is set. With `read_from` that
        checkpoint is loaded, and from then on nothing is locked or written. Raises SettingError if a checkpoint is from
        another experiment, and like run_folder.open_folder.
        """
        c = self.config
        if read_from is None:
            path, checkpoint = run_folder.last_path(c), run_folder.open_folder(c, self.identity)
        else:
            path = self.read_from = Path(read_from)
            checkpoint = saving.load_checkpoint(path)
            if checkpoint.get('data', self.identity.data) != self.identity.data:
                print_once(f'warning: {path} was trained on other data than are here now: look at dataset and data_dir')
        if checkpoint is None:
            if c.init_from:
                self.start_from_weights()
            return 0
        self.load(checkpoint, path)
        step = checkpoint['step']
        self.finished = checkpoint['finished'] and step >= c.num_training_steps
        if read_from is not None or not self.finished:
            print_once(f'{"resuming" if read_from is None else "reading"} {c.run_dir} at step {step}')
        return step

    def load(self, checkpoint: dict[str, Any], path: Path) -> None:
        """The inverse of `objects`; `path` is for messages."""
        held, c = self.held, self.config
        saving.load_weights(held['modules']['network'], checkpoint['network'], checkpoint['config'], c, path)
        held['emas']['network'].load_state_dict(checkpoint['ema'])
        held['optimizers']['network'].load_state_dict(checkpoint['optimizer'])
        for group in GROUPS:
            saved, added = checkpoint[group], {name: x for name, x in held[group].items() if name != 'network'}
            if saved.keys() != added.keys():
                raise SettingError(
                    f'checkpoint {str(path)!r} has {group} {sorted(saved)} besides the network, {self._experiment} has '
                    f'{sorted(added)}. Pass another --experiment_name.'
                )
            for name, thing in added.items():
                thing.load_state_dict(saved[name])
        held['experiment'].load_state(checkpoint['state'])
        for name in ('record', 'bad_steps'):
            held[name].load_state_dict(checkpoint[name])
        held['record'].wandb_id = checkpoint['wandb_id']

    def start_from_weights(self) -> None:
        """Give the network, and its moving averages, the averaged weights of init_from."""
        c, network = self.config, self.held['modules']['network']
        other = run_folder.load_on_all(Path(c.init_from), lambda: saving.load_checkpoint(c.init_from))
        saving.load_weights(network, saving.best_weights(other), other['config'], c, c.init_from, other_classes=True)
        self.held['emas']['network'].reset(network)
        print_once(f'starting from the weights of {c.init_from}')
        changed = differences(other['config'], c, only=('model_type', 'time_input', 'process_name', 'sigma_data'))
        if changed:
            print_once(f'warning: they were trained with other settings (then -> now): {"; ".join(changed)}')
