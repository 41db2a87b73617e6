"""All solvers of the table against a mixture of Gaussians with a known exact solution and distribution.

A solver, noise or process that you add to its table is tested too.
"""

import functools
import itertools
import math

import pytest
import torch

from config import SettingError
from prediction import optimal_denoiser
from processes import PROCESSES, GaussianProcess, RectifiedFlow
from sampling import sample
from solvers import LAST_STEPS, SDE_NOISES, SOLVERS, TIME_GRIDS, Multistep, equal_steps, logistic, shift_of
from tests.oracle import F64, RING, at, base_noise, exact_predict, process_named, random_mixture
from tests.solvers.each import each_process

ODE = [name for name, solver in SOLVERS.items() if not solver.stochastic]
SDE = [name for name, solver in SOLVERS.items() if solver.stochastic]
each_noise = pytest.mark.parametrize('sde_noise', SDE_NOISES)

# Solvers that are not linear multistep methods in the log-SNR or the angle step in t itself; for these, equal steps of
# t are a fair choice on any process.
STEPS_IN_T = [name for name, solver in SOLVERS.items() if not isinstance(solver.step, Multistep)]
SMOOTH = random_mixture(2, 3, seed=4, smallest=0.3, largest=0.5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- order of convergence


def rk4_path(process, mixture, x, t, s, n=10):
    """The exact solution from t to s, by a method that is not the code under test."""
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

    Tested on a part of the path, with as many exact earlier values as the solver looks back at.
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
        exact = rk4_path(process, SMOOTH, x, start - method.memory * h, end, 400 if method.order > 3 else 120)
        for i in range(method.memory, n):
            x = method.step(x, start - i * h, start - (i + 1) * h, predict, None)
        return (x - exact).square().mean().sqrt().item()

    n = {1: 256, 2: 128, 3: 128, 4: 64}.get(method.order, 96)
    observed = math.log2(error(n) / error(2 * n))
    assert observed == pytest.approx(method.order, abs=0.15)


@each_process
def test_a_converged_default_is_exact(process_name):
    """The default solver and grid, over the whole path, against a method of another kind."""
    process = process_named(process_name)
    settings = dict(process=process, x1=base_noise(50), model_type='v')
    model_fn = RING.as_model('v', process)
    fine = sample(model_fn, **settings, solver='rk4', num_steps=500)
    torch.testing.assert_close(sample(model_fn, **settings, num_steps=150), fine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('dim', 'nfe'), [(16, 4), (32, 6), (16, 8), (32, 10)])
def test_with_few_evaluations_the_default_leads(dim, nfe):
    """Its median error is below the errors of all our other solvers, each on its best grid."""
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


# ---------------------------------------------------------------- distributions


def projections(points, directions=64):
    """(points, directions): sorted along each direction."""
    angle = math.pi * torch.arange(directions, dtype=F64) / directions
    return (points @ torch.stack([angle.cos(), angle.sin()])).sort(0).values


def sliced_wasserstein(a, b):
    """Mean over directions of the distance W2 between `projections` of equally many points."""
    return (a - b).square().mean(0).sqrt().mean().item()


def turned(x):
    """The points in all eight rotations, in which the ring looks the same: so each mode has equally many points."""
    turns = 2 * math.pi * torch.arange(8, dtype=F64) / 8
    rotations = torch.stack(
        [torch.stack([turns.cos(), -turns.sin()]), torch.stack([turns.sin(), turns.cos()])]
    ).permute(2, 0, 1)
    return (x @ rotations).flatten(0, 1)


@functools.cache
def exact_samples(n, process, t):
    """`projections` of six sets of exact samples, and the mean of the distances between these."""
    sets = []
    for seed in range(1, 7):
        g = seeded(seed)
        x0, x1 = RING.sample(n, g)[0], torch.randn(n, 2, generator=g, dtype=F64)
        sets.append(projections(process.compute_xt(x0, x1, at(process, t, n))))
    floor = [sliced_wasserstein(a, b) for a, b in itertools.combinations(sets, 2)]
    return sets, sum(floor) / len(floor)


def assert_distributed(samples, process, t_min=0.001):
    """Samples are as close to exact samples as these are to each other."""
    samples = turned(samples)
    exact, floor = exact_samples(len(samples), process, t_min)
    distance = sum(sliced_wasserstein(projections(samples), x) for x in exact) / len(exact)
    assert distance < floor


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


class Circle(GaussianProcess):
    def alpha(self, t):
        return 1 - t**2

    def sigma(self, t):
        return t * (2 - t**2).sqrt()


CIRCLE = Circle()


@pytest.mark.parametrize('solver', [s for s in SOLVERS if SOLVERS[s].nfe])
def test_new_process_can_be_sampled(solver):
    torch.manual_seed(0)
    assert_distributed(
        sample(
            RING.as_model('velocity', CIRCLE),
            CIRCLE,
            base_noise(400),
            solver=solver,
            nfe=300 if SOLVERS[solver].order == 1 else 120,
        ),
        CIRCLE,
    )


@each_process
@pytest.mark.parametrize('trained', PROCESSES)
@pytest.mark.parametrize('solver', ['heun', 'sde_dpmpp_2m'])
def test_sampling_under_another_process(trained, process_name, solver):
    """A network trained on one path gives the same distribution on another."""
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


# ---------------------------------------------------------------- time grids


each_grid = pytest.mark.parametrize('time_grid', TIME_GRIDS)


@each_grid
@each_process
def test_grid(time_grid, process_name):
    grid = TIME_GRIDS[time_grid](process_named(process_name), 0.95, 0.02, 30)
    assert grid.dtype == F64 and grid.shape == (31,) and (grid.diff() < 0).all()
    assert (grid[0].item(), grid[-1].item()) == (0.95, 0.02)


# name -> the variable in which its steps are equal, as a function of sigma / alpha
EQUAL = {
    'log_snr': torch.log,
    'edm': lambda ratio: ratio ** (1 / 7),
    'cosine': torch.atan,
    'logistic': lambda ratio: 1 / (1 + (ratio / 0.3) ** (-1 / 1.1)),
}


@each_process
@pytest.mark.parametrize('time_grid', EQUAL)
def test_grid_has_equal_steps(time_grid, process_name):
    process = process_named(process_name)
    times = TIME_GRIDS[time_grid](process, 0.95, 0.02, 30)
    steps = EQUAL[time_grid](process.sigma(times) / process.alpha(times)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(30), rtol=1e-6, atol=0)


@each_process
@pytest.mark.parametrize('solver', ['dpmpp_2m', 'unipc'])
def test_a_larger_picture_is_sampled_as_the_smaller_one(solver, process_name):
    """Pictures of four times the side, each pixel repeated, are the small pictures with noise of a quarter: the means
    over 4 x 4 pixels of samples on the grid logistic are the samples of the small pictures, at a quarter of the noise.
    """
    process, rng = process_named(process_name), torch.Generator().manual_seed(0)
    small = torch.rand(12, 1, 8, 8, generator=rng, dtype=F64) * 2 - 1
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randn(20, 1, 32, 32, generator=rng, dtype=F64)
    means = functools.partial(torch.nn.functional.avg_pool2d, kernel_size=4)

    def draw(data, x1, t_max, t_min):
        denoise = optimal_denoiser(data)
        model_fn = lambda x, t, label: denoise(x, process(t), label)  # noqa: E731
        settings = dict(model_type='x0', solver=solver, num_steps=12, t_max=t_max, t_min=t_min)
        x = sample(model_fn, process, x1, **settings)
        return x / process.alpha(torch.tensor(t_min, dtype=F64))

    ratios = torch.tensor([[15.0, 0.03], [60.0, 0.12]], dtype=F64)  # sigma / alpha at the ends
    ends, further = process.time_of_log_snr(-2 * ratios.log()).tolist()
    found, expected = means(draw(large, noise, *further)), draw(small, 4 * means(noise), *ends)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ('shape', 'shift'),
    [
        ((2,), 1),
        ((3, 4, 4), 1),
        ((1, 8, 8), 1),
        ((1, 28, 28), 3.5),
        ((3, 32, 32), 4),
        ((2, 1024), 4),
        ((1, 16, 16, 4), 4),
        ((3, 256, 256), 8),
    ],
)
def test_the_shift_is_the_ratio_of_the_sides(shape, shift):
    assert shift_of(shape) == shift
    model_fn = lambda x, t, label: seen.append(t[0].item()) or x  # noqa: E731
    for solver in ('dpmpp_2m', 'adams'):  # adams has a grid of its own in 5 steps
        seen: list[float] = []
        sample(model_fn, RectifiedFlow(), torch.zeros(1, *shape), solver=solver, num_steps=5, model_type='x0')
        variable = logistic(shift * (1.24 if solver == 'adams' else 0.6), 1.2 if solver == 'adams' else 1.1)
        times = equal_steps('logistic', RectifiedFlow(), 0.999, 0.001, 5, variable)
        assert seen == pytest.approx(times[:-1].tolist(), rel=1e-6)


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
