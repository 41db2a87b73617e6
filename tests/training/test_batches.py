"""What the trainer sees by itself in an experiment: whether x1 goes with x0, what nobody saves, what nobody trains."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from config import SettingError
from data_utils import DATASETS, DataSpec
from trainer import ExampleDiffusionTrainer
from training import batches, checkpoints, parallel


def with_base(make):
    """A trainer class whose x1 is make(x0)."""

    class Based(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            prepared = super().prepare_batch_fn(batch, is_train)
            return dataclasses.replace(prepared, x1=make(prepared.x0))

    return Based


def corner(x0):
    """The lower right of an image and noise: it correlates with x0 by 0.2, and knows it all the same."""
    x1 = 0.1 * torch.randn_like(x0)
    x1[:, :, 5:, 5:] += x0[:, :, 5:, 5:]
    return x1


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (corner, 'x1 goes with x0'),
        (torch.abs, 'x1 goes with x0'),
        (lambda x0: 0.7 * x0 + 0.7 * torch.randn_like(x0), 'x1 goes with x0'),
        (lambda x0: 3 * torch.randn_like(x0), 'and the base of process'),
        (torch.rand_like, 'x1 has mean 0.'),
    ],
    ids=['corner', 'size', 'mixed', 'wide', 'uniform'],
)
@pytest.mark.parametrize('batch', [16, 64])
def test_a_base_that_is_no_noise_of_its_own_is_seen(tiny_config, build_trainer, capsys, make, words, batch):
    trainer = build_trainer(tiny_config(global_batch_size=batch), with_base(make))
    assert not trainer.independent and words in capsys.readouterr().out
    assert list(trainer.samplers()) == ['adams']
    x1, shown = trainer.sample_inputs(30).x1, trainer.sample_inputs(30).beside
    assert x1.std().item() == pytest.approx(trainer.example.x1.std().item(), rel=0.2)  # as in training
    assert torch.equal(shown[0], trainer.decode(x1)) and len(shown) == 2


@pytest.mark.parametrize('seed', range(20))
def test_noise_is_never_taken_for_data(tiny_config, build_trainer, seed):
    blurred = with_base(lambda x0: nn.functional.avg_pool2d(torch.randn_like(x0), 3, 1, 1) * 3)  # pixels go together
    assert build_trainer(tiny_config(seed=seed, experiment_name='noise')).independent
    trainer = build_trainer(tiny_config(seed=seed, experiment_name='blurred'), blurred)
    assert 'goes with' not in (batches.signs_of_dependence(trainer) or '')


def test_independence_that_an_instance_states_counts(tiny_config, build_trainer):
    class Stated(ExampleDiffusionTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.independent = False

    assert not build_trainer(tiny_config(), Stated).independent


# ---------------------------------------------------------------- what would be lost or wrong


def test_augmentation_of_pairs_is_refused(tiny_config, build_trainer, monkeypatch):
    """Only x0 would be turned, and half of the pairs would be of two images."""

    def load(config):
        x = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
        return (x, torch.zeros(64, dtype=torch.int64), x), (x[:8], torch.zeros(8, dtype=torch.int64), x[:8])

    monkeypatch.setitem(DATASETS, 'twins', DataSpec(load))
    with pytest.raises(SettingError, match=r'flip_prob=0\.5.*not x1 of the pairs.*--flip_prob 0'):
        build_trainer(tiny_config(dataset='twins', flip_prob=0.5))
    assert build_trainer(tiny_config(dataset='twins')).train_loader.has_pairs


def test_grey_levels_of_floats_are_refused(tiny_config, build_trainer, monkeypatch):
    def load(config):
        return (torch.randn(64, 3), torch.zeros(64, dtype=torch.int64)), (torch.randn(8, 3), torch.zeros(8).long())

    monkeypatch.setitem(DATASETS, 'numbers', DataSpec(load, scale='float'))
    with pytest.raises(SettingError, match=r'dequantize=True.*has floats.*--no_dequantize'):
        build_trainer(tiny_config(dataset='numbers', network='mlp', dequantize=True))


@pytest.mark.parametrize(('value', 'kept'), [(np.float64(2.0), False), (Path('a'), False), ([2.0, {'a': 'b'}], True)])
def test_a_state_that_could_not_be_read_again_is_refused_before_training(tiny_config, build_trainer, value, kept):
    class Stateful(ExampleDiffusionTrainer):
        def state(self):
            return {'scale': value}

    trainer = build_trainer(tiny_config(), Stateful)
    if kept:
        return checkpoints.check_state(trainer)
    with pytest.raises(SettingError, match=r'Stateful: a checkpoint cannot hold what `state` gives.*float\(x\)'):
        trainer.train_loop()
    assert trainer.step == 0
    return None


def test_a_parameter_in_no_module_is_refused(tiny_config, build_trainer):
    class Lone(ExampleDiffusionTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.weight = nn.Parameter(torch.ones(7))
            self.optimizers['weight'] = torch.optim.SGD([self.weight], lr=0.1)

    with pytest.raises(ValueError, match=r"optimizers\['weight'\].*shape \(7,\) that is in no module.*ParameterList"):
        build_trainer(tiny_config(), Lone)


def test_a_module_that_nothing_trains_is_in_eval_mode(tiny_config, build_trainer):
    class Taught(ExampleDiffusionTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.modules['teacher'] = nn.BatchNorm2d(1).requires_grad_(False)

    trainer = build_trainer(tiny_config(), Taught)
    assert not trainer.modules['teacher'].training and trainer.network.training


def test_labels_without_classes_are_not_looked_up(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setitem(DATASETS, 'unnamed', dataclasses.replace(DATASETS['digits'], num_classes=0))
    for network in ('unet', 'mlp', 'dit'):
        trainer = build_trainer(tiny_config(dataset='unnamed', network=network, experiment_name=network))
        batch = next(trainer.shards())
        assert batch.label.max() > 0 and trainer.loss_fn(batch, trainer.get_model_fn(trainer.network)).isfinite().all()


def test_a_condition_is_dropped_to_the_value_that_guidance_gives(tiny_config, build_trainer):
    """Whole numbers whose null value is a half, and a wrong shape, as in sampling."""

    class Sized(ExampleDiffusionTrainer):
        null_cond = {'size': 0.5}

    trainer = build_trainer(tiny_config(label_dropout=0.5), Sized)
    prepared = trainer.prepare_batch_fn(trainer.train_loader.take(range(64)), is_train=True)
    batch = dataclasses.replace(prepared, cond={'size': torch.full((64,), 3)})
    size = batches.drop_conditions(trainer, batch, is_train=True).cond['size']
    assert set(size.tolist()) == {3.0, 0.5}
    type(trainer).null_cond = {'size': torch.zeros(2)}
    with pytest.raises(SettingError, match=r"null_cond\['size'\] has shape \(2,\)"):
        batches.drop_conditions(trainer, batch, is_train=True)


def test_parts_of_a_network_that_the_loss_leaves_out_are_found(tiny_config, build_trainer):
    """Two processes would wait for their gradients for ever, or end with an error, if this were not known."""
    trainer = build_trainer(tiny_config())
    trainer.log('train/before', 3.0)  # as in a checkpoint that a run resumes from
    assert not parallel.has_unused(trainer)
    assert trainer.means.means() == {'train/before': 3.0}
    trainer.network.add_module('auxiliary', nn.Linear(3, 3))
    assert parallel.has_unused(trainer)
    assert all(p.grad is None for p in trainer.network.parameters())


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (lambda p: dict(x1=p.x1.flatten(1)), r'gives x1 of shape \(32, 64\), and x0 of shape \(32, 1, 8, 8\)'),
        (lambda p: dict(x1=p.x1[:1]), r'gives x1 of shape \(1, 1, 8, 8\).*x1 must be \(32, 1, 8, 8\)'),
        (lambda p: dict(t=p.t[:, None, None, None]), r'gives t of shape \(32, 1, 1, 1\).*t must be \(32,\)'),
        (
            lambda p: dict(label=p.label[0]),
            r'gives label of shape \(\).*label must be \(32, ...\), one value for each x0',
        ),
        (
            lambda p: dict(cond={'ink': torch.zeros(3)}),
            r"gives cond\['ink'\] of shape \(3,\).*must be \(32, ...\), one",
        ),
    ],
)
def test_parts_of_a_batch_that_do_not_fit_are_named(tiny_config, build_trainer, changes, words):
    class Odd(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            prepared = super().prepare_batch_fn(batch, is_train)
            return dataclasses.replace(prepared, **changes(prepared))

    with pytest.raises(SettingError, match='Odd.prepare_batch_fn ' + words):
        build_trainer(tiny_config(), Odd)
