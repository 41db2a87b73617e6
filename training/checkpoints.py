"""Checkpoints of a run: what is saved, how it is written, and how it is restored.

save      the states of all held objects -> one dict of plain objects -> `Writer` writes it in a thread
restore   run_folder.py finds the newest whole file and refuses another experiment's -> the states are loaded

saving.py lists the names in a file, and reads files without a run.
"""

import dataclasses
import io
import itertools
import pickle
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saving
from config import Config, SettingError
from runtime import ranks, stopping
from runtime.errors import SaveError
from runtime.files import atomic_write, cause_of, link_as, sync
from runtime.ranks import print_once
from settings.same_run import differences
from training import run_folder
from training.run_folder import Identity, last_path

# dict of held objects -> name in the file for the state of its 'network'
GROUPS = {'modules': 'network', 'emas': 'ema', 'optimizers': 'optimizer'}
RETRY_AFTER = (1, 3, 6)  # seconds between attempts of a write that failed: a full disk may have room by then


class Checkpoints:
    """Saves and restores the objects it holds. As a context manager, it waits at the end for the last write."""

    def __init__(self, config: Config, identity: Identity, held: Mapping[str, Any]):
        """`held`:

        modules, emas, optimizers   dicts of objects with state_dict and load_state_dict, which may be filled later
        record, bad_steps           objects with state_dict and load_state_dict; the record also has a wandb_id
        experiment                  an object with state and load_state
        about                       a function that returns shape, num_classes, classes, about_data, cond and facts
        """
        self.config, self.identity, self.held = config, identity, held
        self.writer = Writer(config)
        self.name = type(held['experiment']).__name__  # for messages
        self.read_from: Path | None = None  # the checkpoint of a run that was opened to read
        self.finished = False  # whether nothing is left to train
        self.raw: nn.Module | None = None  # the network as trained, where `load_run` gave it averaged weights
        self.state_at_start: dict[str, Any] = {}

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
        held, objects = self.held, dict(self.held['about'](), step=step, finished=finished)
        objects |= dict(bad_steps=held['bad_steps'].state_dict(), record=held['record'].state_dict())
        for group, name in GROUPS.items():
            objects[group] = {key: thing.state_dict() for key, thing in held[group].items()}
            objects[name] = objects[group].pop('network')
        objects |= dict(state=held['experiment'].state(), wandb_id=held['record'].wandb_id)
        return objects | vars(self.identity)

    def check(self) -> None:
        """Before training, after everything was called once: raise SettingError if something that an experiment adds
        could be written but not loaded again, and warn if a call has changed its `state`. All ranks call this."""
        objects = self.objects(0, False)
        for name in ('state', 'optimizers'):
            try:
                torch.load(io.BytesIO(saved_bytes(objects[name])), map_location='cpu', weights_only=True)
            except pickle.UnpicklingError as error:
                reason = str(error).split('WeightsUnpickler error: ')[-1].splitlines()[0]
                raise SettingError(
                    f'{self.name}: a checkpoint cannot hold what `{name}` gives ({reason}). It holds tensors, '
                    'numbers, strings, lists and dicts of them: write float(x) for a numpy number.'
                ) from None
        before, now = self.state_at_start, to_host(objects['state'])
        known = {name: x for name, x in before.items() if x is not None}  # the first call may set the others
        changed = [name for name, x in known.items() if saved_bytes(x) != saved_bytes(now.get(name))]
        if changed:
            print_once(
                f'warning: {self.name}: {", ".join(changed)} of `state` changed before training began, in a method '
                'that is also called for held-out images and when a run resumes (loss_fn, prepare_batch_fn, samplers). '
                'So resumed runs will differ. Change it in train_step, after super().'
            )

    def refuse_if_read_only(self) -> None:
        """Raise SettingError if the run was opened to read."""
        if self.read_from is not None:
            raise SettingError(
                'this run was opened to read (load_run). To continue training, call `main` or run.sh with its flags.'
            )

    def wait(self) -> None:
        """Return when nothing is being written. Raises SaveError, on every rank, if a write failed."""
        ranks.on_main(self.writer.wait)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        with suppress(Exception):  # `save` raises what went wrong
            self.writer.wait()

    # ---------------------------------------------------------------- restore

    def restore(self, read_from: str | Path | None = None) -> int:
        """Restore the run's last whole checkpoint; returns the step to continue at. All ranks must call this.

        A new run starts at step 0, with the averaged weights of init_from if that is set. `read_from`: load this
        checkpoint instead, and neither lock nor write anything. Raises SettingError if a checkpoint is from another
        experiment, and like run_folder.open_folder.
        """
        c = self.config
        if read_from is None:
            path, checkpoint = last_path(c), run_folder.open_folder(c, self.identity)
        else:
            path = self.read_from = Path(read_from)
            checkpoint = saving.load_checkpoint(path)
            if checkpoint.get('data', self.identity.data) != self.identity.data:
                print_once(f'warning: {path} was trained on other data: check data_dir and data_path')
        if checkpoint is None:
            if c.init_from:
                self.start_from_weights()
            self.remember_state()
            return 0
        self.load(checkpoint, path)
        if read_from is None:
            self.remember_state()
        step = checkpoint['step']
        self.finished = checkpoint['finished'] and step >= c.num_training_steps
        if read_from is not None or not self.finished:
            print_once(f'{"resuming" if read_from is None else "reading"} {c.run_dir} at step {step}')
        return step

    def remember_state(self) -> None:  # for `check`
        with suppress(Exception):  # a method that was not called yet may create what `state` returns
            self.state_at_start = to_host(self.held['experiment'].state())

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
                    f'checkpoint {str(path)!r} has {group} {sorted(saved)} besides the network, {self.name} has '
                    f'{sorted(added)}. Pass another --experiment_name.'
                )
            for name, thing in added.items():
                thing.load_state_dict(saved[name])
        held['experiment'].load_state(checkpoint['state'])
        for name in ('record', 'bad_steps'):
            held[name].load_state_dict(checkpoint[name])
        held['record'].wandb_id = checkpoint['wandb_id']

    def start_from_weights(self) -> None:
        """Give the network, and other modules that are trained, the averaged weights that init_from has under their
        names. Frozen ones stay: a teacher may be another one now. Warns of what is not taken."""
        c, modules = self.config, self.held['modules']
        other = run_folder.load_on_all(Path(c.init_from), lambda: saving.load_checkpoint(c.init_from))
        network, added, stay = modules['network'], other.get('modules', {}), list[str]()
        saving.load_weights(network, saving.best_weights(other), other['config'], c, c.init_from, other_classes=True)
        for name, module in modules.items() - {('network', network)}:
            now, saved = module.state_dict(), added.get(name, {})
            fits = not saving.mismatches(saved, now)
            if fits and any(p.requires_grad for p in module.parameters()):
                module.load_state_dict(saving.best_weights(other, name))
            elif not fits or any(not torch.equal(saved[key], now[key].cpu()) for key in now):
                stay.append(name)
        for name, ema in self.held['emas'].items():
            ema.reset(modules[name])
        print_once(f'starting from the weights of {c.init_from}')
        if stay:
            print_once(
                f'warning: {", ".join(sorted(stay))}: kept as setup_networks made it, because {c.init_from} has no '
                'such module, one of another shape, or a frozen one with other weights. A copy of the network that '
                'setup_networks makes is untrained: it is made before these weights are loaded.'
            )
        left = sorted(added.keys() - modules.keys()) + ['what `state` returned'] * bool(other.get('state'))
        if left:
            print_once(f'warning: not taken from {c.init_from}: {", ".join(left)}')
        changed = differences(other['config'], c, only=('model_type', 'time_input', 'process_name', 'sigma_data'))
        if changed:
            print_once(f'warning: they were trained with other settings (then -> now): {"; ".join(changed)}')


# ---------------------------------------------------------------- the file


class Writer:
    """Writes one checkpoint at a time, in a thread: training waits only while the state is copied. Rank 0 only."""

    def __init__(self, config: Config):
        self.config, self.pool = config, ThreadPoolExecutor(1)
        self.copy: Any = None  # the last state; its memory is reused, which is faster than new memory
        self.writing: Future[None] | None = None  # the last write, with its error
        self.step: int | None = None  # step of the last.pt that this writer wrote

    def write(self, objects: dict[str, Any], keep: bool) -> None:
        """Start writing a checkpoint of the objects as they are now. Raises SaveError if an earlier write failed."""
        self.wait()
        self.copy = to_host(objects, self.copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies do not block
        self.writing = self.pool.submit(self._write, self.copy, keep)

    def wait(self) -> None:
        """Return when nothing is being written. Raises SaveError if the last write failed."""
        if self.writing is not None:
            self.writing.result()

    def _write(self, objects: dict[str, Any], keep: bool) -> None:
        step = objects['step']
        for seconds in (*RETRY_AFTER, None):
            try:
                write_checkpoint(self.config, objects, keep, again=self.step == step)
                self.step = step
                return
            except Exception as error:
                # torch raises RuntimeError for a full disk
                why = f'the checkpoint of step {step} cannot be written ({cause_of(error)})'
                if seconds is None or not isinstance(error, (OSError, RuntimeError)):
                    stopping.ask_to_stop()  # on all ranks, at the end of this step
                    last = last_path(self.config)
                    kept = f'{last.parent} has no earlier one. Make room there, and run the same command again.'
                    if last.exists():
                        kept = f'Make room there: the same command resumes from {last}, which is untouched.'
                    raise SaveError(f'ckpt_dir={self.config.ckpt_dir!r}: {why}. {kept}') from error
                print_once(f'{why}; trying again in {seconds} s')
                time.sleep(seconds)


def saved_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def to_host(value: Any, reuse: Any = None) -> Any:
    """Copy the tensors in dicts, lists and tuples to main memory, into the tensors of `reuse`, an earlier copy."""
    if isinstance(value, Tensor):
        layout = value.shape, value.stride(), value.dtype
        if not isinstance(reuse, Tensor) or (reuse.shape, reuse.stride(), reuse.dtype) != layout:
            reuse = torch.empty_like(value, device='cpu', pin_memory=value.is_cuda, requires_grad=False)
        return reuse.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        old = reuse if isinstance(reuse, dict) else {}
        return {name: to_host(item, old.get(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        olds = reuse if isinstance(reuse, (list, tuple)) else ()
        return type(value)(to_host(item, old) for item, old in itertools.zip_longest(value, olds[: len(value)]))
    return value


def write_checkpoint(config: Config, objects: dict[str, Any], keep: bool = False, again: bool = False) -> None:
    """Write the run's last.pt: these plain objects, its config and the version of the format. `keep`: also step_N.pt.

    Earlier checkpoints become last-1.pt (the previous one), last-2.pt, ...: keep_last in all. A kill at any moment
    leaves them whole. `again`: last.pt is already of this step, so the previous ones keep their names.
    """
    last = last_path(config)
    names = [last, *(last.with_name(f'last-{i}.pt') for i in range(1, config.keep_last))]
    with atomic_write(last) as temporary:
        saving.write(temporary, version=saving.VERSION, config=dataclasses.asdict(config), **objects)
        for newer, older in reversed(list(itertools.pairwise(names))):  # oldest first, so that none is overwritten
            if newer.exists() and not again:
                link_as(newer, older)
    if keep:
        link_as(last, config.run_dir / f'step_{objects["step"]:07d}.pt')
    for path in set(config.run_dir.glob('last-*.pt')) - set(names):  # from when keep_last was higher
        path.unlink()
    sync(config.run_dir)
