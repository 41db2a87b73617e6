"""Floors, the values for a perfect sampler with the samples' own classes, and class frequencies."""

import numpy as np
import pytest
import torch

from config import Config
from data_loading.choice import classes_in_proportion
from data_loading.toy2d import TOY2D
from data_utils import DATASETS, DataSpec, load_digits
from evaluation.distances import (
    DRAWS,
    Moments,
    cautions,
    compare,
    describe_numbers,
    distance_from_set,
    floor,
    frechet,
    frequencies_caution,
    in_the_plane,
    real_draws,
    wasserstein,
)
from tests.evaluation.test_distances import normal
from trainer import ExampleDiffusionTrainer


def thinned_digits():
    """Digits, of 5 to 9 only one in ten: (x (N, 64) in [-1, 1], labels (N,))."""
    (x, label), _ = load_digits(Config())
    keep = (label < 5) | (torch.arange(len(label)) % 10 == 0)
    return x[keep].flatten(1) / 8 - 1, label[keep]


def draw(x, label, classes, seed=100):
    """Rows of x of these classes, at random."""
    chosen, g = torch.empty(len(classes), dtype=torch.long), torch.Generator().manual_seed(seed)
    for number in classes.unique():
        items, places = (label == number).nonzero()[:, 0], classes == number
        chosen[places] = items[torch.randint(len(items), (int(places.sum()),), generator=g)]
    return x[chosen]


def test_a_floor_is_the_mean_of_twenty_draws_with_their_spread():
    train, held_out, samples = normal(3000, 6), normal(300, 6), normal(200, 6)
    found, moments = compare(samples, train, held_out), Moments(train)
    assert DRAWS == 20
    other_draws = [frechet(Moments(train[torch.randint(3000, (200,))]), moments) for _ in range(200)]
    assert found['real_frechet'] == pytest.approx(np.mean(other_draws), abs=4 * np.std(other_draws) / 20**0.5)
    assert found['real_frechet_std'] == pytest.approx(np.std(other_draws), rel=1.0)
    assert abs(found['frechet'] - found['real_frechet']) < 5 * found['real_frechet_std']


def test_real_draws_have_the_classes_of_the_samples_and_differ():
    of_data, wanted = torch.tensor([0, 1, 2, 2, 1, 0, 1]), torch.tensor([2, 2, 0, 1, 1, 1])
    draws = list(real_draws(6, 7, of_data, wanted))
    assert len(draws) == 20 and all(of_data[rows].equal(wanted) for rows in draws)
    assert len({tuple(rows.tolist()) for rows in draws}) > 10
    free = torch.stack(list(real_draws(5000, 7, None, None)))
    assert (torch.bincount(free.flatten(), minlength=7) / free.numel()).sub(1 / 7).abs().max() < 0.01
    unknown = next(real_draws(2, 7, of_data, torch.tensor([9, 2])))  # class 9 has no items: any item
    assert of_data[unknown][1] == 2


@pytest.mark.slow
def test_the_floor_of_a_perfect_sampler_of_each_class_is_its_own():
    """With classes in turn or as frequent as in the data, a perfect sampler is at its floor."""
    x, label = thinned_digits()
    for classes in (torch.arange(600) % 10, label[torch.randint(len(label), (600,))]):
        found = compare(draw(x, label, classes), x, x[:50], classes=label, wanted=classes)
        assert abs(found['frechet'] - found['real_frechet']) < 6 * found['real_frechet_std']
    turns = torch.arange(600) % 10
    without = compare(draw(x, label, turns), x, x[:50])  # classes unknown: the sampler looks bad
    assert without['frechet'] > 5 * without['real_frechet']


@pytest.mark.slow
def test_points_have_the_same_floor_by_wasserstein():
    rng = np.random.default_rng(0)
    train, label = map(torch.from_numpy, TOY2D['moons'].draw(rng, 6000))
    held_out = torch.from_numpy(TOY2D['moons'].draw(rng, 500)[0])
    new, classes = map(torch.from_numpy, TOY2D['moons'].draw(rng, 500))
    found = compare(new.float(), train.float(), held_out.float(), classes=label, wanted=classes)
    assert abs(found['wasserstein'] - found['real_wasserstein']) < 4 * found['real_wasserstein_std']
    pairs = [[torch.from_numpy(TOY2D['moons'].draw(rng, 500, classes.numpy())[0]) for _ in range(2)] for _ in range(12)]
    exact = [wasserstein(a, b) for a, b in pairs]  # two draws of 500 points with these classes
    assert found['real_wasserstein'] == pytest.approx(np.mean(exact), rel=0.12)
    assert 0 < found['real_wasserstein_std'] < 0.03
    far = compare(new.float() + 1, train.float(), held_out.float())
    assert far['wasserstein'] == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['moons', 'eight_gaussians'])
def test_exact_points_are_at_the_floor_of_a_set(name):
    """A single draw is not enough for a floor: it was 0.054 for moons, where exact draws have 0.067 +- 0.012."""
    toy = TOY2D[name]
    classes = torch.arange(1000) % toy.num_classes
    exact = [
        distance_from_set(torch.from_numpy(toy.draw(np.random.default_rng(s), 1000)[0]), name) for s in (70, 71, 72)
    ]
    for found in exact:
        assert abs(found['wasserstein'] - found['real_wasserstein']) < 3.5 * found['real_wasserstein_std']
    balanced = distance_from_set(
        torch.from_numpy(toy.draw(np.random.default_rng(73), 1000, classes.numpy())[0]), name, '_x', classes
    )
    assert balanced['real_wasserstein_std_x'] > 0
    assert balanced['real_wasserstein_x'] < exact[0]['real_wasserstein']  # equal counts of each class lie nearer
    none = distance_from_set(torch.zeros(10, 2), name, label=torch.full((10,), toy.num_classes))  # no class
    assert none['wasserstein'] > 0.5


def test_kid_does_not_depend_on_the_unit_of_floats():
    samples, train, held_out = normal(300, 4), normal(600, 4) * 1.1, normal(60, 4)
    one, other = (
        compare(*(x * unit + shift for x in (samples, train, held_out)), is_standard=False)
        for unit, shift in ((1, 0), (100, 290))
    )
    assert other['kid'] == pytest.approx(one['kid'], rel=1e-3, abs=1e-5) and one['kid'] > 0
    moved = torch.tensor([0.0, 10.0, -1000.0, 500.0])  # columns with other means: the spread is taken within columns
    far = compare(*(x + moved for x in (samples, train, held_out)), is_standard=False)
    assert far['kid'] == pytest.approx(one['kid'], rel=1e-3, abs=1e-5)
    assert abs(compare(samples * 100, train * 100, held_out * 100)['kid']) > 1e5  # without units


# ---------------------------------------------------------------- classes


def spec(*counts):
    return DataSpec(lambda config: (), num_classes=len(counts), counts=counts)


def test_classes_are_as_frequent_as_in_the_data_in_every_beginning():
    data = spec(100, 50, 0, 10)
    found = classes_in_proportion(data, 1600)
    assert np.bincount(found, minlength=4).tolist() == [1000, 500, 0, 100]
    for n in (1, 7, 100, 333):
        assert classes_in_proportion(data, n).tolist() == found[:n].tolist()
        assert (np.abs(np.bincount(found[:n], minlength=4) - n * np.array([100, 50, 0, 10]) / 160) < 1).all()
    assert classes_in_proportion(spec(0, 5, 5), 3).tolist() == [1, 2, 1]  # never a class without items
    assert classes_in_proportion(spec(5, 5, 5), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]  # equal counts: in turn
    assert classes_in_proportion(DataSpec(lambda config: (), num_classes=3), 4).tolist() == [
        0,
        1,
        2,
        0,
    ]  # counts unknown


def some_digits(counts):
    """A DataSpec of digits with `counts` training items of each class, and one more held out."""

    def load(config):
        (x, label), _ = load_digits(config)
        rows = [(label == number).nonzero()[:, 0] for number in range(10)]
        train = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
        held_out = torch.cat([row[-(count + 1) :] for row, count in zip(rows, counts, strict=True)])
        return tuple((x[part], label[part]) for part in (train, held_out))

    return DataSpec(load, (1, 8, 8), 10, 16)


class Recording(ExampleDiffusionTrainer):
    """Records the labels of the samples that are judged and shown."""

    def setup_networks(self):
        super().setup_networks()
        self.seen = {}

    def sample_metrics(self, x, inputs):
        self.seen['judged'] = inputs.label.tolist()
        return {'mine': 0.0}

    def show(self, name, x, inputs):
        self.seen['shown'] = inputs.label.tolist()


@pytest.fixture
def trainer(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setitem(DATASETS, 'some', some_digits((100, 100, 0, 50, 50, 0, 0, 10, 10, 10)))
    return build_trainer(tiny_config(dataset='some', experiment_name='some'), Recording)


def test_numbers_have_the_classes_of_the_data_and_pictures_have_all_in_turn(trainer):
    trainer.judge.judge_sampler('adams', 330, 0)
    trainer.gallery.sample_grids()
    counts = np.bincount(trainer.seen['judged'], minlength=10)
    assert counts.tolist() == [100, 100, 0, 50, 50, 0, 0, 10, 10, 10]
    assert trainer.data.columns() == 7 and trainer.seen['shown'][:9] == [0, 1, 3, 4, 7, 8, 9, 0, 1]


def test_classes_without_training_items_are_printed_and_left_out(trainer, capsys):
    import data_utils

    data_utils.setup_data_train_and_test(trainer.config, torch.device('cpu'))
    printed = capsys.readouterr().out
    assert '3 of 10 classes have no training items (2, 5, 6)' in printed and 'not learned, sampled or judged' in printed
    assert trainer.sample_inputs(20).label.unique().tolist() == [0, 1, 3, 4, 7, 8, 9]


def test_held_out_inputs_are_of_trained_classes(tiny_config, build_trainer, monkeypatch):
    class Conditional(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            prepared = super().prepare_batch_fn(batch, is_train)
            prepared.cond['ink'] = prepared.x_original.flatten(1).mean(1)
            return prepared

    monkeypatch.setitem(DATASETS, 'some', some_digits((100, 100, 0, 50, 50, 0, 0, 10, 10, 10)))
    trainer = build_trainer(tiny_config(dataset='some'), Conditional)
    turns = trainer.sample_inputs(14).label.tolist()
    assert turns == 2 * [0, 1, 3, 4, 7, 8, 9]
    with trainer.batches.as_in_data():
        own = trainer.sample_inputs(337).label  # as many as there are
    held_out = trainer.test_loader.labels
    counts = torch.bincount(held_out, minlength=10) * torch.isin(torch.arange(10), own)
    assert torch.bincount(own, minlength=10).tolist() == counts.tolist() and 2 not in own  # each once
    assert len(own[:60].unique()) == 7  # although the held-out part is sorted by class here


# ---------------------------------------------------------------- cautions


def test_a_caution_where_precision_misleads():
    noise = dict(precision=0.778, recall=0.001, frechet=34.8, real_frechet=0.16, real_frechet_std=0.01)
    assert len(cautions(noise)) == 1 and 'caution: precision means little' in describe_numbers(noise)
    assert (
        cautions(noise | dict(recall=0.5)) == cautions(noise | dict(frechet=0.2)) == cautions(dict(precision=1.0)) == []
    )
    assert 'as many real images: 0.16 (standard deviation 0.01 over 20 draws)' in describe_numbers(noise)
    assert 'real_frechet_std' not in describe_numbers(noise)
    (wide,) = cautions(noise | dict(precision=0.0, recall=0.79))
    assert wide.startswith('recall means little here: precision is almost 0')


def test_a_caution_where_samples_have_other_classes_than_the_data():
    data = torch.tensor([0] * 90 + [1] * 10)
    (text,) = frequencies_caution(torch.arange(1000) % 2, data, 2)
    assert '40% of them would need another class' in text
    assert frequencies_caution(data.repeat(10), data, 2) == frequencies_caution(None, data, 2) == []
    assert frequencies_caution(torch.tensor([2]), data, 2) == []  # no class


def test_a_floor_is_the_mean_of_its_draws_and_their_standard_deviation():
    assert floor('kid', [1.0, 3.0]) == {'real_kid': 2.0, 'real_kid_std': pytest.approx(2**0.5)}


def test_the_floor_of_points_is_of_others_than_they_are_compared_with(monkeypatch):
    compared = []
    monkeypatch.setattr('evaluation.distances.wasserstein', lambda a, b: compared.append((a, b)) or 1.0)
    in_the_plane(torch.randn(10, 2), torch.randn(40, 2), None, None)
    (_, some), *draws = compared
    assert len(draws) == DRAWS and all(other.equal(some) for _, other in draws)
    assert not {tuple(row) for row in some.tolist()} & {tuple(row) for a, _ in draws for row in a.tolist()}
