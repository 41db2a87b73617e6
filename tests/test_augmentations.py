import numpy as np
import pytest
import torch

from augmentations import AUGMENTATIONS, get_augmenter
from config import Config, SettingError
from data_utils import DATASETS

ALL_ALLOWED = {needs: True for _, needs in AUGMENTATIONS.values()}
SHAPES = [(3, 8, 8), (1, 5, 9)]
MOVES_ONLY = ['flip_prob', 'rotate_prob']  # permutations of the pixels

each_augmentation = pytest.mark.parametrize('setting', AUGMENTATIONS)
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


@each_augmentation
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
    out, augmented = augment(x, **dict.fromkeys(AUGMENTATIONS, 0.3))
    assert torch.equal(augmented, is_changed(x, out))
    assert 0.5 < augmented.float().mean() < 0.7  # 1 - 0.7^2 (1 - 0.3 * 8/9) = 0.64


@each_augmentation
@each_shape
def test_every_image_has_its_own_draw(setting, shape):
    """But all channels of an image share one draw."""
    grey = random_images(1, (1, *shape[1:])).expand(200, 3, -1, -1)
    out, augmented = augment(grey, **{setting: 0.5})
    assert augmented.any() and not augmented.all()
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
    assert needs in vars(DATASETS['cifar10'])
    get_augmenter(config, ALL_ALLOWED)
    with pytest.raises(SettingError, match=setting):
        get_augmenter(config, ALL_ALLOWED | {needs: False})
