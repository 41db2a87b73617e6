"""Measures the recipes of docs/recipes.md, and writes its tables.

    python benchmarks/recipes.py                             # hours, two runs at once; called again, it continues
    python benchmarks/recipes.py --only digits transformers  # some parts; --seeds 3, of digits only

Parts: `digits` (the preset, every seed), `fashion_mnist` and `transformers` (its preset for the time of 1000 steps of
the unchanged preset, seed 0), and `resolution` (Fashion-MNIST resized to 16 x 16 and 32 x 32, for the time of 250 and
1000 steps). So that a busy machine does not change the numbers of steps, some steps of the preset and of the recipe are
timed in turn, in CPU time of one thread. Each run is a line of recipes.jsonl, with its commit. Needs Fashion-MNIST, and
heavyball (requirements.txt in this folder).
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recipes_entries import RECIPES, TRANSFORMERS, Entry, register
from config import PRESETS, Config
from main import build
from runtime import files

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / 'recipes.jsonl', HERE.parent / 'docs/recipes.md'
TIMED_STEPS = 10
SHIFTS = {'-log 2': -math.log(2), '0': 0.0, 'log 2': math.log(2)}  # time_mean, the mean of logit(t)
RESOLUTION = {
    f'{side} x {side}, mean {name}': Entry(dict(image_size=(side,), time_mean=shift))
    for side in (16, 32)
    for name, shift in SHIFTS.items()
}
PARTS: dict[str, Mapping[str, Entry]] = {
    'digits': {name: entry for name, entry in RECIPES.items() if entry.digits},
    'fashion_mnist': RECIPES,
    'transformers': TRANSFORMERS,
    'resolution': RESOLUTION,
}
SHOWN = {'loss': '{:.4f}', 'spread': '{:.2f}', 'labels': '{:.1%}', 'frechet': '{:.2f}'}


def resized(side: int) -> str:
    """A file with Fashion-MNIST's images, resized to `side`; made once."""
    path = HERE.parent / f'data/fashion_mnist_{side}.npz'
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            config = Config(**PRESETS['fashion_mnist'] | dict(ckpt_dir=folder, wandb='disabled'))
            images, labels, *_ = build(config).train_loader.everything()
        small = torch.cat([F.interpolate(x, side, mode='bilinear', antialias=True) for x in images.split(1000)])
        with files.atomic_write(path) as temporary, open(temporary, 'wb') as file:
            np.savez(file, x=(255 * small).round().byte().numpy(), label=labels.numpy())
    return str(path)


def settings_of(part: str, entry: Entry) -> dict[str, Any]:
    """All settings of a run but its seed, steps and folder."""
    if part == 'digits':
        return PRESETS['digits'] | entry.settings
    settings = PRESETS['fashion_mnist'] | entry.settings
    if part == 'resolution':
        side = settings.pop('image_size')[0]
        settings |= dict(dataset='arrays', data_path=resized(side), attention_resolutions=(side // 4,))
    return settings


def seconds_of_steps(config: Config, entry: Entry) -> Iterator[float]:
    """Train a new run; yields the CPU seconds of each step."""
    trainer = build(config, entry.trainer)
    for micro_batches in trainer.batches.steps(0):
        began = time.process_time()
        trainer.train_step(micro_batches)
        yield time.process_time() - began


def measure(part: str, name: str, seed: int) -> dict[str, Any]:
    """Train one run, and judge its first average."""
    entry = PARTS[part][name]
    with tempfile.TemporaryDirectory() as folder:
        fixed = dict(seed=seed, ckpt_dir=folder, wandb='disabled', num_workers=0)
        settings = settings_of(part, entry) | fixed
        if part != 'digits':
            preset = Config(**PRESETS['fashion_mnist'] | fixed | dict(experiment_name='preset'))
            loops = seconds_of_steps(preset, Entry({})), seconds_of_steps(Config(**settings), entry)
            times = list(itertools.islice(zip(*loops, strict=True), TIMED_STEPS))[2:]
            ratio = sum(a for a, _ in times) / sum(b for _, b in times)  # not medians: SOAP has two kinds of steps
            settings['num_training_steps'] = int((250 if name.startswith('16') else 1000) * ratio)
        trainer, began = build(Config(**settings, experiment_name='run'), entry.trainer), time.process_time()
        for micro_batches in itertools.islice(trainer.batches.steps(0), trainer.config.num_training_steps):
            trainer.train_step(micro_batches)
        seconds = time.process_time() - began
        judge, module = trainer.judge, trainer.judge.judged_weights()[1]
        own = judge.held_out_means(module, lambda batch, _, fn: (trainer.loss_fn(batch, fn), batch.t)).means()
        by_time = [value for key, value in own.items() if key.startswith('loss_t_')]
        found = judge.judge_sampler(next(iter(trainer.samplers())), 1000, trainer.step)
        row = dict(part=part, name=name, seed=seed, commit=commit(), steps=trainer.step, seconds=round(seconds, 1))
        row |= dict(loss=judge.reference_loss(module)['eval/reference'], spread=stdev(by_time) / fmean(by_time))
        return row | dict(labels=found['label_agreement'], frechet=found['frechet'], numbers=found, by_time=by_time)


def commit() -> str:
    command = ['git', 'rev-parse', '--short', 'HEAD']
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def work(job: tuple[str, str, int]) -> None:
    torch.set_num_threads(1)
    register()
    try:
        row = measure(*job)
    except ImportError as error:
        print(f'{job[1]}: left out: {error}', flush=True)
        return
    with open(RESULTS, 'a') as file:
        file.write(json.dumps(row) + '\n')
    print({key: row[key] for key in ('part', 'name', 'seed', 'steps', 'seconds', *SHOWN)}, flush=True)


# ---------------------------------------------------------------- the page


def cells(found: list[dict[str, Any]]) -> list[str]:
    """One cell for each number of SHOWN: the mean over seeds, and its standard deviation if there are several."""
    texts = []
    for key, form in SHOWN.items():
        values = [row[key] for row in found]
        spread = f' ± {form.format(stdev(values))}' if len(values) > 1 else ''
        texts.append(form.format(fmean(values)) + spread if values else '')
    return texts


def table(part: str) -> Iterator[str]:
    """The lines of one table."""
    if not any(row['part'] == part for row in rows()):
        yield 'Not measured yet.'
        return
    heads = [f'{part} | steps', 'loss', 'spread over t', 'labels', 'Frechet']
    yield f'| {" | ".join(heads)} |\n|{"---|" * (1 + len(heads))}'
    for name in PARTS[part]:
        found = [row for row in rows() if (row['part'], row['name']) == (part, name)]
        if found:
            yield f'| {name} | {found[0]["steps"]} | {" | ".join(cells(found))} |'


def write_page() -> None:
    text = PAGE.read_text()
    for part in PARTS:
        begin, end = f'<!-- {part}: begin -->', f'<!-- {part}: end -->'
        before, _, after = text.partition(begin)
        lines = '\n'.join(table(part))
        text = f'{before}{begin}\n\n{lines}\n\n{end}{after.partition(end)[2]}'
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--only', nargs='*', choices=PARTS, default=list(PARTS))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--at_once', type=int, default=2, help='runs at a time, with one thread each')
    args = parser.parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    if 'resolution' in args.only:
        for side in (16, 32):
            resized(side)  # before several runs want the file at once
    done = {(row['part'], row['name'], row['seed']) for row in rows()}
    jobs = [
        (part, name, seed)
        for part in args.only
        for seed in range(args.seeds if part == 'digits' else 1)
        for name in PARTS[part]
        if (part, name, seed) not in done
    ]
    with multiprocessing.get_context('spawn').Pool(args.at_once, maxtasksperchild=1) as pool:
        pool.map(work, jobs, chunksize=1)
    write_page()


if __name__ == '__main__':
    main()
