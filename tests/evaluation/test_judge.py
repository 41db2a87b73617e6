"""The numbers that a run computes itself: held-out losses, and numbers for samples at the end and in between."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_utils import DATASETS, DataSpec
from evaluation import detectors, judge
from scripts.evaluate import Evaluate, evaluate
from tests.helpers import record_of, run_ranks
from trainer import ExampleDiffusionTrainer
from training.experiment import SampleInputs


@pytest.fixture
def colour(monkeypatch):
    """Digits with three channels, and a classifier with short training."""

    def load(config):
        return tuple(
            (images.expand(-1, 3, -1, -1).clone(), labels) for images, labels in DATASETS['digits'].load(config)
        )

    monkeypatch.setitem(DATASETS, 'colour', DataSpec(load, (3, 8, 8), 10, 16))
    monkeypatch.setitem(DATASETS, 'plain', DataSpec(load, (3, 8, 8), 0, 16))
    monkeypatch.setattr(detectors, 'CLASSIFIER_STEPS', 100)
    monkeypatch.setattr(judge, 'NUM_JUDGED', 100)


def distances(trainer, x, label=None):
    return trainer.judge.distances(x, SampleInputs(x, label))


def test_a_run_on_colour_images_ends_with_numbers(tiny_config, build_trainer, colour, capsys):
    config = tiny_config(dataset='colour', final_eval=True, num_training_steps=3)
    build_trainer(config).train_loop()
    last = record_of(config.run_dir)[-1]
    for name in ('adams', 'sde_dpmpp_2m'):
        assert last[f'final/{name}/frechet'] > 2 * last[f'final/{name}/real_frechet'] > 0  # after three steps: noise
        assert last[f'final/{name}/label_agreement'] < 0.4 and last[f'final/{name}/nearest_neighbour_ratio'] > 1
    printed = capsys.readouterr().out
    assert 'judged by classifier trained on' in printed and 'Frechet distance to the training images' in printed


def test_the_data_themselves_are_judged_as_good(tiny_config, build_trainer, colour):
    trainer = build_trainer(tiny_config(dataset='colour'))
    x, label, *_ = trainer.test_loader.everything()
    values = distances(trainer, x, label)
    assert values['frechet'] < 3 * values['real_frechet'] and values['nearest_neighbour_ratio'] == pytest.approx(1)
    assert values['label_agreement'] > 0.8 and values['coverage'] > 0.5
    swapped = distances(trainer, x, (label + 1) % 10)
    assert swapped['label_agreement'] < 0.2


@pytest.mark.slow
def test_images_without_classes_and_points_are_judged_by_their_values(tiny_config, build_trainer, colour):
    trainer = build_trainer(tiny_config(dataset='plain'))
    x, label, *_ = trainer.test_loader.everything()
    values = distances(trainer, x, label)
    flat, train = (2 * part.flatten(1).numpy() - 1 for part in (x, trainer.train_loader.everything()[0]))
    gap = np.square(flat.mean(0) - train.mean(0)).sum()
    assert values['frechet'] > gap > 0 and 'label_agreement' not in values
    points = build_trainer(tiny_config(dataset='moons', network='mlp', experiment_name='points'))
    assert points.judge.can_judge
    assert distances(points, points.test_loader.everything()[0])['frechet'] < 0.01


@pytest.mark.slow
def test_numbers_in_between(tiny_config, build_trainer, colour):
    """They do not change the training."""
    config = tiny_config(dataset='colour', eval_metrics_every=4)
    build_trainer(config).train_loop()
    lines = {line['train/step']: line for line in record_of(config.run_dir)}
    assert [step for step, line in lines.items() if 'eval/adams/frechet' in line] == [4, 8]
    assert not any(name.startswith('final/') or 'sde' in name for line in lines.values() for name in line)
    without = tiny_config(dataset='colour', experiment_name='without')
    build_trainer(without).train_loop()
    assert lines[12]['train/loss'] == record_of(without.run_dir)[-1]['train/loss']


def test_prints_that_too_few_images_are_not_judged(tiny_config, build_trainer, monkeypatch, capsys):
    load = DATASETS['digits'].load

    def few(config):
        train, (images, labels) = load(config)
        return train, (images[:9], labels[:9])

    monkeypatch.setitem(DATASETS, 'few', DataSpec(few, (1, 8, 8), 10, 16))
    config = tiny_config(dataset='few', final_eval=True, num_training_steps=3)
    build_trainer(config).train_loop()
    assert re.search(r'no final numbers .* Override sample_metrics, or pass --no_final_eval', capsys.readouterr().out)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_does_not_end_a_run(tiny_config, build_trainer, colour, capsys):
    config = tiny_config(dataset='colour', final_eval=True, num_training_steps=3)
    (Path(config.data_dir)).mkdir(parents=True)
    (Path(config.data_dir) / 'cache').write_text('a file')
    build_trainer(config).train_loop()
    assert 'final/sde_dpmpp_2m/frechet' in record_of(config.run_dir)[-1]
    assert 'cannot write the cache' in capsys.readouterr().out


# ---------------------------------------------------------------- facts about an experiment


class Sliced(ExampleDiffusionTrainer):
    """A loss that differentiates the network with respect to its input, and raises an error with its own text."""

    def loss_fn(self, batch, model_fn):
        xt = self.process.compute_xt(batch.x0, batch.x1, self.process(batch.t)).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            out = model_fn(xt, batch.t, batch.label)
        try:
            (slope,) = torch.autograd.grad(out.sum(), xt, create_graph=torch.is_grad_enabled())
        except RuntimeError:
            raise RuntimeError('of my own') from None
        return (out + slope - batch.x0).square().mean((1, 2, 3))


def test_a_loss_that_differentiates_is_found_out_by_trying(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(), Sliced)
    assert trainer.judge.loss_needs_gradients
    assert not build_trainer(tiny_config(experiment_name='plain')).judge.loss_needs_gradients
    trainer.train_loop()
    first, last = (line['eval/loss'] for line in record_of(trainer.config.run_dir) if 'eval/loss' in line)
    assert 0 < last < first
    assert all(p.grad is None or not p.grad.any() for p in trainer.network.parameters())


@pytest.mark.parametrize('error', [RuntimeError, ValueError, KeyError])
def test_a_broken_loss_raises_its_own_error_before_training(tiny_config, build_trainer, error):
    tried = []

    class Broken(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            tried.append(torch.is_grad_enabled())
            raise error('of my own')

    trainer = build_trainer(tiny_config(), Broken)
    with pytest.raises(error, match='of my own'):
        trainer.train_loop()
    assert trainer.step == 0 and tried == ([False, True] if error is RuntimeError else [False])


class NotADenoiser(torch.nn.Module):
    """A network with a condition that only its own loss passes."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, xt, t, label=None, *, partner):
        return self.scale * (xt + partner)


class Paired(ExampleDiffusionTrainer):
    def __init__(self, config, device, network, *rest):
        super().__init__(config, device, NotADenoiser(), *rest)

    def loss_fn(self, batch, model_fn):
        out = model_fn(batch.x1, batch.t, batch.label, partner=batch.x0)
        return (out - batch.x0).square().mean((1, 2, 3))

    def draw(self, model_fn, inputs, solver, **settings):
        return model_fn(inputs.x1, torch.ones(len(inputs.x1)), partner=inputs.x1)


class RuledOut(ExampleDiffusionTrainer):
    has_reference = False


def test_a_network_that_is_not_a_denoiser_leaves_out_the_reference(tiny_config, build_trainer, capsys):
    for kind in (Paired, RuledOut):
        trainer = build_trainer(tiny_config(experiment_name=kind.__name__), kind)
        trainer.train_loop()
        lines = record_of(trainer.config.run_dir, levels=True)
        names = {name for line in lines for name in line}
        assert 'eval/loss' in names and not any('reference' in name or 'floor' in name for name in names)
        left_out = 'eval/reference is left out: this network cannot be evaluated as a denoiser'
        assert (left_out in capsys.readouterr().out) == (kind is Paired)  # RuledOut needs no explanation


# ---------------------------------------------------------------- numbers of an experiment


class Blurred(ExampleDiffusionTrainer):
    """Samples without noise, the mean held-out image of the requested class; and its own sample_metrics, which call
    `draw`."""

    def draw(self, model_fn, inputs, solver, **settings):
        x, label = self.test_loader.everything()
        means = torch.stack([x[label == k].mean(0) for k in range(10)])
        return 2 * means[inputs.label] - 1 + 0.3 * torch.linspace(-1, 1, 8)[inputs.label % 8, None, None, None]

    def sample_metrics(self, x, inputs):
        again = self.decode(self.draw(None, inputs, 'adams'))
        mine = dict(brightness=float(x.mean()), gap=float((x - again).abs().max()), budget=self.config.sample_nfe)
        return super().sample_metrics(x, inputs) | mine


def test_evaluate_gives_the_numbers_of_the_end_of_a_run(tiny_config, build_trainer, monkeypatch):
    """For the same samples, by the same code, including `sample_metrics`."""
    monkeypatch.setattr(judge, 'NUM_JUDGED', 80)
    config = tiny_config(final_eval=True, num_training_steps=3, warmup_steps=1)
    trainer = build_trainer(config, Blurred)
    trainer.train_loop()
    last = record_of(config.run_dir)[-1]
    final = {k.removeprefix('final/adams/'): v for k, v in last.items() if k.startswith('final/adams/')}
    assert {'frechet', 'kid', 'coverage', 'label_agreement', 'brightness', 'gap'} <= final.keys()
    (line,) = evaluate(Evaluate(run=str(config.run_dir), num=80))
    assert {name: line[name] for name in final} == pytest.approx(final, rel=1e-6)
    assert (
        final['gap'] == 0
        and 0 < final['brightness'] < 1
        and line['eval/loss'] == pytest.approx(last['eval/loss_ema_0.999'], rel=1e-6)
    )
    assert line['eval/reference'] == pytest.approx(last['eval/reference'], rel=1e-6)
    monkeypatch.setattr(detectors, 'CLASSIFIER_STEPS', 30)
    (other,) = evaluate(Evaluate(run=str(config.run_dir), num=80, detector='classifier'))
    assert other['gap'] == 0 and other['frechet'] < 0.5 * final['frechet']  # by the detector named in the line
    lines = evaluate(Evaluate(run=str(config.run_dir), num=80, nfe=(3, 7)))
    assert [line['budget'] for line in lines] == [3, 7]  # hooks read the settings of their line
    record = config.run_dir / 'evaluation.jsonl'
    texts = record.read_text().splitlines()
    record.write_text('\n'.join([*texts[:-1], texts[-1][:30]]))  # as after a kill
    assert evaluate(Evaluate(run=str(config.run_dir), num=80, nfe=(3,))) == lines[:1]
    evaluate(Evaluate(run=str(config.run_dir), num=80, nfe=(7,)))
    assert [json.loads(text)['nfe'] for text in record.read_text().splitlines()] == [0, 0, 3, 7]


# ---------------------------------------------------------------- the time that is left


def test_the_time_left_counts_the_samples_at_the_end(tiny_config, build_trainer):
    settings = dict(sample_every=6, num_sample_steps=4)
    trainer = build_trainer(tiny_config(final_eval=True, **settings))
    assert trainer.drawing.seconds_at_end(1.0) == 0  # not known yet that samples will be drawn
    trainer.judge.rehearse()
    trainer.gallery.rehearse(step=1)
    samples = 1000 * 2 + 60 * 2
    assert trainer.drawing.seconds_at_end(40.0) == samples * 4 / (3 * 40)  # a forward pass is a third of training
    trainer.drawing.seconds_per_sample = 0.5
    assert trainer.drawing.seconds_at_end(40.0) == 0.5 * samples
    plain = build_trainer(tiny_config(experiment_name='plain', final_pictures=False, **settings))
    plain.judge.rehearse()
    plain.gallery.rehearse(step=1)
    assert plain.drawing.seconds_at_end(40.0) == 0


def test_evaluations_are_counted_with_those_that_a_draw_adds(tiny_config, build_trainer):
    class Mine(ExampleDiffusionTrainer):
        def draw(self, model_fn, inputs, solver, **settings):
            twice = lambda *given, **cond: (model_fn(*given, **cond), model_fn(*given, **cond))[0]  # noqa: E731
            return super().draw(twice, inputs, 'heun', **settings)

    trainer = build_trainer(tiny_config(num_sample_steps=4), Mine)
    trainer.gallery.rehearse(step=1)
    assert trainer.drawing.evaluations == 2 * 2 * 4


@pytest.mark.slow
def test_drawing_is_timed(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(sample_every=6, final_eval=True))
    trainer.train_loop()
    assert 0 < trainer.drawing.seconds_per_sample < 1


def test_long_vectors_are_not_judged_and_small_floats_not_by_a_classifier(tiny_config, build_trainer, monkeypatch):
    def floats(*shape):
        x = torch.randn(60, *shape)
        return DataSpec(lambda config: ((x, torch.arange(60) % 2),) * 2, shape, 2, scale='float')

    monkeypatch.setitem(DATASETS, 'long', floats(2000))
    monkeypatch.setitem(DATASETS, 'small', floats(4, 4, 4))
    long = build_trainer(tiny_config(dataset='long', network='mlp'))
    small = build_trainer(tiny_config(dataset='small', network='mlp', experiment_name='small'))
    assert not long.judge.can_judge and small.judge.can_judge
    monkeypatch.setitem(detectors.DETECTORS, 'classifier', lambda *_: pytest.fail('a classifier'))
    x, label, *_ = small.test_loader.everything()
    assert 'label_agreement' not in distances(small, x, label)


def test_a_network_without_classes_has_no_label_agreement(tiny_config, build_trainer, colour):
    trainer = build_trainer(tiny_config(dataset='colour', label_dropout=1.0))
    x, label, *_ = trainer.test_loader.everything()
    assert 'label_agreement' not in distances(trainer, x, label)


# ---------------------------------------------------------------- decisions that all ranks must share


ON_TWO_RANKS = """
import contextlib, io, json, sys, types
from pathlib import Path

import torch

from evaluation import detectors
from evaluation.distances import SampleFeatures
from evaluation.judge import Judge
from runtime import ranks

ranks.setup()
rank, n = ranks.rank(), 24
x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
detectors.features_of_data = lambda *_: (x, x)
mine = torch.tensor(ranks.my_items(n)).split(6)
detector = detectors.Detector(lambda x: x, '', '', predict=lambda x: torch.zeros(len(x)))


def compared(odd):
    held_out = types.SimpleNamespace(size=4, take=lambda rows: (x[:4], torch.zeros(4)))
    data = types.SimpleNamespace(held_out=held_out, as_decoded=lambda x: x, device='cpu', mismatch=lambda x: '')
    sampled = SampleFeatures(detector, data)
    for i, rows in enumerate(mine):
        sampled.add(x[rows], None if odd and (rank, i) == (1, 1) else (rows >= 6).long())
    loader = types.SimpleNamespace(labels=None, size=n)
    experiment = types.SimpleNamespace(modules={}, data=types.SimpleNamespace(num_classes=2))
    judge = types.SimpleNamespace(data=data, experiment=experiment, batches=types.SimpleNamespace(train_loader=loader))
    return Judge.compare_with_data(judge, sampled, n)


def errors(*_):
    if rank == 1:
        raise ValueError('of rank 1')


def has_reference():
    judge = types.SimpleNamespace(
        experiment=types.SimpleNamespace(
            has_reference=True, get_model_fn=lambda module: None, device='cpu', modules={},
            overrides=lambda name: name == 'loss_fn',
        ),
        drawing=types.SimpleNamespace(has_score=True),
        batches=types.SimpleNamespace(example=types.SimpleNamespace(t=torch.zeros(2))),
        judged_weights=lambda: ('raw', None),
        record=types.SimpleNamespace(logging_apart=contextlib.nullcontext),
        reference=types.SimpleNamespace(errors=errors),
    )
    return Judge.has_reference.func(judge)


with contextlib.redirect_stdout(io.StringIO()) as printed:
    found = dict(odd=compared(True), known=compared(False), has_reference=has_reference())
Path(sys.argv[1], f'{rank}.json').write_text(json.dumps(found | dict(printed=printed.getvalue())))
"""


@pytest.mark.slow
def test_ranks_agree_whether_labels_are_classes_and_the_network_a_denoiser(tmp_path):
    """Also if only one rank has found the reason."""
    first, second = run_ranks(ON_TWO_RANKS, tmp_path, [0, 1])
    for found in (first, second):
        assert (found['known']['label_agreement'], found['known']['real_label_agreement']) == (0.25, 1)
        assert 'frechet' in found['known']
        assert 'label_agreement' not in found['odd'] and found['odd']['frechet'] == found['known']['frechet']
        assert found['has_reference'] is False
    assert 'eval/reference is left out: this network cannot be evaluated as a denoiser (of rank 1)' in first['printed']


class LogsTrials(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        self.log('trial', float(batch is self.example))
        return super().loss_fn(batch, model_fn)


def test_a_trial_of_the_loss_is_not_among_the_held_out_losses(tiny_config, build_trainer):
    """Also if `rehearse` was not called."""
    values = build_trainer(tiny_config(), LogsTrials).judge.held_out_losses(12)
    assert values['eval/trial'] == values['eval/trial_ema_0.999'] == 0


def test_samples_that_are_not_finite_have_no_numbers_and_the_run_ends(tiny_config, build_trainer, capsys):
    class Broken(ExampleDiffusionTrainer):
        def draw(self, model_fn, inputs, solver):
            x = super().draw(model_fn, inputs, solver)
            if self.step == 12:
                x[3] = torch.nan
            return x

    config = tiny_config(final_eval=True, sample_every=6)
    trainer = build_trainer(config, Broken)
    trainer.train_loop()
    printed = capsys.readouterr().out
    assert 'warning: 2 of 60 samples have values that are not finite' in printed and 'no numbers' in printed
    assert not any(name.startswith('final/') for name in record_of(config.run_dir)[-1])
    assert build_trainer(config, Broken).checkpoints.finished


def test_an_error_of_the_reference_loss_is_one_where_the_loss_is_the_default(tiny_config, build_trainer, monkeypatch):
    """The network is called as in training, so an error is a fault, and not a sign of another kind of network."""

    def broken(*_):
        raise RuntimeError('tensors on two devices')

    class Own(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            return super().loss_fn(batch, model_fn)

    trainer, own = build_trainer(tiny_config()), build_trainer(tiny_config(experiment_name='own'), Own)
    for each in (trainer, own):
        monkeypatch.setattr(each.judge.reference, 'errors', broken)
    with pytest.raises(RuntimeError, match='tensors on two devices'):
        _ = trainer.judge.has_reference
    assert not own.judge.has_reference


@pytest.mark.parametrize('eval_every, step, first', [(6, 6, True), (6, 12, False), (0, 12, True), (100, 12, True)])
def test_baselines_are_found_once_also_where_eval_every_is_beyond_the_end(
    tiny_config, build_trainer, eval_every, step, first
):
    judge = build_trainer(tiny_config(eval_every=eval_every)).judge
    judge.reference.baselines = lambda: {'eval/reference_floor': 1.0}
    assert ('eval/reference_floor' in judge.held_out_losses(step)) is first


def test_what_sample_metrics_draws_does_not_depend_on_the_drawing_before(tiny_config, build_trainer):
    """Processes draw different numbers of samples, so their generators differ at this point."""

    class Random(ExampleDiffusionTrainer):
        def sample_metrics(self, x, inputs):
            return {'drawn': float(torch.rand(()))}

    trainer, found = build_trainer(tiny_config(), Random), []
    for before in (3, 4):
        torch.manual_seed(before)
        found.append(trainer.judge.numbers(torch.rand(2, 1, 8, 8), trainer.sample_inputs(2)))
    assert found[0] == found[1]
