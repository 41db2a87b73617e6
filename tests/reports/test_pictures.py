"""Pictures of a run: samples and their inputs, class names, paths, and hooks of an experiment."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from config import Config
from data_loading.toy2d import TOY2D
from data_utils import DATASETS, DataSpec
from reports import pictures, plots
from reports.kinds import KINDS
from reports.plots import GAP, LINE_HEIGHT, Panel, rendered_text
from tests.helpers import TINY, record_of
from trainer import ExampleDiffusionTrainer
from training.drawing import State
from training.experiment import SampleInputs


def panels_of(gallery):
    """A list that collects the panels that the gallery draws."""
    panels, drawn = [], gallery.draw_items
    gallery.draw_items = lambda *args, **settings: panels.append(Panel(*args, **settings)) or drawn(*args, **settings)
    return panels


def draw(panel):
    return KINDS['images'][1](panel)


@pytest.fixture
def gallery(tiny_config, build_trainer):
    """The gallery of an experiment with 10 classes and an identity `decode`; `panels` collects what it draws."""
    trainer = build_trainer(tiny_config())
    trainer.decode = lambda x0: x0
    trainer.gallery.panels = panels_of(trainer.gallery)
    return trainer.gallery


def test_samples_are_below_data_of_their_class_and_nothing_else(gallery):
    """The noise that they were made from is not shown."""
    x, label = torch.rand(30, 1, 8, 8), torch.arange(30) % 10
    picture = gallery.picture_of(x, SampleInputs(torch.randn(30, 1, 8, 8), label), 'mine')
    (panel,) = gallery.panels
    data, names = gallery.real_data
    assert panel.title == 'mine' and torch.equal(panel.x, torch.cat([data, x])) and panel.real == len(data)
    assert panel.names == [*names, *map(str, label.tolist())] and set(names) == set(panel.names)
    train, labels = gallery.batches.train_loader.everything()
    found = (data[:10, None] == gallery.experiment.encode(train)[None]).flatten(2).all(2).int().argmax(1)
    assert labels[found].tolist() == list(map(int, names[:10]))  # each belongs to the class that it is shown for
    assert picture.shape[2] < 600


def test_samples_made_from_data_are_to_the_right_of_their_inputs_and_the_truth(gallery, monkeypatch):
    """Each panel has a title; data that cannot be drawn are left out."""
    calls, joined = [], plots.join_pictures
    monkeypatch.setattr(plots, 'join_pictures', lambda parts, *gap: calls.append(parts) or joined(parts, *gap))
    x, given, truth, odd = torch.rand(6, 1, 8, 8), torch.rand(6, 3, 8, 8), torch.rand(6, 1, 8, 8), torch.rand(6, 5)
    inputs = SampleInputs(truth, torch.arange(6) % 3, truth=truth, given=[odd, given])
    whole = gallery.picture_of(x, inputs, 'mine')
    assert [panel.title for panel in gallery.panels] == ['given', 'truth', 'samples']
    for panel, part in zip(gallery.panels, (given, truth, x), strict=True):
        assert torch.equal(panel.x, part) and panel.names == ['0', '1', '2'] * 2 and panel.real == 0
    assert any(torch.equal(whole, plots.titled(joined(parts), 'mine')) for parts in calls if len(parts) == 3)
    assert [block.rows for block in gallery.panels[0].blocks()] == [[[0, 1, 2], [3, 4, 5]]]
    assert gallery.picture_of(odd, inputs) is None


@pytest.mark.parametrize(
    ('classes', 'columns', 'shown'),
    [(0, 8, 56), (2, 10, 60), (3, 9, 54), (10, 10, 60), (17, 17, 51), (20, 20, 60), (37, 10, 37), (1000, 10, 100)],
)
def test_all_classes_are_shown(tiny_config, build_trainer, monkeypatch, classes, columns, shown):
    """Each class equally often; a few classes have a column each."""

    def load(config):
        parts = DATASETS['digits'].load(config)
        return tuple((x, torch.arange(len(x)) % max(1, classes)) for x, _ in parts)

    monkeypatch.setitem(DATASETS, 'some', DataSpec(load, (1, 8, 8), classes, 16))
    trainer = build_trainer(tiny_config(dataset='some'))
    assert (trainer.data.columns(), trainer.gallery.num_shown) == (columns, shown)
    label = trainer.sample_inputs(shown).label
    assert len(label.unique()) >= min(classes, 100)
    names = trainer.data.class_names(label, trainer.config.label_dropout)
    assert names == ([] if classes == 0 else [str(i % classes) for i in range(shown)])


@pytest.fixture
def seen(monkeypatch):
    """name -> picture, for all pictures in the record."""
    found = {}
    monkeypatch.setattr('logging_utils.Record.picture', lambda self, name, picture, *_: found.update({name: picture}))
    return found


def test_the_picture_of_a_run_has_a_title_class_names_and_data(tiny_config, build_trainer, monkeypatch, seen):
    spec = DATASETS['digits']
    names = ('zero', 'один', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
    monkeypatch.setitem(DATASETS, 'digits', DataSpec(spec.load, (1, 8, 8), 10, 16, classes=names))
    settings = dict(num_training_steps=3, warmup_steps=1, sample_every=3, label_dropout=0.1, guidance_scale=2.0)
    build_trainer(tiny_config(**settings)).train_loop()
    grid = seen['step_0000003_adams_ema_0.999']
    title = 'adams, 2 evaluations, ema 0.999, guidance 2, step 3'
    width = plots.text_width(title) + 4
    assert torch.equal(grid[:, :LINE_HEIGHT, :width], rendered_text(title, width))
    margin = plots.text_width('data') + 4
    for i, name in enumerate(names):
        place = grid[:, LINE_HEIGHT : 2 * LINE_HEIGHT, margin + GAP + (48 + GAP) * i :][:, :, :48]
        assert torch.equal(place, rendered_text(name, 48))
    rows = 2 * LINE_HEIGHT + GAP + 7 * (48 + GAP) + plots.APART  # one row of data, six of samples
    assert grid.shape == (3, rows, margin + GAP + 10 * (48 + GAP))
    assert not any('raw' in name for name in seen)


def test_a_title_has_the_guidance_that_draw_was_called_with(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(label_dropout=0.1, guidance_scale=2.0))
    for settings, expected in (dict(guidance_scale=3.5), 'guidance 3.5, step 0'), ({}, 'guidance 2, step 0'):
        trainer.draw(trainer.get_model_fn(trainer.network), trainer.sample_inputs(2), 'euler', num_steps=1, **settings)
        assert trainer.gallery.title('mine', 'raw').endswith(expected)


def test_the_data_are_shown_as_read_and_as_trained_by_class(tiny_config, build_trainer, seen):
    trainer = build_trainer(tiny_config(num_training_steps=3, warmup_steps=2, translate_prob=1.0))
    panels = panels_of(trainer.gallery)
    trainer.train_loop()
    read, trained = [panel for panel in panels if panel.title.startswith('as ')]
    assert (read.title, trained.title) == ('as read', 'as trained') and len(read.x) == 30
    assert read.names == trained.names == [str(i % 10) for i in range(30)]
    train = trainer.decode(trainer.encode(trainer.batches.train_loader.everything()[0])).flatten(1)
    near = [torch.cdist(panel.x.flatten(1), train).amin(1) < 1e-3 for panel in (read, trained)]
    assert near[0].all() and not near[1].all()  # only the panel `as read` has items of the data
    assert torch.equal(seen['data_and_augmented'], plots.join_pictures([*map(draw, (read, trained))]))


def test_items_that_points_are_made_from_are_not_shown_by_the_hundred(build_trainer, tmp_path):
    """Pairs of points are read, and one of each pair is trained on: once, the picture was 7000 pixels high."""

    class First(ExampleDiffusionTrainer):
        def prepare_batch_fn(self, batch, is_train):
            prepared = super().prepare_batch_fn(batch, is_train)
            return dataclasses.replace(prepared, x_original=torch.stack([batch[0]] * 3, 1))

    config = Config(
        dataset='moons', network='mlp', global_batch_size=256, ckpt_dir=str(tmp_path), experiment_name='run'
    )
    trainer = build_trainer(config, First)
    panels = panels_of(trainer.gallery)
    trainer.gallery.show_data()
    read, trained = panels
    assert len(read.x) == len(read.names) == 50 and len(trained.x) == len(trained.names) == 256


def test_a_path_has_times_classes_and_predictions(tiny_config, build_trainer, seen):
    trainer = build_trainer(tiny_config(num_sample_steps=5))
    panels = panels_of(trainer.gallery)
    trainer.gallery.sample_paths()
    (panel,) = panels
    inputs, fn = trainer.drawing.inputs(4), trainer.get_model_fn(trainer.weights()['ema_0.999'])
    states = trainer.drawing.path(lambda fn, given: trainer.draw(fn, given, 'adams'), fn, inputs)
    assert len(states) == 6 and panel.names == ['0', 'x0', '1', 'x0', '2', 'x0', '3', 'x0']
    assert [*panel.times] == [f't={state.t:.3g}' for state in states]  # noise and five steps, all shown
    x = panel.x.view(4, 2, 6, 1, 8, 8)
    for i, state in enumerate(states):
        torch.testing.assert_close(x[:, 0, i], state.x)
        torch.testing.assert_close(x[:, 1, i], state.x0)
    assert torch.equal(seen['path'], draw(panel)) and panel.title.startswith('adams') and 'step 0' in panel.title
    assert panel.title.endswith(': states, with the predicted x0 below each')


def test_columns_of_a_path_are_where_samples_change(gallery):
    """At most ten of 40 states, most of them equal: the first, the last, and some between."""
    places = torch.cat([torch.zeros(20), torch.arange(5), torch.full((15,), 4.0)])
    states = [
        State(1 - k / 39, torch.full((2, 1, 8, 8), float(x)), torch.zeros(2, 1, 8, 8)) for k, x in enumerate(places)
    ]
    gallery.path_of(states, None)
    (panel,) = gallery.panels
    shown = panel.x.view(2, 2, -1, 64)[0, 0, :, 0].tolist()
    assert shown[0] == 0 and shown[-1] == 4 and set(shown) == {0, 1, 2, 3, 4} and len(shown) <= 10
    gallery.path_of(states[:1], None)  # the last stage of a sampler may have only one state
    assert gallery.panels[-1].times == ['t=1']


@pytest.mark.slow
def test_a_run_on_points_shows_their_paths(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setattr(pictures, 'POINTS_SHOWN', 50)
    panels = []
    fits, draw = KINDS['points']
    monkeypatch.setitem(KINDS, 'points', (fits, lambda panel: panels.append(panel) or draw(panel)))
    config = tiny_config(dataset='moons', network='mlp', num_training_steps=3, warmup_steps=1, sample_every=3)
    build_trainer(config).train_loop()
    path = panels[-1]
    assert path.times and path.x.shape == (4 * 2 * (1 + config.num_sample_steps), 2)
    assert path.names[::2] == ['0', '1', '0', '1'] and (config.run_dir / 'path.png').exists()
    assert path.title.endswith(': paths from the black dots')
    samples = [panel for panel in panels if panel.title.startswith('adams') and not panel.times]
    assert len(samples) == 1 and len(samples[0].x) == 50 and samples[0].density == TOY2D['moons'].density


@pytest.mark.parametrize(('shape', 'shown'), [((2, 8, 8), 24), ((5, 8, 8), 56), ((2, 20), 56), ((1, 4, 4, 4), 24)])
def test_a_run_on_floats_shows_them_and_kinds_that_a_user_adds(tiny_config, build_trainer, monkeypatch, shape, shown):
    load = lambda config: tuple((torch.randn(40, *shape), torch.zeros(40)) for _ in range(2))  # noqa: E731
    monkeypatch.setitem(DATASETS, 'floats', DataSpec(load, scale='float'))
    own = []
    if shape[0] == 5:
        draw = KINDS['fields'][1]
        mine = (lambda x: x.shape[1:] == shape, lambda panel: own.append(panel.title) or draw(panel))
        monkeypatch.setitem(KINDS, 'mine', mine)
    network = 'unet' if len(shape) == 3 else 'mlp'
    config = tiny_config(dataset='floats', network=network, num_training_steps=2, warmup_steps=1, sample_every=2)
    trainer = build_trainer(config)
    trainer.train_loop()
    assert trainer.gallery.num_shown == shown
    names = {path.name for path in config.run_dir.rglob('*.png')}
    assert {'data_and_augmented.png', 'path.png', 'step_0000002_adams_ema_0.999.png'} <= names
    assert ('as read' in own) == (shape[0] == 5)


def test_paths_have_the_same_noise_whatever_was_drawn_before(tiny_config, build_trainer, seen):
    trainer, pictures = build_trainer(tiny_config(solver='sde_dpmpp_2m')), []
    inputs = trainer.sample_inputs(4)
    trainer.sample_inputs = lambda n: inputs  # inputs that draw no random numbers
    for seed in range(2):
        torch.manual_seed(seed)
        trainer.gallery.sample_paths()
        pictures.append(seen.pop('path'))
    assert pictures[0].equal(pictures[1])


# ---------------------------------------------------------------- hooks on rank 0

HOOKS = """
import torch

from main import main
from trainer import ExampleDiffusionTrainer, SampleInputs


class Mine(ExampleDiffusionTrainer):
    def samplers(self):
        return {'mine': lambda model_fn, inputs: self.draw(model_fn, inputs, 'adams')}

    def prepare_batch_fn(self, batch, is_train):  # processes have different numbers of held-out images
        made = super().prepare_batch_fn(batch, is_train)
        if self.step >= 6:
            x0 = self.draw(self.get_model_fn(self.network), SampleInputs(made.x1, made.label), 'adams', num_steps=2)
            made.x0 = made.x0 + 0.1 * x0.clamp(-1, 1)
        return made

    def loss_fn(self, batch, model_fn):
        if not torch.is_grad_enabled() and self.step >= 6:
            self.draw(model_fn, SampleInputs(batch.x1, batch.label), 'euler', num_steps=1)
        return super().loss_fn(batch, model_fn)

    def again(self, inputs):
        return self.decode(self.draw(self.get_model_fn(self.network), inputs, 'euler', num_steps=3))

    def show(self, name, x, inputs):
        inputs.given = [self.again(inputs)]
        super().show(name, x, inputs)

    def sample_metrics(self, x, inputs):
        values = super().sample_metrics(x, inputs)
        return dict(own=float(self.again(inputs).mean()), n=len(x), frechet=values['frechet'])

    def after_sampling(self, name, x, inputs):
        self.log('after/mean', self.again(inputs))
        self.log(f'after/{name}', float(len(x)))
        self.picture(f'{name}_after', torch.full((3, 4, 5), 7, dtype=torch.uint8))


if __name__ == '__main__':
    main(trainer_class=Mine)
"""


@pytest.mark.slow
def test_hooks_that_draw_give_equal_results_on_one_and_two_processes(run_sh, tmp_path):
    script = tmp_path / 'mine.py'
    script.write_text(HOOKS)
    records, images = [], []
    for nproc in (1, 2):
        settings = dict(sample_every=6, eval_metrics_every=6, final_eval=True, raw_pictures=True)
        settings |= dict(experiment_name=f'on{nproc}')
        done = run_sh(str(script), nproc=nproc, timeout=150, **settings)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / f'ckpts/on{nproc}'
        records.append({line['train/step']: line for line in record_of(folder)})
        paths = sorted((folder / 'samples').glob('step_*.png'))
        images.append({path.name: np.array(Image.open(path)).astype(int) for path in paths})
    one, two = records
    assert one[12]['final/mine/n'] == 1000 and 0 < one[12]['final/mine/own'] < 1 and one[6]['eval/mine/frechet'] > 0
    assert one[12]['eval/mine/own'] == one[12]['final/mine/own']
    names = [f'step_{step:07d}_mine_{weights}' for step, weights in itertools.product((6, 12), ('ema_0.999', 'raw'))]
    for name in names:
        assert one[int(name[5:12])][f'after/{name[13:]}'] == 60 and 'after/mean' in one[12]
    assert set(images[0]) == {f'{name}{end}.png' for name in names for end in ('', '_after')} == set(images[1])
    for step in (6, 12):
        assert two[step] == pytest.approx(one[step], rel=1e-3)  # sums are in another order
    for name, image in images[0].items():
        assert image.shape == images[1][name].shape and np.abs(image - images[1][name]).max() <= 3, name


def test_after_sampling_follows_each_picture_and_its_values_are_recorded(tiny_config, build_trainer, monkeypatch):
    calls, histograms = [], {}
    monkeypatch.setattr(
        'logging_utils.Record.histogram', lambda self, name, values, step: histograms.update({(name, step): values})
    )

    class Mine(ExampleDiffusionTrainer):
        def show(self, name, x, inputs):
            calls.append(('show', name))

        def after_sampling(self, name, x, inputs):
            calls.append(('after', name))
            self.log('after/brightness', x)
            self.picture(f'{name}_mine', (255 * x[0]).byte().expand(3, -1, -1))
            self.histogram('grey levels', x)
            brightness.append(float(x.mean()))

    brightness: list[float] = []
    config = tiny_config(sample_every=12, raw_pictures=True)
    build_trainer(config, Mine).train_loop()
    ways = itertools.product(('adams', 'sde_dpmpp_2m'), ('ema_0.999', 'raw'))
    names = [f'step_0000012_{sampler}_{weights}' for sampler, weights in ways]
    assert calls == [(hook, name) for name in names for hook in ('show', 'after')]
    last = record_of(config.run_dir)[-1]
    assert last['after/brightness'] == pytest.approx(np.mean(brightness), rel=1e-5)
    assert all((config.run_dir / f'samples/{name}_mine.png').is_file() for name in names)
    ((name, step), values), *rest = histograms.items()
    assert (name, step, rest) == ('grey levels', 12, []) and values.shape == (60, 1, 8, 8)


def test_an_experiment_may_have_no_samplers(tiny_config, build_trainer):
    class Mine(ExampleDiffusionTrainer):
        def samplers(self):
            return {}

    config = tiny_config(sample_every=6, eval_metrics_every=6, final_eval=True)
    build_trainer(config, Mine).train_loop()
    assert 'eval/loss' in record_of(config.run_dir)[-1]


# ---------------------------------------------------------------- paths


def test_a_path_ends_with_the_samples_scaled_to_the_variance_of_noise(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    inputs, fn, drawn = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network), []
    states = trainer.drawing.path(lambda fn, given: drawn.append(trainer.draw(fn, given, 'adams')), fn, inputs)
    assert len(states) == 3 and torch.equal(states[0].x, trainer.decode(inputs.x1))
    end = trainer.process(torch.tensor([trainer.config.t_min]))
    assert torch.allclose(states[-1].x, trainer.decode(drawn[0] / torch.hypot(end.alpha, end.sigma)), atol=0.01)
    assert trainer.drawing.path(lambda fn, given: torch.zeros(3), fn, inputs) == []
    states = trainer.drawing.path(lambda fn, given: trainer.draw(fn, given, 'euler', t_min=0.5), fn, inputs)
    x = trainer.draw(fn, inputs, 'euler', t_min=0.5)
    assert torch.allclose(states[-1].x, trainer.decode(x / 0.5**0.5), atol=1e-5)


@pytest.mark.parametrize('solver', ['adams', 'heun', 'sde_dpmpp_2m'])
def test_a_path_has_the_x0_that_the_guided_network_predicts_at_each_state(tiny_config, build_trainer, solver):
    trainer = build_trainer(tiny_config(label_dropout=0.1, guidance_scale=3.0, num_sample_steps=4))
    for parameter in trainer.network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    trainer.decode = lambda x: x
    inputs, fn, process = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network), trainer.process
    states = trainer.drawing.path(lambda fn, given: trainer.draw(fn, given, solver), fn, inputs)
    assert [state.t for state in states] == sorted((state.t for state in states), reverse=True) and len(states) == 5
    for k, state in enumerate(states[:-1]):
        t = torch.full((3,), state.t, dtype=torch.float64)
        coefs = process(t[:1].float())
        xt = state.x * (coefs.sigma if k == 0 else torch.hypot(coefs.alpha, coefs.sigma))
        with torch.no_grad():
            plain, null = (fn(xt, t.float(), label) for label in (inputs.label, torch.full_like(inputs.label, 10)))
        velocity = null + 3 * (plain - null)
        torch.testing.assert_close(state.x0, xt - state.t * velocity, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(states[-1].x0, states[-2].x0)  # the network is not evaluated at the last time


def test_the_path_of_a_sampler_with_two_stages_is_from_the_last_stage(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    inputs, fn = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network)

    def stages(fn, given):
        small = SampleInputs(given.x1[..., :4, :4], given.label)
        trainer.draw(lambda x, t, label: x, small, 'euler')
        return trainer.draw(fn, given, 'euler')

    states = trainer.drawing.path(stages, fn, inputs)
    assert [tuple(part.shape) for state in states for part in state[1:]] == [(3, 1, 8, 8)] * 4


@pytest.mark.parametrize(('channels', 'shown'), [(1, 56), (2, 24), (5, 8), (40, 8)])
def test_pictures_have_fewer_samples_with_many_channels(tiny_config, build_trainer, monkeypatch, channels, shown):
    load = lambda config: tuple((torch.rand(40, channels, 8, 8), torch.zeros(40)) for _ in range(2))  # noqa: E731
    monkeypatch.setitem(DATASETS, 'layers', DataSpec(load, scale='float'))
    trainer = build_trainer(tiny_config(dataset='layers', num_training_steps=2, warmup_steps=1))
    gallery = trainer.gallery
    trainer.train_loop()
    assert gallery.num_shown == shown and gallery.kind == 'fields'


def test_the_end_of_a_run_prints_full_paths_if_the_user_is_in_another_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('RUN_CALLER', str(tmp_path / 'elsewhere'))
    main.train(Config(**TINY | dict(num_training_steps=3)), None)
    assert f'checkpoint  {tmp_path}/ckpts/' in capsys.readouterr().out


def test_the_end_of_a_run_names_only_files_that_exist(tiny_config, capsys):
    main.train(tiny_config(experiment_name='run', final_pictures=False), None)
    named = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith('  ')]
    assert named and all(Path(path).exists() for path in named)
    assert not any(path.endswith('report.html') for path in named)  # tests write none
