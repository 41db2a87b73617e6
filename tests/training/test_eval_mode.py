"""Evaluation, restarts and stops do not change what is trained, not even modules that a hook calls directly."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils
from evaluation.detectors import get_detector
from evaluation.distances import SampleFeatures
from runtime import stopping
from runtime.errors import Stopped
from tests.helpers import record_of
from trainer import ExampleDiffusionTrainer
from training import calling
from training.calling import evaluating


class Critic(ExampleDiffusionTrainer):
    """A critic with a batch norm and a dropout, in loss_fn; and an encoder with a batch norm, in prepare_batch_fn."""

    def setup_networks(self):
        self.modules['scale'] = nn.Sequential(nn.BatchNorm2d(1)).to(self.device)
        self.optimizers['scale'] = torch.optim.Adam(self.modules['scale'].parameters(), 1e-3)
        super().setup_networks()
        layers = nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.SiLU(), nn.Linear(16, 1)
        self.modules['critic'] = nn.Sequential(*layers).to(self.device)
        self.optimizers['critic'] = torch.optim.Adam(self.modules['critic'].parameters(), 1e-3)
        self.modules['teacher'] = nn.Sequential(nn.BatchNorm1d(64)).eval().requires_grad_(False)

    def encode(self, x):
        with torch.no_grad():
            return super().encode(x) + 0 * self.modules['scale'](x)

    def loss_fn(self, batch, model_fn):
        critic = self.modules['critic']
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        fake = self.model_convert_fn(model_fn(xt, batch.t, batch.label), batch.t, xt, coefs).x0
        judged = F.softplus(critic(fake.detach())) + F.softplus(-critic(batch.x0))
        return (
            utils.image_square_error(fake, batch.x0) + judged[:, 0] + 0 * self.modules['teacher'](fake.flatten(1))[:, 0]
        )

    def sample_metrics(self, x, inputs):
        with torch.no_grad():
            return {'judged': float(self.modules['critic'](self.encode(x)).mean())}


def tensors_of(trainer):
    held = {
        f'{name}.{key}': value.clone() for name, m in trainer.modules.items() for key, value in m.state_dict().items()
    }
    for name, ema in trainer.emas.items():
        held |= {f'ema {name}.{i}': p.clone() for i, net in enumerate(ema.networks.values()) for p in net.parameters()}
    return held


@pytest.mark.slow
def test_a_run_without_evaluation_and_a_stopped_one_train_the_same(tiny_config, build_trainer, monkeypatch):
    settings = dict(num_training_steps=12, ema_decays=(0.9,), warmup_steps=2)
    quiet = dict(eval_every=0, sample_every=0, final_eval=False, final_pictures=False)
    busy = dict(eval_every=2, sample_every=3, eval_metrics_every=4)
    plain = build_trainer(tiny_config(experiment_name='plain', **settings, **quiet), Critic)
    plain.train_loop()
    watched = build_trainer(tiny_config(experiment_name='watched', **settings, **busy), Critic)
    watched.train_loop()
    stopped = build_trainer(tiny_config(experiment_name='stopped', **settings, **busy), Critic)
    train_step = stopped.train_step

    def until_5(batches):
        train_step(batches)
        if stopped.step == 5:
            monkeypatch.setattr(stopping, '_stop_asked', True)

    stopped.train_step = until_5
    with pytest.raises(Stopped):
        stopped.train_loop()
    monkeypatch.setattr(stopping, '_stop_asked', False)
    resumed = build_trainer(tiny_config(experiment_name='stopped', **settings, **busy), Critic)
    resumed.train_loop()
    expected = tensors_of(plain)
    assert int(expected['critic.2.num_batches_tracked']) == 2 * 12 and int(expected['scale.0.num_batches_tracked']) > 0
    for other in (watched, resumed):
        found = tensors_of(other)
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not found[key].equal(value)] == []
    assert 'eval/loss' in record_of(watched.config.run_dir)[0]


def test_each_module_returns_to_its_mode():
    trained, teacher = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Sequential(nn.BatchNorm1d(2)).eval()
    with contextlib.suppress(ZeroDivisionError), evaluating({'a': trained, 'b': teacher}):
        assert not any(part.training for part in [*trained.modules(), *teacher.modules()])
        _ = 1 / 0
    assert all(part.training for part in trained.modules()) and not any(part.training for part in teacher.modules())


def test_the_search_for_unused_parameters_leaves_buffers_as_they_are(tiny_config, build_trainer, monkeypatch):
    """On several processes the loss is computed once at each start: a batch norm would learn from it."""
    trainer = build_trainer(tiny_config())
    trainer.modules['network'] = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)).train()
    before = {key: value.clone() for key, value in trainer.modules['network'].state_dict().items()}
    model_fn = trainer.get_model_fn(trainer.modules['network'], train=True)
    monkeypatch.setattr(calling.ranks, 'world_size', lambda: 2)
    monkeypatch.setattr(calling, 'DistributedDataParallel', lambda module, **settings: settings)
    monkeypatch.setattr(trainer.caller, 'call', lambda module, xt, *_: module(xt))

    def loss_fn(batch):
        return model_fn(batch.x0, batch.t, batch.label).square().mean(1)

    made = calling.ParallelLoss(trainer.modules, loss_fn, trainer.example)
    assert made.losses['find_unused_parameters'] is False
    trainer.modules['critic'] = critic = nn.Linear(64, 1)  # with two modules, one need not take part in every step
    made = calling.ParallelLoss(trainer.modules, lambda b: loss_fn(b) + critic(b.x0.flatten(1))[:, 0], trainer.example)
    assert made.losses['find_unused_parameters'] is True
    after = trainer.modules['network'].state_dict()
    assert [key for key, value in before.items() if not after[key].equal(value)] == []
    assert trainer.modules['network'].training


def test_the_search_for_unused_parameters_takes_as_many_images_as_one_forward_pass(
    tiny_config, build_trainer, monkeypatch
):
    """With more, a run on several processes would need more memory at its start than in training."""
    sizes = []
    monkeypatch.setattr(calling.ParallelLoss, 'share', lambda self, *given: sizes.append(len(given[-1].t)))
    build_trainer(tiny_config(accumulation_steps=8))
    assert sizes == [32 // 8]


def test_the_data_that_samples_are_compared_with_are_encoded_in_eval_mode(tiny_config, build_trainer):
    """As evaluate.py does, which calls only this part."""
    trainer, modes = build_trainer(tiny_config()), set()
    sampled = SampleFeatures(get_detector(trainer.judge.data, 'pixels'), trainer.judge.data)
    sampled.add(trainer.decode(trainer.example.x0), None)
    encode = trainer.encode
    trainer.encode = lambda x: (modes.add(trainer.network.training), encode(x))[1]
    trainer.judge.compare_with_data(sampled, 32, most=50)
    assert modes == {False} and trainer.network.training
