"""What a run shows of tensors: grids side by side, scatter plots, and nothing of what is neither."""

import pytest
import torch

from pictures import GAP, kind, picture_of
from utils import image_grid


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
