"""The linear stochastic system on a ring: its law does not depend on how a time is split into steps."""

import math

import pytest
import torch

from config import Config
from data_loading import ring
from evaluation.scores import energy_spectrum


def test_two_steps_are_one_step_twice():
    x = torch.randn(5, 1, ring.POINTS)
    (once, first), (both, total) = ring.law(x, 1), ring.law(x, 2)
    again, _ = ring.law(once, 1)
    torch.testing.assert_close(again, both)
    decay = torch.exp(-(0.1 + 0.02 * torch.arange(ring.POINTS // 2 + 1) ** 2))
    torch.testing.assert_close(first.square() * (1 + decay**2), total.square())


def test_waves_move_by_two_points_a_step_and_lose_their_memory():
    places = torch.arange(ring.POINTS) * 2 * math.pi / ring.POINTS
    for k in (0, 1, 3, 8):
        mean, _ = ring.law(torch.cos(k * places)[None, None], 1)
        expected = math.exp(-0.1 - 0.02 * k**2) * torch.cos(k * (places - places[2]))
        torch.testing.assert_close(mean[0, 0], expected, atol=1e-5, rtol=0)
    mean, _ = ring.law(torch.randn(1, 1, ring.POINTS), 1000)
    assert mean.abs().max() < 1e-6 and ring.noise_std(1000) == pytest.approx(0.5, abs=0.001)


def test_draws_have_the_law():
    x = torch.randn(1, 1, ring.POINTS)
    drawn = ring.draw(x.expand(40_000, -1, -1), 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), ring.law(x, 1)[0][0], atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full((1, ring.POINTS), ring.noise_std(1)), rtol=0.02, atol=0)
    torch.testing.assert_close(energy_spectrum(drawn).mean(0), ring.spectrum(x, 1)[0], rtol=0.04, atol=0)


def test_the_parts_are_pairs_of_the_stationary_law():
    for after, label, before in ring.load_ring(Config(seed=3)):
        assert len(after) == len(label) == len(before)
        if len(after) > 1000:
            assert before.std() == pytest.approx(0.5, rel=0.02) and after.std() == pytest.approx(0.5, rel=0.02)
            left = after - ring.law(before, 1)[0]
            assert left.std() == pytest.approx(ring.noise_std(1), rel=0.02)
