"""Pages on flow maps: exact maps of a Gaussian have no loss, and numbers equal closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import main
from data_loading.toy2d import TOY2D
from tests.examples.test_examples import POINTS, batch_of, build, load  # noqa: F401

SLOW = POINTS | dict(time_input='slow')


def std(t):
    """The standard deviation of xt, (B, 1), of data N(0, 0.5^2)."""
    return (((1 - t) * 0.5) ** 2 + t**2).sqrt()[:, None]


def velocity(x, t):
    return x * ((t - 0.25 * (1 - t)) / std(t)[:, 0] ** 2)[:, None]


def average(x, t, label=None, s=None):
    """X(x, t, s) = x std(s) / std(t)."""
    gap = (s - t)[:, None]
    return torch.where(gap == 0, velocity(x, t), x * (std(s) / std(t) - 1) / torch.where(gap == 0, 1, gap))


def double(batch):
    """In float64, in which 1 / (s - t) loses no digits."""
    batch.x0, batch.x1, batch.t, batch.cond = batch.x0.double(), batch.x1.double(), batch.t.double(), dict(batch.cond)
    batch.cond['s'] = batch.cond['s'].double()
    return batch


class Exact(nn.Module):
    def forward(self, x, t, label=None):
        return velocity(x, t)


@pytest.mark.parametrize('rule', ['lagrangian', 'eulerian'])
def test_the_exact_map_of_a_teacher_has_no_loss(build, monkeypatch, rule):  # noqa: F811
    """At all points, although x1 - x0 is another velocity; and gradients reach only the student."""
    monkeypatch.setattr(main, 'load_run', lambda folder: type('Run', (), {'weights': lambda self: {'ema': Exact()}})())
    trainer, _ = build('flow_map_distill', 'Distilled', **SLOW, rule=rule)
    batch = double(batch_of(trainer))
    assert 0.1 < (batch.cond['s'] < batch.t).float().mean() < 0.5
    assert trainer.loss_fn(batch, average).max() < 1e-6
    worse = trainer.loss_fn(batch, lambda *a, **k: 1.1 * average(*a, **k))
    assert worse.mean() > 1e-4 and worse[batch.cond['s'] == batch.t].mean() > 1e-4


def test_only_the_student_is_trained(build, monkeypatch):  # noqa: F811
    teacher, _ = build('flow_map', 'Plain', **SLOW)
    for p in next(iter(teacher.weights().values())).parameters():
        nn.init.normal_(p, std=0.1)  # it starts at zero, as the student does
    monkeypatch.setattr(main, 'load_run', lambda folder: teacher)
    trainer, _ = build('flow_map_distill', 'Distilled', **SLOW, experiment_name='student')
    trainer.loss_fn(batch_of(trainer), trainer.get_model_fn(trainer.network, train=True)).mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in trainer.network.parameters())
    assert all(p.grad is None for p in trainer.modules['teacher'].parameters())
    assert set(trainer.optimizers) == {'network'}


def joint(x, t, label=None, s=None):
    """The average of the divergence, too: the volume grows by (std(s) / std(t))^2."""
    s, gap = t if s is None else s, ((t if s is None else s) - t)[:, None]
    here = (2 * (t - 0.25 * (1 - t)) / std(t)[:, 0] ** 2)[:, None]
    divergence = torch.where(gap == 0, here, 2 * (std(s) / std(t)).log() / torch.where(gap == 0, 1, gap))
    return average(x, t, s=s), divergence


def test_the_exact_map_of_points_and_densities_has_no_loss(build):  # noqa: F811
    trainer, _ = build('few_step_likelihood')
    batch = double(batch_of(trainer))
    s, t = batch.cond['s'], batch.t
    assert (s > t).any() and (s < t).any() and 0.3 < (s == t).float().mean() < 0.7
    xt = batch.x0 + t[:, None] * (batch.x1 - batch.x0)
    batch.x0, batch.x1 = xt - t[:, None] * velocity(xt, t), xt + (1 - t)[:, None] * velocity(xt, t)
    assert trainer.loss_fn(batch, joint).max() < 1e-6
    for part in (0, 1):

        def wrong(x, t, label=None, s=None, part=part):
            out = list(joint(x, t, label, s))
            out[part] = out[part] + 0.1 + 0.1 * (t if s is None else s)[:, None] * t[:, None]
            return out

        losses = trainer.loss_fn(batch, wrong)
        assert losses[s == t].mean() > 1e-5 and losses[s != t].mean() > 1e-5


@pytest.mark.parametrize('n', [1, 3])
def test_the_exact_map_gives_the_exact_density(build, n):  # noqa: F811
    trainer, _ = build('few_step_likelihood')
    x0, t_min = torch.randn(20, 2) / 2, torch.tensor([trainer.config.t_min])
    expected = Normal(0, std(t_min)).log_prob((1 - t_min) * x0).sum(1) + 2 * (1 - t_min).log()
    torch.testing.assert_close(trainer.log_prob(joint, x0, n), expected, rtol=0, atol=1e-3)


def test_nats_of_held_out_points(build, monkeypatch):  # noqa: F811
    """An untrained network is zero: points stay where they are and get the density of the noise at t_max."""
    monkeypatch.setattr('data_loading.toy2d.SIZES', (1000, 100))
    trainer, _ = build('few_step_likelihood')
    found = trainer.sample_metrics(torch.randn(50, 2), trainer.sample_inputs(50))
    x0 = trainer.test_loader.everything()[0]
    exact = TOY2D['moons'].density(x0).log()
    assert found['nats_exact'] == pytest.approx(-exact.mean().item())
    kept = 1 - trainer.config.t_min
    noise = Normal(0, trainer.config.t_max)
    untrained = noise.log_prob(kept * x0).sum(1) + 2 * math.log(kept)
    for n in (1, 2, 4, 8, 32):
        assert found[f'nats_{n}'] == pytest.approx(-untrained.mean().item(), rel=1e-5)
        assert found[f'error_{n}'] == pytest.approx((untrained - exact).abs().mean().item(), rel=1e-5)


# ---------------------------------------------------------------- the table


def test_the_divergence_by_hand(load):  # noqa: F811
    """0 for equal shares of all dark cells, log 2 if half of the points are elsewhere; the floor of exact points."""
    module = load('flow_map_table')
    centres = (torch.arange(64) + 0.5) * 1.8 / 64 - 0.9
    every = torch.cartesian_prod(centres, centres)
    dark = every[TOY2D['checkerboard'].density(every) > 0]
    assert len(dark) == 2048
    assert module.divergence(dark) == pytest.approx(0, abs=1e-6)
    assert module.divergence(torch.cat([dark, dark + 5])) == pytest.approx(math.log(2))
    assert module.divergence(every) == pytest.approx(math.log(2))
    torch.manual_seed(0)
    points = module.board(100_000)
    assert (TOY2D['checkerboard'].density(points) > 0).all()
    assert module.divergence(points) == pytest.approx(2047 / 200_000, rel=0.15)


def test_the_loss_of_the_table_is_the_loss_of_flow_map(build):  # noqa: F811
    """Only cheaper; and s < t are two uniform times, t itself is uniform where s = t."""
    trainer, module = build('flow_map_table')
    torch.manual_seed(0)
    batch, model_fn = batch_of(trainer, 2000), trainer.get_model_fn(trainer.network)
    whole = module.FlowMap.loss_fn(trainer, batch, model_fn)
    torch.testing.assert_close(trainer.loss_fn(batch, model_fn), whole)
    s, t, same = batch.cond['s'], batch.t, batch.cond['s'] == batch.t
    assert (s <= t).all() and 0.7 < same.float().mean() < 0.8
    for times, mean in ((t[same], 1 / 2), (t[~same], 2 / 3), (s[~same], 1 / 3)):
        assert times.mean().item() == pytest.approx(mean, abs=0.04)
    again = trainer.prepare_batch_fn(trainer.train_loader.take(range(2000)), is_train=True)
    assert torch.isin(again.x0, batch.x0).float().mean() < 0.01


def test_the_table_has_ours_and_theirs(build):  # noqa: F811
    trainer, _ = build('flow_map_table', rule='uniform')
    found = trainer.sample_metrics(None, trainer.sample_inputs(4))
    assert [found[f'theirs_{n}'] for n in (1, 2, 4, 8, 16)] == [0.1113, 0.1067, 0.0747, 0.0727, 0.0679]
    assert all(math.isfinite(found[f'kl_{n}']) for n in (1, 2, 4, 8, 16))
