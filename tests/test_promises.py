"""Promises of the settings and the trainer, each checked in a run or recomputed by hand."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import data_utils
import saving
import utils
from evaluation import judge
from networks import table
from runtime import stopping
from tests.helpers import record_of
from trainer import ExampleDiffusionTrainer


@pytest.fixture(autouse=True)
def no_stop_asked(monkeypatch):
    monkeypatch.setattr(stopping, '_stop_asked', False)


def scramble(module, seed, std):
    """Give a network weights that make every layer matter: an untrained UNet outputs 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std, generator=generator)


def scrambled(trainer, std=0.05):
    """A trainer whose raw and averaged networks all differ."""
    for seed, module in enumerate(trainer.weights().values()):
        scramble(module, seed, std)
    return trainer


def whole_batch(trainer):
    """The global batch of the first step, all its shards."""
    return utils.concat(list(next(trainer.batches.steps(trainer.step))))


# ---------------------------------------------------------------- dropout, precision


def watch_dropout(trainer):
    """A list that gets, for each pass through the first dropout layer, (gradients wanted, zeros in its output)."""
    layer = next(module for module in trainer.network.modules() if isinstance(module, nn.Dropout))
    passes = []
    layer.register_forward_hook(lambda *seen: passes.append((torch.is_grad_enabled(), seen[2] == 0)))
    return passes


def test_dropout_is_on_in_training_and_off_elsewhere(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(dropout=0.3, sample_every=6))
    passes = watch_dropout(trainer)
    trainer.train_loop()
    training, elsewhere = ([zeros for grad, zeros in passes if grad is on] for on in (True, False))
    assert len(training) == 12 and len(elsewhere) > 12
    assert 0.27 < torch.cat(training).float().mean() < 0.33
    assert not any(zeros.any() for zeros in elsewhere)


def test_every_micro_step_drops_something_else(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(dropout=0.3, accumulation_steps=4))
    passes, steps = watch_dropout(trainer), trainer.batches.steps(0)
    for _ in range(3):
        trainer.train_step(next(steps))
    masks = [zeros for _, zeros in passes]
    assert len(masks) == 12
    for one, other in itertools.combinations(masks, 2):
        assert 0.5 < (one == other).float().mean() < 0.66  # 0.7^2 + 0.3^2 if independent


@pytest.mark.parametrize('precision, dtype', [('bfloat16', torch.bfloat16), ('float32', torch.float32)])
def test_precision_applies_to_the_layers_and_not_to_saved_tensors(tiny_config, build_trainer, precision, dtype):
    config = tiny_config(precision=precision, sample_every=12)
    trainer = build_trainer(config)
    inside, outside = set(), set()
    for module in (trainer.network, trainer.ema.networks[0.999]):
        module.net.middle[1].conv1.register_forward_hook(
            lambda *seen: inside.add((torch.is_grad_enabled(), seen[2].dtype))
        )
    loss_fn = trainer.loss_fn

    def watched(batch, model_fn):
        outside.add(model_fn(batch.x0, batch.t, batch.label).dtype)
        return loss_fn(batch, model_fn)

    trainer.loss_fn = watched
    trainer.train_loop()
    assert inside == {(True, dtype), (False, dtype)} and outside == {torch.float32}
    kept = saving.load(config.run_dir / 'last.pt')
    moments = [value for state in kept['optimizer']['state'].values() for value in state.values()]
    tensors = [*kept['network'].values(), *kept['ema']['networks'][0.999].values(), *moments]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_bfloat16_and_float32_runs_differ_only_by_rounding(tiny_config, build_trainer):
    runs = [tiny_config(experiment_name=name, precision=name, eval_every=0) for name in ('bfloat16', 'float32')]
    for config in runs:
        build_trainer(config).train_loop()
    rough, fine = ([line['train/loss'] for line in record_of(config.run_dir)] for config in runs)
    assert rough == pytest.approx(fine, rel=0.02) and all(a != b for a, b in zip(rough[1:], fine[1:], strict=True))


# ---------------------------------------------------------------- gradients and averages


def test_accumulation_does_not_change_the_gradient(tiny_config, build_trainer):
    """The gradient norm of each run's first step equals the norm for the mean loss of the whole batch at once."""
    norms, losses = [], []
    for n in (1, 4):
        config = tiny_config(experiment_name=f'n{n}', accumulation_steps=n, grad_clip_norm=0.0, log_every=1)
        trainer = build_trainer(config)
        trainer.train_loop()
        norms.append([line['train/grad_norm'] for line in record_of(config.run_dir)])
        losses.append([line['train/loss'] for line in record_of(config.run_dir)])
    trainer = build_trainer(tiny_config(experiment_name='by_hand'))
    trainer.loss_fn(whole_batch(trainer), trainer.network).mean().backward()
    by_hand = torch.stack([p.grad.square().sum() for p in trainer.network.parameters() if p.grad is not None]).sum()
    assert norms[0][0] == pytest.approx(by_hand.sqrt().item(), rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(set(losses[0])) == 12


def test_averages_follow_the_step(tiny_config, build_trainer):
    """ema <- d ema + (1 - d) weights, with the weights after the step, and d = min(decay, (1 + n) / (10 + n))."""
    trainer = build_trainer(tiny_config(ema_decays=(0.999, 0.05), warmup_steps=0, base_lr=0.1))
    steps = trainer.batches.steps(trainer.step)
    seen = [{k: v.clone() for k, v in trainer.network.state_dict().items()}]
    for _ in range(2):
        trainer.train_step(next(steps))
        seen.append({k: v.clone() for k, v in trainer.network.state_dict().items()})
    for decay, (first, second) in {0.999: (2 / 11, 3 / 12), 0.05: (0.05, 0.05)}.items():
        for name, average in trainer.ema.networks[decay].state_dict().items():
            w0, w1, w2 = (weights[name].double() for weights in seen)
            expected = second * (first * w0 + (1 - first) * w1) + (1 - second) * w2
            torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
    moved = max((seen[2][name] - seen[1][name]).abs().max() for name in seen[0])
    assert moved > 0.01  # otherwise nothing was compared


# ---------------------------------------------------------------- what is judged and shown


def judges_by(trainer):
    return next(iter(trainer.ema.networks.values()), trainer.network)


@pytest.mark.parametrize('ema_decays', [(0.9, 0.99), ()])
def test_a_run_is_judged_by_its_first_average(tiny_config, build_trainer, ema_decays):
    """Final metrics and eval/reference use the raw weights only if there is no moving average."""
    judged = []

    class Mine(ExampleDiffusionTrainer):
        def sample_metrics(self, x, inputs):
            judged.append((x, inputs))
            return {'mean': x.mean()}

    trainer = scrambled(build_trainer(tiny_config(ema_decays=ema_decays), Mine))
    values = trainer.judge.samples(trainer.config.num_training_steps, 20)
    assert values.keys() == {'final/adams/mean', 'final/sde_dpmpp_2m/mean'}
    for (name, sampler), (x, inputs) in zip(trainer.samplers().items(), judged, strict=True):
        drawn = {module: trainer.drawing.samples(sampler, module, inputs) for module in trainer.weights().values()}
        assert [module for module in drawn if drawn[module].equal(x)] == [judges_by(trainer)], name
        assert values[f'final/{name}/mean'] == pytest.approx(float(x.mean()))
    scores = {module: trainer.judge.reference_loss(module, rounds=2) for module in trainer.weights().values()}
    trainer.judge.reference_loss = functools.partial(trainer.judge.reference_loss, rounds=2)
    values = trainer.judge.held_out_losses(trainer.step)
    assert [m for m in scores if scores[m]['eval/reference'] == values['eval/reference']] == [judges_by(trainer)]


def test_a_grid_is_of_the_network_and_the_sampler_that_its_name_says(tiny_config, build_trainer):
    shown = {}

    class Mine(ExampleDiffusionTrainer):
        def show(self, name, x, inputs):
            shown[name] = x

    trainer = scrambled(build_trainer(tiny_config(ema_decays=(0.9, 0.99), raw_pictures=True), Mine))
    trainer.gallery.sample_grids()
    modules = {'raw': trainer.network, 'ema_0.9': trainer.ema.networks[0.9], 'ema_0.99': trainer.ema.networks[0.99]}
    expected = {
        f'step_0000000_{solver}_{name}': trainer.drawing.samples(
            functools.partial(trainer.draw, solver=solver), module, trainer.sample_inputs(60)
        )
        for solver in ('adams', 'sde_dpmpp_2m')
        for name, module in modules.items()
    }
    assert shown.keys() == expected.keys()
    assert [one for one, other in itertools.product(shown, expected) if shown[one].equal(expected[other])] == list(
        shown
    )
    assert all(shown[name].equal(expected[name]) for name in shown)


def watch_labels(trainer):
    """A list that gets (step, label) of each call of the trainer's networks."""
    labels = []
    for module in trainer.weights().values():
        module.register_forward_pre_hook(lambda _, args: labels.append((trainer.step, args[2])))
    return labels


def test_the_samples_of_a_grid_are_of_all_classes_in_turn(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(num_sample_steps=1, ema_decays=()))
    trainer.show = lambda name, x, inputs: None
    labels = watch_labels(trainer)
    trainer.gallery.sample_grids()
    of_adams, of_sde = torch.cat([label for _, label in labels]).chunk(2)
    assert of_adams.tolist() == of_sde.tolist() == 6 * list(range(10))


def test_without_labels_the_network_sees_only_the_null_class(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setattr(judge, 'NUM_JUDGED', 40)
    config = tiny_config(label_dropout=1.0, sample_every=6, final_eval=True, raw_pictures=True)
    trainer = build_trainer(config)
    labels = watch_labels(trainer)
    trainer.train_loop()
    seen = [label for step, label in labels if step > 0]
    assert len(seen) > 100 and all((label == 10).all() for label in seen)
    assert (trainer.example.label == 10).all()
    last = record_of(config.run_dir)[-1]
    assert np.isfinite(last['eval/loss']) and any(name.startswith('final/adams/') for name in last)


def test_held_out_loss_is_computed_in_eval_mode(tiny_config, build_trainer):
    trainer = scrambled(build_trainer(tiny_config(dropout=0.5)), std=0.2)
    by_hand = {}
    for name, module in trainer.weights().items():
        for train in (True, False):
            module.train(train)
            with torch.no_grad():
                batches = [trainer.loss_fn(batch, module) for batch, _ in trainer.batches.held_out()]
            by_hand[name, train] = torch.cat(batches).double()
        module.train()
    assert len(by_hand['raw', False]) == 297
    values = trainer.judge.held_out_losses(trainer.step)
    for name, suffix in {'raw': '', 'ema_0.999': '_ema_0.999'}.items():
        assert values[f'eval/loss{suffix}'] == pytest.approx(by_hand[name, False].mean().item(), rel=1e-6)
        assert values[f'eval/loss{suffix}'] != pytest.approx(by_hand[name, True].mean().item(), rel=1e-4)


def test_the_mode_changes_when_a_model_fn_is_called_and_not_when_it_is_made(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    network, batch = trainer.network, trainer.example
    network.train()
    evaluated = trainer.get_model_fn(network)
    assert network.training
    learn = trainer.get_model_fn(network, train=True)
    for fn, training in ((evaluated, False), (learn, True), (evaluated, False)):
        fn(batch.x0, batch.t, batch.label)
        assert {module.training for module in network.modules()} == {training}


def test_antithetic_times_come_in_mirrored_pairs(tiny_config, build_trainer):
    times = []

    class Mine(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            if torch.is_grad_enabled():
                times.append(batch.t)
            return super().loss_fn(batch, model_fn)

    config = tiny_config(antithetic=True, stratified=False, t_min=0.1, t_max=0.9, eval_every=0)
    build_trainer(config, Mine).train_loop()
    assert len(times) == 12 and torch.cat(times).unique().numel() > 300
    for t in times:
        torch.testing.assert_close(t.sort().values, (1 - t).sort().values)


# ---------------------------------------------------------------- log


def test_values_logged_while_evaluating_belong_to_the_evaluation(tiny_config, build_trainer):
    """Values from loss_fn are logged under eval/ and the weights' name; prepare_batch_fn's under training only."""
    seen = []

    class Logs(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            self.log('mine/is_train', is_train)
            return super().prepare_batch_fn(batch, is_train)

        def loss_fn(self, batch, model_fn):
            size = model_fn(batch.x0, batch.t, batch.label).abs()
            self.log('train/size', size)
            if not torch.is_grad_enabled():
                seen.append(size.flatten())
            return super().loss_fn(batch, model_fn)

    config = tiny_config(eval_every=4)
    trainer = scrambled(build_trainer(config, Logs))
    trainer.judge.rehearse()  # calls loss_fn too
    seen.clear()
    values = trainer.judge.held_out_losses(trainer.step)
    averaged, raw = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    # the mean over all held-out images; the last batch is smaller
    assert values['eval/size'] == pytest.approx(torch.cat(raw).mean().item(), rel=1e-5)
    assert values['eval/size_ema_0.999'] == pytest.approx(torch.cat(averaged).mean().item(), rel=1e-5)
    assert values['eval/size'] != pytest.approx(values['eval/size_ema_0.999'], rel=1e-3)
    build_trainer(tiny_config(eval_every=4, experiment_name='run'), Logs).train_loop()
    lines = record_of(tiny_config(experiment_name='run').run_dir)
    assert {line['mine/is_train'] for line in lines if 'mine/is_train' in line} == {1.0}
    assert [line['train/step'] for line in lines if 'mine/is_train' in line] == [3, 6, 9, 12]
    assert {line['eval/mine/is_train'] for line in lines if 'eval/loss' in line} == {0.0}


def test_values_logged_while_sampling_are_in_the_line_of_that_step(tiny_config, build_trainer):
    class Logs(ExampleDiffusionTrainer):
        def draw(self, model_fn, inputs, solver):
            self.log('mine/drawn', self.step)
            return super().draw(model_fn, inputs, solver)

        def show(self, name, x, inputs):
            self.log('mine/shown', len(x))

        def sample_metrics(self, x, inputs):
            self.log('mine/judged', len(x))
            return {}

    config = tiny_config(sample_every=6, final_eval=True)
    build_trainer(config, Logs).train_loop()
    lines = {line['train/step']: line for line in record_of(config.run_dir)}
    assert {step: line['mine/drawn'] for step, line in lines.items() if 'mine/drawn' in line} == {6: 6, 12: 12}
    assert {step: line['mine/shown'] for step, line in lines.items() if 'mine/shown' in line} == {6: 60, 12: 60}
    assert {step: line['mine/judged'] for step, line in lines.items() if 'mine/judged' in line} == {12: 1000}


@pytest.mark.parametrize(
    'value, mean',
    [
        (3, 3),
        (True, 1),
        (np.float64(0.25), 0.25),
        (np.int64(7), 7),
        (torch.tensor(1 / 3, dtype=torch.float64), 0.3333333),
        (torch.tensor([1, 2]), 1.5),
        (torch.tensor([[True, False], [False, False]]), 0.25),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 1.5),
    ],
)
def test_numbers_of_any_type_can_be_logged(tiny_config, build_trainer, value, mean):
    class Logs(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            self.log('mine/value', value)
            return super().loss_fn(batch, model_fn)

    config = tiny_config(num_training_steps=3, eval_every=0)
    build_trainer(config, Logs).train_loop()
    assert record_of(config.run_dir)[0]['mine/value'] == mean


# ---------------------------------------------------------------- data of another rank


def test_a_network_in_three_dimensions_learns_volumes(tiny_config, build_trainer, monkeypatch):
    def load(config):
        volumes = torch.randn(96, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 4, 6, 5)
        labels = torch.zeros(96, dtype=torch.int64)
        return (volumes[:64], labels[:64]), (volumes[64:], labels[64:])

    class Convolutions(nn.Module):
        def __init__(self, channels):
            super().__init__()
            layers = [nn.Conv3d(channels, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, channels, 3, padding=1)]
            self.layers = nn.Sequential(*layers)

        def forward(self, xt, time, label):
            return self.layers(xt)

    monkeypatch.setitem(data_utils.DATASETS, 'volumes', data_utils.DataSpec(load, scale='float'))
    monkeypatch.setitem(table.NETWORKS, 'conv3d', lambda config, shape, num_classes: Convolutions(shape[0]))
    config = tiny_config(dataset='volumes', network='conv3d', num_training_steps=60, base_lr=0.01, sample_every=60)
    trainer = build_trainer(config)
    assert trainer.shape == (2, 4, 6, 5)
    trainer.train_loop()
    losses = [line['train/loss'] for line in record_of(config.run_dir)]
    assert losses[-1] < 0.8 * losses[0]
    assert record_of(config.run_dir)[-1]['eval/reference'] < 2  # the mean square of the velocity
    x = trainer.drawing.samples(trainer.samplers()['adams'], trainer.network, trainer.sample_inputs(3))
    assert x.shape == (3, 2, 4, 6, 5) and x.isfinite().all()
