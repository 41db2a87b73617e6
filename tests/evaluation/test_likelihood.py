"""log p(x0) under mixtures of Gaussians, against their exact densities."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from config import Config, SettingError
from evaluation.likelihood import METHODS, PROBES, bits_per_dim, dequantize, gradients, log_likelihood
from prediction import ROWS
from processes import PROCESSES, Coefs, get_process
from solvers import SOLVERS
from tests.oracle import F64, RING, GivenMean, base_noise, random_mixture

each_process = pytest.mark.parametrize('process_name', PROCESSES)


def process_named(name):
    return get_process(Config(process_name=name, sigma_min=0.001))


def case(dim, n, classes=2):
    mixture = random_mixture(dim, 5, seed=dim, smallest=0.1, classes=classes)
    x0, label = mixture.sample(n, torch.Generator().manual_seed(1))
    clean = Coefs(*(torch.full((n,), value, dtype=F64) for value in (1.0, 0.0, 0.0, 0.0)))
    return mixture, x0, label, lambda label=None: mixture.log_prob(x0, clean, label)


@pytest.mark.parametrize(
    ('process_name', 'dim'), [*itertools.product(PROCESSES, [2, 16]), pytest.param('rf', 64, marks=pytest.mark.slow)]
)
def test_exact_divergence(process_name, dim):
    """Within 1e-3 nats per dimension, for every point."""
    mixture, x0, _, exact = case(dim, 20)
    process = process_named(process_name)
    t_min = process.time_of_log_snr(
        torch.tensor([2 * math.log(1000)], dtype=F64)
    ).item()  # sigma is small compared with the narrowest mode, 0.1
    result = log_likelihood(
        mixture.as_model('velocity', process), process, x0, divergence='exact', tolerance=1e-6, t_min=t_min
    )
    assert ((result.log_prob - exact()) / dim).abs().max() < 1e-3
    assert (result.standard_error == 0).all() and 20 < result.nfe < 1000


@pytest.mark.parametrize('dim', [2, 16, 64])
@pytest.mark.parametrize('divergence', [name for name in PROBES if name != 'exact'])
def test_hutchinson_is_unbiased_and_knows_its_error(dim, divergence):
    """Deviations from the exact density agree with the reported standard error."""
    torch.manual_seed(0)
    mixture, x0, _, exact = case(dim, 200)
    process = process_named('cosine')
    result = log_likelihood(mixture.as_model('velocity', process), process, x0, divergence=divergence, num_probes=16)
    z = (result.log_prob - exact()) / result.standard_error
    assert 0.8 < z.std() < 1.4  # Student's t with 16 probes: 1.07
    mean_error = result.standard_error.square().mean().sqrt() / math.sqrt(200)
    assert abs((result.log_prob - exact()).mean()) < 4 * mean_error


def test_more_probes_have_less_error():
    torch.manual_seed(0)
    mixture, x0, _, _ = case(16, 50)
    process = process_named('rf')
    few, many = (
        log_likelihood(mixture.as_model('velocity', process), process, x0, num_probes=n).standard_error.mean()
        for n in (4, 64)
    )
    assert many / few == pytest.approx(1 / 4, rel=0.25)
    assert (
        log_likelihood(mixture.as_model('velocity', process), process, x0[:2], num_probes=1)
        .standard_error.isnan()
        .all()
    )


@pytest.mark.parametrize('solver', METHODS)
def test_every_method(solver):
    mixture, x0, _, exact = case(2, 20)
    process = process_named('rf')
    steps = {'euler': 2000, 'midpoint': 200}.get(solver, 50)
    result = log_likelihood(
        mixture.as_model('velocity', process), process, x0, divergence='exact', solver=solver, num_steps=steps
    )
    assert (result.log_prob - exact()).abs().max() < (0.02 if solver == 'euler' else 2e-3)
    if solver != 'dopri5':
        assert result.nfe == steps * SOLVERS[solver].nfe + 1


@pytest.mark.parametrize(('process_name', 'dim'), [('rf', 2), ('cosine', 16), ('linear_vp', 2), ('ve', 16)])
def test_the_default_is_as_exact_as_small_steps_with_a_tenth_of_them(dim, process_name):
    """Within 5e-4 nats per dimension on average, with 33 evaluations; also for images."""
    mixture, x0, _, exact = case(dim, 20)
    process = process_named(process_name)
    model_fn = mixture.as_model('velocity', process)
    settings = dict(divergence='exact', t_min=process.time_of_log_snr(torch.tensor([13.8], dtype=F64)).item())
    result = log_likelihood(model_fn, process, x0, **settings)
    assert result.nfe == 33 and ((result.log_prob - exact()) / dim).abs().mean() < 5e-4
    many = log_likelihood(model_fn, process, x0, num_steps=330, **settings).log_prob
    fine = log_likelihood(model_fn, process, x0, tolerance=1e-9, **settings).log_prob
    assert ((many - fine) / dim).abs().max() < 1e-6

    def of_images(xt, t, label):
        return model_fn(xt.flatten(1), t, label).reshape(xt.shape)

    images = log_likelihood(of_images, process, x0.reshape(20, 1, 2, dim // 2), **settings)
    torch.testing.assert_close(images.log_prob, result.log_prob)


def test_a_tolerance_is_for_adaptive_steps():
    refused('tolerance=0.001.*dopri5', solver='adams', tolerance=1e-3)
    refused('tolerance=0.*dopri5', solver='rk4', tolerance=0.0)


def test_adaptive_steps_never_look_beyond_the_ends():
    process, seen = process_named('rf'), []
    model_fn = RING.as_model('velocity', process)

    def watched(xt, t, label):
        seen.append(t[0].item())
        return model_fn(xt, t, label)

    log_likelihood(watched, process, base_noise(3), solver='dopri5', tolerance=1e-3)
    assert min(seen) >= 0.001 - 1e-6 and max(seen) <= 0.999 + 1e-6


@pytest.mark.parametrize('model_type', ROWS)
def test_every_output_gives_the_same(model_type):
    mixture, x0, _, exact = case(2, 10)
    process = process_named('cosine')
    result = log_likelihood(
        mixture.as_model(model_type, process), process, x0, model_type=model_type, divergence='exact'
    )
    torch.testing.assert_close(result.log_prob, exact(), rtol=0, atol=2e-3)


def test_the_density_of_a_class():
    mixture, x0, label, exact = case(2, 20)
    process = process_named('rf')
    for asked in (label, 1 - label, torch.full_like(label, 2)):
        result = log_likelihood(
            mixture.as_model('velocity', process), process, x0, asked, divergence='exact', tolerance=1e-7
        )
        torch.testing.assert_close(result.log_prob, exact(asked), rtol=0, atol=2e-3)


def test_given_a_condition():
    """x0 ~ N(mean, 0.3^2) given the mean, N(0, 0.3^2 + 0.8^2) where it is unknown; also for single numbers, (B,)."""
    data, process = GivenMean(0.3, 0.8), process_named('rf')
    mean = 0.8 * base_noise(20, 2)
    x0 = mean + 0.3 * base_noise(40, 2)[20:]
    for asked, exact in (
        (mean, Normal(mean, 0.3)),
        (torch.full_like(mean, torch.nan), Normal(torch.zeros_like(mean), math.hypot(0.3, 0.8))),
    ):
        settings = dict(divergence='exact', tolerance=1e-7)
        model_fn = data.as_model('velocity', process)
        result = log_likelihood(model_fn, process, x0, cond={'mean': asked}, **settings)
        torch.testing.assert_close(result.log_prob, exact.log_prob(x0).sum(1), rtol=0, atol=2e-3)

        def of_numbers(xt, t, label, mean, model_fn=model_fn):
            return model_fn(xt[:, None], t, label, mean=mean[:, None])[:, 0]

        numbers = log_likelihood(of_numbers, process, x0[:, 0], cond={'mean': asked[:, 0]}, **settings)
        torch.testing.assert_close(numbers.log_prob, exact.log_prob(x0)[:, 0], rtol=0, atol=1e-3)


def test_conditions_of_another_batch_are_refused():
    refused(r"cond\['ink'\] is shape \(3,\).*2 items", cond={'ink': torch.zeros(3)})


def test_images():
    """(B, C, H, W), float32, and a network for a single Gaussian, of any shape."""
    process = process_named('rf')

    def model_fn(xt, t, label):  # velocity of N(0, 0.25)
        alpha, sigma = (1 - t)[:, None, None, None], t[:, None, None, None]
        return (sigma - 0.25 * alpha) / (0.25 * alpha**2 + sigma**2) * xt

    torch.manual_seed(0)
    x0 = torch.randn(8, 3, 4, 2) / 2
    result = log_likelihood(model_fn, process, x0, num_probes=2)  # the Jacobian is diagonal, so rademacher is exact
    expected = Normal(0, 0.5).log_prob(x0).flatten(1).sum(1)
    torch.testing.assert_close(result.log_prob, expected, rtol=1e-3, atol=1e-2)
    assert result.log_prob.dtype == torch.float32 and (result.standard_error < 1e-3).all()
    assert not result.log_prob.requires_grad


def test_bits_per_dim():
    """Equally likely grey levels cost 8 bits, and dequantized images fill [-1, 1]."""
    torch.manual_seed(0)
    uniform = torch.full((5,), -math.log(2) * 12)  # the density 1/2 on [-1, 1] for each of 12 numbers
    torch.testing.assert_close(bits_per_dim(uniform, (3, 2, 2)), torch.full((5,), 8.0))
    torch.testing.assert_close(bits_per_dim(uniform, (3, 2, 2), levels=17), torch.full((5,), math.log2(17)))
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    x = dequantize(images)
    assert x.min() >= -1 and x.max() < 1
    assert (((x + 1) * 128).floor() == images).all()
    inside = ((x + 1) * 128) % 1
    assert abs(inside.mean() - 0.5) < 0.01 and abs(inside.var() - 1 / 12) < 0.002


def refused(match, **settings):
    with pytest.raises(SettingError, match=match):
        log_likelihood(lambda xt, t, label: xt, process_named('rf'), torch.zeros(2, 1, 2, 2), **settings)


@pytest.mark.parametrize('solver', [name for name, solver in SOLVERS.items() if solver.stochastic])
def test_stochastic_solver_is_refused(solver):
    refused(f'solver={solver!r} draws noise.*dopri5', solver=solver)


def test_guided_model_is_refused():
    refused('guidance_scale=2.*guidance_scale=1', guidance_scale=2.0)


@pytest.mark.parametrize('setting', ['solver', 'divergence', 'time_grid', 'model_type'])
def test_unknown_choice_lists_the_choices(setting):
    refused(f"{setting}='nonsense'.*Choose one of", **{setting: 'nonsense'})


def test_integers_are_refused():
    with pytest.raises(SettingError, match=r'uint8.*dequantize'):
        log_likelihood(lambda xt, t, label: xt, process_named('rf'), torch.zeros(2, 1, 2, 2, dtype=torch.uint8))


def test_no_probes_are_refused():
    refused('num_probes=0.*at least 1', num_probes=0)
    refused('num_steps=0.*at least 1', num_steps=0)


def test_singular_end_is_refused():
    refused("'x1' cannot give the velocity at t=1", model_type='x1', t_max=1.0)


class Squared(torch.autograd.Function):
    """A custom operation without a vmap rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize('square', [torch.square, Squared.apply])
def test_gradients_of_several_vectors_equal_each_by_itself(square):
    """The gradient of sum(e y), y = A x^2, is 2 x (A^T e)."""
    x, a = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    y, vectors = square(x) @ a.T, torch.randn(37, 3, 5, dtype=torch.float64)
    assert torch.allclose(gradients(y, x, vectors, at_once=10), 2 * x * (vectors @ a))
