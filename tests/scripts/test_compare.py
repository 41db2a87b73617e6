"""compare.side_by_side: trains runs one after the other, and shows their numbers in a table and on a page."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import main
from config import Config
from evaluation import judge
from reports import dry_run, page
from reports.parts import aligned
from scripts.compare import newest_samples, numbers_of, side_by_side
from tests.helpers import TINY, as_flags, columns_in
from trainer import ExampleDiffusionTrainer


class Halved(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        self.log('half', 0.5)
        return super().loss_fn(batch, model_fn) / 2


PARTS = {'plain': {}, 'halved': dict(trainer_class=Halved), 'fast': dict(base_lr=0.01)}


@pytest.fixture
def compared(tmp_path, monkeypatch, build_trainer):
    """`compared(parts, *flags)` calls `side_by_side` as examples/mine.py would, with tiny default settings."""
    monkeypatch.setattr(judge, 'NUM_JUDGED', 32)
    defaults = ' '.join(
        as_flags(TINY | dict(num_training_steps=3, warmup_steps=1, eval_every=3, save_every=3, final_eval=True))
    )

    def run(parts, *flags, numbers=('eval/*', 'final/*/frechet')):
        monkeypatch.setattr(sys, 'argv', ['examples/mine.py', '--ckpt_dir', str(tmp_path), *flags])
        side_by_side(parts, numbers, default_flags=defaults)

    return run


def test_runs_are_trained_and_compared(compared, tmp_path, capsys):
    compared(PARTS)
    text = capsys.readouterr().out
    table = columns_in(text)
    assert re.search(r'^plain  .*\nhalved  .*\nfast  ', text, re.M)  # runs are rows
    losses = [float(value) for value in table['eval/loss']]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=0.05) and losses[2] != losses[0]
    assert {'eval/loss', 'adams/frechet', 'eval/half'} <= set(table) and 'train/loss' not in table
    configs = [json.loads((tmp_path / f'mine_{part}/config.json').read_text()) for part in PARTS]
    assert [config['base_lr'] for config in configs] == [1e-3, 1e-3, 0.01]
    text = (tmp_path / 'mine_compared.html').read_text()
    assert all(f'mine_{part}' in text for part in PARTS)

    compared(PARTS)
    text = capsys.readouterr().out
    assert text.count('is finished') == 3 and columns_in(text) | table == columns_in(text)


def test_flags_win_over_defaults_and_are_in_the_name(compared, tmp_path, capsys):
    compared({'plain': {}, 'fast': dict(base_lr=0.01)}, '--num_training_steps', '4', '--seed', '7', '--log_every', '1')
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'mine_seed=7_num_training_steps=4_compared.html',
        'mine_seed=7_num_training_steps=4_fast',
        'mine_seed=7_num_training_steps=4_plain',
    ]
    config = json.loads((tmp_path / 'mine_seed=7_num_training_steps=4_fast/config.json').read_text())
    assert (config['num_training_steps'], config['base_lr'], config['log_every']) == (4, 0.01, 1)


def test_a_given_experiment_name_is_used(compared, tmp_path):
    compared({'a': {}}, '--experiment_name', 'mine_too')
    assert (tmp_path / 'mine_too_a/last.pt').exists()


def test_a_wrong_setting_of_one_run_leaves_the_earlier_runs(compared, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compared({'plain': {}, 'bad': dict(solver='none')})
    assert stop.value.code == 2 and "solver='none'" in capsys.readouterr().err
    assert (tmp_path / 'mine_plain/last.pt').exists() and not (tmp_path / 'mine_bad').exists()
    with pytest.raises(SystemExit):
        compared({'worse': dict(base_lr=-1.0)})
    assert 'base_lr=-1.0: must be positive' in capsys.readouterr().err


def test_a_flag_that_a_run_overrides_is_refused(compared, tmp_path, capsys):
    """A flag from which a run derives its own value is allowed."""
    parts = {'plain': {}, 'fast': dict(base_lr=0.01)}
    with pytest.raises(SystemExit) as stop:
        compared(parts, '--base_lr', '0.5')
    assert stop.value.code == 2 and "base_lr=0.5: run 'fast' of this file sets its own" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    longer = dict(num_training_steps=lambda c: 2 * c.num_training_steps)
    compared({'longer': longer}, '--num_training_steps', '4', '--experiment_name', 'it')
    assert json.loads((tmp_path / 'it_longer/config.json').read_text())['num_training_steps'] == 8


def test_check_rehearses_each(compared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, 'SECONDS_FOR_STEPS', 0.1)
    monkeypatch.setattr(dry_run, 'NUM_JUDGED', 32)
    compared({'plain': {}, 'halved': dict(trainer_class=Halved)}, '--check')
    text = capsys.readouterr().out
    assert text.count('checkpoint') >= 2 and 'mine_plain' in text and 'mine_halved' in text
    assert list(tmp_path.iterdir()) == []


def test_columns_are_aligned():
    assert aligned([['', 'a', 'bb'], ['long', 0.123456, None], ['x', 1, 2]]) == (
        '      a       bb\nlong  0.1235\nx     1       2'
    )


def test_draw_accepts_sampling_settings(tmp_path, build_trainer, tiny_config):
    trainer = main.build(tiny_config())
    inputs, model_fn, calls = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network), []

    def counted(*args, **kwargs):
        calls.append(1)
        return model_fn(*args, **kwargs)

    trainer.draw(counted, inputs, 'heun', nfe=6)
    assert len(calls) == 6
    assert Config().num_sample_steps != 6


def test_evaluations_that_differ_in_one_setting_are_separate_numbers():
    about = dict(detector='pixels', weights='ema', solver='adams', time_grid='logistic', nfe=4, guidance_scale=1.0)
    others = dict(detector='dinov2', weights='raw', solver='heun', time_grid='cosine', nfe=8, guidance_scale=2.0)
    about, others = about | dict(num=40, seed=0), others | dict(num=50, seed=1)
    lines = [about | {name: value, 'frechet': float(i)} for i, (name, value) in enumerate(others.items())]
    run = page.Run(Path('mine'), {}, [], evaluations=[about | {'frechet': 9.0}, *lines])
    assert list(numbers_of(run).values()) == [0, 9, *range(8)]


def test_the_newest_pictures_of_the_judged_weights_are_shown(tmp_path):
    (tmp_path / 'samples').mkdir()
    for step, name in itertools.product((10, 20), ('adams_ema_0.9', 'adams_raw', 'heun_ema_0.9')):
        Image.new('RGB', (4, 4)).save(tmp_path / f'samples/step_{step:07d}_{name}.png')
    run = page.Run(tmp_path, dict(solver='adams'), [])
    shown, others = newest_samples(run, 'mine'), newest_samples(run, 'mine', False)
    assert re.findall('alt="(.*?)"', others) == ['mine: step 20, heun, averaged weights (EMA 0.9)']
    assert (
        'alt="mine: step 20, adams, averaged weights (EMA 0.9)"' in shown
        and 'step 10' not in shown
        and 'raw' not in shown
    )
