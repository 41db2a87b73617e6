"""The oracle itself, against torch.distributions, quadrature and the continuity equation.

It then tests the properties that any process of a user must have.
"""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from config import Config
from prediction import ROWS, get_model_convert_fn, optimal_denoiser
from processes import Coefs, get_process
from tests.oracle import ALL_PROCESSES, F64, GaussianMixture, process_named, random_mixture, ring

each_process = pytest.mark.parametrize('process_name', ALL_PROCESSES)
MIXTURE = random_mixture(3, 4, seed=2, classes=3)
T = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=F64)


def case(process_name, n=40):
    process = process_named(process_name)
    g = torch.Generator().manual_seed(0)
    x0, label = MIXTURE.sample(n, g)
    t = T.repeat(n // len(T))
    coefs = process(t)
    return process, t, coefs, process.compute_xt(x0, torch.randn(n, 3, dtype=F64, generator=g), coefs), label


@each_process
def test_log_prob_equals_a_mixture_of_normals(process_name):
    _process, _t, c, xt, _label = case(process_name)
    covariances = MIXTURE.vectors @ torch.diag_embed(MIXTURE.values) @ MIXTURE.vectors.mT
    for i in range(5):
        alpha, sigma = c.alpha[i], c.sigma[i]
        parts = MultivariateNormal(alpha * MIXTURE.means, alpha**2 * covariances + sigma**2 * torch.eye(3, dtype=F64))
        expected = MixtureSameFamily(Categorical(logits=MIXTURE.log_weights), parts).log_prob(xt[i])
        torch.testing.assert_close(MIXTURE.log_prob(xt, c)[i], expected)


@each_process
def test_score_is_the_gradient_of_log_prob(process_name):
    _process, _t, c, xt, label = case(process_name)
    for asked in (None, label, torch.full_like(label, 3)):
        x = xt.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(MIXTURE.log_prob(x, c, asked).sum(), x)
        torch.testing.assert_close(MIXTURE.prediction(xt, c, asked).score, gradient, rtol=1e-8, atol=1e-8)


def test_expectations_against_quadrature():
    """In one dimension E[x0 | xt] is an integral over x0."""
    mixture = GaussianMixture(
        torch.tensor([[-0.7], [0.4]]), torch.tensor([[[0.04]], [[0.01]]]), weights=torch.tensor([0.3, 0.7])
    )
    x0 = torch.linspace(-4, 4, 40001, dtype=F64)
    prior = 0.3 * Normal(-0.7, 0.2).log_prob(x0).exp() + 0.7 * Normal(0.4, 0.1).log_prob(x0).exp()
    c = get_process(Config())(torch.tensor([0.4], dtype=F64))
    for value in (-0.8, 0.0, 0.5):
        xt = torch.tensor([[value]], dtype=F64)
        posterior = prior * Normal(c.alpha * x0, c.sigma).log_prob(xt[0]).exp()
        expected = (posterior * x0).sum() / posterior.sum()
        torch.testing.assert_close(mixture.prediction(xt, c).x0[0, 0], expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            mixture.prediction(xt, c).x1[0, 0], ((xt[0, 0] - c.alpha * expected) / c.sigma)[0], rtol=1e-6, atol=1e-8
        )


@each_process
def test_continuity_equation(process_name):
    """d log p / dt = -div velocity - velocity . score: density and velocity of a process belong together."""
    process, t, c, xt, _ = case(process_name)
    h = 1e-5
    change = (MIXTURE.log_prob(xt, process(t + h)) - MIXTURE.log_prob(xt, process(t - h))) / (2 * h)
    x = xt.clone().requires_grad_()
    prediction = MIXTURE.prediction(x, c)
    divergence = sum(
        torch.autograd.grad(prediction.velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(3)
    )
    transport = (prediction.velocity * prediction.score).sum(1)
    torch.testing.assert_close(change, -(divergence + transport).detach(), rtol=1e-5, atol=1e-5)


@each_process
@pytest.mark.parametrize('model_type', ROWS)
def test_a_perfect_network_of_any_type_says_the_same(process_name, model_type):
    process, t, c, xt, label = case(process_name)
    truth = MIXTURE.prediction(xt, c, label)
    converted = get_model_convert_fn(model_type)(MIXTURE.as_model(model_type, process)(xt, t, label), t, xt, c)
    for name in ROWS:
        torch.testing.assert_close(getattr(converted, name), getattr(truth, name), rtol=1e-10, atol=1e-10)


def test_no_label_is_the_mean_over_classes():
    _process, _t, c, xt, _label = case('rf')
    classes = [torch.full((40,), k) for k in range(3)]
    weight = torch.stack([MIXTURE.log_weights[MIXTURE.labels == k].exp().sum() for k in range(3)])
    density = torch.stack([MIXTURE.log_prob(xt, c, k).exp() for k in classes])
    torch.testing.assert_close((weight[:, None] * density).sum(0), MIXTURE.log_prob(xt, c).exp())


def test_samples_have_the_moments_and_classes():
    mixture = ring(8, 0.1)
    x, label = mixture.sample(20000, torch.Generator().manual_seed(0))
    assert x.mean(0).abs().max() < 0.02 and (x.var(0) - (0.5 + 0.01)).abs().max() < 0.02
    assert (mixture.labels[torch.cdist(x, mixture.means).argmin(1)] == label).double().mean() > 0.999


# ---------------------------------------------------------------- the optimal denoiser: components of no width


@each_process
def test_optimal_denoiser_is_the_oracle_of_zero_width(process_name):
    data, labels = torch.randn(12, 1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64), torch.arange(12) % 3
    mixture = GaussianMixture(data.flatten(1), torch.zeros(12, 6, 6), labels)
    process = process_named(process_name)
    c = process(T[1:])
    xt = process.compute_xt(data[:4], torch.randn(4, 1, 3, 2, dtype=F64), c)
    denoise = optimal_denoiser(data, labels)
    for asked in (None, torch.tensor([0, 1, 2, 3])):
        expected = mixture.prediction(xt.flatten(1), c, asked).x0
        torch.testing.assert_close(denoise(xt, c, asked).flatten(1), expected, rtol=1e-8, atol=1e-10)


def test_no_loss_is_below_the_optimal_denoiser():
    """Any other denoiser has a larger mean square error over the data; without noise it returns the data."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(5, 1, 2, 2, generator=g)
    denoise, c = optimal_denoiser(data), Coefs(*(torch.full((50000,), v) for v in (0.6, 0.4, -1.0, 1.0)))
    x0 = data[torch.randint(5, (50000,), generator=g)]
    xt = 0.6 * x0 + 0.4 * torch.randn(x0.shape, generator=g)
    best = denoise(xt, c)
    assert best.dtype == torch.float32
    floor = (best - x0).square().mean()
    for other in (
        1.02 * best,
        0.98 * best,
        best + 0.02 * xt,
        best - 0.02 * xt,
        optimal_denoiser(data[:4])(xt, c),
        xt / 0.6,
    ):
        assert (other - x0).square().mean() > floor + 1e-6
    torch.testing.assert_close(denoise(0.6 * data, Coefs(*(torch.full((5,), v) for v in (0.6, 1e-4, -1.0, 1.0)))), data)
