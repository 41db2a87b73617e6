"""The entries of KINDS: heat maps with colour bars, curves, points with contours, and a kind that a user adds."""

import warnings

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from data_loading.toy2d import TOY2D
from reports.kinds import COLOURS, KINDS, draw_fields, draw_points, draw_signals, draw_volumes, kind
from reports.plots import GAP, LINE_HEIGHT, Panel, rendered_text, text_width, titled


@pytest.mark.parametrize(
    ('shape', 'expected', 'if_not_images'),
    [
        ((5, 1, 8, 8), 'images', 'fields'),
        ((5, 3, 8, 8), 'images', 'fields'),
        ((5, 2, 8, 8), 'fields', 'fields'),
        ((5, 2), 'points', 'points'),
        ((5, 2, 9), 'signals', 'signals'),
        ((5, 2, 4, 6, 8), 'volumes', 'volumes'),
        ((5, 3), None, None),
        ((5,), None, None),
    ],
)
def test_kind_is_read_off_the_shape(shape, expected, if_not_images):
    assert kind(torch.zeros(shape)) == expected and kind(torch.zeros(shape), are_images=False) == if_not_images


@pytest.mark.parametrize('shape', [(1, 2, 64, 64), (1, 40, 64, 64), (1, 4, 256), (2, 256, 4), (1, 2, 500), (5, 7, 300)])
def test_pictures_of_thin_data_are_not_large(shape):
    """The shorter side of a volume 2 x 64 x 64 was enlarged to 200 pixels, and the longer one with it, to 6700."""
    x = torch.randn(24, *shape)
    draw = KINDS[str(kind(x, are_images=False))][1]
    for real, across in ((12, 10), (0, 2)):
        _, height, width = draw(Panel(x, real=real, across=across)).shape
        rows = 13 * max(max(shape[-2:]) + 42, 400) * (shape[0] if len(shape) == 3 else 1)
        assert width <= 1400 and height <= rows


def test_each_channel_of_a_field_has_its_own_scale_and_colour_bar():
    x = torch.stack([torch.full((2, 4, 4), -3.0), torch.full((2, 4, 4), 5.0)])  # two fields of two channels
    x[:, 1] = torch.tensor([100.0, 300.0])[:, None, None]
    whole = draw_fields(Panel(x))
    assert torch.equal(whole, titled(whole[:, LINE_HEIGHT:], 'a colour scale for each channel'))
    picture = whole[:, LINE_HEIGHT:]
    low, high = (torch.tensor(colormaps['viridis'](k)[:3]).mul(255).round().byte() for k in (0, 255))
    side = (picture.shape[1] - 2 * GAP - 1) // 2
    for channel in range(2):
        y = GAP + channel * (side + 1)
        for i, colour in enumerate((low, high)):
            assert torch.equal(picture[:, y + side // 2, GAP + i * (side + GAP) + 3], colour)
        bar = picture[:, y : y + side, 2 * (side + GAP) + GAP + 2 * GAP :]
        assert torch.equal(bar[:, 0, 0], high) and torch.equal(bar[:, -1, 0], low)
        words = [('5', '-3'), ('300', '100')][channel]
        assert torch.equal(bar[:, :LINE_HEIGHT, 10:], rendered_text(words[0], 52))
        assert torch.equal(bar[:, -LINE_HEIGHT:, 10:], rendered_text(words[1], 52))
        assert text_width(f'{-0.000123:.3g}') <= 52  # an exponent is not cut off
    assert (picture[:, GAP + side, GAP : GAP + side] == 255).all()  # between channels


def test_names_are_above_fields_and_every_value_has_a_colour():
    x = torch.rand(2, 2, 4, 4)
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    plain, named = (draw_fields(Panel(x, names))[:, LINE_HEIGHT:] for names in ((), ['a', 'b']))
    assert torch.equal(named[:, LINE_HEIGHT:], plain)
    low, high = (torch.tensor(colormaps['viridis'](k)[:3]).mul(255).round().byte() for k in (0, 255))
    side = (plain.shape[1] - 2 * GAP - 1) // 8  # pixels per value
    for i, colour in enumerate((low, high, low)):
        assert torch.equal(plain[:, GAP + side // 2, GAP + i * side + side // 2], colour)


def test_a_volume_is_shown_by_its_middle_slices():
    """H x W, D x W below it and H x D at its right: adjacent slices share an axis, and all are on one colour scale."""
    x = torch.rand(2, 1, 3, 4, 5)
    x[0, 0, 0, 0, 0], x[1, 0, 2, 3, 4] = -1, 2  # not in the slices, but in the scale
    whole = draw_volumes(Panel(x))
    note = 'middle slices: H x W, D x W below, H x D at right, one colour scale'
    assert torch.equal(whole[:, :LINE_HEIGHT], titled(whole[:, :1], note)[:, :LINE_HEIGHT])
    colours = torch.tensor(colormaps['viridis'](np.arange(256))[:, :3]).mul(255).round().byte()
    factor = (
        400 // 9
    )  # the shorter side of a slice would have 400 / 2 pixels, but the longer side of all has at most 400
    for i in range(2):
        left = GAP + i * (GAP + 9 * factor)
        cell = whole[:, LINE_HEIGHT + GAP :, left : left + 9 * factor][:, factor // 2 :: factor, factor // 2 :: factor]
        front, below, right = x[i, 0, 1], x[i, 0, :, 2], x[i, 0, :, :, 2].T
        for part, place in ((front, cell[:, :4, :5]), (below, cell[:, 5:8, :5]), (right, cell[:, :4, 6:])):
            assert torch.equal(place, colours[((part + 1) / 3 * 255).round().long()].permute(2, 0, 1))
        assert (cell[:, 4] == 255).all() and (cell[:, :8, 5] == 255).all() and (cell[:, 5:8, 6:] == 255).all()


@pytest.mark.parametrize('shape', [(2,), (1, 8), (1, 4, 4), (1, 4, 4, 4)])
def test_pictures_with_the_same_scale_agree(shape):
    """The same item has the same colours and heights, whatever else is in the picture."""
    x = torch.rand(3, *shape)
    draw = KINDS[str(kind(x, are_images=False))][1]
    few, scaled = draw(Panel(x[:2])), [draw(Panel(part, scale=x * 4 - 1)) for part in (x[:2], x[:2] * 1.0001)]
    assert few.shape[1] == scaled[0].shape[1] and not few.equal(scaled[0])
    assert (scaled[0].int() - scaled[1].int()).abs().float().mean() < 0.1
    assert draw(Panel(x, scale=x)).equal(draw(Panel(x)))


def test_signals_are_curves_on_one_scale_with_a_colour_for_each_channel(monkeypatch):
    titles = []
    monkeypatch.setattr('reports.plots.titled', lambda picture, title: titles.append(title) or picture)
    up = torch.linspace(0, 1, 30)
    picture = draw_signals(Panel(torch.stack([torch.stack([up, 1 - up]), torch.zeros(2, 30)]), title='mine')).int()
    assert titles == ['mine, 30 points, values from 0 to 1']
    wide = 200
    first, second = (picture[:, GAP:-GAP, GAP + i * (wide + GAP) :][:, :, :wide] for i in range(2))
    for i in range(2):  # the first rises, the second falls
        near = ((first[2] - first[0]) * (1, -1)[i] > 60).nonzero()  # blue, orange
        across = np.corrcoef(near[:, 0], near[:, 1])[0, 1]
        assert len(near) > 50 and (across < -0.99 if i == 0 else across > 0.99)
    ink = (second.sum(0) < 600).nonzero()
    assert ink[:, 0].min() > 0.9 * 64 and ink[:, 1].max() - ink[:, 1].min() > 80  # a flat line at the bottom


def test_the_values_of_a_signal_can_be_read_off_an_axis():
    """Light lines in each cell are at the values that are written at the right of the first row."""
    x = torch.tensor([[[-1.0, 3.0, 3.0]], [[-1.0, -1.0, -1.0]]])
    picture = draw_signals(Panel(x))[:, LINE_HEIGHT:]
    cell, axis = picture[:, GAP : GAP + 64, 2 * GAP + 200 : 2 * GAP + 400], picture[:, :, 3 * GAP + 400 + 2 * GAP :]
    levels = cell[0].float().mean(1)  # mean of each row in the second cell
    for i, value in enumerate((3, 2, 1, 0)):
        line, top = 2 + 15 * i, max(2 + 15 * i - LINE_HEIGHT // 2, 0)
        assert 200 < levels[line] < 240 and (levels[line + 3 : line + 12] > 250).all()
        assert torch.equal(axis[:, GAP + top : GAP + top + LINE_HEIGHT], rendered_text(str(value), axis.shape[2]))


def test_the_colours_of_channels_are_named():
    one, two = (draw_signals(Panel(torch.rand(2, channels, 9))) for channels in (1, 2))
    name = rendered_text('channel 1', text_width('channel 1'), COLOURS[1])
    assert (name[2] < 200).any() and (name[0] > 220).all()  # orange: red stays, blue goes
    found = [bool((p.unfold(2, name.shape[2], 1).unfold(1, LINE_HEIGHT, 1).mT == name[:, None, None]).all(0).all(-1)
             .all(-1).any()) for p in (one, two)]  # fmt: skip
    assert found == [False, True]


def pixels_of(picture, colour, near=170):
    wanted = torch.tensor([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
    return ((picture.int() - wanted[:, None, None]).abs().sum(0) < near).nonzero()


def test_points_have_equal_axes_and_a_colour_and_a_name_for_each_class():
    angle = torch.linspace(0, 2 * torch.pi, 401)[:-1]
    x = torch.stack([3 * angle.cos(), angle.sin()], 1)  # three times as wide as high
    names = ['upper' if y > 0 else 'lower' for y in x[:, 1]]
    picture = draw_points(Panel(x, names, title='step 7'))
    assert torch.equal(
        picture[:, :LINE_HEIGHT, : text_width('step 7') + 4], rendered_text('step 7', text_width('step 7') + 4)
    )
    classes = list(dict.fromkeys(names))
    found = [pixels_of(picture[:, : 280 + LINE_HEIGHT], COLOURS[i]) for i in range(2)]
    every = torch.cat(found)
    height, width = (every.amax(0) - every.amin(0)).tolist()
    assert width / height == pytest.approx(3, rel=0.1)
    tops = {name: float(place[:, 0].float().mean()) for name, place in zip(classes, found, strict=True)}
    assert tops['upper'] < tops['lower'] - 20
    assert all(len(pixels_of(picture[:, -40:], COLOURS[i])) > 5 for i in range(2))  # names below the plot
    assert len(pixels_of(draw_points(Panel(x)), COLOURS[1])) == 0  # without classes


def test_points_keep_the_colours_of_their_classes_with_data_behind_them():
    x = torch.tensor([[0.0, 0.0]] * 20 + [[-1.0, 0.0]] * 5 + [[1.0, 0.0]] * 15)
    x[:, 1] = torch.linspace(-1, 1, 40)
    picture = draw_points(Panel(x, ['right'] * 15 + ['left'] * 5 + ['left'] * 5 + ['right'] * 15, real=20))
    left, right = (pixels_of(picture[:, :340], COLOURS[i])[:, 1].float() for i in range(2))
    assert len(left) and len(right) and left.max() < 150 and right.min() > 250


def test_more_classes_than_colours_have_other_marks():
    x = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).repeat(2, 1)
    names = [rf'{i} $\no$' for i in range(8)]  # text, not a formula
    few, many = (draw_points(Panel(x[:n], names[:n])) for n in (7, 8))
    assert not few.equal(many) and len(COLOURS) == 7


def test_contours_of_the_density_and_grey_data_are_behind_the_points():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(TOY2D['eight_gaussians'].draw(rng, 8)[0])
    plain, lined = (draw_points(Panel(x, density=density)) for density in (None, TOY2D['eight_gaussians'].density))
    grey = lambda p: int(((p.int().amax(0) - p.int().amin(0) < 10) & (p[0] > 100) & (p[0] < 200))[20:380, 40:].sum())  # noqa: E731
    assert plain.shape == (3, 400, 400) and lined.shape == (3, 413, 400)  # with a title that explains the grey lines
    assert grey(lined) > grey(plain) + 300
    with_data = draw_points(Panel(torch.cat([torch.rand(300, 2) - 0.5, x]).double(), real=300))
    assert len(pixels_of(with_data, '#c0c0c0', 30)) > len(pixels_of(plain, '#c0c0c0', 30)) + 300
    assert len(pixels_of(with_data, COLOURS[0])) > 8
    right = draw_points(Panel(x, density=lambda p: (-((p - torch.tensor([1.0, 0.0])) ** 2).sum(1) / x.std()).exp()))
    places = ((right[:, 13:].int() - plain.int()).abs().sum(0) > 100).nonzero().float().mean(0)
    assert places[1] > 230 and abs(places[0] - 190) < 20  # the first coordinate is x here too


def test_points_that_are_not_finite_do_not_hide_the_others():
    x = torch.cat([torch.randn(50, 2), torch.full((1, 2), torch.nan), torch.full((1, 2), torch.inf)])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(pixels_of(draw_points(Panel(x)), COLOURS[0])) > 50
        draw_points(Panel(x[50:]))


@pytest.mark.parametrize('far', [100.0, 1e4, 1e30])
def test_points_far_from_the_density_do_not_end_the_run(far):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        picture = draw_points(Panel(torch.tensor([[far, 0.0], [0.0, 0.0]]), density=TOY2D['moons'].density))
    assert len(pixels_of(picture, COLOURS[0])) > 1


def test_paths_of_points_are_lines_from_start_to_end():
    """All go from left to right, so every column between has ink; predictions of x0 are not drawn."""
    start = torch.stack([torch.full((20,), -1.0), torch.linspace(-1, 1, 20)], 1)
    states = torch.stack([start + torch.tensor([step, 0.0]) for step in (0.0, 1.0, 2.0)], 1)  # (n, states, 2)
    x = torch.stack([states, torch.full_like(states, 50)], 1).flatten(0, 2)
    picture = draw_points(Panel(x, ['a', 'x0', 'b', 'x0'] * 10, times=['t 1', 't 0.5', 't 0']))
    ink = (picture.float().mean(0) < 250)[20:360].sum(0)
    assert picture.shape == (3, 400, 400) and (ink[80:320] >= 20).all()
    ends = [pixels_of(picture[:, :360], COLOURS[i])[:, 1].float() for i in range(2)]
    assert all(len(columns) > 20 and columns.mean() > 300 for columns in ends)


def test_the_x_axis_of_points_is_the_first_coordinate():
    points = torch.stack([torch.linspace(-1, 1, 50), torch.linspace(-0.1, 0.1, 50)], 1)
    places = pixels_of(draw_points(Panel(points)), COLOURS[0])
    height, width = (places.amax(0) - places.amin(0)).tolist()
    assert width > 200 and height < 60


def test_a_kind_that_a_user_adds_comes_before_the_built_in_ones(monkeypatch):
    monkeypatch.setitem(KINDS, 'wide', (lambda x: x.ndim == 4 and x.shape[3] == 9, lambda panel: panel.x[0].byte()))
    x = torch.full((5, 3, 4, 9), 7.0)
    assert kind(x) == kind(x, are_images=False) == 'wide' and kind(x[..., :8]) == 'images'
