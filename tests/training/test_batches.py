"""Batches: parts that do not fit, pairs, labels without classes, conditions that are dropped, and couplings."""

import dataclasses

import pytest
import torch

from config import SettingError
from data_utils import DATASETS, DataSpec
from trainer import ExampleDiffusionTrainer
from training.advice import condition_warning


def test_augmentation_of_pairs_is_refused(tiny_config, build_trainer, monkeypatch):
    """Only x0 would be flipped, and half of the pairs would no longer match."""

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


def test_labels_without_classes_are_not_looked_up(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setitem(DATASETS, 'unnamed', dataclasses.replace(DATASETS['digits'], num_classes=0))
    for network in ('unet', 'mlp', 'dit'):
        trainer = build_trainer(tiny_config(dataset='unnamed', network=network, experiment_name=network))
        batch = next(next(trainer.batches.steps(trainer.step)))
        assert batch.label.max() > 0 and trainer.loss_fn(batch, trainer.get_model_fn(trainer.network)).isfinite().all()


def test_a_condition_is_dropped_to_the_null_value_of_guidance(tiny_config, build_trainer):
    """For integers whose null value is a half. A wrong shape is refused, as in sampling."""

    class Sized(ExampleDiffusionTrainer):
        null_cond = {'size': 0.5}

    trainer = build_trainer(tiny_config(label_dropout=0.5), Sized)
    prepared = trainer.prepare_batch_fn(trainer.train_loader.take(range(64)), is_train=True)
    batch = dataclasses.replace(prepared, cond={'size': torch.full((64,), 3)})
    size = trainer.batches.drop_conditions(batch, is_train=True).cond['size']
    assert set(size.tolist()) == {3.0, 0.5}
    type(trainer).null_cond = {'size': torch.zeros(2)}
    with pytest.raises(SettingError, match=r"null_cond\['size'\] has shape \(2,\)"):
        trainer.batches.drop_conditions(batch, is_train=True)


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


# ---------------------------------------------------------------- coupling


class Turned(ExampleDiffusionTrainer):
    def couple(self, x0, x1, label):
        return x1.roll(1, 0)


def test_nothing_is_coupled_unless_there_is_a_method(tiny_config, build_trainer):
    """The method gets the whole global batch, of training and of held-out images."""
    assert ExampleDiffusionTrainer.couple is None
    config = tiny_config(label_dropout=0.5)
    plain, turned = (build_trainer(config, kind) for kind in (None, Turned))
    (before, after), (held_out, coupled) = (
        [find(each) for each in (plain, turned)]
        for find in (lambda t: next(next(t.batches.steps(0))), lambda t: next(t.batches.held_out(1))[0])
    )
    for one, other in ((before, after), (held_out, coupled)):
        assert one.x0.equal(other.x0) and one.t.equal(other.t) and other.x1.equal(one.x1.roll(1, 0))
    assert plain.independent and not turned.independent
    assert 0 < (after.label == 10).sum() < len(after.label)  # labels are dropped after coupling


def test_a_coupling_of_another_shape_is_refused(tiny_config, build_trainer):
    class Short(ExampleDiffusionTrainer):
        def couple(self, x0, x1, label):
            return x1[:5]

    trainer = build_trainer(tiny_config(), Short)
    with pytest.raises(ValueError, match=r'couple must return x1 of shape \(32, 1, 8, 8\), not \(5, 1, 8, 8\)'):
        next(next(trainer.batches.steps(0)))


def test_sample_inputs_are_the_same_at_every_moment(tiny_config, build_trainer):
    """So are conditions that depend on the time, whichever shard was prepared last."""

    class Timed(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            prepared = super().prepare_batch_fn(batch, is_train)
            return dataclasses.replace(prepared, cond={'moment': prepared.t})

    trainer = build_trainer(tiny_config(), Timed)
    before, example = trainer.sample_inputs(8), trainer.batches.draw_example('again')
    trainer.batches.draw_shard(trainer.train_loader.take(range(8)), 1, step=3)
    assert trainer.batches.draw_example('again').t.equal(example.t)
    after = trainer.sample_inputs(8)
    assert before.x1.equal(after.x1) and before.cond['moment'].equal(after.cond['moment'])


def test_times_of_held_out_images_are_stratified_in_every_round(tiny_config, build_trainer):
    """Also for the pieces after the first `batch_shards`: 32 images have one time in each of 32 equal intervals."""
    trainer = build_trainer(tiny_config(batch_shards=2))
    for piece in range(4):
        batch = trainer.train_loader.take(range(16))
        t = trainer.batches.draw_shard(batch, piece, 'evaluate', is_train=False).t
        assert ((t - 0.001) / 0.998 * 32).long().sort().values.tolist() == list(range(piece % 2, 32, 2))


def test_all_held_out_images_are_coupled_once(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(batch_shards=2), Turned)
    index = torch.cat([index for _, index in trainer.batches.held_out()])
    assert index.sort().values.tolist() == list(range(trainer.test_loader.size))


class Measured(torch.utils.data.Dataset):
    """A Dataset with items (x, label, x1, ink, outline)."""

    def __init__(self, n):
        self.x = torch.arange(n * 64, dtype=torch.float32).view(n, 1, 8, 8) / (n * 64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], i % 3, -self.x[i], float(self.x[i].mean()), 2 * self.x[i]


@pytest.mark.parametrize('pairs', [True, False])
@pytest.mark.parametrize('arrays', [True, False])
def test_conditions_of_the_data_reach_the_network(tiny_config, build_trainer, monkeypatch, arrays, pairs):
    """Whatever an experiment does with (x, label) and x1; its own conditions come first, and None removes one."""

    def load(config):
        whole = torch.utils.data.default_collate([*Measured(40)])
        entries = [*whole[:2], *whole[2 : 2 + pairs], *whole[3:]]
        return tuple(array[:32] for array in entries), tuple(array[32:] for array in entries)

    if not arrays and not pairs:
        pytest.skip('an item of Measured is a pair')
    spec = DataSpec(load if arrays else lambda config: (Measured(32), Measured(8)), num_classes=3, scale='float',
                    conditions=('ink', 'outline'))  # fmt: skip
    monkeypatch.setitem(DATASETS, 'measured', spec)

    class Own(ExampleDiffusionTrainer):
        changes = {}

        def prepare_batch_fn(self, batch, is_train):
            x, label, *x1 = batch
            assert len(x1) == pairs and batch.cond.keys() == {'ink', 'outline'}
            return dataclasses.replace(super().prepare_batch_fn((x, label, *x1), is_train), cond=self.changes)

    config = tiny_config(dataset='measured', num_workers=0, num_training_steps=3)
    trainer = build_trainer(config, Own)
    assert trainer.train_loader.has_pairs == pairs == (not trainer.independent)
    batch = next(next(trainer.batches.steps(0)))
    assert torch.allclose(batch.cond['ink'], batch.x0.mean((1, 2, 3))) and batch.cond['outline'].equal(2 * batch.x0)
    assert trainer.network.net.conditions.shapes == {'ink': (), 'outline': (1, 8, 8)}
    inputs, held_out = trainer.sample_inputs(3), trainer.test_loader.take(range(8))
    assert all((held_out.cond['outline'] == image).all((1, 2, 3)).any() for image in inputs.cond['outline'])
    assert not pairs or inputs.cond['outline'].equal(2 * inputs.truth)
    trainer.train_loop()
    Own.changes = {'outline': None, 'new': torch.ones(4)}
    other = trainer.batches.with_conditions(trainer.train_loader.take(range(4)), is_train=True).cond
    assert other.keys() == {'ink', 'new'}
    with pytest.raises(SettingError, match=r'flip_prob=0\.5 would change x0 and not'):
        build_trainer(tiny_config(dataset='measured', flip_prob=0.5, num_workers=0))


@pytest.mark.parametrize(
    ('names', 'value', 'words'),
    [
        (('t',), torch.zeros(40), "condition 't' is the name of another input of the network"),
        (('a b',), torch.zeros(40), "condition 'a b' has other characters"),
        (('a', 'a'), torch.zeros(40), "condition 'a' is there twice"),
        (('a',), torch.zeros(39), r'40 x, 40 labels, 39 a\. .*must have the same length'),
        (('a',), torch.full((40,), torch.nan), r"condition 'a': 40 of 40 items hold NaN"),
        (('a',), torch.zeros(40, dtype=torch.complex64), r"condition 'a' is complex64 \(40,\)"),
        (('a', 'b', 'c'), torch.zeros(40), r'It must be \(x, label, a, b, c\) or \(x, label, x1, a, b, c\)'),
    ],
)
def test_conditions_that_cannot_be_right_are_refused(tiny_config, build_trainer, monkeypatch, names, value, words):
    part = torch.zeros(40, 3), torch.zeros(40), *[value] * min(len(names), 2)
    monkeypatch.setitem(DATASETS, 'wrong', DataSpec(lambda config: (part, part), scale='float', conditions=names))
    with pytest.raises(SettingError, match=words):
        build_trainer(tiny_config(dataset='wrong', network='mlp'))


def test_conditions_of_another_shape_in_the_held_out_part_are_refused(tiny_config, build_trainer, monkeypatch):
    parts = [(torch.zeros(40, 3), torch.zeros(40), torch.zeros(40, n)) for n in (2, 3)]
    monkeypatch.setitem(DATASETS, 'wrong', DataSpec(lambda config: parts, scale='float', conditions=('a',)))
    with pytest.raises(SettingError, match=r"held-out part: condition 'a' is float32 \(40, 3\).*items of shape \(2,\)"):
        build_trainer(tiny_config(dataset='wrong', network='mlp'))


def test_a_condition_far_from_order_1_is_named():
    warning = condition_warning({'angle': torch.linspace(-3, 3, 8), 'kelvin': torch.linspace(270, 310, 8)})
    assert warning is not None and "'kelvin' of the first 8 images lies in [270, 310]" in warning
    assert condition_warning({'angle': torch.linspace(-3, 3, 8)}) is None
