"""Solvers against a mixture of Gaussians, of which the exact solution and distribution are known.

Tables are gone through: a solver, noise or process of yours is tested as soon as it is in its table.
"""

import dataclasses
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from processes import PROCESSES, GaussianProcess
from sampling import TIME_GRIDS, get_predict, sample
from solvers import (
    LAST_STEPS,
    SDE_NOISES,
    SOLVERS,
    Noise,
    Predict,
    coefs_at,
    gaussian,
    multistep,
    relative_noise,
    steps,
)
from tests.oracle import F64, RING, GaussianMixture, at, base_noise, process_named, random_mixture

ODE = [name for name, solver in SOLVERS.items() if not solver.stochastic]
SDE = [name for name, solver in SOLVERS.items() if solver.stochastic]
each_process = pytest.mark.parametrize('process_name', PROCESSES)
each_noise = pytest.mark.parametrize('sde_noise', SDE_NOISES)

# Solvers that are no linear multistep in the log-SNR or the angle step in t itself; for these, equal steps of t are a
# fair choice on any process.
STEPS_IN_T = [name for name, solver in SOLVERS.items() if getattr(solver.step, 'func', None) is not multistep]
SMOOTH = random_mixture(2, 3, seed=4, smallest=0.3, largest=0.5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- order of convergence


def exact_predict(process, mixture, memory=0):
    return get_predict(mixture.as_model('x0', process), process, None, model_type='x0', memory=memory)


def rk4_path(process, mixture, x, t, s, n=40):
    """The exact solution from t to s, by a method that the code under test is not asked for."""
    h = (s - t) / n

    def velocity(x, t):
        return mixture.prediction(x, at(process, t, len(x))).velocity

    for i in range(n):
        now = t + i * h
        k1 = velocity(x, now)
        k2 = velocity(x + h / 2 * k1, now + h / 2)
        k3 = velocity(x + h / 2 * k2, now + h / 2)
        k4 = velocity(x + h * k3, now + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@each_process
@pytest.mark.parametrize('solver', [name for name in ODE if SOLVERS[name].nfe])
def test_order_of_convergence(solver, process_name):
    """The error falls by 2^order when steps are halved.

    On a stretch of path, with as many exact earlier values as the solver looks back at.
    """
    process, method = process_named(process_name), SOLVERS[solver]
    angle_of = torch.tensor([1.0, 0.5], dtype=F64)  # between data and noise
    start, end = process.time_of_log_snr(-2 * angle_of.tan().log()).tolist()
    x_start = process.compute_xt(base_noise(20) / 2, base_noise(40)[20:], at(process, start, 20))

    def error(n):
        h = (start - end) / n
        predict = exact_predict(process, SMOOTH, method.memory)
        x = x_start
        for i in range(method.memory):  # exact earlier values
            predict(x, start - i * h)
            x = rk4_path(process, SMOOTH, x, start - i * h, start - (i + 1) * h)
        exact = rk4_path(process, SMOOTH, x, start - method.memory * h, end, 400)
        for i in range(method.memory, n):
            x = method.step(x, start - i * h, start - (i + 1) * h, predict, None)
        return (x - exact).square().mean().sqrt().item()

    n = {1: 256, 2: 128, 3: 128, 4: 64}.get(method.order, 96)
    observed = math.log2(error(n) / error(2 * n))
    assert observed == pytest.approx(method.order, abs=0.15)


@each_process
def test_a_converged_default_is_exact(process_name):
    """From the first step on, without help: the default solver and grid, against a method of another kind."""
    process = process_named(process_name)
    settings = dict(process=process, x1=base_noise(50), model_type='v')
    model_fn = RING.as_model('v', process)
    fine = sample(model_fn, **settings, solver='rk4', num_steps=500)
    torch.testing.assert_close(sample(model_fn, **settings, num_steps=150), fine, rtol=1e-4, atol=1e-4)


@each_process
def test_adaptive_steps_keep_their_tolerance(process_name):
    process = process_named(process_name)
    model_fn = RING.as_model('velocity', process)
    fine = sample(model_fn, process, base_noise(50), solver='rk4', num_steps=500)
    coarse = sample(model_fn, process, base_noise(50), solver='dopri5', num_steps=1)
    assert 1e-9 < (coarse - fine).square().mean().sqrt() < 1e-3


@each_process
def test_adaptive_steps_go_on_from_one_another(process_name):
    """Not a second evaluation where a step of the grid ends, and no step size found anew; the result is as exact."""
    process, method = process_named(process_name), SOLVERS['dopri5']
    model_fn, x1, n = RING.as_model('x0', process), base_noise(50), 12
    calls, ends = [], []

    def counted(xt, t, label):
        calls.append(t[0].item())
        return model_fn(xt, t, label)

    x = sample(
        counted,
        process,
        x1,
        solver='dopri5',
        num_steps=n,
        model_type='x0',
        callback=lambda i, s, x: ends.append((s, len(calls))),
    )
    alone, y, t = 0, at(process, 0.999).sigma * x1, 0.999
    for s, _ in ends:
        predict = exact_predict(process, RING)  # a new one: it knows nothing of the step before
        y, t = method.step(y, t, s, predict, None), s
        alone += predict.nfe
    assert len(calls) <= alone - 6 * (n - 1)  # the evaluation, and more for step sizes
    for (s, number), (_, following) in itertools.pairwise(ends):
        assert calls[number - 1] == pytest.approx(s, abs=1e-12) and (following - number) % 6 == 0  # 6 per attempt
    fine = sample(model_fn, process, x1, solver='rk4', num_steps=500, model_type='x0')
    assert (x - fine).square().mean().sqrt() < 1e-3


def test_an_adaptive_step_from_elsewhere_asks_for_its_velocity():
    process, step = process_named('rf'), SOLVERS['dopri5'].step
    used, new = (exact_predict(process, RING) for _ in range(2))
    step(base_noise(5), 0.9, 0.6, used, None)
    x = base_noise(10)[5:]
    torch.testing.assert_close(step(x, 0.6, 0.3, used, None), step(x, 0.6, 0.3, new, None), rtol=0, atol=0)


# ---------------------------------------------------------------- closed forms and published formulas


@each_process
@pytest.mark.parametrize('solver', [name for name in ODE if SOLVERS[name].nfe == 1])
def test_multistep_is_the_same_on_all_paths(solver, process_name):
    """On the same log-SNRs, methods in the log-SNR or the angle give the same on every process; Euler does not."""
    if solver in STEPS_IN_T:
        pytest.skip('a step in t')
    trained, other = process_named('rf'), process_named(process_name)
    other_model = RING.as_model('velocity', other)
    t_max, t_min = other.time_of_log_snr(trained.log_snr(torch.tensor([0.98, 0.02], dtype=F64))).tolist()
    x = sample(
        RING.as_model('velocity', trained), trained, base_noise(20), solver=solver, num_steps=12, t_min=0.02, t_max=0.98
    )
    start, end = at(other, t_max), at(other, t_min)
    x1 = base_noise(20) * 0.98 / math.hypot(0.98, 0.02) * torch.hypot(start.alpha, start.sigma) / start.sigma
    y = sample(other_model, other, x1, solver=solver, num_steps=12, t_min=t_min, t_max=t_max)
    torch.testing.assert_close(y / torch.hypot(end.alpha, end.sigma), x / math.hypot(0.02, 0.98), rtol=1e-6, atol=1e-8)


def dpm_solver(model_fn, process, x1, times, order):
    """DPM-Solver++ for x0 by divided differences (Lu et al. 2022b, section 4), written for itself."""
    alpha, sigma = process.alpha(times), process.sigma(times)
    lam = (alpha / sigma).log()
    x, past = sigma[0] * x1, []
    for i in range(len(times) - 1):
        past.insert(0, model_fn(x, times[i].expand(len(x)), None))
        h = lam[i + 1] - lam[i]
        phi_1, phi_2 = -torch.expm1(-h), h - 1 + (-h).exp()
        phi_3 = h**2 / 2 - phi_2
        change = phi_1 * past[0]
        if order > 1 and i > 0:
            r0 = lam[i] - lam[i - 1]
            d0 = (past[0] - past[1]) / r0
            first = d0
            if order > 2 and i > 1:
                r1 = lam[i - 1] - lam[i - 2]
                d1 = (past[1] - past[2]) / r1
                second = (d0 - d1) / (r0 + r1)
                first = d0 + r0 * second
                change = change + 2 * phi_3 * second
            change = change + phi_2 * first
        x = sigma[i + 1] / sigma[i] * x + alpha[i + 1] * change
    return x


@each_process
@pytest.mark.parametrize(('solver', 'order'), [('ddim', 1), ('dpmpp_2m', 2), ('dpmpp_3m', 3)])
def test_exponential_methods_are_the_published_ones(solver, order, process_name):
    process, n = process_named(process_name), 9
    model_fn = RING.as_model('x0', process)
    times = TIME_GRIDS['logistic'](process, 0.999, 0.001, n)
    x = sample(model_fn, process, base_noise(20), solver=solver, num_steps=n, model_type='x0')
    torch.testing.assert_close(x, dpm_solver(model_fn, process, base_noise(20), times, order), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(('solver', 'lower', 'num_steps'), [('dpmpp_2m', 'ddim', 2), ('dpmpp_3m', 'dpmpp_2m', 3)])
def test_a_value_at_infinite_noise_is_not_looked_back_at(solver, lower, num_steps):
    """At t = 1 the log-SNR is infinite: the step after it can use no past, and the one after that only one value.

    The mean of the data is not 0: it is the value there.
    """
    process = process_named('rf')
    settings = dict(process=process, x1=base_noise(20), model_type='x0', t_max=1.0, num_steps=num_steps)
    x, y = (sample(SMOOTH.as_model('x0', process), **settings, solver=name) for name in (solver, lower))
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@each_process
@pytest.mark.parametrize('times', [(0.9, 0.6), (0.8, 0.9, 0.4), (0.3, 0.6, 0.95, 0.1)], ids=len)
def test_weights_for_gaussian_data_have_the_least_error(times, process_name):
    """At the least mean square, the errors at the end are orthogonal to all that is summed.

    Paths, predictions and the growth of an error are found by following the ODE of Gaussians of 32 widths.
    """
    process, (*nodes, s), start = process_named(process_name), times, 0.96
    std = 0.5 * torch.tensor(np.geomspace(1 / 20, 2.5, 32))

    def follow(x, t, s, n=1000):
        c = process(torch.linspace(t, s, 2 * n + 1, dtype=F64)[:, None])
        rate = (c.alpha * c.alpha_dot * std**2 + c.sigma * c.sigma_dot) / (c.alpha**2 * std**2 + c.sigma**2)
        h = (s - t) / n
        for first, middle, last in zip(rate[0:-2:2], rate[1:-1:2], rate[2::2], strict=True):
            k1 = first * x
            k2 = middle * (x + h / 2 * k1)
            k3 = middle * (x + h / 2 * k2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + last * (x + h * k3))
        return x

    def x0(x, t):
        c = at(process, t)
        return c.alpha * std**2 / (c.alpha**2 * std**2 + c.sigma**2) * x

    x = {t: follow(torch.ones(32, dtype=F64), start, t) for t in (*nodes, s)}
    x = {t: std * xt / follow(x[s], s, 1e-4, 4000) for t, xt in x.items()}  # the paths that end at std
    mean = [at(process, nodes[0]).alpha, *[torch.ones(1, dtype=F64) for _ in nodes]]
    terms = [torch.cat(pair) for pair in zip([x[nodes[0]], *(x0(x[t], t) for t in nodes)], mean, strict=True)]
    wanted = torch.cat([x[s], at(process, s).alpha])
    growth = torch.cat([std, torch.ones(1)]) / wanted
    level = exact_predict(process, RING).level
    a, b = gaussian(level(nodes[0]), level(s), tuple(map(level, nodes)), 0.0, sigma_data=0.5)
    errors = growth * (sum(w * term for w, term in zip((a, *b), terms, strict=True)) - wanted)
    cosines = torch.stack([(growth * term) @ errors / (growth * term).norm() / errors.norm() for term in terms])
    assert errors.norm() > 1e-4 and cosines.abs().max() < 1e-3, (errors.norm(), cosines)


@pytest.mark.parametrize(
    ('n', 'formula', 'predicted', 'corrected'),
    [
        (11, 'angular', [1, 2, 3, *[4] * 6, 3, 2], [2, 3, 4, *[5] * 7]),
        (10, 'gaussian', [1, 2, *[3] * 8], [2, *[3] * 8]),
    ],
)
def test_how_far_the_steps_of_the_default_look_back(n, formula, predicted, corrected, monkeypatch):
    asked, original, adams = [], getattr(steps, formula), SOLVERS['adams']

    def counted(here, there, nodes, *others):
        asked.append(len(nodes))
        return original(here, there, nodes, *others)

    step = 'step' if formula == 'angular' else 'few'
    given = {step: partial(getattr(adams, step), formula=counted)}
    monkeypatch.setitem(SOLVERS, 'adams', dataclasses.replace(adams, **given))
    process = process_named('rf')
    sample(RING.as_model('velocity', process), process, base_noise(3), num_steps=n)
    assert (asked[::2], asked[1::2]) == (predicted, corrected)


@pytest.mark.parametrize(('dim', 'nfe'), [(16, 4), (32, 6), (16, 8), (32, 10)])
def test_with_few_evaluations_the_default_leads(dim, nfe):
    """By its median error, all our other solvers, each on the grid that is best for it."""
    process, mixture = process_named('rf'), random_mixture(dim, 12, seed=9)
    model_fn, x1 = mixture.as_model('velocity', process), torch.randn(100, mixture.dim, dtype=F64, generator=seeded(0))
    exact = sample(model_fn, process, x1, solver='rk4', num_steps=100)

    def error(**settings):
        return (sample(model_fn, process, x1, nfe=nfe, **settings) - exact).square().mean(1).sqrt().median().item()

    others = {
        (solver, grid): error(solver=solver, time_grid=grid)
        for solver in ODE
        for grid in TIME_GRIDS
        if solver != 'adams' and SOLVERS[solver].nfe and SOLVERS[solver].nfe <= nfe
    }
    assert error() < 0.75 * min(others.values()), (error(), min(others, key=others.get), min(others.values()))


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


# ---------------------------------------------------------------- distributions


def sliced_wasserstein(a, b, directions=64):
    """Mean over directions of the distance W2 between projections; a and b have as many points."""
    angle = math.pi * torch.arange(directions, dtype=F64) / directions
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((a @ axes).sort(0).values - (b @ axes).sort(0).values).square().mean(0).sqrt().mean().item()


def turned(x):
    """All eight turns of the points: the ring looks the same in all, so each mode has as many points."""
    turns = 2 * math.pi * torch.arange(8, dtype=F64) / 8
    rotations = torch.stack(
        [torch.stack([turns.cos(), -turns.sin()]), torch.stack([turns.sin(), turns.cos()])]
    ).permute(2, 0, 1)
    return (x @ rotations).flatten(0, 1)


def exact_samples(n, process, t, seed):
    g = torch.Generator().manual_seed(seed)
    return process.compute_xt(RING.sample(n, g)[0], torch.randn(n, 2, generator=g, dtype=F64), at(process, t, n))


def assert_distributed(samples, process, t_min=0.001):
    """As near to exact samples as these are to one another."""
    samples, sets = turned(samples), range(1, 7)
    exact = {seed: exact_samples(len(samples), process, t_min, seed) for seed in sets}
    floor = [sliced_wasserstein(exact[i], exact[j]) for i, j in itertools.combinations(sets, 2)]
    distance = sum(sliced_wasserstein(samples, x) for x in exact.values()) / len(exact)
    assert distance < sum(floor) / len(floor), (distance, sorted(floor))


@each_process
@each_noise
@pytest.mark.parametrize('solver', SDE)
def test_every_noise_leaves_the_marginals_right(solver, sde_noise, process_name):
    torch.manual_seed(0)
    process = process_named(process_name)
    assert_distributed(
        sample(
            RING.as_model('velocity', process),
            process,
            base_noise(400),
            solver=solver,
            num_steps=500,
            sde_noise=sde_noise,
        ),
        process,
    )


@pytest.mark.parametrize('sde_noise_scale', [0.25, 4.0])
@pytest.mark.parametrize('sde_last_step', LAST_STEPS)
def test_any_noise_scale_and_last_step_keep_the_distribution(sde_noise_scale, sde_last_step):
    torch.manual_seed(0)
    process = process_named('cosine')
    settings = dict(solver='sde_dpmpp_2m', num_steps=500, sde_noise_scale=sde_noise_scale, sde_last_step=sde_last_step)
    assert_distributed(sample(RING.as_model('velocity', process), process, base_noise(400), **settings), process)


@each_process
@pytest.mark.parametrize('solver', ODE)
def test_ode_samples_have_the_data_distribution(solver, process_name):
    process, nfe = process_named(process_name), SOLVERS[solver].nfe
    steps = dict(num_steps=1) if nfe is None else dict(nfe=300 if SOLVERS[solver].order == 1 else 120)
    if solver in STEPS_IN_T:
        steps['time_grid'] = 'uniform'
    assert_distributed(
        sample(RING.as_model('velocity', process), process, base_noise(400), solver=solver, **steps), process
    )


@pytest.mark.parametrize('solver', [s for s in SOLVERS if SOLVERS[s].nfe])
def test_new_process_can_be_sampled(solver):
    class Circle(GaussianProcess):
        def alpha(self, t):
            return 1 - t**2

        def sigma(self, t):
            return t * (2 - t**2).sqrt()

    torch.manual_seed(0)
    assert_distributed(
        sample(
            RING.as_model('velocity', Circle()),
            Circle(),
            base_noise(400),
            solver=solver,
            nfe=300 if SOLVERS[solver].order == 1 else 120,
        ),
        Circle(),
    )


@each_process
@pytest.mark.parametrize('trained', PROCESSES)
@pytest.mark.parametrize('solver', ['heun', 'sde_dpmpp_2m'])
def test_sampling_under_another_process(trained, process_name, solver):
    """What was trained on one path gives the same distribution on another."""
    torch.manual_seed(0)
    trained, other = process_named(trained), process_named(process_name)
    x = sample(
        RING.as_model('v', trained),
        trained,
        base_noise(400),
        model_type='v',
        solver=solver,
        num_steps=100,
        time_grid='uniform',
        sampling_process=other,
    )
    end = other.time_of_log_snr(trained.log_snr(torch.tensor([0.001], dtype=F64))).item()
    assert_distributed(x, other, end)


def test_sampling_under_another_process_asks_the_network_at_the_same_log_snr():
    rf, ve, seen = process_named('rf'), process_named('ve'), []

    def model_fn(xt, t, label):
        seen.append((xt, t))
        return torch.zeros_like(xt)

    predict = get_predict(model_fn, rf, None, model_type='x0', sampling_process=ve)
    x = base_noise(3)
    prediction = predict(x, 0.5)
    sigma = at(ve, 0.5).sigma
    (xt, t), time = seen[0], sigma / (1 + sigma)
    torch.testing.assert_close(t, time.expand(3))
    torch.testing.assert_close(xt, x * (1 - time), rtol=1e-10, atol=0)
    torch.testing.assert_close(prediction.x1, x / sigma, rtol=1e-10, atol=0)


def output_variance(solver, n, monkeypatch, process, t_max, **settings):
    """Exact variance of the samples for data N(0, 0.3^2).

    A sample is linear in the start and in each noise drawn, so one image for each of them tells all.
    """
    drawn, start = itertools.count(1), at(process, t_max)
    mixture = GaussianMixture(torch.zeros(1, 1), torch.full((1, 1, 1), 0.3**2, dtype=F64))

    def one_hot(x):
        noise = torch.zeros_like(x)
        noise[next(drawn)] = 1
        return noise

    monkeypatch.setattr(torch, 'randn_like', one_hot)
    x1 = torch.zeros(n + 2, 1, dtype=F64)
    x1[0] = (
        (0.3 * start.alpha).square() + start.sigma.square()
    ).sqrt() / start.sigma  # the exact variance to begin with
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
    """There the constant level asks for more: it is lowered to eta = 0.1, or to the process's own if that is more."""
    process = process_named('rf')
    predict = Predict(lambda x, t: None, process)
    step = predict.level(s).half_log_snr - predict.level(t).half_log_snr
    tau2 = relative_noise(predict, t, s, Noise(SDE_NOISES['constant'], 1.0))
    middle = coefs_at(process, (t + s) / 2)
    assert (SDE_NOISES['constant'](middle) * middle.sigma / middle.delta).item() * step > 2 * max(
        0.1, step
    )  # what it asks for
    assert tau2 * step == pytest.approx(max(0.1, step))
    assert relative_noise(predict, t, s, Noise(SDE_NOISES['constant'], 0.5)) == pytest.approx(tau2 / 2)
