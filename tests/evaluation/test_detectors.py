import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits

from evaluation.pixel_metrics import describe, frechet_distance, label_agreement, nearest_neighbour_ratio, pixel_metrics


def gaussians(n, d, seed):
    """Correlated features with a mean."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d))


@pytest.fixture(scope='module')
def digits():
    """train, train_labels, held_out, held_out_labels; (N, 64) in [-1, 1]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    x, y = torch.from_numpy(data.data).float()[order] / 8 - 1, torch.from_numpy(data.target)[order]
    return x[:1500], y[:1500], x[1500:], y[1500:]


@pytest.mark.parametrize('d', [2, 10, 40])
def test_frechet_distance_against_a_matrix_square_root(d):
    a, b = gaussians(500, d, 0), gaussians(300, d, 1)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = mean + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_one_dimension_by_hand():
    """(mean difference)^2 + (std difference)^2, here 4 + 4, between independent axes too."""
    a = torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1]])
    one = a[:, 0].std().item()
    assert frechet_distance(a, 3 * a + torch.tensor([2.0, 0])) == pytest.approx(4 + 2 * (2 * one) ** 2)


def test_frechet_distance_of_a_set_to_itself_and_to_its_shift(digits):
    train, *_ = digits
    shift = torch.linspace(0, 1, 64)
    assert frechet_distance(train, train) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(train, train + shift) == pytest.approx(shift.square().sum().item(), rel=1e-4)


def test_frechet_distance_of_few_samples_is_symmetric(digits):
    """Covariances of less than full rank."""
    train, _, held_out, _ = digits
    distance = frechet_distance(train[:30], held_out)
    assert distance == pytest.approx(frechet_distance(held_out, train[:30]), rel=1e-5) and distance > 0.1


def test_nearest_neighbour_ratio(digits):
    train, _, held_out, _ = digits
    assert nearest_neighbour_ratio(train[:200], train, held_out) == pytest.approx(0, abs=0.01)
    assert nearest_neighbour_ratio(held_out, train, held_out) == pytest.approx(1)
    assert nearest_neighbour_ratio(torch.rand(100, 64) * 2 - 1, train, held_out) > 1.5


def test_nearest_neighbour_ratio_by_hand():
    train, held_out = torch.tensor([[0.0, 0], [10, 0]]), torch.tensor([[0.0, 2], [10, -4]])
    assert nearest_neighbour_ratio(torch.tensor([[3.0, 0], [9, 0], [4, 3]]), train, held_out) == pytest.approx(
        (3 + 1 + 5) / 3 / 3
    )


def test_label_agreement_on_real_digits(digits):
    train, train_labels, held_out, labels = digits
    assert label_agreement(held_out, labels, train, train_labels) > 0.95
    assert label_agreement(held_out, (labels + 1) % 10, train, train_labels) < 0.05


def images(x):
    """As data sets and `decode` have them: (N, 1, 8, 8) in [0, 1]."""
    return x.reshape(-1, 1, 8, 8) / 2 + 0.5


def test_pixel_metrics_of_held_out_digits(digits):
    train, train_labels, held_out, labels = digits
    real = pixel_metrics(images(held_out), labels, images(train), train_labels, images(held_out))
    noise = pixel_metrics(images(torch.randn(297, 64)), labels, images(train), train_labels, images(held_out))
    assert real['label_agreement'] > 0.95 and real['nearest_neighbour_ratio'] == pytest.approx(1)
    assert real['frechet_pixels'] < 2 * real['frechet_real'] and noise['frechet_pixels'] > 10 * real['frechet_real']
    assert noise['frechet_real'] == real['frechet_real'] > 0
    assert noise['label_agreement'] < 0.3


def test_distances_are_those_of_pixels_between_minus_1_and_1(digits):
    """The unit of all figures that have been reported."""
    train, train_labels, held_out, labels = digits
    values = pixel_metrics(images(held_out), labels, images(train), train_labels, images(held_out))
    assert values['frechet_pixels'] == pytest.approx(frechet_distance(held_out, train), rel=1e-5)
    assert values['frechet_pixels'] == pytest.approx(
        4 * frechet_distance(images(held_out).flatten(1), images(train).flatten(1)), rel=1e-5
    )


@pytest.mark.parametrize('missing', ['labels', 'train_labels', 'classes'])
def test_unlabelled_images_have_no_label_agreement(digits, missing):
    train, train_labels, held_out, labels = digits
    whole = pixel_metrics(images(held_out), labels, images(train), train_labels, images(held_out))
    labels, train_labels = {
        'labels': (None, train_labels),
        'train_labels': (labels, None),
        'classes': (0 * labels, 0 * train_labels),
    }[missing]
    values = pixel_metrics(images(held_out), labels, images(train), train_labels, images(held_out))
    assert values == {name: value for name, value in whole.items() if name != 'label_agreement'}


def test_samples_that_no_metric_can_judge_are_refused(digits):
    train, train_labels, held_out, labels = digits
    good = dict(train=images(train), train_labels=train_labels, held_out=images(held_out))
    broken = images(held_out)
    broken[7, 0, 3, 3] = torch.nan
    for samples, text in (
        (images(held_out)[:1], 'at least 2 samples.*not 1'),
        (broken, '1 values that are not finite'),
        (images(held_out)[:, :, :4], r'shape \(1, 8, 8\).*of shape \(1, 4, 8\)'),
    ):
        with pytest.raises(ValueError, match=text):
            pixel_metrics(samples=samples, labels=labels[: len(samples)], **good)
    with pytest.raises(ValueError, match='at least 2 held_out'):
        pixel_metrics(samples=images(held_out), labels=labels, **(good | dict(held_out=images(held_out)[:0])))


@pytest.mark.parametrize('wrong', [lambda x: 2 * x - 1, lambda x: 255 * x])
def test_other_units_are_refused(digits, wrong):
    train, train_labels, held_out, labels = digits
    with pytest.raises(ValueError, match=r'images in \[0, 1\]; the training images lie in'):
        pixel_metrics(images(held_out), labels, wrong(images(train)), train_labels, images(held_out))


def test_two_samples_are_enough(digits):
    train, train_labels, held_out, labels = digits
    values = pixel_metrics(images(held_out)[:2], labels[:2], images(train), train_labels, images(held_out))
    assert np.isfinite(list(values.values())).all()


def test_describe_names_what_is_there():
    values = dict(label_agreement=0.5, frechet_pixels=1.25, frechet_real=0.75, nearest_neighbour_ratio=1.5)
    text = describe(values)
    assert len(text.splitlines()) == 4 and all(number in text for number in ('50.0%', '1.250', '0.750', '1.500'))
    del values['label_agreement']
    assert describe(values).splitlines() == text.splitlines()[1:]
    assert describe({}) == '' and describe({'of my own': 1.0, 'kid': 0.1}) == '  of my own: 1'
