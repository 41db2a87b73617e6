import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits

from metrics import frechet_distance, label_agreement, nearest_neighbour_ratio, pixel_metrics


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


def test_pixel_metrics_of_held_out_digits(digits):
    train, train_labels, held_out, labels = digits

    def images(x):
        return x.reshape(-1, 1, 8, 8)

    real = pixel_metrics(images(held_out), labels, images(train), train_labels, images(held_out))
    noise = pixel_metrics(torch.randn(297, 1, 8, 8), labels, images(train), train_labels, images(held_out))
    assert real['label_agreement'] > 0.95 and real['nearest_neighbour_ratio'] == pytest.approx(1)
    assert real['frechet_pixels'] < 2 * real['frechet_real'] and noise['frechet_pixels'] > 10 * real['frechet_real']
    assert noise['frechet_real'] == real['frechet_real'] > 0
    assert noise['label_agreement'] < 0.3
