"""The trainer, on real digits in this process: randomness, resuming, losses, failures."""

import copy
import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import main
import saving
import utils
from config import Config, SettingError, parse_config
from data_utils import DATASETS, DataSpec
from ema import EMA
from main import choices
from prediction import ROWS
from processes import PROCESSES
from runtime import errors, stopping
from tests.helpers import TINY, Interrupted, assert_same, assert_same_runs, cut_off, record_of
from trainer import BaseDiffusionTrainer, ExampleDiffusionTrainer, ProcessedBatch
from training import run_folder

EVERYTHING_RANDOM = dict(
    dropout=0.2, translate_prob=0.5, label_dropout=0.3, dequantize=True, stratified=True, accumulation_steps=2
)


def record(config):
    return record_of(config.run_dir)


def assert_same_run(config_a, config_b):
    assert_same_runs(config_a.run_dir, config_b.run_dir)


@pytest.fixture(autouse=True)
def no_stop_asked(monkeypatch):
    monkeypatch.setattr(stopping, '_stop_asked', False)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """The config of a run that was not interrupted."""
    folder = str(tmp_path_factory.mktemp('whole'))
    config = Config(**TINY | EVERYTHING_RANDOM | dict(ckpt_dir=folder, data_dir=folder, experiment_name='whole'))
    main.build(config).train_loop()
    return config


@pytest.mark.parametrize('how, error', [('killed', Interrupted), ('stopped', errors.Stopped)])
@pytest.mark.parametrize('step', [1, 6, 8])
def test_resumed_equals_uninterrupted(tiny_config, build_trainer, monkeypatch, whole_run, how, error, step):
    cut = tiny_config(experiment_name='cut', **EVERYTHING_RANDOM)
    with pytest.raises(error):
        cut_off(build_trainer(cut), step, how)
    monkeypatch.setattr(stopping, '_stop_asked', False)
    again = build_trainer(cut)
    # save_every is 4, and the kill comes before the save
    assert again.step == (step if how == 'stopped' else (step - 1) // 4 * 4)
    again.train_loop()
    assert_same_run(whole_run, cut)


def test_muon_is_resumed_exactly(tiny_config, build_trainer):
    whole, cut = (tiny_config(experiment_name=name, optimizer='muon') for name in ('whole', 'cut'))
    build_trainer(whole).train_loop()
    with pytest.raises(Interrupted):
        cut_off(build_trainer(cut), 6, 'killed')
    build_trainer(cut).train_loop()
    assert_same_run(whole, cut)


def test_stop_in_evaluation_is_resumed_exactly(tiny_config, build_trainer, monkeypatch):
    whole, cut = (tiny_config(experiment_name=name) for name in ('whole', 'cut'))
    build_trainer(whole).train_loop()
    trainer = build_trainer(cut)
    loss_fn = trainer.loss_fn

    def stops_in_evaluation(batch, model_fn):
        if not torch.is_grad_enabled() and trainer.step > 0:
            stopping.ask_to_stop()
        return loss_fn(batch, model_fn)

    trainer.loss_fn = stops_in_evaluation
    with pytest.raises(errors.Stopped):
        trainer.train_loop()
    monkeypatch.setattr(stopping, '_stop_asked', False)
    build_trainer(cut).train_loop()
    assert_same_run(whole, cut)


def test_a_finished_run_can_be_prolonged_under_a_constant_schedule(tiny_config, build_trainer):
    longer, short = (dict(experiment_name=name, lr_schedule_type='constant') for name in ('longer', 'short'))
    build_trainer(tiny_config(**longer)).train_loop()
    build_trainer(tiny_config(**short, num_training_steps=6)).train_loop()
    assert build_trainer(tiny_config(**short, num_training_steps=6)).checkpoints.finished
    again = build_trainer(tiny_config(**short))
    assert not again.checkpoints.finished
    again.train_loop()
    assert_same_run(tiny_config(**longer), tiny_config(**short))


@pytest.mark.timeout(60)
def test_a_run_that_was_stopped_beyond_a_new_end_trains_no_more(tiny_config, build_trainer):
    config = tiny_config(lr_schedule_type='constant')
    trainer = build_trainer(config)
    steps = trainer.batches.steps(trainer.step)
    for _ in range(8):
        trainer.train_step(next(steps))
    trainer.checkpoints.save(trainer.step, wait=True)
    shorter = build_trainer(tiny_config(lr_schedule_type='constant', num_training_steps=6))
    assert shorter.step == 8
    shorter.train_loop()
    assert shorter.step == 8 and saving.load(shorter.config.run_dir / 'last.pt')['finished']


def test_times_of_the_first_example_are_spread_over_the_whole_range(tiny_config, build_trainer):
    """There is one time in each of equal intervals, although this batch is not a shard of a step."""
    t = build_trainer(tiny_config(t_min=0.2, t_max=0.7)).example.t.sort().values
    bounds = torch.linspace(0.2, 0.7, len(t) + 1)
    assert (t >= bounds[:-1]).all() and (t <= bounds[1:]).all()


@pytest.mark.parametrize('process_name', PROCESSES)
def test_every_output_with_every_target(tiny_config, build_trainer, process_name):
    """A network that outputs the truth has no loss, and any other has a finite one with finite gradients."""
    for model_type, target_type in itertools.product(ROWS, ROWS):
        config = tiny_config(
            process_name=process_name, model_type=model_type, target_type=target_type, t_min=0.05, t_max=0.95
        )
        trainer = build_trainer(config)
        batch = trainer.batches.draw_shard(next(iter(trainer.train_loader)), 0, 0)
        coefs = trainer.process(batch.t)
        truth = getattr(
            trainer.target_fn(
                batch.t, trainer.process.compute_xt(batch.x0, batch.x1, coefs), batch.x0, batch.x1, coefs
            ),
            model_type,
        )
        perfect = trainer.loss_fn(batch, lambda xt, t, label, truth=truth: truth)
        losses = trainer.loss_fn(batch, trainer.get_model_fn(trainer.network))
        assert losses.shape == (len(batch.t),)
        assert (perfect <= 1e-6 * (1 + losses)).all()
        losses.mean().backward()
        assert losses.isfinite().all() and all(p.grad.isfinite().all() for p in trainer.network.parameters())


CHOICES = [
    pytest.param(setting, choice, marks=pytest.mark.slow if i else ())  # quick: one of each setting
    for setting, table in choices().items()
    if setting != 'dataset'
    for i, choice in enumerate(reversed(table))
]


@pytest.mark.parametrize('setting, choice', CHOICES)
def test_every_choice_trains_and_samples(tiny_config, build_trainer, setting, choice):
    chosen = {setting: choice} | (dict(ema_decays=(0.1,)) if choice == 'power' else {})  # a width
    config = tiny_config(num_training_steps=3, warmup_steps=1, sample_every=3, dit_width=32, dit_heads=2, **chosen)
    trainer = build_trainer(config)
    trainer.train_loop()
    assert trainer.emas['network'].kind == config.ema_type
    assert all(np.isfinite(v) for line in record(config) for v in line.values())
    assert len(list((config.run_dir / 'samples').glob('step_0000003_*.png'))) == 2


def test_loss_is_the_square_error_of_the_target(tiny_config, build_trainer):
    """A network that outputs 0 for the noise has, for each image, the mean square of its noise as loss."""
    trainer = build_trainer(tiny_config(model_type='x1', target_type='x1'))
    batch = trainer.batches.draw_shard(next(iter(trainer.train_loader)), 0, 0)
    losses = trainer.loss_fn(batch, lambda xt, t, label: torch.zeros_like(xt))
    assert torch.allclose(losses, (batch.x1**2).mean((1, 2, 3)))


def test_the_network_gets_the_label_of_an_augmentation_in_training_only(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(global_batch_size=64, batch_shards=1, geometric_prob=0.3))
    images = next(iter(trainer.train_loader))
    batch = trainer.batches.draw_shard(images, 0, 0)
    told = batch.cond['augmentation']
    assert told.shape == (64, 9) and torch.equal(batch.augmentation_label, told.any(1))
    assert 0.7 < told.any(1).float().mean() < 0.99  # 1 - 0.5 (1 - 0.15) 0.7^4 = 0.9
    changed = (batch.x0 != 2 * images[0] - 1).flatten(1).any(1)
    assert changed.any() and not (changed & ~told.any(1)).any()
    for cond in (trainer.example.cond, trainer.sample_inputs(12).cond):
        assert cond['augmentation'].shape[1:] == (9,) and not cond['augmentation'].any()
    trainer.train_loop()
    assert 0.7 < [line['train/augmented'] for line in record(trainer.config) if 'train/augmented' in line][-1] < 0.99


def test_labels_of_an_experiment_that_augments_in_its_own_way(tiny_config, build_trainer):
    """Not at all: zeros, also after a call for another purpose. Half of the images: an error."""

    class Own(ExampleDiffusionTrainer):
        augmented = 0

        def prepare_batch_fn(self, batch, is_train):
            self.augmenter(batch[0][: self.augmented]) if self.augmented else None
            return super().prepare_batch_fn(batch, is_train=False)

    trainer = build_trainer(tiny_config(geometric_prob=0.3), Own)
    images = next(iter(trainer.train_loader))
    trainer.augmenter(images[0])
    assert not trainer.batches.draw_shard(images, 0, 0).cond['augmentation'].any()
    trainer.augmented = 2
    with pytest.raises(SettingError, match=r'geometric_prob=0.3: prepare_batch_fn augments 2 images and returns'):
        trainer.batches.draw_shard(images, 0, 0)


def test_a_loss_that_does_not_pass_the_label_to_the_network_is_refused(tiny_config, build_trainer):
    class Forgets(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            return model_fn(batch.x0, batch.t, batch.label).flatten(1).mean(1)

    trainer = build_trainer(tiny_config(geometric_prob=0.3), Forgets)
    with pytest.raises(TypeError, match=r'pass \*\*batch.cond to model_fn, or --geometric_prob 0'):
        trainer.train_loop()


def test_without_a_label_the_network_does_as_with_zeros(tiny_config, build_trainer):
    """So a network for a notebook needs no condition; and samples need no data, and have all classes in turn."""
    trainer = build_trainer(tiny_config(geometric_prob=0.3))
    for p in trainer.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs, model_fn = trainer.sample_inputs(12), trainer.get_model_fn(trainer.network)
    assert inputs.label.tolist() == [*range(10), 0, 1]
    trainer.augmenter(torch.rand(12, 1, 8, 8))  # by hand: samples must not get its label
    assert not trainer.sample_inputs(12).cond['augmentation'].any()
    told, untold = (model_fn(inputs.x1, torch.full((12,), 0.5), inputs.label, **cond) for cond in (inputs.cond, {}))
    assert torch.equal(told, untold)
    turned = model_fn(inputs.x1, torch.full((12,), 0.5), inputs.label, augmentation=torch.ones(12, 9))
    assert (turned - told).abs().max() > 1e-3


def test_prepared_batch(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(global_batch_size=256, batch_shards=1, label_dropout=0.25, translate_prob=0.5))
    images = next(iter(trainer.train_loader))
    batch = trainer.batches.draw_shard(images, 0, 0)
    assert batch.x_original is images[0] and batch.x_original.min() == 0 and batch.x_original.max() == 1
    assert batch.x0.min() == -1 and batch.x0.max() == 1
    untouched = ~batch.augmentation_label
    assert torch.equal(batch.x0[untouched], 2 * batch.x_original[untouched] - 1)
    assert 0.3 < batch.augmentation_label.float().mean() < 0.6  # one shift in nine moves nothing
    assert 0.15 < (batch.label == 10).float().mean() < 0.35
    kept = batch.label != 10
    assert torch.equal(batch.label[kept], images[1][kept])
    held_out = trainer.prepare_batch_fn(images, is_train=False)
    assert torch.equal(held_out.label, images[1]) and torch.equal(held_out.x0, 2 * images[0] - 1)


def test_dequantization_stays_within_a_grey_level(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(dequantize=True))
    batch = trainer.batches.draw_shard(next(iter(trainer.train_loader)), 0, 0)
    levels = (batch.x0 + 1) / 2 * 17
    assert torch.equal(levels.floor(), (16 * batch.x_original).round())
    assert 0.4 < (levels - levels.floor()).mean() < 0.6


def test_a_shard_is_a_function_of_seed_step_and_shard(tiny_config, build_trainer):
    config = tiny_config(translate_prob=0.5)
    first, second, other_seed = (
        build_trainer(config),
        build_trainer(config),
        build_trainer(tiny_config(seed=1, experiment_name='other')),
    )
    images = next(iter(first.train_loader))
    a = first.batches.draw_shard(images, 3, 0)
    torch.manual_seed(7), np.random.seed(7)
    assert_same(vars(a), vars(second.batches.draw_shard(images, 3, 0)))
    for different in (
        first.batches.draw_shard(images, 3, 1),
        first.batches.draw_shard(images, 2, 0),
        other_seed.batches.draw_shard(images, 3, 0),
    ):
        assert not different.x1.equal(a.x1) and not different.t.equal(a.t)


def test_stratified_times_fill_every_stratum_of_the_global_batch(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    u = []
    for shard in range(8):
        trainer.batches.shard_position = (shard, 8)
        u.append(trainer.uniforms(4))
    assert (torch.cat(u) * 32).floor().sort().values.tolist() == list(range(32))
    assert not torch.cat(u).equal(torch.cat(u).sort().values)


def test_independent_times_do_not(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(stratified=False))
    u = trainer.uniforms(1000)
    assert len((u * 1000).floor().unique()) < 800  # about 632 of 1000 strata are hit
    assert u.min() >= 0 and u.max() < 1


def test_overfit_times_differ_from_step_to_step(tiny_config, build_trainer):
    """The same image must not meet the same stratum of times again and again."""
    trainer = build_trainer(tiny_config(overfit=True))
    strata = []
    for trainer.step in range(20):
        trainer.batches.shard_position = (0, 8)
        utils.seed_everything(0, 'batch', trainer.step, 0)
        strata.append(int(trainer.uniforms(4)[0] * 4))
    assert set(strata) == {0, 1, 2, 3}


def test_held_out_loss_has_fixed_noise_and_times(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(dropout=0.5))
    for p in trainer.network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    first = trainer.judge.held_out_losses(trainer.step)
    torch.manual_seed(123)
    assert trainer.judge.held_out_losses(trainer.step) == first
    assert {'eval/loss', 'eval/loss_ema_0.999', 'eval/reference'} <= set(first) and first['eval/loss'] != first[
        'eval/loss_ema_0.999'
    ]


def test_log_averages_over_training_steps(tiny_config, build_trainer):
    """Values that a loss logs in the held-out evaluation, here between two lines, stay out of training's means."""

    class Logs(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            self.log('mine/step', self.step)
            return super().loss_fn(batch, model_fn)

    config = tiny_config(eval_every=4)
    build_trainer(config, Logs).train_loop()
    assert [line['mine/step'] for line in record(config) if 'train/loss' in line] == [
        1,
        4,
        7,
        10,
    ]  # steps 0-2, 3-5, ...


def test_record_has_each_due_step_once(tiny_config, build_trainer):
    config = tiny_config()
    build_trainer(config).train_loop()
    lines = record(config)
    assert [line['train/step'] for line in lines] == [3, 6, 9, 12]
    assert [line['train/images'] for line in lines] == [96, 192, 288, 384]
    assert all(0 < line['train/loss'] < 10 and line['train/grad_norm'] > 0 for line in lines)
    assert ['eval/loss' in line for line in lines] == [False, True, False, True]
    assert {f'train/loss_t_{i / 10:.1f}_{(i + 1) / 10:.1f}' for i in range(10)} <= lines[0].keys()


def test_learning_rate_is_set_before_the_step(tiny_config, build_trainer):
    """With a learning rate of 0 after the warm-up's end the weights stay; the first step's rate is base / warmup."""
    rates = []

    class Watches(ExampleDiffusionTrainer):
        def train_step(self, batches):
            super().train_step(batches)
            rates.append(self.optimizers['network'].param_groups[0]['lr'])

    config = tiny_config(base_lr=0.4, warmup_steps=4, lr_schedule_type='constant')
    build_trainer(config, Watches).train_loop()
    assert rates == pytest.approx([0.1, 0.2, 0.3] + 9 * [0.4])
    assert all(isinstance(rate, float) for rate in rates)


def test_a_step_can_be_replayed(tiny_config, build_trainer):
    """From the last checkpoint, the same batches follow, as docs/reliability.md says."""
    seen = []
    config = tiny_config(
        **EVERYTHING_RANDOM | dict(accumulation_steps=1), num_training_steps=11, save_every=4, experiment_name='run'
    )
    first = build_trainer(config)
    loss_fn = first.loss_fn

    def watched(batch, model_fn):
        if first.step == 9 and torch.is_grad_enabled():
            seen.append((batch, {k: v.clone() for k, v in first.network.state_dict().items()}))
        return loss_fn(batch, model_fn)

    first.loss_fn = watched
    with pytest.raises(Interrupted):
        cut_off(first, 10, 'killed')
    trainer = build_trainer(config)
    assert trainer.step == 8
    steps = trainer.batches.steps(trainer.step)
    while trainer.step < 9:
        trainer.train_step(next(steps))
    batch = next(next(steps))
    (then, weights) = seen[0]
    assert_same(vars(batch), vars(then))
    assert_same(dict(trainer.network.state_dict()), dict(weights))


@pytest.mark.parametrize('reduce, shape', [(torch.mean, r'\(\)'), (lambda x: x[:, None], r'\(32, 1\)')])
def test_loss_of_the_wrong_shape_is_an_error(tiny_config, build_trainer, reduce, shape):
    class Wrong(ExampleDiffusionTrainer):
        def loss_fn(self, batch, model_fn):
            return reduce(super().loss_fn(batch, model_fn))

    with pytest.raises(ValueError, match=rf'shape \(32,\), not {shape}'):
        build_trainer(tiny_config(), Wrong).train_loop()


def test_singular_end_is_refused_before_training(tiny_config, build_trainer):
    with pytest.raises(SettingError, match=r"t_max=1 touches a singular end.*model_type='x1'.*--t_max 0.999"):
        build_trainer(tiny_config(model_type='x1', t_max=1.0))


def test_init_from_takes_the_averaged_weights(tiny_config, build_trainer):
    config = tiny_config(experiment_name='first')
    build_trainer(config).train_loop()
    path = run_folder.last_path(config)
    trainer = build_trainer(tiny_config(experiment_name='second', init_from=str(path)))
    average = saving.load(path)['ema']['networks'][0.999]
    for weights in (trainer.network.state_dict(), trainer.ema.networks[0.999].state_dict()):
        assert_same(dict(weights), dict(average))
    assert trainer.step == 0
    with pytest.raises(SettingError, match=r'another network: channels: 8 -> 16'):
        build_trainer(tiny_config(experiment_name='third', init_from=str(path), channels=16))
    assert (
        parse_config(['--init_from', str(path)], settings_in=saving.network_settings).channels == 8
    )  # the network settings come from the checkpoint,
    assert (
        parse_config(['--init_from', str(path), '--channels', '16'], settings_in=saving.network_settings).channels == 16
    )  # except for flags
    assert (
        parse_config(['--init_from', str(path)], settings_in=saving.network_settings).num_training_steps
        == Config().num_training_steps
    )


def test_init_from_takes_trained_modules_and_names_what_it_leaves(tiny_config, build_trainer, capsys):
    class Adds(ExampleDiffusionTrainer):
        def setup_networks(self):
            super().setup_networks()
            sizes = dict(critic=2, frozen=2, same=2, gone=2)
            if self.config.init_from:
                sizes = dict(critic=2, frozen=2, same=2, wide=3)
            for name, size in sizes.items():
                self.modules[name] = module = nn.Linear(size, 1).requires_grad_(name in ('critic', 'wide'))
                if name in ('critic', 'wide'):
                    self.optimizers[name] = torch.optim.SGD(module.parameters(), lr=0.1)
            nn.init.ones_(self.modules['same'].weight)
            nn.init.zeros_(self.modules['same'].bias)
            self.emas['critic'] = EMA(self.modules['critic'], (0.9,))

        def state(self):
            return {} if self.config.init_from else {'seen': 3}

    first = build_trainer(tiny_config(experiment_name='first', seed=1), Adds)
    with torch.no_grad():
        first.modules['critic'].weight.fill_(4.0)
        first.emas['critic'].networks[0.9].weight.fill_(5.0)
    with first.record.open(0), first.checkpoints:
        first.checkpoints.save(1, wait=True)
    path = run_folder.last_path(first.config)
    capsys.readouterr()
    second = build_trainer(tiny_config(experiment_name='second', init_from=str(path)), Adds)
    assert second.modules['critic'].weight.eq(5).all() and second.emas['critic'].networks[0.9].weight.eq(5).all()
    assert not torch.equal(second.modules['frozen'].weight, first.modules['frozen'].weight)  # not the teacher of then
    out = capsys.readouterr().out
    assert 'warning: frozen, wide: kept as setup_networks made it' in out
    assert f'warning: not taken from {path}: gone, what `state` returned' in out


@pytest.mark.parametrize('before, now', [(0.0, 0.3), (0.3, 0.0), (0.3, 0.1)])
def test_init_from_with_and_without_a_label_of_the_augmentation(tiny_config, build_trainer, before, now):
    trainer = build_trainer(tiny_config(geometric_prob=before, experiment_name='first'))
    trainer.train_loop()
    path = run_folder.last_path(trainer.config)
    first = saving.best_weights(saving.load(path))
    settings = dict(geometric_prob=now, experiment_name='second', init_from=str(path))
    new = build_trainer(tiny_config(**settings)).network.state_dict()
    assert any('mlp_augmentation' in name for name in new) == (now > 0)
    both = first.keys() & new.keys()
    assert len(both) > 20 and all(new[name].equal(first[name]) for name in both)
    assert len(new.keys() - both) == (2 if before == 0 else 0)  # they start untrained


def test_init_from_another_number_of_classes_leaves_the_class_embedding_out(
    tiny_config, build_trainer, monkeypatch, capsys
):
    config = tiny_config(experiment_name='first')
    build_trainer(config).train_loop()
    old = saving.best_weights(saving.load(run_folder.last_path(config)))

    def load(config):
        return tuple((x, label % 4) for x, label in DATASETS['digits'].load(config))

    monkeypatch.setitem(DATASETS, 'four', DataSpec(load, (1, 8, 8), num_classes=4, max_value=16))
    trainer = build_trainer(
        tiny_config(experiment_name='second', dataset='four', init_from=str(run_folder.last_path(config)))
    )
    new = trainer.network.state_dict()
    (name,) = [name for name in new if name.endswith('class_embedding.weight')]
    assert old[name].shape[0] == 11 and new[name].shape[0] == 5
    assert all(torch.equal(new[other], old[other]) for other in new if other != name)
    assert 'the class embedding has 11 rows in the checkpoint, 5 now' in capsys.readouterr().out
    trainer.train_loop()


@pytest.mark.parametrize(
    ('decays', 'raw', 'weights'),
    [((0.9, 0.99), False, ('ema_0.9', 'ema_0.99')), ((0.9,), True, ('ema_0.9', 'raw')), ((), False, ('raw',))],
)
def test_pictures_of_both_solvers_and_of_raw_weights_if_asked_for_or_without_averages(
    tiny_config, build_trainer, decays, raw, weights
):
    config = tiny_config(sample_every=6, ema_decays=decays, raw_pictures=raw)
    build_trainer(config).train_loop()
    names = {path.name for path in (config.run_dir / 'samples').iterdir()}
    grids = {
        f'step_{step:07d}_{solver}_{name}.png'
        for step in (6, 12)
        for solver in ('adams', 'sde_dpmpp_2m')
        for name in weights
    }
    assert names == grids | {'data_and_augmented.png'}


def test_samples_are_the_same_every_time(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    for p in trainer.network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    inputs = trainer.sample_inputs(20)
    assert inputs.label.tolist() == 2 * list(range(10))

    def drawn(solver):
        return trainer.drawing.samples(functools.partial(trainer.draw, solver=solver), trainer.network, inputs)

    first = drawn('sde_dpmpp_2m')
    torch.manual_seed(99)
    assert trainer.sample_inputs(20).x1.equal(inputs.x1)
    assert drawn('sde_dpmpp_2m').equal(first) and first.min() >= 0 and first.max() <= 1
    assert not first.equal(drawn('euler'))


def test_parts_of_a_batch_are_put_together():
    part = ProcessedBatch(*(torch.rand(2, 1, 4, 4) for _ in range(3)), torch.rand(2), None, torch.tensor([True, False]))
    both = utils.concat([part, part])
    assert (
        both.x0.shape == (4, 1, 4, 4)
        and both.label is None
        and both.augmentation_label.tolist() == [True, False, True, False]
    )


def test_base_trainer_leaves_the_experiment_open(tiny_config, build_trainer):
    with pytest.raises(NotImplementedError):
        build_trainer(tiny_config(), BaseDiffusionTrainer).train_loop()


def test_checkpoint_needs_no_trust(tiny_config, build_trainer):
    config = tiny_config(keep_every=12)
    build_trainer(config).train_loop()
    state = torch.load(config.run_dir / 'last.pt', weights_only=True)
    assert state['step'] == 12 and state['finished']
    assert {'network', 'ema', 'optimizer', 'config', 'shape', 'num_classes', 'wandb_id', 'record'} <= state.keys()
    assert (config.run_dir / 'step_0000012.pt').exists()


@pytest.mark.parametrize(('value', 'kept'), [(np.float64(2.0), False), (Path('a'), False), ([2.0, {'a': 'b'}], True)])
def test_a_state_that_could_not_be_read_again_is_refused_before_training(tiny_config, build_trainer, value, kept):
    class Stateful(ExampleDiffusionTrainer):
        def state(self):
            return {'scale': value}

    trainer = build_trainer(tiny_config(), Stateful)
    if kept:
        trainer.train_loop()
        assert build_trainer(tiny_config(), Stateful).checkpoints.finished
        return
    with pytest.raises(SettingError, match=r'Stateful: a checkpoint cannot hold what `state` gives.*float\(x\)'):
        trainer.train_loop()
    assert trainer.step == 0


@pytest.mark.parametrize('place', ['loss_fn', 'prepare_batch_fn', 'train_step'])
def test_state_that_changes_outside_of_training_is_warned_of(tiny_config, build_trainer, capsys, place):
    class Counts(ExampleDiffusionTrainer):
        calls, first = torch.zeros(2), None  # first: set once, by whichever call comes first

        def state(self):
            return {'calls': self.calls, 'first': self.first, 'none': None}

        def load_state(self, state):
            self.calls, self.first = state['calls'], state['first']

    def counted(self, *args, **kwargs):
        self.calls = self.calls + 1
        self.first = self.first or 1.5
        return getattr(super(Counts, self), place)(*args, **kwargs)

    setattr(Counts, place, counted)

    class Later(Counts):
        def prepare_batch_fn(self, batch, is_train):
            self.made = 1.0
            return super().prepare_batch_fn(batch, is_train)

        def state(self):
            return {'made': self.made}

        def load_state(self, state): ...

    trainer = build_trainer(tiny_config(num_training_steps=4, experiment_name='later'), Later)
    trainer.checkpoints.check()  # `made` does not exist before the first batch
    capsys.readouterr()
    build_trainer(tiny_config(num_training_steps=4), Counts).train_loop()
    warned = 'warning: Counts: calls of `state` changed before training began, in a method that is also called'
    assert (warned in capsys.readouterr().out) == (place != 'train_step')


def test_a_parameter_in_no_module_is_refused(tiny_config, build_trainer):
    class Lone(ExampleDiffusionTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.weight = nn.Parameter(torch.ones(7))
            self.optimizers['weight'] = torch.optim.SGD([self.weight], lr=0.1)

    with pytest.raises(ValueError, match=r"optimizers\['weight'\].*shape \(7,\) that is in no module.*ParameterList"):
        build_trainer(tiny_config(), Lone)


def test_a_module_that_nothing_trains_is_in_eval_mode(tiny_config, build_trainer):
    class Taught(ExampleDiffusionTrainer):
        def setup_networks(self):
            super().setup_networks()
            self.modules['teacher'] = nn.BatchNorm2d(1).requires_grad_(False)

    trainer = build_trainer(tiny_config(), Taught)
    assert not trainer.modules['teacher'].training and trainer.network.training


# ---------------------------------------------------------------- construction in two steps


class Built(ExampleDiffusionTrainer):
    """An experiment with modules before and after super(), an attribute that the hooks use, and its own state."""

    def __init__(self, *args):
        super().__init__(*args)
        self.factor, self.steps_seen = 3.0, 0
        self.couple = self.reversed

    def setup_networks(self):
        assert not self.modules and not self.optimizers and not self.emas
        self.modules['scale'] = nn.Linear(1, 1, bias=False).requires_grad_(False)
        self.modules['scale'].weight.fill_(0.5)
        super().setup_networks()
        assert list(self.modules) == ['scale', 'network']
        self.modules['first'] = copy.deepcopy(self.network).requires_grad_(False)
        self.steps_seen = 0

    def encode(self, x):
        return self.modules['scale'](x[..., None])[..., 0] * self.factor

    def reversed(self, x0, x1, label):
        return x1.flip(0)

    def train_step(self, micro_batches):
        super().train_step(micro_batches)
        self.steps_seen += 1
        self.modules['scale'].weight.add_(1)  # as if it were learned

    def state(self):
        return {'steps_seen': self.steps_seen}

    def load_state(self, state):
        self.steps_seen = state['steps_seen']


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_hooks_find_the_modules_and_attributes_of_a_subclass(tiny_config, build_trainer):
    """This includes the first batch, from which the network's shape is read."""
    trainer = build_trainer(tiny_config(), Built)
    assert trainer.example.x0.equal(1.5 * trainer.example.x_original) and not trainer.independent
    assert_same(weights_of(trainer.modules['first']), weights_of(trainer.network))
    copied, steps = weights_of(trainer.network), trainer.batches.steps(0)
    trainer.train_step(next(steps))
    assert_same(weights_of(trainer.modules['first']), copied)
    assert not all(value.equal(copied[name]) for name, value in trainer.network.state_dict().items())


def test_restored_state_is_not_set_again(tiny_config, build_trainer):
    """A resumed run also runs __init__ and setup_networks of the subclass."""
    with pytest.raises(Interrupted):
        cut_off(build_trainer(tiny_config(), Built), 6, 'killed')
    again = build_trainer(tiny_config(), Built)
    assert (again.step, again.steps_seen, again.modules['scale'].weight.item()) == (4, 4, 4.5)
    saved = saving.load(run_folder.last_path(again.config))
    assert_same(weights_of(again.modules['first']), dict(saved['modules']['first']))
    assert not all(value.equal(saved['network'][name]) for name, value in saved['modules']['first'].items())


def test_every_attribute_is_set_in_the_constructor(tiny_config, build_trainer):
    """A reader finds all of them there; only attributes that a subclass adds are set later."""
    constructed = []

    class Watched(ExampleDiffusionTrainer):
        def begin(self, read_from=None):
            constructed.extend(vars(self))
            super().begin(read_from)

    trainer = build_trainer(tiny_config(sample_every=6), Watched)
    assert vars(trainer).keys() == set(constructed)
    trainer.train_loop()
    assert vars(trainer).keys() == set(constructed)


def test_a_trainer_that_has_not_begun_is_named(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setattr(ExampleDiffusionTrainer, 'begin', lambda self, read_from: None)
    trainer = build_trainer(tiny_config())
    with pytest.raises(RuntimeError, match=r'call begin\(\), as main\.build does'):
        trainer.train_step(next(trainer.batches.steps(0)))


def test_a_finished_run_says_how_to_continue_and_names_only_files_that_are_there(tiny_config, capsys, monkeypatch):
    vectors = torch.randn(60, 5)
    spec = DataSpec(lambda config: ((vectors, torch.zeros(60).long()),) * 2, (5,), 0, scale='float')
    monkeypatch.setitem(DATASETS, 'vectors', spec)
    settings = dict(dataset='vectors', network='mlp', num_training_steps=3, eval_every=0)
    for schedule, longer in (('cosine', False), ('constant', True)):
        config = tiny_config(lr_schedule_type=schedule, experiment_name=schedule, **settings)
        main.train(config, None)
        assert 'pictures' not in capsys.readouterr().out
        main.train(config, None)
        shown = capsys.readouterr().out
        assert f'is finished: 3 steps. {"A higher --num_training_steps" if longer else "Another"}' in shown
        assert (
            f'with --init_from {config.run_dir}/last.pt' in shown and f'checkpoint  {config.run_dir}/last.pt' in shown
        )
