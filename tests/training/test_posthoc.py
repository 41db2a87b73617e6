"""Averages whose length is chosen after training."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import saving
from config import SettingError
from ema import EMA
from trainer import ExampleDiffusionTrainer
from training.posthoc import posthoc_mixture, posthoc_weights, power_profile, weights_of_steps


class Two(nn.Module):
    """A layer with a weight for each of n steps, and a buffer."""

    def __init__(self, n):
        super().__init__()
        self.layer = nn.Linear(n, 1, bias=False)
        self.register_buffer('steps', torch.zeros(()))


def run_of(folder, n=40, every=5, decays=(0.9, 0.98), kind='exponential'):
    """A run whose weights after step k are the k-th unit vector, so that an average shows the weight of each step."""
    network = Two(n).requires_grad_(False)
    network.layer.weight.zero_()
    ema = EMA(network, decays, kind)
    folder.mkdir(exist_ok=True)
    for k in range(1, n + 1):
        network.layer.weight.copy_(torch.eye(n)[k - 1 : k])
        network.steps += 1
        ema.update(network)
        if k % every == 0:
            saved = dict(config={}, network=network.state_dict(), ema=ema.state_dict())
            saving.write(folder / f'step_{k:07d}.pt', **saved)
            saving.write(folder / 'last.pt', **saved)
    return network


def test_weights_of_a_chosen_length_are_mixed_from_the_checkpoints(tmp_path, capsys):
    network = run_of(tmp_path)
    for checkpoint, n in (('last.pt', 40), ('step_0000020.pt', 20)):
        found = posthoc_weights(tmp_path / checkpoint, 'posthoc_0.15', network)
        out = capsys.readouterr().out
        assert f'{n // 5 * 3} averages' in out  # two moving averages and the raw weights
        printed = float(re.search(r'within ([\d.]+)%', out)[1]) / 100
        target = np.pad(power_profile(0.15, n), (0, 40 - n))
        off = np.linalg.norm(found['layer.weight'][0].numpy() - target) / np.linalg.norm(target)
        assert off == pytest.approx(printed, abs=6e-4) and off < 0.12
        assert found['layer.weight'].dtype == torch.float32 and found['steps'] == n  # a buffer is not averaged


def test_a_mixture_of_power_averages_equals_the_average_that_was_kept(tmp_path):
    """0.1 from checkpoints with widths 0.05 and 0.2 only, against an average of width 0.1 of the same weights."""
    network = run_of(tmp_path, n=200, every=10, decays=(0.05, 0.2), kind='power')
    mixed = posthoc_weights(tmp_path / 'last.pt', 'posthoc_0.1', network)['layer.weight'][0]
    run_of(tmp_path / 'kept', n=200, every=200, decays=(0.1,), kind='power')
    kept = saving.load(tmp_path / 'kept/last.pt')['ema']['networks'][0.1]['layer.weight'][0]
    assert (mixed - kept).norm() < 0.02 * kept.norm()


def test_averages_that_were_saved_without_their_type_are_exponential(tmp_path, monkeypatch):
    state = EMA.state_dict
    monkeypatch.setattr(EMA, 'state_dict', lambda ema: {k: v for k, v in state(ema).items() if k != 'kind'})
    network = run_of(tmp_path / 'older')
    monkeypatch.undo()
    run_of(tmp_path / 'newer')
    older, newer = (
        posthoc_weights(tmp_path / name / 'last.pt', 'posthoc_0.15', network) for name in ('older', 'newer')
    )
    assert torch.equal(older['layer.weight'], newer['layer.weight'])


@pytest.mark.parametrize('name', ['posthoc_', 'posthoc_2', 'posthoc_0.5', 'posthoc_x'])
def test_a_malformed_width_is_refused(tmp_path, name):
    with pytest.raises(SettingError, match='write posthoc_ and a width'):
        posthoc_weights(tmp_path / 'last.pt', name, nn.Identity())


def test_too_few_averages_are_refused(tmp_path):
    network = run_of(tmp_path, every=40, decays=(0.5,))
    with pytest.raises(SettingError, match=r'an error of \d+%. Choose another width, or save more'):
        posthoc_weights(tmp_path / 'last.pt', 'posthoc_0.25', network)


@pytest.mark.parametrize(
    ('decay', 'kind'), [(0.0, 'exponential'), (0.5, 'exponential'), (0.99, 'exponential'), (0.1, 'power')]
)
def test_the_weights_of_steps_agree_with_the_average(decay, kind):
    """An average of a network whose weights are one unit vector after the other."""
    network, n = nn.Linear(30, 1, bias=False).requires_grad_(False), 30
    network.weight.zero_()
    ema = EMA(network, (decay,), kind)
    for k in range(n):
        network.weight.copy_(torch.eye(n)[k : k + 1])
        ema.update(network)
    assert np.allclose(weights_of_steps(decay, n, kind), ema.networks[decay].weight[0].numpy(), atol=1e-7)


@pytest.mark.parametrize(('width', 'gamma'), [(0.05, 16.97), (0.10, 6.94)])
def test_the_power_profile_has_the_width_and_the_exponent_of_the_paper(width, gamma):
    """Karras et al. 2024 give gamma 16.97 and 6.94 for these two."""
    n = 20_000
    profile, at = power_profile(width, n), np.arange(1, n + 1) / n
    assert profile.sum() == pytest.approx(1)
    assert np.sqrt(profile @ at**2 - (profile @ at) ** 2) == pytest.approx(width, rel=1e-3)
    slope = np.polyfit(np.log(at[n // 2 :]), np.log(profile[n // 2 :]), 1)[0]
    assert slope == pytest.approx(gamma, abs=0.01)


def test_the_mixture_comes_near_the_profile():
    saved = [(decay, n) for n in range(250, 2001, 250) for decay in (0.0, 0.99, 0.999)]
    factors, error = posthoc_mixture(saved, 0.1, 2000)
    assert factors.sum() == pytest.approx(1) and error < 0.05
    by_hand = sum(f * np.pad(weights_of_steps(d, n), (0, 2000 - n)) for f, (d, n) in zip(factors, saved, strict=True))
    target = power_profile(0.1, 2000)
    assert np.linalg.norm(by_hand - target) / np.linalg.norm(target) == pytest.approx(error)
    assert posthoc_mixture(saved[-3:], 0.1, 2000)[1] > error  # fewer averages approximate it worse


def test_the_power_profile_of_a_short_training():
    profile = power_profile(0.1, 50)
    assert profile[49] / profile[24] == pytest.approx(2**6.937, rel=0.005)


def test_the_mixture_of_a_long_training_groups_steps():
    saved = [(decay, n) for n in range(5000, 50_001, 5000) for decay in (0.0, 0.998, 0.9998)]
    factors, error = posthoc_mixture(saved, 0.1, 50_000)
    assert factors.sum() == pytest.approx(1) and error < 0.06
    profile = sum(f * np.pad(weights_of_steps(d, n), (0, 50_000 - n)) for f, (d, n) in zip(factors, saved, strict=True))
    target = power_profile(0.1, 50_000)
    parts = [np.add.reduceat(x, np.arange(0, 50_000, 1000)) for x in (profile, target)]
    assert np.linalg.norm(parts[0] - parts[1]) / np.linalg.norm(parts[1]) < 0.06


@pytest.mark.slow
def test_weights_of_another_length_are_mixed_from_the_saves_of_a_run(tiny_config, build_trainer, capsys):
    """Each weight is the same linear function of the weights after each step."""
    seen = []

    class Watched(ExampleDiffusionTrainer):
        def train_step(self, shards):
            super().train_step(shards)
            seen.append(self.network.net.stem.weight.double().clone().detach())

    settings = dict(num_training_steps=40, keep_every=5, ema_decays=(0.9, 0.98), eval_every=0)
    config = tiny_config(**settings)
    trainer = build_trainer(config, Watched)
    trainer.train_loop()
    found = posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.15', trainer.network)
    assert int(re.search(r'(\d+) averages', capsys.readouterr().out)[1]) >= 24  # 8 saves, two averages, raw weights
    target = sum(w * x for w, x in zip(power_profile(0.15, 40), seen, strict=True))
    mixed = found['net.stem.weight'].double()
    raw = saving_error(seen[-1], target)
    assert saving_error(mixed, target) < 0.1 * raw
    early = posthoc_weights(config.run_dir / 'step_0000020.pt', 'posthoc_0.15', trainer.network)[
        'net.stem.weight'
    ].double()
    target = sum(w * x for w, x in zip(power_profile(0.15, 20), seen[:20], strict=True))
    assert saving_error(early, target) < 0.1 * saving_error(seen[19], target)
    for name in ('posthoc_', 'posthoc_2', 'posthoc_0.5', 'posthoc_x'):
        with pytest.raises(SettingError, match='write posthoc_ and a width'):
            posthoc_weights(config.run_dir / 'last.pt', name, trainer.network)
    for path in config.run_dir.glob('step_*.pt'):
        path.unlink()
    with pytest.raises(SettingError, match='Choose another width, or save more'):
        posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.25', trainer.network)


def saving_error(a, b):
    return float((a - b).norm())


@pytest.mark.slow
def test_an_error_up_to_30_percent_of_the_profile_is_accepted(tiny_config, build_trainer, monkeypatch, capsys):
    config = tiny_config(keep_every=0, save_every=4, keep_last=3, ema_decays=(0.5, 0.9))
    trainer = build_trainer(config)
    trainer.train_loop()
    error = 0.29

    def mixture(keys, width, n, kind):
        return np.eye(len(keys))[0], error

    monkeypatch.setattr('training.posthoc.posthoc_mixture', mixture)
    posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.1', trainer.network)
    assert '9 averages' in capsys.readouterr().out  # three saves, each with two averages and raw weights
    error = 0.31
    with pytest.raises(SettingError, match='an error of 31%'):
        posthoc_weights(config.run_dir / 'last.pt', 'posthoc_0.1', trainer.network)


def test_complex_weights_keep_their_imaginary_part(tmp_path):
    network, n = nn.Linear(2, 1, bias=False, dtype=torch.cfloat).requires_grad_(False), 40
    ema, means, rng = EMA(network, (0.9, 0.98)), [], torch.Generator().manual_seed(0)
    for k in range(1, n + 1):
        network.weight.copy_(torch.randn(1, 2, generator=rng, dtype=torch.cfloat))
        ema.update(network)
        means.append(network.weight.clone())
        if k % 5 == 0:
            saved = dict(config={}, network=network.state_dict(), ema=ema.state_dict())
            saving.write(tmp_path / f'step_{k:07d}.pt', **saved)
            saving.write(tmp_path / 'last.pt', **saved)
    found = posthoc_weights(tmp_path / 'last.pt', 'posthoc_0.15', network)['weight']
    target = sum(w * m for w, m in zip(power_profile(0.15, n).tolist(), means, strict=True))
    assert found.dtype == torch.cfloat and (found - target).abs().max() < 0.15 and found.imag.abs().max() > 0
    torch.testing.assert_close(found.imag, target.imag, rtol=0, atol=0.15)
