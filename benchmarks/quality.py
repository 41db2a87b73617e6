"""Compares networks of several repos after equal CPU time, by loss and samples, on Fashion-MNIST or your own images.

    python benchmarks/quality.py                           # hours, two runs at once; called again, it continues
    python benchmarks/quality.py --only ours torchcfm --seeds 0 --seconds 300
    QUALITY_DATA=DIR python benchmarks/quality.py --seeds 0     # 32 x 32 images of DIR, augmented as in `small_images`

One loop for all: rectified flow with velocity output, uniform times, batches of 64, AdamW at 1e-3 (or our Muon at its
default of 4e-3) with 30 steps of warm-up, a moving average of 0.99, one thread. Time is the CPU time of training steps.
At each mark the average is judged by the loss on 1000 held-out images (the same noise and times for all), and by the
Frechet distance of 256 samples (2000 at the last mark) in pixels and in the features of a classifier, with 10 and 50
evaluations of the network. Each network uses the solver that was best for it at the first mark of seed 0. `nearest` is
the distance of samples to the nearest training image, divided by the same for held-out images: below 1 is memorising.
Needs the packages of requirements.txt in this folder, and Fashion-MNIST. Writes quality.jsonl, and its curves and table
into docs/results.md; `--seconds 0` only writes the curves and the table.
"""

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quality_entries import ENTRIES, FOLDER, SHAPE

from config import PRESETS, Config
from evaluation.detectors import get_detector
from evaluation.distances import Moments, frechet, mean_nearest_distance
from main import build
from optimizers import get_optimizer
from processes import RectifiedFlow
from runtime import files
from sampling import sample

BATCH = 64
MARKS = (120, 300, 600, 1200)  # seconds
SOLVERS, EVALUATIONS = ('adams', 'midpoint', 'dpmpp_2m'), (10, 50)
HERE = Path(__file__).resolve().parent
NAME = 'quality_images' if FOLDER else 'quality'
RESULTS, STATES = HERE / f'{NAME}.jsonl', HERE.parent / f'ckpts/{NAME}'
PAGE, PICTURE = HERE.parent / 'docs/results.md', HERE.parent / f'docs/{NAME}.png'
BEGIN, END = f'<!-- {NAME}: begin -->', f'<!-- {NAME}: end -->'
DRAWN = {'loss': 'held-out loss', 'pixels_10': 'Frechet distance in pixels', 'features_10': 'the same in features'}


class Data(NamedTuple):
    """Data and judges. Images are in [-1, 1]. `spaces`: name -> (features of images in [0, 1], their moments for 10,000
    training images)."""

    train: tuple[Tensor, Tensor]  # images, labels
    held_out: tuple[Tensor, Tensor]
    augment: Callable[[Tensor], tuple[Tensor, Tensor]]
    spaces: dict[str, tuple[Callable[[Tensor], Tensor], Moments]]
    classify: Callable[[Tensor], Tensor]


@functools.cache
def data() -> Data:
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = PRESETS['small_images' if FOLDER else 'fashion_mnist'] | dict(data_path=FOLDER)
        settings |= dict(ckpt_dir=folder, wandb='disabled')
        trainer = build(Config(**settings, experiment_name='data'))
    parts = [loader.everything() for loader in (trainer.train_loader, trainer.test_loader)]
    train, held_out = ((2 * x - 1, label) for x, label, *_ in parts)
    judge = {name: get_detector(trainer.judge.data, name) for name in ('pixels', 'classifier')}
    extractors = dict(pixels=judge['pixels'].features, features=judge['classifier'].features)
    spaces = {name: (fn, Moments(batches(fn, (train[0][:10_000] + 1) / 2))) for name, fn in extractors.items()}
    classify: Any = judge['classifier'].predict
    return Data(train, held_out, trainer.augmenter, spaces, classify)


def batches(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """fn(*tensors), computed for 250 rows at a time."""
    with torch.no_grad():
        return torch.cat([fn(*part).cpu() for part in zip(*(x.split(250) for x in tensors), strict=True)])


class Run:
    """The training of one entry with one seed. It resumes from its state in a file."""

    def __init__(self, name: str, seed: int):
        self.name, self.seed, self.entry = name, seed, ENTRIES[name]
        self.path = STATES / f'{name.replace(" ", "_").replace(",", "")}-{seed}.pt'
        torch.manual_seed(seed)
        self.network = self.entry.make(10 if self.entry.classes else 0)
        config = Config(optimizer=self.entry.optimizer, base_lr=self.entry.lr, weight_decay=0.01, wandb='disabled')
        self.optimizer = get_optimizer(config, self.network)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.rng = torch.Generator().manual_seed(seed + 1)  # for batches, noise and times
        self.steps, self.seconds = 0, 0.0
        if self.path.exists():
            kept = torch.load(self.path, weights_only=True)
            for part in ('network', 'average', 'optimizer'):
                getattr(self, part).load_state_dict(kept[part])
            self.rng.set_state(kept['rng'])
            self.steps, self.seconds = kept['steps'], kept['seconds']

    def save(self) -> None:
        parts = {part: getattr(self, part).state_dict() for part in ('network', 'average', 'optimizer')}
        STATES.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(self.path) as temporary:
            torch.save(dict(parts, rng=self.rng.get_state(), steps=self.steps, seconds=self.seconds), temporary)

    def train_until(self, seconds: float) -> None:
        saved = self.seconds
        while self.seconds < seconds:
            index = torch.randint(len(data().train[0]), (BATCH,), generator=self.rng)
            x0, label = (x[index] for x in data().train)
            x1, t = torch.randn(x0.shape, generator=self.rng), torch.rand(BATCH, generator=self.rng)
            torch.manual_seed(1000 * self.steps + self.seed)
            x0, _ = data().augment(x0)
            began = time.process_time()
            self.step(x0, x1, t, label)
            self.seconds += time.process_time() - began
            if self.seconds > saved + 60:
                saved = self.seconds
                self.save()

    def step(self, x0: Tensor, x1: Tensor, t: Tensor, label: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group['lr'] = self.entry.lr * min(1, (self.steps + 1) / 30)
        self.losses(self.network.train(), x0, x1, t, label).mean().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
                average.lerp_(weight, 1 - min(0.99, self.steps / (9 + self.steps)))

    def losses(self, network: nn.Module, x0: Tensor, x1: Tensor, t: Tensor, label: Tensor) -> Tensor:
        w = t[:, None, None, None]
        out = self.entry.call(network, (1 - w) * x0 + w * x1, t, label if self.entry.classes else None)
        return (out - (x1 - x0)).square().mean((1, 2, 3))

    def samples(self, n: int, solver: str, evaluations: int) -> tuple[Tensor, Tensor]:
        """n samples in [0, 1] and their labels, the same noise and labels for every run."""
        rng = torch.Generator().manual_seed(0)
        x1, label = torch.randn(n, *SHAPE, generator=rng), torch.arange(n) % 10
        model_fn = lambda x, t, label: self.entry.call(self.average, x, t, label)  # noqa: E731
        draw = lambda x1, y: sample(  # noqa: E731
            model_fn, RectifiedFlow(), x1, y if self.entry.classes else None, solver=solver, nfe=evaluations
        )
        return (batches(draw, x1, label).clamp(-1, 1) + 1) / 2, label

    def solver(self, evaluations: int) -> str:
        """The best solver for this entry by the Frechet distance in pixels; seed 0 finds it, other seeds read it."""
        for row in rows():
            if row['name'] == self.name:
                return row[f'solver_{evaluations}']
        pixels, real = data().spaces['pixels']
        distances = {name: frechet(Moments(pixels(self.samples(256, name, evaluations)[0])), real) for name in SOLVERS}
        return min(distances, key=distances.__getitem__)

    def judge(self, mark: float, is_last: bool) -> dict[str, Any]:
        self.average.eval()
        rng = torch.Generator().manual_seed(0)
        x0, label = data().held_out
        x1, t = torch.randn(x0.shape, generator=rng), torch.linspace(0.001, 0.999, len(x0))
        t = t[torch.randperm(len(t), generator=rng)]
        losses = batches(functools.partial(self.losses, self.average), x0, x1, t, label)
        row: dict[str, Any] = dict(name=self.name, seed=self.seed, mark=mark, steps=self.steps)
        row |= dict(
            loss=losses.mean().item(), loss_by_time=[losses[(t * 5).long() == i].mean().item() for i in range(5)]
        )
        for n in EVALUATIONS:
            row[f'solver_{n}'] = solver = self.solver(n)
            x, wanted = self.samples(2000 if is_last else 256, solver, n)
            train, held_out = ((images.flatten(1) + 1) / 2 for images, _ in (data().train, data().held_out))
            row[f'nearest_{n}'] = mean_nearest_distance(x.flatten(1), train[:10_000]) / mean_nearest_distance(
                held_out, train[:10_000]
            )
            for space, (features, real) in data().spaces.items():
                row[f'{space}_{n}'] = frechet(Moments(batches(features, x)), real)
            if self.entry.classes:
                row[f'agreement_{n}'] = (batches(data().classify, x) == wanted).double().mean().item()
        return row


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def work(job: tuple[str, int, int]) -> None:
    """Train and judge one run up to `seconds`; marks with results are not judged again."""
    name, seed, seconds = job
    torch.set_num_threads(1)
    done = {row['mark'] for row in rows() if (row['name'], row['seed']) == (name, seed)}
    marks = [mark for mark in MARKS if mark <= seconds]
    if set(marks) <= done:
        return
    try:
        run = Run(name, seed)
    except ImportError as error:
        print(f'{name}: left out: {error}', flush=True)
        return
    for mark in marks:
        run.train_until(mark)
        if mark not in done:
            run.save()
            row = run.judge(mark, is_last=mark == MARKS[-1])
            with open(RESULTS, 'a') as file:
                file.write(json.dumps(row) + '\n')
            print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)


def table() -> Iterator[str]:
    """Lines of a table: the mean of each number over seeds, and its standard deviation if there are several."""
    names = ['loss', *(f'{kind}_{n}' for kind in ('pixels', 'features', 'nearest', 'agreement') for n in EVALUATIONS)]
    names = [name for name in names if any(name in row for row in rows())]
    yield '| network | minutes | seeds | steps | loss | ' + ' | '.join(x.replace('_', ', ') for x in names[1:]) + ' |'
    yield '|---' * (4 + len(names)) + '|'
    order = {name: i for i, name in enumerate(ENTRIES)}
    key = lambda row: (row['mark'], order[row['name']])  # noqa: E731
    for (mark, place), found in itertools.groupby(sorted(rows(), key=key), key=key):
        same = list(found)
        cells = [[row[name] for row in same if name in row] for name in names]  # agreement: only with classes
        texts = [f'{mean(x):.4g}' + (f' +- {stdev(x):.2g}' if len(x) > 1 else '') if x else '' for x in cells]
        about = [list(ENTRIES)[place], f'{mark / 60:g}', len(same), round(mean(row['steps'] for row in same))]
        yield f'| {" | ".join(map(str, [*about, *texts]))} |'


def draw() -> None:
    """Draw the curves of the entries without classes: a line for each network, its seeds as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout='constrained')
    axes = figure.subplots(1, len(DRAWN))
    names = [name for name, entry in ENTRIES.items() if not entry.classes and ' as in ' not in name]
    for ax, (key, title) in zip(axes, DRAWN.items(), strict=True):
        for number, name in enumerate(names):
            values = {m: [row[key] for row in rows() if (row['name'], row['mark']) == (name, m)] for m in MARKS}
            values = {mark / 60: seeds for mark, seeds in values.items() if seeds}
            if values:
                ax.plot(values.keys(), [mean(x) for x in values.values()], f'C{number}', marker='.', label=name)
                ax.fill_between(values.keys(), *([f(x) for x in values.values()] for f in (min, max)), alpha=0.2)
        ax.set(title=title, xlabel='minutes of one core', xscale='log')
        ax.xaxis.set_major_formatter('{x:g}')
        ax.set_xticks([mark / 60 for mark in MARKS])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--only', nargs='*', choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument('--seeds', nargs='*', type=int, default=[0, 1, 2])
    parser.add_argument('--seconds', type=int, choices=(0, *MARKS), default=MARKS[-1])
    parser.add_argument('--at_once', type=int, default=2, help='runs at a time, with one thread each')
    args = parser.parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    data()  # trains the classifier once, before the processes need it
    for seed in args.seeds:  # seed 0 chooses the solvers
        with multiprocessing.get_context('spawn').Pool(args.at_once, maxtasksperchild=1) as pool:
            pool.map(work, [(name, seed, args.seconds) for name in args.only], chunksize=1)
    lines = '\n'.join(table())
    print(lines)
    draw()
    before, _, after = PAGE.read_text().partition(BEGIN)
    picture = f'![losses and distances by minutes]({PICTURE.name})'
    PAGE.write_text(f'{before}{BEGIN}\n\n{picture}\n\n{lines}\n\n{END}{after.partition(END)[2]}')


if __name__ == '__main__':
    main()
