"""Pictures of a run: samples and what they were made from, names of classes, paths, and hooks of an experiment."""

import itertools
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from config import Config
from data_utils import DATASETS, DataSpec
from optimizers import get_lr
from reports import pictures, plots
from reports.pictures import Gallery, kind
from reports.plots import GAP, LINE_HEIGHT, image_grid, next_to_each_other, rendered_text
from tests.helpers import TINY, record_of
from trainer import ExampleDiffusionTrainer
from training.experiment import SampleInputs


def picture_of(x, given=(), label=None, truth=None, num_classes=0):
    """The picture of samples of an experiment whose data are encoded as they are."""
    spec = DataSpec(lambda config: (), num_classes=num_classes)
    experiment = types.SimpleNamespace(config=Config(dataset='digits'), data=spec, decode=lambda x0: x0)
    gallery = Gallery(experiment, None, None, None)
    return gallery.picture_of(x, SampleInputs(torch.zeros(len(x)), label, truth=truth, given=list(given)))


@pytest.mark.parametrize(
    ('shape', 'expected'),
    [((5, 1, 8, 8), 'images'), ((5, 3, 8, 8), 'images'), ((5, 2), 'points'), ((5, 2, 8, 8), 'images'), ((5, 3), None)],
)
def test_kind_is_read_off_the_shape(shape, expected):
    assert kind(torch.zeros(shape)) == expected
    assert (picture_of(torch.zeros(shape)) is None) == (expected is None)


def test_samples_are_on_the_right_of_what_they_were_made_from_and_the_truth():
    """What is of another kind is left out; without `given`, what they were made from is x1."""
    x, given, truth, points = torch.rand(5, 1, 8, 8), torch.rand(3, 3, 8, 8), torch.rand(5, 1, 8, 8), torch.rand(5, 2)
    grids = [image_grid(part, 8) for part in (given, truth, x)]
    assert torch.equal(picture_of(x, [points, given], truth=truth), next_to_each_other(grids))
    scaled = image_grid(torch.tensor([0.0, 0.75, 1.0])[:, None, None, None].expand(3, 1, 8, 8), 8)
    values = torch.tensor([-3.0, 0.0, 1.0])[:, None, None, None].expand(3, 1, 8, 8)
    assert torch.equal(picture_of(values, [x]), next_to_each_other([image_grid(x, 8), scaled]))


def test_points_of_all_sets_are_in_one_picture():
    x, label = torch.randn(50, 2), torch.arange(50) % 2
    assert picture_of(x).shape == (3, 400, 400)
    assert torch.equal(picture_of(x, [x], truth=x), plots.scatter([x, x, x], ['x1', 'x0', 'samples']))
    coloured = picture_of(x, [-x], label=label, num_classes=2)
    assert torch.equal(coloured, plots.scatter([-x, x], ['x1', 'samples'], label))
    assert not torch.equal(coloured, picture_of(x, [-x]))
    images = torch.rand(50, 1, 8, 8)  # cannot be plotted: what is left keeps its title
    assert torch.equal(picture_of(x, [images], truth=-x), plots.scatter([-x, x], ['x0', 'samples']))


@pytest.mark.parametrize(
    ('classes', 'columns', 'shown'),
    [(0, 8, 56), (2, 10, 60), (3, 9, 54), (10, 10, 60), (17, 17, 51), (20, 20, 60), (37, 10, 40), (1000, 10, 100)],
)
def test_all_classes_are_shown(tiny_config, build_trainer, monkeypatch, classes, columns, shown):
    """Each as often as the others, and one a column where they are few."""

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
    """Name -> picture, of all that go into the record."""
    found = {}
    monkeypatch.setattr('logging_utils.Record.picture', lambda self, name, picture, *_: found.update({name: picture}))
    return found


def test_the_picture_of_a_run_has_the_names_of_its_classes(tiny_config, build_trainer, monkeypatch, seen):
    spec = DATASETS['digits']
    names = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
    monkeypatch.setitem(DATASETS, 'digits', DataSpec(spec.load, (1, 8, 8), 10, 16, classes=names))
    build_trainer(tiny_config(num_training_steps=3, warmup_steps=1, sample_every=3)).train_loop()
    grid = seen['step_0000003_adams_ema_0.999']
    first = grid.shape[2] - (2 + 10 * 50)  # the samples are on the right
    assert first == 2 + 10 * 50 + GAP
    for i, name in enumerate(names):
        for left in (0, first):
            title = grid[:, :LINE_HEIGHT, left + 2 + 50 * i : left + 50 + 50 * i]
            assert torch.equal(title, rendered_text(name, 48))
    assert 'data_and_augmented' in seen and seen['path'].shape == (3, 2 + 4 * 50, 2 + 3 * 50)  # 4 images, 2 steps


def test_the_data_are_on_the_left_and_what_training_sees_on_the_right(tiny_config, build_trainer, monkeypatch, seen):
    curves = {}
    trainer = build_trainer(tiny_config(num_training_steps=3, warmup_steps=2, translate_prob=1.0))
    monkeypatch.setattr(
        'logging_utils.Record.curve', lambda self, name, points, x, y: curves.update({name: list(points)})
    )
    trainer.train_loop()
    first = trainer.train_loader.take(trainer.batches.train_sampler.permutation(0)[:32].tolist())[0]
    picture, left = seen['data_and_augmented'], image_grid(first, 8)
    assert torch.equal(picture[:, :, : left.shape[2]], left)
    right = picture[:, :, -left.shape[2] :]
    assert 0.05 < (right != left).float().mean() < 0.9
    assert curves['lr_schedule'] == [(k, get_lr(trainer.config, k)) for k in range(3)]


def test_a_run_on_points_shows_their_paths(tiny_config, build_trainer, monkeypatch):
    monkeypatch.setattr(pictures, 'POINTS_SHOWN', 50)
    drawn = []
    monkeypatch.setattr(
        plots, 'paths', lambda frames, label: drawn.append((frames, label)) or torch.zeros(3, 9, 9).byte()
    )
    config = tiny_config(dataset='moons', network='mlp', num_training_steps=3, warmup_steps=1, sample_every=3)
    build_trainer(config).train_loop()
    ((frames, label),) = drawn
    assert len(frames) == 1 + config.num_sample_steps and frames[0].shape == (4, 2) and label.tolist() == [0, 1, 0, 1]
    assert (config.run_dir / 'path.png').exists()


def test_paths_have_the_same_noise_whatever_was_drawn_before(tiny_config, build_trainer, seen):
    trainer, pictures = build_trainer(tiny_config(solver='sde_dpmpp_2m')), []
    inputs = trainer.sample_inputs(4)
    trainer.sample_inputs = lambda n: inputs  # of an experiment that draws nothing
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

    def prepare_batch_fn(self, batch, is_train):  # held-out images are not as many on each process
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
def test_hooks_that_draw_give_the_same_on_two_processes_as_on_one(run_sh, tmp_path):
    script = tmp_path / 'mine.py'
    script.write_text(HOOKS)
    records, images = [], []
    for nproc in (1, 2):
        settings = dict(sample_every=6, eval_metrics_every=6, final_eval=True, experiment_name=f'on{nproc}')
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
        assert one[int(name[5:12])][f'after/{name}'] == 60 and 'after/mean' in one[12]
    assert set(images[0]) == {f'{name}{end}.png' for name in names for end in ('', '_after')} == set(images[1])
    for step in (6, 12):
        assert two[step] == pytest.approx(one[step], rel=1e-3)  # sums in another order
    for name, image in images[0].items():
        assert image.shape == images[1][name].shape and np.abs(image - images[1][name]).max() <= 3, name


def test_after_sampling_follows_each_picture_and_what_it_records_arrives(tiny_config, build_trainer, monkeypatch):
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
    config = tiny_config(sample_every=12)
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


def test_a_path_ends_with_the_samples_scaled_to_the_width_of_noise(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    inputs, fn, drawn = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network), []
    frames = trainer.drawing.path(lambda fn, given: drawn.append(trainer.draw(fn, given, 'adams')), fn, inputs)
    assert len(frames) == 2
    end = trainer.process(torch.tensor([trainer.config.t_min]))
    assert torch.allclose(frames[-1], trainer.decode(drawn[0] / torch.hypot(end.alpha, end.sigma)), atol=0.01)
    assert trainer.drawing.path(lambda fn, given: torch.zeros(3), fn, inputs) == []
    frames = trainer.drawing.path(lambda fn, given: trainer.draw(fn, given, 'euler', t_min=0.5), fn, inputs)
    x = trainer.draw(fn, inputs, 'euler', t_min=0.5)
    assert torch.allclose(frames[-1], trainer.decode(x / 0.5**0.5), atol=1e-5)


def test_the_path_of_a_sampler_of_two_stages_is_that_of_the_last(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    inputs, fn = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network)

    def stages(fn, given):
        small = SampleInputs(given.x1[..., :4, :4], given.label)
        trainer.draw(lambda x, t, label: x, small, 'euler')
        return trainer.draw(fn, given, 'euler')

    frames = trainer.drawing.path(stages, fn, inputs)
    assert [tuple(frame.shape) for frame in frames] == [(3, 1, 8, 8)] * 2


@pytest.mark.parametrize(('channels', 'shown'), [(1, 56), (2, 24), (5, 8), (40, 8)])
def test_fewer_samples_of_many_channels_are_shown(tiny_config, build_trainer, monkeypatch, capsys, channels, shown):
    load = lambda config: tuple((torch.rand(40, channels, 8, 8), torch.zeros(40)) for _ in range(2))  # noqa: E731
    monkeypatch.setitem(DATASETS, 'layers', DataSpec(load, scale='float'))
    trainer = build_trainer(tiny_config(dataset='layers', num_training_steps=2, warmup_steps=1))
    gallery = trainer.gallery
    trainer.train_loop()
    assert ('pictures show the channels of an image' in capsys.readouterr().out) == (channels > 1)
    assert gallery.num_shown == shown and kind(torch.rand(shown, channels, 8, 8)) == 'images'


def test_the_end_of_a_run_names_files_in_full_where_the_user_stands_elsewhere(tmp_path, monkeypatch, capsys):
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('RUN_CALLER', str(tmp_path / 'elsewhere'))
    main.train(Config(**TINY | dict(num_training_steps=3)), None)
    assert f'checkpoint  {tmp_path}/ckpts/' in capsys.readouterr().out


def test_the_end_of_a_run_names_only_what_is_there(tiny_config, capsys):
    main.train(tiny_config(experiment_name='run', final_pictures=False), None)
    named = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith('  ')]
    assert named and all(Path(path).exists() for path in named)
    assert not any(path.endswith('report.html') for path in named)  # tests write none
