import numpy as np
import pytest
import scipy.stats
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from config import Config, SettingError
from processes import PROCESSES, GaussianProcess, get_process
from tests.oracle import F64, ring
from time_samplers import TIME_SAMPLERS, get_time_sampler

each_sampler = pytest.mark.parametrize('name', TIME_SAMPLERS)
RANGES = [(0.0, 1.0), (0.001, 0.999), (0.2, 0.5)]


def truncated_logit_normal_cdf(c):
    def cdf(t):
        with np.errstate(divide='ignore'):
            return scipy.stats.norm(c.time_mean, c.time_std).cdf(np.log(t) - np.log1p(-np.asarray(t)))

    low, high = cdf(c.t_min), cdf(c.t_max)
    return lambda t: (cdf(t) - low) / (high - low)


def truncated_log_normal_cdf(c):
    """The CDF of t if log(sigma / alpha) is normal."""
    process = get_process(c)

    def cdf(t):
        log_noise = -process.log_snr(torch.as_tensor(np.array(t, dtype=float))) / 2
        return scipy.stats.norm(c.time_mean, c.time_std).cdf(log_noise)

    low, high = cdf([c.t_min]), cdf([c.t_max])
    return lambda t: (cdf(np.atleast_1d(t)) - low) / (high - low)


CDFS = {
    'log_normal': truncated_log_normal_cdf,
    'uniform': lambda c: scipy.stats.uniform(c.t_min, c.t_max - c.t_min).cdf,
    'logit_normal': truncated_logit_normal_cdf,
}


@pytest.mark.parametrize('name', CDFS)
@pytest.mark.parametrize(('t_min', 't_max'), RANGES)
@pytest.mark.parametrize(('mean', 'std'), [(0.0, 1.0), (-1.0, 0.5), (2.0, 1.5)])
@pytest.mark.parametrize('process_name', PROCESSES)
def test_distribution(name, t_min, t_max, mean, std, process_name):
    if name != 'log_normal' and process_name != 'rf':
        pytest.skip('the process does not matter')
    config = Config(
        time_sampler=name, t_min=t_min, t_max=t_max, time_mean=mean, time_std=std, process_name=process_name
    )
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


@pytest.mark.parametrize('name', ['logit_normal', 'log_normal'])
@pytest.mark.parametrize('mean', [20.0, -20.0])
def test_normal_that_misses_the_range_is_an_error_with_a_remedy_that_works(name, mean):
    with pytest.raises(SettingError, match=rf'time_mean={mean:g}, time_std=0.1.*-6.9.* and 6.9') as error:
        get_time_sampler(Config(time_sampler=name, time_mean=mean, time_std=0.1))
    remedy = float(str(error.value).split('--time_mean ')[1].rstrip('.'))
    assert get_time_sampler(Config(time_sampler=name, time_mean=remedy, time_std=0.1))(torch.rand(3)).isfinite().all()


@pytest.mark.parametrize('name', ['logit_normal', 'log_normal'])
@pytest.mark.parametrize('mean', [3.8, -3.8])
def test_tails_keep_their_digits(name, mean):
    """Four standard deviations out, in either tail, the rest of the density is right, and mirror-symmetric."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = get_time_sampler(Config(time_sampler=name, time_mean=mean, time_std=1.0, t_min=0.27, t_max=0.73))(u).logit()
    other = get_time_sampler(Config(time_sampler=name, time_mean=-mean, time_std=1.0, t_min=0.27, t_max=0.73))(
        1 - u
    ).logit()
    torch.testing.assert_close(t, -other, rtol=1e-9, atol=1e-9)
    expected = scipy.stats.truncnorm.ppf(u.numpy(), (np.log(0.27 / 0.73) - mean), (np.log(0.73 / 0.27) - mean)) + mean
    np.testing.assert_allclose(t.numpy(), expected, rtol=1e-9, atol=1e-9)


class Transfers(TorchDispatchMode):
    """Names of the operations that copy between devices, or read a number from a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor) and (x.ndim or x is out)}
        if name in ('_local_scalar_dense', 'nonzero', 'is_nonzero') or len(devices) > 1:
            self.seen.append(name)
        return out


class Power(GaussianProcess):
    """A process without closed forms."""

    def alpha(self, t):
        return 1 - t**2

    def sigma(self, t):
        return t**3


@each_sampler
@pytest.mark.parametrize('process_name', [*PROCESSES, 'power'])
def test_nothing_goes_to_the_device_in_a_call(name, process_name, monkeypatch):
    """Runs on pretended GPU tensors: a copy from the host would make the CPU wait for all work of the GPU."""
    monkeypatch.setitem(PROCESSES, 'power', lambda config: Power())
    sampler = get_time_sampler(Config(time_sampler=name, process_name=process_name))
    with FakeTensorMode(), Transfers() as transfers:
        t = sampler(torch.rand(16, device='cuda'))
        assert transfers.seen == [] and t.device.type == 'cuda' and t.dtype == torch.float32
        torch.zeros(3).to('cuda')
        assert transfers.seen == ['_to_copy']


# ---------------------------------------------------------------- where u comes from


def draw(build_trainer, tiny_config, n=20_000, **how):
    """u of all shards of a global batch of 32, for many steps: (steps, 32)."""
    trainer = build_trainer(tiny_config(**(dict(stratified=False) | how)))
    shards = trainer.config.batch_shards
    rows = []
    for step in range(n // 32):
        parts = []
        for shard in range(shards):
            trainer.batches.shard_position = (shard, shards)
            utils.seed_everything(0, 'batch', step, shard)
            parts.append(trainer.uniforms(32 // shards))
        rows.append(torch.cat(parts))
    return torch.stack(rows).double()


WAYS = {'iid': {}, 'stratified': dict(stratified=True), 'antithetic': dict(antithetic=True)}


@pytest.mark.parametrize('way', WAYS)
def test_uniforms_are_uniform(way, build_trainer, tiny_config):
    u = draw(build_trainer, tiny_config, experiment_name=way, **WAYS[way])
    assert scipy.stats.kstest(u[:, ::3].flatten().numpy(), 'uniform').pvalue > 0.01
    assert u.min() >= 0 and u.max() <= 1


def test_antithetic_comes_in_pairs_and_stratified_in_strata(build_trainer, tiny_config):
    paired = draw(build_trainer, tiny_config, n=640, experiment_name='a', antithetic=True)
    torch.testing.assert_close(paired.sort(1).values, (1 - paired).sort(1).values)
    strata = draw(build_trainer, tiny_config, n=640, experiment_name='s', stratified=True)
    assert ((32 * strata).floor().sort(1).values == torch.arange(32)).all()


@pytest.mark.parametrize(('target', 'antithetic_helps'), [('x0', True), ('velocity', False)])
def test_variance_of_the_loss_estimate(build_trainer, tiny_config, target, antithetic_helps):
    """The loss is the least loss at each time for a mixture of Gaussians, averaged over a batch of 32.

    Strata take nearly all of the variance that comes from the times. Mirrored pairs help a loss that rises or falls
    with t, and harm one that is high at both ends. The loss at t is E|y - E[y|xt]|^2, by Monte Carlo over 4000 points.
    """
    mixture, times = ring(8, 0.1), torch.linspace(0.001, 0.999, 200, dtype=F64)
    g = torch.Generator().manual_seed(0)
    x0, x1 = mixture.sample(4000, g)[0], torch.randn(4000, 2, generator=g, dtype=F64)
    truth, loss = {'x0': x0, 'velocity': x1 - x0}[target], []
    for t in times:
        c = get_process(Config())(t.expand(4000))
        xt = c.alpha[:, None] * x0 + c.sigma[:, None] * x1
        loss.append((getattr(mixture.prediction(xt, c), target) - truth).square().mean())
    curve, variance = torch.stack(loss).numpy(), {}
    for way, how in WAYS.items():
        u = draw(build_trainer, tiny_config, experiment_name=way, **how).numpy()
        variance[way] = np.interp(0.001 + 0.998 * u, times.numpy(), curve).mean(1).var()
    assert variance['stratified'] < 0.01 * variance['iid']
    assert (variance['antithetic'] < 0.5 * variance['iid']) == antithetic_helps


def test_both_ways_at_once_are_refused():
    with pytest.raises(SettingError, match=r'stratified=True, antithetic=True.*--no_stratified'):
        Config(antithetic=True)


def test_unknown_sampler_lists_the_choices():
    with pytest.raises(SettingError, match='uniform, logit_normal, log_normal'):
        get_time_sampler(Config(time_sampler='lognorm'))


@pytest.mark.parametrize('name', ['logit_normal', 'log_normal'])
def test_the_last_number_is_the_last_time_where_the_normal_ends_far_before_it(name):
    """The CDF is 1 there to the last digit, and rounding makes u = 1 in the last of the stratified intervals."""
    sampler = get_time_sampler(Config(time_sampler=name, time_mean=-1.2, time_std=0.5))
    torch.testing.assert_close(sampler(torch.tensor([0.0, 1.0])), torch.tensor([0.001, 0.999]))
