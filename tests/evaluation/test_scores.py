"""Scores of samples, each against a closed form."""

import math

import pytest
import torch

from evaluation.scores import (
    c2st,
    crps,
    energy_spectrum,
    kl_divergence,
    kl_histogram,
    mmd_squared,
    sliced_wasserstein,
    spread_skill,
)

GEN = torch.Generator().manual_seed(0)


def normal(*shape, std=1.0, mean=0.0):
    return mean + std * torch.randn(*shape, generator=GEN, dtype=torch.float64)


def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@pytest.mark.parametrize('members', [2, 5, 20])
@pytest.mark.parametrize('y', [0.0, 1.7])
def test_crps_of_a_gaussian_ensemble_is_unbiased(members, y):
    """s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - m) / s (Gneiting and Raftery 2007)."""
    mean, std = 0.3, 1.4
    z = (y - mean) / std
    exact = std * (z * (2 * phi(z) - 1) + 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi))
    found = crps(normal(members, 100_000, std=std, mean=mean), torch.tensor(y))
    assert abs(found.mean() - exact) < 4 * found.std() / 100_000**0.5 < 0.02


def test_crps_is_the_sum_over_pairs():
    x, y = normal(6, 3, 4), normal(3, 4)
    pairs = (x[:, None] - x[None]).abs().sum((0, 1)) / (2 * 6 * 5)
    torch.testing.assert_close(crps(x, y), (x - y).abs().mean(0) - pairs)
    many = normal(7, 3, 4)  # many truths for one ensemble
    torch.testing.assert_close(crps(x[:, None], many)[5], crps(x, many[5]))


def test_crps_of_the_true_law_is_the_least():
    """s / sqrt(pi), where the truth is drawn from the same law; more for a wider or a shifted one."""
    truth = normal(100_000, std=0.5)
    right = crps(normal(10, 100_000, std=0.5), truth).mean()
    assert right == pytest.approx(0.5 / math.sqrt(math.pi), rel=0.01)
    assert crps(normal(10, 100_000, std=1.0), truth).mean() > 1.1 * right
    assert crps(normal(10, 100_000, std=0.5, mean=0.4), truth).mean() > 1.1 * right


@pytest.mark.parametrize('members', [2, 4, 30])
def test_spread_over_skill_of_exchangeable_members_is_1(members):
    centre = normal(50_000, std=2.0)
    ensemble, truth = centre + normal(members, 50_000, std=0.7), centre + normal(50_000, std=0.7)
    assert spread_skill(ensemble, truth) == pytest.approx(1, abs=0.02)
    narrow = centre + normal(members, 50_000, std=0.35)
    expected = 0.35 * math.sqrt((1 + 1 / members) / (0.49 + 0.35**2 / members))
    assert spread_skill(narrow, truth) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ('grid', 'mode'), [((32,), (5,)), ((16, 16), (3, -4)), ((15, 16), (0, 7)), ((8, 8, 8), (2, 1, 2))]
)
def test_energy_of_a_fourier_mode_is_at_its_wavenumber(grid, mode):
    places = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) / n for n in grid], indexing='ij')
    phase = 2 * math.pi * sum(k * x for k, x in zip(mode, places, strict=True))
    x = torch.stack([3 * torch.cos(phase), torch.full_like(phase, 2.0)])[None]  # two channels
    spectrum, k = energy_spectrum(x)[0], round(math.hypot(*mode))
    expected = torch.zeros_like(spectrum)
    expected[k], expected[0] = 3**2 / 4, 2**2 / 2
    torch.testing.assert_close(spectrum, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('grid', [(32,), (9,), (16, 12), (8, 6, 4)])
def test_all_energy_is_half_the_mean_square(grid):
    x = normal(3, 2, *grid)
    energy = x.square().flatten(2).mean(2).sum(1) / 2
    torch.testing.assert_close(energy_spectrum(x).sum(1), energy)


@pytest.mark.parametrize(('n', 'error'), [(100, 0.1), pytest.param(1000, 0.04, marks=pytest.mark.slow)])
def test_c2st_is_chance_for_equal_laws_and_the_best_accuracy_for_shifted_ones(n, error):
    """For N(0, I) and N(m, I), no classifier is better than Phi(|m| / 2)."""
    a, b, shift = normal(n, 2), normal(n, 2), torch.tensor([1.2, 1.6], dtype=torch.float64)
    assert c2st(a, b) == pytest.approx(0.5, abs=error)
    assert c2st(a, b + shift) == pytest.approx(phi(1.0), abs=error)
    assert c2st(a, b + 10) == 1


def test_mmd_is_unbiased_and_the_closed_form_for_gaussians():
    h, d, gap, std = 0.8, 3, 0.9, 1.3

    def kernel_mean(var, shift):  # two independent Gaussians whose difference has this variance in each dimension
        return (h**2 / (h**2 + var)) ** (d / 2) * math.exp(-(shift**2) / (2 * (h**2 + var)))

    exact = kernel_mean(2, 0) + kernel_mean(2 * std**2, 0) - 2 * kernel_mean(1 + std**2, gap)
    shift = gap * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    for of_b, expected in ((lambda: normal(30, d), 0), (lambda: normal(30, d, std=std) + shift, exact)):
        found = torch.tensor([mmd_squared(normal(20, d), of_b(), h) for _ in range(1500)])
        assert abs(found.mean() - expected) < 4 * found.std() / 1500**0.5 < 0.005
    assert mmd_squared(normal(500, d), normal(500, d) + 3) > 0.5  # with the median distance


@pytest.mark.parametrize('d', [1, 2, 7])
def test_sliced_wasserstein_of_shifted_and_scaled_gaussians(d):
    """|shift| / sqrt(D); for N(0, I) and N(0, s^2 I) it is |s - 1|."""
    x, shift = normal(2000, d), normal(d)
    moved = (x + shift)[torch.randperm(2000, generator=GEN)]
    assert sliced_wasserstein(x, moved) == pytest.approx(float(shift.norm()) / d**0.5, rel=1e-9)
    assert sliced_wasserstein(normal(3000, d), normal(3000, d, std=1.5)) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(('d', 'std'), [(1, 0.6), (2, 0.6), (2, 1.5), (3, 1.2)])
def test_kl_divergence_of_gaussians(d, std):
    """KL(N(m, s^2 I) | N(0, I)) = (D (s^2 - 1 - 2 log s) + |m|^2) / 2."""
    mean = torch.linspace(0.2, 0.5, d, dtype=torch.float64)
    exact = (d * (std**2 - 1 - 2 * math.log(std)) + float(mean.square().sum())) / 2
    found = kl_divergence(normal(4000, d, std=std) + mean, lambda x: -(x.square() + math.log(2 * math.pi)).sum(1) / 2)
    assert found == pytest.approx(exact, abs=0.06)


def test_kl_histogram_of_gaussians_is_in_the_other_direction():
    """KL(N(0, I) | N(0, s^2 I)), which is the closed form with the inverse of s."""
    std, n, bins = 1.5, 400_000, 40

    def density(x):
        return (-x.square().sum(1) / 2).exp() / (2 * math.pi)

    exact = (2 * (std**-2 - 1 + 2 * math.log(std))) / 2
    assert kl_histogram(normal(n, 2, std=std), density, -5, 5, bins) == pytest.approx(exact, abs=0.01)
    assert kl_histogram(normal(n, 2), density, -5, 5, bins) == pytest.approx(0, abs=bins**2 / n)
    assert 1 < kl_histogram(normal(n, 2, std=0.1), density, -5, 5, bins) < math.inf  # cells without samples
