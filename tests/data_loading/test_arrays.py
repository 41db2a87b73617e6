"""Arrays in files as a data set: .npy, .npz, and prepared files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from config import SettingError
from data_loading import arrays, packed
from data_utils import setup_data_train_and_test

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


@pytest.mark.parametrize('shape', [(40, 2), (40, 3, 4, 5), (40, 7, 3, 2, 2)])
@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.float16])
def test_floats_are_taken_as_they_are(load, tmp_path, shape, dtype):
    x = (30 * RNG.normal(size=shape)).astype(dtype)
    np.savez(tmp_path / 'x.npz', x=x, y=np.arange(40) % 3)
    loaded = load(tmp_path / 'x.npz')
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
        (
            dict(x=np.zeros((8, 4, 4), np.int32)),
            r'the data are int32 \(8, 4, 4\)\. They must be uint8 images or floats',
        ),
        (dict(x=np.zeros(8)), r'float64 \(8,\)'),
        (dict(x=np.zeros((8, 4), np.uint8)), r'uint8 data of shape \(8, 4\) are not images'),
        (dict(photos=np.zeros((8, 4))), 'holds photos. Name the data one of images, x'),
        (dict(x=np.zeros((8, 4)), y=np.zeros(7, int)), r'labels are int64 \(7,\).*for each of 8'),
        (dict(x=np.zeros((8, 4)), y=np.zeros(8)), r'labels are float64 \(8,\)'),
        (dict(x=np.zeros((8, 4)), y=np.arange(8) - 1), r'labels are int64 \(8,\), from -1'),
        (dict(x=np.zeros((8, 4)), y=np.array([1_000_000, *range(7)])), r'only 8 of 1000001 classes occur'),
        (dict(x=np.full((8, 4), np.nan)), r'hold NaN or infinite values'),
        (dict(x=np.zeros((0, 4)), y=np.zeros(0, int)), 'there are 0 images'),
        (dict(x=np.zeros((1, 4))), 'there are 1 images, and at least two'),
    ],
)
def test_bad_arrays_are_named_before_training(load, tmp_path, arrays, words):
    np.savez(tmp_path / 'x.npz', **arrays)
    with pytest.raises(SettingError, match=words):
        load(tmp_path / 'x.npz')


def test_files_that_cannot_be_used_are_named(load, tmp_path):
    for name, content, words in (
        ('gone.npy', None, 'there is no such file'),
        ('x.txt', b'1 2 3', 'its ending is none of .npy, .npz and .pt'),
        ('x.npy', b'1 2 3', 'cannot be read'),
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
    assert (fewer[0].size, fewer[2].size) == (15, 3)  # what was held out is never trained on
    with pytest.raises(SettingError, match='has 5 held-out images'):
        load(tmp_path / 'x.pt', held_out=7)
    mark = train.fingerprint
    packed.write(tmp_path / 'x.pt', x.flip(0), label, **facts)
    assert load(tmp_path / 'x.pt')[0].fingerprint != mark


def test_arrays_without_names_are_images_and_classes(tiny_config, tmp_path):
    np.savez(tmp_path / 'x.npz', np.zeros((40, 8, 8), np.uint8), np.arange(40) % 3)
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


def test_channels_may_be_last():
    assert arrays.channels_first(np.zeros((9, 6, 5, 4), np.uint8), '').shape == (9, 4, 6, 5)


def test_the_fingerprint_of_rows_depends_on_the_last():
    x = np.arange(60, dtype=np.float32).reshape(30, 2)
    other = x.copy()
    other[-1] = 1
    mark, changed = (arrays.ShuffledRows(a, np.zeros(30, int), np.arange(30)).fingerprint() for a in (x, other))
    assert mark != changed and len(mark) == 128 and mark.startswith('8ce714547b2ecd2f60a8e13b')  # must stay
