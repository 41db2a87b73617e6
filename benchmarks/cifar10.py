"""Prints the FIDs that cifar10.sh has measured so far, next to published ones.

python benchmarks/cifar10.py [FOLDER]
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reports import page

EVALUATIONS = (4, 6, 8, 10, 20, 35)
PUBLISHED = """
Published, with 50,000 samples (number of evaluations):
  EDM                     1.97 (35), with classes 1.79 (35)           Karras et al. 2022, table 2
  flow_matching           2.07                                        README of facebookresearch/flow_matching
  torchcfm                3.5, by a user 3.8 after 19 h on a 4090     its pull request 65 and issue 105
  flow matching, Euler    20.63 (8), 64.27 (4), 146 (2), 314 (1)      Ai et al. 2025
  flow maps               8.10 (1), 4.37 (2), 3.34 (4), 3.33 (8)      Boffi et al. 2025
"""


def table(folder: Path) -> Iterator[str]:
    """Lines of a table: a row for each run and number of images, FID by evaluations. Absent runs have no rows."""
    yield '| run | million images | hours | ' + ' | '.join(f'FID, {n}' for n in EVALUATIONS) + ' |'
    yield '|---' * (3 + len(EVALUATIONS)) + '|'
    for path in sorted(folder.glob('cifar10_*/evaluation.jsonl')):
        batch = json.loads((path.parent / 'config.json').read_text())['global_batch_size']
        rates = [line['train/images_per_second'] for line in page.read(path.parent).lines
                 if 'train/images_per_second' in line]  # fmt: skip
        lines = [line for line in page.lines_in(path) if line['detector'] == 'inception']
        for step in sorted({line['step'] for line in lines}):
            found = {line['nfe']: line['frechet'] for line in lines if line['step'] == step and 'frechet' in line}
            hours = f'{step * batch / median(rates) / 3600:.1f}' if rates else ''
            cells = [f'{found[n]:.2f}' if n in found else '' for n in EVALUATIONS]
            yield f'| {path.parent.name} | {step * batch / 1e6:.3g} | {hours} | {" | ".join(cells)} |'


if __name__ == '__main__':
    print('\n'.join(table(Path(sys.argv[1] if len(sys.argv) > 1 else 'ckpts'))))
    print(PUBLISHED)
