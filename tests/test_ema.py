import copy

import pytest
import torch
from torch import nn

from ema import EMA

DECAYS = (0.5, 0.9, 0.99)


def scalar_network(value=0.0):
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, value)
    return net


def test_against_the_recursion_by_hand():
    """n = 1, 2, ... updates with weights n^2; decay 0.5 is reached at n = 8, 0.9 at n = 80, 0.99 not at all."""
    net = scalar_network(3.0)
    ema = EMA(net, DECAYS)
    by_hand = dict.fromkeys(DECAYS, 3.0)
    for n in range(1, 201):
        nn.init.constant_(net.weight, n**2)
        ema.update(net)
        for decay in DECAYS:
            d = min(decay, (1 + n) / (10 + n))
            by_hand[decay] = d * by_hand[decay] + (1 - d) * n**2
            assert ema.networks[decay].weight.item() == pytest.approx(by_hand[decay], rel=1e-12)
    assert net.weight.item() == 200**2


def test_a_short_run_forgets_its_random_start():
    """Without the warm-up, a decay of 0.9999 would keep 90 % of it after 1000 steps."""
    net = scalar_network(1.0)
    ema = EMA(net, (0.9999,))
    nn.init.zeros_(net.weight)
    for _ in range(1000):
        ema.update(net)
    assert 0 < ema.networks[0.9999].weight.item() < 1e-6


def test_averages_are_copies_in_eval_mode_without_gradients():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    average = EMA(net, (0.9,)).networks[0.9]
    x = torch.randn(3, 2)
    before = average(x)
    nn.init.zeros_(net[0].weight)
    assert torch.equal(average(x), before)
    assert not average(x).requires_grad and not average.training and net.training


def test_buffers_are_copied():
    net = nn.BatchNorm1d(2)
    ema = EMA(net, DECAYS)
    net(torch.randn(8, 2))
    ema.update(net)
    for average in ema.networks.values():
        assert torch.equal(average.running_mean, net.running_mean) and average.running_mean.any()
        assert average.num_batches_tracked == 1
        assert average.running_mean is not net.running_mean


def test_state_dict_round_trip_continues_the_warmup(tmp_path):
    net = scalar_network(1.0)
    ema = EMA(net, DECAYS)
    for n in range(5):
        nn.init.constant_(net.weight, n)
        ema.update(net)
    torch.save(ema.state_dict(), tmp_path / 'ema.pt')
    loaded = EMA(scalar_network(-7.0), DECAYS)
    loaded.load_state_dict(torch.load(tmp_path / 'ema.pt'))
    for either in (ema, loaded):
        either.update(scalar_network(10.0))
    for decay in DECAYS:
        assert torch.equal(loaded.networks[decay].weight, ema.networks[decay].weight)


def test_reset_starts_again():
    net = scalar_network(1.0)
    ema = EMA(net, DECAYS)
    for _ in range(50):
        ema.update(net)
    nn.init.constant_(net.weight, 5.0)
    ema.reset(net)
    again = copy.deepcopy(net)
    nn.init.constant_(again.weight, 16.0)
    ema.update(again)
    for average in ema.networks.values():
        assert average.weight.item() == pytest.approx(2 / 11 * 5 + 9 / 11 * 16)
