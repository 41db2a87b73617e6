"""Grids of images: names of classes, images next to each other, frames in rows."""

import pytest
import torch

from reports.grids import GAP, LINE_HEIGHT, image_grid, in_rows, next_to_each_other, rendered_text, within_unit


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
