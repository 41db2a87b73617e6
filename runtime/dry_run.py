"""`sh run.sh --check`: will it run tonight? Everything that a run does, once, in a temporary folder, and what the whole run will take."""

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

import utils
from config import Config, SettingError, baseline
from runtime import ranks, run_folder
from runtime.ranks import print_once

SECONDS_FOR_STEPS = 8.0  # of training, to tell how long a step takes


def dry_run(config: Config, build: Callable[[Config], Any]) -> None:
    """Print the settings, try a step, a save, a load, a held-out loss and all samplers, and print what the run will take.

    Raises what the run would raise, and SettingError if its checkpoints will not fit on the disk.
    """
    if int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1:
        raise SettingError('check=True: this tries one machine. Run it on one of them, without TORCHRUN_ARGS.')
    ranks.setup()
    usual = baseline(config)
    print_once(
        '\n'.join(f'{"*" if value != usual[name] else " "} {name} = {value!r}' for name, value in vars(config).items())
    )
    begins_at = ranks.on_main(lambda: look_at_folder(config))
    folder = Path(ranks.on_main(lambda: tempfile.mkdtemp(prefix='check', dir=os.environ.get('RUN_REPORTS'))))
    try:
        ranks.on_main(lambda: link_data(config, folder / 'data'))
        there = dict(ckpt_dir=str(folder), data_dir=str(folder / 'data'), experiment_name='check', wandb='disabled')
        rehearse(config, dataclasses.replace(config, **there), build, begins_at)
    finally:
        if ranks.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def look_at_folder(config: Config) -> int:
    """The step at which the run will begin. Raises SettingError if its folder cannot be written or holds another run. Reads only."""
    parent = nearest_folder(config)
    if not os.access(parent, os.W_OK) or any(path.is_file() for path in [config.run_dir, *config.run_dir.parents]):
        raise SettingError(
            f'ckpt_dir={config.ckpt_dir!r}: {parent} cannot be written. Pass a folder of yours as --ckpt_dir.'
        )
    found = run_folder.newest_whole(config) if config.run_dir.exists() else None
    if not found:
        return 0
    run_folder.refuse_other(config, found[1])
    print_once(
        f'{config.run_dir} holds this run at step {found[1]["step"]} of {config.num_training_steps}: it will go on from there'
    )
    return found[1]['step']


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


def rehearse(config: Config, there: Config, build: Callable[[Config], Any], begins_at: int) -> None:
    """All that the run `config` does, tried as `there`; then what it will take from step `begins_at` on."""
    trainer, steps_left = build(there), max(0, config.num_training_steps - begins_at)
    shards, weights = trainer.shards(), trainer.weights()
    parameters = sum(p.numel() for p in trainer.network.parameters())
    print_once(f'\n{config.dataset} on {ranks.world_size()} x {trainer.device.type}: {parameters:,} parameters')

    first = timed(lambda: trainer.train_step(shards))
    steps = [timed(lambda: trainer.train_step(shards)) for _ in range(min(20, int(SECONDS_FOR_STEPS / first)))]
    step = median(steps or [first])
    images = config.global_batch_size / step
    print_once(f'train     {step:.3g} s a step, {images:.0f} images/s; the first step took {first:.3g} s')

    stall = timed(trainer.save)
    write = timed(lambda: ranks.on_main(trainer.writer.wait))
    size = ranks.on_main(lambda: run_folder.last_path(there).stat().st_size)
    before = run_folder.to_host(trainer.network.state_dict())
    load = timed(trainer.restore)
    if any(not value.cpu().equal(before[name]) for name, value in trainer.network.state_dict().items()):
        raise RuntimeError('the checkpoint, loaded again, does not hold the weights that were saved')
    print_once(
        f'save      {size / 1e6:.1f} MB; training waits {stall:.3g} s, then it is written in {stall + write:.3g} s behind it; loaded again in {load:.3g} s'
    )

    losses: list[float] = []
    at_once = trainer.shards_at_once()
    held_out = (
        timed(lambda: losses.append(trainer.held_out_loss(trainer.network, at_once)))
        * -(-trainer.test_loader.rounds // at_once)
        * len(weights)
    )
    if trainer.bad_steps[1] or not math.isfinite(losses[0]):
        raise SettingError(
            f'the loss or its gradient was not finite in the first {trainer.step} steps. Try a lower --base_lr, or --precision float32.'
        )
    print_once(f'held out  loss {losses[0]:.4f} after {trainer.step} steps; {held_out:.3g} s each time')

    per_image = {}
    for solver in trainer.grid_solvers():
        for n in (8, math.prod(trainer.grid_shape())):
            x1, label = trainer.noise_and_labels(n)
            drawn: list[torch.Tensor] = []
            seconds = timed(
                lambda drawn=drawn, x1=x1, label=label, solver=solver: drawn.append(
                    trainer.generate(trainer.network, x1, label, solver)
                )
            )
            per_image[solver] = seconds / n
            if not drawn[0].isfinite().all():
                raise SettingError(
                    f'solver={solver!r} gives values that are not finite, with an untrained network. Use another --solver or --time_grid.'
                )
            if seconds > 2:  # the larger number would only tell it better
                break
        print_once(f'sample    {solver}: {per_image[solver]:.3g} s an image')

    def times(every: int) -> int:
        return -(-steps_left // every) if every else 1

    grids = sum(per_image.values()) * math.prod(trainer.grid_shape()) * len(weights) * times(config.sample_every)
    final = per_image[config.solver] * 1000 if config.final_eval and trainer.data.pixel_metrics else 0
    saves = stall * times(config.save_every)
    hours = (step * steps_left + grids + final + saves + held_out * times(config.eval_every)) / 3600
    kept = config.num_training_steps // config.keep_every - begins_at // config.keep_every if config.keep_every else 0
    there_already = len(list(config.run_dir.glob('last*.pt')))
    disk = size * max(0, config.keep_last + 1 + kept - there_already)  # one more while it is being written
    free = shutil.disk_usage(nearest_folder(config)).free
    print_once(
        f'\nthe run   {hours:.3g} hours ({step * steps_left / 3600:.3g} of them training) for {steps_left} steps\n'
        f'a kill    loses {f"{config.save_every * step / 60:.2g} minutes at most" if config.save_every else "all since the last step_N.pt"} (save_every={config.save_every})\n'
        f'memory    {utils.peak_memory_gb(trainer.device):.2f} GB at most so far, in each process\n'
        f'disk      {disk / 1e9:.3g} GB more for {config.keep_last} + {kept} checkpoints and one being written; {free / 1e9:.3g} GB are free'
    )
    if disk > free:
        raise SettingError(
            f'ckpt_dir={config.ckpt_dir!r}: the checkpoints need {disk / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free. '
            f'Make room, raise --keep_every (now {config.keep_every}; 0: none), or pass another --ckpt_dir.'
        )
    print_once('check     it runs; nothing was kept')
