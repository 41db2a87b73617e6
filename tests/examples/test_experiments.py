"""The experiments in tests/experiments, which use all hooks of trainer.py, on one process and on two."""

import importlib

import numpy as np
import pytest
import torch

import saving
import utils
from config import Config, SettingError
from data_utils import DATASETS
from networks import NETWORKS
from processes import PROCESSES
from solvers import SOLVERS
from tests.helpers import TINY, losses, record_of, slow_but

SMALL = TINY | dict(sample_every=6, global_batch_size=64)
EXPERIMENTS = {  # file -> class, settings
    'ot': ('OptimalTransport', {}),
    'restore_images': ('Restore', {}),
    'latent': ('Latent', {}),
    'mean_flow': ('MeanFlow', dict(attention_resolutions=(4,))),
    'conditions': ('Conditions', dict(label_dropout=0.2, guidance_scale=2.0)),
    'gan': ('Adversarial', {}),
    'teacher': ('Taught', {}),
    'points': ('Points', dict(dataset='moons', network='mlp')),
    'floats': ('Fields', dict(dataset='fields')),
    'reflow': ('Reflow', dict(dataset='pairs')),
    'own_network': ('Own', dict(network='own', process_name='quadratic', depth=1)),
    'score_matching': ('Sliced', {}),
}
ON_TWO_PROCESSES = ['ot', 'mean_flow', 'gan', 'conditions', 'restore_images']  # also run on two processes


@pytest.fixture
def experiment(tmp_path, build_trainer, monkeypatch):
    """`experiment(name, **settings) -> trainer`, built in this process; the tables are restored afterwards."""
    tables = [(table, dict(table)) for table in (DATASETS, NETWORKS, PROCESSES, SOLVERS)]
    monkeypatch.syspath_prepend('tests')

    def build(name, experiment_name='run', **settings):
        module = importlib.reload(importlib.import_module(f'experiments.{name}'))
        class_name, own = EXPERIMENTS[name]
        config_class = getattr(module, 'MyConfig', Config)
        places = dict(ckpt_dir=str(tmp_path / 'one'), experiment_name=experiment_name)
        return build_trainer(config_class(**SMALL | places | own | settings), getattr(module, class_name))

    yield build
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.mark.parametrize('name', slow_but(['ot', 'gan', 'own_network'], EXPERIMENTS))
def test_it_trains_evaluates_draws_and_resumes(experiment, name):
    trainer = experiment(name)
    trainer.train_loop()
    lines = record_of(trainer.config.run_dir)
    assert all(np.isfinite(value) for line in lines for value in line.values())
    drawn = {path.name for path in (trainer.config.run_dir / 'samples').glob('step_0000012_*.png')}
    weights = next(iter(trainer.weights()))
    assert drawn == {f'step_0000012_{sampler}_{weights}.png' for sampler in trainer.samplers()}
    again = experiment(name)
    assert again.checkpoints.finished and again.step == 12
    for key, value in utils.concat([again.example]).cond.items():
        assert value.equal(trainer.example.cond[key])


@pytest.mark.slow
@pytest.mark.parametrize('name', ON_TWO_PROCESSES)
def test_two_processes_learn_what_one_does(experiment, run_sh, tmp_path, name):
    """Derivatives through the network, a second network, conditions, data as x1 and a coupling of the whole batch."""
    one = experiment(name)
    one.train_loop()
    result = run_sh(f'tests/experiments/{name}.py', nproc=2, **SMALL | EXPERIMENTS[name][1])
    assert result.returncode == 0, result.stderr
    both = tmp_path / 'ckpts' / 'run'
    assert losses(both) == pytest.approx(losses(one.config.run_dir), rel=1e-5)
    for mine, theirs in zip(record_of(one.config.run_dir), record_of(both), strict=True):
        assert theirs == pytest.approx(mine, rel=2e-3, abs=1e-6)
    checkpoint = saving.load(both / 'last.pt')
    for key, module in one.modules.items():
        saved = checkpoint['network'] if key == 'network' else checkpoint['modules'][key]
        torch.testing.assert_close(dict(module.state_dict()), dict(saved), rtol=1e-3, atol=1e-4)


def test_a_coupling_sees_the_whole_global_batch_and_only_reorders(experiment):
    trainer = experiment('ot')
    uncoupled = experiment('ot', experiment_name='uncoupled')
    uncoupled.couple = None
    coupled, plain = (next(next(each.batches.steps(0))) for each in (trainer, uncoupled))
    assert coupled.x0.equal(plain.x0) and coupled.t.equal(plain.t) and not coupled.x1.equal(plain.x1)
    rows = {tuple(row) for row in plain.x1.flatten(1).tolist()}
    assert {tuple(row) for row in coupled.x1.flatten(1).tolist()} == rows
    assert (coupled.x0 - coupled.x1).square().sum() < 0.97 * (plain.x0 - plain.x1).square().sum()


def test_sde_solvers_are_refused_if_x1_is_not_independent(experiment):
    for name in ('ot', 'restore_images', 'reflow'):
        trainer = experiment(name, experiment_name=name)
        assert not trainer.independent and 'sde_dpmpp_2m' not in trainer.samplers()
        model_fn = trainer.get_model_fn(trainer.network)
        with pytest.raises(SettingError, match=r'( pairs x0 and x1|not independent).*--solver adams'):
            trainer.draw(model_fn, trainer.sample_inputs(2), 'sde_dpmpp_2m')
        with pytest.raises(SettingError, match=r"solver='sde_dpmpp_2m'"):
            experiment(name, experiment_name=f'{name}_sde', solver='sde_dpmpp_2m')
    assert experiment('points', experiment_name='points').independent


def test_samples_start_from_held_out_data_where_x1_is_data(experiment):
    trainer = experiment('restore_images')
    inputs = trainer.sample_inputs(20)
    held_out, _ = trainer.test_loader.everything()
    whole = trainer.decode(inputs.truth)
    assert all((held_out == image).flatten(1).all(1).any() for image in whole)
    assert inputs.label.tolist() == 2 * list(range(10))
    assert torch.allclose(inputs.given[0], trainer.decode(inputs.x1)) and len(inputs.given) == 1
    assert (inputs.cond['degraded'][:, :, 4:] == -1).all()
    assert (trainer.decode(inputs.cond['degraded'])[:, :, :4] == whole[:, :, :4]).all()


def test_encode_sets_the_shape_and_decoded_samples_are_shown_and_judged(experiment):
    trainer = experiment('latent')
    assert trainer.shape == (4, 4, 4) and trainer.sample_inputs(3).x1.shape == (3, 4, 4, 4)
    sampler = trainer.samplers()['adams']
    x = trainer.drawing.samples(sampler, trainer.network, trainer.sample_inputs(5))
    assert x.shape == (5, 1, 8, 8) and x.min() >= 0 and x.max() <= 1
    images, *_ = trainer.train_loader.take(range(64))
    assert (trainer.decode(trainer.encode(images)) - images).square().mean() < 0.3 * images.var()
    trainer.train_loop()
    checkpoint = saving.load(trainer.config.run_dir / 'last.pt')
    assert checkpoint['shape'] == (4, 4, 4) and checkpoint['state']['std'].equal(trainer.std)
    assert set(checkpoint['modules']) == {'autoencoder'}


def test_floats_are_x0_unchanged_with_a_warning_about_their_scale(experiment, capsys):
    trainer = experiment('floats')
    assert trainer.example.x_original.max() == 740 and -1.01 < trainer.example.x0.min() < -0.99
    trainer.encode = lambda x: x
    del trainer.batches.__dict__['example']
    trainer.judge.rehearse()
    assert 'x0 of the first 64 images lies in [100, 740]' in capsys.readouterr().out


def test_conditions_are_dropped_together_and_only_in_training(experiment):
    trainer = experiment('conditions', label_dropout=0.5)
    steps = trainer.batches.steps(trainer.step)
    batch = next(next(steps))
    dropped = batch.label == 10
    assert 0.25 < dropped.float().mean() < 0.75
    assert (batch.cond['ink'][dropped] == 0).all() and (batch.cond['text'][dropped] == 0).all()
    assert (batch.cond['ink'][~dropped] != 0).all()
    held_out, _ = next(trainer.batches.held_out(1))
    assert (held_out.label < 10).all() and (held_out.cond['ink'] != 0).all()


def test_the_critic_and_the_network_are_trained_by_their_own_terms(experiment):
    """The critic's gradient comes from its own term only."""
    trainer = experiment('gan')
    critic, batch = trainer.modules['critic'], next(next(trainer.batches.steps(0)))
    trainer.losses(batch).mean().backward()
    both = [p.grad.clone() for p in critic.parameters()]
    coefs = trainer.process(batch.t)
    xt = trainer.process.compute_xt(batch.x0, batch.x1, coefs)
    out = trainer.get_model_fn(trainer.network, train=True)(xt, batch.t, batch.label)
    fake = trainer.model_convert_fn(out, batch.t, xt, coefs).x0.detach()
    softplus = torch.nn.functional.softplus
    own = torch.autograd.grad((softplus(critic(fake)) + softplus(-critic(batch.x0))).mean(), list(critic.parameters()))
    for mine, theirs in zip(own, both, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_module_without_an_optimizer_that_is_not_frozen_is_refused(tiny_config, build_trainer):
    from trainer import ExampleDiffusionTrainer

    class Forgotten(ExampleDiffusionTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.modules['critic'] = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"modules\['critic'\]: no optimizer updates weight, bias"):
        build_trainer(tiny_config(), Forgotten)
