"""Measures waiting times: for the help, for the message on a wrong flag or setting, for the first training step.

    python benchmarks/startup.py [--repeats 5]

Whole programs are started by run.sh, one of each kind in turn. The first step is over when its line is in the record.
Unlike most other benchmarks this gives absolute seconds, so it needs a machine that does nothing else.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from interleaved import write

ROOT = Path(__file__).resolve().parent.parent
RUN = ['sh', str(ROOT / 'run.sh')]
# name -> (flags, text that the output must contain, goal in seconds)
MESSAGES = {
    '--help': (['--help'], '--base_lr', 0.2),
    'a flag that does not exist': (['--no_such_flag', '1'], 'no_such_flag', 1.0),
    'a value that cannot be right': (['--base_lr', '-1'], 'must be positive', 1.0),
    'an unknown solver (needs torch)': (['--solver', 'no_such'], 'adams', 5.0),
    'a level that the images do not have (needs data)': (['--attention_resolutions', '5'], '--attention_resol', 5.0),
}


def seconds_of_message(flags: list[str], words: str) -> float:
    began = time.perf_counter()
    result = subprocess.run([*RUN, *flags], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert words in result.stdout + result.stderr, result.stderr
    return seconds


def seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory() as folder:
        flags = ['--experiment_name', 'startup', '--ckpt_dir', folder, '--wandb', 'disabled', '--log_every', '1']
        began = time.perf_counter()
        run = subprocess.Popen([*RUN, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        record = Path(folder, 'startup', 'metrics.jsonl')
        while not (record.exists() and '"train/step": 1' in record.read_text()):
            assert run.poll() is None, 'the run ended before its first step'
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        run.terminate()
        run.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--repeats', type=int, default=5)
    repeats = parser.parse_args().repeats
    kinds = {name: lambda f=flags, w=words: seconds_of_message(f, w) for name, (flags, words, _) in MESSAGES.items()}
    kinds['the first training step'] = seconds_to_first_step
    goals = {name: goal for name, (_, _, goal) in MESSAGES.items()} | {'the first training step': 4.0}
    times = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, wait in kinds.items():
            times[name].append(wait())
    print('| waiting for | median, s | least, s | goal, s |\n|---|---|---|---|')
    rows = [dict(kind=name, seconds=median(all_), least=min(all_), goal=goals[name]) for name, all_ in times.items()]
    for row in rows:
        print('| {kind} | {seconds:.2f} | {least:.2f} | {goal} |'.format(**row))
    write('startup', rows)


if __name__ == '__main__':
    main()
