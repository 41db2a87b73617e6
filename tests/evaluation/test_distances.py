"""Distances between sets of features, against closed forms, torch-fidelity and counts by hand."""

import itertools
import math
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from config import SettingError
from evaluation.distances import (
    Moments,
    SampleFeatures,
    compare,
    density_coverage,
    describe_numbers,
    distance_from_set,
    frechet,
    mean_nearest_distance,
    radii,
    wasserstein,
)

GEN = torch.Generator().manual_seed(0)


def normal(n, d, std=1.0, mean=0.0):
    return mean + std * torch.randn(n, d, generator=GEN)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """|m|^2 + sum (s - r)^2 for diagonal covariances, up to the error of 200,000 points."""
    std = torch.tensor([0.5, 1.0, 2.0])
    a, b = normal(200_000, 3, std), normal(200_000, 3, 1.0, torch.tensor([1.0, 0.0, -2.0]))
    assert frechet(Moments(a), Moments(b)) == pytest.approx(5 + 0.25 + 0 + 1, rel=0.01)
    assert frechet(Moments(a), Moments(a)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('shape', [(500, 8), (5000, 64), (40, 64)])
def test_frechet_distance_equals_torch_fidelity(shape):
    """Also with fewer points than dimensions, where covariances are singular."""
    mix = torch.randn(shape[1], shape[1], generator=GEN)
    a, b = normal(*shape) @ mix, 1.3 * normal(*shape) @ mix + 0.2
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (a, b)), verbose=False)
    assert frechet(Moments(a), Moments(b)) == pytest.approx(theirs['frechet_inception_distance'], rel=1e-6)


@pytest.mark.parametrize('d', [2, 40])
def test_frechet_distance_against_a_matrix_square_root(d):
    a, b = normal(500, d) @ normal(d, d) + normal(1, d), normal(300, d) @ normal(d, d)
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    gap = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    expected = gap + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet(Moments(a), Moments(b)) == pytest.approx(expected, rel=1e-6)
    shift = torch.linspace(0, 1, d)
    assert frechet(Moments(a), Moments(a + shift)) == pytest.approx(shift.square().sum().item(), rel=1e-4)


def test_moments_do_not_lose_digits_far_from_zero():
    x = normal(6000, 4, 0.01) + 1000
    moments = Moments(x)
    assert np.allclose(moments.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)
    assert np.allclose(moments.mean, x.double().mean(0))


def test_density_and_coverage_by_counting():
    data, samples = normal(40, 2), normal(30, 2, 0.7)
    distance = torch.cdist(samples, data)
    own = torch.cdist(data, data)
    reach = [sorted(own[j].tolist())[5] for j in range(40)]
    inside = [[distance[i, j].item() < reach[j] for j in range(40)] for i in range(30)]
    density, coverage = density_coverage(samples, data)
    assert density == pytest.approx(sum(map(sum, inside)) / (5 * 30))
    assert coverage == pytest.approx(sum(any(row[j] for row in inside) for j in range(40)) / 40)
    assert torch.allclose(radii(data, 5), torch.tensor(reach), atol=1e-6)


def test_samples_of_the_same_kind_are_good_in_every_respect():
    values = compare(normal(2000, 8), normal(2000, 8), normal(2000, 8))
    assert abs(values['kid']) < 3 * values['kid_std'] and values['frechet'] < 0.05
    assert values['precision'] > 0.85 and values['recall'] > 0.85
    assert values['density'] == pytest.approx(1, abs=0.05) and values['coverage'] > 0.95
    assert values['nearest_neighbour_ratio'] == pytest.approx(1, abs=0.03)


def test_copies_are_seen_among_all_training_images():
    """Also if the other numbers use only some of them."""
    data = normal(2000, 8)
    copied = compare(data[1000:1300] + 1e-3, data, normal(300, 8), most=200)
    assert copied['nearest_neighbour_ratio'] < 0.01


def test_each_number_sees_its_own_fault():
    n = 500
    data, held_out = normal(n, 8), normal(n, 8)
    narrow = compare(normal(n, 8, 0.3), data, held_out)
    wide = compare(normal(n, 8, 3.0), data, held_out)
    copied = compare(data[torch.randperm(n, generator=GEN)] + 1e-3, data, held_out)
    assert narrow['precision'] > 0.95 and narrow['recall'] < 0.2 and narrow['density'] > 1.5
    assert wide['precision'] < 0.2 and wide['density'] < 0.1
    assert copied['nearest_neighbour_ratio'] < 0.01 and copied['frechet'] < 0.001
    assert narrow['frechet'] == pytest.approx(8 * 0.49, rel=0.1) and wide['frechet'] == pytest.approx(32, rel=0.1)


def test_nearest_by_hand():
    train = torch.tensor([[0.0, 0], [10, 0]])
    assert mean_nearest_distance(torch.tensor([[3.0, 0], [9, 0], [4, 3]]), train) == pytest.approx((3 + 1 + 5) / 3)
    samples, data, held_out = normal(20, 3), normal(30, 3), normal(10, 3)
    ratio = torch.cdist(samples, data).amin(1).mean() / torch.cdist(held_out, data).amin(1).mean()
    assert compare(samples, data, held_out)['nearest_neighbour_ratio'] == pytest.approx(ratio.item(), rel=1e-5)


def test_what_cannot_be_compared_is_refused():
    for sizes in ((9, 20, 20), (20, 9, 20), (20, 20, 9)):
        samples, train, held_out = (normal(n, 2) for n in sizes)
        text = f'{sizes[0]} samples, {sizes[1]} training and {sizes[2]} held-out images: a comparison needs at least 10'
        with pytest.raises(SettingError, match=text):
            compare(samples, train, held_out)
    broken = normal(20, 2)
    broken[3, 1], broken[7] = math.nan, math.inf
    with pytest.raises(SettingError, match=r'2 of 20 samples have values that are not finite.*--solver'):
        compare(broken, normal(20, 2), normal(20, 2))


def test_a_shift_is_the_same_in_every_direction():
    """The distance does not change when both sets are rotated."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=GEN)).Q
    a, b = normal(500, 6, torch.linspace(0.1, 3, 6)), normal(500, 6) + 1
    assert frechet(Moments(a @ turn), Moments(b @ turn)) == pytest.approx(frechet(Moments(a), Moments(b)), rel=1e-5)
    assert math.isclose(frechet(Moments(a), Moments(b)), frechet(Moments(b), Moments(a)), rel_tol=1e-9)


def two_clusters(n):
    """n points around 0, then n around 5 in every dimension."""
    return torch.cat([normal(n, 4), normal(n, 4, mean=5.0)])


@pytest.mark.slow
def test_the_real_distance_is_of_images_from_all_of_the_data():
    train = two_clusters(500)
    values = compare(normal(500, 4), train, train)
    assert 0 < values['real_frechet'] < 1
    assert compare(normal(500, 4, 3.0), train, train)['real_frechet'] == values['real_frechet']  # whatever the samples


@pytest.mark.slow
def test_a_random_part_of_much_data_is_compared():
    train = two_clusters(500)
    part = compare(normal(500, 4), train, train, most=500)
    assert part['coverage'] < 0.7 and part['recall'] < 0.7
    assert part['frechet'] == compare(normal(500, 4), train, train)['frechet'] or part['frechet'] > 10


def test_kid_of_one_subset_is_the_unbiased_estimate_by_hand():
    """MMD^2 with the kernel (x y / d + 1)^3 (Binkowski et al. 2018)."""
    x, y = normal(40, 6).double(), normal(40, 6, mean=0.5).double()
    values = compare(x.float(), y.float(), y.float())
    xx, yy, xy = ((a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = [(k.sum() - k.trace()) / (40 * 39) for k in (xx, yy)]
    assert values['kid'] == pytest.approx(float(sum(off) - 2 * xy.mean()), rel=1e-4)
    assert values['kid_std'] == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_counting():
    data, samples = normal(60, 2), normal(60, 2, 0.6)
    values = compare(samples, data, data)

    def share(points, centres):
        reach = torch.cdist(centres, centres).sort(1).values[:, 3]  # the third neighbour, after the point itself
        return (torch.cdist(points, centres) <= reach).any(1).float().mean().item()

    assert values['precision'] == pytest.approx(share(samples, data), abs=1e-6)
    assert values['recall'] == pytest.approx(share(data, samples), abs=1e-6)


def test_wasserstein_distance_against_known_values():
    """It is the length of a shift; on a line the sorted pairs are best; the order of the points does not matter."""
    x = normal(300, 2)
    move = torch.tensor([0.3, -0.4])
    assert wasserstein(x, (x + move)[torch.randperm(300, generator=GEN)]) == pytest.approx(0.5, rel=1e-5)
    a, b = normal(200, 1), normal(200, 1, 2.0, 1.0)
    by_rank = (a[:, 0].sort().values - b[:, 0].sort().values).square().mean().sqrt()
    assert wasserstein(a, b) == pytest.approx(by_rank.item(), rel=1e-6)
    five, other = normal(5, 3), normal(5, 3)
    plans = (torch.tensor(plan) for plan in itertools.permutations(range(5)))
    best = min((five - other[plan]).square().sum(1).mean().sqrt().item() for plan in plans)
    assert wasserstein(five, other) == pytest.approx(best, rel=1e-6)


def test_only_points_in_the_plane_have_a_wasserstein_distance():
    data, held_out = normal(3000, 2), normal(400, 2)
    values = compare(normal(500, 2, 1.0, 2.0), data, held_out)
    assert values['wasserstein'] == pytest.approx(math.sqrt(8), rel=0.1) and values['real_wasserstein'] < 0.5
    assert not any('wasserstein' in name for name in compare(normal(50, 3), normal(50, 3), normal(50, 3)))


def test_distance_from_a_set_is_small_for_new_points_of_it():
    values = distance_from_set(torch.randn(300, 2, generator=GEN) + 5, 'moons', '_at_5')
    assert values['wasserstein_at_5'] > 4 > 0.5 > values['real_wasserstein_at_5'] > 0


def test_describe_has_a_line_for_each_number():
    values = dict(label_agreement=0.5, frechet=1.25, real_frechet=0.75, nearest_neighbour_ratio=1.5)
    text = describe_numbers(values)
    assert len(text.splitlines()) == 4 and all(number in text for number in ('50.0%', '1.25', '0.75', '1.500'))
    del values['label_agreement']
    assert describe_numbers(values).splitlines() == text.splitlines()[1:]
    assert describe_numbers({}) == '' and describe_numbers({'of my own': 1.0, 'kid': 0.1}) == '  of my own: 1'


def test_samples_of_another_kind_than_the_data_have_no_features():
    detector = types.SimpleNamespace(features=lambda x: x.flatten(1), predict=None)
    sampled = SampleFeatures(detector, types.SimpleNamespace(mismatch=lambda x: '' if x.ndim == 2 else 'other'))
    sampled.add(torch.ones(3, 2), torch.zeros(3))
    assert (len(sampled.features), len(sampled.classes), sampled.mismatch) == (1, 1, '')
    sampled.add(torch.ones(3, 1, 2), torch.zeros(3))
    sampled.add(torch.ones(3, 2), None)
    assert (len(sampled.features), len(sampled.classes), sampled.mismatch) == (2, 1, 'other')
