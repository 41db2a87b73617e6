"""Points in the plane: their positions and densities."""

import math

import pytest
import torch

from config import Config
from data_loading.toy2d import TOY2D, load_pairs, load_points, load_snapshots
from data_utils import DATASETS


@pytest.mark.parametrize('name', TOY2D)
def test_points_are_centred_and_a_function_of_the_seed(name, tiny_config):
    (x, label), (held_out, _) = DATASETS[name].load(tiny_config(seed=3))
    assert x.shape == (20_000, 2) and held_out.shape == (2_000, 2)
    assert x.mean(0).abs().max() < 0.03 and 0.4 < x.std() < 0.6
    assert sorted(label.unique().tolist()) == list(range(max(1, DATASETS[name].num_classes)))
    again, other = (DATASETS[name].load(tiny_config(seed=seed))[0][0] for seed in (3, 4))
    assert torch.equal(x, again) and not torch.equal(x, other) and not torch.equal(x[:2000], held_out)


@pytest.mark.parametrize('name', TOY2D)
def test_densities_agree_with_the_points(name, tiny_config):
    """Densities integrate to 1, and predict the number of points among 20,000 in each square of a fine grid."""
    side = torch.linspace(-1.3, 1.3, 261, dtype=torch.float64)
    middle, cell = (side[1:] + side[:-1]) / 2, 0.01**2
    density = TOY2D[name].density(torch.cartesian_prod(middle, middle)).reshape(260, 260)
    assert density.sum() * cell == pytest.approx(1, abs=0.01)
    (x, _), _ = DATASETS[name].load(tiny_config())
    expected = density.reshape(26, 10, 26, 10).sum((1, 3)) * cell * len(x)  # squares of 0.1
    place = ((x + 1.3) / 0.1).floor().long().clamp(0, 25)
    counts = torch.bincount(place[:, 0] * 26 + place[:, 1], minlength=676).reshape(26, 26)
    some = expected > 20
    deviation = (counts - expected)[some] / expected[some].sqrt()  # about standard normal
    assert deviation.abs().max() < 5 and deviation.square().mean() < 1.6


def test_the_density_of_eight_gaussians_by_hand():
    x = torch.tensor([[0.7, 0.0], [0.71, 0.03], [0.0, 0.0]], dtype=torch.float64)
    centres = [(0.7 * math.cos(i * math.pi / 4), 0.7 * math.sin(i * math.pi / 4)) for i in range(8)]
    by_hand = [
        sum(math.exp(-((a - c) ** 2 + (b - d) ** 2) / 0.005) for c, d in centres) / (8 * math.pi * 0.005)
        for a, b in x.tolist()
    ]
    assert TOY2D['eight_gaussians'].density(x).tolist() == pytest.approx(by_hand)


def test_pairs_of_two_sets_are_these_sets(tiny_config):
    config = tiny_config()
    parts = load_pairs('moons', 'spirals', config)
    for (x0, label, x1), (first, classes), (second, _) in zip(
        parts, load_points('moons', config), load_points('spirals', config), strict=True
    ):
        assert x0.equal(first) and label.equal(classes) and x1.equal(second)


def test_gaussians_and_squares_are_in_their_places(tiny_config):
    x, label = DATASETS['eight_gaussians'].load(tiny_config())[0]
    nearest = torch.atan2(x[:, 1], x[:, 0]).div(torch.pi / 4).round().long() % 8
    assert torch.equal(nearest, label) and (x.norm(dim=1) - 0.7).std() == pytest.approx(0.05, rel=0.05)
    x, _ = DATASETS['checkerboard'].load(tiny_config())[0]
    square = ((x + 0.9) / 0.45).floor().long()
    assert ((square.sum(1) % 2) == 0).all() and len(square.unique(dim=0)) == 8


def test_the_moons_are_half_circles_of_their_size(tiny_config):
    x, label = DATASETS['moons'].load(tiny_config())[0]
    distance = (x[label == 0] - 0.65 * torch.tensor([-0.5, -0.25])).norm(dim=1)
    assert distance.mean() == pytest.approx(0.651, abs=0.004) and distance.std() == pytest.approx(0.04, rel=0.05)


def test_the_spirals_wind_one_and_a_half_times(tiny_config):
    x, label = DATASETS['spirals'].load(tiny_config())[0]
    assert x.square().sum(1).mean() == pytest.approx(0.511, abs=0.01)
    r, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    on_arm = torch.cos(angle - 3 * torch.pi * r - torch.pi * label) > 0.8
    assert on_arm[r > 0.3].float().mean() > 0.99


@pytest.mark.slow
def test_snapshots_have_the_moving_law_and_optimal_partners_are_nearer():
    times, far = (0, 1 / 3, 2 / 3, 1), {}
    for optimal in (False, True):
        train, held_out = load_snapshots(times, optimal, Config(seed=1))
        far[optimal] = [float((train[0][:, i] - train[0][:, i + 1]).square().sum(1).mean()) for i in range(3)]
        assert train[0].shape == (2000, 4, 2) and held_out[0].shape == (1000, 4, 2)
        for i, t in enumerate(times):
            x = train[0][:, i]
            centre = 0.7 * torch.tensor([math.cos(math.pi * t), math.sin(math.pi * t)])
            ahead = x[x @ centre > 0]
            assert len(ahead) == 1000 and (ahead.mean(0) - centre).norm() < 0.02
            assert ahead.std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.1)
    assert all(near < 0.6 * random for near, random in zip(far[True], far[False], strict=True))
    assert far[True] == pytest.approx([0.7**2] * 3, rel=0.05)  # a chord of 60 degrees
