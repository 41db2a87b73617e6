import random

import numpy as np
import pytest
import torch

from utils import bcast_right, image_grid, image_square_error, seed_everything


@pytest.mark.parametrize('ndim', [1, 2, 4])
def test_bcast_right_multiplies_each_image_by_its_own_number(ndim):
    v, x = torch.tensor([2.0, 3.0]), torch.ones(2, *[5] * (ndim - 1))
    product = bcast_right(v, ndim) * x
    assert product.shape == x.shape
    assert product[0].unique().item() == 2 and product[1].unique().item() == 3


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 64, 32)])
def test_image_square_error_is_a_mean_over_each_image(shape):
    a = torch.zeros(2, *shape)
    b = torch.stack([torch.full(shape, 2.0), torch.full(shape, -3.0)])
    assert image_square_error(a, b).tolist() == pytest.approx([4, 9])
    b[0, 0, 0, 0] = 0
    assert image_square_error(a, b)[0].item() == pytest.approx(4 * (1 - 1 / b[0].numel()))


def draws(*key):
    seed_everything(*key)
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_seeds_repeat():
    assert draws(3, 'noise', 7) == draws(3, 'noise', 7)


@pytest.mark.parametrize(
    ('a', 'b'),
    [
        ((0,), (2**32,)),
        ((5, 1), (5 + 2**32, 1)),
        ((1, 2), (2, 1)),
        ((1, 2), (12,)),
        ((1, 0), (1,)),
        ((0, 1), (1, 0)),
        ((0, 'a'), (0, 'b')),
    ],
)
def test_seeds_of_different_keys_differ_in_every_generator(a, b):
    assert all(x != y for x, y in zip(draws(*a), draws(*b), strict=True))


def test_seeds_of_near_keys_give_independent_numbers():
    """Over (seed, step) as over one stream."""
    u = np.array([draws(seed, step) for seed in range(10) for step in range(100)])
    assert np.abs(u.mean(0) - 0.5).max() < 0.04 and np.abs(u.std(0) - 12**-0.5).max() < 0.02
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.1


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
