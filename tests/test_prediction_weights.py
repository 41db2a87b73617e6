"""Loss weights against their papers, and triples (output, target, weight) that are the same loss."""

import pytest
import torch
from torch import nn

from config import Config, SettingError
from networks import ScaledNetwork
from prediction import LOSS_WEIGHTS, ROWS, get_loss_weight, get_model_convert_fn, get_target_fn
from processes import PROCESSES, get_process
from time_samplers import get_time_sampler
from trainer import ProcessedBatch

T = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
each_process = pytest.mark.parametrize('process_name', PROCESSES)
each_weight = pytest.mark.parametrize('name', LOSS_WEIGHTS)


def process_named(name):
    return get_process(Config(process_name=name))


def losses(process, model_type, target_type, weight):
    """(5,) weighted squared errors of a wrong network that knows x0 but for the same error, whatever it outputs."""
    g = torch.Generator().manual_seed(0)
    x0, x1, mistake = torch.randn(3, 5, 1, 4, 4, generator=g, dtype=torch.float64)
    c = process(T)
    xt = process.compute_xt(x0, x1, c)
    out = getattr(get_model_convert_fn('x0')(x0 + 0.1 * mistake, T, xt, c), model_type)
    guess, truth = get_model_convert_fn(model_type)(out, T, xt, c), get_target_fn()(T, xt, x0, x1, c)
    error = (getattr(guess, target_type) - getattr(truth, target_type)).square().flatten(1).mean(1)
    return weight(c) * error


def snr(c):
    return (c.alpha / c.sigma).square()


# Each line is one loss.
SAME = {
    'EDM': [('F', LOSS_WEIGHTS['none']), ('x0', LOSS_WEIGHTS['edm'])],
    'noise': [('x1', LOSS_WEIGHTS['none']), ('x0', snr), ('score', lambda c: c.sigma.square())],
    'ELBO': [
        ('x1', LOSS_WEIGHTS['elbo']),
        ('x0', lambda c: snr(c) * LOSS_WEIGHTS['elbo'](c)),
        ('score', lambda c: c.g.square() / 2),
    ],
    'sigmoid': [
        ('x1', LOSS_WEIGHTS['sigmoid']),
        ('x1', lambda c: LOSS_WEIGHTS['elbo'](c) / (1 + snr(c) * torch.e**-2)),
    ],
    'min-SNR': [('x0', LOSS_WEIGHTS['min_snr']), ('x1', lambda c: (5 / snr(c)).clamp(max=1))],
    'flow': [('velocity', LOSS_WEIGHTS['none']), ('x1', lambda c: (c.sigma_dot - c.f * c.sigma).square())],
}


@each_process
@pytest.mark.parametrize('model_type', ROWS)
@pytest.mark.parametrize('loss', SAME)
def test_same_loss(process_name, model_type, loss):
    process = process_named(process_name)
    values = [losses(process, model_type, target, weight) for target, weight in SAME[loss]]
    reference = losses(process, 'x0', *SAME[loss][0])
    for value in values:
        torch.testing.assert_close(value, reference, rtol=1e-7, atol=0)


@pytest.mark.parametrize('process_name', ['cosine', 'linear_vp'])
def test_v_is_snr_plus_1_where_variance_is_preserved(process_name):
    process = process_named(process_name)
    torch.testing.assert_close(
        losses(process, 'x0', 'v', LOSS_WEIGHTS['none']),
        losses(process, 'x0', 'x0', lambda c: snr(c) + 1),
        rtol=1e-7,
        atol=0,
    )


def test_no_other_pair_is_the_same_loss():
    """This searches all targets and weights, with a process without symmetries."""
    process = process_named('linear_vp')
    values = {
        (target, name): losses(process, 'x0', target, weight)
        for target in ROWS
        for name, weight in LOSS_WEIGHTS.items()
    }
    same = {(a, b) for a in values for b in values if a < b and torch.allclose(values[a], values[b], rtol=1e-6, atol=0)}
    assert same == {(('F', 'none'), ('x0', 'edm'))}


@each_process
@each_weight
def test_weights_are_positive_finite_and_one_per_image(process_name, name):
    w = LOSS_WEIGHTS[name](process_named(process_name)(torch.tensor([0.001, 0.3, 0.999])))
    assert w.shape == (3,) and w.isfinite().all() and (w > 0).all()


@each_process
def test_elbo_is_half_the_fall_of_the_log_snr(process_name):
    process = process_named(process_name)
    slope = (process.log_snr(T + 1e-6) - process.log_snr(T - 1e-6)) / 2e-6
    torch.testing.assert_close(LOSS_WEIGHTS['elbo'](process(T)), -slope / 2, rtol=1e-6, atol=0)


def test_unknown_weight_lists_the_choices():
    with pytest.raises(SettingError, match='none, min_snr, edm'):
        get_loss_weight(Config(loss_weight='snr'))


@pytest.mark.parametrize(
    ('name', 'end'),
    [('edm', dict(t_min=0.0)), ('elbo', dict(t_min=0.0)), ('elbo', dict(t_max=1.0)), ('sigmoid', dict(t_max=1.0))],
)
def test_weight_that_is_infinite_at_an_end_is_refused_with_a_remedy_that_works(name, end):
    with pytest.raises(SettingError, match=f"loss_weight='{name}' is infinite at t_m") as error:
        get_loss_weight(Config(loss_weight=name, **end))
    setting, value = str(error.value).split('Use --')[1].rstrip('.').split()
    get_loss_weight(Config(loss_weight=name, **{setting: float(value)}))


# ---------------------------------------------------------------- the loss of a trainer: EDM, and a product


def random_batch(trainer, n=8):
    """Images in [-1, 1], float64, at times of the trainer's sampler."""
    g = torch.Generator().manual_seed(0)
    x0 = 2 * torch.rand(n, 1, 8, 8, generator=g, dtype=torch.float64) - 1
    t = trainer.time_sampler(torch.rand(n, generator=g, dtype=torch.float64))
    return ProcessedBatch(x0, x0, torch.randn(x0.shape, generator=g, dtype=torch.float64), t, None)


class Net(nn.Module):
    """Anything that depends on input and time."""

    def forward(self, x, time, label):
        return torch.tanh(2 * x.flip(-1)) + torch.cos(time / 200)[:, None, None, None]


def test_edm_is_reproduced(tiny_config, build_trainer):
    """The published loss, as the trainer computes it: ve, output F, target x0, log-normal noise, log-SNR time."""
    sigma_data, p_mean, p_std = 0.5, -1.2, 1.2
    config = tiny_config(
        process_name='ve', sigma_min=0.002, sigma_max=80.0, t_min=0.0, t_max=1.0, time_input='log_snr',
        model_type='F', target_type='x0', loss_weight='edm', sigma_data=sigma_data,
        time_sampler='log_normal', time_mean=p_mean, time_std=p_std,
    )  # fmt: skip
    trainer = build_trainer(config)
    batch = random_batch(trainer)
    ours = trainer.loss_fn(batch, ScaledNetwork(Net(), trainer.process, 'log_snr'))

    sigma = (0.002 * (80 / 0.002) ** batch.t)[:, None, None, None]
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    c_noise = sigma.flatten().log() / 4
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    noisy = batch.x0 + sigma * batch.x1
    denoised = c_skip * noisy + c_out * Net()(c_in * noisy, 200 * c_noise, None)
    published = (weight * (denoised - batch.x0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=0)
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    log_sigma = trainer.process.sigma(get_time_sampler(config)(u)).log()
    torch.testing.assert_close(
        log_sigma, p_mean + p_std * torch.special.ndtri(u), rtol=1e-3, atol=1e-3
    )  # except in the tails beyond 0.002 and 80


def test_weight_multiplies_the_error(tiny_config, build_trainer):
    plain, weighted = (
        build_trainer(tiny_config(experiment_name=name, target_type='x0', loss_weight=name))
        for name in ('none', 'min_snr')
    )
    batch = random_batch(plain)

    def model_fn(xt, t, label):
        return torch.sin(xt)

    expected = plain.loss_fn(batch, model_fn) * ((1 - batch.t) / batch.t).square().clamp(max=5)
    torch.testing.assert_close(weighted.loss_fn(batch, model_fn), expected)
