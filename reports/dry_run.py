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

import utils
from config import Config, SettingError
from evaluation import judge
from reports import pictures
from runtime import ranks
from runtime.ranks import print_once
from training import checkpoints, run_folder

WARM_UP_STEPS = 3  # compiling, loading of libraries, the search for the fastest convolutions
SECONDS_FOR_STEPS = 8.0  # of training, to tell how long a step takes
LEAST_BLOCKS = 5


def dry_run(config: Config, build: Callable[[Config], Any]) -> None:
    """Print the settings, try steps, a save, a load, a held-out loss and all samplers; print what the run will take.

    `build` makes a trainer. Raises what the run would raise, and SettingError if its checkpoints will not fit on the
    disk.
    """
    if int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1:
        raise SettingError(
            'check=True: this tries one machine. Run it on one, without NNODES and TORCHRUN_ARGS (srun -N1).'
        )
    ranks.setup()
    usual = config.baseline()
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
    for inner in ('.', 'cache'):  # what is new in the cache is not kept either
        (folder / inner).mkdir()
        for entry in sorted(Path(config.data_dir, inner).glob('*')):
            if entry.name != 'cache':
                (folder / inner / entry.name).symlink_to(entry.resolve())


def timed(do: Callable[[], object]) -> float:
    """Seconds that `do` takes, the slowest rank's."""
    ranks.barrier()
    began = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(ranks.all_reduce(torch.tensor(time.perf_counter() - began), 'MAX'))


def time_steps(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first step, and of a usual one: the median over blocks of steps, after a warm-up.

    Of a block, because a GPU works behind Python: to wait for it after every step would take longer than training does.
    """
    first = timed(step)
    for _ in range(WARM_UP_STEPS - 1):
        once = timed(step)
    # the same on every rank: each time is the slowest's
    in_block = max(1, int(SECONDS_FOR_STEPS / LEAST_BLOCKS / once))
    blocks: list[float] = []
    while len(blocks) < LEAST_BLOCKS or sum(blocks) * in_block < SECONDS_FOR_STEPS:
        blocks.append(timed(lambda: [step() for _ in range(in_block)]) / in_block)
    return first, median(blocks)


def time_sampler(trainer: Any, sampler: pictures.Sampler) -> tuple[float, float, torch.Tensor]:
    """Seconds for the few samples of a path, seconds a sample of many, and those, decoded.

    As many as are drawn at once; fewer if that takes long, for more would only tell it better.
    """
    few = many = 0.0
    x = torch.empty(0)
    at_once = trainer.shards_per_micro_step() * trainer.config.global_batch_size // trainer.config.batch_shards
    for n in sorted({8, pictures.num_shown(trainer), at_once * ranks.world_size()}):
        inputs, drawn = trainer.sample_inputs(n), []
        draw = lambda i=inputs, d=drawn: d.append(pictures.generate(trainer, sampler, trainer.network, i))  # noqa: E731
        seconds = timed(draw)
        few, many, x = few or seconds, seconds / n, drawn[0]
        if seconds > 2:
            break
    return few, many, x


def time_judging(trainer: Any, x: torch.Tensor) -> list[float]:
    """Seconds that comparing samples with the data takes the first time and from then on; `x` stands for the samples,
    repeated until there are as many."""
    inputs = trainer.sample_inputs(judge.NUM_JUDGED)
    x = x[torch.arange(judge.NUM_JUDGED, device=x.device) % len(x)]
    return [timed(lambda: judge.numbers_for(trainer, x, inputs)) for _ in range(2)]


def rehearse(config: Config, trainer: Any, begins_at: int) -> None:
    """All that the run `config` does, tried by `trainer`; then what the run will take from step `begins_at` on."""
    steps_left = max(0, config.num_training_steps - begins_at)
    shards, weights = trainer.shards(), trainer.weights()
    parameters = sum(p.numel() for p in trainer.network.parameters())
    print_once(f'\n{config.dataset} on {ranks.world_size()} x {trainer.device.type}: {parameters:,} parameters')
    judge.rehearse(trainer)
    began = float(os.environ.get('RUN_BEGAN', time.time()))  # of run.sh
    start = ranks.on_main(lambda: time.time() - began)

    first, step = time_steps(lambda: trainer.train_step(shards))
    images = config.global_batch_size / step
    print_once(f'train     {step:.3g} s a step, {images:.0f} images/s; the first step took {first:.3g} s')

    stall = timed(trainer.save)
    write = timed(lambda: ranks.on_main(trainer.writer.wait))
    size = ranks.on_main(lambda: run_folder.last_path(trainer.config).stat().st_size)
    before = run_folder.to_host(trainer.network.state_dict())
    load = timed(lambda: checkpoints.restore(trainer))
    if any(not value.cpu().equal(before[name]) for name, value in trainer.network.state_dict().items()):
        raise RuntimeError('the checkpoint, loaded again, does not hold the weights that were saved')
    print_once(
        f'save      {size / 1e6:.1f} MB; training waits {stall:.3g} s, then it is written in {stall + write:.3g} s '
        f'behind it; loaded again in {load:.3g} s'
    )

    losses: list[float] = []
    once = timed(lambda: losses.append(judge.held_out_loss(trainer, trainer.network, rounds=1)))
    held_out = once * trainer.test_loader.rounds * (len(weights) + trainer.has_reference)
    if trainer.bad_steps.report() or not math.isfinite(losses[0]):
        raise SettingError(
            f'the loss or its gradient was not finite in the first {trainer.step} steps. Try a lower --base_lr, or '
            '--precision float32.'
        )
    print_once(f'held out  loss {losses[0]:.4f} after {trainer.step} steps; {held_out:.3g} s each time')

    per_image, path, judging = [], 0.0, [0.0, 0.0]
    for name, sampler in trainer.samplers().items():
        few, many, x = time_sampler(trainer, sampler)
        print_once(f'sample    {name}: {many:.3g} s an image')
        per_image.append(many)
        path = path or few
    judged = judge.is_judged(trainer)
    if judged and (config.final_eval or config.eval_metrics_every):
        judging = time_judging(trainer, x)
        print_once(f'judge     {judging[0]:.3g} s the first time, {judging[1]:.3g} s from then on')

    def times(every: int) -> int:
        return -(-steps_left // every) if every else 1

    n, grids = judge.NUM_JUDGED, times(config.sample_every) - (not config.final_pictures)
    between = judged * (config.eval_metrics_every > 0) * (times(config.eval_metrics_every) - 1)
    final = judged * config.final_eval
    verdicts = between + final * len(per_image)  # a number of judgements
    parts = {
        'to start': start + load * (begins_at > 0),
        'for the first step': first - step,
        'training': step * steps_left,
        'saving': stall * times(config.save_every),
        'for held-out losses': held_out * times(config.eval_every),
        'for pictures': grids * (sum(per_image) * pictures.num_shown(trainer) * len(weights) + path),
        'for numbers': n * (between * per_image[0] + final * sum(per_image))
        + (judging[0] + judging[1] * (verdicts - 1)) * (verdicts > 0),
    }
    seconds = sum(parts.values())
    told = ', '.join(f'{value:.3g} s {name}' for name, value in parts.items() if value >= 0.005 * seconds)
    every = config.keep_every
    kept = config.num_training_steps // every - begins_at // every if every else 0
    there_already = len(list(config.run_dir.glob('last*.pt')))
    disk = size * max(0, config.keep_last + 1 + kept - there_already)  # one more while it is being written
    free = shutil.disk_usage(nearest_folder(config)).free
    minutes = f'{config.save_every * step / 60:.2g} minutes at most' if config.save_every else 'all since step_N.pt'
    print_once(
        f'\nthe run   {seconds / 3600:.3g} hours for {steps_left} steps: {told}\n'
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
