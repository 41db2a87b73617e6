"""The MLP learns sets of points with a known exact velocity, and takes data of any shape."""

import pytest
import torch

from config import Config
from networks import get_network
from networks.residual_mlp import MLP
from processes import get_process
from sampling import sample
from tests.oracle import F64, GivenMean, ring

PROCESS = get_process(Config())


def trained(draw, shape, num_classes=0, cond=None, steps=400, batch=256):
    """An MLP of 128 units after some seconds on `draw(n) -> (x0, label, cond)`."""
    torch.manual_seed(0)
    net = get_network(Config(network='mlp', channels=16), shape, num_classes, cond)
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 2e-3 * (1 - step / steps)
        x0, label, given = draw(batch)
        x1, t = torch.randn_like(x0), torch.rand(batch)
        xt = PROCESS.compute_xt(x0, x1, PROCESS(t))
        optimizer.zero_grad()
        (net(xt, t, label, **given) - (x1 - x0)).square().mean().backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def noisy(x0):
    """(xt, t) of points x0, at times at which xt determines the velocity."""
    t = 0.05 + 0.9 * torch.rand(len(x0), dtype=F64)
    return PROCESS.compute_xt(x0, torch.randn_like(x0), PROCESS(t)), t


def relative_error(out, exact):
    return ((out - exact).square().mean() / exact.square().mean()).item()


def test_it_learns_eight_gaussians_in_two_classes():
    data = ring(8, 0.1)

    def draw(n):
        x0, label = data.sample(n)
        return x0.float(), torch.where(torch.rand(n) < 0.2, 2, label), {}

    net = trained(draw, (2,), num_classes=2)
    x0, label = data.sample(4000)
    xt, t = noisy(x0)
    for asked in (label, torch.full_like(label, 2)):
        exact = data.prediction(xt, PROCESS(t), asked).velocity
        assert relative_error(net(xt.float(), t.float(), asked), exact) < 0.12

    asked = torch.arange(2000) % 2
    samples = sample(net, PROCESS, torch.randn(2000, 2), asked).double()
    distance, mode = (samples[:, None] - data.means).norm(dim=2).min(1)
    assert (distance < 0.3).double().mean() > 0.85
    assert (data.labels[mode] == asked).double().mean() > 0.95
    assert (torch.bincount(mode, minlength=8) / 2000 - 1 / 8).abs().max() < 0.04


def test_it_learns_from_a_vector_and_a_number():
    """Half of the points get their mean as a vector, and a number that marks them; the others have only xt."""
    data = GivenMean(std=0.3, spread=0.8)

    def draw(n):
        mean = data.spread * torch.randn(n, 2)
        known = (torch.rand(n) < 0.5).float()
        return mean + data.std * torch.randn(n, 2), None, dict(mean=known[:, None] * mean, known=known)

    net = trained(draw, (2,), cond={'mean': (2,), 'known': ()})
    x0, _, given = draw(4000)
    xt, t = noisy(x0.double())
    mean = torch.where(given['known'][:, None] == 1, given['mean'], torch.nan).double()
    out = net(xt.float(), t.float(), **given)
    assert relative_error(out, data.prediction(xt, PROCESS(t), mean).velocity) < 0.05
    ignorant = data.prediction(xt, PROCESS(t), torch.full_like(mean, torch.nan)).velocity
    assert relative_error(ignorant, data.prediction(xt, PROCESS(t), mean).velocity) > 0.2  # so it used the condition


@pytest.mark.parametrize('shape', [(), (1,), (2,), (3, 5), (2, 3, 4, 2)])
def test_data_of_any_shape_come_back_in_it(shape):
    net = MLP(shape, 3, width=16, cond={'of_any_shape': (2, 3)})
    torch.nn.init.normal_(net.head[-1].weight)
    xt = torch.randn(4, *shape)
    out = net(xt, 1000 * torch.rand(4), torch.arange(4), of_any_shape=torch.randn(4, 2, 3))
    assert out.shape == xt.shape and out.any()
    with pytest.raises(ValueError, match=r'xt has shape \(4, 7\)'):
        net(torch.zeros(4, 7), torch.rand(4))


def test_dropout_acts_only_in_training():
    net = MLP((2,), 0, width=16, dropout=0.5)
    for p in net.parameters():
        torch.nn.init.normal_(p)
    inputs = torch.randn(4, 2), torch.rand(4)
    assert not torch.equal(net(*inputs), net(*inputs))
    net.eval()
    assert torch.equal(net(*inputs), net(*inputs))
