"""Measures one afternoon's work in this repo and with three others: a loss and data of one's own, samples, a number.

    python benchmarks/afternoon.py [--steps 200]      some minutes on two idle cores

The programs are in benchmarks/afternoon/. Each trains on the same folder of 1797 digits (PNG files, 8 x 8, a folder a
class) with batches of 128, and writes samples and their Frechet distance in pixels. Networks, times and optimizers are
what each repo's own examples use, and so are the samples behind the distances, so this compares work and what is lost,
not quality. Then each is killed after half of that time and started again by the same command, gets a folder with half
of a PNG file, and a learning rate of 1e6. Prints what they did; docs/results.md has the table. Needs the packages of
requirements.txt in this folder.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

ROOT, HERE = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent / 'afternoon'
OURS = '--dataset image_folder --image_size 8 --wandb disabled --sample_every 0'.split()


def lines_of(name: str) -> int:
    """Lines of a program that are neither empty nor its docstring, and flags of its command."""
    flags = sum(word.startswith('--') for word in command(name, Path(), Path(), 0, 0.0))
    code = re.sub(r'^""".*?"""', '', (HERE / f'with_{name}.py').read_text(), flags=re.S)
    return flags + sum(bool(line.strip()) for line in code.splitlines())


def command(name: str, data: Path, out: Path, steps: int, lr: float) -> list[str]:
    program = f'benchmarks/afternoon/with_{name}.py'
    if name == 'ours':
        own = ['--data_path', data, '--ckpt_dir', out, '--num_training_steps', steps, '--base_lr', lr]
        return ['sh', 'run.sh', program, *OURS, *map(str, own)]
    return [sys.executable, program, *map(str, (data, out, steps, lr))]


def run(words: Sequence[str], kill_after: float = 0.0) -> tuple[float, int, str]:
    """Seconds, exit code and output of a command; with `kill_after` all its processes are killed then."""
    began = time.monotonic()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipes)
    try:
        text, _ = process.communicate(timeout=kill_after or 900)
    except subprocess.TimeoutExpired:
        if not kill_after:
            raise
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return time.monotonic() - began, process.returncode, text


def write_digits(folder: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(images.reshape(-1, 8, 8), labels, strict=True)):
        path = folder / f'{int(label)}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype('uint8')).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--only', nargs='*', default=['ours', 'torchcfm', 'diffusers', 'lucidrains'])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, broken = Path(folder, 'digits'), Path(folder, 'broken')
        for path in (data, broken):
            write_digits(path)
        half = broken / '3/zzz.png'
        half.write_bytes(next(broken.glob('3/*.png')).read_bytes()[:60])
        for name in args.only:
            lr, out = 4e-3 if name == 'ours' else 1e-3, Path(folder, f'out_{name}')
            seconds, code, text = run(command(name, data, out, args.steps, lr))
            numbers = ' '.join(re.findall('.*frechet.*', text, re.I))
            print(f'\n# {name}: {lines_of(name)} lines, {seconds:.0f} s, exit code {code}\n{numbers}', flush=True)
            killed = Path(folder, f'killed_{name}')
            run(command(name, data, killed, args.steps, lr), kill_after=seconds / 2)
            again, code, text = run(command(name, data, killed, args.steps, lr))
            print(f'## killed after {seconds / 2:.0f} s, started again: {again:.0f} s, exit code {code}\n{text[:900]}')
            for what, where, rate in (('half of a file', broken, lr), ('learning rate 1e6', data, 1e6)):
                seconds, code, text = run(command(name, where, Path(folder, f'{what}_{name}'), args.steps, rate))
                print(f'## {what}: {seconds:.0f} s, exit code {code}\n{text[-400:]}', flush=True)


if __name__ == '__main__':
    main()
