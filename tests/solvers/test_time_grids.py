"""The times that solvers visit. A grid of yours is tested as soon as it is in TIME_GRIDS."""

import pytest
import torch

from config import SettingError
from processes import PROCESSES, GaussianProcess
from solvers import TIME_GRIDS
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
