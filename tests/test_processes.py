import math

import numpy as np
import pytest
import scipy.integrate
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import Config, SettingError
from networks import get_network
from prediction import LOSS_WEIGHTS
from processes import PROCESSES, GaussianProcess, LinearVP, VarianceExploding, check_process, get_process

T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
HALF_PI = math.pi / 2
BETA_MIN, BETA_MAX, SIGMA_MIN, SIGMA_MAX = 0.1, 20.0, 0.01, 80.0

each_process = pytest.mark.parametrize('name', PROCESSES)


def process_named(name):
    return get_process(
        Config(process_name=name, beta_min=BETA_MIN, beta_max=BETA_MAX, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    )


def central_difference(fn, t, h=1e-6):
    return (fn(t + h) - fn(t - h)) / (2 * h)


# name -> alpha, sigma, f, g^2, as functions of a float
CLOSED_FORMS = {
    'rf': (lambda t: 1 - t, lambda t: t, lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
    'cosine': (
        lambda t: math.cos(HALF_PI * t),
        lambda t: math.sin(HALF_PI * t),
        lambda t: -HALF_PI * math.tan(HALF_PI * t),
        lambda t: math.pi * math.tan(HALF_PI * t),
    ),
    'linear_vp': (
        lambda t: math.exp(-(BETA_MIN * t + 19.9 * t * t / 2) / 2),
        lambda t: math.sqrt(1 - math.exp(-(BETA_MIN * t + 19.9 * t * t / 2))),
        lambda t: -(BETA_MIN + 19.9 * t) / 2,
        lambda t: BETA_MIN + 19.9 * t,
    ),
    've': (
        lambda t: 1.0,
        lambda t: SIGMA_MIN ** (1 - t) * SIGMA_MAX**t,
        lambda t: 0.0,
        lambda t: 2 * math.log(SIGMA_MAX / SIGMA_MIN) * (SIGMA_MIN ** (1 - t) * SIGMA_MAX**t) ** 2,
    ),
}


@pytest.mark.parametrize('name', CLOSED_FORMS)
def test_closed_forms(name):
    c = process_named(name)(T)
    for given, closed_form in zip((c.alpha, c.sigma, c.f, c.g.square()), CLOSED_FORMS[name], strict=True):
        np.testing.assert_allclose(given, [closed_form(t) for t in T.tolist()], rtol=1e-9, atol=1e-12)


@each_process
def test_derivatives_agree_with_forward_mode_and_central_differences(name):
    process = process_named(name)
    for fn, dot in (('alpha', 'alpha_dot'), ('sigma', 'sigma_dot')):
        closed_form = getattr(process, dot)(T)
        torch.testing.assert_close(closed_form, getattr(GaussianProcess, dot)(process, T), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(closed_form, central_difference(getattr(process, fn), T), rtol=1e-6, atol=1e-8)


@each_process
def test_f_and_g_solve_the_moment_equations(name):
    """The mean of dx = f x dt + g dw from a fixed x0 grows at rate f, its variance at 2 f var + g^2."""
    process = process_named(name)
    c = process(T)
    mean_dot = central_difference(process.alpha, T)
    variance_dot = central_difference(lambda t: process.sigma(t).square(), T)
    torch.testing.assert_close(c.f * process.alpha(T), mean_dot, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(2 * c.f * process.sigma(T).square() + c.g.square(), variance_dot, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(c.g.square() / 2, c.delta)


@each_process
def test_log_snr_falls_and_is_log_of_the_ratio(name):
    process = process_named(name)
    log_snr = process.log_snr(T)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr.exp(), (process.alpha(T) / process.sigma(T)).square(), rtol=1e-10, atol=0)


@each_process
def test_time_of_log_snr_inverts_log_snr(name):
    process = process_named(name)
    log_snr = process.log_snr(T)
    torch.testing.assert_close(process.time_of_log_snr(log_snr), T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(GaussianProcess.time_of_log_snr(process, log_snr), T, rtol=1e-8, atol=1e-10)


@each_process
def test_time_of_log_snr_stops_at_the_ends(name):
    """This is for log-SNRs that no t in [0, 1] has; rf and cosine only approach their ends."""
    process = process_named(name)
    beyond = torch.tensor([math.inf, 200.0, -200.0, -math.inf], dtype=torch.float64)
    ends = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(GaussianProcess.time_of_log_snr(process, beyond), ends)
    torch.testing.assert_close(process.time_of_log_snr(beyond), ends)


@each_process
def test_float32_is_kept_and_accurate(name):
    t = torch.cat([torch.tensor([1e-4, 1e-3]), T.float()])
    process = process_named(name)
    single, double = process(t), process(t.double())
    for coefficient in ('alpha', 'sigma', 'alpha_dot', 'sigma_dot', 'f', 'delta', 'g', 'log_snr'):
        value = getattr(single, coefficient)
        assert value.dtype == torch.float32 and value.shape == t.shape
        torch.testing.assert_close(value.double(), getattr(double, coefficient), rtol=1e-4, atol=1e-5)


class Transcribed(GaussianProcess):
    """Another process as a user would write it: alpha and sigma, and no other closed forms."""

    def __init__(self, process):
        self.process = process

    def alpha(self, t):
        return self.process.alpha(t)

    def sigma(self, t):
        return self.process.sigma(t)


ALL_TIMES = torch.cat(
    [10.0 ** -torch.linspace(1, 8, 100, dtype=torch.float64), T, 1 - 10.0 ** -torch.linspace(2, 6, 50)]
)


@each_process
def test_time_of_log_snr_without_a_closed_form(name):
    """Right to a millionth of t where log-SNR changes by more than 1e-4 per factor e in t; else it hardly tells t."""
    process = Transcribed(process_named(name))
    log_snr = process.log_snr(ALL_TIMES)
    slope = central_difference(lambda x: process.log_snr(x.exp()), ALL_TIMES.log()).abs()
    there = slope > 1e-4
    assert there.sum() > 120
    error = (process.time_of_log_snr(log_snr) - ALL_TIMES).abs() / ALL_TIMES
    assert error[there].max() < 1e-6
    single = process.time_of_log_snr(log_snr.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single[100:149], T.float(), rtol=1e-5, atol=1e-6)


@each_process
def test_time_of_log_snr_at_the_ends_without_a_closed_form(name):
    process = Transcribed(process_named(name))
    ends = process.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    beyond = torch.tensor([math.inf, 1e5, 200.0, -200.0, -1e5, -math.inf], dtype=torch.float64)
    assert process.time_of_log_snr(beyond).tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(process.time_of_log_snr(ends), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert process.time_of_log_snr(beyond[:1] * math.nan).isnan()


def test_time_of_log_snr_where_rounding_spoils_the_ends():
    """sigma = sqrt(1 - alpha^2) of an alpha that rounds to a little more than 1, and is 0 before t = 1."""

    class Rounded(GaussianProcess):
        def alpha(self, t):
            return (torch.cos(HALF_PI * t) - 1e-9).clamp(min=0) * (1 + 2e-9)

        def sigma(self, t):
            return (1 - self.alpha(t).square()).sqrt()

    assert Rounded().log_snr(torch.tensor([1e-6], dtype=torch.float64)).isnan()
    torch.testing.assert_close(Rounded().time_of_log_snr(Rounded().log_snr(T)), T, rtol=1e-6, atol=1e-9)
    ends = Rounded().time_of_log_snr(torch.tensor([1e5, -1e5], dtype=torch.float64))
    assert ends.tolist() == [0, 1]


def test_time_of_log_snr_of_any_shape():
    log_snr = torch.tensor([[1.0, 0.0], [-3.0, 2.0]])
    process = Transcribed(process_named('rf'))
    torch.testing.assert_close(process.time_of_log_snr(log_snr), torch.sigmoid(-log_snr / 2))
    torch.testing.assert_close(process.time_of_log_snr(log_snr[0, 0]), torch.sigmoid(-log_snr[0, 0] / 2))


def test_time_of_log_snr_follows_parameters_that_change():
    """Numbers, and tensors that are learned in place."""
    process = Transcribed(VarianceExploding(0.01, 80.0))
    log_snr = process.log_snr(T)
    torch.testing.assert_close(process.time_of_log_snr(log_snr), T)
    process.process.sigma_min = torch.tensor(0.5, requires_grad=True)
    torch.testing.assert_close(process.time_of_log_snr(process.log_snr(T).detach()), T)
    with torch.no_grad():
        process.process.sigma_min.mul_(3)
    assert not process.time_of_log_snr(process.log_snr(T)).requires_grad
    torch.testing.assert_close(process.time_of_log_snr(process.log_snr(T).detach()), T)


def test_time_of_log_snr_is_few_kernels():
    """Each costs a GPU launch, in every shard of every step with log-normal times; bisection took 700 of them."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.number += 1
            return func(*args, **(kwargs or {}))

    with Count():
        Transcribed(process_named('rf')).time_of_log_snr(torch.zeros(16))
    assert Count.number < 80


class Power(GaussianProcess):
    """The only methods that a new process needs."""

    def alpha(self, t):
        return 1 - t**2

    def sigma(self, t):
        return t**3


class Constant(Power):
    def alpha(self, t):
        return torch.ones_like(t)


@pytest.mark.parametrize('grad', [True, False])
def test_new_process_needs_only_alpha_and_sigma(grad):
    with torch.set_grad_enabled(grad):
        c = Power()(T)
        torch.testing.assert_close(c.alpha_dot, -2 * T)
        torch.testing.assert_close(c.sigma_dot, 3 * T**2)
        torch.testing.assert_close(Power().time_of_log_snr(2 * torch.log((1 - T**2) / T**3)), T)
        assert Constant()(T).alpha_dot.eq(0).all()


def test_new_process_can_be_differentiated_as_a_whole():
    """A loss may contain the derivative along t of a prediction that is converted to another type."""
    t = T.clone()
    _, second = torch.func.jvp(lambda t: Power()(t).sigma_dot, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(second, 6 * T)


def test_new_process_takes_an_expanded_time():
    """The sampler passes such times: one number for the whole batch."""
    c = Power()(torch.tensor([0.5]).expand(4))
    torch.testing.assert_close(c.sigma_dot, torch.full((4,), 0.75))


@pytest.mark.parametrize(('beta_min', 'beta_max'), [(0.1, 20.0), (0.0, 3.0), (2.0, 2.0)])
def test_linear_vp_against_the_integral_of_beta(beta_min, beta_max):
    process = LinearVP(beta_min, beta_max)
    integral = [scipy.integrate.quad(lambda s: beta_min + (beta_max - beta_min) * s, 0, t)[0] for t in T.tolist()]
    np.testing.assert_allclose(process.alpha(T), np.exp(-np.array(integral) / 2), rtol=1e-12)
    torch.testing.assert_close(process.alpha(T).square() + process.sigma(T).square(), torch.ones_like(T))
    torch.testing.assert_close(process.time_of_log_snr(process.log_snr(T)), T, rtol=1e-8, atol=1e-10)


def test_ve_runs_from_sigma_min_to_sigma_max():
    ends = VarianceExploding(0.02, 50.0).sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends, [0.02, 50.0])


@each_process
def test_compute_xt_weighs_each_image_by_its_own_time(name):
    process = process_named(name)
    t = torch.tensor([0.2, 0.5, 0.9])
    x0, x1 = torch.randn(2, 3, 2, 4, 5)
    xt = process.compute_xt(x0, x1, process(t))
    for i in range(3):
        alpha, sigma = process.alpha(t[i : i + 1]).item(), process.sigma(t[i : i + 1]).item()
        torch.testing.assert_close(xt[i], alpha * x0[i] + sigma * x1[i])


@each_process
def test_base_sample_is_standard_normal(name):
    torch.manual_seed(0)
    x1 = process_named(name).sample_base(torch.zeros(100, 3, 10, 10, dtype=torch.float64))
    assert x1.shape == (100, 3, 10, 10) and x1.dtype == torch.float64
    assert abs(x1.mean()) < 0.03 and abs(x1.std() - 1) < 0.03


def test_settings_reach_the_process():
    one = torch.ones(1, dtype=torch.float64)
    assert get_process(Config(process_name='ve', sigma_max=7.0)).sigma(one).item() == pytest.approx(7)
    assert get_process(Config(process_name='linear_vp', beta_min=1.0, beta_max=3.0)).alpha(one).item() == pytest.approx(
        math.exp(-1)
    )


def test_unknown_process_lists_the_choices():
    with pytest.raises(SettingError, match='linear_vp'):
        get_process(Config(process_name='linear'))


class Given(GaussianProcess):
    def __init__(self, alpha, sigma):
        self.alpha, self.sigma = alpha, sigma


@pytest.mark.parametrize(
    ('alpha', 'sigma', 'words'),
    [
        (lambda t: t, lambda t: 1 - t, 'alpha / sigma does not fall at t=0.001.*write 1 - t for t'),  # data at t = 1
        (lambda t: 0.8 * (1 - t), lambda t: t, 'alpha.0. is 0.8.*scale the data in encode'),
        (lambda t: 1 - 2 * t, lambda t: t, r'alpha of the process Given must be finite.*-0.0311875 at t=0.515594'),
        (lambda t: 1 - t, lambda t: (0.5 - t).sqrt(), 'sigma of the process Given must be finite.*nan at t=0.515594'),
        (lambda t: 1.0, lambda t: t, 'alpha of the process Given must give a tensor'),
        (lambda t: 1 - t, lambda t: t.mean(), 'sigma of the process Given must give a tensor'),
        (lambda t: 1 - t, lambda t: (1 - t) * (0.5 - (t - 0.5).abs()), 'does not fall at t=0.5'),
    ],
)
def test_a_process_that_does_not_lead_from_data_to_noise_is_refused(alpha, sigma, words):
    with pytest.raises(SettingError, match=words):
        check_process(Given(alpha, sigma), 0.001, 0.999)


@each_process
@pytest.mark.parametrize('ends', [(0.0, 1.0), (0.001, 0.999), (0.3, 0.7)])
def test_every_process_of_the_table_leads_from_data_to_noise(name, ends):
    check_process(process_named(name), *ends)


def test_the_cosine_ends_at_nothing_of_the_data_in_both_types():
    """cos(pi / 2) is -4e-8 in float32, so that log-SNR and min_snr were nan at t = 1."""
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([0.0, 0.25, 1.0], dtype=dtype)
        coefs = PROCESSES['cosine'](Config())(t)
        assert coefs.alpha[2] == 0 and coefs.alpha[0] == 1
        torch.testing.assert_close(coefs.alpha, torch.cos(math.pi / 2 * t), rtol=1e-6, atol=1e-7)
        assert LOSS_WEIGHTS['min_snr'](coefs)[2] == 0


def test_a_process_is_checked_in_float32_too():
    class Own(GaussianProcess):
        def alpha(self, t):
            return torch.cos(math.pi / 2 * t)

        def sigma(self, t):
            return torch.sin(math.pi / 2 * t)

    check_process(Own(), 0.001, 0.999)
    with pytest.raises(SettingError, match=r'alpha of the process Own .*e-08 at t=1 in float32\. Use .*--t_max'):
        check_process(Own(), 0.001, 1.0)


def test_the_time_that_a_network_sees_is_finite_in_float32():
    with pytest.raises(SettingError, match=r"time_input='log_snr' is infinite at .*t_max=1"):
        get_network(Config(process_name='cosine', t_max=1.0, time_input='log_snr', model_type='v'), (1, 8, 8), 10)
