"""Which outputs learn from which targets: all 36 pairs on the four processes, on digits, as a heat map and a page.

    python benchmarks/pairs.py [--seeds 3] [--steps 300] [--only unwarned]      about 20 s a run on one core

A cell is the share of 500 samples in which a support-vector classifier of real digits sees the asked digit. Each run is
one line of benchmarks/pairs.jsonl; runs that are there are not done again. The page is docs/pairs.md, the picture
docs/pairs.png.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402
import metrics  # noqa: E402
import pictures  # noqa: E402
from config import Config, SettingError  # noqa: E402
from loss_weights import pair_warning  # noqa: E402
from prediction import ROWS, check_time_range  # noqa: E402
from processes import PROCESSES, get_process  # noqa: E402

RECORD, PAGE, PICTURE = ROOT / 'benchmarks/pairs.jsonl', ROOT / 'docs/pairs.md', ROOT / 'docs/pairs.png'
SETTINGS = dict(channels=16, global_batch_size=64, base_lr=2e-3, warmup_steps=30, ema_decays=(0.97,), eval_every=0)
NUM_SAMPLES = 500
Cell = tuple[str, str, str]  # process, output, target


def config_of(cell: Cell, **more) -> Config:
    names = dict(zip(('process_name', 'model_type', 'target_type'), cell, strict=True))
    return Config(**SETTINGS, **names, wandb='disabled', **more)


def verdict(cell: Cell) -> str:
    """What the program says of a pair before it trains: 'refused', 'warned' or 'fine'."""
    config = config_of(cell)
    try:
        check_time_range(config, get_process(config))
    except SettingError:
        return 'refused'
    return 'warned' if pair_warning(config, get_process(config)) else 'fine'


def train(cell: Cell, seed: int, steps: int) -> dict:
    """One run: label agreement of samples of the averaged weights, and seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        grid = dict(solver='dpmpp_2m', time_grid='log_snr') if cell[0] == 've' else {}
        config = config_of(cell, seed=seed, ckpt_dir=folder, num_training_steps=steps, **grid)
        trainer = main.build(config)
        shards = trainer.shards()
        while trainer.step < steps:
            trainer.train_step(shards)
        module = next(iter(trainer.weights().values()))
        inputs = trainer.sample_inputs(NUM_SAMPLES)
        sampler = functools.partial(trainer.draw, solver=config.solver)
        x = pictures.generate(trainer, sampler, module, inputs)
        images, labels, *_ = trainer.train_loader.everything()
        agreement = metrics.label_agreement(x.flatten(1), inputs.label, images.flatten(1), labels)
    return dict(cell=cell, seed=seed, steps=steps, agreement=agreement, seconds=time.monotonic() - began)


def summary(runs: list[dict]) -> dict[Cell, list[float]]:
    cells: dict[Cell, list[float]] = {}
    for run in runs:
        cells.setdefault(tuple(run['cell']), []).append(run['agreement'])
    return cells


def draw_picture(cells: dict[Cell, list[float]]) -> None:
    """A heat map for each process; a cell that is warned of is in brackets, one that is refused is empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9), dpi=100, layout='constrained')
    for ax, process in zip(figure.subplots(1, len(PROCESSES)), PROCESSES, strict=True):
        table = [[statistics.mean(cells.get((process, m, t), [float('nan')])) for t in ROWS] for m in ROWS]
        ax.imshow(table, vmin=0.1, vmax=1, cmap='RdYlGn')
        ax.set(title=process, xlabel='loss compares', ylabel='network outputs')
        ax.set_xticks(range(len(ROWS)), ROWS, rotation=45)
        ax.set_yticks(range(len(ROWS)), ROWS)
        for (i, m), (j, t) in itertools.product(enumerate(ROWS), enumerate(ROWS)):
            if (process, m, t) in cells:
                text = f'{100 * table[i][j]:.0f}'
                warned = verdict((process, m, t)) == 'warned'
                ax.text(j, i, f'({text})' if warned else text, ha='center', va='center', fontsize=9)
    figure.savefig(PICTURE)


def write_page(cells: dict[Cell, list[float]], steps: int) -> None:
    seeds = sorted({len(values) for values in cells.values()})
    settings = ' '.join(f'--{name} {value}' for name, value in SETTINGS.items() if not isinstance(value, tuple))
    lines = [
        '# Which outputs learn from which targets',
        '',
        f'Digits, {steps} steps, uniform times in [0.001, 0.999], no loss weight. A number is the percentage of '
        f'{NUM_SAMPLES} samples in which a classifier of real digits sees the asked digit,',
        f'a mean over {" or ".join(map(str, seeds))} seed(s). Guessing gives 10. In brackets: the program warns of '
        'this pair before it trains, with the remedy. Empty: refused, or not run.',
        '',
        '![label agreement of every pair](pairs.png)',
        '',
        f'Made by `python benchmarks/pairs.py` ({settings} --ema_decays 0.97; '
        'on `ve` with dpmpp_2m on the log_snr grid).',
    ]
    for process in PROCESSES:
        lines += ['', f'## {process}', '', '| output \\ target | ' + ' | '.join(ROWS) + ' |', '|---' * 7 + '|']
        for m in ROWS:
            row = []
            for t in ROWS:
                values = cells.get((process, m, t))
                text = f'{100 * statistics.mean(values):.1f}' if values else ''
                row.append(f'({text})' if values and verdict((process, m, t)) == 'warned' else text)
            lines.append(f'| {m} | ' + ' | '.join(row) + ' |')
    PAGE.write_text('\n'.join(lines) + '\n')


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--only', choices=('unwarned', 'nothing'), help='leave out pairs that are warned of, or all')
    args = parser.parse_args()
    runs = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    done = {(tuple(run['cell']), run['seed']) for run in runs if run['steps'] == args.steps}
    cells = list(itertools.product(PROCESSES, ROWS, ROWS))
    verdicts = {cell: verdict(cell) for cell in cells}
    wanted = {'unwarned': ('fine',), 'nothing': (), None: ('fine', 'warned')}[args.only]
    for kind, seed in itertools.product(wanted, range(args.seeds)):
        for cell in cells:
            if verdicts[cell] == kind and (cell, seed) not in done:
                runs.append(train(cell, seed, args.steps))
                with open(RECORD, 'a') as file:
                    file.write(json.dumps(runs[-1]) + '\n')
                print(*cell, f'{runs[-1]["agreement"]:.3f}, {runs[-1]["seconds"]:.0f} s', flush=True)
    table = summary([run for run in runs if run['steps'] == args.steps])
    draw_picture(table)
    write_page(table, args.steps)
    fine = {cell: statistics.mean(values) for cell, values in table.items() if verdicts[cell] == 'fine'}
    print(f'{sum(value >= 0.9 for value in fine.values())} of {len(fine)} pairs without a warning reach 90%')
    print('below:', {'/'.join(cell): round(value, 3) for cell, value in fine.items() if value < 0.9})


if __name__ == '__main__':
    torch.set_num_threads(1)
    run()
