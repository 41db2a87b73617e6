"""The data are N(MEAN, STD^2) in every pixel, for which the exact model of every type has a closed form."""

import math

import pytest
import torch

from config import Config, SettingError
from prediction import ROWS
from processes import PROCESSES, GaussianProcess, get_process
from sampling import SDE_NOISES, SOLVERS, TIME_GRIDS, sample
from utils import bcast_right

MEAN, STD = 0.5, 0.3
ORDERS = {'euler': 1, 'heun': 2}
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]

each_process = pytest.mark.parametrize('process_name', PROCESSES)
each_solver = pytest.mark.parametrize('solver', SOLVERS)
each_grid = pytest.mark.parametrize('time_grid', TIME_GRIDS)
each_noise = pytest.mark.parametrize('sde_noise', SDE_NOISES)


def process_named(name):
    return get_process(Config(process_name=name))


def exact_model(process, model_type='velocity'):
    """E[y | xt] for y = a x0 + b x1."""

    def model_fn(xt, t, label):
        coefs = process(t)
        alpha, sigma = (bcast_right(k, xt.ndim) for k in (coefs.alpha, coefs.sigma))
        a, b = ((bcast_right(k, xt.ndim) if torch.is_tensor(k) else k or 0.0) for k in ROWS[model_type](coefs))
        variance = alpha**2 * STD**2 + sigma**2
        x0 = MEAN + alpha * STD**2 * (xt - alpha * MEAN) / variance
        x1 = sigma * (xt - alpha * MEAN) / variance
        return a * x0 + b * x1

    return model_fn


def marginal(process, time):
    """Mean and standard deviation of xt."""
    t = torch.tensor([time], dtype=torch.float64)
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    return alpha * MEAN, math.sqrt(alpha**2 * STD**2 + sigma**2)


def base_noise(n):
    """(n, 1, 1, 1) with mean exactly 0 and variance exactly 1."""
    x = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x - x.mean()) / x.std(correction=0)


def check_moments(samples, process, t_min=0.001, tolerance=0.02):
    mean, std = marginal(process, t_min)
    assert samples.mean().item() == pytest.approx(mean, abs=tolerance)
    assert samples.std().item() == pytest.approx(std, abs=tolerance)


@pytest.mark.parametrize(('solver', 'sde_noise'), [(s, n) for s in SOLVERS for n in (SDE_NOISES if SOLVERS[s].stochastic else ['sigma'])])
@each_process
@each_grid
def test_samples_have_the_data_distribution(solver, sde_noise, process_name, time_grid):
    torch.manual_seed(0)
    process, num_steps = process_named(process_name), 600 // SOLVERS[solver].nfe
    samples = sample(exact_model(process), process, base_noise(4000), solver=solver, num_steps=num_steps, time_grid=time_grid, sde_noise=sde_noise)
    check_moments(samples, process)


@each_solver
def test_new_process_can_be_sampled(solver):
    class Circle(GaussianProcess):
        def alpha(self, t):
            return 1 - t**2

        def sigma(self, t):
            return t * (2 - t**2).sqrt()

    torch.manual_seed(0)
    check_moments(sample(exact_model(Circle()), Circle(), base_noise(4000), solver=solver, num_steps=200), Circle())


@pytest.mark.parametrize('model_type', ROWS)
@each_process
def test_every_model_type_gives_the_same_samples(model_type, process_name):
    """The exact models agree, so the SDE's samples do too, but for rounding."""
    process = process_named(process_name)

    def samples(model_type):
        torch.manual_seed(0)
        return sample(exact_model(process, model_type), process, base_noise(100), model_type=model_type, solver='euler_maruyama', num_steps=50)

    torch.testing.assert_close(samples(model_type), samples('x0'), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('solver', DETERMINISTIC)
@each_process
def test_order_of_convergence(solver, process_name):
    """Against the exact flow: (x - mean) / std is constant along every path."""
    process, (t_min, t_max) = process_named(process_name), (0.1, 0.9)
    x1 = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None, None, None]
    start = process.sigma(torch.tensor([t_max], dtype=torch.float64)) * x1
    (mean_start, std_start), (mean, std) = marginal(process, t_max), marginal(process, t_min)
    exact = mean + std / std_start * (start - mean_start)

    def error(n):
        return (sample(exact_model(process), process, x1, solver=solver, num_steps=n, t_min=t_min, t_max=t_max) - exact).abs().max().item()

    order = math.log2(error(160) / error(320))
    assert order > ORDERS.get(solver, 1) - 0.1
    assert solver not in ORDERS or order < ORDERS[solver] + 0.25


@each_solver
@each_process
@each_grid
@pytest.mark.parametrize('num_steps', [1, 7])
def test_steps_evaluations_and_times(solver, process_name, time_grid, num_steps):
    process, model_times, steps = process_named(process_name), [], []

    def model_fn(xt, t, label):
        assert t.shape == (3,) and t.dtype == xt.dtype and (t == t[0]).all()
        model_times.append(t[0].item())
        return torch.zeros_like(xt)

    x = sample(
        model_fn,
        process,
        torch.randn(3, 1, 4, 5),
        solver=solver,
        num_steps=num_steps,
        time_grid=time_grid,
        t_min=0.01,
        t_max=0.9,
        callback=lambda i, t, x: steps.append((i, t.item(), x)),
    )
    assert len(model_times) == num_steps * SOLVERS[solver].nfe
    assert model_times[0] == pytest.approx(0.9) and min(model_times) >= 0.01 - 1e-8 and max(model_times) <= 0.9 + 1e-7
    numbers, times, states = zip(*steps, strict=True)
    assert numbers == tuple(range(1, num_steps + 1))
    assert list(times) == sorted(times, reverse=True) and len(set(times)) == num_steps and times[-1] == pytest.approx(0.01)
    assert torch.equal(states[-1], x) and x.shape == (3, 1, 4, 5)


def test_start_is_the_noise_of_t_max():
    started = []
    sample(lambda xt, t, label: started.append(xt) or 0 * xt, process_named('ve'), torch.ones(1, 1, 1, 1), solver='euler', num_steps=1, t_max=1.0)
    assert started[0].item() == pytest.approx(80)


@each_grid
@each_process
def test_grid(time_grid, process_name):
    grid = TIME_GRIDS[time_grid](process_named(process_name), 0.95, 0.02, 30)
    assert grid.dtype == torch.float64 and grid.shape == (31,) and (grid.diff() < 0).all()
    assert (grid[0].item(), grid[-1].item()) == (0.95, 0.02)


@each_process
def test_log_snr_grid_has_equal_steps_of_log_snr(process_name):
    process = process_named(process_name)
    steps = process.log_snr(TIME_GRIDS['log_snr'](process, 0.95, 0.02, 30)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(30), rtol=1e-6, atol=0)


@pytest.mark.parametrize(('process_name', 't_min', 't_max'), [('rf', 0.0, 0.9), ('rf', 0.1, 1.0), ('linear_vp', 0.0, 1.0)])
def test_log_snr_grid_refuses_infinite_ends(process_name, t_min, t_max):
    with pytest.raises(SettingError, match='t_min'):
        TIME_GRIDS['log_snr'](process_named(process_name), t_max, t_min, 10)


def test_log_snr_grid_covers_ve_whole():
    grid = TIME_GRIDS['log_snr'](process_named('ve'), 1.0, 0.0, 4)
    torch.testing.assert_close(grid, torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))


@each_noise
@each_process
@pytest.mark.parametrize('time', [0.0, 1.0])
def test_sde_noise_is_finite_at_the_ends_where_the_process_is(sde_noise, process_name, time):
    """rf's natural noise t / (1 - t) is not."""
    coefs = process_named(process_name)(torch.tensor([time]))
    level = SDE_NOISES[sde_noise](coefs)
    assert not coefs.sigma_dot.isfinite() or (level.isfinite() and level >= 0)


@pytest.mark.parametrize(('process_name', 'g_square'), [('rf', 2 * 0.3), ('ve', 2 * math.log(8000) * (0.01 * 8000**0.3) ** 2)])
def test_growth_is_the_growth_of_the_variance(process_name, g_square):
    c = process_named(process_name)(torch.tensor([0.3], dtype=torch.float64))
    assert (2 * c.sigma * SDE_NOISES['growth'](c)).item() == pytest.approx(g_square)


@each_noise
def test_no_noise_is_the_ode(sde_noise):
    process = process_named('cosine')
    ode, sde = (
        sample(exact_model(process), process, base_noise(50), solver=solver, num_steps=20, sde_noise=sde_noise, sde_noise_scale=0.0)
        for solver in ('euler', 'euler_maruyama')
    )
    assert torch.equal(ode, sde)


@each_solver
def test_only_stochastic_solvers_draw_noise_and_never_in_the_last_step(solver):
    process = process_named('rf')

    def equal(num_steps):
        x, y = (sample(exact_model(process), process, base_noise(50), solver=solver, num_steps=num_steps) for _ in range(2))
        return torch.equal(x, y)

    assert equal(1)
    assert equal(5) != SOLVERS[solver].stochastic


@pytest.mark.parametrize('scale', [0.25, 4.0])
def test_any_noise_scale_keeps_the_distribution(scale):
    torch.manual_seed(0)
    process = process_named('rf')
    samples = sample(exact_model(process), process, base_noise(4000), solver='euler_maruyama', num_steps=200, sde_noise_scale=scale)
    check_moments(samples, process)


LABEL, NULL = torch.tensor([0, 2]), 3
VELOCITY_OF_LABEL = torch.tensor([1.0, 10.0, 100.0, -7.0])


def guided(**settings):
    """One Euler step from 0 over all of t with a velocity that depends on the label alone: (minus what it was, calls)."""
    calls = []

    def model_fn(xt, t, label):
        calls.append(label)
        assert len(xt) == len(t) == len(label)
        return bcast_right(VELOCITY_OF_LABEL[label], 4).expand_as(xt)

    x = sample(model_fn, process_named('rf'), torch.zeros(2, 1, 1, 1), LABEL, solver='euler', num_steps=1, t_min=0.0, t_max=1.0, **settings)
    return -x.flatten(), calls


def test_no_guidance_is_one_plain_call():
    velocity, calls = guided(null_label=NULL)
    torch.testing.assert_close(velocity, torch.tensor([1.0, 100.0]))
    assert len(calls) == 1 and torch.equal(calls[0], LABEL)


@pytest.mark.parametrize('scale', [0.0, 0.5, 3.0])
def test_guidance(scale):
    velocity, calls = guided(guidance_scale=scale, null_label=NULL)
    torch.testing.assert_close(velocity, torch.tensor([-7 + scale * (1 + 7), -7 + scale * (100 + 7)]))
    assert len(calls) == 1 and sorted(calls[0].tolist()) == [0, 2, NULL, NULL]


@pytest.mark.parametrize('missing', [dict(label=LABEL), dict(null_label=NULL), {}])
def test_guidance_without_a_label_or_a_null_class_is_refused(missing):
    with pytest.raises(SettingError, match='guidance_scale=2'):
        sample(lambda xt, t, label: xt, process_named('rf'), torch.zeros(2, 1, 1, 1), guidance_scale=2.0, **missing)


@pytest.mark.parametrize('setting', ['solver', 'time_grid', 'sde_noise', 'model_type'])
def test_unknown_choice_lists_the_choices(setting):
    with pytest.raises(SettingError, match=rf"{setting}='nonsense'.*Choose one of: \w+, \w+"):
        sample(lambda xt, t, label: xt, process_named('rf'), torch.zeros(1, 1, 1, 1), **{setting: 'nonsense'})


def test_no_gradient_is_recorded():
    weight = torch.ones(1, requires_grad=True)
    assert not sample(lambda xt, t, label: weight * xt, process_named('rf'), torch.ones(1, 1, 2, 2), num_steps=2).requires_grad
