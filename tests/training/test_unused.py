"""Warnings about code in an experiment that is never called."""

import sys

import pytest

from trainer import ExampleDiffusionTrainer
from training.unused import unused


class Mine(ExampleDiffusionTrainer):
    def prepare_batch(self, batch, is_train):  # prepare_batch_fn is meant
        raise NotImplementedError

    def loss(self, batch, model_fn):  # loss_fn is meant
        return self.sample(4)

    def sample(self, n):  # similar to samplers, but called
        return n

    def encode(self, x):
        return x

    def text_of(self, label):
        return label


class More(Mine):
    def setup_network(self): ...


def test_a_hook_with_a_typo_gives_a_warning():
    assert unused(Mine, ExampleDiffusionTrainer) == [
        'Mine.prepare_batch is not called. Is it meant to be prepare_batch_fn?',
        'Mine.loss is not called. Is it meant to be loss_fn?',
    ]
    assert 'More.setup_network is not called. Is it meant to be setup_networks?' in unused(
        More, ExampleDiffusionTrainer
    )
    assert unused(ExampleDiffusionTrainer, ExampleDiffusionTrainer) == []


@pytest.mark.parametrize('given', [None, Mine])
def test_a_trainer_class_that_main_does_not_get_gives_a_warning(monkeypatch, given):
    monkeypatch.setattr(sys.modules['__main__'], 'More', More, raising=False)
    warning = 'More is not trained. Write main(trainer_class=More).'
    assert (warning in unused(given, ExampleDiffusionTrainer)) == (given is None)
