"""benchmarks/examples.py: the cells of the table are made right from given numbers, and a run of it resumes."""

import json
import os
import signal
import time
from fnmatch import fnmatch

import pytest

from benchmarks import examples as benchmark

TABLE = """# Examples

| file | idea | paper | lines | claim | measured here |
|---|---|---|---|---|---|
| [`tiny.py`](tiny.py) | points | - | 9 | A beats B | not measured |
| [`other.py`](other.py) | as before | - | 9 | - | W 0.1, by hand |
"""
TINY = """'''Two runs on points.'''
from functools import partial

from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


class Mine(ExampleDiffusionTrainer):
    def samplers(self):
        return {'one': partial(self.draw, solver='euler', nfe=1)}

    def sample_metrics(self, x, inputs):
        return {'size': x.square().mean().sqrt(), 'real_size': 1.0, 'other': 2.0}


if __name__ == '__main__':
    side_by_side(
        {name: dict(trainer_class=Mine, base_lr=rate) for name, rate in (('slow', 1e-3), ('fast', 4e-3))},
        numbers=('final/one/*size',),
        default_flags='--preset toy2d --num_training_steps 4 --warmup_steps 1 --global_batch_size 64 --sample_every 0',
    )
"""


def test_a_mean_has_as_many_digits_as_its_spread():
    assert benchmark.with_spread([0.0561, 0.0583, 0.0605]) == '0.0583 ± 0.0022'
    assert benchmark.with_spread([97.0, 98.0, 99.0]) == '98.0 ± 1.0'
    assert benchmark.with_spread([610.0, 637.0, 664.0]) == '637 ± 27'
    assert benchmark.with_spread([0.25, 0.25, 0.25]) == '0.25'
    assert benchmark.with_spread([1.0, float('nan'), 1.0]) == 'not finite'


def test_a_cell_says_what_is_within_the_spread():
    """The spread of a difference: the root of the sum of both variances, as in reports/seeds.py."""
    runs = {
        'plain': {'steps_1/w': [0.40, 0.41, 0.42], 'steps_2/w': [0.2, 0.3, 0.4], 'steps_1/real_w': [0.1, 0.1, 0.1]},
        'mine': {'steps_1/w': [0.05, 0.06, 0.07], 'steps_2/w': [0.3, 0.4, 0.5], 'steps_1/real_w': [0.1, 0.1, 0.1]},
    }
    found = benchmark.phrase(runs, ['steps_1/w', 'steps_2/w'])
    assert found == 'plain 0.410 ± 0.010, 0.30 ± 0.10; mine 0.060 ± 0.010, 0.40 ± 0.10 (within the spread)'
    assert benchmark.phrase(runs, ['steps_2/w']).endswith('; mine 0.40 ± 0.10 (within the spread)')
    named = benchmark.phrase(runs, ['*/w'])
    assert named.startswith('plain steps_1 0.410 ± 0.010, steps_2 0.30 ± 0.10; mine steps_1 0.060')
    default = benchmark.cell('unknown', runs)
    assert default == f'steps_1/w: {benchmark.phrase(runs, ["steps_1/w"])}. steps_2/w: ' + benchmark.phrase(
        runs, ['steps_2/w']
    )
    one_run = {'run': {'none/w': [0.7, 0.72, 0.74], 'guided/w': [0.08, 0.09, 0.1]}}
    assert benchmark.phrase(one_run, ['*/w']) == 'none 0.720 ± 0.020; guided 0.090 ± 0.010'


@pytest.mark.parametrize(
    ('claim', 'found'),
    [
        ('mine steps_1/w < plain steps_1/w', ''),
        ('mine steps_2/w < plain steps_2/w', '**Claim: none, within the spread.** '),
        ('mine steps_1/w > plain steps_1/w', '**The claim does not hold here.** '),
    ],
)
def test_a_claim_within_the_spread_is_none(claim, found):
    runs = {
        'plain': {'steps_1/w': [0.40, 0.41, 0.42], 'steps_2/w': [0.2, 0.3, 0.4]},
        'mine': {'steps_1/w': [0.05, 0.06, 0.07], 'steps_2/w': [0.1, 0.2, 0.3]},
    }
    assert benchmark.verdict(claim, runs) == found


def test_only_the_last_cell_of_a_row_is_replaced():
    text = benchmark.with_cells(TABLE, {'tiny': 'W 0.25 ± 0.01 (3 seeds)'})
    assert text == TABLE.replace('not measured', 'W 0.25 ± 0.01 (3 seeds)')
    assert benchmark.with_cells(text, {'tiny': 'not measured'}) == TABLE


def test_every_wording_is_of_an_example_and_the_page_is_readable():
    names = benchmark.all_examples()
    assert {*benchmark.CELLS, *benchmark.CLAIMS, *benchmark.FLAGS} <= set(names)
    assert not set(names) & benchmark.OWN_COMMAND
    parts, numbers = benchmark.described('flow_map')
    assert parts == ['plain', 'lagrangian', 'eulerian', 'semigroup', 'uniform'] and 'final/*/wasserstein' in numbers


@pytest.mark.parametrize('example', benchmark.CLAIMS)
def test_every_claim_is_about_runs_and_numbers_of_its_example(example):
    runs, patterns = benchmark.described(example)
    run, name, sign, other, name_of_other = benchmark.CLAIMS[example].split()
    assert run in runs and other in runs and sign in '<>'
    for number in (name, name_of_other):
        assert any(fnmatch(number, pattern.removeprefix('final/')) for pattern in patterns), number


def test_seconds_of_all_calls_are_added(tmp_path, monkeypatch, capsys):
    """A job that is stopped, then finished by a later call; and one that ignores the signal is killed."""
    monkeypatch.setattr(benchmark, 'RUNS', tmp_path)
    monkeypatch.setattr(benchmark, 'hash_of', lambda example: 'hash')
    real = benchmark.subprocess.Popen
    deaf = ['sh', '-c', "trap '' TERM; sleep 60"]
    monkeypatch.setattr(benchmark.subprocess, 'Popen', lambda command, **more: real(deaf, **more))
    job = benchmark.Job('tiny', 0)
    time.sleep(0.5)
    wait = job.process.wait
    monkeypatch.setattr(job.process, 'wait', lambda timeout=None: wait(timeout and 0.2))
    job.stop()
    assert job.process.returncode == -signal.SIGKILL
    again = benchmark.Job('tiny', 0)
    os.killpg(again.process.pid, signal.SIGKILL)
    assert again.seconds() > 0.5
    again.process.wait()
    monkeypatch.setattr(again, 'seconds', lambda: 1234.0)
    assert not again.finish() and 'after 1234 s' in capsys.readouterr().out
    again.stop()
    assert float(again.clock.read_text()) == 1234


def test_the_hash_of_an_example_changes_with_those_that_it_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, 'FOLDER', tmp_path)
    (tmp_path / 'one.py').write_text('import examples.two as two\n')
    (tmp_path / 'three.py').write_text('from examples.two import f\n')
    found = []
    for text in ('f = 1\n', 'f = 2\n'):
        (tmp_path / 'two.py').write_text(text)
        found.append([benchmark.hash_of(name) for name in ('one', 'two', 'three')])
    assert len({*found[0], *found[1]}) == 6


@pytest.mark.slow
def test_a_run_of_the_benchmark_resumes(tmp_path, monkeypatch, capsys):
    (tmp_path / 'tiny.py').write_text(TINY)
    (tmp_path / 'README.md').write_text(TABLE)
    for name, path in dict(FOLDER='', PAGE='README.md', RUNS='runs', RESULTS='results.jsonl').items():
        monkeypatch.setattr(benchmark, name, tmp_path / path)
    started = []
    job = benchmark.Job
    monkeypatch.setattr(benchmark, 'Job', lambda *of: (started.append(of), job(*of))[1])

    assert benchmark.main(['tiny', '--seeds', '2', '--hours', '0']) == 0  # no time: nothing is trained
    assert started == [] and (tmp_path / 'README.md').read_text() == TABLE
    assert benchmark.main(['tiny', '--seeds', '1']) == 0
    assert started == [('tiny', 0)]
    assert benchmark.main(['tiny', '--seeds', '2']) == 0
    assert started == [('tiny', 0), ('tiny', 1)]  # seed 0 is not run again
    lines = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert [(line['seed'], line['run']) for line in lines] == [(0, 'slow'), (0, 'fast'), (1, 'slow'), (1, 'fast')]
    assert all(set(line['numbers']) == {'one/size', 'one/real_size'} and line['step'] == 4 for line in lines)
    values = [line['numbers']['one/size'] for line in lines if line['run'] == 'slow']
    assert f'slow {benchmark.with_spread(values)}' in (tmp_path / 'README.md').read_text()
    assert 'by hand' in (tmp_path / 'README.md').read_text()

    (tmp_path / 'tiny.py').write_text(TINY.replace('1e-3', '2e-3'))  # another file: run again, in another folder
    assert benchmark.main(['tiny', '--seeds', '1']) == 0
    assert started[2:] == [('tiny', 0)]
    broken = TINY.replace("return {'one'", "return {1 / 0: None, 'one'")
    (tmp_path / 'tiny.py').write_text(broken)
    capsys.readouterr()
    assert benchmark.main(['tiny', '--seeds', '1']) == 1
    assert 'ZeroDivisionError' in capsys.readouterr().out
