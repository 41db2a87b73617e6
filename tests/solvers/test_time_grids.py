"""The times that solvers visit. TIME_GRIDS is gone through, so a grid of yours is tested too."""

import pytest
import torch

from config import SettingError
from processes import PROCESSES, GaussianProcess
from sampling import TIME_GRIDS, get_grid
from tests.oracle import F64, process_named

each_process = pytest.mark.parametrize('process_name', PROCESSES)
each_grid = pytest.mark.parametrize('time_grid', TIME_GRIDS)


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


@each_process
@pytest.mark.parametrize(
    ('solver', 'n', 'centre'), [('adams', 4, 1.32), ('adams', 10, 0.84), ('adams', 11, 0.6), ('unipc', 4, 0.6)]
)
def test_adams_takes_few_steps_at_more_noise(solver, n, centre, process_name):
    process = process_named(process_name)
    settings = dict(model_type='v', num_steps=n, nfe=0, t_min=0.02, t_max=0.95)
    times = torch.tensor(get_grid(process, None, solver=solver, time_grid='logistic', **settings), dtype=F64)
    steps = (1 / (1 + (process.sigma(times) / process.alpha(times) / (centre / 2)) ** (-1 / 1.2))).diff()
    torch.testing.assert_close(steps, steps.mean().expand(n), rtol=1e-6, atol=0)
    usual = get_grid(process, None, solver=solver, time_grid='cosine', **settings)
    assert usual == TIME_GRIDS['cosine'](process, 0.95, 0.02, n).tolist()


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


def test_grid_of_another_process_covers_the_same_log_snrs():
    rf, ve = process_named('rf'), process_named('ve')
    times = get_grid(
        rf, ve, model_type='v', solver='heun', num_steps=5, nfe=0, time_grid='uniform', t_min=0.02, t_max=0.98
    )
    torch.testing.assert_close(
        ve.sigma(torch.tensor([times[0], times[-1]], dtype=F64)), torch.tensor([49, 1 / 49], dtype=F64)
    )
