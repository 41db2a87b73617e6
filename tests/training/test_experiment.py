"""The contract of an experiment: old names raise an error that gives the new one."""

from dataclasses import dataclass, field

import pytest
import torch

import utils
from trainer import ExampleDiffusionTrainer, SampleInputs

X = torch.zeros(2, 3)


def test_inputs_without_old_names_are_bundles():
    inputs = SampleInputs(X, None, {'a': X}, truth=X + 1, given=[X + 2])
    one = utils.rows(inputs, slice(1))
    assert one.truth.shape == one.given[0].shape == (1, 3) and one.given[0].eq(2).all()
    with pytest.raises(TypeError):
        SampleInputs(X, None, {}, X)  # truth by position


@pytest.mark.parametrize(
    'use',
    [lambda: SampleInputs(X, None, {}, [X]), lambda: SampleInputs(X, beside=[X]), lambda: SampleInputs(X).beside],
    ids=['by position', 'by name', 'read'],
)
def test_the_field_beside_is_now_given_and_truth(use):
    with pytest.raises((TypeError, AttributeError), match=r'pass given=\[.*self\.decode\(inputs\.truth\)'):
        use()


def test_inputs_of_a_subclass_may_have_their_own_list():
    @dataclass
    class Mine(SampleInputs):
        names: list = field(default_factory=list)

    assert Mine(X, None, {}, ['a']).names == ['a']


@pytest.mark.parametrize(
    ('use', 'words'),
    [
        (lambda trainer: trainer.sample_fn, r'Mine\.sample_fn is now draw\(model_fn, inputs, solver'),
        (lambda trainer: trainer.logger.log_picture, r'Mine\.logger is now the methods picture\(name, image\)'),
        (lambda trainer: next(trainer.shards()), r'Mine\.shards is now batches\.steps\(step\)'),
        (lambda trainer: trainer.save(), r'Mine\.save is now checkpoints\.save\(step\)'),
        (lambda trainer: trainer.finished, r'Mine\.finished is now checkpoints\.finished'),
    ],
    ids=['sample_fn', 'logger', 'shards', 'save', 'finished'],
)
def test_old_attributes_of_a_trainer_give_the_new_name(tiny_config, build_trainer, use, words):
    class Mine(ExampleDiffusionTrainer):
        pass

    with pytest.raises(AttributeError, match=words):
        use(build_trainer(tiny_config(), Mine))


def test_a_show_of_the_old_signature_is_refused_when_the_class_is_made():
    class Old:
        def show(self, name, x, beside):
            pass

    with pytest.raises(TypeError, match=r'Mine\.show\(name, x, beside\) is now show\(name, x, inputs\).*inputs\.given'):

        class Mine(Old, ExampleDiffusionTrainer):
            pass
