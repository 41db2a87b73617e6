"""The notebook examples/tour.ipynb: its cells run, print what is stored in it, and refuse weights that do not fit."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import saving
from config import SettingError
from tests.helpers import ROOT

PATH = ROOT / 'examples/tour.ipynb'
CELLS = json.loads(PATH.read_text())['cells']
CODE = [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code']
NUMBER = r'\d+\.?\d*'
# Runs the cells of a notebook in one namespace, as a kernel does, and prints their numbers and a dot for each figure.
PROGRAM = """
import json, sys
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt

def show():
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    print('figures', len(plt.get_fignums()))
    plt.close('all')

plt.show, names = show, {'__name__': '__main__'}
for i, code in enumerate(json.load(sys.stdin)):
    print('cell', i, flush=True)
    exec(compile(code, f'cell {i}', 'exec'), names)
"""


def run(cells, folder):
    """The output of each cell, in a fresh process with this working folder."""
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], input=json.dumps(cells), cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return re.split(r'cell \d+\n', done.stdout)[1:]


def stored(cell):
    """(text, PNG files) of the outputs that are in the notebook."""
    text = ''.join(''.join(output['text']) for output in cell['outputs'] if output['output_type'] == 'stream')
    return text, [base64.b64decode(o['data']['image/png']) for o in cell['outputs'] if 'image/png' in o.get('data', {})]


@pytest.mark.slow  # 40 s of one idle core
@pytest.mark.timeout(900)
def test_its_outputs_are_those_that_its_cells_have_today():
    """Words are the same, and numbers nearly; other machines round differently. Run from its own folder."""
    assert PATH.stat().st_size < 600_000
    for cell, printed in zip([c for c in CELLS if c['cell_type'] == 'code'], run(CODE, PATH.parent), strict=True):
        text, pictures = stored(cell)
        assert printed.count('figures 1\n') == len(pictures)
        now = printed.replace('figures 1\n', '')
        assert re.sub(NUMBER, '#', now) == re.sub(NUMBER, '#', text)
        before, after = ([float(x) for x in re.findall(NUMBER, text)] for text in (text, now))
        assert after == pytest.approx(before, rel=0.06, abs=0.02)
        assert all(picture.startswith(b'\x89PNG') and len(picture) < 100_000 for picture in pictures)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """A network of another shape, and one of this shape that has learned something else."""
    checkpoint = saving.load(ROOT / 'examples/digits.pt')
    saving.write(tmp_path / 'wide.pt', **checkpoint | dict(config=checkpoint['config'] | dict(channels=32)))
    with pytest.raises(SettingError, match=r"wide\.pt' is of another network: .* has shape"):
        saving.load_for_sampling(tmp_path / 'wide.pt')
    (weights,) = checkpoint['ema']['networks'].values()
    name = next(name for name in weights if weights[name].ndim == 4)
    weights[name] = torch.zeros_like(weights[name])
    shutil.copytree(ROOT / 'docs/records', tmp_path / 'docs/records')
    (tmp_path / 'examples').mkdir()
    saving.write(tmp_path / 'examples/digits.pt', **checkpoint)
    cells = [CODE[0].replace('os.getcwd())', f'{str(ROOT)!r})'), *CODE[1:3]]
    with pytest.raises(AssertionError, match=r'SettingError: The code has changed since examples/digits\.pt was made'):
        run(cells, tmp_path)


def test_the_first_cell_clones_and_installs_only_with_an_address(tmp_path):
    fake = f"""
import os, shutil, subprocess
def fake(words, check):
    print(*words)
    if words[0] == 'git':
        os.mkdir(words[-1])
        shutil.copy({str(ROOT / 'pyproject.toml')!r}, words[-1])
subprocess.run = fake
"""
    where = 'print(os.path.basename(os.getcwd()))'
    address = 'https://example.org/x.git'
    filled = CODE[0].replace("ADDRESS = ''", f'ADDRESS = {address!r}')
    printed = run([fake, filled, where, filled], tmp_path)
    assert f'git clone --depth 1 {address} repo' in printed[1] and 'pip install -q torch>=' in printed[1]
    assert printed[2:] == ['repo\n', '']  # a second time it does nothing
    assert run([fake, CODE[0], where], ROOT / 'examples')[1:] == ['', f'{ROOT.name}\n']
