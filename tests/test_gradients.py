"""Gradients through samples and likelihoods equal finite differences, and the score of a mixture."""

import pytest
import torch
from torch import nn

from config import Config, SettingError
from evaluation.likelihood import METHODS, log_likelihood
from networks import get_network
from sampling import sample
from solvers import SOLVERS, Solver
from solvers.one_step import euler
from tests.oracle import F64, RING, at, base_noise, process_named, random_mixture
from unet import sinusoid

LABEL = torch.arange(6) % 2
each_solver, each_method = (
    pytest.mark.parametrize('solver', [pytest.param(s, marks=[pytest.mark.slow] * (s == 'dopri5')) for s in solvers])
    for solvers in (SOLVERS, METHODS)
)
SMOOTH = random_mixture(6, 4, smallest=0.3, largest=0.6)


class Network(nn.Module):
    """The exact velocity of SMOOTH where `weight` is 1 and the condition 0."""

    def __init__(self, process):
        super().__init__()
        self.weight, self.exact = (
            nn.Parameter(torch.linspace(1, 1.2, 6, dtype=F64)),
            SMOOTH.as_model('velocity', process),
        )

    def forward(self, xt, t, label=None, *, push):
        return self.weight * self.exact(xt, t, label) + t[:, None] * push.sin()


def check(value_of, *inputs, tolerance=1e-6, reference=None):
    """The gradient of value_of() by each of `inputs` along a random direction, against a central difference of it, or
    of the `reference` of a solver whose steps are discontinuous."""
    gradients = torch.autograd.grad(value_of(), inputs)
    generator = torch.Generator().manual_seed(5)
    for x, gradient in zip(inputs, gradients, strict=True):
        direction, values = torch.randn(x.shape, dtype=F64, generator=generator), []
        for step in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                x += step * direction
            values.append((reference or value_of)().item())
        slope = (values[0] - values[1]) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=tolerance, abs=tolerance)
        assert abs(slope) > 1e-3


def inputs_of(n=6):
    x, push = base_noise(n, 6).requires_grad_(), 0.3 * base_noise(2 * n, 6)[n:]
    return x, push.requires_grad_(), torch.linspace(-1, 2, 6 * n, dtype=F64).reshape(n, 6)


GUIDED = dict(guidance_scale=2.0, null_label=2, null_cond={'push': 0.5})


@each_solver
@pytest.mark.parametrize('more', [{}, GUIDED, dict(GUIDED, guidance_rescale=0.7)], ids=['plain', 'guided', 'rescaled'])
def test_samples_by_noise_condition_and_weights(solver, more):
    """For stochastic solvers, with the same noise."""
    process = process_named('rf')
    network, (x1, push, along) = Network(process), inputs_of()

    own_steps = {'adams': 12, 'dopri5': 20}.get(solver, 4)  # adams: more than `few_steps`

    def value(solver=solver, steps=own_steps):
        torch.manual_seed(0)
        x = sample(network, process, x1, LABEL, cond={'push': push}, solver=solver, num_steps=steps, grad=True, **more)
        return (along * x).sum()

    adaptive = dict(reference=lambda: value('adams', 40), tolerance=1e-3) if solver == 'dopri5' else {}
    check(value, x1, push, network.weight, **adaptive)


def test_samples_on_the_path_of_another_process_from_a_late_start():
    process = process_named('linear_vp')
    network, (x1, push, along) = Network(process), inputs_of()
    for other in (None, process_named('ve')):
        settings = dict(cond={'push': push}, num_steps=5, t_max=1.0, sampling_process=other, grad=True)
        check(lambda settings=settings: (along * sample(network, process, x1, **settings)).sum(), x1, network.weight)


@pytest.mark.parametrize('solver', SOLVERS)
def test_the_default_is_bit_equal_and_has_no_gradient(solver):
    process = process_named('cosine')
    network, (x1, push, _) = Network(process), inputs_of()
    drawn = []
    for grad in (False, True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(not grad):  # `grad` wins
            drawn.append(sample(network, process, x1, cond={'push': push}, solver=solver, num_steps=4, grad=grad))
    assert torch.equal(*drawn) and [x.requires_grad for x in drawn] == [False, True]


def test_samples_of_one_number_can_be_rescaled():
    """They have no spread to rescale to: 0 / 0 must not reach the gradient."""
    x1 = torch.linspace(-1, 1, 5, dtype=F64)[:, None].requires_grad_()
    settings = dict(cond={'push': x1}, null_cond={'push': 0.0}, guidance_scale=2.0, guidance_rescale=0.5, grad=True)
    x = sample(lambda xt, t, label, push: xt.sin() + push, process_named('rf'), x1, **settings)
    assert torch.autograd.grad(x.sum(), x1)[0].isfinite().all()


def test_samples_without_a_gradient_are_refused_with_the_solver_s_name(monkeypatch):
    process, x1 = process_named('rf'), base_noise(3)
    monkeypatch.setitem(SOLVERS, 'fixed', Solver(torch.no_grad()(euler), nfe=1, order=1))
    for solver, x in (('fixed', x1.clone().requires_grad_()), ('heun', x1)):
        with pytest.raises(SettingError, match=f"grad=True: samples of solver='{solver}' have no gradient"):
            sample(RING.as_model('velocity', process), process, x, solver=solver, grad=True)


def test_draw_of_a_trainer_passes_it_on(tiny_config, build_trainer):
    """Also within a hook, under torch.no_grad; weights and noise get a gradient, and the network stays in its mode."""
    trainer = build_trainer(tiny_config())
    model_fn, inputs = trainer.get_model_fn(trainer.network, train=False), trainer.sample_inputs(2)
    trainer.network.train()
    with torch.no_grad():
        x = trainer.draw(model_fn, inputs, 'adams', num_steps=3, grad=True)
    with torch.no_grad():
        assert torch.equal(x, trainer.draw(model_fn, inputs, 'adams', num_steps=3))
    weights = list(trainer.network.parameters())
    found = torch.autograd.grad(x.sum(), weights, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in found) > 0 and not x.isnan().any()


# ---------------------------------------------------------------- likelihood


@each_method
@pytest.mark.parametrize('divergence', ['exact', 'rademacher'])
def test_log_prob_by_data_condition_and_weights(solver, divergence):
    process = process_named('rf')
    network, (x0, push, along) = Network(process), inputs_of()
    settings = dict(cond={'push': push}, divergence=divergence, num_probes=2, grad=True)

    def value(solver=solver, steps=4):
        torch.manual_seed(0)
        result = log_likelihood(network, process, x0, LABEL, solver=solver, num_steps=steps, **settings)
        assert not result.standard_error.requires_grad
        return (along[:, 0] * result.log_prob).sum()

    adaptive = dict(reference=lambda: value('adams', 40), tolerance=1e-3) if solver == 'dopri5' else {}
    check(value, x0, push, network.weight, **adaptive)


@pytest.mark.parametrize('solver', ['adams', 'dopri5'])
def test_the_gradient_by_data_is_the_score(solver):
    """d log p / dx0 of the exact flow of RING, alpha times the score at t_min."""
    process, x0 = process_named('rf'), (0.9 * RING.means + 0.1 * base_noise(8)).requires_grad_()
    settings = dict(divergence='exact', t_min=0.01, grad=True, solver=solver, num_steps=64)
    result = log_likelihood(RING.as_model('velocity', process), process, x0, **settings)
    (found,) = torch.autograd.grad(result.log_prob.sum(), x0)
    c = at(process, 0.01, 8)
    expected = c.alpha[:, None] * RING.prediction(c.alpha[:, None] * x0, c).score
    torch.testing.assert_close(found, expected.detach(), rtol=0.01, atol=0.05)


def test_the_default_likelihood_is_bit_equal_and_has_no_gradient():
    process = process_named('rf')
    network, (x0, push, _) = Network(process), inputs_of()
    for divergence in ('exact', 'gaussian'):
        found = []
        for grad in (False, True):
            torch.manual_seed(0)
            settings = dict(cond={'push': push}, divergence=divergence, num_steps=6, grad=grad)
            with torch.set_grad_enabled(not grad):
                found.append(log_likelihood(network, process, x0, **settings).log_prob)
        assert torch.equal(*found) and [x.requires_grad for x in found] == [False, True]


@pytest.mark.parametrize(
    'settings',
    [
        dict(network='unet', channels=32, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(4,)),
        dict(network='dit', dit_patch=2, dit_width=16, dit_heads=2, dit_depth=1),
    ],
    ids=lambda settings: settings['network'],
)
@pytest.mark.parametrize('probes', [1, 2])
def test_log_prob_through_attention(settings, probes, monkeypatch):
    """Fused attention has no second derivative."""
    torch.manual_seed(0)
    config = Config(**settings)
    network = get_network(config, (1, 4, 4), 2)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    x0, process = torch.randn(2, 1, 4, 4, dtype=F64).requires_grad_(), process_named('rf')
    monkeypatch.setattr('unet.sinusoid', lambda *args: sinusoid(*args).double())
    network.double()
    weight = max(network.parameters(), key=lambda p: p.numel())

    def value():
        torch.manual_seed(0)
        result = log_likelihood(network, process, x0, LABEL[:2], num_steps=2, num_probes=probes, grad=True)
        return result.log_prob.sum()

    check(value, x0, weight, tolerance=1e-5)
