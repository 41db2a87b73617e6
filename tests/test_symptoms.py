"""The table of docs/symptoms.md: each symptom, made by breaking a run or its sampling in the way that its row names."""

import json

import pytest
import torch

import data_utils
import saving
import utils
from config import Config, SettingError
from processes import get_process
from sampling import get_sample_fn
from tests.helpers import ROOT, record_of
from trainer import ExampleDiffusionTrainer
from training.advice import pair_warning

SHORT = dict(channels=16, optimizer='muon', base_lr=4e-3, time_sampler='logit_normal', label_dropout=0.1) | dict(
    num_training_steps=40, global_batch_size=64, warmup_steps=5, log_every=10, eval_every=40, ema_decays=(0.98,)
)


class OppositeSign(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        xt = self.process.compute_xt(batch.x0, batch.x1, self.process(batch.t))
        return utils.image_square_error(model_fn(xt, batch.t, batch.label), batch.x0 - batch.x1)


class OtherNoise(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        xt = self.process.compute_xt(batch.x0, batch.x1, self.process(batch.t))
        return utils.image_square_error(model_fn(xt, batch.t, batch.label), torch.randn_like(batch.x1) - batch.x0)


class WithoutEncode(ExampleDiffusionTrainer):
    def encode(self, x):
        return x


@pytest.fixture
def trained(tiny_config, build_trainer):
    """`trained(trainer_class, **settings)`: a short run, (its trainer, the lines of its record)."""

    def train(trainer_class=None, **settings):
        trainer = build_trainer(tiny_config(**SHORT | settings), trainer_class)
        trainer.train_loop()
        return trainer, record_of(trainer.config.run_dir)

    return train


@pytest.fixture(scope='module')
def digits():
    """`draw(**settings)`: 100 samples of examples/digits.pt in [-1, 1], the same noise each time; and the data."""
    network, process, config = saving.load_for_sampling(ROOT / 'examples/digits.pt')
    generator = torch.Generator().manual_seed(0)
    x1, label = torch.randn(100, 1, 8, 8, generator=generator), torch.arange(100) % 10
    (images, labels), _ = data_utils.load_digits(Config())
    draw = get_sample_fn(config, process, null_label=10)
    torch.manual_seed(0)
    return lambda **given: draw(network, x1=x1, label=label, **given), label, (images / 16 * 2 - 1, labels)


def spread(x, label):
    """The standard deviation of a pixel within a class."""
    return torch.stack([x[label == c].var(0).mean() for c in range(10)]).mean().sqrt()


# ---------------------------------------------------------------- in training


def test_loss_stays_where_it_began(trained):
    _, lines = trained(base_lr=1e-6, num_training_steps=20, eval_every=20)
    first, last = (line['train/loss'] for line in (lines[0], lines[-1]))
    assert first > 1.4 and last == pytest.approx(first, rel=0.05)


@pytest.mark.slow
def test_loss_stops_at_1(trained):
    """The network learns all but the noise, whose mean square is 1."""
    _, lines = trained(OtherNoise, num_training_steps=80, eval_every=80)
    assert 1 < lines[-1]['eval/loss'] < lines[0]['train/loss'] - 0.1


def test_loss_is_low_and_the_reference_loss_is_high(trained):
    _, lines = trained(OppositeSign)
    assert lines[-1]['eval/loss'] < 1.2 < 1.5 < lines[0]['train/loss'] and lines[-1]['eval/reference'] > 2.5


@pytest.mark.slow
def test_averages_are_worse_than_raw_weights(trained):
    """Decays of 0.98 and above are the same average in the first 400 steps."""
    _, lines = trained(ema_decays=(0.98, 0.9999, 0.5), eval_every=20)
    early = next(line for line in lines if line['train/step'] == 20)
    raw, long, longer, short = (early[f'eval/loss{name}'] for name in ('', '_ema_0.98', '_ema_0.9999', '_ema_0.5'))
    assert long == longer > 1.02 * raw and short < long


@pytest.mark.slow
def test_samples_are_copies(trained):
    trainer, lines = trained(overfit=True, global_batch_size=16, num_training_steps=400, eval_every=400)
    assert lines[-1]['eval/loss'] > 2 * lines[-1]['train/loss']
    seen = utils.concat(list(next(trainer.batches.steps(0)))).x_original
    samples = trainer.decode(trainer.draw(trainer.get_model_fn(trainer.network), trainer.sample_inputs(16), 'adams'))
    others = trainer.test_loader.take(range(200))[0]
    of_samples, of_others = (torch.cdist(x.flatten(1), seen.flatten(1)).min(1).values.mean() for x in (samples, others))
    assert of_samples < 0.6 * of_others


def test_samples_are_tinted(trained, capsys):
    trainer, _ = trained(WithoutEncode, num_training_steps=2, warmup_steps=1)
    assert 'decode(encode(x)) differs' in capsys.readouterr().out
    images = trainer.train_loader.take(range(100))[0]
    assert trainer.decode(trainer.encode(images)).mean() > images.mean() + 0.2


def test_samples_are_noise_after_a_warning():
    """Samples of output x1 with a velocity loss and uniform times show the digit as rarely as chance does."""
    config = Config(model_type='x1', target_type='velocity', time_sampler='uniform')
    assert 'may learn badly' in pair_warning(config, get_process(config))
    runs = map(json.loads, (ROOT / 'benchmarks/pairs.jsonl').read_text().splitlines())
    found = [run['agreement'] for run in runs if run['cell'] == ['rf', 'x1', 'velocity'] and not run['more']]
    assert len(found) == 3 and max(found) < 0.2


# ---------------------------------------------------------------- in sampling


def test_samples_are_blurred_by_few_steps(digits):
    draw, label, data = digits
    assert spread(draw(solver='euler', num_steps=1, time_grid='uniform'), label) < 0.5 * spread(*data)
    assert spread(draw(), label) > 0.85 * spread(*data)


def test_an_sde_needs_more_steps_than_the_ode(digits):
    draw, label, _ = digits
    few, many = (spread(draw(solver='euler_maruyama', num_steps=n), label) for n in (5, 50))
    assert few < 0.8 * spread(draw(num_steps=5), label) and many > 1.2 * few


def test_samples_are_grainy_where_sampling_ends_early(digits):
    draw, _, (images, _) = digits
    clean, early = (torch.cdist(draw(t_min=t).flatten(1), images.flatten(1)).min(1).values.mean() for t in (0.001, 0.2))
    assert early > 1.25 * clean


def test_guidance_without_effect(digits, tiny_config):
    """Outside the interval; and it is refused for a network without a null class, which ignores the label then."""
    draw, *_ = digits
    assert torch.equal(draw(guidance_scale=4.0, guidance_interval=(0.0, 0.0)), draw())
    with pytest.raises(SettingError, match=r'label_dropout'):
        get_sample_fn(Config(), get_process(Config()), null_label=10)(None, torch.randn(1, 1, 8, 8), guidance_scale=2.0)


def test_samples_are_too_bold(digits):
    draw, *_ = digits
    beyond = {scale: (draw(guidance_scale=scale, num_steps=10).abs() > 1.1).float().mean() for scale in (1.0, 8.0)}
    assert beyond[1.0] < 0.02 and beyond[8.0] > 0.15
