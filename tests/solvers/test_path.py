"""Paths: the times that a solver visits, and a network on a process other than its own."""

import pytest
import torch

from processes import PROCESSES
from sampling import Guidance
from solvers import TIME_GRIDS, Steps, on_path
from tests.oracle import F64, at, base_noise, process_named

each_process = pytest.mark.parametrize('process_name', PROCESSES)


@each_process
@pytest.mark.parametrize(
    ('solver', 'n', 'centre'), [('adams', 4, 1.32), ('adams', 10, 0.84), ('adams', 11, 0.6), ('unipc', 4, 0.6)]
)
def test_adams_takes_few_steps_at_more_noise(solver, n, centre, process_name):
    process = process_named(process_name)
    settings = dict(solver=solver, num=n, t_min=0.02, t_max=0.95)
    times = torch.tensor(Steps(grid='logistic', **settings).times(process, process, 'v'), dtype=F64)
    steps = (1 / (1 + (process.sigma(times) / process.alpha(times) / (centre / 2)) ** (-1 / 1.2))).diff()
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
