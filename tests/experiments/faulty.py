"""A trainer with an injected fault, for test_faults.py: `sh run.sh tests/experiments/faulty.py --fault NAME`.

The fault happens once, on rank `fault_rank` at step `fault_step`. The file `once` then has its time, and the same
command runs undisturbed.
"""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from config import Config
from main import main
from runtime import ranks
from trainer import ExampleDiffusionTrainer
from training import checkpoints
from training.batches import Batches


@dataclass(frozen=True)
class FaultyConfig(Config):
    fault: str = ''
    """The fault: PHASE:SIGNAL:TARGET, a key of PATCHES, or a name that a method of FaultyTrainer knows."""
    fault_step: int = 12
    """First step at which it may happen."""
    fault_rank: int = 0
    """Rank on which it happens."""
    once: str = ''
    """File that is written when it happens, so that it happens only once."""


def parent_of(pid: int) -> int:
    return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])


def send(name: str, target: str) -> None:
    """Send a signal, or two at once, to this worker, to the launcher (torchrun), to run.sh, or to all three."""
    launcher = os.getppid()
    pids = {'worker': os.getpid(), 'launcher': launcher, 'run.sh': parent_of(launcher)}
    twice, number = name.endswith('x2'), getattr(signal, name.removesuffix('x2'))
    for _ in range(2 if twice else 1):
        for pid in pids.values() if target == 'all' else [pids[target]]:
            os.kill(pid, number)
        time.sleep(0.2 if twice else 0)


class FaultyTrainer(ExampleDiffusionTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.at('start-up')
        if self.config.fault in PATCHES:
            PATCHES[self.config.fault](self)

    def happens(self, fault: str) -> bool:
        """Whether this fault happens now, on this rank; notes its time."""
        c = self.config
        here = int(os.environ['RANK']) == c.fault_rank and self.step >= c.fault_step
        if c.fault != fault or not here or Path(c.once).exists():
            return False
        Path(c.once).write_text(str(time.time()))
        return True

    def at(self, phase: str) -> None:
        """Raise the exception or send the signal that is due in this phase, if any."""
        if self.happens(f'exception in {phase}'):
            raise KeyError('broken on purpose')
        if self.config.fault.startswith(phase + ':') and (phase != 'start-up' or self.step == 0):
            _, name, target = self.config.fault.split(':')
            step, self.step = self.step, self.config.fault_step if phase == 'start-up' else self.step
            if self.happens(self.config.fault):
                send(name, target)
                time.sleep(1 if phase == 'start-up' else 0)
            self.step = step

    def prepare_batch_fn(self, batch, is_train):
        if is_train and (self.happens('exception') or self.config.fault == 'always'):
            raise KeyError('broken on purpose')
        if is_train and self.happens('nan'):
            batch = (batch[0] * torch.nan, batch[1])
        if is_train and self.happens('loader worker'):
            os.kill(self.train_loader.workers._iterator._workers[0].pid, signal.SIGKILL)
        if is_train and self.happens('stop of all'):  # like a scheduler, which is not the parent of any of them
            pids = [os.getppid(), os.getpid(), *(process.pid for process in multiprocessing.active_children())]
            subprocess.run(['kill', '-TERM', *map(str, pids)], start_new_session=True)
        gone, silent = (is_train and self.happens(fault) for fault in ('data file', 'silent data'))
        for path in Path(self.config.data_dir).rglob('*.png') if gone or silent else ():
            path.unlink()
            if silent:  # opening it waits forever
                os.mkfifo(path)
        return super().prepare_batch_fn(batch, is_train)

    def loss_fn(self, batch, model_fn):
        self.at('training' if torch.is_grad_enabled() else 'evaluation')
        return super().loss_fn(batch, model_fn)

    def draw(self, model_fn, inputs, solver):
        self.at('sampling' if self.step > 0 else 'first drawing')
        return super().draw(model_fn, inputs, solver)

    def sample_inputs(self, n):
        if n == 1000:
            self.at('final')
        return super().sample_inputs(min(n, 100))


def die(trainer: FaultyTrainer, name: str) -> None:
    if trainer.happens(name):
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, do: Callable[[], None], on: str = '') -> None:
    """Replace owner.name by a function that first calls `do`, if its last argument ends with `on`."""
    original = getattr(owner, name)

    def changed(*args, **kwargs):
        if str(args[-1]).endswith(on):
            do()
        return original(*args, **kwargs)

    setattr(owner, name, changed)


def half_written(trainer: FaultyTrainer) -> None:
    write = torch.save

    def half(state, file, **kwargs):
        write(state, file, **kwargs)
        if trainer.happens('half written'):
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


# fault -> function that sets it up
PATCHES = {
    'half written': half_written,
    'before fsync': lambda trainer: before(os, 'fsync', lambda: die(trainer, 'before fsync')),
    'before rename': lambda trainer: before(os, 'replace', lambda: die(trainer, 'before rename'), 'last.pt'),
    'after rename': lambda trainer: before(checkpoints, 'sync', lambda: die(trainer, 'after rename')),
    'saving:SIGTERM:worker': lambda trainer: before(torch, 'save', lambda: (trainer.at('saving'), time.sleep(0.5))),
    'saving:SIGTERM:run.sh': lambda trainer: before(torch, 'save', lambda: (trainer.at('saving'), time.sleep(0.5))),
}

if __name__ == '__main__':
    counted: dict[int, int] = {}
    if 'COUNT_IMAGES' in os.environ:  # write the number of images of this process, by step

        def draw_shard(self, batch, shard, step, is_train=True, original=Batches.draw_shard):
            if is_train:
                counted[step] = counted.get(step, 0) + len(batch[0])
                Path(f'{os.environ["COUNT_IMAGES"]}{ranks.rank()}').write_text(repr(counted))
            return original(self, batch, shard, step, is_train)

        Batches.draw_shard = draw_shard
    main(trainer_class=FaultyTrainer, config_class=FaultyConfig)
