"""Tensors as pictures: layout and names of grids, enlarged pixels, exact grey levels; plots of points and paths."""

import numpy as np
import pytest
import torch

from data_loading.spec import DataSpec
from reports.plots import (
    GAP,
    LINE_HEIGHT,
    image_grid,
    in_rows,
    next_to_each_other,
    paths,
    rendered_text,
    scatter,
    titles_of,
    within_unit,
)


def test_pictures_stand_next_to_each_other_with_white_between_and_below():
    left, right = (torch.randint(0, 255, (3, h, w), dtype=torch.uint8) for h, w in ((20, 30), (50, 10)))
    picture = next_to_each_other([left, right])
    assert picture.shape == (3, 50, 30 + GAP + 10)
    assert torch.equal(picture[:, :20, :30], left) and torch.equal(picture[:, :, -10:], right)
    assert (picture[:, 20:, :30] == 255).all() and (picture[:, :, 30 : 30 + GAP] == 255).all()


@pytest.mark.parametrize(
    ('values', 'expected'),
    [((-3, 0, 1), (0, 0.75, 1)), ((0, 1, 2), (0, 0.5, 1)), ((0.2, 0.4, 0.9), (0.2, 0.4, 0.9)), ((3, 3, 3), (3, 3, 3))],
)
def test_values_outside_the_unit_interval_are_scaled_into_it(values, expected):
    assert within_unit(torch.tensor(values).float()).tolist() == pytest.approx(expected)


def test_a_value_that_is_not_finite_leaves_the_other_images_visible():
    for high in (1.0, 3.0):  # shown as it is, and scaled
        x = torch.linspace(0, high, 4 * 64).reshape(4, 1, 8, 8)
        bad = torch.cat([torch.tensor([torch.nan, -torch.inf]), x.flatten()[2:]]).view_as(x)
        plain = torch.cat([torch.zeros(2), within_unit(bad).flatten()[2:]]).view_as(x)
        assert torch.equal(image_grid(within_unit(bad), 4), image_grid(plain, 4)) and plain.max() == 1
    assert within_unit(torch.full((3,), torch.nan)).tolist() == [0, 0, 0]


def test_names_stand_above_the_columns_or_below_each_image():
    x = torch.zeros(6, 1, 48, 48)
    plain = image_grid(x, 3)
    above = image_grid(x, 3, names=['cat', 'dog', 'eel'] * 2)
    assert torch.equal(above[:, LINE_HEIGHT:], plain)
    for i, name in enumerate(('cat', 'dog', 'eel')):
        assert torch.equal(above[:, :LINE_HEIGHT, 2 + 50 * i : 50 + 50 * i], rendered_text(name, 48))
    below = image_grid(x, 3, names=['cat', 'dog', 'eel', 'fox', 'gnu', 'hen'])
    assert below.shape == (3, plain.shape[1] + 2 * LINE_HEIGHT, plain.shape[2])
    assert torch.equal(below[:, 50 : 50 + LINE_HEIGHT, 52:100], rendered_text('dog', 48))
    assert torch.equal(below[:, 113 : 113 + LINE_HEIGHT, 52:100], rendered_text('gnu', 48))
    assert (below[:, 63 + 2 : 63 + 50, 2:50] == 0).all()  # the second row of images


def test_a_name_that_does_not_fit_is_cut():
    def ink(text):
        return rendered_text(text, 60) < 128

    assert ink('an').any() and ink('an animal').sum() > ink('an').sum()
    assert torch.equal(rendered_text('a long name of an animal', 60), rendered_text('a long name of an aardvark', 60))
    assert not torch.equal(rendered_text('a long name', 200), rendered_text('a long nose', 200))


def test_rows_hold_the_first_and_the_last_frame():
    frames = [torch.full((2, 1, 48, 48), k / 19) for k in range(20)]
    row = in_rows(frames)[0, 20, 20::50].tolist()
    assert row[0] == 0 and row[-1] == 255 and len(row) == 12 and sorted(set(row)) == row


def test_frames_of_floats_share_one_scale():
    frames = [torch.full((1, 1, 48, 48), value) for value in (280.0, 290.0, 320.0)]
    assert in_rows(frames)[0, 20, 20::50].tolist() == [0, 64, 255]


def test_image_grid_layout():
    """Five grey images of 8x8, enlarged to 48x48, in rows of 3, with gaps of 2 pixels."""
    images = (torch.arange(1, 6) / 10)[:, None, None, None].expand(5, 1, 8, 8)
    picture = image_grid(images, columns=3)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 2 + 2 * 50, 2 + 3 * 50)
    expected = np.full((3, 102, 152), 255)
    for i in range(5):
        y, x = 2 + 50 * (i // 3), 2 + 50 * (i % 3)
        expected[:, y : y + 48, x : x + 48] = round(255 * (i + 1) / 10)
    np.testing.assert_allclose(picture.numpy(), expected, atol=1)


def test_image_grid_enlarges_pixels_to_squares():
    images = torch.zeros(1, 3, 2, 3)
    images[0, 1, 1, 2] = 1
    picture = image_grid(images, columns=1, min_side=5, gap=1)
    assert picture.shape == (3, 2 + 6, 2 + 9)
    inside = torch.zeros(3, 6, 9)
    inside[1, 3:, 6:] = 255
    assert torch.equal(picture[:, 1:-1, 1:-1].float(), inside)


def test_image_grid_clamps_and_leaves_large_images_alone():
    images = torch.full((2, 3, 50, 60), 7.0)
    images[1] = -7
    picture = image_grid(images, columns=2, gap=0)
    assert picture.shape == (3, 50, 120)
    assert (picture[:, :, :60] == 255).all() and (picture[:, :, 60:] == 0).all()


def test_every_grey_level_of_a_grid_is_exact():
    levels = torch.arange(256)
    images = (levels / 255).view(-1, 1, 1, 1).expand(-1, 1, 48, 48)
    assert torch.equal(image_grid(images, columns=16, gap=0)[0, ::48, ::48].flatten().long(), levels)


@pytest.mark.parametrize(('channels', 'drawn'), [(1, '0'), (2, '0 1'), (3, '012'), (4, '012 3'), (5, '0 1 2 3 4')])
def test_all_channels_are_drawn_below_each_other(channels, drawn):
    images = torch.rand(3, channels, 48, 48)
    parts = [images[:, [int(i) for i in part]] for part in drawn.split()]
    grids = [image_grid(part, 2, gap=0) for part in parts]
    picture = image_grid(images, 2, gap=0)
    assert picture.shape[1] == 2 * 48 * len(parts)
    for row in range(2):
        for i, grid in enumerate(grids):
            top = 48 * (len(parts) * row + i)
            assert torch.equal(picture[:, top : top + 48], grid[:, 48 * row : 48 * row + 48])


@pytest.mark.parametrize('name', ['вино и сыр', 'καλός', 'crème', 'Łódź'])
def test_names_in_other_alphabets_are_drawn(name):
    """Each letter in its own way, none as the box that stands for a letter that the font lacks."""
    letters = [c for c in name if c != ' ']
    drawn = {c: rendered_text(c, 16) for c in letters}
    box = rendered_text('\uffff', 16)
    assert len({picture.numpy().tobytes() for picture in drawn.values()}) == len(set(letters))
    assert not any(torch.equal(picture, box) for picture in drawn.values())


def test_a_name_that_no_font_has_is_shown_as_its_number(capsys):
    spec = DataSpec(lambda config: (), num_classes=3, classes=('dog', '\u732b', '\u72ac'))
    for _ in range(2):
        assert titles_of(spec, torch.tensor([0, 1, 2, 3]), 0.1) == ['dog', '1', '2', 'none']
    assert capsys.readouterr().out.count('pictures show the numbers of such classes') == 1
    assert titles_of(spec, None, 0.1) == []


def test_the_headings_are_those_of_the_first_row_and_centred():
    grid = image_grid(torch.zeros(5, 1, 48, 48), 3, names=['cat', 'dog', 'eel', 'cat', 'dog'])
    assert torch.equal(grid[:, :LINE_HEIGHT, 2:50], rendered_text('cat', 48))
    dark = (rendered_text('an', 60) < 128).any(0).any(0).nonzero()
    assert abs((dark[0] + dark[-1]).item() / 2 - 29.5) <= 2


def test_each_set_has_a_plot():
    x, other = torch.randn(50, 2), torch.randn(50, 2)
    one, both = scatter([x]), scatter([other, x])
    assert one.shape == (3, 400, 400) and both.shape == (3, 400, 800)
    assert both[:, :, :400].float().std() > 10 and both[:, :, 400:].float().std() > 10


def test_classes_of_points_have_colours_and_the_density_is_next_to_them():
    x, label = torch.randn(200, 2), torch.arange(200) % 2
    plain, told = (scatter([x, x], label=classes) for classes in (None, label))
    assert plain.shape == told.shape == (3, 400, 800) and not plain.equal(told)

    def orange(picture):  # the second colour of tab10
        return int(((picture[0] > 200) & (picture[1] > 90) & (picture[1] < 200) & (picture[2] < 120)).sum())

    assert orange(plain) == 0 < orange(told)
    both = scatter([x, x], label=label, density=lambda x: (x[:, 0] > 0).double())
    assert both.shape == (3, 400, 1200) and both[:, :, :800].float().std() > 10
    dark = (both[:, 50:350, 820:].sum(0) < 30).float().mean(0)  # the left half of the last plot is black
    assert dark[60:150].min() > 0.9 and dark[230:340].max() < 0.1


def test_points_that_are_not_finite_leave_the_others_to_be_seen():
    x = torch.cat([torch.randn(50, 2), torch.full((1, 2), torch.nan), torch.full((1, 2), torch.inf)])
    assert scatter([x]).float().std() > 10


def test_paths_are_lines_from_start_to_end():
    """All from the left to the right: ink in every column between."""
    start = torch.stack([torch.full((20,), -1.0), torch.linspace(-1, 1, 20)], 1)
    frames = [start + torch.tensor([step, 0.0]) for step in (0.0, 1.0, 2.0)]
    picture = paths(frames, torch.zeros(20).long())
    assert picture.shape == (3, 400, 400)
    ink = (picture.float().mean(0) < 250)[40:360].sum(0)
    assert (ink[80:320] >= 20).all()


def test_the_x_axis_of_a_scatter_plot_is_the_first_number():
    points = torch.stack([torch.linspace(-1, 1, 50), torch.zeros(50)], 1)
    picture = scatter([points]).int()
    coloured = (picture.amax(0) - picture.amin(0) > 60).nonzero()
    assert coloured[:, 1].max() - coloured[:, 1].min() > 200 > 20 > coloured[:, 0].max() - coloured[:, 0].min()
