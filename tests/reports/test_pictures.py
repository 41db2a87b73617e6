"""What a run shows of tensors: grids side by side, scatter plots, and nothing of what is neither."""

import pytest
import torch

from data_utils import DATASETS, DataSpec
from optimizers import get_lr
from reports import pictures
from reports import points as plots
from reports.pictures import GAP, kind, picture_of
from utils import LINE_HEIGHT, image_grid, written


@pytest.mark.parametrize(
    ('shape', 'expected'),
    [((5, 1, 8, 8), 'images'), ((5, 3, 8, 8), 'images'), ((5, 2), 'points'), ((5, 3), None), ((5, 2, 8, 8), None)],
)
def test_kind_is_read_off_the_shape(shape, expected):
    assert kind(torch.zeros(shape)) == expected
    assert (picture_of(torch.zeros(shape), [], 3) is None) == (expected is None)


def test_grids_stand_side_by_side_with_white_between_and_below():
    """What is of another kind is left out; a lower grid is filled up with white."""
    x, beside, points = torch.rand(5, 1, 8, 8), torch.rand(3, 3, 8, 8), torch.rand(5, 2)
    left, right = image_grid(beside, 3), image_grid(x, 3)
    picture = picture_of(x, [points, beside], 3)
    assert picture.shape == (3, right.shape[1], left.shape[2] + GAP + right.shape[2])
    assert torch.equal(picture[:, : left.shape[1], : left.shape[2]], left)
    assert torch.equal(picture[:, :, -right.shape[2] :], right)
    assert (picture[:, left.shape[1] :, : left.shape[2]] == 255).all()
    assert (picture[:, :, left.shape[2] : left.shape[2] + GAP] == 255).all()


def test_values_outside_the_unit_interval_are_scaled_into_it():
    x = torch.stack([torch.full((1, 48, 48), value) for value in (-3.0, 0.0, 1.0)])
    picture = picture_of(x, [], 3)
    assert [picture[0, 20, 20 + 50 * i].item() for i in range(3)] == [0, 191, 255]
    assert torch.equal(picture_of(x / 4 + 0.75, [], 3), picture)  # the same picture within it


def test_points_of_all_sets_are_in_one_picture():
    x, beside = torch.randn(50, 2), torch.randn(50, 2)
    alone, both = picture_of(x, [], 3), picture_of(x, [beside], 3)
    assert alone.shape == (3, 400, 400) and both.shape == (3, 400, 800)
    assert both[:, :, :400].float().std() > 10 and both[:, :, 400:].float().std() > 10


# ---------------------------------------------------------------- names of classes


def test_names_stand_above_the_columns_or_below_each_image():
    x = torch.zeros(6, 1, 48, 48)
    plain = image_grid(x, 3)
    above = image_grid(x, 3, names=['cat', 'dog', 'eel'] * 2)
    assert torch.equal(above[:, LINE_HEIGHT:], plain)
    for i, name in enumerate(('cat', 'dog', 'eel')):
        assert torch.equal(above[:, :LINE_HEIGHT, 2 + 50 * i : 50 + 50 * i], written(name, 48))
    below = image_grid(x, 3, names=['cat', 'dog', 'eel', 'fox', 'gnu', 'hen'])
    assert below.shape == (3, plain.shape[1] + 2 * LINE_HEIGHT, plain.shape[2])
    assert torch.equal(below[:, 50 : 50 + LINE_HEIGHT, 52:100], written('dog', 48))
    assert torch.equal(below[:, 113 : 113 + LINE_HEIGHT, 52:100], written('gnu', 48))
    assert (below[:, 63 + 2 : 63 + 50, 2:50] == 0).all()  # the second row of images


def test_a_name_that_does_not_fit_is_cut():
    def ink(text):
        return written(text, 60) < 128

    assert ink('an').any() and ink('an animal').sum() > ink('an').sum()
    assert torch.equal(written('a long name of an animal', 60), written('a long name of an aardvark', 60))
    assert not torch.equal(written('a long name', 200), written('a long nose', 200))


@pytest.mark.parametrize(
    ('classes', 'columns', 'shown'),
    [(0, 8, 56), (2, 10, 60), (3, 9, 54), (10, 10, 60), (17, 17, 51), (20, 20, 60), (37, 10, 40), (1000, 10, 100)],
)
def test_all_classes_are_shown(tiny_config, build_trainer, monkeypatch, classes, columns, shown):
    """Each as often as the others, and one a column where they are few."""

    def load(config):
        (x, label), held_out = DATASETS['digits'].load(config)
        return (x, label % max(1, classes)), held_out if classes >= 10 else (held_out[0], held_out[1] % max(1, classes))

    monkeypatch.setitem(DATASETS, 'some', DataSpec(load, (1, 8, 8), classes, 16))
    trainer = build_trainer(tiny_config(dataset='some'))
    assert (pictures.columns(trainer), pictures.num_shown(trainer)) == (columns, shown)
    label = trainer.sample_inputs(shown).label
    assert len(label.unique()) >= min(classes, 100)
    names = pictures.names_of(trainer, label)
    assert names == ([] if classes == 0 else [str(i % classes) for i in range(shown)])


def test_the_picture_of_a_run_has_the_names_of_its_classes(tiny_config, build_trainer, monkeypatch):
    seen = {}
    spec = DATASETS['digits']
    names = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
    monkeypatch.setitem(DATASETS, 'digits', DataSpec(spec.load, (1, 8, 8), 10, 16, classes=names))
    trainer = build_trainer(tiny_config(num_training_steps=3, warmup_steps=1, sample_every=3))
    monkeypatch.setattr('logging_utils.Logger.log_picture', lambda self, name, x, *_: seen.update({name: x}))
    trainer.train_loop()
    grid = seen['step_0000003_adams_ema_0.999']
    first = grid.shape[2] - (2 + 10 * 50)  # the samples are on the right
    for i, name in enumerate(names):
        for left in (0, first):
            assert torch.equal(grid[:, :LINE_HEIGHT, left + 2 + 50 * i : left + 50 + 50 * i], written(name, 48))
    assert 'data_and_augmented' in seen and seen['path'].shape == (3, 2 + 4 * 50, 2 + 3 * 50)  # 4 images, 2 steps


def test_an_unconditional_run_has_no_names(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config(label_dropout=1.0))
    assert pictures.names_of(trainer, trainer.sample_inputs(4).label) == []
    some = build_trainer(tiny_config(label_dropout=0.5))
    assert pictures.names_of(some, torch.tensor([3, 10])) == ['3', 'none']


def test_a_path_begins_with_noise_and_ends_with_the_samples(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    inputs, fn = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network)
    usual, drawn = trainer.sample_fn, []
    with torch.no_grad():
        frames = pictures.path(trainer, lambda: drawn.append(trainer.draw(fn, inputs, 'adams')))
    assert trainer.sample_fn is usual and len(frames) == 2
    end = trainer.process(torch.tensor([trainer.config.t_min]))
    scale = torch.hypot(end.alpha, end.sigma)
    assert torch.allclose(frames[-1], trainer.decode(drawn[0] / scale), atol=0.01)
    assert pictures.path(trainer, lambda: torch.zeros(3)) == []


def test_labels_that_are_no_classes_have_no_names(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    for label in (torch.rand(4), torch.tensor([1, 11]), torch.tensor([-1, 1]), torch.zeros(4, 2).long(), None):
        assert pictures.names_of(trainer, label) == []


def test_the_path_of_a_sampler_of_two_stages_is_that_of_the_last(tiny_config, build_trainer):
    trainer = build_trainer(tiny_config())
    inputs, fn = trainer.sample_inputs(3), trainer.get_model_fn(trainer.network)
    usual = dict(label=inputs.label, solver='euler')

    def stages():
        trainer.sample_fn(lambda x, t, label: x, x1=inputs.x1[..., :4, :4], **usual)
        trainer.sample_fn(fn, x1=inputs.x1, **usual)

    with torch.no_grad():
        frames = pictures.path(trainer, stages)
    assert [tuple(frame.shape) for frame in frames] == [(3, 1, 8, 8)] * 2


def test_classes_of_points_have_colours_and_the_density_is_beside():
    x, label = torch.randn(200, 2), torch.arange(200) % 2
    plain, told = (picture_of(x, [x], 3, label=classes) for classes in (None, label))
    assert plain.shape == told.shape == (3, 400, 800) and not plain.equal(told)

    def orange(picture):  # the second colour of tab10
        return int(((picture[0] > 200) & (picture[1] > 90) & (picture[1] < 200) & (picture[2] < 120)).sum())

    assert orange(plain) == 0 < orange(told)
    both = picture_of(x, [x], 3, label=label, density=lambda x: (x[:, 0] > 0).double())
    assert both.shape == (3, 400, 1200) and both[:, :, :800].float().std() > 10
    dark = (both[:, 50:350, 820:].sum(0) < 30).float().mean(0)  # the left half of the last plot is black
    assert dark[60:150].min() > 0.9 and dark[230:340].max() < 0.1


def test_points_that_are_not_finite_leave_the_others_to_be_seen():
    x = torch.cat([torch.randn(50, 2), torch.full((1, 2), torch.nan), torch.full((1, 2), torch.inf)])
    assert picture_of(x, [], 3).float().std() > 10


def test_ways_are_lines_from_start_to_end():
    """All from the left to the right: ink in every column between."""
    start = torch.stack([torch.full((20,), -1.0), torch.linspace(-1, 1, 20)], 1)
    frames = [start + torch.tensor([step, 0.0]) for step in (0.0, 1.0, 2.0)]
    picture = plots.paths(frames, torch.zeros(20).long())
    assert picture.shape == (3, 400, 400)
    ink = (picture.float().mean(0) < 250)[40:360].sum(0)
    assert (ink[80:320] >= 20).all()


def test_a_run_on_points_shows_their_ways(tiny_config, build_trainer, monkeypatch):
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


def test_the_x_axis_of_a_scatter_plot_is_the_first_number():
    points = torch.stack([torch.linspace(-1, 1, 50), torch.zeros(50)], 1)
    picture = picture_of(points, [], 3).int()
    coloured = (picture.amax(0) - picture.amin(0) > 60).nonzero()
    assert coloured[:, 1].max() - coloured[:, 1].min() > 200 > 20 > coloured[:, 0].max() - coloured[:, 0].min()


def test_images_beyond_1_are_scaled():
    picture = picture_of(torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 48, 48), [], 3)
    assert [picture[0, 20, 20 + 50 * i].item() for i in range(3)] == [0, 128, 255]


def test_a_path_is_scaled_to_the_width_of_noise(tiny_config, build_trainer):
    trainer, x = build_trainer(tiny_config()), torch.rand(2, 1, 8, 8) / 4
    trainer.sample_fn = lambda callback=None: callback(0, 0.5, x)
    (frame,) = pictures.path(trainer, lambda: trainer.sample_fn())
    assert torch.allclose(frame, trainer.decode(x / 0.5**0.5))


def test_rows_hold_the_first_and_the_last_frame():
    frames = [torch.full((2, 1, 48, 48), k / 19) for k in range(20)]
    row = pictures.in_rows(frames)[0, 20, 20::50].tolist()
    assert row[0] == 0 and row[-1] == 255 and len(row) == 12 and sorted(set(row)) == row


def test_the_data_are_on_the_left_and_what_training_sees_on_the_right(tiny_config, build_trainer, monkeypatch):
    seen, curves = {}, {}
    trainer = build_trainer(tiny_config(num_training_steps=3, warmup_steps=2, translate_prob=1.0))
    monkeypatch.setattr('logging_utils.Logger.log_picture', lambda self, name, x, *_: seen.update({name: x}))
    monkeypatch.setattr(
        'logging_utils.Logger.log_curve', lambda self, name, points, x, y: curves.update({name: points})
    )
    trainer.train_loop()
    first = trainer.train_loader.take(trainer.train_sampler.permutation(0)[:32].tolist())[0]
    picture, left = seen['data_and_augmented'], image_grid(first, 8)
    assert torch.equal(picture[:, :, : left.shape[2]], left)
    right = picture[:, :, -left.shape[2] :]
    assert 0.05 < (right != left).float().mean() < 0.9
    assert curves['lr_schedule'] == [(k, get_lr(trainer.config, k)) for k in range(3)]
