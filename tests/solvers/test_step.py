"""Arguments of solver steps: the memory of predictions, coefficients at one time, noise, and `few` steps."""

import itertools
import math

import pytest
import torch

from processes import Coefs
from sampling import sample
from solvers import SDE_NOISES, SOLVERS, TIME_GRIDS, Noise, Predict, Solver, coefs_at, relative_noise
from tests.oracle import F64, RING, GaussianMixture, at, base_noise, exact_predict, process_named
from tests.solvers.each import each_process


def test_predict_remembers_only_as_much_as_its_memory():
    predict = Predict(lambda x, t: t, process_named('rf'), memory=2)
    for t in (0.9, 0.8, 0.7):
        predict(None, t)
    assert list(predict.past) == [(0.7, 0.7), (0.8, 0.8)] and predict.nfe == 3


def test_coefs_of_one_time_are_double():
    c = coefs_at(process_named('cosine'), 0.5)
    assert isinstance(c, Coefs) and c.alpha.dtype == F64 and c.alpha.shape == (1,)


def test_few_steps_have_a_step_and_a_grid_of_their_own():
    many, few = (lambda *_: None), (lambda *_: None)
    solver = Solver(many, nfe=1, order=1, few=few, few_steps=3)
    (step, grids), (other, others) = solver.for_steps(3), solver.for_steps(4)
    assert step is few and other is many and others is TIME_GRIDS
    assert [name for name in grids if grids[name] is not others[name]] == ['logistic']
    assert SOLVERS['euler'].for_steps(1) == (SOLVERS['euler'].step, TIME_GRIDS)


# ---------------------------------------------------------------- noise of the SDE


SDE = [name for name, solver in SOLVERS.items() if solver.stochastic]
each_noise = pytest.mark.parametrize('sde_noise', SDE_NOISES)


def test_noise_levels_are_the_published_ones():
    """w^2 = 2 sigma level: g^2 (Song et al. 2021, eq. 6), 2 sigma^2, and 1 on rf or pi / 2 on cosine."""
    t = torch.linspace(0.05, 0.95, 7, dtype=F64)
    rf, cosine, vp = (process_named(name)(t) for name in ('rf', 'cosine', 'linear_vp'))

    def w2(name, coefs):
        return 2 * coefs.sigma * SDE_NOISES[name](coefs)

    torch.testing.assert_close(w2('natural', rf), 2 * t / (1 - t))
    torch.testing.assert_close(w2('natural', vp), 0.1 + t * (20 - 0.1))  # beta(t)
    torch.testing.assert_close(w2('sigma', rf), 2 * t**2)
    torch.testing.assert_close(w2('constant', rf), torch.ones_like(t))
    torch.testing.assert_close(w2('constant', cosine), torch.full_like(t, math.pi / 2))
    torch.testing.assert_close(w2('constant', vp), vp.alpha * vp.sigma_dot - vp.sigma * vp.alpha_dot)


@each_process
@pytest.mark.parametrize('scale', [0.0, 1.0])
def test_stochastic_ddim(process_name, scale, monkeypatch):
    """With the natural noise, one step of sde_dpmpp_2m is the posterior of the forward process given x0.

    Song et al. 2021a, eq. 12 and 16.
    """
    process, z = process_named(process_name), base_noise(60)[40:]
    monkeypatch.setattr(torch, 'randn_like', lambda x: z)
    predict = exact_predict(process, RING, 1)
    x, t, s = base_noise(20), 0.6, 0.5
    y = SOLVERS['sde_dpmpp_2m'].step(x, t, s, predict, Noise(SDE_NOISES['natural'], scale))
    c, d, truth = at(process, t), at(process, s), RING.prediction(x, at(process, t, 20))
    ratio = c.alpha / d.alpha
    std = scale * d.sigma / c.sigma * (c.sigma**2 - ratio**2 * d.sigma**2).sqrt()
    torch.testing.assert_close(
        y, d.alpha * truth.x0 + (d.sigma**2 - std**2).sqrt() * truth.x1 + std * z, rtol=1e-8, atol=1e-8
    )


@each_process
@each_noise
def test_euler_maruyama_is_euler_maruyama_in_the_limit(process_name, sde_noise, monkeypatch):
    process, z = process_named(process_name), base_noise(60)[40:]
    monkeypatch.setattr(torch, 'randn_like', lambda x: z)
    x, t, h = base_noise(20), 0.5, 1e-7
    y = SOLVERS['euler_maruyama'].step(x, t, t - h, exact_predict(process, RING), Noise(SDE_NOISES[sde_noise]))
    c = at(process, t)
    w = (2 * c.sigma * SDE_NOISES[sde_noise](c)).sqrt()
    truth = RING.prediction(x, at(process, t, 20))
    expected = -h * (truth.velocity - w**2 / 2 * truth.score) + w * math.sqrt(h) * z
    assert (y - x - expected).abs().max() < 1e-3 * h * (1 + w.item() ** 2 + truth.velocity.abs().max()) + 3 * h**1.5 * (
        1 + w.item() ** 3
    )


def output_variance(solver, n, monkeypatch, process, t_max, **settings):
    """Exact variance of the samples for data N(0, 0.3^2).

    A sample is linear in the start and in each noise drawn, so one image for each of these is enough.
    """
    drawn, start = itertools.count(1), at(process, t_max)
    mixture = GaussianMixture(torch.zeros(1, 1), torch.full((1, 1, 1), 0.3**2, dtype=F64))

    def one_hot(x):
        noise = torch.zeros_like(x)
        noise[next(drawn)] = 1
        return noise

    monkeypatch.setattr(torch, 'randn_like', one_hot)
    x1 = torch.zeros(n + 2, 1, dtype=F64)
    x1[0] = ((0.3 * start.alpha).square() + start.sigma.square()).sqrt() / start.sigma  # start with the exact variance
    return (
        sample(
            mixture.as_model('v', process),
            process,
            x1,
            model_type='v',
            solver=solver,
            num_steps=n,
            t_max=t_max,
            **settings,
        )
        .square()
        .sum()
        .item()
    )


@each_noise
@pytest.mark.parametrize('solver', SDE)
@each_process
def test_weak_order(solver, sde_noise, process_name, monkeypatch):
    """The error of the variance, free of sampling noise."""
    process = process_named(process_name)
    t_max, t_min = process.time_of_log_snr(-2 * torch.tensor([1.2, 0.4], dtype=F64).tan().log()).tolist()
    end = at(process, t_min)
    exact = ((end.alpha * 0.3).square() + end.sigma.square()).item()
    settings = dict(sde_noise=sde_noise, sde_last_step='ode', t_max=t_max, t_min=t_min)
    errors = [abs(output_variance(solver, n, monkeypatch, process, **settings) - exact) for n in (200, 400)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SOLVERS[solver].order, abs=0.15)


@pytest.mark.parametrize(('t', 's'), [(0.05, 0.048), (0.05, 0.03)])
def test_near_the_data_a_step_exchanges_no_more_noise_than_it_can_bear(t, s):
    """The constant level would exchange more. It is lowered to eta = 0.1, or to the process's own if that is more."""
    process = process_named('rf')
    predict = Predict(lambda x, t: None, process)
    step = predict.level(s).half_log_snr - predict.level(t).half_log_snr
    tau2 = relative_noise(predict, t, s, Noise(SDE_NOISES['constant'], 1.0))
    middle = coefs_at(process, (t + s) / 2)
    assert (SDE_NOISES['constant'](middle) * middle.sigma / middle.delta).item() * step > 2 * max(
        0.1, step
    )  # without the limit
    assert tau2 * step == pytest.approx(max(0.1, step))
    assert relative_noise(predict, t, s, Noise(SDE_NOISES['constant'], 0.5)) == pytest.approx(tau2 / 2)
