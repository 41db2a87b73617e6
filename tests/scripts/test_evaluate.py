"""evaluate.py: metrics against independent computations, the record of results, and refused options."""

import dataclasses
import json
import math
import subprocess
import types

import numpy as np
import pytest
import torch

from config import SettingError
from evaluation import detectors
from evaluation.detectors import JudgedData
from main import load_run
from reports import page
from scripts import evaluate as program
from scripts.evaluate import Evaluate
from scripts.generate import Generate, generate
from scripts.samples import Samples
from tests.helpers import ROOT, launch_env
from trainer import ExampleDiffusionTrainer


@pytest.fixture
def run(short_run):
    return short_run


@pytest.fixture
def judge(run, monkeypatch):
    monkeypatch.setattr(detectors, 'CLASSIFIER_STEPS', 60)

    def go(**options):
        return program.evaluate(Evaluate(**(dict(run=str(run), num=40, detector='pixels', nfe=(4,)) | options)))

    return go


@pytest.mark.slow
def test_the_numbers_belong_to_the_images_that_generate_writes(judge, run, tmp_path):
    (line,) = judge()
    generate(Generate(run=str(run), out=str(tmp_path / 'x.npz'), num=40, nfe=4, batch_size=9))
    x = np.load(tmp_path / 'x.npz')['arr_0'][..., 0].reshape(40, 64) / 255 * 2 - 1
    trainer = load_run(run)
    train = 2 * trainer.train_loader.everything()[0].flatten(1).numpy() - 1
    gap = np.square(x.mean(0) - train.mean(0)).sum()
    root = np.linalg.eigvals(np.cov(x.T) @ np.cov(train.T)).astype(complex)
    by_hand = gap + np.trace(np.cov(x.T)) + np.trace(np.cov(train.T)) - 2 * np.sqrt(root).real.sum()
    assert line['frechet'] == pytest.approx(by_hand, rel=1e-3)
    assert line['real_frechet'] < 0.2 * line['frechet']


def test_if_a_sample_is_not_finite_there_are_losses_but_no_distances(judge, monkeypatch, capsys):
    draw = ExampleDiffusionTrainer.draw

    def first_is_nan(*given, **more):
        x = draw(*given, **more)
        x[0] = math.nan
        return x

    monkeypatch.setattr(ExampleDiffusionTrainer, 'draw', first_is_nan)
    (line,) = judge(seed=7)
    assert 'frechet' not in line and line['eval/loss'] > 0 and line['images_per_second'] > 0
    assert 'warning: 1 samples have values that are not finite' in capsys.readouterr().out


def test_samples_of_another_shape_are_not_compared_with_the_data(judge, monkeypatch, capsys):
    monkeypatch.setattr(ExampleDiffusionTrainer, 'decode', lambda self, x: x.flatten(2) if len(x) == 20 else x)
    (line,) = judge(num=20, batch_size=20)
    assert 'frechet' not in line and line['eval/loss'] > 0 and line['images_per_second'] > 0
    assert 'no distances from the data: samples have shape (1, 64), items of digits have (1, 8, 8)' in (
        capsys.readouterr().out
    )


def test_data_that_do_not_vary_are_not_compared(judge, monkeypatch, capsys):
    varied = JudgedData.example
    monkeypatch.setattr(JudgedData, 'example', property(lambda self: varied.func(self)[:1].expand(9, -1, -1, -1)))
    (line,) = judge(seed=5)
    assert 'frechet' not in line and 'no distances from the data: all items of digits are equal' in (
        capsys.readouterr().out
    )


def test_a_metric_of_the_detector_replaces_the_experiments_of_the_same_name(judge, monkeypatch):
    def opened(*given, **more):
        trainer = load_run(*given, **more)
        trainer.sample_metrics = lambda x, inputs: dict(frechet=-1.0, mine=2.0)
        return trainer

    monkeypatch.setattr('scripts.samples.load_run', opened)
    (line,) = judge(seed=8)
    assert line['mine'] == 2 and line['frechet'] > 0


def test_a_result_is_recorded_with_all_settings_and_not_computed_again(judge, run, monkeypatch):
    (run / 'evaluation.jsonl').unlink(missing_ok=True)
    first = judge(weights=('ema', 'raw'), nfe=(4, 6), guidance_scale=(1.0,))
    assert len(first) == 4 and len({line['frechet'] for line in first}) == 4
    assert [(line['weights'], line['nfe']) for line in first] == [('ema', 4), ('ema', 6), ('raw', 4), ('raw', 6)]
    kept = [json.loads(text) for text in (run / 'evaluation.jsonl').read_text().splitlines()]
    assert kept == first
    recorded = (
        'step weights weights_digest solver num_sample_steps nfe time_grid guidance_scale guidance_interval '
        'guidance_rescale num seed bits detector detector_digest data train_images held_out_images commit measures'
    )
    assert set(recorded.split()) <= first[0].keys() and first[0]['step'] == 12
    monkeypatch.setattr(Samples, 'numbers', lambda *_: 1 / 0)
    assert judge(weights=('ema', 'raw'), nfe=(4, 6), guidance_scale=(1.0,)) == first
    older = [line | dict(commit='older') for line in first]
    (run / 'evaluation.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in older))
    assert judge(weights=('ema', 'raw'), nfe=(4, 6), guidance_scale=(1.0,)) == older  # the commit does not matter
    with pytest.raises(ZeroDivisionError):
        judge(seed=1)
    text = page.blocks(page.evaluations(first))
    assert {'frechet', 'label_agreement'} <= set(text.split()) and max(map(len, text.split('\n'))) <= 120
    assert 'bits_per_dim' not in text  # no line has it


def test_losses_and_bits_per_dimension(judge):
    (line,) = judge(bits=6)
    assert line['eval/loss'] > 0 and line['eval/reference'] > 0 and line['bits_images'] == 6
    assert 0 < line['bits_per_dim'] < 20 and 0 < line['bits_per_dim_error'] < 2


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(detector='vgg'), "detector='vgg' is not a choice of --detector. Choose one of: inception, dinov2"),
        (dict(num=3), 'num=3: at least 10 samples'),
        (dict(solver=('adam',)), "solver='adam' is not a choice"),
        (dict(weights=('ema_0.99',)), 'has ema_0.5, ema_0.9, raw'),
        (dict(detector='inception', detector_weights='gone.pth'), "detector_weights='gone.pth': there is no such file"),
        (dict(weights=()), 'weights: name at least one'),
        (dict(run='nowhere'), 'nowhere'),
    ],
)
def test_impossible_options_are_refused(judge, options, words):
    with pytest.raises(SettingError, match=words):
        judge(**options)


@pytest.mark.parametrize('num', [20, 64])  # the covariance of n samples has the rank n - 1
def test_few_samples_for_the_features_give_a_warning(judge, run, capsys, num):
    judge(num=num, nfe=(3,))
    assert f'warning: {num} samples are too few for 64 features: frechet is far from' in capsys.readouterr().out


def test_weights_of_another_network_are_refused(judge, run):
    with pytest.raises(SettingError, match=r'its weights cannot be loaded .*--detector_weights PATH'):
        judge(detector='inception', detector_weights=str(run / 'last.pt'))


@pytest.mark.slow
def test_two_processes_compute_the_same_numbers_as_one(judge, run):
    (one_process,) = judge(seed=7)
    (run / 'evaluation.jsonl').unlink()
    command = ['sh', 'run.sh', 'evaluate.py', '--run', str(run), '--num', '40', '--detector', 'pixels', '--nfe', '4']
    done = subprocess.run(
        [*command, '--seed', '7'], cwd=ROOT, env=launch_env(2), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and 'frechet' in done.stdout, done.stderr
    two_processes = json.loads((run / 'evaluation.jsonl').read_text())
    for name in ('frechet', 'kid', 'precision', 'coverage', 'eval/loss', 'eval/reference'):
        assert two_processes[name] == pytest.approx(one_process[name], rel=1e-4), name


def test_bits_are_the_mean_negative_log_likelihood_of_the_held_out_images(run, monkeypatch):
    """They are -log p / (64 ln 2) + log2(17 / 2), with dequantized pixels and the class of each image."""
    seen = {}

    def likelihood(model_fn, process, x, label, **settings):
        seen.update(x=x, label=label)
        return types.SimpleNamespace(log_prob=-64 * math.log(2) * torch.arange(6.0))

    monkeypatch.setattr('evaluation.likelihood.log_likelihood', likelihood)
    trainer = load_run(run)
    bits = trainer.judge.bits_per_dim(trainer.network, 6)
    assert bits['bits_per_dim'] == pytest.approx(2.5 + math.log2(17 / 2))
    assert bits['bits_per_dim_error'] == pytest.approx(np.std(np.arange(6), ddof=1) / 6**0.5)
    x, label, *_ = trainer.test_loader.take(range(6))
    assert torch.equal(seen['label'], label) and torch.equal(((seen['x'] + 1) / 2 * 17).floor(), (x * 16).round())


def test_agreement_is_with_the_requested_classes(judge, monkeypatch):
    def three(data, weights):
        return dataclasses.replace(
            detectors.pixels(data, weights), digest='three', predict=lambda x: torch.full((len(x),), 3)
        )

    monkeypatch.setitem(detectors.DETECTORS, 'pixels', three)
    (line,) = judge()
    assert line['label_agreement'] == pytest.approx(0.1)  # the requested classes are 0 to 9 in turn


class Deblurring(ExampleDiffusionTrainer):
    """The blurred image is a condition."""

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        return dataclasses.replace(prepared, cond={'blurred': torch.nn.functional.avg_pool2d(prepared.x0, 3, 1, 1)})


class Shifted(ExampleDiffusionTrainer):
    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        return dataclasses.replace(prepared, x0=prepared.x0.roll(1, -1))


def test_bits_condition_the_network_on_what_it_has_learned(tiny_config, build_trainer, monkeypatch):
    """The network gets the null class if it learned no classes, and the conditions of each image."""
    seen = {}

    def likelihood(model_fn, process, x, label, cond, **settings):
        seen.update(x=x, label=label, cond=cond)
        return types.SimpleNamespace(log_prob=torch.zeros(len(x)))

    monkeypatch.setattr('evaluation.likelihood.log_likelihood', likelihood)
    trainer = build_trainer(tiny_config(label_dropout=1.0))
    trainer.judge.bits_per_dim(trainer.network, 6)
    assert (seen['label'] == 10).all()
    trainer = build_trainer(tiny_config(experiment_name='deblurring'), Deblurring)
    trainer.judge.bits_per_dim(trainer.network, 6)
    x, label, *_ = trainer.test_loader.take(range(6))
    blurred = torch.nn.functional.avg_pool2d(2 * x - 1, 3, 1, 1)
    assert seen['label'].equal(label) and seen['cond']['blurred'].equal(blurred)
    with pytest.raises(SettingError, match='needs the image as x0'):
        trainer = build_trainer(tiny_config(experiment_name='shifted'), Shifted)
        trainer.judge.bits_per_dim(trainer.network, 6)


def test_each_block_of_images_has_its_own_probes(run, monkeypatch):
    """A second call draws the same probes."""
    drawn = []

    def likelihood(model_fn, process, x, label, **settings):
        drawn.append(torch.rand(1).item())
        return types.SimpleNamespace(log_prob=torch.zeros(len(x)))

    monkeypatch.setattr('evaluation.likelihood.log_likelihood', likelihood)
    trainer = load_run(run)
    for _ in range(2):
        trainer.judge.bits_per_dim(trainer.network, 6, at_once=3)
    assert len(set(drawn)) == 2 and drawn[:2] == drawn[2:]
