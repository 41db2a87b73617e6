"""Samplers against a mixture of Gaussians, of which the exact solution, distribution and guided score are known. Tables are gone through:
a solver, grid, noise or process of yours is tested as soon as it is in its table."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from oracle import F64, GaussianMixture, random_mixture, ring

from config import Config, SettingError
from prediction import ROWS
from processes import PROCESSES, Coefs, GaussianProcess, get_process
from sampling import TIME_GRIDS, get_grid, get_predict, get_sample_fn, sample
from solvers import LAST_STEPS, SDE_NOISES, SOLVERS, Noise, Predict, coefs_at, multistep
from utils import bcast_right

ODE = [name for name, solver in SOLVERS.items() if not solver.stochastic]
SDE = [name for name, solver in SOLVERS.items() if solver.stochastic]
FIXED = [name for name, solver in SOLVERS.items() if solver.nfe]

each_process = pytest.mark.parametrize('process_name', PROCESSES)
each_solver = pytest.mark.parametrize('solver', SOLVERS)
each_grid = pytest.mark.parametrize('time_grid', TIME_GRIDS)
each_noise = pytest.mark.parametrize('sde_noise', SDE_NOISES)

# Solvers that are no linear multistep in the log-SNR or the angle step in t itself; for these, equal steps of t are a fair choice on any process.
STEPS_IN_T = [name for name, solver in SOLVERS.items() if getattr(solver.step, 'func', None) is not multistep]
RING = ring(8, 0.1)
SMOOTH = random_mixture(2, 3, seed=4, smallest=0.3, largest=0.5)


def process_named(name):
    return get_process(Config(process_name=name))


def base_noise(n, dim=2):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=F64)


def at(process, t, n=1):
    return process(torch.full((n,), t, dtype=F64))


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
    """On a stretch of path, with as many exact earlier values as the solver looks back at, the error falls by 2^order when steps are halved."""
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


# ---------------------------------------------------------------- closed forms and published formulas


@each_process
@pytest.mark.parametrize('solver', [name for name in ODE if SOLVERS[name].nfe == 1])
def test_multistep_is_the_same_on_all_paths(solver, process_name):
    """On the same log-SNRs, methods written in the log-SNR or the angle give the same images on every process; Euler does not."""
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


@each_process
@pytest.mark.parametrize('scale', [0.0, 1.0])
def test_stochastic_ddim(process_name, scale, monkeypatch):
    """Of the natural noise, one step of sde_dpmpp_2m is the posterior of the forward process given x0 (Song et al. 2021a, eq. 12 and 16)."""
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
    """All eight turns of the points: the ring and its exact models look the same in all, so each mode has as many points."""
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
    """Exact variance of the samples for data N(0, 0.3^2), for which a sample is linear in the start and each noise drawn: one image for each."""
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


# ---------------------------------------------------------------- cost, times, ends


@pytest.mark.parametrize('solver', FIXED)
@each_process
@each_grid
@pytest.mark.parametrize('num_steps', [1, 7])
def test_steps_evaluations_and_times(solver, process_name, time_grid, num_steps):
    process, model_times, steps = process_named(process_name), [], []

    def model_fn(xt, t, label):
        assert t.shape == (3,) and t.dtype == xt.dtype and (t == t[0]).all()
        model_times.append(t[0].item())
        return torch.zeros_like(xt)

    settings = dict(solver=solver, time_grid=time_grid, t_min=0.01, t_max=0.9)
    x = sample(
        model_fn,
        process,
        torch.randn(3, 1, 4, 5),
        num_steps=num_steps,
        callback=lambda i, t, x: steps.append((i, t, x)),
        **settings,
    )
    assert len(model_times) == num_steps * SOLVERS[solver].nfe
    assert model_times[0] == pytest.approx(0.9) and min(model_times) >= 0.01 - 1e-8 and max(model_times) <= 0.9 + 1e-7
    numbers, times, states = zip(*steps, strict=True)
    assert numbers == tuple(range(1, num_steps + 1))
    assert (
        list(times) == sorted(times, reverse=True) and len(set(times)) == num_steps and times[-1] == pytest.approx(0.01)
    )
    assert torch.equal(states[-1], x) and x.shape == (3, 1, 4, 5) and x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize('solver', FIXED)
@pytest.mark.parametrize('nfe', [4, 11, 50])
def test_as_many_evaluations_as_asked_for(solver, nfe):
    calls = []
    sample(
        lambda xt, t, label: calls.append(t) or 0 * xt,
        process_named('rf'),
        torch.zeros(1, 1, 1, 1),
        solver=solver,
        nfe=nfe,
    )
    assert nfe - SOLVERS[solver].nfe < len(calls) <= nfe


def test_start_is_the_noise_of_t_max():
    started = []
    sample(
        lambda xt, t, label: started.append(xt) or 0 * xt,
        process_named('ve'),
        torch.ones(1, 1, 1, 1),
        solver='euler',
        num_steps=1,
        t_max=1.0,
    )
    assert started[0].item() == pytest.approx(80)


@each_grid
@each_process
def test_grid(time_grid, process_name):
    grid = TIME_GRIDS[time_grid](process_named(process_name), 0.95, 0.02, 30)
    assert grid.dtype == F64 and grid.shape == (31,) and (grid.diff() < 0).all()
    assert (grid[0].item(), grid[-1].item()) == (0.95, 0.02)


# name -> what its steps are equal in, as a function of sigma / alpha
EQUAL = {
    'log_snr': torch.log,
    'edm': lambda ratio: ratio ** (1 / 7),
    'cosine': torch.atan,
    'logistic': lambda ratio: 1 / (1 + (ratio / 0.3) ** (-1 / 1.2)),
}


@each_process
@pytest.mark.parametrize('time_grid', EQUAL)
def test_grid_has_equal_steps(time_grid, process_name):
    process = process_named(process_name)
    times = TIME_GRIDS[time_grid](process, 0.95, 0.02, 30)
    steps = EQUAL[time_grid](process.sigma(times) / process.alpha(times)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(30), rtol=1e-6, atol=0)


def test_edm_grid_is_the_published_one():
    """Karras et al. 2022, eq. 5, with the noise level as time."""

    class Sigma(GaussianProcess):
        def alpha(self, t):
            return torch.ones_like(t)

        def sigma(self, t):
            return 80 * t

    i = torch.arange(11, dtype=F64)
    expected = (80 ** (1 / 7) + i / 10 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(80 * TIME_GRIDS['edm'](Sigma(), 1.0, 0.002 / 80, 10), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ('time_grid', 'process_name', 't_min', 't_max'),
    [
        ('log_snr', 'rf', 0.0, 0.9),
        ('log_snr', 'rf', 0.1, 1.0),
        ('log_snr', 'linear_vp', 0.0, 1.0),
        ('edm', 'rf', 0.1, 1.0),
    ],
)
def test_grids_that_are_infinite_at_an_end_are_refused(time_grid, process_name, t_min, t_max):
    with pytest.raises(SettingError, match='t_min'):
        TIME_GRIDS[time_grid](process_named(process_name), t_max, t_min, 10)


def test_log_snr_grid_covers_ve_whole():
    grid = TIME_GRIDS['log_snr'](process_named('ve'), 1.0, 0.0, 4)
    torch.testing.assert_close(grid, torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=F64))


@pytest.mark.parametrize('process_name', ['rf', 'cosine', 've'])
@pytest.mark.parametrize(
    ('solver', 'sde_noise'), [(s, n) for s in FIXED for n in (SDE_NOISES if s in SDE else ['natural'])]
)
@pytest.mark.parametrize('time_grid', ['uniform', 'cosine', 'logistic'])
def test_whole_range_is_finite(process_name, solver, sde_noise, time_grid):
    """From alpha = 0 to sigma = 0: nothing diverges, whatever the noise, though rf's natural noise is infinite at t = 1 and the constant one at t = 0."""
    if process_name == 've' and time_grid != 'uniform' and solver in STEPS_IN_T:
        pytest.skip('the first of these steps spans most of the noise: not for a solver in t')
    process = process_named(process_name)
    torch.manual_seed(0)
    x = sample(
        RING.as_model('v', process),
        process,
        base_noise(200),
        model_type='v',
        solver=solver,
        nfe=80,
        sde_noise=sde_noise,
        t_min=0.0,
        t_max=1.0,
        time_grid=time_grid,
    )
    assert x.isfinite().all()
    assert 0.8 < x.norm(dim=1).median() < 1.2


@each_noise
def test_no_noise_is_the_ode(sde_noise):
    process = process_named('cosine')
    for sde, ode in (('euler_maruyama', 'euler'), ('sde_dpmpp_2m', 'dpmpp_2m')):
        a, b = (
            sample(
                RING.as_model('v', process),
                process,
                base_noise(50),
                model_type='v',
                solver=s,
                sde_noise=sde_noise,
                sde_noise_scale=0.0,
                num_steps=1,
            )
            for s in (ode, sde)
        )
        assert not torch.equal(a, b)  # the last step, the only one here, is the posterior mean
        steps = [
            SOLVERS[s].step(
                base_noise(50), 0.6, 0.5, exact_predict(process, RING, 1), Noise(SDE_NOISES[sde_noise], 0.0)
            )
            for s in (ode, sde)
        ]
        torch.testing.assert_close(*steps)


def test_last_steps():
    process, ends = process_named('rf'), {}
    for name in LAST_STEPS:
        ends[name] = sample(
            RING.as_model('x0', process),
            process,
            base_noise(5),
            model_type='x0',
            solver='euler_maruyama',
            num_steps=1,
            sde_last_step=name,
            t_min=0.3,
            t_max=0.9,
        )
    truth = RING.prediction(0.9 * base_noise(5), at(process, 0.9, 5))
    torch.testing.assert_close(ends['mean'], truth.x0)
    torch.testing.assert_close(ends['ode'], 0.7 * truth.x0 + 0.3 * truth.x1)


@each_solver
def test_only_stochastic_solvers_draw_noise_and_never_in_the_last_step(solver):
    process = process_named('rf')

    def equal(num_steps):
        x, y = (
            sample(
                RING.as_model('v', process), process, base_noise(50), model_type='v', solver=solver, num_steps=num_steps
            )
            for _ in range(2)
        )
        return torch.equal(x, y)

    assert equal(1)
    assert equal(5) != SOLVERS[solver].stochastic


@pytest.mark.parametrize('model_type', ROWS)
@each_process
def test_every_model_type_gives_the_same_samples(model_type, process_name):
    """The exact models agree, so the SDE's samples do too, but for rounding."""
    process = process_named(process_name)

    def samples(model_type):
        torch.manual_seed(0)
        return sample(
            RING.as_model(model_type, process),
            process,
            base_noise(100),
            model_type=model_type,
            solver='sde_dpmpp_2m',
            num_steps=50,
        )

    torch.testing.assert_close(samples(model_type), samples('x0'), rtol=1e-6, atol=1e-6)


@each_solver
def test_single_precision_is_enough(solver):
    """As networks have it: coefficients are computed in float64, so rounding stays that of the images."""
    process, steps = process_named('rf'), dict(num_steps=2 if SOLVERS[solver].nfe is None else 30)
    torch.manual_seed(0)
    x1 = base_noise(50).float()
    single = sample(RING.as_model('velocity', process), process, x1, solver=solver, **steps, sde_noise_scale=0.0)
    double = sample(
        RING.as_model('velocity', process), process, x1.double(), solver=solver, **steps, sde_noise_scale=0.0
    )
    assert single.dtype == torch.float32
    assert (single - double).abs().median() < (1e-5 if SOLVERS[solver].nfe else 1e-4)


# ---------------------------------------------------------------- guidance

LABEL, NULL = torch.arange(20) % 2, 2
WIDE = ring(8, 0.3)


def score_of(mixture, label=None):
    return lambda x, c: mixture.prediction(x, c, label).score


def euler_step_by_score(process, x, t, s, score):
    """dx/dt = f x - g^2 / 2 score (Song et al. 2021, eq. 13)."""
    c = at(process, t, len(x))
    return x + (s - t) * (bcast_right(c.f, 2) * x - bcast_right(c.g, 2) ** 2 / 2 * score(x, c))


@each_process
@pytest.mark.parametrize('model_type', ROWS)
@pytest.mark.parametrize('guide', ['null', 'model'])
def test_guided_score_by_hand(process_name, model_type, guide):
    """score = guide's + scale (class's - guide's), for every type of output."""
    process, scale = process_named(process_name), 3.0
    plain, other = score_of(RING, LABEL), score_of(RING) if guide == 'null' else score_of(WIDE, LABEL)
    who = dict(null_label=NULL) if guide == 'null' else dict(guide_fn=WIDE.as_model(model_type, process))
    x1, (t_max, t_min) = base_noise(20), (0.7, 0.6)
    x = sample(
        RING.as_model(model_type, process),
        process,
        x1,
        LABEL,
        model_type=model_type,
        solver='euler',
        num_steps=1,
        guidance_scale=scale,
        t_max=t_max,
        t_min=t_min,
        **who,
    )

    def score(x, c):
        return other(x, c) + scale * (plain(x, c) - other(x, c))

    expected = euler_step_by_score(process, at(process, t_max).sigma * x1, t_max, t_min, score)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)


def test_guidance_of_a_tilted_gaussian_is_exact():
    """Two classes N(+-m, s^2): p(x|c)^2 / p(x|other class) is a Gaussian again, of which the guided ODE is the flow while xt is Gaussian.

    With guide N(-m, s^2), scale 2: the score is that of N(3m, s^2 + ...) at every t.
    """
    process, m, s = process_named('cosine'), 0.4, 0.3
    plain, guide, tilted = (
        GaussianMixture(torch.tensor([[mean]], dtype=F64), torch.tensor([[[s**2]]], dtype=F64))
        for mean in (m, -m, 3 * m)
    )
    settings = dict(process=process, x1=base_noise(100, 1), model_type='v', num_steps=60)
    x = sample(plain.as_model('v', process), **settings, guidance_scale=2.0, guide_fn=guide.as_model('v', process))
    torch.testing.assert_close(x, sample(tilted.as_model('v', process), **settings), rtol=1e-9, atol=1e-9)


def count_rows(**settings):
    """Images in each call of the network, and the time."""
    calls = []

    def model_fn(xt, t, label):
        calls.append((t[0].item(), label.tolist()))
        assert len(xt) == len(t) == len(label)
        return torch.zeros_like(xt)

    sample(
        model_fn,
        process_named('rf'),
        torch.zeros(2, 1, 1, 1),
        torch.tensor([0, 1]),
        solver='euler',
        num_steps=9,
        time_grid='uniform',
        **settings,
    )
    return calls


def test_guidance_is_one_batched_call():
    assert [labels for _, labels in count_rows(guidance_scale=2.0, null_label=NULL)] == [[0, 1, 2, 2]] * 9
    assert [labels for _, labels in count_rows(null_label=NULL)] == [[0, 1]] * 9


def test_guidance_in_an_interval():
    calls = count_rows(guidance_scale=2.0, null_label=NULL, guidance_interval=(0.3, 0.6))
    assert [len(labels) == 4 for _, labels in calls] == [0.3 <= t <= 0.6 for t, _ in calls]
    assert 0 < sum(len(labels) == 4 for _, labels in calls) < 9


@pytest.mark.parametrize('rescale', [0.0, 0.5, 1.0])
def test_guidance_rescale(rescale):
    """phi = 1 gives x0 the standard deviation that it has without guidance, image by image (Lin et al. 2023, eq. 15)."""
    process = process_named('rf')
    mixture = random_mixture(12, 4, classes=2)
    x, t = base_noise(6, 12), 0.6

    def x0(**settings):
        label = torch.arange(6) % 2
        return get_predict(
            mixture.as_model('velocity', process), process, label, model_type='velocity', null_label=2, **settings
        )(x, t).x0

    plain, strong, scaled = x0(), x0(guidance_scale=5.0), x0(guidance_scale=5.0, guidance_rescale=rescale)
    ratio = plain.std(1, keepdim=True) / strong.std(1, keepdim=True)
    torch.testing.assert_close(scaled, strong * (rescale * ratio + 1 - rescale))
    assert (ratio < 0.99).any()


# ---------------------------------------------------------------- errors


def refused(match, **settings):
    with pytest.raises(SettingError, match=match):
        sample(lambda xt, t, label: xt, process_named('rf'), torch.zeros(2, 1, 1, 1), **settings)


@pytest.mark.parametrize('given', [dict(label=torch.tensor([0, 1])), dict(null_label=NULL), {}])
def test_guidance_without_a_label_or_a_null_class_is_refused(given):
    refused('guidance_scale=2.*null_label', guidance_scale=2.0, **given)


@pytest.mark.parametrize('setting', ['solver', 'time_grid', 'sde_noise', 'sde_last_step', 'model_type'])
def test_unknown_choice_lists_the_choices(setting):
    refused(rf"{setting}='nonsense'.*Choose one of: \w+, \w+", **{setting: 'nonsense'})


@pytest.mark.parametrize(('solver', 'nfe'), [('rk4', 3), ('dopri5', 50)])
def test_evaluations_that_buy_no_step_are_refused(solver, nfe):
    refused(rf"nfe={nfe} \(--sample_nfe\) with solver='{solver}'", solver=solver, nfe=nfe)


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        (dict(num_steps=0), 'num_steps=0'),
        (dict(nfe=-5), 'nfe=-5'),
        (dict(t_min=0.9, t_max=0.1), r't_min=0.9, t_max=0.1.*t_min < t_max'),
        (dict(t_max=1.5), r't_max=1.5.*<= 1'),
        (dict(guidance_interval=(0.8, 0.2)), r'guidance_interval=\(0.8, 0.2\).*from <= to'),
        (dict(guidance_rescale=3.0), 'guidance_rescale=3.*between 0 and 1'),
        (dict(guide_fn=lambda xt, t, label: xt), 'guidance_scale=1 makes nothing of guide_fn'),
    ],
)
def test_values_that_make_no_sense_are_refused(settings, match):
    refused(match, **settings)


def test_nothing_of_a_sample_outlives_it():
    """No reference cycle keeps images in the memory of a GPU until the collector comes by."""
    kept = []

    def model_fn(xt, t, label):
        kept.append(weakref.ref(xt))
        return torch.zeros_like(xt)

    gc.disable()
    try:
        sample(model_fn, process_named('rf'), torch.zeros(1, 1, 2, 2), num_steps=8)
        assert len(kept) == 8 and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    'settings',
    [
        dict(model_type='x1', t_max=1.0),
        dict(model_type='x0', t_min=0.0, solver='heun'),
        dict(model_type='score', t_max=1.0),
    ],
)
def test_singular_end_is_refused(settings):
    refused(f"'{settings['model_type']}' cannot give the .* at t=", time_grid='uniform', **settings)


def test_singular_end_of_the_other_process_is_refused():
    refused(
        'cannot give the velocity at t=0',
        model_type='v',
        t_min=0.0,
        solver='heun',
        time_grid='uniform',
        sampling_process=process_named('linear_vp'),
    )


def test_time_keeps_its_digits_beside_bfloat16_images():
    times = []
    sample(
        lambda xt, t, label: times.append(t[0].item()) or 0 * xt,
        process_named('rf'),
        torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16),
        num_steps=2,
    )
    assert times[0] == pytest.approx(0.999, abs=1e-6)


def test_an_end_that_the_solver_never_looks_at_is_not_refused():
    process = process_named('rf')
    x = sample(
        RING.as_model('x0', process), process, base_noise(20), model_type='x0', solver='ddim', t_min=0.0, t_max=1.0
    )
    assert x.isfinite().all()


def test_settings_are_checked_before_there_is_anything_to_sample():
    for bad in (dict(solver='rk4', sample_nfe=3), dict(time_grid='log_snr', t_min=0.0)):
        with pytest.raises(SettingError):
            get_sample_fn(Config(**bad), process_named('rf'), null_label=10)


def test_config_reaches_the_sampler():
    config = Config(solver='heun', sample_nfe=8, label_dropout=0.1, guidance_scale=3.0, guidance_interval=(0.0, 0.5))
    calls = []
    fn = get_sample_fn(config, process_named('rf'), null_label=7)
    fn(lambda xt, t, label: calls.append(label) or 0 * xt, x1=torch.zeros(1, 1, 2, 2), label=torch.tensor([3]))
    assert len(calls) == 8 and {tuple(label.tolist()) for label in calls} == {(3,), (3, 7)}


def test_no_gradient_is_recorded():
    weight = torch.ones(1, requires_grad=True)
    assert not sample(
        lambda xt, t, label: weight * xt, process_named('rf'), torch.ones(1, 1, 2, 2), num_steps=2
    ).requires_grad


def test_predict_remembers_only_what_is_asked_for():
    predict = Predict(lambda x, t: t, process_named('rf'), memory=2)
    for t in (0.9, 0.8, 0.7):
        predict(None, t)
    assert list(predict.past) == [(0.7, 0.7), (0.8, 0.8)] and predict.nfe == 3


def test_coefs_of_one_time_are_double():
    c = coefs_at(process_named('cosine'), 0.5)
    assert isinstance(c, Coefs) and c.alpha.dtype == F64 and c.alpha.shape == (1,)
    assert c.to(torch.zeros(1)).alpha.dtype == torch.float32


def test_grid_of_another_process_covers_the_same_log_snrs():
    rf, ve = process_named('rf'), process_named('ve')
    times = get_grid(
        rf, ve, model_type='v', solver='heun', num_steps=5, nfe=0, time_grid='uniform', t_min=0.02, t_max=0.98
    )
    torch.testing.assert_close(
        ve.sigma(torch.tensor([times[0], times[-1]], dtype=F64)), torch.tensor([49, 1 / 49], dtype=F64)
    )
