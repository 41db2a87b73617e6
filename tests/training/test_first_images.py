"""What the first images tell: whether x1 is independent of x0, and whether x0 has the scale that is expected."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from trainer import ExampleDiffusionTrainer
from training.first_images import scale_warning, signs_of_dependence


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
def test_a_base_that_is_not_independent_noise_is_seen(tiny_config, build_trainer, capsys, make, words, batch):
    trainer = build_trainer(tiny_config(global_batch_size=batch), with_base(make))
    assert not trainer.independent and words in capsys.readouterr().out
    assert list(trainer.samplers()) == ['adams']
    inputs = trainer.sample_inputs(30)
    assert inputs.x1.std().item() == pytest.approx(trainer.example.x1.std().item(), rel=0.2)  # as in training
    assert len(inputs.given) == 1 and inputs.given[0].equal(trainer.decode(inputs.x1)) and inputs.truth is not None


@pytest.mark.parametrize('seed', range(20))
def test_noise_is_never_taken_for_data(tiny_config, build_trainer, seed):
    blurred = with_base(lambda x0: nn.functional.avg_pool2d(torch.randn_like(x0), 3, 1, 1) * 3)  # pixels go together
    assert build_trainer(tiny_config(seed=seed, experiment_name='noise')).independent
    trainer = build_trainer(tiny_config(seed=seed, experiment_name='blurred'), blurred)
    assert 'goes with' not in (signs_of_dependence(trainer, trainer.batches) or '')


def test_independence_that_an_instance_states_counts(tiny_config, build_trainer):
    class Stated(ExampleDiffusionTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.independent = False

    assert not build_trainer(tiny_config(), Stated).independent


def test_independence_that_a_class_claims_wrongly_is_warned_of(tiny_config, build_trainer, capsys):
    class Claimed(with_base(corner)):
        independent = True

    assert build_trainer(tiny_config(), Claimed).independent
    assert 'Claimed.independent is True, but x1 goes with x0' in capsys.readouterr().out


# ---------------------------------------------------------------- the scale of x0


@pytest.mark.parametrize(
    ('x0', 'sigma_data', 'words'),
    [
        (torch.linspace(-1, 1, 64), 0.5, None),
        (torch.arange(64), 0.5, None),  # symbols have no scale
        (torch.linspace(0, 255, 64), 0.5, r'lies in \[0, 255\].*--sigma_data 75'),
        (torch.linspace(-3, 3, 64), 1.75, None),  # as sigma_data says
        (torch.full((64,), 0.3), 0.5, r'is 0\.3 everywhere'),
        (torch.tensor([0.0, float('nan'), 1.0, float('inf')]), 0.5, '2 of its 4 values are not finite'),
        (torch.full((4,), float('nan')), 0.5, '4 of its 4 values are not finite'),
    ],
)
def test_the_scale_of_x0_is_warned_of(x0, sigma_data, words):
    warning = scale_warning(x0[:, None], sigma_data)
    assert warning is None if words is None else re.search(words, warning)


def test_the_remedy_for_a_wrong_scale_ends_the_warning():
    x0 = torch.linspace(0, 255, 64)[:, None]
    subtract, divide = re.search(r'\(x - (\S+)\) / (\S+) and', scale_warning(x0, 0.5)).groups()
    assert scale_warning((x0 - float(subtract)) / float(divide), 0.5) is None
