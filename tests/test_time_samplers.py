import numpy as np
import pytest
import scipy.stats
import torch

from config import Config, SettingError
from time_samplers import TIME_SAMPLERS, get_time_sampler

each_sampler = pytest.mark.parametrize('name', TIME_SAMPLERS)
RANGES = [(0.0, 1.0), (0.001, 0.999), (0.2, 0.5)]


def truncated_logit_normal_cdf(c):
    def cdf(t):
        with np.errstate(divide='ignore'):
            return scipy.stats.norm(c.time_mean, c.time_std).cdf(np.log(t) - np.log1p(-np.asarray(t)))

    low, high = cdf(c.t_min), cdf(c.t_max)
    return lambda t: (cdf(t) - low) / (high - low)


CDFS = {
    'uniform': lambda c: scipy.stats.uniform(c.t_min, c.t_max - c.t_min).cdf,
    'logit_normal': truncated_logit_normal_cdf,
}


@pytest.mark.parametrize('name', CDFS)
@pytest.mark.parametrize(('t_min', 't_max'), RANGES)
@pytest.mark.parametrize(('mean', 'std'), [(0.0, 1.0), (-1.0, 0.5), (2.0, 1.5)])
def test_distribution(name, t_min, t_max, mean, std):
    config = Config(time_sampler=name, t_min=t_min, t_max=t_max, time_mean=mean, time_std=std)
    u = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = get_time_sampler(config)(u).numpy()
    assert scipy.stats.kstest(drawn, CDFS[name](config)).pvalue > 0.01
    strata = get_time_sampler(config)((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000).numpy()
    assert scipy.stats.kstest(strata, CDFS[name](config)).statistic < 1 / 5000


@each_sampler
@pytest.mark.parametrize(('t_min', 't_max'), RANGES)
def test_monotone_within_the_range_and_reaches_its_ends(name, t_min, t_max):
    sampler = get_time_sampler(Config(time_sampler=name, t_min=t_min, t_max=t_max))
    t = sampler(torch.linspace(0, 1, 1001))
    assert t.dtype == torch.float32 and t.shape == (1001,)
    assert (t.diff() >= 0).all() and (t[1:-1].diff() > 0).all()
    ends = torch.tensor([t_min, t_max])
    assert (t >= ends[0]).all() and (t <= ends[1]).all()
    torch.testing.assert_close(t[[0, -1]], ends)


@pytest.mark.parametrize(('mean', 'std'), [(20.0, 0.1), (-20.0, 0.1)])
def test_logit_normal_that_misses_the_range_is_an_error(mean, std):
    with pytest.raises(SettingError, match=rf'time_mean={mean:g}, time_std=0.1.*t_min=0.001'):
        get_time_sampler(Config(time_sampler='logit_normal', time_mean=mean, time_std=std))


def test_unknown_sampler_lists_the_choices():
    with pytest.raises(SettingError, match='uniform, logit_normal'):
        get_time_sampler(Config(time_sampler='lognormal'))
