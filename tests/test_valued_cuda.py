"""Evaluation, sampling, pictures and numbers on a pretended GPU that holds values: they equal the CPU's.

test_fake_cuda.py tests what a training step on a GPU waits for.
"""

import numpy as np
import pytest
import torch

import main
import utils
from config import PRESETS, Config
from evaluation import judge, reference
from reports import pictures
from scripts.samples import Samples
from tests.helpers import TINY
from tests.valued_cuda import CUDA, OnCuda, valued_cuda  # noqa: F401

SMALL = TINY | dict(num_training_steps=6, ema_decays=(0.9,), precision='float32', compile='off')
RUNS = {
    'digits': {},
    'guided': dict(process_name='cosine', label_dropout=0.1, guidance_scale=2.0, solver='sde_dpmpp_2m'),
    'transformer': dict(network='dit', dit_patch=8, dit_width=32, dit_heads=4, dit_depth=1, label_dropout=1.0),
    'points': {name: PRESETS['toy2d'][name] for name in ('dataset', 'network')} | dict(loss_weight='min_snr'),
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """`build(trainer_class=None, **settings)`: a small trainer on the device of the test."""
    monkeypatch.setattr(judge, 'NUM_JUDGED', 40)
    monkeypatch.setattr(pictures, 'POINTS_SHOWN', 40)
    monkeypatch.setattr(reference, 'MOST_DRAWS', 1024)
    folders = dict(ckpt_dir=str(tmp_path), data_dir=str(tmp_path / 'data'))
    return lambda trainer_class=None, **settings: main.build(Config(**SMALL | folders | settings), trainer_class)


def evaluated(trainer) -> dict[str, float]:
    """Compute everything that a run computes besides its steps; returns the numbers."""
    trainer.judge.rehearse()
    trainer.gallery.rehearse(0)
    values = trainer.judge.held_out_losses(6) | trainer.gallery.draw(6)
    for name in trainer.samplers():
        values |= {f'{name}/{key}': value for key, value in trainer.judge.judge_sampler(name, 40, 6).items()}
    trainer.log('mine', torch.ones(3, device=trainer.device))
    return values | trainer.record.summary(6)


@pytest.mark.parametrize('name', ['digits', *(pytest.param(name, marks=pytest.mark.slow) for name in [*RUNS][1:])])
def test_numbers_on_the_gpu_equal_the_cpu(name, build, request):
    there = evaluated(build(**RUNS[name], experiment_name='cpu'))
    assert there and 'eval/reference' in there and 'eval/reference_floor' in there
    request.getfixturevalue('valued_cuda')
    trainer = build(**RUNS[name], experiment_name='gpu')
    assert trainer.device == CUDA and all(isinstance(p.data, OnCuda) for p in trainer.network.parameters())
    here = evaluated(trainer)
    assert here.keys() == there.keys()
    for key, value in there.items():
        if not key.startswith(('train/images_per', 'train/memory', 'train/waiting', 'time')):
            assert here[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert np.isfinite(list(here.values())).all()


def test_no_float64_is_made_on_a_device_without_it(build, request, monkeypatch):
    """As on Apple's GPU, on which torch raises a TypeError."""
    request.getfixturevalue('valued_cuda')
    made = OnCuda.__new__

    def refuse(cls, values, requires_grad=False):
        if values.dtype == torch.float64:
            raise TypeError('this device has no float64')
        return made(cls, values, requires_grad)

    monkeypatch.setattr(OnCuda, '__new__', staticmethod(refuse))
    with pytest.raises(TypeError, match='no float64'):
        torch.ones(2, device=CUDA).double()
    monkeypatch.setattr(utils, 'NO_FLOAT64', ['cuda'])
    trainer = build(time_sampler='log_normal', ema_decays=())
    values = evaluated(trainer)
    assert next(next(trainer.batches.steps(0))).t.device == CUDA
    assert np.isfinite(list(values.values())).all()


def test_files_and_numbers_of_a_run_are_made_on_the_gpu(build, request):
    """Do what generate.py and evaluate.py do, with a run that was trained before."""
    config = build(experiment_name='run', num_training_steps=2, warmup_steps=1, final_eval=False).config
    main.train(config, None)
    folder = str(config.run_dir)

    def made():
        samples = Samples(folder, 'ema', 24, 0, to_judge=True)
        x, inputs = samples.draw(range(5))
        numbers = samples.numbers(samples.run.judge.detector, 8) | samples.losses(0)
        del numbers['images_per_second']
        return samples, x.tolist(), inputs.label.tolist(), numbers

    _, x, label, numbers = made()
    request.getfixturevalue('valued_cuda')
    samples, x_there, label_there, numbers_there = made()
    assert samples.run.device == CUDA and label_there == label
    np.testing.assert_allclose(np.array(x_there), np.array(x), atol=1e-4)
    assert numbers_there.keys() == numbers.keys()
    assert numbers_there == {key: pytest.approx(value, rel=1e-2, abs=1e-4) for key, value in numbers.items()}
