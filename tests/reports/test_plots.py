"""Tensors as pictures: positions of cells, text, data and samples; enlarged pixels, exact grey levels, names."""

import numpy as np
import pytest
import torch

from data_loading.spec import DataSpec
from reports.plots import (
    APART,
    BETWEEN,
    GAP,
    GREY,
    LINE_HEIGHT,
    GridBlock,
    Panel,
    draw_images,
    image_grid,
    join_pictures,
    rendered_text,
    stacked,
    text_width,
    titled,
    titles_of,
)


def flat(*levels, side=48):
    """One image for each grey level, from 0 to 1."""
    return torch.tensor(levels, dtype=torch.float32)[:, None, None, None].expand(-1, 1, side, side)


def centres(picture, rows, columns, top=0, left=0, side=48):
    """The first channel in the middle of each cell."""
    pitch = side + GAP
    return picture[0, top + GAP + side // 2 :: pitch, left + GAP + side // 2 :: pitch][:rows, :columns].tolist()


def test_pictures_are_joined_with_white_between_and_around():
    left, right = (torch.randint(0, 255, (3, h, w), dtype=torch.uint8) for h, w in ((20, 30), (50, 10)))
    picture = join_pictures([left, right])
    assert picture.shape == (3, 50, 30 + BETWEEN + 10)
    assert torch.equal(picture[:, :20, :30], left) and torch.equal(picture[:, :, -10:], right)
    assert (picture[:, 20:, :30] == 255).all() and (picture[:, :, 30 : 30 + BETWEEN] == 255).all()
    below = stacked([left, right])
    assert below.shape == (3, 70, 30) and torch.equal(below[:, :20], left)
    assert torch.equal(below[:, 20:, :10], right) and (below[:, 20:, 10:] == 255).all()


def test_a_title_is_above_the_picture_and_widens_it_if_needed():
    picture = titled(torch.zeros(3, 4, 5, dtype=torch.uint8), 'a long title')
    width = text_width('a long title') + 4
    assert picture.shape == (3, LINE_HEIGHT + 4, width)
    assert torch.equal(picture[:, :LINE_HEIGHT], rendered_text('a long title', width))
    assert (picture[:, LINE_HEIGHT:, :5] == 0).all() and (picture[:, LINE_HEIGHT:, 5:] == 255).all()
    assert titled(picture, '') is picture


def test_only_images_outside_the_unit_interval_are_scaled_and_their_title_gives_the_range(monkeypatch):
    titles = []
    monkeypatch.setattr('reports.plots.titled', lambda picture, title: titles.append(title) or picture)
    for levels, expected in [
        ((-3, 0, 1), [0, 191, 255]),
        ((0, 1, 2), [0, 128, 255]),
        ((0.2, 0.4, 0.8), [51, 102, 204]),
        ((0, 1, torch.nan), [0, 255, 0]),
        ((-1, torch.inf, 1), [0, 255, 255]),
    ]:
        (row,) = centres(image_grid(flat(*levels), 3, title='mine'), 1, 3, side=96)
        assert row == expected
    note = 'mine, black {}, white {}'.format
    assert titles == [note(-3, 1), note(0, 2), 'mine', 'mine', note(-1, 1)]


def test_image_grid_layout():
    """Five grey images of 8x8, enlarged, in rows of 3, with grey between them and in the empty cell."""
    images = (torch.arange(1, 6) / 10)[:, None, None, None].expand(5, 1, 8, 8)
    picture = draw_images(Panel(images, across=3))
    side = 72  # 200 / 3, rounded up to whole image pixels
    expected = np.full((3, GAP + 2 * (side + GAP), GAP + 3 * (side + GAP)), GREY)
    for i in range(5):
        y, x = GAP + (side + GAP) * (i // 3), GAP + (side + GAP) * (i % 3)
        expected[:, y : y + side, x : x + side] = round(255 * (i + 1) / 10)
    assert picture.dtype == torch.uint8 and picture.shape == expected.shape
    np.testing.assert_allclose(picture.numpy(), expected, atol=1)


def test_white_images_have_an_edge():
    assert 64 < GREY < 192
    picture = image_grid(torch.ones(20, 3, 48, 48), 10)
    assert set(picture.flatten().tolist()) == {GREY, 255} and (picture[:, :GAP] == GREY).all()
    assert (picture[:, :, GAP + 48 : 2 * GAP + 48] == GREY).all() and (
        picture[:, GAP + 48 : 2 * GAP + 48] == GREY
    ).all()


def test_images_of_a_class_are_below_its_name():
    x = flat(0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    picture = image_grid(x, 10, names=['cat', 'dog', 'eel'] * 2)
    side = (picture.shape[2] - GAP) // 6 - GAP
    rows = centres(picture, 1, 6, top=LINE_HEIGHT, side=side)
    assert rows == [[0, 153, 51, 204, 102, 255]]  # both cats, both dogs, both eels
    for i, name in enumerate(('cat', 'dog', 'eel')):  # each name once, over its two columns
        width = 2 * side + GAP
        place = picture[:, :LINE_HEIGHT, GAP + i * (width + GAP) :][:, :, :width]
        assert torch.equal(place, rendered_text(name, width))


def test_cells_are_wide_enough_for_the_names_of_classes():
    names = [f'ankle boot {i}' for i in range(10)]
    picture, width = image_grid(torch.zeros(10, 1, 8, 8), 10, names), max(map(text_width, names))
    assert 48 < width < 80 and picture.shape[2] == GAP + 10 * (-(-width // 8) * 8 + GAP)


def test_a_row_has_at_most_ten_classes():
    names = [f'c{i}' for i in range(17)]
    first, second = Panel(torch.zeros(51, 1, 8, 8), names * 3).blocks()
    assert first.top == names[:9] and second.top == names[9:]
    assert first.rows == [[i + 17 * k for i in range(9)] for k in range(3)]
    assert second.rows == [[9 + i + 17 * k for i in range(8)] for k in range(3)]
    assert [len(block.rows[0]) for block in Panel(torch.zeros(100, 3, 8, 8), list(map(str, range(100)))).blocks()] == [
        10
    ] * 10
    widths = [len(Panel(torch.zeros(60, 3, side, side)).blocks()[0].rows[0]) for side in (32, 256, 1024)]
    assert widths == [10, 4, 2]  # large images: only as many as fit on the page


def test_data_are_above_the_samples_of_their_class_with_a_gap():
    """Data in any order, one of their classes not sampled; a class without data has an empty cell."""
    x, names = flat(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), ['dog', 'gnu', 'cat', 'cat', 'dog', 'eel']
    panel = Panel(x, names, real=3)
    rows = [[2, 0, -1], [3, 4, 5]]
    assert panel.blocks() == [GridBlock(rows, ['cat', 'dog', 'eel'], ['data', ''], [1])]
    picture, margin = draw_images(panel), text_width('data') + 4
    side = (picture.shape[2] - margin - GAP) // 3 - GAP
    levels = [round(255 * level) for level in (0.3, 0.1, 0.4, 0.5, 0.6)]
    assert centres(picture, 1, 3, LINE_HEIGHT, margin, side) == [[*levels[:2], GREY]]
    below = LINE_HEIGHT + side + GAP + APART
    assert centres(picture, 1, 3, below, margin, side) == [levels[2:]]
    assert (picture[:, below - APART + GAP : below, margin:] == 255).all()
    word = LINE_HEIGHT + GAP + (side - LINE_HEIGHT) // 2
    assert torch.equal(picture[:, word : word + LINE_HEIGHT, :margin], rendered_text('data', margin))


def test_data_without_classes_fill_the_first_row():
    (block,) = Panel(torch.zeros(20 + 13, 1, 8, 8), real=20, across=8).blocks()
    assert block.rows == [[*range(8)], [*range(20, 28)], [*range(28, 33), -1, -1, -1]] and block.top == []


def test_no_sample_is_left_out_if_classes_differ_in_size():
    (block,) = Panel(torch.zeros(4, 1, 8, 8), ['a', 'b', 'b', 'b'], across=2).blocks()
    assert block.rows == [[0, 1], [-1, 2], [-1, 3]] and block.top == ['a', 'b']


def test_a_path_has_times_on_top_and_two_rows_for_each_sample():
    x = flat(*(torch.arange(12) / 12).tolist())
    panel = Panel(x, ['cat', 'x0', 'dog', 'x0'], times=['t 1', 't 0.5', 't 0'])
    assert panel.blocks() == [
        GridBlock([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], panel.times, panel.names, range(2, 4, 2))
    ]
    picture, margin = draw_images(panel), max(map(text_width, panel.names)) + 4
    side = (picture.shape[2] - margin - GAP) // 3 - GAP
    levels = [[round(255 * k / 12) for k in row] for row in panel.blocks()[0].rows]
    assert centres(picture, 2, 3, LINE_HEIGHT, margin, side) == levels[:2]
    assert centres(picture, 2, 3, LINE_HEIGHT + 2 * (side + GAP) + APART, margin, side) == levels[2:]
    for i, word in enumerate(panel.times):
        place = picture[:, :LINE_HEIGHT, margin + GAP + i * (side + GAP) :][:, :, :side]
        assert torch.equal(place, rendered_text(word, side))


def test_small_images_are_enlarged_by_whole_pixels():
    images = torch.zeros(1, 3, 2, 3)
    images[0, 1, 1, 2] = 1
    picture = image_grid(images, columns=1)[:, GAP:-GAP, GAP:-GAP]
    k = picture.shape[1] // 2
    expected = torch.zeros(3, 2 * k, 3 * k)
    expected[1, k:, 2 * k :] = 255
    assert k >= 24 and torch.equal(picture.float(), expected)


def test_every_grey_level_of_a_grid_is_exact():
    levels = torch.arange(256)
    cells = image_grid(flat(*(levels / 255).tolist()), columns=16)
    assert centres(cells, 16, 16) == levels.view(16, 16).tolist()


@pytest.mark.parametrize(('channels', 'drawn'), [(1, '0'), (2, '0 1'), (3, '012'), (4, '012 3'), (5, '0 1 2 3 4')])
def test_all_channels_are_drawn_below_each_other(channels, drawn):
    images = torch.rand(10, channels, 48, 48)
    picture = image_grid(images, 10)[:, GAP:-GAP]
    for i, part in enumerate(drawn.split()):
        of_part = image_grid(images[:, [int(i) for i in part]], 10)[:, GAP:-GAP]  # only these channels
        assert torch.equal(picture[:, 48 * i : 48 * (i + 1)], of_part)
    assert picture.shape[1] == 48 * len(drawn.split())


def test_a_name_that_does_not_fit_is_cut():
    def ink(text):
        return rendered_text(text, 60) < 128

    assert ink('an').any() and ink('an animal').sum() > ink('an').sum()
    assert torch.equal(rendered_text('a long name of an animal', 60), rendered_text('a long name of an aardvark', 60))
    assert not torch.equal(rendered_text('a long name', 200), rendered_text('a long nose', 200))


@pytest.mark.parametrize('name', ['вино и сыр', 'καλός', 'crème', 'Łódź'])
def test_names_in_other_alphabets_are_drawn(name):
    """All letters look different, and none is the box for a missing letter."""
    letters = [c for c in name if c != ' ']
    drawn = {c: rendered_text(c, 16) for c in letters}
    box = rendered_text('\uffff', 16)
    assert len({picture.numpy().tobytes() for picture in drawn.values()}) == len(set(letters))
    assert not any(torch.equal(picture, box) for picture in drawn.values())


def test_a_name_that_no_font_can_draw_is_shown_as_its_number(capsys):
    spec = DataSpec(lambda config: (), num_classes=3, classes=('dog', '\u732b', '\u72ac'))
    for _ in range(2):
        assert titles_of(spec, torch.tensor([2, 0, 1, 3]), 0.1) == ['2', 'dog', '1', 'none']
    assert capsys.readouterr().out.count('pictures show the numbers of such classes') == 1
    assert titles_of(spec, None, 0.1) == []
