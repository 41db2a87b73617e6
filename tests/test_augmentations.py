import math

import numpy as np
import pytest
import torch

from augmentations import AUGMENTATIONS, LABELS, LEAST_CROP, crop, geometric, get_augmenter, resampled
from config import Config, SettingError
from data_utils import DATASETS

ALL_ALLOWED = {needs: True for _, needs in AUGMENTATIONS.values() if needs}
SHAPES = [(3, 8, 8), (1, 5, 9)]
MOVES_ONLY = ['flip_prob', 'rotate_prob']  # permutations of the pixels

each_augmentation = pytest.mark.parametrize('setting', AUGMENTATIONS)
each_without_label = pytest.mark.parametrize('setting', [name for name in AUGMENTATIONS if name not in LABELS])
each_shape = pytest.mark.parametrize('shape', SHAPES)


@pytest.mark.parametrize('shape', [(), (2,), (3, 4, 8, 8)])
def test_all_off_takes_data_of_any_rank(shape):
    """Here points and videos."""
    x = torch.rand(5, *shape)
    out, augmented = get_augmenter(Config(), ALL_ALLOWED)(x)
    assert torch.equal(out, x) and augmented.tolist() == [False] * 5


def augment(x, **settings):
    torch.manual_seed(0)
    return get_augmenter(Config(**settings), ALL_ALLOWED)(x)


def random_images(n, shape):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def is_changed(x, out):
    return (x != out).flatten(1).any(1)


def neighbours(image):
    """All nine shifts by at most one pixel, borders repeated."""
    padded = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)), mode='edge')
    h, w = image.shape[1:]
    return [torch.from_numpy(padded[:, i : i + h, j : j + w].copy()) for i in range(3) for j in range(3)]


def shares(x, out, candidates):
    """The share of out[i] that equal candidates(x[i])[k], for each k; every image must equal one of them."""
    counts = np.zeros(len(candidates(x[0])))
    for before, after in zip(x, out, strict=True):
        found = [torch.equal(after, candidate) for candidate in candidates(before)]
        assert sum(found) == 1
        counts += found
    return counts / len(x)


@each_shape
def test_all_off_is_the_identity(shape):
    x = random_images(10, shape)
    out, augmented = augment(x)
    assert torch.equal(out, x) and augmented.dtype == torch.bool and augmented.shape == (10,) and not augmented.any()


@each_without_label
@each_shape
@pytest.mark.parametrize('prob', [0.3, 1.0])
def test_rate_and_label(setting, shape, prob):
    x = random_images(2000, shape)
    out, augmented = augment(x, **{setting: prob})
    assert torch.equal(augmented, is_changed(x, out))
    rate = prob * (8 / 9 if setting == 'translate_prob' else 1)  # one shift in nine moves nothing
    assert augmented.float().mean().item() == pytest.approx(rate, abs=0.04)


@each_shape
def test_label_is_right_with_everything_on(shape):
    x = random_images(2000, shape)
    out, augmented = augment(x, **dict.fromkeys(AUGMENTATIONS.keys() - LABELS, 0.3))
    assert torch.equal(augmented, is_changed(x, out))
    assert 0.65 < augmented.float().mean() < 0.8  # 1 - 0.7^3 (1 - 0.3 * 8/9) = 0.75


@each_augmentation
@each_shape
def test_every_image_has_its_own_draw(setting, shape):
    """But all channels of an image share one draw."""
    grey = random_images(1, (1, *shape[1:])).expand(200, 3, -1, -1)
    out, augmented = augment(grey, **{setting: 0.2})
    assert augmented.any() and not augmented.all()
    assert torch.equal(augmented, is_changed(grey, out))
    assert torch.equal(out, out[:, :1].expand_as(out))


@pytest.mark.parametrize('setting', MOVES_ONLY)
@each_shape
def test_pixels_are_only_moved(setting, shape):
    x = random_images(50, shape)
    out, _ = augment(x, **{setting: 1.0})
    assert torch.equal(out.flatten(2).sort().values, x.flatten(2).sort().values)


@each_shape
def test_flip_is_left_to_right(shape):
    x = random_images(5, shape)
    out, _ = augment(x, flip_prob=1.0)
    np.testing.assert_array_equal(out.numpy(), x.numpy()[:, :, :, ::-1])


def test_turns_of_square_images_are_as_likely():
    x = random_images(1500, (1, 8, 8))
    out, _ = augment(x, rotate_prob=1.0)
    rates = shares(
        x, out, lambda image: [torch.from_numpy(np.rot90(image.numpy(), k, (1, 2)).copy()) for k in (1, 2, 3)]
    )
    np.testing.assert_allclose(rates, 1 / 3, atol=0.05)


def test_other_images_are_turned_by_180_degrees():
    x = random_images(20, (1, 5, 9))
    out, _ = augment(x, rotate_prob=1.0)
    np.testing.assert_array_equal(out.numpy(), x.numpy()[:, :, ::-1, ::-1])


@each_shape
def test_shifts_repeat_the_border_and_are_as_likely(shape):
    x = random_images(1800, shape)
    out, _ = augment(x, translate_prob=1.0)
    np.testing.assert_allclose(shares(x, out, neighbours), 1 / 9, atol=0.03)


def test_largest_shift_is_a_setting():
    x = random_images(500, (1, 9, 9))
    out, augmented = augment(x, translate_prob=1.0, max_translation=0)
    assert torch.equal(out, x) and not augmented.any()
    corner = torch.zeros(500, 1, 9, 9)
    corner[:, :, 4, 4] = 1
    out, _ = augment(corner, translate_prob=1.0, max_translation=3)
    rows, columns = out.nonzero()[:, 2], out.nonzero()[:, 3]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 7, 1, 7)


@pytest.mark.parametrize('dataset', ['digits', 'mnist'])
@pytest.mark.parametrize('setting', ['flip_prob', 'rotate_prob'])
def test_digits_are_neither_flipped_nor_turned(dataset, setting):
    with pytest.raises(SettingError, match=rf"{setting}=0\.5.*dataset='{dataset}'.*--{setting} 0"):
        get_augmenter(Config(dataset=dataset, **{setting: 0.5}), vars(DATASETS[dataset]))


def test_digits_may_be_shifted_and_cropped():
    get_augmenter(Config(translate_prob=0.5, crop_prob=0.5), vars(DATASETS['digits']))


@each_augmentation
def test_points_are_not_augmented(setting):
    config = Config(dataset='moons', **{setting: 0.5})
    with pytest.raises(
        SettingError, match=rf"{setting}=0\.5 is for images .*dataset='moons' .* \(2,\)\. Use --{setting} 0"
    ):
        get_augmenter(config, ALL_ALLOWED | dict(shape=(2,)))


@each_augmentation
def test_each_property_of_a_data_set_guards_its_augmentation(setting):
    needs = AUGMENTATIONS[setting][1]
    config = Config(dataset='cifar10', **{setting: 0.5})
    if setting in LABELS:  # the network gets a label, so all images may have it
        get_augmenter(Config(**{setting: 0.5}), vars(DATASETS['digits']))
        return
    assert needs in vars(DATASETS['cifar10'])
    get_augmenter(config, ALL_ALLOWED)
    with pytest.raises(SettingError, match=setting):
        get_augmenter(config, ALL_ALLOWED | {needs: False})


# ---------------------------------------------------------------- resampling: crops, and EDM's augmentation


def positions(side):
    """Positions of the pixels of a side, from its centre."""
    return torch.arange(side) - (side - 1) / 2


def blob(n, at, width):
    """(n, 1, 64, width): a smooth spot at the position `at` (x, y) in pixels from the centre."""
    square = (positions(width) - at[0]).square() + (positions(64)[:, None] - at[1]).square()
    return (-square / 8).exp().expand(n, 1, 64, width)


def centre_of(x):
    """(n, 2): the mean position (x, y) of the light of each image, in pixels from the centre; and its sum (n,)."""
    mass, of_x, of_y = x.sum((1, 2, 3)), x.sum((1, 2)) * positions(x.shape[3]), x.sum((1, 3)) * positions(64)
    return torch.stack([of_x.sum(1), of_y.sum(1)], 1) / mass[:, None], mass


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


@pytest.mark.parametrize(('at', 'width'), [((0.0, 0.0), 64), ((6.0, -3.0), 64), ((6.0, -3.0), 96)])
def test_the_label_of_an_image_says_where_its_parts_are(at, width):
    """From the label, the formulas of the paper give where a spot is, and how much light it has."""
    torch.manual_seed(0)
    x = blob(600, at, width)
    beyond = [  # mirror images of the spot
        np.array([width * i + (-1) ** i * at[0], 64 * j + (-1) ** j * at[1]])
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        if i or j
    ]
    out, label = geometric(x, 0.6)
    centre, mass = centre_of(out)
    is_inside = 0
    for i, (flip_x, flip_y, scale, cos, sin, along, across, *shift) in enumerate(label.double().tolist()):
        stretch, direction, factor = np.hypot(along, across), np.arctan2(across, along), 2 ** (0.2 * scale)
        stretching = rotation(direction) @ np.diag([2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)]) @ rotation(-direction)
        whole = stretching * factor @ rotation(np.arctan2(sin, cos + 1)) @ np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
        moved = np.array([width, 64]) / 8 * np.array(shift)
        expected = whole @ np.array(at) + moved
        mirrored = [np.abs((whole @ p + moved) / [width / 64, 1]).max() for p in beyond]
        if np.abs(expected).max() < 20 and factor * 2 ** (0.2 * stretch) < 1.5 and min(mirrored) > 40:
            is_inside += 1
            np.testing.assert_allclose(centre[i], expected, atol=0.05)
            assert float(mass[i] / x[0].sum()) == pytest.approx(factor**2, rel=0.05)
    assert is_inside > 100


def test_how_often_each_part_of_the_augmentation_is_used():
    torch.manual_seed(0)
    _, label = geometric(torch.rand(4000, 1, 4, 4), 0.3)
    shares = (label != 0).float().mean(0)
    np.testing.assert_allclose(shares, [0.5, 0.15, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3], atol=0.03)
    used = label != 0
    for together in (used[:, 3:5], used[:, 5:7], used[:, 7:9]):
        assert torch.equal(together.any(1), together.all(1))
    numbers = [label[:, i][used[:, i]] for i in (2, 7, 8)]  # the scale and both shifts: standard normal
    assert all(abs(n.mean()) < 0.1 and abs(n.std() - 1) < 0.07 for n in numbers)
    stretch = label[:, 5:7][used[:, 5]]
    assert abs(stretch.square().sum(1).mean() - 1) < 0.1 and abs(stretch.mean(0)).max() < 0.08


@each_shape
def test_only_flips_are_exact(shape):
    torch.manual_seed(0)
    x = random_images(3000, shape)
    out, label = geometric(x, 0.1)
    for along_x, along_y, dims in ((1, 0, [3]), (0, 1, [2]), (1, 1, [2, 3])):
        rows = (label[:, :2] == torch.tensor([along_x, along_y])).all(1) & (label[:, 2:] == 0).all(1)
        assert rows.any()
        torch.testing.assert_close(out[rows], x[rows].flip(dims))
    assert torch.equal(out[(label == 0).all(1)], x[(label == 0).all(1)])


@each_shape
def test_a_crop_is_a_part_of_the_image(shape):
    """On ramps along x and y, a crop is a ramp whose slope is the side of the part, and whose ends are inside."""
    torch.manual_seed(0)
    _, h, w = shape
    for side, dim in ((w, 3), (h, 2)):
        ramp = torch.arange(side) + 0.5  # the position of each pixel's middle
        x = (ramp if dim == 3 else ramp[:, None]).expand(300, 1, h, w)
        out, chosen = crop(x, torch.ones(300, dtype=torch.bool))
        line = out.select(5 - dim, 1)[:, 0]  # (300, side)
        slope = line[:, side // 2] - line[:, side // 2 - 1]
        low = line[:, side // 2 - 1] - slope * (side // 2 - 0.5)  # where the part begins
        assert chosen.all() and LEAST_CROP <= slope.min() < 0.83 and 0.97 < slope.max() <= 1 + 1e-5
        assert low.min() > -1e-4 and (low + slope * side).max() < side + 1e-4
        assert low.std() > 0.05 * side / 8


@each_shape
def test_a_crop_is_anywhere_and_has_the_proportions_of_the_image(shape):
    """Its place, from 0 at one end to 1 at the other, is uniform along x and y, and independent."""
    torch.manual_seed(0)
    _, h, w = shape
    along_x, along_y = (torch.arange(side) + 0.5 for side in (w, h))
    x = torch.stack([along_x.expand(h, w), along_y[:, None].expand(h, w)])
    out, _ = crop(x.expand(4000, 2, h, w), torch.ones(4000, dtype=torch.bool))
    places, slopes = [], []
    for line in (out[:, 0, h // 2], out[:, 1, :, w // 2]):  # (4000, side)
        side = line.shape[1]
        slopes.append(line[:, side // 2] - line[:, side // 2 - 1])
        low = line[:, side // 2 - 1] - slopes[-1] * (side // 2 - 0.5)
        places.append(low / (side * (1 - slopes[-1])))
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=0)
    small = torch.stack(places)[:, slopes[0] < 0.9]
    np.testing.assert_allclose(small.mean(1), 0.5, atol=0.03)
    np.testing.assert_allclose(small.std(1), 12**-0.5, atol=0.01)
    assert abs(small.corrcoef()[0, 1]) < 0.1


def test_beyond_the_border_are_mirror_images():
    """A cosine that is level at the borders continues as its own mirror image."""

    def waves(x, y):  # at positions in pixels from the centre
        return (3 * math.pi * (x / 80 + 0.5)).cos() * (math.pi * (y / 64 + 0.5)).cos()

    linear = torch.tensor([[[1.5, 0.0], [0.0, 1.5]], [[0.8, -0.6], [0.6, 0.8]]])
    shift = torch.tensor([[0.3, -0.2], [-0.4, 0.1]])
    x, y = torch.meshgrid(positions(80), positions(64), indexing='xy')
    moved = torch.stack([x, y], 2) - (shift * torch.tensor([80, 64]))[:, None, None]
    expected = waves(*torch.einsum('nij,nyxj->inyx', linear, moved))[:, None]
    out = resampled(waves(x, y).expand(2, 1, 64, 80), linear, shift)
    torch.testing.assert_close(out, expected, atol=0.01, rtol=0)
