"""Runs each example of examples/ with three seeds, and writes its numbers into the table of examples/README.md.

    python benchmarks/examples.py                   # two runs at once; called again, it continues where it stopped
    python benchmarks/examples.py flow_map reflow   # only these
    python benchmarks/examples.py --hours 0         # trains nothing, and writes the table from examples.jsonl

Every file that calls `side_by_side` is run, with one thread, as `sh run.sh examples/X.py --seed S`. The numbers that it
prints are kept in examples.jsonl, one line for each run and seed, with a hash of the file and of examples that it
imports: if these have not changed, it is not run again. After --hours (4) all runs are stopped. The seconds of each
example are printed at the end.

In the table, only the cell `measured here` is generated, once all seeds have been run: mean ± standard deviation over
the seeds. A number that does not differ from the first run's (or sampler's, in an example of one run) by more than the
standard deviations of both together is followed by "within the spread". A claim of CLAIMS is judged in the same way.
"""

import argparse
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.examples_entries import CELLS, CLAIMS, FLAGS, OWN_COMMAND
from reports import page
from reports.seeds import change
from runtime import files

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE, RUNS = ROOT / 'examples', ROOT / 'examples/README.md', ROOT / 'ckpts/examples'
RESULTS = Path(__file__).with_suffix('.jsonl')
WITHIN = ' (within the spread)'
Numbers = dict[str, dict[str, list[float]]]  # run -> name of a number -> its values over the seeds


# ---------------------------------------------------------------- the table


def with_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, to the second digit of the latter."""
    if not all(map(math.isfinite, values)):
        return 'not finite'
    mean, spread = fmean(values), stdev(values) if len(values) > 1 else 0.0
    if spread == 0:
        return f'{mean:.4g}'
    digits = max(0, 1 - int(f'{spread:.1e}'.split('e')[1]))
    return f'{mean:.{digits}f} ± {spread:.{digits}f}'


def phrase(runs: Numbers, names: Sequence[str]) -> str:
    """'run a, b; other c (within the spread), d' for the numbers of each run, or of each sampler if there is one run.
    Where `names` has a * that stands for several samplers, they are named."""
    rows = {run: found for run, numbers in runs.items() if (found := matching(names, numbers))}
    if len(rows) == 1:
        (numbers,) = rows.values()
        own = -1 if len({name.split('/')[0] for name in numbers}) < len(numbers) else 0  # the part that differs
        rows = {name.split('/')[own]: {'': values} for name, values in numbers.items()}
    several = max(map(len, rows.values()), default=0) > len(names)
    first, texts = next(iter(rows.values()), {}), []
    for row, numbers in rows.items():
        same = [numbers is not first and change(first.get(name, []), v) == 'none' for name, v in numbers.items()]
        cells = []
        for (name, values), is_same in zip(numbers.items(), same, strict=True):
            sampler = f'{name.split("/")[0]} ' if several else ''
            cells.append(sampler + with_spread(values) + WITHIN * (is_same and not all(same)))
        texts.append(f'{row} {", ".join(cells)}{WITHIN * all(same)}')
    return '; '.join(texts)


def verdict(claim: str, runs: Numbers) -> str:
    """The verdict on a claim of CLAIMS, for its cell: '' if it holds by more than both standard deviations."""
    run, name, sign, other, name_of_other = claim.split()
    difference = change(runs[other][name_of_other], runs[run][name])
    if difference == 'none':
        return '**Claim: none, within the spread.** '
    return '' if not difference or (sign == '>') == (float(difference) > 0) else '**The claim does not hold here.** '


def matching(patterns: Sequence[str], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers whose names match, in the order of the patterns."""
    return {name: numbers[name] for pattern in patterns for name in numbers if fnmatch(name, pattern)}


def cell(example: str, runs: Numbers) -> str:
    """The cell `measured here`."""
    default = {name: name for numbers in runs.values() for name in numbers if '/real_' not in name}
    texts = {wording: phrase(runs, names.split()) for wording, names in CELLS.get(example, default).items()}
    found = verdict(CLAIMS[example], runs) if example in CLAIMS else ''
    return found + '. '.join(f'{wording}: {text}' for wording, text in texts.items() if text)


def with_cells(text: str, cells: Mapping[str, str]) -> str:
    """The page with the last cell of each example's row replaced."""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        found = re.match(r'\| \[`(\w+)\.py`\]', line)
        if found and found[1] in cells:
            lines[i] = f'{line.rstrip().removesuffix("|").rstrip().rpartition(" | ")[0]} | {cells[found[1]]} |\n'
    return ''.join(lines)


def numbers_of(lines: Sequence[Mapping[str, Any]], example: str, seeds: int) -> Numbers | None:
    """The numbers of an example, by run, from the lines of its file as it is; None if a seed is missing."""
    own = [line for line in lines if line['hash'] == hash_of(example)]
    newest = {(line['seed'], line['run']): line['numbers'] for line in own if line['seed'] < seeds}
    if {seed for seed, _ in newest} != set(range(seeds)):
        return None
    runs: Numbers = {}
    for (_, run), numbers in newest.items():
        for name, value in numbers.items():
            runs.setdefault(run, {}).setdefault(name, []).append(float(value))
    return runs


def write_table(examples: Sequence[str], seeds: int) -> None:
    """Rewrite the rows whose seeds have all been run, and print the seconds of each example."""
    lines, cells = recorded(), {}
    for example in examples:
        if runs := numbers_of(lines, example, seeds):
            cells[example] = f'{cell(example, runs)} ({seeds} seeds)'
    files.write_text(PAGE, with_cells(PAGE.read_text(), cells))
    total = 0.0
    for example in examples:
        own = {(x['seed'], x['run']): x['seconds'] for x in lines if x['hash'] == hash_of(example)}
        total += sum(own.values())
        print(f'{example:20} {sum(own.values()):8.0f} s in {len({seed for seed, _ in own})} seeds')
    print(f'{"all":20} {total:8.0f} s of one core = {total / 7200:.1f} hours of two; {len(cells)} rows written')


# ---------------------------------------------------------------- the runs


def hash_of(example: str) -> str:  # changes with the file, the examples that it imports, and its flags
    text = (FOLDER / f'{example}.py').read_text()
    imported = re.findall(r'^(?:from|import) examples\.(\w+)', text, re.MULTILINE)
    others = [(FOLDER / f'{name}.py').read_text() for name in imported]
    return files.digest(example, text, *others, FLAGS.get(example, ''), size=6)


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def all_examples() -> list[str]:
    """The files that call `side_by_side`, in the order of the table."""
    found = {path.stem for path in FOLDER.glob('*.py') if 'side_by_side(' in path.read_text()} - OWN_COMMAND
    rows = re.findall(r'^\| \[`(\w+)\.py`\]', PAGE.read_text(), re.MULTILINE)
    return sorted(found, key=lambda name: rows.index(name) if name in rows else len(rows))


def described(example: str) -> tuple[list[str], list[str]]:
    """(names of its runs, patterns of its numbers): what the file passes to `side_by_side`."""
    with mock.patch('scripts.compare.side_by_side') as called:
        runpy.run_path(str(FOLDER / f'{example}.py'), run_name='__main__')
    given = {**dict(zip(('parts', 'numbers'), called.call_args.args, strict=False)), **called.call_args.kwargs}
    return list(given['parts']), list(given.get('numbers', ['final/*']))


class Job:
    """One seed of one example, in a process of its own group."""

    def __init__(self, example: str, seed: int):
        self.example, self.seed, self.hash, self.started = example, seed, hash_of(example), time.monotonic()
        self.name, self.folder = f'{example}_{seed}', RUNS / self.hash
        self.clock = self.folder / f'{self.name}.seconds'  # seconds of all earlier calls
        flags = f'--seed {seed} --experiment_name {self.name} --wandb disabled {FLAGS.get(example, "")}'.split()
        command = ['sh', 'run.sh', str(FOLDER / f'{example}.py'), *flags, '--ckpt_dir', str(self.folder)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / f'{self.name}.log'
        with self.log.open('w') as log:
            environment = os.environ | {'OMP_NUM_THREADS': '1', 'NPROC': '1'}
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """Its run saves its state, and the next call resumes it. It is killed if that takes more than two minutes."""
        self.clock.write_text(str(self.seconds()))
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def seconds(self) -> float:
        """Seconds of all calls together."""
        earlier = float(self.clock.read_text()) if self.clock.exists() else 0.0
        return earlier + time.monotonic() - self.started

    def finish(self) -> bool:
        """Append its numbers to the results; print the end of its log if it failed."""
        seconds = self.seconds()
        print(f'{self.name}: exit code {self.process.returncode} after {seconds:.0f} s', flush=True)
        if self.process.returncode:
            print('\n'.join(self.log.read_text().splitlines()[-5:]), flush=True)
            return False
        parts, patterns = described(self.example)
        about = dict(example=self.example, seed=self.seed, hash=self.hash, seconds=round(seconds / len(parts), 1))
        with RESULTS.open('a') as results:
            for part in parts:
                run = page.read(self.folder / f'{self.name}_{part}')
                values = {name: value for line in run.lines for name, value in line.items()}
                numbers = {name.removeprefix('final/'): v for name, v in matching(patterns, values).items()}
                commit = (run.starts[-1:] or [{}])[0].get('commit')
                line = about | dict(run=part, step=run.step, commit=commit, numbers=numbers)
                results.write(json.dumps(line) + '\n')
        return True


def train(jobs: list[tuple[str, int]], at_once: int, deadline: float) -> int:
    """Run the jobs, `at_once` at a time, until the deadline. Returns how many failed."""
    running: list[Job] = []
    failed = 0
    try:
        while (jobs or running) and time.monotonic() < deadline:
            while jobs and len(running) < at_once:
                running.append(Job(*jobs.pop(0)))
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                failed += not job.finish()
    finally:
        for job in running:
            job.stop()
            print(f'{job.name}: stopped, the next call resumes it')
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('examples', nargs='*', help='names of files without .py; none: all')
    options.add_argument('--seeds', type=int, default=3)
    options.add_argument('--hours', type=float, default=4, help='hours after which all runs are stopped')
    options.add_argument('--at_once', type=int, default=2, help='runs at a time, each on one thread')
    chosen = options.parse_args(argv)
    examples = chosen.examples or all_examples()
    done = {(line['seed'], line['hash']) for line in recorded()}
    jobs = [(name, seed) for name in examples for seed in range(chosen.seeds) if (seed, hash_of(name)) not in done]
    print(f'{len(jobs)} of {len(examples) * chosen.seeds} runs of examples are left', flush=True)
    failed = train(jobs, chosen.at_once, time.monotonic() + 3600 * chosen.hours)
    write_table(examples, chosen.seeds)
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
