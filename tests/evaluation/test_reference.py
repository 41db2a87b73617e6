"""eval/reference: one held-out loss for all runs of a data set, however they are trained."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from data_utils import DATASETS, DataSpec
from evaluation.reference import Reference, noise_of
from prediction import ROWS, Prediction, get_target_fn, optimal_denoiser
from processes import PROCESSES
from tests.helpers import record_of
from trainer import ExampleDiffusionTrainer
from utils import bcast_right

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
# Settings that make linear_vp and ve as wide as the straight line, which has sigma / alpha 0.001 and 999 at times 0.001
# and 0.999. By default their ranges are smaller, and their ends replace the times beyond. t_min and t_max matter only
# in training.
WIDE = dict(beta_max=40.0, sigma_min=0.0005, sigma_max=1500.0, t_min=0.01, t_max=0.8)


def scramble(module, std=0.05):
    """Give a module weights for which its output is far from 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std, generator=generator)


def straight_line(trainer):
    """(x0, x1, t, label) of the held-out images as documented: noise by number, times from Weyl's sequence."""
    images, label = trainer.test_loader.everything()
    numbers = range(len(images))
    noise = [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(i)) for i in numbers]
    t = torch.tensor([0.001 + 0.998 * ((i + 0.5) / GOLDEN_RATIO % 1) for i in numbers], dtype=torch.float64)
    return 2 * images - 1, torch.stack(noise), t, label


def baselines_of(trainer):
    return trainer.judge.reference.baselines()


def reference_of(trainer, module=None):
    return trainer.judge.reference_loss(module or trainer.network)


def test_it_is_the_mean_square_error_of_the_velocity(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    scramble(trainer.network)
    x0, x1, t, label = straight_line(trainer)
    time = t.float()[:, None, None, None]
    with torch.no_grad():
        velocity = trainer.network.eval()((1 - time) * x0 + time * x1, t.float(), label)
    errors = (velocity - (x1 - x0)).double().square().mean((1, 2, 3))
    values = reference_of(trainer)
    assert values['eval/reference'] == pytest.approx(errors.mean().item(), rel=1e-5)
    for i in range(10):
        mine = values[f'eval/reference_t_{i / 10:.1f}_{(i + 1) / 10:.1f}']
        assert mine == pytest.approx(errors[(t * 10).long() == i].mean().item(), rel=1e-5)


def test_bins_average_to_the_whole(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    values = reference_of(trainer)
    counts = (straight_line(trainer)[2] * 10).long().bincount(minlength=10)
    assert counts.min() >= 28  # spread evenly: 29.7 each
    bins = [values[f'eval/reference_t_{i / 10:.1f}_{(i + 1) / 10:.1f}'] for i in range(10)]
    assert len(values) == 11
    whole = sum(count * value for count, value in zip(counts.tolist(), bins, strict=True)) / 297
    assert values['eval/reference'] == pytest.approx(whole, rel=1e-5)


def test_it_does_not_depend_on_how_a_run_is_trained(tiny_config, build_trainer):
    settings = [
        {},
        dict(time_sampler='logit_normal', time_std=2.0),
        dict(loss_weight='min_snr'),
        dict(target_type='x0'),
        dict(target_type='score', stratified=False),
        dict(seed=5, dequantize=False, label_dropout=0.5),
        dict(global_batch_size=64, batch_shards=4),
        dict(global_batch_size=40, batch_shards=2, accumulation_steps=2),
        dict(t_min=0.1, t_max=0.8),
        dict(translate_prob=1.0, antithetic=True, stratified=False),
    ]
    found = []
    for i, changed in enumerate(settings):
        trainer = build_trainer(tiny_config(experiment_name=f'run{i}', **changed))
        scramble(trainer.network)
        found.append(reference_of(trainer))
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-5)


class Knows(torch.nn.Module):
    """The optimal denoiser of the held-out images, as a network with the output type of the config."""

    def __init__(self, process, model_type, denoise):
        super().__init__()
        self.process, self.model_type, self.denoise = process, model_type, denoise

    def forward(self, xt, t, label=None):
        coefs = self.process(t.double())
        x0 = self.denoise(xt.double(), coefs)
        alpha, sigma = (bcast_right(value, xt.ndim) for value in (coefs.alpha, coefs.sigma))
        known = Prediction(xt.double(), coefs, x0=x0, x1=(xt.double() - alpha * x0) / sigma)
        return getattr(known, self.model_type).float()


@pytest.fixture(scope='module')
def by_hand():
    """The reference loss of the optimal denoiser of the held-out digits, computed by hand on the straight line."""
    return {}


@pytest.mark.parametrize('process_name, model_type', itertools.product(PROCESSES, ROWS))
def test_one_denoiser_has_one_value_whatever_it_is_read_through(
    tiny_config, build_trainer, by_hand, process_name, model_type
):
    trainer = build_trainer(tiny_config(process_name=process_name, model_type=model_type, **WIDE))
    x0, x1, t, _ = straight_line(trainer)
    denoise = optimal_denoiser(x0)
    if not by_hand:
        time = t[:, None, None, None]
        xt = (1 - time) * x0.double() + time * x1.double()
        weights = -(xt[:, None] - (1 - time[:, None]) * x0.double()).square().sum((2, 3, 4)) / 2 / t[:, None] ** 2
        best = torch.einsum('bn,nchw->bchw', weights.softmax(1), x0.double())
        velocity = (xt - best) / time
        by_hand['value'] = (velocity - (x1 - x0)).square().mean().item()
    values = reference_of(trainer, Knows(trainer.process, model_type, denoise))
    assert values['eval/reference'] == pytest.approx(by_hand['value'], rel=0.02)


@pytest.mark.parametrize('process_name', PROCESSES)
def test_a_network_that_knows_the_image_has_no_loss(tiny_config, build_trainer, process_name):
    trainer = build_trainer(tiny_config(process_name=process_name))
    batches = iter(list(trainer.batches.held_out()))

    class Truth(torch.nn.Module):
        def forward(self, xt, t, label=None):
            batch, coefs = next(batches)[0], trainer.process(t)
            alpha, sigma = (bcast_right(value, xt.ndim) for value in (coefs.alpha, coefs.sigma))
            x1 = (xt - alpha * batch.x0) / sigma
            return get_target_fn()(t, xt, batch.x0, x1, coefs).velocity

    assert reference_of(trainer, Truth())['eval/reference'] < 1e-4


@pytest.mark.slow
def test_two_processes_find_what_one_does(tiny_config, build_trainer, run_sh, tmp_path):
    done = run_sh(nproc=2, ema_decays=(0.9,), base_lr=0.01)
    assert done.returncode == 0, done.stderr
    config = tiny_config(ema_decays=(0.9,), base_lr=0.01, experiment_name='one')
    build_trainer(config).train_loop()
    one, both = (
        [{k: v for k, v in line.items() if k.startswith('eval/reference')} for line in record_of(folder)]
        for folder in (config.run_dir, tmp_path / 'ckpts/run')
    )
    assert [len(line) for line in one] == [0, 11, 0, 11]
    for mine, theirs in zip(one, both, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3)  # the weights differ by the order of summation


# ---------------------------------------------------------------- baselines


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr('evaluation.reference.MOST_DRAWS', 2048)


def two_points(config):
    x = torch.tensor([[-1.0], [1.0]]).repeat(400, 1)
    return (x, torch.zeros(len(x), dtype=torch.int64)), (x[:100], torch.zeros(100, dtype=torch.int64))


def test_the_floor_of_two_points_equals_an_integral(tiny_config, build_trainer, monkeypatch):
    """E[x0 | xt] is tanh(alpha xt / sigma^2), and the error of the velocity is the error of x0 divided by t."""
    monkeypatch.setitem(DATASETS, 'two', DataSpec(two_points, (1,), scale='float'))
    trainer = build_trainer(tiny_config(dataset='two', network='mlp', t_min=0.01, global_batch_size=64))
    values = baselines_of(trainer)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(2000, 1)))
    t = torch.linspace(0.01, 0.999, 2001, dtype=torch.float64)[None]
    xt = (1 - t) + t * noise  # for the point 1; the other is its mirror image
    errors = ((1 - torch.tanh((1 - t) * xt / t**2)) / t).square().mean(0)
    assert values['train/floor'] == pytest.approx(errors.mean().item(), rel=0.1)
    late = (t[0] >= 0.8) & (t[0] < 0.9)
    assert values['train/floor_t_0.8_0.9'] == pytest.approx(errors[late].mean().item(), rel=0.15)
    t = 0.001 + 0.998 * torch.linspace(0, 1, 2001, dtype=torch.float64)
    linear = t**2 / ((1 - t) ** 2 + t**2) / t**2  # error of a linear denoiser at variance 1, over t^2
    assert values['eval/reference_gaussian'] == pytest.approx(linear.mean().item(), rel=0.1)
    assert values['eval/reference_floor'] < values['eval/reference_gaussian']


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(model_type='x0', target_type='x0', process_name='cosine'),
        dict(label_dropout=0.5, time_sampler='logit_normal', loss_weight='edm'),
    ],
)
def test_no_training_loss_is_below_the_floor_and_one_that_knows_all_is_at_it(tiny_config, build_trainer, settings):
    trainer = build_trainer(tiny_config(global_batch_size=1024, num_training_steps=4, **settings))
    floor = baselines_of(trainer)['train/floor']
    x, label, *_ = trainer.train_loader.everything()
    denoise = optimal_denoiser(2 * x - 1, label)

    def knows(xt, t, label):
        coefs = trainer.process(t)
        x0 = denoise(xt, coefs, label)
        alpha, sigma = (bcast_right(value, xt.ndim) for value in (coefs.alpha, coefs.sigma))
        return getattr(Prediction(xt, coefs, x0=x0, x1=(xt - alpha * x0) / sigma), trainer.config.model_type)

    steps = trainer.batches.steps(trainer.step)
    losses = trainer.loss_fn(next(next(steps)), knows)
    assert losses.mean().item() == pytest.approx(floor, rel=0.1)
    with torch.no_grad():
        untrained = trainer.loss_fn(next(next(steps)), trainer.get_model_fn(trainer.network))
    assert untrained.mean().item() > 1.5 * floor


def test_the_baselines_do_not_depend_on_the_process_or_output(tiny_config, build_trainer):
    found = []
    for i, settings in enumerate([{}, dict(process_name='cosine', model_type='v'), dict(model_type='x0')]):
        values = baselines_of(build_trainer(tiny_config(experiment_name=f'run{i}', **settings)))
        found.append({name: values[name] for name in ('eval/reference_floor', 'eval/reference_gaussian')})
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-3)


class OwnLoss(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        return 2 * super().loss_fn(batch, model_fn)


class OwnBatch(ExampleDiffusionTrainer):
    def prepare_batch_fn(self, batch, is_train):
        return super().prepare_batch_fn(batch, is_train)


class Coupled(ExampleDiffusionTrainer):
    independent = True

    def couple(self, x0, x1, label):
        return x1.flip(0)


class Drawn(ExampleDiffusionTrainer):
    def encode(self, x):
        return super().encode(x) + 0.1 * torch.randn_like(x)


def test_unknown_baselines_are_left_out(tiny_config, build_trainer):
    """Another loss, or changed images, have another least training loss; the reference loss depends on neither."""
    for kind in (OwnBatch, Coupled, Drawn):
        assert baselines_of(build_trainer(tiny_config(experiment_name=kind.__name__), kind)) == {}
    whole = baselines_of(build_trainer(tiny_config(experiment_name='whole')))
    reference = {name: value for name, value in whole.items() if name.startswith('eval/')}
    assert reference.keys() < whole.keys()
    for i, settings in enumerate([dict(translate_prob=0.5), dict(overfit=True), dict(label_dropout=0.3)]):
        found = baselines_of(build_trainer(tiny_config(experiment_name=f'run{i}', **settings)))
        assert {name: found[name] for name in reference} == pytest.approx(reference, abs=1e-6)
        assert ('train/floor' in found) == ('label_dropout' in settings)
    assert baselines_of(build_trainer(tiny_config(), OwnLoss)) == pytest.approx(reference, abs=1e-6)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_where_memory_is_short_the_baselines_are_left_out(tiny_config, build_trainer, monkeypatch, device):
    def full(*_):
        if device == 'cpu':
            return torch.empty(2**50, dtype=torch.uint8)  # a RuntimeError
        raise torch.OutOfMemoryError

    monkeypatch.setattr('evaluation.reference.optimal_denoiser', full)
    assert baselines_of(build_trainer(tiny_config())) == {}


def test_the_baselines_are_in_the_record(tiny_config, build_trainer):
    config = tiny_config()
    build_trainer(config).train_loop()
    lines = {line['train/step']: line for line in record_of(config.run_dir, levels=True)}
    assert [step for step, line in lines.items() if 'train/floor' in line] == [6]  # once
    assert lines[6]['train/floor'] < lines[12]['train/loss']


def seen_by_the_network(trainer, batch):
    seen = {}

    def network(xt, t, label, **cond):
        seen.update(xt=xt, t=t, **cond)
        return torch.zeros_like(xt)

    trainer.judge.reference.errors(batch, torch.arange(len(batch.t)), network)
    return seen


def test_noise_is_drawn_again_and_the_second_time_equals_the_first(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    batch = dataclasses.replace(trainer.example, cond={'s': torch.zeros(len(trainer.example.t))})
    seen = seen_by_the_network(trainer, batch)
    alpha, sigma = (bcast_right(v, 4) for v in (trainer.process(seen['t']).alpha, trainer.process(seen['t']).sigma))
    x1 = (seen['xt'] - alpha * batch.x0) / sigma
    assert torch.allclose(x1, noise_of(torch.arange(len(x1)), x1), atol=1e-2)
    assert torch.equal(seen['s'], seen['t'])


def test_a_run_whose_x1_is_not_independent_noise_has_no_reference(tiny_config, build_trainer, capsys):
    """Its network does not denoise such noise: the number rose while samples got better."""

    class Coupled(ExampleDiffusionTrainer):
        def couple(self, x0, x1, label):
            return x1.flip(0)

    trainer = build_trainer(tiny_config(), Coupled)
    values = trainer.judge.held_out_losses(12)
    assert 'eval/loss' in values and not any('reference' in name for name in values)
    assert 'eval/reference is left out: it is a denoising loss' in capsys.readouterr().out


def test_the_gaussian_baseline_knows_each_pixel(tiny_config, build_trainer):
    """Against the best linear estimate of each pixel by itself."""
    trainer = build_trainer(tiny_config())
    x0 = 2 * trainer.train_loader.everything()[0].double() - 1
    n = 2048
    rows = torch.arange(n) % len(x0)
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(n)]).double()
    t = torch.tensor([0.001 + 0.998 * ((i + 0.5) / GOLDEN_RATIO % 1) for i in range(n)], dtype=torch.float64)
    t = t[:, None, None, None]
    mean, variance, clean = x0.mean(0), x0.var(0), x0[rows]
    xt = (1 - t) * clean + t * noise
    guess = mean + (1 - t) * variance / ((1 - t) ** 2 * variance + t**2) * (xt - (1 - t) * mean)
    by_hand = ((guess - clean) / t).square().mean().item()
    assert baselines_of(trainer)['eval/reference_gaussian'] == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize('setting', ['flip_prob', 'rotate_prob'])
def test_turned_images_have_no_floor(tiny_config, build_trainer, monkeypatch, setting):
    spec = dataclasses.replace(DATASETS['digits'], flip_keeps_label=True, rotation_keeps_label=True)
    monkeypatch.setitem(DATASETS, 'digits', spec)
    assert 'train/floor' not in baselines_of(build_trainer(tiny_config(**{setting: 0.5})))


def test_the_baselines_of_large_images_take_few_at_once(tiny_config, build_trainer, monkeypatch):
    trainer, sizes, errors = build_trainer(tiny_config()), [], Reference.errors
    monkeypatch.setattr('evaluation.reference.VALUES_AT_ONCE', 100 * 64)
    monkeypatch.setattr(Reference, 'errors', lambda self, x, *rest: sizes.append(len(x.t)) or errors(self, x, *rest))
    baselines_of(trainer)
    assert max(sizes) == 100
