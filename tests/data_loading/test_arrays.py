"""Data sets from files of arrays: .npy, .npz, and prepared files."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from config import SettingError
from data_loading import arrays, packed, stores
from data_loading.labels import NAMES_OF_LABEL
from data_utils import setup_data_train_and_test
from runtime.errors import DataError

CPU = torch.device('cpu')
RNG = np.random.default_rng(3)


@pytest.fixture
def load(tiny_config, tmp_path):
    def make(path: Path, **settings):
        return setup_data_train_and_test(tiny_config(dataset='arrays', data_path=str(path), **settings), CPU)

    return make


def both(loaded) -> list[torch.Tensor]:
    """All x, and all labels, of the training and the held-out part."""
    train, _, test = loaded
    return [torch.cat(pair) for pair in zip(train.everything(), test.everything(), strict=True)]


@pytest.mark.parametrize(
    ('shape', 'wanted'),
    [((40, 6, 5), (1, 6, 5)), ((40, 3, 6, 5), (3, 6, 5)), ((40, 6, 5, 3), (3, 6, 5)), ((40, 6, 5, 1), (1, 6, 5))],
)
def test_bytes_are_images(load, tmp_path, shape, wanted):
    x = RNG.integers(0, 256, shape, dtype=np.uint8)
    x.flat[: len(x)] = 0
    np.save(tmp_path / 'x.npy', x)
    loaded = load(tmp_path / 'x.npy')
    assert loaded[0].spec.shape == wanted and loaded[0].spec.num_classes == 0
    assert (loaded[0].size, loaded[2].size) == (36, 4)
    got, _ = both(loaded)
    first = np.moveaxis(x, -1, 1) if shape[-1] in (1, 3) else x.reshape(40, *wanted)
    rows = {row.tobytes() for row in np.ascontiguousarray(first)}
    assert {row.tobytes() for row in (got * 255).round().byte().numpy()} == rows


@pytest.mark.parametrize('shape', [(40, 2), (40, 3, 7), (40, 3, 4, 5), (40, 1, 7, 3, 5), (40, 7, 3, 2, 2)])
@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.float16])
def test_floats_are_taken_as_they_are(load, tmp_path, shape, dtype):
    x = (30 * RNG.normal(size=shape)).astype(dtype)
    np.savez(tmp_path / 'x.npz', x=x, y=np.arange(40) % 3)
    loaded = load(tmp_path / 'x.npz', network='mlp' if shape[1] == 7 else 'unet')
    got, label = both(loaded)
    assert got.dtype == torch.float32 and loaded[0].spec.num_classes == 3
    wanted = {row.tobytes(): i % 3 for i, row in enumerate(x.astype(np.float32))}
    assert {row.tobytes(): int(k) for row, k in zip(got.numpy(), label, strict=True)} == wanted


def test_the_split_is_the_same_for_every_seed_and_its_size_a_setting(load, tmp_path):
    np.save(tmp_path / 'x.npy', np.arange(40, dtype=np.float32)[:, None])
    first, other, more = (
        load(tmp_path / 'x.npy', **settings) for settings in (dict(seed=1), dict(seed=2), dict(held_out=10))
    )
    held_out = [loaded[2].everything()[0].flatten().tolist() for loaded in (first, other, more)]
    assert (
        held_out[0] == held_out[1] == held_out[2][:4] and len(held_out[2]) == 10 and held_out[2] != sorted(held_out[2])
    )
    assert first[0].fingerprint == other[0].fingerprint != more[0].fingerprint


@pytest.mark.parametrize(
    ('arrays', 'words'),
    [
        (dict(x=np.zeros((8, 4, 4), complex)), r'the data are complex128 \(8, 4, 4\)\. They must be whole numbers or'),
        (dict(x=np.zeros((8, 0))), r'the data are float64 \(8, 0\)'),
        (dict(x=np.zeros(8)), r'float64 \(8,\)'),
        (dict(x=np.zeros((8, 4), np.uint8)), r'uint8 data of shape \(8, 4\) are not images'),
        (dict(photos=np.zeros((8, 4))), 'holds photos. Name the data one of images, x'),
        (
            dict(x=np.zeros((8, 4)), y=np.zeros(7, int)),
            r'labels are int64 \(7,\).* Each of 8 items needs one',
        ),
        (dict(x=np.zeros((8, 4)), y=np.zeros(8)), r'labels are float64 \(8,\).*labels\.astype\(int\)'),
        (
            dict(x=np.zeros((8, 4)), y=np.arange(8) / 3),
            r'labels are float64 \(8,\).*np\.digitize.*docs/experiments\.md',
        ),
        (
            dict(x=np.zeros((8, 4)), y=np.ones((8, 3))),
            r'labels are float64 \(8, 3\).*labels\.argmax\(1\).*docs/experiments\.md',
        ),
        (
            dict(x=np.zeros((8, 4)), y=np.arange(8) - 1),
            r'labels are int64 \(8,\), the smallest -1.*labels - labels\.min\(\)',
        ),
        (dict(x=np.zeros((8, 4)), y=np.array([0, np.nan] * 4)), '4 of them are NaN: leave those items out'),
        (dict(x=np.zeros((8, 4)), y=np.zeros(8, 'M8[s]')), r'labels\.astype\(str\)'),
        (dict(x_train=np.zeros((8, 4)), x_test=np.zeros((8, 4)), y_train=np.arange(8)), 'x_test: both parts need'),
        (dict(x_train=np.zeros((8, 4)), x_test=np.zeros((0, 4))), 'x_test: both parts need items'),
        (dict(x_train=np.zeros((8, 4)), x_test=np.zeros((8, 4), int)), 'x_test: the data are int64.*the same type'),
        (dict(x=np.zeros((8, 4), np.longdouble)), r'x: the data are (float128|float96).*at most 64 bits'),
        (dict(x=np.zeros((8, 4)), cond_a=np.zeros(8, np.longdouble)), 'cond_a is float'),
        (dict(x=np.zeros((8, 4)), cond_augmentation=np.zeros(8)), "'augmentation' is the name of another input"),
        (dict(x_test=np.zeros((8, 4))), 'holds x_test. Name the data one of images.*or x_train and x_test'),
        (dict(x=np.full((8, 4), np.nan)), r'hold NaN or infinite values'),
        (dict(x=np.zeros((0, 4)), y=np.zeros(0, int)), 'of 0 items at most 0 can be held out'),
        (dict(x=np.zeros((1, 4))), 'of 1 item at most 0 can be held out, as one is needed to train on'),
    ],
)
def test_bad_arrays_are_named_before_training(load, tmp_path, arrays, words):
    np.savez(tmp_path / 'x.npz', **arrays)
    with pytest.raises(SettingError, match=words):
        load(tmp_path / 'x.npz')


# dtype, shape of an item, settings -> shape as read, whether the channels were last
READ = [
    ('u1', (6, 5), {}, (1, 6, 5)),
    ('f4', (6, 5), dict(array_layout='no_channels'), (1, 6, 5)),
    ('f4', (6, 5), dict(array_layout='channels_last'), (5, 6)),
    ('f4', (6, 5), dict(array_layout='channels_first'), (6, 5)),
    ('f4', (6, 5), dict(network='mlp'), (6, 5)),
    ('f4', (2, 9), {}, (2, 9)),
    ('f4', (9,), dict(array_layout='no_channels'), (1, 9)),
    ('u1', (3, 6, 5), {}, (3, 6, 5)),
    ('u1', (6, 5, 3), dict(network='mlp'), (3, 6, 5)),
    ('i8', (6, 5, 3), {}, (3, 6, 5)),
    ('u1', (4, 4, 3), dict(array_layout='channels_last'), (3, 4, 4)),
    ('u1', (6, 5, 5), dict(array_layout='channels_last'), (5, 6, 5)),
    ('u1', (30,), dict(network='mlp'), (30,)),
    ('f4', (6, 5, 3), dict(value_range=(0.0, 255.0)), (3, 6, 5)),
    ('f4', (6, 5, 3), dict(array_layout='channels_last'), (3, 6, 5)),
    ('f4', (6, 5, 3), dict(network='mlp'), (6, 5, 3)),
    ('f4', (2, 6, 6, 6), {}, (2, 6, 6, 6)),
    ('f4', (6, 6, 6, 2), dict(value_range=(0.0, 255.0)), (2, 6, 6, 6)),
]


@pytest.mark.parametrize(('dtype', 'shape', 'settings', 'wanted'), READ)
def test_axes_are_read_by_the_rule_or_as_the_setting_says(load, tmp_path, dtype, shape, settings, wanted):
    x = np.random.default_rng(0).integers(0, 256, (40, *shape)).astype(dtype)
    x[0].flat[:2] = 0, 255
    np.save(tmp_path / 'x.npy', x)
    loaded = load(tmp_path / 'x.npy', **settings)
    got, _ = both(loaded)
    assert got.shape[1:] == wanted
    last = shape[-1] == wanted[0] and shape[:-1] == wanted[1:] and settings.get('array_layout') != 'channels_first'
    first = np.moveaxis(x, -1, 1) if last else x.reshape(40, *wanted)
    if dtype != 'f4' or 'value_range' in settings:
        got = 255 * got
    rows = {row.astype(np.float32).tobytes() for row in np.ascontiguousarray(first)}
    assert {row.tobytes() for row in got.round().numpy()} == rows


@pytest.mark.parametrize(
    ('dtype', 'shape', 'words'),
    [
        (
            'f4',
            (16, 16, 3),
            r'--value_range 99 99 .*from 99 to 99\).*channels_last \(C x H x W: 3 channels of 16x16',
        ),
        ('f4', (16, 16), r'no_channels \(C x H x W: 1 channel of 16x16\); --network mlp needs no layout'),
        ('f4', (6, 6, 6, 2), 'array_layout'),
        ('f4', (4, 4), 'array_layout'),
        ('u1', (32, 32, 5), r'channels_first \(C x H x W: 32 channels of 32x5\), channels_last .*5 channels of 32x32'),
        ('u1', (2, 2, 3), 'array_layout'),
        ('u1', (1, 1, 3), 'array_layout'),
        ('u1', (32, 3), r'a single image\? np\.stack'),
        ('u1', (2, 6, 6, 6), 'array_layout'),
        ('u1', (30,), r'uint8 data of shape \(40, 30\) are not images.*x\.reshape\(-1, H, W\)'),
    ],
)
def test_axes_that_the_rule_leaves_open_are_refused(load, tmp_path, dtype, shape, words):
    np.save(tmp_path / 'x.npy', np.full((40, *shape), 99).astype(dtype))
    with pytest.raises(SettingError, match=words) as caught:
        load(tmp_path / 'x.npy')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('layout, shape, wanted', [
    ('no_channels', (37,), dict(same=(1, 37), wind=(2,), number=())),
    ('no_channels', (7, 12), dict(same=(1, 7, 12), wind=(2,), number=())),
    ('channels_last', (7, 12, 2), dict(same=(2, 7, 12), wind=(2,), number=())),
    ('channels_last', (37, 2), dict(same=(2, 37), wind=(2,), number=())),
])  # fmt: skip
def test_conditions_like_x_are_read_in_its_layout(load, tmp_path, layout, shape, wanted):
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=(20, *axes)) for name, axes in dict(same=shape, wind=(2,), number=()).items()}
    np.savez(tmp_path / 'x.npz', x=rng.normal(size=(20, *shape)), **{f'cond_{name}': x for name, x in data.items()})
    train, *_ = load(tmp_path / 'x.npz', array_layout=layout)
    assert {name: tuple(x.shape[1:]) for name, x in train.everything().cond.items()} == wanted


def test_signals_with_the_channels_last_are_not_guessed(load, tmp_path):
    np.save(tmp_path / 'x.npy', np.zeros((40, 9, 3), np.float32))
    with pytest.raises(SettingError, match=r'array_layout.*channels_last \(C x L: 3 channels of 9'):
        load(tmp_path / 'x.npy', value_range=(0.0, 255.0))


def test_bytes_are_of_0_to_255_if_any_of_both_parts_is_large(load, tmp_path):
    x, other = np.zeros((120, 6, 5), np.uint8), np.zeros((9, 6, 5), np.uint8)
    x[110] = 200
    np.savez(tmp_path / 'x.npz', x_train=x, x_test=other)
    assert load(tmp_path / 'x.npz')[0].everything()[0].max().item() == pytest.approx(200 / 255)


@pytest.mark.parametrize(
    ('dtype', 'low', 'high', 'settings', 'black', 'white'),
    [
        ('?', 0, 1, {}, 0, 1),
        ('u2', 7, 4095, {}, 0, 4095),
        ('i8', 3, 16, {}, 0, 16),
        ('u1', 0, 16, dict(value_range=(0.0, 16.0)), 0, 16),
        ('u1', 0, 200, dict(value_range=(0.0, 200.0)), 0, 200),
        ('u1', 0, 200, dict(value_range=(-10.0, 200.0)), -10, 200),
        ('i8', 0, 255, {}, 0, 255),
        ('i2', -9, 9, dict(value_range=(-10.0, 10.0)), -10, 10),
        ('i2', -900, 900, dict(value_range=(-1000.0, 1000.0)), -1000, 1000),
        ('f4', -1, 1, dict(value_range=(-1.0, 1.0)), -1, 1),
        ('f8', 0.1, 0.7, dict(value_range=(0.1, 0.7)), 0.1, 0.7),
    ],
)
def test_whole_numbers_and_floats_with_a_range_are_images(
    load, tmp_path, capsys, dtype, low, high, settings, black, white
):
    x = np.random.default_rng(0).uniform(low, high, (40, 6, 5, 1))
    x[3].flat[:2] = low, high
    x = (x if dtype in ('f4', 'f8') else x.round()).astype(dtype)
    np.save(tmp_path / 'x.npy', x)
    loaded = load(tmp_path / 'x.npy', **settings)
    got, _ = both(loaded)
    rows = (x.reshape(40, 1, 6, 5).astype(float) - black) / (white - black)
    assert got.min() >= 0 and got.max() <= 1 and loaded[0].spec.scale == 'image'
    in_bytes = dtype not in ('f4', 'f8') and white - black <= 255
    assert loaded[0].resident[0].dtype == (torch.uint8 if in_bytes else torch.float32)
    for row in got.numpy():
        assert np.abs(rows - row).max((1, 2, 3)).min() < 1e-6
    text = f'values {black:g} to {white:g}'
    assert f'(C x H x W: 1 channel of 6x5), {text}, no classes' in capsys.readouterr().out
    assert text in loaded[0].fingerprint


@pytest.mark.parametrize(
    ('x', 'settings', 'words'),
    [
        (np.uint8([16]), {}, r'from 0 to 16\. Which values are black.*--value_range 0 16'),
        (np.int64([-3]), {}, r'from -3 to 0\. .*--value_range -3 1'),
        (np.uint16([0]), {}, r'--value_range 0 1'),
        (np.int64([-3]), dict(value_range=(0.0, 255.0)), 'value_range=.*goes from -3 to 0, and row 7 is outside'),
        (np.int64([300]), dict(value_range=(0.0, 255.0)), 'value_range=.*goes from 0 to 300, and row 7 is outside'),
        (np.float32([1.5]), dict(value_range=(0.0, 1.0)), r'outside value_range=\(0, 1\), the first is number 7'),
        (np.float32([np.nan]), {}, r'x: 1 of 40 items hold NaN or infinite values, the first is number 7'),
        (np.float32([np.nan]), dict(value_range=(0.0, 1.0)), r'NaN or infinite values, the first is number 7'),
    ],
)
def test_values_that_cannot_be_right_are_refused_with_the_row_of_the_file(load, tmp_path, x, settings, words):
    values = np.zeros((40, 1, 6, 5), x.dtype)
    values[7, 0, 2, 2] = x[0]
    np.save(tmp_path / 'x.npy', values)
    with pytest.raises(SettingError, match=words):
        load(tmp_path / 'x.npy', **settings)


def test_rows_that_are_read_one_by_one_are_named_as_in_the_file(load, tmp_path, monkeypatch):
    values = np.zeros((40, 1, 6, 5), np.float32)
    values[7, 0, 2, 2] = np.inf
    np.save(tmp_path / 'x.npy', values)
    monkeypatch.setattr(arrays, 'LARGEST_SHUFFLED', 100)
    train, _, test = load(tmp_path / 'x.npy', num_workers=0)
    loader = test if 7 in test.part.items.file_rows else train
    for read in (lambda: loader.take(range(loader.size)), lambda: list(itertools.islice(loader, 16))):
        with pytest.raises(DataError, match='first is number 7'):
            read()


@pytest.mark.parametrize(
    ('low', 'high', 'wanted'),
    [(0, 1, '0 1'), (-1, 1, '-1 1'), (0, 255, '0 255'), (0, 9, ''), (-3, 3, ''), (0, 0.1, '')],
)
def test_prints_the_flag_for_floats_that_look_like_images(load, tmp_path, capsys, low, high, wanted):
    x = np.random.default_rng(0).uniform(low, high, (40, 3, 6, 5)).astype(np.float32)
    x[0].flat[0] = high
    np.save(tmp_path / 'x.npy', x)
    loaded = load(tmp_path / 'x.npy')
    assert loaded[0].spec.scale == 'float' and both(loaded)[0].min() == x.min()
    out = capsys.readouterr().out
    assert out.partition('as images, pass --value_range ')[2].partition(' (')[0] == wanted
    assert not wanted or f'go from {x.min():.4g} to {x.max():.4g}). Without it' in out


@pytest.mark.parametrize('name', NAMES_OF_LABEL[:-1])
@pytest.mark.parametrize(
    ('y', 'classes', 'wanted'),
    [
        (np.array(['owl', 'cat'] * 20), ('cat', 'owl'), [1, 0] * 20),
        (np.array([b'owl', b'cat'] * 20), ('cat', 'owl'), [1, 0] * 20),
        (np.arange(40) % 4, (), [0, 1, 2, 3] * 10),
        (1 + np.arange(40) % 2, ('1', '2'), [0, 1] * 20),
        (np.array([0, 900] * 20), ('0', '900'), [0, 1] * 20),
        (np.array([True, False] * 20), ('False', 'True'), [1, 0] * 20),
        (np.arange(40)[:, None] % 4, (), [0, 1, 2, 3] * 10),
        (np.eye(3)[np.arange(40) % 2 * 2], ('0', '2'), [0, 1] * 20),
    ],
    ids=['text', 'bytes', 'numbers', 'from 1', 'gaps', 'bools', 'column', 'one-hot'],
)
def test_labels_become_classes_that_all_have_items(load, tmp_path, name, y, classes, wanted):
    np.savez(tmp_path / 'x.npz', x=np.arange(40, dtype=np.float32)[:, None], **{name: y})
    loaded = load(tmp_path / 'x.npz')
    got, label = both(loaded)
    assert loaded[0].spec.classes == classes and loaded[0].spec.num_classes == max(wanted) + 1
    assert label[got[:, 0].argsort()].tolist() == wanted


def test_class_names_may_be_in_the_file(load, tmp_path):
    names = np.array(['cat', 'dog', 'owl', 'yak'])
    np.savez(tmp_path / 'x.npz', x=np.zeros((40, 2)), y=np.arange(40) % 2 + 1, classes=names)
    assert load(tmp_path / 'x.npz')[0].spec.classes == ('dog', 'owl')
    np.savez(tmp_path / 'x.npz', x=np.zeros((40, 2)), y=np.arange(40) % 2 + 3, classes=names)
    assert load(tmp_path / 'x.npz')[0].spec.classes == ('3', '4')  # class 4 has no name


@pytest.mark.parametrize(
    'names',
    [
        ('x_train', 'y_train', 'x_test', 'y_test'),
        ('train_images', 'train_labels', 'val_images', 'val_labels'),
        ('X_train', 'target_train', 'X_test', 'target_test'),
        ('images', 'labels', 'images_valid', 'labels_valid'),
    ],
)
def test_parts_in_the_file_are_the_split(load, tmp_path, capsys, names):
    x, y = np.arange(60, dtype=np.uint16).reshape(60, 1, 1, 1) + np.zeros((1, 6, 5), np.uint16), np.arange(60) % 3 + 1
    values = dict(zip(names, (x[:40], y[:40, None], x[40:], y[40:, None]), strict=True))
    np.savez(tmp_path / 'x.npz', **values, eval_images=x[:9], eval_labels=y[:9])
    train, _, test = load(tmp_path / 'x.npz')
    assert train.spec.classes == ('1', '2', '3') and 'values 0 to 59' in train.about  # the largest of both parts
    for loader, rows in ((train, slice(40)), (test, slice(40, 60))):
        got, label = loader.everything()
        assert (got[:, 0, 0, 0] * 59).round().tolist() == x[rows, 0, 0, 0].tolist()
        assert label.tolist() == (y[rows] - 1).tolist()
    assert 'not used: eval_images uint16 (9, 1, 6, 5), eval_labels int64 (9,)\n' in capsys.readouterr().out
    assert load(tmp_path / 'x.npz', held_out=5)[2].size == 5


def test_an_array_that_may_hold_labels_is_named(load, tmp_path, capsys):
    np.savez(tmp_path / 'x.npz', x=np.zeros((40, 2)), kind=np.arange(40) % 3)
    assert load(tmp_path / 'x.npz')[0].spec.num_classes == 0
    assert 'not used: kind int64 (40,). If kind holds the classes, rename it to labels' in capsys.readouterr().out


def test_a_tenth_of_each_class_is_held_out_and_never_the_only_image(load, tmp_path, capsys):
    y = np.repeat(np.arange(15), [100, 50] + [1] * 13)
    np.savez(tmp_path / 'x.npz', x=np.zeros((len(y), 2)), y=y)
    train, _, test = load(tmp_path / 'x.npz')
    assert test.labels.bincount().tolist() == [11, 5] and min(train.spec.counts) == 1
    out = capsys.readouterr().out
    assert '15 classes: largest 0 100, smallest 2 1\n' in out and 'warning' not in out


def test_floats_with_a_range_are_drawn_and_shown_as_images(tiny_config, tmp_path, build_trainer):
    x = np.random.default_rng(0).uniform(-2, 2, (40, 8, 8, 3)).astype(np.float32)
    np.save(tmp_path / 'x.npy', x)
    settings = dict(dataset='arrays', data_path=str(tmp_path / 'x.npy'), value_range=(-2.0, 2.0))
    trainer = build_trainer(tiny_config(**settings))
    seen = trainer.train_loader.take(range(4))[0]
    assert trainer.gallery.are_images and torch.allclose(trainer.decode(trainer.encode(seen)), seen, atol=1e-6)
    assert trainer.encode(seen).min() < -0.9 and trainer.encode(seen).max() <= 1
    with pytest.raises(SettingError, match='bits: needs uint8 images'):
        trainer.judge.bits_per_dim(trainer.network, 4)
    with pytest.raises(SettingError, match='dequantize=True'):
        setup_data_train_and_test(tiny_config(**settings, dequantize=True), CPU)


def test_other_data_sets_do_not_read_layout_and_range(tiny_config, load, tmp_path):
    for settings in (dict(array_layout='channels_last'), dict(value_range=(0.0, 1.0))):
        with pytest.raises(SettingError, match="dataset='digits' does not read these"):
            setup_data_train_and_test(tiny_config(**settings), CPU)
        packed.write(tmp_path / 'x.pt', torch.zeros(4, 1, 2, 2), torch.zeros(4), held_out=1)
        with pytest.raises(SettingError, match='file stores both'):
            load(tmp_path / 'x.pt', **settings)


def test_files_that_cannot_be_used_are_named(load, tmp_path):
    for name, content, words in (
        ('gone.npy', None, 'there is no such file'),
        ('', None, 'this is a folder; --preset small_images reads a folder of images'),
        ('x.txt', b'1 2 3', 'its ending is not .npy, .npz, .zarr, .h5, .hdf5, .nc or .pt'),
        ('x.npy', b'1 2 3', r"cannot be read \(it is not a numpy file: it begins with b'1 2 3'\)"),
        ('x.npz', b'', 'cannot be read'),
        ('x.pt', b'1 2 3', 'cannot be read.*Make it again'),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SettingError, match=words):
            load(tmp_path / name)
    np.save(tmp_path / 'o.npy', np.array([[None, 'text']] * 4, object))
    with pytest.raises(SettingError, match=r'cannot be read.*Write plain numbers'):
        load(tmp_path / 'o.npy')
    torch.save(dict(network={}), tmp_path / 'checkpoint.pt')
    with pytest.raises(SettingError, match=r'was not written by prepare\.py'):
        load(tmp_path / 'checkpoint.pt')


def test_more_than_fits_into_memory_is_read_row_by_row(load, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / 'x.npz', x=np.arange(80, dtype=np.float32).reshape(40, 2), y=np.arange(40) % 4)
    whole = load(tmp_path / 'x.npz', num_workers=0)
    monkeypatch.setattr(arrays, 'LARGEST_SHUFFLED', 100)
    parts = load(tmp_path / 'x.npz', num_workers=0)
    for k in (0, 2):
        assert parts[k].resident is None
        for a, b in zip(parts[k].take(range(4)), whole[k].take(range(4)), strict=True):
            assert torch.equal(a, b)
    assert 'sh run.sh prepare.py --dataset arrays' in capsys.readouterr().out


def test_a_packed_file_is_read_in_place(load, tmp_path):
    x, label = torch.arange(20 * 48, dtype=torch.uint8).view(20, 3, 4, 4), torch.arange(20) % 2
    facts = dict(num_classes=2, classes=('no', 'yes'), scale='image', max_value=255, held_out=5)
    packed.write(tmp_path / 'x.pt', x, label, **facts)
    train, _, test = load(tmp_path / 'x.pt')
    assert torch.equal((test.everything()[0] * 255).round().byte(), x[:5])
    assert torch.equal((train.everything()[0] * 255).round().byte(), x[5:]) and train.spec.classes == ('no', 'yes')
    fewer = load(tmp_path / 'x.pt', held_out=3)
    assert (fewer[0].size, fewer[2].size) == (15, 3)  # held-out items are never trained on
    with pytest.raises(SettingError, match='has 5 held-out images'):
        load(tmp_path / 'x.pt', held_out=7)
    mark = train.fingerprint
    packed.write(tmp_path / 'x.pt', x.flip(0), label, **facts)
    assert load(tmp_path / 'x.pt')[0].fingerprint != mark


def test_arrays_without_names_are_images_and_classes(tiny_config, tmp_path):
    np.savez(tmp_path / 'x.npz', np.full((40, 8, 8), 99, np.uint8), np.arange(40) % 3)
    train, _, _ = setup_data_train_and_test(tiny_config(dataset='arrays', data_path=str(tmp_path / 'x.npz')), CPU)
    assert train.spec.num_classes == 3


def test_bytes_in_the_other_order_are_the_same_numbers(tiny_config, tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    found = []
    for kind in ('<f4', '>f4'):
        np.save(tmp_path / 'x.npy', x.astype(kind))
        settings = dict(dataset='arrays', data_path=str(tmp_path / 'x.npy'))
        found.append(setup_data_train_and_test(tiny_config(**settings), CPU)[0].everything()[0])
    assert torch.equal(*found)


def test_the_fingerprint_of_rows_depends_on_the_last():
    x = np.arange(60, dtype=np.float32).reshape(30, 2)
    other = x.copy()
    other[-1] = 1
    mark, changed = (
        arrays.ShuffledRows([arrays.Column('x', a)], np.zeros(30, int), np.arange(30)).fingerprint() for a in (x, other)
    )
    assert mark != changed and len(mark) == 128 and mark.startswith('8ce714547b2ecd2f60a8e13b')  # must stay


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='not Linux')
def test_a_file_is_mapped_privately(tmp_path):
    """FUSE and other file systems have no shared maps."""
    np.save(tmp_path / 'x.npy', RNG.normal(size=(5, 3)))
    x = stores.read_numpy(tmp_path / 'x.npy', 'here')['x']
    lines = Path('/proc/self/maps').read_text().splitlines()
    maps = [line.split()[1] for line in lines if line.endswith(f'{tmp_path}/x.npy')]
    assert isinstance(x, np.memmap) and maps and all(kind[3] == 'p' for kind in maps)
