"""`sh run.sh --check`: will it run tonight? All that a run does, once, in a temporary folder, and what it will take."""

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

import evaluation
import pictures
import utils
from config import Config, SettingError, baseline
from runtime import ranks, resume, run_folder
from runtime.ranks import print_once

WARM_UP_STEPS = 3  # compiling, loading of libraries, the search for the fastest convolutions
SECONDS_FOR_STEPS = 8.0  # of training, to tell how long a step takes
LEAST_STEPS = 5


def dry_run(config: Config, build: Callable[[Config], Any]) -> None:
    """Print the settings, try steps, a save, a load, a held-out loss and all samplers; print what the run will take.

    `build` makes a trainer. Raises what the run would raise, and SettingError if its checkpoints will not fit on the
    disk.
    """
    if int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1:
        raise SettingError('check=True: this tries one machine. Run it on one of them, without TORCHRUN_ARGS.')
    ranks.setup()
    usual = baseline(config)
    settings = (f'{"*" if value != usual[name] else " "} {name} = {value!r}' for name, value in vars(config).items())
    print_once('\n'.join(settings))
    found = ranks.on_main(lambda: look_at_folder(config))
    folder = Path(ranks.on_main(lambda: tempfile.mkdtemp(prefix='check', dir=os.environ.get('RUN_REPORTS'))))
    try:
        ranks.on_main(lambda: link_data(config, folder / 'data'))
        apart = dict(ckpt_dir=str(folder), data_dir=str(folder / 'data'), experiment_name='check', wandb='disabled')
        trainer = build(dataclasses.replace(config, **apart))
        if found is not None:
            run_folder.refuse_other(config, found, trainer.identity)
        rehearse(config, trainer, 0 if found is None else found['step'])
    finally:
        if ranks.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def look_at_folder(config: Config) -> dict[str, Any] | None:
    """What is known of the checkpoint from which the run will go on: config, step, trainer, code and data.

    None if it begins anew. Raises SettingError if its folder cannot be written.
    """
    parent = nearest_folder(config)
    if not os.access(parent, os.W_OK) or any(path.is_file() for path in [config.run_dir, *config.run_dir.parents]):
        raise SettingError(
            f'ckpt_dir={config.ckpt_dir!r}: {parent} cannot be written. Pass a folder of yours as --ckpt_dir.'
        )
    found = run_folder.newest_whole(config) if config.run_dir.exists() else None
    if not found:
        return None
    step = found[1]['step']
    print_once(f'{config.run_dir} holds a run at step {step} of {config.num_training_steps}, to go on from there')
    return {name: found[1][name] for name in ('config', 'step', 'trainer', 'code', 'data') if name in found[1]}


def nearest_folder(config: Config) -> Path:
    """The run's folder, or the nearest one above it that exists."""
    return next(path for path in [config.run_dir, *config.run_dir.absolute().parents] if path.is_dir())


def link_data(config: Config, folder: Path) -> None:
    """A stand-in for data_dir, into which a data set that is not there yet is downloaded."""
    folder.mkdir()
    if Path(config.data_dir).is_dir():
        for entry in Path(config.data_dir).iterdir():
            (folder / entry.name).symlink_to(entry.resolve())


def timed(do: Callable[[], object]) -> float:
    """Seconds that `do` takes, the slowest rank's."""
    ranks.barrier()
    began = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(ranks.all_reduce(torch.tensor(time.perf_counter() - began), 'MAX'))


def time_steps(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first step, and of a usual one: the median after a warm-up."""
    first = timed(step)
    for _ in range(WARM_UP_STEPS - 1):
        timed(step)
    steps: list[float] = []
    while len(steps) < LEAST_STEPS or sum(steps) < SECONDS_FOR_STEPS:  # the same on every rank: each is the slowest's
        steps.append(timed(step))
    return first, median(steps)


def rehearse(config: Config, trainer: Any, begins_at: int) -> None:
    """All that the run `config` does, tried by `trainer`; then what the run will take from step `begins_at` on."""
    steps_left = max(0, config.num_training_steps - begins_at)
    shards, weights = trainer.shards(), trainer.weights()
    parameters = sum(p.numel() for p in trainer.network.parameters())
    print_once(f'\n{config.dataset} on {ranks.world_size()} x {trainer.device.type}: {parameters:,} parameters')
    evaluation.rehearse(trainer)

    first, step = time_steps(lambda: trainer.train_step(shards))
    images = config.global_batch_size / step
    print_once(f'train     {step:.3g} s a step, {images:.0f} images/s; the first step took {first:.3g} s')

    stall = timed(trainer.save)
    write = timed(lambda: ranks.on_main(trainer.writer.wait))
    size = ranks.on_main(lambda: run_folder.last_path(trainer.config).stat().st_size)
    before = run_folder.to_host(trainer.network.state_dict())
    load = timed(lambda: resume.restore(trainer))
    if any(not value.cpu().equal(before[name]) for name, value in trainer.network.state_dict().items()):
        raise RuntimeError('the checkpoint, loaded again, does not hold the weights that were saved')
    print_once(
        f'save      {size / 1e6:.1f} MB; training waits {stall:.3g} s, then it is written in {stall + write:.3g} s '
        f'behind it; loaded again in {load:.3g} s'
    )

    losses: list[float] = []
    once = timed(lambda: losses.append(evaluation.held_out_loss(trainer, trainer.network, rounds=1)))
    held_out = once * trainer.test_loader.rounds * (len(weights) + trainer.has_reference)
    if trainer.bad_steps.report() or not math.isfinite(losses[0]):
        raise SettingError(
            f'the loss or its gradient was not finite in the first {trainer.step} steps. Try a lower --base_lr, or '
            '--precision float32.'
        )
    print_once(f'held out  loss {losses[0]:.4f} after {trainer.step} steps; {held_out:.3g} s each time')

    shown, per_image = pictures.num_shown(trainer), {}
    for name, sampler in trainer.samplers().items():
        for n in (8, shown):
            inputs = trainer.sample_inputs(n)
            draw = lambda s=sampler, i=inputs: pictures.generate(trainer, s, trainer.network, i)  # noqa: E731
            seconds = timed(draw)
            per_image[name] = seconds / n
            if seconds > 2:  # the larger number would only tell it better
                break
        print_once(f'sample    {name}: {per_image[name]:.3g} s an image')

    def times(every: int) -> int:
        return -(-steps_left // every) if every else 1

    grids = sum(per_image.values()) * shown * len(weights) * (times(config.sample_every) - (not config.final_pictures))
    final = sum(per_image.values()) * evaluation.NUM_JUDGED * config.final_eval * evaluation.is_judged(trainer)
    final += (
        per_image[next(iter(per_image))]
        * evaluation.NUM_JUDGED
        * (config.eval_metrics_every > 0)
        * (times(config.eval_metrics_every) - 1)
    )
    saves = stall * times(config.save_every)
    hours = (step * steps_left + grids + final + saves + held_out * times(config.eval_every)) / 3600
    every = config.keep_every
    kept = config.num_training_steps // every - begins_at // every if every else 0
    there_already = len(list(config.run_dir.glob('last*.pt')))
    disk = size * max(0, config.keep_last + 1 + kept - there_already)  # one more while it is being written
    free = shutil.disk_usage(nearest_folder(config)).free
    minutes = f'{config.save_every * step / 60:.2g} minutes at most' if config.save_every else 'all since step_N.pt'
    print_once(
        f'\nthe run   {hours:.3g} hours ({step * steps_left / 3600:.3g} of them training) for {steps_left} steps\n'
        f'a kill    loses {minutes} (save_every={config.save_every})\n'
        f'memory    {utils.peak_memory_gb(trainer.device):.2f} GB at most so far, in each process\n'
        f'disk      {disk / 1e9:.3g} GB more for {config.keep_last} + {kept} checkpoints and one being written; '
        f'{free / 1e9:.3g} GB are free'
    )
    if disk > free:
        raise SettingError(
            f'ckpt_dir={config.ckpt_dir!r}: the checkpoints need {disk / 1e9:.3g} GB, but {free / 1e9:.3g} GB are '
            f'free. Make room, raise --keep_every (now {every}; 0: none), or pass another --ckpt_dir.'
        )
    print_once('check     it runs; nothing was kept')
