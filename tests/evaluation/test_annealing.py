"""Weights of annealed walkers are exact: for a wrong drift, and for few steps."""

import math

import pytest
import torch

from evaluation.annealing import effective_sample_size, log_mean_weight, no_drift, walk

STD, MEAN = 0.6, 0.8


def energy(x, t):
    """From N(0, I) at t = 1 to exp(-|x - MEAN|^2 / (2 STD^2)) at t = 0; in two dimensions, Z is 2 pi STD^2."""
    t = t[:, None]
    start, end = x.square() / 2 + math.log(math.tau) / 2, (x - MEAN).square() / (2 * STD**2)
    u = (t * start + (1 - t) * end).sum(1)
    return u, t * x + (1 - t) * (x - MEAN) / STD**2


DRIFTS = {'none': no_drift, 'wrong': lambda x, t: 0.8 * torch.sin(2 * x) + t[:, None]}


@pytest.mark.parametrize('drift', DRIFTS)
@pytest.mark.parametrize('steps', [2, 6])
def test_weights_are_exact_for_any_drift_and_any_number_of_steps(drift, steps):
    torch.manual_seed(0)
    x, times = torch.randn(100_000, 2, dtype=torch.float64), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    path, a = walk(energy, DRIFTS[drift], x, times, 0.3 + 0.4 * times)
    assert path.shape == (steps + 1, 100_000, 2) and path[0].equal(x)
    weight = a.exp()
    error = float(weight.std() / len(a) ** 0.5 / weight.mean())
    assert error < 0.02
    assert abs(log_mean_weight(a) - math.log(math.tau * STD**2)) < 4 * error
    w = (weight / weight.sum())[:, None]
    mean = (w * path[-1]).sum(0)
    torch.testing.assert_close(mean, torch.full((2,), MEAN).double(), atol=8 * error, rtol=0)
    torch.testing.assert_close(
        (w * (path[-1] - mean) ** 2).sum(0), torch.full((2,), STD**2).double(), atol=8 * error, rtol=0
    )


def test_small_steps_are_the_continuous_weights():
    """dA = (div b - grad U . b - dU/ds) ds, and s = 1 - t."""
    torch.manual_seed(0)
    x = torch.randn(200, 2, dtype=torch.float64)
    drift = lambda x, t: 0.5 * x + t[:, None]  # noqa: E731  # of divergence 1
    times = torch.linspace(1, 0, 1001, dtype=torch.float64)
    path, a = walk(energy, drift, x, times, 0.5 + 0 * times)
    total = torch.zeros(200, dtype=torch.float64)
    for x, t, ds in zip(path[:-1], times[:-1], -times.diff(), strict=True):
        t = t.expand(200)
        du_dt = energy(x, torch.ones(200).double())[0] - energy(x, torch.zeros(200).double())[0]
        total = total + ds * (1 - (energy(x, t)[1] * drift(x, t)).sum(1) + du_dt)
    torch.testing.assert_close(a, total, atol=0.15, rtol=0)
    assert (a - total).std() < 0.08


def test_effective_sample_size():
    assert effective_sample_size(torch.full((50,), -3.0)) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([0.0] + [-100.0] * 49)) == pytest.approx(1 / 50)
    assert effective_sample_size(torch.tensor([0.0, 0.0, -100.0, -100.0])) == pytest.approx(0.5)
    assert log_mean_weight(torch.tensor([0.0, math.log(3)])) == pytest.approx(math.log(2))
