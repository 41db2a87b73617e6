"""Moving averages: the recursion, tensors that are replaced, and restoring from a checkpoint."""

import copy

import pytest
import torch
from torch import nn

from config import Config, SettingError
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


@pytest.mark.parametrize(('width', 'gamma'), [(0.05, 16.97), (0.1, 6.94)])
def test_shares_of_updates_in_a_power_average(width, gamma):
    """The share of update k of n is (k/n)^(gamma + 1) - ((k-1)/n)^(gamma + 1); gammas of Karras et al. 2024."""
    n = 300
    net = nn.Linear(n, 1, bias=False).double()
    ema = EMA(net, (width,), 'power')
    for k in range(n):
        net.weight.data = torch.eye(n, dtype=torch.float64)[k : k + 1]
        ema.update(net)
    shares, at = ema.networks[width].weight[0].detach(), torch.arange(1, n + 1, dtype=torch.float64) / n
    torch.testing.assert_close(shares, at ** (gamma + 1) - (at - 1 / n) ** (gamma + 1), atol=2e-4, rtol=1e-2)
    mean = shares @ at
    assert float((shares @ (at - mean).square()).sqrt()) == pytest.approx(width, rel=0.01)


def test_an_unknown_type_is_refused():
    with pytest.raises(SettingError, match=r'ema_type.*exponential, power'):
        EMA(scalar_network(), (0.9,), 'linear')
    with pytest.raises(SettingError, match=r'widths from 0.01 to 0.25: add --ema_decays 0.05'):
        Config(ema_type='power')


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


class Tied(nn.Module):
    """A weight that two layers share, and buffers of two types."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer('scale', torch.ones(2))
        self.register_buffer('count', torch.zeros((), dtype=torch.int64))


def move_to_double(net, ema):
    net.double()
    for average in ema.networks.values():
        average.double()


def load_other_tensors(net, ema):
    """Put other tensors in the place of the network's and the averages' own."""
    for module in (net, *ema.networks.values()):
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
        module.b.weight = module.a.weight  # the load undoes it


def load(net, ema):
    other = EMA(Tied(), DECAYS)
    other.update(Tied())
    net.load_state_dict(Tied().state_dict())
    ema.load_state_dict(other.state_dict())


def replace_a_buffer(net, ema):
    net.scale = torch.tensor([5.0, 6.0])


@pytest.mark.parametrize('change', [move_to_double, load_other_tensors, load, replace_a_buffer])
def test_what_was_looked_up_once_stays_right(change):
    """An average that saw the change continues like one that is built afterwards from the same weights."""
    torch.manual_seed(0)
    net = Tied()
    ema = EMA(net, DECAYS)
    ema.update(net)
    change(net, ema)
    afresh = EMA(net, DECAYS)
    afresh.load_state_dict(copy.deepcopy(ema.state_dict()))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
        net.scale += 1
        net.count += 1
    before = ema.networks[0.9].a.weight.clone()
    for either in (ema, afresh):
        either.update(net)
    for decay in DECAYS:
        ours, theirs = ema.networks[decay], afresh.networks[decay]
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
        assert torch.equal(ours.scale, net.scale) and ours.count == 1
    d = 3 / 12
    torch.testing.assert_close(ema.networks[0.9].a.weight, d * before + (1 - d) * net.a.weight)


def test_update_does_not_walk_over_the_network(monkeypatch):
    net = Tied()
    ema = EMA(net, DECAYS)
    for walk in ('modules', 'named_modules', 'parameters', 'named_parameters', 'buffers', 'named_buffers'):
        monkeypatch.setattr(nn.Module, walk, lambda *args, **kwargs: pytest.fail('a walk over all modules'))
    ema.update(net)


def test_without_decays_there_is_no_work():
    ema = EMA(scalar_network(), ())
    ema.update(scalar_network())
    assert ema.num_updates == 0 and ema.state_dict()['networks'] == {}
    ema.load_state_dict(ema.state_dict())


def test_networks_without_weights_or_buffers():
    EMA(nn.Identity(), DECAYS).update(nn.Identity())
