"""Measures which outputs learn from which targets: all 36 pairs on the four processes, as a heat map and a page.

    python benchmarks/pairs.py [--seeds 3] [--steps 300] [--only fine|warned|remedied|none]      two runs at once

A cell is the share of 500 samples in which a support-vector classifier of real digits sees the requested digit. A pair
with a warning runs without changes, and with the remedy that the warning names; a refused pair does not run. Each run
is one line of benchmarks/pairs.jsonl with its commit and CPU seconds; runs with a line are not repeated. The page is
docs/pairs.md, the picture docs/pairs.png.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402
from config import PRESETS, Config, SettingError  # noqa: E402
from evaluation.detectors import support_vectors  # noqa: E402
from prediction import ROWS, check_time_range  # noqa: E402
from processes import PROCESSES, get_process  # noqa: E402
from training.advice import find_remedy, pair_warning  # noqa: E402

RECORD, PAGE, PICTURE = ROOT / 'benchmarks/pairs.jsonl', ROOT / 'docs/pairs.md', ROOT / 'docs/pairs.png'
SETTINGS = dict(channels=16, global_batch_size=64, base_lr=2e-3, warmup_steps=30, ema_decays=(0.97,), eval_every=0)
NUM_SAMPLES = 500
Cell = tuple[str, str, str]  # process, output, target
READING = (
    'A plain number is a pair without a warning. Brackets mark a pair that the program warns of before it trains: the '
    'first number is without changes, the second with the flags that the warning names first (other times, a loss '
    'weight, another target, or output F). So compare what the network outputs, on the diagonal; with output velocity, '
    'a loss on x0 works as well.'
)
OLDER_SAMPLERS = (
    'These samples were drawn before the samplers began [where an output says something about '
    'x0](solvers.md#where-the-first-step-begins). Two cells of `rf`, drawn again with one seed, are as they were: '
    'output x1 with target velocity 12 (here 11), with target x1 66 (here 61). The others have not been measured again.'
)


def config_of(cell: Cell, **more) -> Config:
    names = dict(zip(('process_name', 'model_type', 'target_type'), cell, strict=True))
    return Config(**PRESETS['digits_long'] | SETTINGS | names | more, wandb='disabled')


def verdict(cell: Cell) -> str:
    """The program's verdict on a pair before it trains: 'refused', 'warned' or 'fine'."""
    config = config_of(cell)
    try:
        check_time_range(config, get_process(config))
    except SettingError:
        return 'refused'
    return 'warned' if pair_warning(config, get_process(config)) else 'fine'


@functools.cache
def run_of(cell: Cell, remedied: bool) -> tuple[Cell, dict]:
    """The run for a cell, without changes or with the settings that its warning names: (cell, further settings).

    A remedy may be another output or target: then it is another cell, and its runs count for both.
    """
    config = config_of(cell)
    change = (find_remedy(config, get_process(config)) if remedied else None) or {}
    process, output, target = cell
    cell = (process, change.pop('model_type', output), change.pop('target_type', target))
    return cell, change


def train(cell: Cell, seed: int, steps: int, more: dict) -> dict:
    """One run: label agreement of samples of the averaged weights, CPU seconds and commit."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        grid = dict(solver='dpmpp_2m', time_grid='log_snr') if cell[0] == 've' else {}
        config = config_of(cell, seed=seed, ckpt_dir=folder, num_training_steps=steps, **grid, **more)
        trainer = main.build(config)
        micro_batches = trainer.batches.steps(trainer.step)
        while trainer.step < steps:
            trainer.train_step(next(micro_batches))
        module = next(iter(trainer.weights().values()))
        inputs = trainer.sample_inputs(NUM_SAMPLES)
        sampler = functools.partial(trainer.draw, solver=config.solver)
        x = trainer.drawing.samples(sampler, module, inputs)
        images, labels, *_ = trainer.train_loader.everything()
        agreement = float((support_vectors(images[:5000], labels[:5000])(x) == inputs.label).float().mean())
    seconds = round(time.process_time() - began, 1)
    commit = subprocess.check_output(['git', 'rev-parse', '--short', 'HEAD'], text=True, cwd=ROOT).strip()
    return dict(cell=cell, seed=seed, steps=steps, more=more, agreement=agreement, seconds=seconds, commit=commit)


def work(job: tuple[Cell, int, int, dict]) -> dict:
    torch.set_num_threads(1)
    return train(*job)


def means_of(runs: list[dict], cells: list[Cell], remedied: bool) -> dict[Cell, float]:
    """Mean label agreement of each cell over its seeds, without changes or with its remedy, if it has runs."""
    means = {}
    for cell in cells:
        wanted = run_of(cell, remedied)
        values = [run['agreement'] for run in runs if (tuple(run['cell']), run['more']) == wanted]
        means |= {cell: statistics.mean(values)} if values else {}
    return means


def draw_picture(cells: dict[Cell, float], verdicts: dict[Cell, str]) -> None:
    """A heat map for each process; cells with a warning are in brackets, refused cells are empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9), dpi=100, layout='constrained')
    for ax, process in zip(figure.subplots(1, len(PROCESSES)), PROCESSES, strict=True):
        table = [[cells.get((process, m, t), float('nan')) for t in ROWS] for m in ROWS]
        ax.imshow(table, vmin=0.1, vmax=1, cmap='RdYlGn')
        ax.set(title=process, xlabel='loss compares', ylabel='network outputs')
        ax.set_xticks(range(len(ROWS)), ROWS, rotation=45)
        ax.set_yticks(range(len(ROWS)), ROWS)
        for (i, m), (j, t) in itertools.product(enumerate(ROWS), enumerate(ROWS)):
            if (process, m, t) in cells:
                text = f'{100 * table[i][j]:.0f}'
                warned = verdicts[process, m, t] == 'warned'
                color = 'white' if table[i][j] < 0.25 else 'black'
                ax.text(j, i, f'({text})' if warned else text, color=color, ha='center', va='center', fontsize=9)
    figure.savefig(PICTURE)


def kept_outputs(runs: list[dict]) -> Iterator[str]:
    """A sentence for each output that enlarges errors, on the runs that keep it and change the times."""
    for output in ('x1', 'score'):
        kept = [100 * run['agreement'] for run in runs if run['cell'][:2] == ['rf', output] and run['more']]
        if kept:
            reached = f'{min(kept):.0f} to {max(kept):.0f} ({len(kept)} cells of one seed each)'
            yield f'With output {output} kept and logit-normal times, `rf` reaches {reached}.'


def no_better(cells: dict[Cell, float], remedied: dict[Cell, float], verdicts) -> Iterator[str]:
    """A sentence on the pairs whose warning names flags that do not help."""
    worse = [
        f'`{cell[0]}` {cell[1]} to {cell[2]} ({100 * cells[cell]:.0f}, then {100 * remedied[cell]:.0f})'
        for cell in cells
        if verdicts[cell] == 'warned' and cell in remedied and remedied[cell] < cells[cell]
    ]
    if worse:
        yield f'Pairs with a warning that the flags do not improve: {", ".join(worse)}.'


def table(process: str, types: Sequence[str], text_of: Callable[[Cell], str]) -> list[str]:
    """The lines of a table of outputs and targets."""
    head = ['| output \\ target | ' + ' | '.join(types) + ' |', '|---' * (len(types) + 1) + '|']
    return [*head, *(f'| {m} | ' + ' | '.join(text_of((process, m, t)) for t in types) + ' |' for m in types)]


def page(runs: list[dict], cells: dict[Cell, float], remedied: dict[Cell, float], verdicts, args) -> str:
    """The text of docs/pairs.md: first the nine cells of x0, noise and velocity on rf, then all."""

    def text_of(cell: Cell) -> str:
        if cell not in cells:
            return ''
        if verdicts[cell] == 'fine':
            return f'{100 * cells[cell]:.1f}'
        better = f' → {100 * remedied[cell]:.0f}' if cell in remedied else ''
        return f'({100 * cells[cell]:.0f}{better})'

    flags = ' '.join(f'--{name} {value}' for name, value in SETTINGS.items() if not isinstance(value, tuple))
    number = (
        f'On `rf`, the default process, after {args.steps} steps on digits; x1 is the noise. A number is the '
        f'percentage of {NUM_SAMPLES} samples in which a classifier of real digits sees the requested digit: the mean '
        f'over {args.seeds} seeds. Guessing gives 10.'
    )
    method = (
        'Uniform times in [0.001, 0.999], no loss weight. The network is small, so that all pairs take two hours: '
        f'`--preset digits_long {flags} --ema_decays 0.97`. On `ve`, samples are drawn with `--solver dpmpp_2m '
        '--time_grid log_snr`. Made by `python benchmarks/pairs.py`.'
    )
    parts = [
        '# Which outputs learn from which targets',
        'For readers who choose what the network outputs and what the loss compares (`--model_type` and '
        '`--target_type`).',
        '## x0, noise and velocity',
        number,
        '\n'.join(table('rf', ('x0', 'x1', 'velocity'), text_of)),
        READING,
        '## All pairs',
        method,
        '- An empty cell was not run, or is refused.\n'
        '- Outputs x1 and score are changed to F by the flags, so their second number is for F.',
        ' '.join([*kept_outputs(runs), *no_better(cells, remedied, verdicts)]),
        OLDER_SAMPLERS,
        'The classifier sees the digit, but not whether its shades are right: look at pictures, too.',
        '![label agreement of every pair](pairs.png)',
    ]
    for process in PROCESSES:
        parts += [f'### {process}', '\n'.join(table(process, list(ROWS), text_of))]
    kept = ('|', '-', '#', '!')  # not prose
    fill = functools.partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)
    return '\n\n'.join(part if part.startswith(kept) else fill(part) for part in parts) + '\n'


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3, help='seeds of every cell and of every remedy')
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--at_once', type=int, default=2, help='runs at a time, with one thread each')
    parser.add_argument('--only', choices=('fine', 'warned', 'remedied', 'none'), help='run these; none: only the page')
    parser.add_argument('--process', choices=PROCESSES, help='run only cells of this process')
    args = parser.parse_args()
    cells = list(itertools.product(PROCESSES, ROWS, ROWS))
    verdicts = {cell: verdict(cell) for cell in cells}
    wanted = [
        (kind, *run_of(cell, kind == 'remedied'), seed)
        for seed in range(args.seeds)
        for kind in ('fine', 'warned', 'remedied')
        for cell in cells
        if verdicts[cell] == ('fine' if kind == 'fine' else 'warned')
    ]
    runs = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    runs = [run for run in runs if run['steps'] == args.steps]
    done = [((*run['cell'],), run['seed'], args.steps, run['more']) for run in runs]
    jobs = []
    for kind, cell, more, seed in wanted:
        chosen = (args.only or kind) == kind and (args.process or cell[0]) == cell[0]
        job = (cell, seed, args.steps, more)
        if chosen and job not in done + jobs:
            jobs.append(job)
    if jobs:
        pool = multiprocessing.get_context('spawn').Pool(args.at_once)
        for run in pool.imap_unordered(work, jobs):
            runs.append(run)
            with open(RECORD, 'a') as file:
                file.write(json.dumps(run) + '\n')
            print(*run['cell'], f'{run["agreement"]:.3f}, {run["seconds"]:.0f} s', run['more'] or '', flush=True)
    means = means_of(runs, cells, False)
    remedied = means_of(runs, [cell for cell in cells if verdicts[cell] == 'warned'], True)
    draw_picture(means, verdicts)
    PAGE.write_text(page(runs, means, remedied, verdicts, args))
    fine = {cell: mean for cell, mean in means.items() if verdicts[cell] == 'fine'}
    for what, table in (('pairs without a warning', fine), ('remedies', remedied)):
        print(f'{what}: {sum(mean >= 0.9 for mean in table.values())} of {len(table)} reach 90%; below:')
        print({'/'.join(cell): round(mean, 3) for cell, mean in table.items() if mean < 0.9})


if __name__ == '__main__':
    run()
