"""Grids of images: layout, enlarged pixels, exact grey levels, headings."""

import numpy as np
import torch

from reports.grids import LINE_HEIGHT, image_grid, rendered_text


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


def test_of_four_channels_the_first_three_are_shown():
    images = torch.rand(3, 4, 48, 48)
    assert torch.equal(image_grid(images, 2), image_grid(images[:, :3], 2))


def test_the_headings_are_those_of_the_first_row_and_centred():
    grid = image_grid(torch.zeros(5, 1, 48, 48), 3, names=['cat', 'dog', 'eel', 'cat', 'dog'])
    assert torch.equal(grid[:, :LINE_HEIGHT, 2:50], rendered_text('cat', 48))
    dark = (rendered_text('an', 60) < 128).any(0).any(0).nonzero()
    assert abs((dark[0] + dark[-1]).item() / 2 - 29.5) <= 2
