"""Measures how training costs grow, as exponents of log-log lines; and two processes against one with two threads.

    python benchmarks/scaling.py              the exponents, benchmarks/scaling.png and scaling.json
    python benchmarks/scaling.py --processes  images/s of two processes with one thread each over one with two threads

Each line varies one size by factors of two or four, and times all sizes in turn. The slope is fitted to all points, and
to the last two, where the fixed cost of a step counts less: 1 means proportional cost. Images are random; networks are
small enough for two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.figure
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaved import HERE, in_turn, write

from config import Config
from main import build

ROOT, ROUNDS = HERE.parent, 5
SMALL = dict(dataset='arrays', channels=16, global_batch_size=32, optimizer='adamw', wandb='disabled', keep_every=0)
# growing quantity -> (sizes, settings at a size, the timed call: a step, a save or a draw of samples)
LINES: dict[str, tuple[list[int], Callable[[int], dict[str, Any]], str]] = {
    'batch, images': ([16, 32, 64, 128], lambda n: dict(global_batch_size=n), 'step'),
    'width, channels': ([16, 32, 64, 128], lambda n: dict(channels=n, global_batch_size=16), 'step'),
    'resolution, pixels a side': ([8, 16, 32, 64], lambda n: dict(side=n, global_batch_size=16), 'step'),
    'data set, images': ([1000, 4000, 16000, 64000], lambda n: dict(images=n), 'step'),
    'checkpoint: width, channels': ([32, 64, 128, 256], lambda n: dict(channels=n), 'save'),
    'samples': ([32, 64, 128, 256], lambda n: dict(samples=n), 'draw'),
}


def data(folder: Path, images: int, side: int) -> Path:
    path = folder / f'{images}x{side}.npz'
    if not path.exists():
        rng = np.random.default_rng(0)
        np.savez(
            path, images=rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8), labels=np.arange(images) % 10
        )
    return path


def timed_call(
    folder: Path, name: str, timed: str, images: int = 1000, side: int = 8, samples: int = 0, **settings: Any
):
    """The call `timed` of a trainer with these settings, as a function without arguments."""
    path = str(data(folder, images, side))
    trainer = build(Config(**SMALL | settings, data_path=path, ckpt_dir=str(folder), experiment_name=name))
    if timed == 'draw':
        sampler, inputs = next(iter(trainer.samplers().values())), trainer.sample_inputs(samples)
        return lambda: trainer.drawing.samples(sampler, trainer.network, inputs)
    if timed == 'save':
        return lambda: trainer.checkpoints.save(trainer.step, wait=True)
    steps = trainer.batches.steps(trainer.step)
    return lambda: trainer.train_step(next(steps))


def slope(sizes: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def exponents() -> None:
    rows: list[dict[str, Any]] = []
    print('| growing | sizes | seconds | exponent | of the last two |\n|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (sizes, settings, timed)) in enumerate(LINES.items()):
            calls = {str(n): timed_call(Path(folder), f'line{i}_{n}', timed, **settings(n)) for n in sizes}
            times = in_turn(calls, ROUNDS)
            seconds = [median(times[str(n)]) for n in sizes]
            whole, last = slope(sizes, seconds), slope(sizes[-2:], seconds[-2:])
            rows.append(dict(line=name, timed=timed, sizes=sizes, seconds=seconds, exponent=whole, last=last))
            shown = ', '.join(f'{s:.3g}' for s in seconds)
            print(
                f'| {name} ({timed}) | {", ".join(map(str, sizes))} | {shown} | {whole:.2f} | {last:.2f} |', flush=True
            )
    draw(rows)
    write('scaling', rows)


def draw(rows: list[dict[str, Any]]) -> None:
    figure = matplotlib.figure.Figure((9, 5))
    axes = figure.add_subplot()
    for row in rows:
        label = f'{row["line"]} ({row["timed"]}): {row["exponent"]:.2f}, {row["last"]:.2f}'
        axes.loglog([n / row['sizes'][0] for n in row['sizes']], row['seconds'], 'o-', label=label)
    axes.set(xlabel='size relative to the smallest', ylabel='seconds')
    axes.legend(title='exponent of all sizes, of the last two', loc='center left', bbox_to_anchor=(1.02, 0.5))
    figure.savefig(HERE / 'scaling.png', dpi=120, bbox_inches='tight')


def processes(rounds: int = 3) -> None:
    """Time whole runs of run.sh, in turn. images/s is the median in the record, without its first line."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for n in (1, 2) if i % 2 == 0 else (2, 1):
                name = f'run{i}_{n}'
                flags = f'--preset digits_long --num_training_steps 160 --log_every 20 --experiment_name {name}'
                quiet = '--no_final_eval --no_final_pictures --eval_every 0 --sample_every 0 --wandb disabled'
                command = ['sh', str(ROOT / 'run.sh'), *flags.split(), *quiet.split(), '--ckpt_dir', folder]
                subprocess.run(command, check=True, capture_output=True, env=os.environ | dict(NPROC=str(n)))
                lines = map(json.loads, Path(folder, name, 'metrics.jsonl').read_text().splitlines())
                found = [line['train/images_per_second'] for line in lines if 'train/images_per_second' in line]
                rates[n].append(median(found[1:]))
                print(f'{n} process(es): {rates[n][-1]:.0f} images/s', flush=True)
    print(f'two over one: {median(b / a for a, b in zip(rates[1], rates[2], strict=True)):.3f}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--processes', action='store_true')
    processes() if parser.parse_args().processes else exponents()
