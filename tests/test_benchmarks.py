"""The tables and pages that scripts of benchmarks/ write from files of runs, and the networks that they compare."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import pairs, recipes
from benchmarks.cifar10 import PUBLISHED, table
from benchmarks.recipes_entries import LearnedPositions, Registers, WithoutQKNorm
from networks.transformer import DiT, angles
from processes import RectifiedFlow
from tests.helpers import ROOT


def test_the_table_of_cifar10(tmp_path):
    """A run with two stages, and one number of the second; another run without results."""
    run = tmp_path / 'cifar10_conditional'
    run.mkdir()
    (run / 'config.json').write_text(json.dumps(dict(global_batch_size=500)))
    rates = [{'train/step': n, 'train/images_per_second': rate} for n, rate in ((1, 10), (2, 1000), (3, 1000))]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in rates))
    results = [(20_000, n, 'inception', 10 / n) for n in (4, 6, 8, 10, 20, 35)]
    results += [(50_000, 35, 'inception', 0.25), (50_000, 4, 'pixels', 7.0)]
    names = 'step', 'nfe', 'detector', 'frechet'
    lines = [json.dumps(dict(zip(names, values, strict=True))) + '\n' for values in results]
    (run / 'evaluation.jsonl').write_text(''.join(lines))
    (tmp_path / 'cifar10_unconditional').mkdir()
    found = list(table(tmp_path))
    assert found[2:] == [
        '| cifar10_conditional | 10 | 2.8 | 2.50 | 1.67 | 1.25 | 1.00 | 0.50 | 0.29 |',
        '| cifar10_conditional | 25 | 6.9 |  |  |  |  |  | 0.25 |',
    ]
    assert found[0].count('|') == found[2].count('|') and '1.97 (35)' in PUBLISHED


def test_recipes_page():
    """Each table of docs/recipes.md is the one of the measured runs."""
    page = recipes.PAGE.read_text()
    for part in recipes.PARTS:
        assert '\n'.join(recipes.table(part)) in page, f'{part}: run benchmarks/recipes.py --only'
    assert {row['name'] for row in recipes.rows()} <= {name for part in recipes.PARTS.values() for name in part}


def outputs(kind: type[DiT]) -> tuple[DiT, torch.Tensor]:
    """A network with random weights and its outputs for two images with sides that need padding."""
    torch.manual_seed(0)
    net = kind((1, 7, 6), 0, depth=2, width=16, heads=2)
    with torch.no_grad():
        for name, p in sorted(net.named_parameters()):
            key = name.replace('head.1', 'head')
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(sum(key.encode()))) / 5)
    return net, net(torch.linspace(-1, 1, 84).view(2, 1, 7, 6), torch.tensor([100.0, 700.0]))


def test_transformers_of_recipes():
    """Positions that are learned to be the sinusoids change nothing; registers and plain attention change outputs."""
    _, plain = outputs(DiT)
    learned, _ = outputs(LearnedPositions)
    place = angles(learned.grid, 8, torch.device('cpu'))
    learned.positions.data = torch.cat([place.cos(), place.sin()], 1)
    x = learned(torch.linspace(-1, 1, 84).view(2, 1, 7, 6), torch.tensor([100.0, 700.0]))
    torch.testing.assert_close(x, plain)
    registers, with_registers = outputs(Registers)
    assert with_registers.shape == plain.shape and (with_registers - plain).abs().max() > 1e-3
    with_registers.sum().backward()
    assert registers.registers.grad.abs().min() > 0
    assert (outputs(WithoutQKNorm)[1] - plain).abs().max() > 1e-3


@pytest.mark.parametrize('k', [2, 4])
def test_times_of_a_larger_side(k):
    """docs/recipes.md: pooled over k x k pixels, xt at t' with logit t' = logit t + log k is a multiple of xt at t."""
    t = torch.tensor(0.3)
    shifted = torch.sigmoid(torch.logit(t) + torch.log(torch.tensor(float(k))))
    x0, noise = torch.ones(1, 1, 64, 64), torch.randn(1, 1, 64 * k, 64 * k, generator=torch.Generator().manual_seed(0))
    process = RectifiedFlow()
    large = x0.repeat_interleave(k, 2).repeat_interleave(k, 3)
    pooled = torch.nn.functional.avg_pool2d(process.compute_xt(large, noise, process(shifted[None])), k)
    pooled, coefs = pooled / process.alpha(shifted), process(t)
    assert float(pooled.mean()) == pytest.approx(1, abs=0.03)
    assert float(pooled.std()) == pytest.approx(float(coefs.sigma / coefs.alpha), rel=0.03)


def test_the_page_of_pairs_is_made_from_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, 'PAGE', tmp_path / 'pairs.md')
    monkeypatch.setattr(pairs, 'draw_picture', lambda *args: None)
    monkeypatch.setattr(sys, 'argv', ['pairs.py', '--only', 'none'])
    pairs.run()
    assert (tmp_path / 'pairs.md').read_text() == (ROOT / 'docs/pairs.md').read_text()


def test_tables_are_measured_once_and_again_after_a_failure(tmp_path):
    """`loop` fails at first: it is not written down as measured, and the next call begins with it."""
    (tmp_path / 'benchmarks').mkdir()
    shutil.copy(ROOT / 'benchmarks/tables.sh', tmp_path / 'benchmarks')
    (tmp_path / 'bin').mkdir()
    fake = tmp_path / 'bin/python'
    fake.write_text('#!/bin/sh\necho "$@" >> ran\n[ "$1" != benchmarks/loop.py ] || [ -e fixed ]\n')
    (tmp_path / 'bin/git').write_text('#!/bin/sh\necho abc123\n')
    for program in (tmp_path / 'bin').iterdir():
        program.chmod(0o755)
    command = ['sh', 'benchmarks/tables.sh', 'data', 'loop', 'digits']
    call = dict(cwd=tmp_path, env=os.environ | dict(PATH=f'{tmp_path}/bin:{os.environ["PATH"]}'))
    assert subprocess.run(command, **call).returncode == 1
    assert (tmp_path / 'benchmarks/tables.txt').read_text() == 'data abc123\n'
    (tmp_path / 'fixed').touch()
    assert subprocess.run(command, **call).returncode == 0
    assert (tmp_path / 'benchmarks/tables.txt').read_text() == 'data abc123\nloop abc123\ndigits abc123\n'
    ran = ['data.py', 'loop.py', 'loop.py', 'digits.py --seeds 5 --peer_seeds 3']
    assert (tmp_path / 'ran').read_text().split('\n') == [*(f'benchmarks/{name}' for name in ran), '']
