"""A data set of Hugging Face `datasets`, from a local folder of parquet files, as the hub stores them."""

import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from config import SettingError
from data_utils import setup_data_train_and_test

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test contacts the hub."""

    def refuse(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    datasets.disable_progress_bars()


def write(folder: Path, splits: dict[str, int], mode='RGB', **columns) -> None:
    """A parquet file for each split, with images of one colour, whose first channel is 50 times their class."""
    features = datasets.Features(
        {'picture': datasets.Image(), 'kind': datasets.ClassLabel(names=['cat', 'dog', 'owl'])}
        | {name: kind for name, (kind, _) in columns.items()}
    )
    for split, n in splits.items():
        label = [i % 3 for i in range(n)]
        pictures = [Image.new(mode, (12, 9), 50 * k if mode == 'L' else (50 * k, i, 7)) for i, k in enumerate(label)]
        more = {name: list(map(value, range(n))) for name, (_, value) in columns.items()}
        rows = dict(picture=pictures, kind=label) | more
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f'{split}-00000-of-00001.parquet'))


@pytest.fixture
def load(tiny_config, tmp_path):
    def make(path=None, **settings):
        path = str(path or tmp_path / 'hub')
        default = dict(dataset='hub', data_path=path, image_size=(8,), num_workers=0)
        return setup_data_train_and_test(tiny_config(**(default | settings)), CPU)

    (tmp_path / 'hub').mkdir()
    return make


@pytest.mark.parametrize('cache', [True, False])
@pytest.mark.parametrize('split', ['test', 'validation'])
def test_images_classes_and_the_held_out_split(load, tmp_path, capsys, cache, split):
    write(tmp_path / 'hub', {'train': 20, split: 7})
    train, _, test = load(cache=cache)
    assert (train.size, test.size) == (20, 7) and train.spec.classes == ('cat', 'dog', 'owl')
    for loader in (train, test):
        x, label = loader.take(range(loader.size))
        assert x.shape[1:] == (3, 8, 8) and label.tolist() == [i % 3 for i in range(loader.size)]
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), 50 * label)
        assert (x[:, 1, 0, 0] * 255).round().tolist() == list(range(loader.size))
    assert not cache or 'cat 10, dog 9, owl 8' in capsys.readouterr().out


def test_without_a_held_out_split_a_shuffled_tenth_is(load, tmp_path):
    write(tmp_path / 'hub', {'train': 40}, mode='L')
    train, _, test = load()
    assert (train.size, test.size, train.spec.shape) == (36, 4, (1, 8, 8))
    assert torch.cat([train.everything()[1], test.everything()[1]]).bincount().tolist() == [14, 13, 13]
    assert load(seed=5)[0].fingerprint == train.fingerprint
    assert load(held_out=9)[2].size == 9
    assert not torch.equal(load(held_out=30)[2].everything()[1], torch.arange(30) % 3)


def test_columns_are_found_or_named(load, tmp_path):
    more = dict(
        other=(datasets.Image(), lambda i: Image.new('RGB', (9, 9), (200, 0, 0))),
        age=(datasets.Value('int32'), lambda i: i % 5),
        name=(datasets.Value('string'), str),
    )
    write(tmp_path / 'hub', {'train': 20}, **more)
    with pytest.raises(SettingError, match=r"which column holds the images; image columns: \['picture', 'other'\]"):
        load()
    assert load(columns=('picture',))[0].spec.num_classes == 3
    train, *_ = load(columns=('other', 'age'))
    x, _ = train.everything()
    assert train.spec.num_classes == 5 and (x[:, 0] * 255).round().unique().tolist() == [200]
    for columns, words in (
        (('age',), "column 'age' does not hold images"),
        (('picture', 'name'), "'name' does not hold classes"),
        (('picture', 'gone'), "'gone' does not hold classes.*there are picture, kind, other, age, name"),
    ):
        with pytest.raises(SettingError, match=words):
            load(columns=columns)


def test_a_row_that_is_no_image_is_named_or_left_out(load, tmp_path):
    features = datasets.Features({'picture': datasets.Image(decode=False)})
    rows = [dict(bytes=b'text' if i == 3 else png(i), path=None) for i in range(12)]
    table = datasets.Dataset.from_dict(dict(picture=rows), features=features).cast_column('picture', datasets.Image())
    table.to_parquet(str(tmp_path / 'hub/train.parquet'))
    with pytest.raises(SettingError, match=r"1 of 12 cannot be read\. row \d+, column 'picture' cannot be read"):
        load()
    train, _, test = load(skip_unreadable=True)
    assert train.size + test.size == 11 and train.spec.num_classes == 0


def png(i: int) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(np.full((9, 9), 10 * i, np.uint8)).save(file, 'png')
    return file.getvalue()


@pytest.mark.parametrize(
    ('path', 'words'),
    [
        ('nobody/nothing', r"data_path='nobody/nothing' cannot be loaded .*that there is a network"),
        ('', 'needs the name of a data set, or a folder'),
        ('empty', 'cannot be loaded'),
    ],
)
def test_what_is_not_there_is_one_clear_line(tiny_config, tmp_path, path, words):
    if path == 'empty':
        path = str(tmp_path / 'empty')
        Path(path).mkdir()
    with pytest.raises(SettingError, match=words) as caught:
        setup_data_train_and_test(tiny_config(dataset='hub', data_path=path, image_size=(8,)), CPU)
    assert '\n' not in str(caught.value)


def test_the_package_is_optional(load, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
    with pytest.raises(SettingError, match='pip install datasets'):
        load()


def test_a_held_out_split_is_never_trained_on(load, tmp_path):
    write(tmp_path / 'hub', {'train': 20, 'test': 9})
    train, _, test = load(held_out=4)
    assert (train.size, test.size) == (20, 4)
    with pytest.raises(SettingError, match='has 9 held-out images'):
        load(held_out=10)


def test_where_there_are_both_the_validation_split_is_held_out(load, tmp_path):
    write(tmp_path / 'hub', {'train': 20, 'validation': 5, 'test': 9})
    assert load()[2].size == 5


def test_height_comes_before_width_and_other_sizes_are_decoded_again(load, tmp_path):
    write(tmp_path / 'hub', {'train': 20})
    assert load(image_size=(8, 6))[0].spec.shape == (3, 8, 6)
    assert load(image_size=(4,))[0].spec.shape == (3, 4, 4)


def test_other_files_are_decoded_again(load, tmp_path):
    write(tmp_path / 'hub', {'train': 20})
    first = load()[0]
    write(tmp_path / 'hub', {'train': 20}, mode='L')
    assert load()[0].spec.shape == (1, 8, 8) and first.spec.shape == (3, 8, 8)
