"""`sh run.sh --check`: do everything that a run does once, in a temporary folder, and estimate the cost of the run."""

import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import saving
import utils
from config import Config, SettingError
from evaluation.judge import NUM_JUDGED
from runtime import alive, ranks
from runtime.alive import duration
from runtime.files import refuse_folder
from runtime.ranks import print_once
from training import run_folder
from training.experiment import Sampler

WARM_UP_STEPS = 3  # for compiling, loading libraries, and the search for the fastest convolutions
SECONDS_FOR_STEPS = 8.0  # spent on timing training steps
LEAST_BLOCKS = 5  # least number of blocks of steps


@alive.print_while('checking')
def dry_run(config: Config, build: Callable[[Config], Any]) -> None:
    """Print the settings, try steps, a save, a load, a held-out loss and all samplers; print what the run will take.

    `build` makes a trainer. Raises what the run would raise, and SettingError if the checkpoints do not fit on disk.
    """
    if int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1:
        raise SettingError('check=True: this checks one machine. Run it without NNODES and TORCHRUN_ARGS (srun -N1).')
    ranks.setup()
    default = config.baseline() | {name: getattr(config, name) for name in ('experiment_name', 'ckpt_dir', 'check')}
    changed = (f'  {name} = {value!r}' for name, value in vars(config).items() if value != default.get(name))
    print_once('\n'.join(['settings that differ from the preset:', *changed]))
    checkpoint = ranks.on_main(lambda: look_at_folder(config))
    folder = Path(ranks.on_main(lambda: tempfile.mkdtemp(prefix='check', dir=os.environ.get('RUN_REPORTS'))))
    try:
        ranks.on_main(lambda: link_data(config, folder / 'data'))
        Rehearsal(config, checkpoint, folder, build).run()
    finally:
        if ranks.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def look_at_folder(config: Config) -> dict[str, Any] | None:
    """Config, step, trainer, code and data of the checkpoint that the run will resume from; None for a new run. Raises
    SettingError if the run's folder, or data_dir, cannot be created or used."""
    run_folder.refuse_folders(config)
    refuse_folder('data_dir', config.data_dir, Path(config.data_dir), to_write=False)
    found = run_folder.newest_intact(config) if config.run_dir.exists() else None
    if not found:
        return None
    last, total = found[1], config.num_training_steps
    print_once(f'{config.run_dir} holds a run at step {last["step"]} of {total}, which will be resumed')
    return {name: last[name] for name in ('config', 'step', 'trainer', 'code', 'data') if name in last}


def link_data(config: Config, folder: Path) -> None:
    """Link the contents of data_dir into `folder`; a data set that is missing is downloaded there, and not kept."""
    for inner in ('.', 'cache'):  # a folder of its own, so that new files in the cache are not kept either
        (folder / inner).mkdir()
        for entry in sorted(Path(config.data_dir, inner).glob('*')):
            if entry.name != 'cache':
                (folder / inner / entry.name).symlink_to(entry.resolve())


def timed(do: Callable[[], object]) -> float:
    """Seconds that `do` takes on the slowest rank."""
    ranks.barrier()
    began = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(ranks.all_reduce(torch.tensor(time.perf_counter() - began), 'MAX'))


def time_steps(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first step, and of a later step: the median over blocks of steps, after a warm-up.

    Blocks, because a GPU runs asynchronously: waiting for it after every step would be slower than training.
    """
    first = timed(step)
    for _ in range(WARM_UP_STEPS - 1):
        once = timed(step)
    # every rank computes the same number: `timed` returns the time of the slowest
    in_block = max(1, int(SECONDS_FOR_STEPS / LEAST_BLOCKS / once))
    blocks: list[float] = []
    while len(blocks) < LEAST_BLOCKS or sum(blocks) * in_block < SECONDS_FOR_STEPS:
        blocks.append(timed(lambda: [step() for _ in range(in_block)]) / in_block)
    return first, median(blocks)


class Rehearsal:
    """Tries in `folder` everything that a run of `config` does, and adds the measured times up to an estimate."""

    def __init__(self, config: Config, checkpoint: dict[str, Any] | None, folder: Path, build: Callable[[Config], Any]):
        """`checkpoint`: what the run will resume from. Raises SettingError if it belongs to another run."""
        apart = dict(ckpt_dir=str(folder), data_dir=str(folder / 'data'), experiment_name='check', wandb='disabled')
        self.config, self.trained = config, build(dataclasses.replace(config, **apart))
        if checkpoint is not None:
            run_folder.refuse_other(config, checkpoint, self.trained.checkpoints.identity)
        self.begins_at = 0 if checkpoint is None else checkpoint['step']
        self.steps_left = max(0, config.num_training_steps - self.begins_at)
        self.seconds: dict[str, float] = {}  # part of the run -> seconds
        self.size = 0  # bytes of a checkpoint
        self.step_seconds = 0.0

    def times(self, every: int) -> int:
        """Number of times that something due every `every` steps is still to happen; 0: once, at the end."""
        return -(-self.steps_left // every) if every else 1

    def run(self) -> None:
        t = self.trained
        parameters = sum(p.numel() for p in t.network.parameters())
        print_once(f'\n{self.config.dataset} on {ranks.world_size()} x {t.device.type}: {parameters:,} parameters')
        t.judge.rehearse()
        t.gallery.rehearse(step=1)  # without the picture of the data
        t.checkpoints.check()
        began = float(os.environ.get('RUN_BEGAN', time.time()))  # when run.sh began
        self.seconds['to start'] = ranks.on_main(lambda: time.time() - began)
        self.try_steps()
        self.try_saving()
        self.try_held_out()
        self.try_sampling()
        self.print_estimate()

    def try_steps(self) -> None:
        steps = self.trained.batches.steps(0)
        first, self.step_seconds = time_steps(lambda: self.trained.train_step(next(steps)))
        rate = self.config.global_batch_size / self.step_seconds
        each = self.step_seconds
        print_once(f'train     {each:.3g} s a step, {rate:.0f} samples/s; the first step took {duration(first)}')
        self.seconds |= {'for the first step': first - each, 'training': each * self.steps_left}

    def try_saving(self) -> None:
        t = self.trained
        stall = timed(lambda: t.checkpoints.save(t.step))
        write = timed(t.checkpoints.wait)
        self.size = ranks.on_main(lambda: run_folder.last_path(t.config).stat().st_size)
        before = {name: value.clone() for name, value in t.network.state_dict().items()}
        path = run_folder.last_path(t.config)
        load = timed(lambda: t.checkpoints.load(saving.load_checkpoint(path), path))
        if any(not value.equal(before[name]) for name, value in t.network.state_dict().items()):
            raise RuntimeError('the checkpoint, loaded again, does not hold the weights that were saved')
        print_once(
            f'save      {self.size / 1e6:.1f} MB; training waits {stall:.3g} s, the file is complete after '
            f'{stall + write:.3g} s, and loads in {load:.3g} s'
        )
        self.seconds['to start'] += load * (self.begins_at > 0)
        self.seconds['saving'] = stall * self.times(self.config.save_every)

    def try_held_out(self) -> None:
        t, losses = self.trained, []
        once = timed(lambda: losses.append(t.judge.held_out_loss(t.network, rounds=1)))
        seconds = once * t.test_loader.rounds * (len(t.weights()) + t.judge.has_reference)
        if t.bad_steps.report() or not math.isfinite(losses[0]):
            text = f'the loss or its gradient was not finite in the first {t.step} steps.'
            raise SettingError(f'{text} Try a lower --base_lr, or --precision float32.')
        print_once(f'held out  loss {losses[0]:.4f} after {t.step} steps; {duration(seconds)} each time')
        self.seconds['for held-out losses'] = seconds * self.times(self.config.eval_every)

    def try_sampling(self) -> None:
        c, t = self.config, self.trained
        per_sample, path, x = [], 0.0, torch.empty(0)
        for name, sampler in t.samplers().items():
            few, many, x = self.seconds_of(sampler)
            print_once(f'sample    {name}: {many:.3g} s a sample')
            per_sample.append(many)
            path = path or few
        pictures = sum(per_sample) * t.gallery.num_shown * len(t.drawing.weights_shown()) + path
        self.seconds['for pictures'] = pictures * (self.times(c.sample_every) - (not c.final_pictures))
        if not per_sample or not t.judge.can_judge or not (c.final_eval or c.eval_metrics_every):
            return
        inputs, x = t.sample_inputs(NUM_JUDGED), x[torch.arange(NUM_JUDGED, device=x.device) % len(x)]
        first, later = (timed(lambda: t.judge.numbers(x, inputs)) for _ in range(2))
        print_once(f'judge     {duration(first)} the first time, {duration(later)} after that')
        between = (c.eval_metrics_every > 0) * (self.times(c.eval_metrics_every) - 1)
        verdicts = between + c.final_eval * len(per_sample)
        drawing = NUM_JUDGED * (between * per_sample[0] + c.final_eval * sum(per_sample))
        self.seconds['for numbers'] = drawing + (first + later * (verdicts - 1)) * (verdicts > 0)

    def seconds_of(self, sampler: Sampler) -> tuple[float, float, torch.Tensor]:
        """Seconds for the few samples of a path; seconds per sample of a full batch, or of a smaller one if that takes
        long; and the samples, decoded."""
        t, few, many, drawn = self.trained, 0.0, 0.0, []
        for n in sorted({8, t.gallery.num_shown, t.batches.images_at_once * ranks.world_size()}):
            inputs = t.sample_inputs(n)
            seconds = timed(lambda i=inputs: drawn.append(t.drawing.samples(sampler, t.network, i)))
            few, many = few or seconds, seconds / n
            if seconds > 2:
                break
        return few, many, drawn[-1]

    def print_estimate(self) -> None:
        """Raises SettingError if the disk has no room for the checkpoints."""
        c, every, total = self.config, self.config.keep_every, sum(self.seconds.values())
        parts = ', '.join(f'{duration(value)} {name}' for name, value in self.seconds.items() if value >= 0.005 * total)
        kept = c.num_training_steps // every - self.begins_at // every if every else 0
        there_already = len(list(c.run_dir.glob('last*.pt')))
        disk = self.size * max(0, c.keep_last + 1 + kept - there_already)  # one more while it is being written
        folders = (c.run_dir / 'last.pt').absolute().parents
        free = shutil.disk_usage(next(path for path in folders if path.is_dir())).free
        most = duration(min(c.save_every, self.steps_left) * self.step_seconds)
        lost = f'{most} at most' if c.save_every else 'all since step_N.pt'
        print_once(
            f'\nthe run   {duration(total)} for {self.steps_left} steps: {parts}\n'
            f'a kill    loses {lost} (save_every={c.save_every})\n'
            f'memory    {utils.peak_memory_gb(self.trained.device):.2f} GB at most so far, in each process\n'
            f'disk      {disk / 1e9:.3g} GB more for {c.keep_last} + {kept} checkpoints and one being written; '
            f'{free / 1e9:.3g} GB are free'
        )
        if disk > free:
            raise SettingError(
                f'ckpt_dir={c.ckpt_dir!r}: the checkpoints need {disk / 1e9:.3g} GB, but {free / 1e9:.3g} GB are '
                f'free. Make room, raise --keep_every (now {every}; 0: none), or pass another --ckpt_dir.'
            )
        print_once('check     it runs; nothing was kept')
