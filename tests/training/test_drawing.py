"""Sampling during a run: broken, switched off, watched, or short of memory."""

import dataclasses
from functools import partial

import pytest
import torch

import saving
from config import SettingError
from evaluation import judge
from runtime import ranks, stopping
from runtime.errors import Stopped
from solvers import SOLVERS, Solver
from tests.helpers import record_of
from trainer import ExampleDiffusionTrainer, SampleInputs
from training import drawing
from training.drawing import not_finite


@pytest.fixture(autouse=True)
def no_stop_asked(monkeypatch):
    monkeypatch.setattr(stopping, '_stop_asked', False)


class Breaks(ExampleDiffusionTrainer):
    def draw(self, model_fn, inputs, solver):
        raise RuntimeError('broken on purpose')


class IsNaN(ExampleDiffusionTrainer):
    def draw(self, model_fn, inputs, solver):
        return super().draw(model_fn, inputs, solver) * float('nan')


@pytest.mark.parametrize(
    'trainer_class, error, text',
    [(Breaks, RuntimeError, 'broken on purpose'), (IsNaN, SettingError, "sampler 'adams' gives values .* not finite")],
)
def test_sampling_that_is_broken_ends_the_run_before_its_first_step(
    tiny_config, build_trainer, trainer_class, error, text
):
    config = tiny_config(sample_every=1_000_000, log_every=1)
    trainer = build_trainer(config, trainer_class)
    with pytest.raises(error, match=text):
        trainer.train_loop()
    assert trainer.step == 0 and not record_of(config.run_dir)


def test_nothing_is_drawn_at_the_end_of_a_run_if_that_is_switched_off(tiny_config, build_trainer):
    steps = []

    class Mine(ExampleDiffusionTrainer):
        def draw(self, model_fn, inputs, solver):
            steps.append(self.step)
            return super().draw(model_fn, inputs, solver)

    config = tiny_config(sample_every=0, final_pictures=False, final_eval=False)
    build_trainer(config, Mine).train_loop()
    assert set(steps) == {0}  # the trial at the start
    assert [path.name for path in (config.run_dir / 'samples').iterdir()] == ['data_and_augmented.png']
    assert not any(name.startswith('final/') for line in record_of(config.run_dir) for name in line)


def test_a_caller_may_watch_the_steps(tiny_config, build_trainer):
    """With `callback`, and with other settings of sampling; a stop request is still obeyed between two steps."""
    trainer = build_trainer(tiny_config(num_sample_steps=5))
    model_fn, inputs, seen = trainer.get_model_fn(trainer.network), trainer.sample_inputs(3), []
    x0 = trainer.draw(model_fn, inputs, 'euler', callback=lambda i, t, x: seen.append((i, t, x.clone())))
    assert [i for i, _, _ in seen] == list(range(1, 6)) and [t for _, t, _ in seen] == sorted({t for _, t, _ in seen})[
        ::-1
    ]
    assert seen[-1][1] == pytest.approx(trainer.config.t_min) and seen[-1][2].shape == x0.shape
    seen.clear()
    trainer.draw(model_fn, inputs, 'euler', num_steps=2, callback=lambda *step: seen.append(step))
    assert len(seen) == 2
    seen.clear()

    def ask_to_stop(i, t, x):
        seen.append(i)
        stopping.ask_to_stop()

    with pytest.raises(Stopped):
        trainer.draw(model_fn, inputs, 'euler', callback=ask_to_stop)
    assert seen == [1]


def test_settings_within_a_block_replace_settings_of_the_config(tiny_config, build_trainer):
    """Settings that are passed to `draw` replace both; `watching` is called in addition to the caller's `callback`."""
    trainer, calls = build_trainer(tiny_config(num_sample_steps=9)), []
    inputs, drawing = trainer.sample_inputs(2), trainer.drawing

    def steps(solver='euler', **settings):
        calls.clear()
        trainer.draw(lambda xt, t, label: calls.append(t) or 0 * xt, inputs, solver, **settings)
        return len(calls)

    with drawing.with_settings(num_steps=2):
        assert steps() == 2 and steps('heun') == 4 and steps(num_steps=3) == 3
    with pytest.raises(KeyError), drawing.with_settings(num_steps=2):
        raise KeyError
    watched, called = [], []
    with drawing.with_settings(watching=lambda i, t, x: watched.append((i, t))):
        assert steps(callback=lambda i, t, x: called.append((i, t))) == 9
    assert watched == called and [i for i, _ in watched] == list(range(1, 10))
    assert steps() == 9 and len(watched) == 9
    with drawing.with_settings(num_steps=2), drawing.with_settings(watching=lambda i, t, x: watched.append((i, t))):
        assert steps() == 2 and len(watched) == 11


def test_a_number_of_steps_replaces_the_runs_budget_of_evaluations(tiny_config, build_trainer):
    trainer, calls = build_trainer(tiny_config(sample_nfe=4)), []
    network = lambda xt, t, label: calls.append(t) or 0 * xt  # noqa: E731

    def evaluations(draw, **settings):
        calls.clear()
        draw(network, **settings)
        return len(calls)

    inputs = trainer.sample_inputs(2)
    draw = partial(trainer.draw, inputs=inputs, solver='heun')
    assert (
        evaluations(draw) == 4 and evaluations(draw, num_steps=5) == 10 and evaluations(draw, num_steps=5, nfe=6) == 6
    )
    sample_fn = partial(trainer.drawing.sample_fn, x1=inputs.x1, label=inputs.label, solver='heun')
    assert evaluations(sample_fn) == 4 and evaluations(sample_fn, num_steps=3) == 6
    with trainer.drawing.with_settings(nfe=8):
        assert evaluations(draw) == 8 and evaluations(draw, num_steps=5) == 10


class Watches(ExampleDiffusionTrainer):
    seen = 0

    def draw(self, model_fn, inputs, solver, **settings):
        def watch(t, prediction):
            self.seen += 1

        return super().draw(model_fn, inputs, solver, on_prediction=watch, **settings)


def test_the_path_of_a_sampler_that_draws_twice_is_of_the_second_draw(tiny_config, build_trainer):
    """Once, it was both in a row, from the x1 of the first."""
    trainer, drawn = build_trainer(tiny_config(num_sample_steps=3)), []

    def twice(model_fn, inputs):
        x = trainer.draw(model_fn, inputs, 'euler')
        inputs = dataclasses.replace(inputs, x1=x / 2)
        return trainer.draw(model_fn, inputs, 'euler', callback=lambda i, t, x: drawn.append((t, x.clone())))

    states = trainer.drawing.path(twice, lambda xt, t, label: 0.1 * xt, trainer.sample_inputs(2))
    assert trainer.drawing.nfe == 6 and len(states) == len(drawn) == 3
    for state, (t, x) in zip(states, drawn, strict=True):
        coefs = trainer.process(torch.tensor([t]))
        assert state.t == t
        torch.testing.assert_close(state.x, trainer.decode(x / torch.hypot(coefs.alpha, coefs.sigma)))


def test_an_experiment_may_watch_predictions_too(tiny_config, build_trainer):
    trainer, paths = build_trainer(tiny_config(num_sample_steps=3), Watches), []
    model_fn, inputs = trainer.get_model_fn(trainer.network), trainer.sample_inputs(2)
    for draw in (trainer.drawing.draw, trainer.draw):
        paths.append(trainer.drawing.path(partial(draw, solver='euler'), model_fn, inputs))
        assert trainer.drawing.nfe == 3
    for one, other in zip(*paths, strict=True):
        assert one.t == other.t and one.x.equal(other.x) and one.x0.equal(other.x0)
    assert trainer.seen == 3


def test_inputs_do_not_change_the_callers_generator(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    torch.manual_seed(0)
    wanted = torch.randn(2, 3)
    torch.manual_seed(0)
    assert trainer.sample_inputs(4).x1.equal(trainer.sample_inputs(4).x1)
    assert torch.randn(2, 3).equal(wanted)
    inputs = trainer.drawing.inputs(4)  # here the noise that follows is the same every time, and none of the inputs'
    noise = torch.randn_like(inputs.x1)
    torch.manual_seed(1)
    assert trainer.drawing.inputs(4).x1.equal(inputs.x1) and torch.randn_like(inputs.x1).equal(noise)
    assert not noise.equal(inputs.x1)


@pytest.mark.parametrize('dropout, unlabelled, warns', [(0.0, False, True), (0.1, False, False), (0.0, True, False)])
def test_sampling_without_a_label_that_was_never_left_out_is_warned_of(
    tiny_config, build_trainer, capsys, dropout, unlabelled, warns
):
    class Mine(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            batch = super().prepare_batch_fn(batch, is_train)
            return dataclasses.replace(batch, label=None) if unlabelled else batch

    drawing.print_first_time.cache_clear()
    trainer = build_trainer(tiny_config(label_dropout=dropout), Mine)
    model_fn, inputs = trainer.get_model_fn(trainer.network), SampleInputs(torch.randn(2, 1, 8, 8))
    for _ in range(2):
        trainer.draw(model_fn, inputs, 'euler', num_steps=1)
    assert capsys.readouterr().out.count('warning: label=None, but with label_dropout=0') == warns


@pytest.mark.parametrize('label, given', [([0, 1], r'\[0, 1\]'), (torch.tensor([0]), r'shape \(1,\)')])
def test_labels_that_do_not_fit_the_noise_are_named(tiny_config, build_trainer, label, given):
    trainer = build_trainer(tiny_config())
    with pytest.raises(SettingError, match=f'label is {given}. Pass a tensor of 2 items'):
        trainer.draw(trainer.get_model_fn(trainer.network), SampleInputs(torch.randn(2, 1, 8, 8), label), 'euler')


def test_a_path_keeps_what_a_solver_changes_in_place(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setitem(SOLVERS, 'in_place', Solver(lambda x, t, s, predict, noise: x.mul_(0.5), nfe=1, order=1))
    trainer = build_trainer(tiny_config(solver='in_place', num_sample_steps=2, time_grid='uniform'))
    trainer.decode = lambda x: x
    model_fn, inputs = (lambda xt, t, label: xt), trainer.sample_inputs(2)
    first, second = trainer.drawing.path(partial(trainer.draw, solver='in_place'), model_fn, inputs)
    lengths = [float(torch.hypot(c.alpha, c.sigma)) for c in map(trainer.process, torch.tensor([[0.5], [0.001]]))]
    assert torch.allclose(first.x * lengths[0], 2 * second.x * lengths[1])


@pytest.mark.parametrize(('solver', 'other'), [('heun', 'sde_dpmpp_2m'), ('euler_maruyama', 'adams')])
def test_default_solvers_are_of_both_kinds_where_an_sde_is_right(tiny_config, build_trainer, solver, other):
    trainer = build_trainer(tiny_config(solver=solver))
    assert trainer.drawing.default_solvers() == [solver, other]
    trainer.independent = False
    assert trainer.drawing.default_solvers() == [solver]


def test_a_users_draw_gets_only_three_arguments(tiny_config, build_trainer):
    """From everything that draws in a run: the first trial, pictures, paths, and the metrics at the end."""
    given = []

    class Mine(ExampleDiffusionTrainer):
        def draw(self, model_fn, inputs, solver, **settings):
            given.append((len(inputs.x1), solver, settings))
            return super().draw(model_fn, inputs, solver)

        def sample_metrics(self, x, inputs):
            return {}

    config = tiny_config(sample_every=6, final_eval=True, num_training_steps=6)
    build_trainer(config, Mine).train_loop()
    assert {solver for _, solver, _ in given} == {'adams', 'sde_dpmpp_2m'} and not any(s for _, _, s in given)
    assert {n for n, _, _ in given} > {2, 4} and (config.run_dir / 'path.png').exists()


SHORT_OF_MEMORY = """
import torch

from main import main
from runtime import ranks
from trainer import ExampleDiffusionTrainer


class Mine(ExampleDiffusionTrainer):
    def draw(self, model_fn, inputs, solver):
        if self.step in (6, 12) and len(inputs.x1) != 2 and ranks.rank() == ranks.world_size() - 1:
            raise torch.OutOfMemoryError('CUDA out of memory on purpose')
        return super().draw(model_fn, inputs, solver)


if __name__ == '__main__':
    main(trainer_class=Mine)
"""


@pytest.mark.slow
@pytest.mark.parametrize('nproc', [1, 2])
def test_too_little_memory_to_draw_costs_only_the_drawing(tiny_config, build_trainer, run_sh, tmp_path, nproc):
    """The last rank runs out of memory: the others give up that drawing too, also for the final metrics."""
    script = tmp_path / 'mine.py'
    script.write_text(SHORT_OF_MEMORY)
    done = run_sh(str(script), nproc=nproc, sample_every=3, final_eval=True)
    assert done.returncode == 0, done.stderr
    assert f'rank {nproc - 1}: CUDA out of memory on purpose' in done.stdout
    assert 'step 6: not enough memory to draw with adams' in done.stdout
    assert 'step 12: not enough memory to draw with adams' in done.stdout
    run = tmp_path / 'ckpts/run'
    drawn = {path.name.split('_')[1] for path in (run / 'samples').glob('step_*')}
    assert drawn == {'0000003', '0000009'}
    assert saving.load(run / 'last.pt')['finished']
    whole = tiny_config(experiment_name='whole')
    build_trainer(whole).train_loop()
    for line, expected in zip(record_of(run), record_of(whole.run_dir), strict=True):
        assert line['train/loss'] == pytest.approx(expected['train/loss'], rel=1e-5)


def test_samples_that_are_not_finite_are_counted_even_if_each_is_one_number():
    nan = float('nan')
    assert not_finite(torch.tensor([1.0, nan, 2.0])) == 1
    assert not_finite(torch.tensor([[1.0, nan], [nan, nan], [0.0, 1.0]])) == 2


class Ignoring(ExampleDiffusionTrainer):
    """One step, whatever the solver, with its own noise."""

    def draw(self, model_fn, inputs, solver):
        t = torch.ones(len(inputs.x1))
        self.log('drawn', 1.0)
        return inputs.x1 - model_fn(inputs.x1, t, inputs.label) + torch.randn_like(inputs.x1)


class Obeying(Ignoring):
    def draw(self, model_fn, inputs, solver):
        return super(Ignoring, self).draw(model_fn, inputs, solver, num_steps=3)


def test_one_way_of_sampling_is_drawn_and_judged_once(tiny_config, build_trainer, capsys, monkeypatch):
    """Its samples would be judged twice, as adams and as sde_dpmpp_2m, and seem to confirm each other."""
    monkeypatch.setattr(judge, 'NUM_JUDGED', 32)
    config = tiny_config(experiment_name='ignoring', final_eval=True, sample_every=12)
    trainer = build_trainer(config, Ignoring)
    trainer.train_loop()
    assert 'draw of Ignoring ignores the solver: its samples are drawn once' in capsys.readouterr().out
    last = record_of(config.run_dir)[-1]
    assert {name.split('/')[1] for name in last if name.startswith('final/')} == {'adams'}
    assert not any('drawn' in name for line in record_of(config.run_dir)[:-1] for name in line)  # not from the trial
    assert list(build_trainer(tiny_config(experiment_name='obeying'), Obeying).samplers()) == ['adams', 'sde_dpmpp_2m']
    assert list(build_trainer(tiny_config(experiment_name='plain')).samplers()) == ['adams', 'sde_dpmpp_2m']


def test_whether_a_draw_obeys_is_found_out_on_one_process(tiny_config, build_trainer, monkeypatch):
    """A hook of rank 0 may be the first to ask for the samplers: no other rank would answer."""
    trainer = build_trainer(tiny_config(), Obeying)
    monkeypatch.setattr(ranks.dist, 'all_reduce', lambda *_, **__: pytest.fail('it talks to the other ranks'))
    monkeypatch.setattr(ranks.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(ranks.dist, 'get_world_size', lambda *_: 2)
    monkeypatch.setattr(ranks.dist, 'get_rank', lambda *_: 0)
    with ranks.as_one_process():
        assert not trainer.drawing.ignores_solver


class Own(ExampleDiffusionTrainer):
    """Random inputs from its own hook, and a draw that treats one solver differently."""

    couple = None

    def sample_inputs(self, n):
        return SampleInputs(torch.randn(n, *self.example.x0.shape[1:]))

    def draw(self, model_fn, inputs, solver):
        return inputs.x1 if solver == 'heun' else 2 * inputs.x1


def test_inputs_of_an_experiment_are_the_same_every_time_whatever_was_drawn_before(tiny_config, build_trainer):
    """Otherwise rank 0 would show and judge the samples of other ranks next to its own inputs."""
    drawing, seen = build_trainer(tiny_config(), Own).drawing, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        seen.append(drawing.inputs(4).x1)
    assert seen[0].equal(seen[1])


def test_solvers_are_compared_with_the_configs(tiny_config, build_trainer):
    assert not build_trainer(tiny_config(solver='heun'), Own).drawing.ignores_solver
    assert build_trainer(tiny_config(experiment_name='other'), Own).drawing.ignores_solver


def test_pairs_are_named_where_an_sde_is_refused(tiny_config, build_trainer, capsys):
    class Coupled(ExampleDiffusionTrainer):
        def couple(self, x0, x1, label):
            return x1.flip(0)

    with pytest.raises(SettingError, match='which would be wrong: `couple` pairs x0 and x1'):
        build_trainer(tiny_config(solver='sde_dpmpp_2m'), Coupled)
    assert 'Coupled.independent is False: x0 and x1 are paired, so samples start from x1' in capsys.readouterr().out


def test_every_process_and_every_batch_draws_with_its_own_noise(tiny_config, build_trainer, monkeypatch):
    trainer, drawn = build_trainer(tiny_config(batch_shards=4, accumulation_steps=4)), []
    assert trainer.batches.images_at_once == 8
    for rank in range(2):
        monkeypatch.setattr(ranks, 'rank', lambda rank=rank: rank)
        monkeypatch.setattr(ranks, 'my_items', lambda n: list(range(n)))
        sampler = lambda model_fn, inputs: torch.randn_like(inputs.x1)  # noqa: E731
        drawn += trainer.drawing.samples(sampler, trainer.network, trainer.sample_inputs(16)).split(8)
    assert len({part.sum().item() for part in drawn}) == 4


def test_an_own_draw_from_own_inputs_that_ignores_the_solver_is_seen(tiny_config, build_trainer):
    class Own(Ignoring):
        def sample_inputs(self, n):
            return SampleInputs(torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.int64))

    assert build_trainer(tiny_config(), Own).drawing.ignores_solver


def test_a_path_is_decoded_in_eval_mode(tiny_config, build_trainer):
    trainer, modes = build_trainer(tiny_config()), []
    trainer.network.train()
    trainer.decode = lambda x: modes.append(trainer.network.training) or x
    trainer.drawing.path(partial(trainer.draw, solver='euler'), lambda xt, t, label: xt, trainer.sample_inputs(2))
    assert len(modes) > 2 and not any(modes) and trainer.network.training
