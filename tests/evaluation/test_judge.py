"""Numbers for samples that a run computes itself: for all images, at the end and in between, and the time they take."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from config import SettingError
from data_utils import DATASETS, DataSpec
from ema import power_profile
from evaluation import detectors, judge
from saving import posthoc_weights
from tests.helpers import record_of
from trainer import ExampleDiffusionTrainer


@pytest.fixture
def colour(monkeypatch):
    """Digits in three colours; a classifier that is trained for a moment."""

    def load(config):
        return tuple(
            (images.expand(-1, 3, -1, -1).clone(), labels) for images, labels in DATASETS['digits'].load(config)
        )

    monkeypatch.setitem(DATASETS, 'colour', DataSpec(load, (3, 8, 8), 10, 16))
    monkeypatch.setitem(DATASETS, 'plain', DataSpec(load, (3, 8, 8), 0, 16))
    monkeypatch.setattr(detectors, 'CLASSIFIER_STEPS', 100)
    monkeypatch.setattr(judge, 'NUM_JUDGED', 100)


def test_a_run_on_colour_images_ends_with_numbers(tiny_config, build_trainer, colour, capsys):
    config = tiny_config(dataset='colour', final_eval=True, num_training_steps=3)
    build_trainer(config).train_loop()
    last = record_of(config.run_dir)[-1]
    for name in ('adams', 'sde_dpmpp_2m'):
        assert last[f'final/{name}/frechet'] > 2 * last[f'final/{name}/real_frechet'] > 0  # after three steps: noise
        assert last[f'final/{name}/label_agreement'] < 0.4 and last[f'final/{name}/nearest_neighbour_ratio'] > 1
    printed = capsys.readouterr().out
    assert 'judged by classifier of the data' in printed and 'Frechet distance to the training images' in printed


def test_the_data_themselves_are_judged_as_good(tiny_config, build_trainer, colour):
    trainer = build_trainer(tiny_config(dataset='colour'))
    x, label, *_ = trainer.test_loader.everything()
    values = judge.distances_of(trainer, x, label)
    assert values['frechet'] < 3 * values['real_frechet'] and values['nearest_neighbour_ratio'] == pytest.approx(1)
    assert values['label_agreement'] > 0.8 and values['coverage'] > 0.5
    swapped = judge.distances_of(trainer, x, (label + 1) % 10)
    assert swapped['label_agreement'] < 0.2


def test_images_without_classes_and_points_are_judged_by_their_values(tiny_config, build_trainer, colour):
    trainer = build_trainer(tiny_config(dataset='plain'))
    x, label, *_ = trainer.test_loader.everything()
    values = judge.distances_of(trainer, x, label)
    flat, train = (2 * part.flatten(1).numpy() - 1 for part in (x, trainer.train_loader.everything()[0]))
    gap = np.square(flat.mean(0) - train.mean(0)).sum()
    assert values['frechet'] > gap > 0 and 'label_agreement' not in values
    points = build_trainer(tiny_config(dataset='moons', network='mlp', experiment_name='points'))
    assert judge.is_judged(points)
    assert judge.distances_of(points, points.test_loader.everything()[0], None)['frechet'] < 0.01


def test_large_images_are_judged_by_small_ones(tiny_config, build_trainer, monkeypatch):
    """A covariance of all pixels of large images would fit no memory."""
    images = torch.randint(0, 256, (40, 3, 64, 32), dtype=torch.uint8)
    labels = torch.zeros(40, dtype=torch.int64)
    monkeypatch.setitem(DATASETS, 'large', DataSpec(lambda config: ((images, labels), (images, labels)), (3, 64, 32)))
    trainer = build_trainer(tiny_config(dataset='large'))
    detector = detectors.pixels(trainer, '')
    x = images.float() / 255
    first = x[:, 0, :4].mean(1).view(40, 16, 2).mean(2)  # of the first channel, 4 rows and pairs of columns
    assert torch.allclose(detector.features(x)[:, :16], 2 * first - 1, atol=1e-6)
    assert detector.features(x).shape == (40, 768) and '16 x 16' in detector.about


def test_numbers_in_between(tiny_config, build_trainer, colour):
    """They change nothing of what is learned."""
    config = tiny_config(dataset='colour', eval_metrics_every=4)
    build_trainer(config).train_loop()
    lines = {line['train/step']: line for line in record_of(config.run_dir)}
    assert [step for step, line in lines.items() if 'eval/adams/frechet' in line] == [4, 8]
    assert not any(name.startswith('final/') or 'sde' in name for line in lines.values() for name in line)
    without = tiny_config(dataset='colour', experiment_name='without')
    build_trainer(without).train_loop()
    assert lines[12]['train/loss'] == record_of(without.run_dir)[-1]['train/loss']


def test_too_few_images_are_said_not_to_be_judged(tiny_config, build_trainer, monkeypatch, capsys):
    load = DATASETS['digits'].load

    def few(config):
        train, (images, labels) = load(config)
        return train, (images[:9], labels[:9])

    monkeypatch.setitem(DATASETS, 'few', DataSpec(few, (1, 8, 8), 10, 16))
    config = tiny_config(dataset='few', final_eval=True, num_training_steps=3)
    build_trainer(config).train_loop()
    assert 'override sample_metrics' in capsys.readouterr().out


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_does_not_end_a_run(tiny_config, build_trainer, colour, capsys):
    config = tiny_config(dataset='colour', final_eval=True, num_training_steps=3)
    (Path(config.data_dir)).mkdir(parents=True)
    (Path(config.data_dir) / 'cache').write_text('a file')
    build_trainer(config).train_loop()
    assert 'final/sde_dpmpp_2m/frechet' in record_of(config.run_dir)[-1]
    assert 'cannot be kept for the next time' in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_classifier_is_trained_anew(tiny_config, build_trainer, colour):
    trainer = build_trainer(tiny_config(dataset='colour'))
    first = detectors.classifier(trainer, '')
    (path,) = Path(trainer.config.data_dir, 'cache').glob('classifier-*.pt')
    path.write_bytes(path.read_bytes()[:1000])
    assert detectors.classifier(trainer, '').digest == first.digest  # the same network, from the same seed
    assert torch.load(path, weights_only=True)['accuracy'] > 0.5


def test_of_many_training_images_some_are_compared(tiny_config, build_trainer, colour, monkeypatch):
    trainer = build_trainer(tiny_config(dataset='colour'))
    detector = detectors.pixels(trainer, '')
    train, held_out = detectors.features_of_data(trainer, detector, most=200)
    whole, _ = detectors.features_of_data(trainer, detector)
    assert len(train) == 200 and len(held_out) == 200 and len(whole) == 1500
    assert (torch.cdist(train, whole).min(1).values == 0).all() and len(train.unique(dim=0)) > 190
    again, _ = detectors.features_of_data(trainer, detector, most=200)
    assert torch.equal(train, again)


# ---------------------------------------------------------------- the time that is left


def test_the_time_left_counts_the_samples_at_the_end(tiny_config, build_trainer):
    settings = dict(sample_every=6, num_sample_steps=4)
    trainer = build_trainer(tiny_config(final_eval=True, **settings))
    trainer.drawing.at_end = judge.drawn_at_end(trainer)
    assert judge.seconds_at_end(trainer) is None  # nothing was drawn yet
    trainer.drawing.seconds = 0.5
    assert judge.seconds_at_end(trainer) == 0.5 * (1000 * 2 + 60 * 2 * 2)
    plain = tiny_config(experiment_name='plain', final_pictures=False, **settings)
    assert judge.seconds_at_end(build_trainer(plain)) == 0


@pytest.mark.slow
def test_drawing_is_timed(tiny_config, build_trainer, capsys):
    config = tiny_config(sample_every=6, final_eval=True)
    trainer = build_trainer(config)
    trainer.train_loop()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('step ')]
    assert 0 < trainer.drawing.seconds < 1
    assert printed[0].endswith('min of training left, then samples') and printed[-1].endswith('min left')


# ---------------------------------------------------------------- averages of another length


@pytest.mark.slow
def test_weights_of_another_length_are_mixed_from_those_that_were_saved(tiny_config, build_trainer, capsys):
    """Each weight is the same linear function of the weights after each step."""
    seen = []

    class Watched(ExampleDiffusionTrainer):
        def train_step(self, shards):
            super().train_step(shards)
            seen.append(self.network.net.stem.weight.double().clone().detach())

    settings = dict(num_training_steps=40, keep_every=5, ema_decays=(0.9, 0.98), eval_every=0)
    config = tiny_config(**settings)
    trainer = build_trainer(config, Watched)
    trainer.start = None
    trainer.train_loop()
    found = posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.15', trainer.network)
    assert int(re.search(r'(\d+) averages', capsys.readouterr().out)[1]) >= 24  # 8 saves, two averages, raw weights
    target = sum(w * x for w, x in zip(power_profile(0.15, 40), seen, strict=True))
    mine = found['net.stem.weight'].double()
    raw = saving_error(seen[-1], target)
    assert saving_error(mine, target) < 0.1 * raw
    early = posthoc_weights(config.run_dir / 'step_0000020.pt', 'posthoc_0.15', trainer.network)[
        'net.stem.weight'
    ].double()
    target = sum(w * x for w, x in zip(power_profile(0.15, 20), seen[:20], strict=True))
    assert saving_error(early, target) < 0.1 * saving_error(seen[19], target)
    for name in ('posthoc_', 'posthoc_2', 'posthoc_0.5', 'posthoc_x'):
        with pytest.raises(SettingError, match='write posthoc_ and a width'):
            posthoc_weights(config.run_dir / 'last.pt', name, trainer.network)
    for path in config.run_dir.glob('step_*.pt'):
        path.unlink()
    with pytest.raises(SettingError, match='Choose another width, or save more'):
        posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.25', trainer.network)


def saving_error(a, b):
    return float((a - b).norm())


@pytest.mark.slow
def test_what_counts_as_near_the_profile(tiny_config, build_trainer, monkeypatch, capsys):
    config = tiny_config(keep_every=0, save_every=4, keep_last=3, ema_decays=(0.5, 0.9))
    trainer = build_trainer(config)
    trainer.train_loop()
    error = 0.29

    def mixture(keys, width, n):
        return np.eye(len(keys))[0], error

    monkeypatch.setattr('saving.posthoc_mixture', mixture)
    posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.1', trainer.network)
    assert '9 averages' in capsys.readouterr().out  # of three saves
    error = 0.31
    with pytest.raises(SettingError, match='an error of 31%'):
        posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.1', trainer.network)


def test_long_vectors_are_not_judged_and_small_floats_not_by_a_classifier(tiny_config, build_trainer, monkeypatch):
    def floats(*shape):
        x = torch.randn(60, *shape)
        return DataSpec(lambda config: ((x, torch.arange(60) % 2),) * 2, shape, 2, scale='float')

    monkeypatch.setitem(DATASETS, 'long', floats(2000))
    monkeypatch.setitem(DATASETS, 'small', floats(4, 4, 4))
    long = build_trainer(tiny_config(dataset='long', network='mlp'))
    small = build_trainer(tiny_config(dataset='small', network='mlp', experiment_name='small'))
    assert not judge.is_judged(long) and judge.is_judged(small)
    monkeypatch.setitem(detectors.DETECTORS, 'classifier', lambda *_: pytest.fail('a classifier'))
    x, label, *_ = small.test_loader.everything()
    assert 'label_agreement' not in judge.distances_of(small, x, label)


def test_without_classes_in_the_network_none_agree(tiny_config, build_trainer, colour):
    trainer = build_trainer(tiny_config(dataset='colour', label_dropout=1.0))
    x, label, *_ = trainer.test_loader.everything()
    assert 'label_agreement' not in judge.distances_of(trainer, x, label)


def test_a_digest_of_weights_sees_one_of_them():
    network = torch.nn.Linear(3, 2)
    before = detectors.digest_of(network)
    assert before == detectors.digest_of(network)
    with torch.no_grad():
        network.weight[1, 2] += 1e-3
    assert detectors.digest_of(network) != before


def test_features_are_kept_for_these_data_and_this_decoder(tiny_config, build_trainer, monkeypatch):
    class Darker(ExampleDiffusionTrainer):
        def decode(self, x0):
            return super().decode(x0) / 2

    trainer, darker = build_trainer(tiny_config()), build_trainer(tiny_config(experiment_name='darker'), Darker)
    detector = detectors.pixels(trainer, '')
    usual, dark = (detectors.features_of_data(each, detector)[0] for each in (trainer, darker))
    assert torch.allclose(dark + 1, (usual + 1) / 2)
    load = DATASETS['digits'].load

    def other(config):
        (x, label), held_out = load(config)
        return (torch.cat([x[:8], x[8:].flip(3)]), label), held_out

    monkeypatch.setitem(DATASETS, 'other', DataSpec(other, (1, 8, 8), 10, 16))
    trainer = build_trainer(tiny_config(dataset='other', experiment_name='other'))
    found = detectors.features_of_data(trainer, detector)[0]
    assert torch.equal(found, detector.features(trainer.train_loader.everything()[0]))
