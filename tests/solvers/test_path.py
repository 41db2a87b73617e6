"""Paths: the times that a solver visits, and a network on a process other than its own."""

import pytest
import torch

from prediction import ROWS
from processes import PROCESSES, RectifiedFlow
from sampling import Guidance, sample
from solvers import SOLVERS, TIME_GRIDS, Solver, Steps, on_path, path
from tests.helpers import slow_but
from tests.oracle import ALL_PROCESSES, F64, RING, SquaredCosine, at, base_noise, process_named

each_process = pytest.mark.parametrize('process_name', ALL_PROCESSES)


@each_process
@pytest.mark.parametrize(
    ('solver', 'n', 'centre', 'scale'),
    [('adams', 4, 1.32, 1.2), ('adams', 10, 0.84, 1.2), ('adams', 11, 0.6, 1.1), ('unipc', 4, 0.6, 1.1)],
)
def test_adams_takes_few_steps_at_more_noise(solver, n, centre, scale, process_name):
    process = process_named(process_name)
    settings = dict(solver=solver, num=n, t_min=0.02, t_max=0.95)
    times = torch.tensor(Steps(grid='logistic', **settings).times(process, process, 'v'), dtype=F64)
    steps = (1 / (1 + (process.sigma(times) / process.alpha(times) / (centre / 2)) ** (-1 / scale))).diff()
    torch.testing.assert_close(steps, steps.mean().expand(n), rtol=1e-6, atol=0)
    cosine = Steps(grid='cosine', **settings).times(process, process, 'v')
    assert cosine == TIME_GRIDS['cosine'](process, 0.95, 0.02, n).tolist()


def test_grid_of_another_process_covers_the_same_log_snrs():
    rf, ve = process_named('rf'), process_named('ve')
    times = Steps(solver='heun', num=5, grid='uniform', t_min=0.02, t_max=0.98).times(rf, ve, 'v')
    torch.testing.assert_close(
        ve.sigma(torch.tensor([times[0], times[-1]], dtype=F64)), torch.tensor([49, 1 / 49], dtype=F64)
    )


def test_sampling_under_another_process_asks_the_network_at_the_same_log_snr():
    rf, ve, seen = process_named('rf'), process_named('ve'), []

    def model_fn(xt, t, label):
        seen.append((xt, t))
        return torch.zeros_like(xt)

    predict = on_path(Guidance().predictor(model_fn, None, {}, 'x0'), rf, ve)
    x = base_noise(3)
    prediction = predict(x, 0.5)
    sigma = at(ve, 0.5).sigma
    (xt, t), time = seen[0], sigma / (1 + sigma)
    torch.testing.assert_close(t, time.expand(3))
    torch.testing.assert_close(xt, x * (1 - time), rtol=1e-10, atol=0)
    torch.testing.assert_close(prediction.x1, x / sigma, rtol=1e-10, atol=0)


# ---------------------------------------------------------------- outputs that say nothing of x0 near t_max


class Roughened:
    """A perfect network of a mixture plus an error, a function of xt, of 3% of the size of its output."""

    def __init__(self, process, model_type):
        self.exact = RING.as_model(model_type, process)
        self.directions = base_noise(8, 2)

    def __call__(self, xt, t, label=None):
        return self.exact(xt, t) + 0.03 * torch.sin(7 * xt @ self.directions.T) @ self.directions / 8**0.5


def worst(process, model_type, rough=True, **settings):
    """Root mean square distance to the samples of the perfect network in many steps on the same path."""
    x1, model_fn = base_noise(400), Roughened(process, model_type) if rough else RING.as_model(model_type, process)
    exact = sample(RING.as_model('v', process), process, x1, model_type='v', solver='rk4', num_steps=200)
    return (sample(model_fn, process, x1, model_type=model_type, **settings) - exact).square().mean().sqrt().item()


@pytest.mark.parametrize('solver', slow_but(['adams', 'heun'], ['adams', 'dpmpp_2m', 'ddim', 'unipc', 'heun']))
@pytest.mark.parametrize(('process', 'model_type'), [(SquaredCosine(), 'velocity'), (RectifiedFlow(), 'x1')])
def test_an_error_of_the_output_is_not_multiplied_at_the_start(process, model_type, solver, monkeypatch):
    late = worst(process, model_type, solver=solver, num_steps=40)
    monkeypatch.setattr(path, 'LARGEST_ERROR', 1e9)  # as if every output were as good everywhere
    at_once = worst(process, model_type, solver=solver, num_steps=40)
    if (solver, model_type) == ('heun', 'velocity'):  # it never reads x0
        assert late == at_once < 0.25
    else:
        assert late < 0.25 and late < at_once / 2


@pytest.mark.parametrize(('process', 'model_type'), [(SquaredCosine(), 'velocity'), (RectifiedFlow(), 'x1')])
def test_a_perfect_network_loses_nothing_by_a_late_start(process, model_type):
    assert Steps().start(process, model_type) < 0.999
    assert worst(process, model_type, rough=False, num_steps=200) < 2e-4


def test_a_solver_that_passes_its_goal_never_starts_late(monkeypatch):
    """Otherwise a network of two times would be called without the second, or its output used for another s."""
    to_goal = Solver(lambda x, t, s, predict, noise: x + (s - t) * predict(x, t, s).velocity, nfe=1, order=1)
    monkeypatch.setitem(SOLVERS, 'to_goal', to_goal)
    assert Steps('to_goal').start(RectifiedFlow(), 'x1') == 0.999 > Steps('euler').start(RectifiedFlow(), 'x1')
    model_fn, goals = RING.as_model('x1', RectifiedFlow()), []
    sample(lambda xt, t, label, s: [goals.append(s[0].item()), model_fn(xt, t)][1], RectifiedFlow(), base_noise(3),
           model_type='x1', solver='to_goal', num_steps=4, t_min=0.2, time_grid='uniform')  # fmt: skip
    assert goals == pytest.approx([0.79925, 0.5995, 0.39975, 0.2])


def test_x0_of_the_first_evaluation_is_part_of_a_late_start():
    process, x1 = SquaredCosine(), base_noise(5)
    start = Steps('ddim', t_min=0.45).start(process, 'velocity')
    alpha, sigma = (
        process.alpha(torch.tensor(start, dtype=F64)).item(),
        process.sigma(torch.tensor(start, dtype=F64)).item(),
    )
    model_fn, seen = RING.as_model('velocity', process), []
    sample(lambda xt, t, label: [seen.append((xt, t)), model_fn(xt, t)][1], process, x1, solver='ddim', num_steps=1,
           t_min=0.45, callback=lambda i, t, x: seen.append((x, t)))  # fmt: skip
    (first, t), (end, _) = seen  # one evaluation
    torch.testing.assert_close(first, sigma * x1)
    assert t[0].item() == pytest.approx(start)
    x0 = RING.prediction(first, process(t)).x0
    there = process(torch.full((5,), 0.45, dtype=F64))
    a, s = there.alpha[:, None], there.sigma[:, None]
    torch.testing.assert_close(end, a * x0 + s / sigma * (sigma * x1 + alpha * x0 - alpha * x0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('process_name', PROCESSES)
@pytest.mark.parametrize('model_type', ROWS)
@pytest.mark.parametrize('solver', ['adams', 'euler', 'sde_dpmpp_2m'])
def test_outputs_that_know_x0_start_at_t_max(solver, model_type, process_name):
    """F and v determine x0 everywhere; and a late start is still nearly pure noise."""
    process = process_named(process_name)
    start = Steps(solver).start(process, model_type)
    if model_type in ('F', 'v', 'x0'):
        assert start == 0.999
    assert 0 < start <= 0.999 and (
        start == 0.999 or process.alpha(torch.tensor(start)) <= 0.025 * process.sigma(torch.tensor(start))
    )
