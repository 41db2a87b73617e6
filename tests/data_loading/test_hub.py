"""Tables of Hugging Face `datasets`: the columns of images and classes, and the held-out part."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from config import SettingError
from data_utils import setup_data_train_and_test


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((9, 9), 5 * i, np.uint8)).save(file, 'png')
    return file.getvalue()


@pytest.fixture
def load(tiny_config, tmp_path):
    """`load(table, **settings)`: the loaders of a parquet file with 40 images and these columns."""
    datasets.disable_progress_bars()

    def make(table, broken=(), name='train.parquet', path='hub', image='image', **settings):
        (tmp_path / 'hub').mkdir(exist_ok=True)
        rows = {image: [b'text' if i in broken else png(i) for i in range(40)]} | table
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / 'hub' / name))
        config = tiny_config(dataset='hub', data_path=str(tmp_path / path), image_size=(8,), num_workers=0, **settings)
        return setup_data_train_and_test(config, torch.device('cpu'))

    return make


@pytest.mark.parametrize('name', ['label', 'labels', 'class', 'target'])
@pytest.mark.parametrize(
    ('values', 'classes', 'wanted'),
    [
        ([i % 3 + 1 for i in range(40)], ('1', '2', '3'), [0, 1, 2]),
        ([('owl', 'cat', 'dog')[i % 3] for i in range(40)], ('cat', 'dog', 'owl'), [2, 0, 1]),
    ],
)
def test_the_only_column_called_label_holds_the_classes(load, name, values, classes, wanted):
    """Images may be bytes. The held-out part has all classes, and no items of the training part."""
    train, _, test = load({name: values, 'size': [9] * 40})
    (x, label), (held_out_x, held_out_label) = train.everything(), test.everything()
    assert train.spec.classes == classes and held_out_label.bincount().min() >= 1
    items = (torch.cat([x, held_out_x])[:, 0, 0, 0] * 51).round().long()
    assert sorted(items.tolist()) == list(range(40))
    assert torch.cat([label, held_out_label]).tolist() == [wanted[i % 3] for i in items]
    assert items[len(x) :].tolist() != [0, 1, 2, 3]  # files are often sorted


def test_the_held_out_part_of_a_sorted_table_has_all_classes(load):
    held_out = load(dict(label=[0] * 20 + [1] * 20))[2]
    assert held_out.labels.tolist().count(1) == 2


def test_without_classes_prints_the_flag_that_names_them(load, capsys):
    two = dict(label=[0, 1] * 20, target=[1, 0] * 20)
    assert load(two)[0].spec.num_classes == 0
    text = "hub: no classes: cannot tell which of ['label', 'target'] holds them. If label or target holds them, pass"
    assert f'{text} --columns image CLASS\n' in capsys.readouterr().out
    assert load(two, columns=('image', 'target'))[0].spec.num_classes == 2
    assert load(dict(kind=['a', 'b'] * 20, weight=[0.5] * 40))[0].spec.num_classes == 0
    assert 'called label. If kind holds them, pass --columns image CLASS' in capsys.readouterr().out
    load({})
    assert 'no classes:' not in capsys.readouterr().out


def test_one_file_is_read(load):
    train, _, test = load(dict(label=[0, 1] * 20), path='hub/train.parquet')
    assert (train.size, test.size, train.spec.num_classes) == (36, 4, 2)
    with pytest.raises(SettingError, match=r'this file is not \.parquet'):
        load({}, name='train.csv', path='hub/train.csv')


@pytest.mark.parametrize(
    ('table', 'settings', 'words'),
    [
        (dict(label=['a'] * 39 + [None]), {}, "column 'label': row 39 holds no class"),
        (dict(label=[-1, 1] * 20), {}, r"column 'label': labels are int64 \(40,\), the smallest -1"),
        (dict(label=[None] + ['a'] * 39), {}, "column 'label': row 0 holds no class"),
        (dict(score=[0.5, 1.5] * 20), dict(columns=('image', 'score')), "column 'score': labels are float64"),
        (
            dict(other=[png(1)] * 40),
            {},
            r"cannot tell which column holds the images; image columns: \['image', 'other'",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_named(load, table, settings, words):
    with pytest.raises(SettingError, match=words):
        load(table, **settings)


def test_without_a_column_of_images_lists_all_columns(tiny_config, tmp_path):
    datasets.Dataset.from_dict(dict(a=[1, 2], b=['x', 'y'])).to_parquet(str(tmp_path / 'x.parquet'))
    config = tiny_config(dataset='hub', data_path=str(tmp_path / 'x.parquet'))
    with pytest.raises(SettingError, match=r'no column holds images.*columns: a \(int64\), b \(string\)\.'):
        setup_data_train_and_test(config, torch.device('cpu'))


def test_a_broken_row_is_named_as_in_the_file(load, tmp_path):
    with pytest.raises(SettingError, match=r"1 of 40 cannot be read\. row 5, column 'image' cannot be read"):
        load(dict(label=[0, 1] * 20), broken=(5,))
    Path(tmp_path / 'hub/train.parquet').rename(tmp_path / 'hub/test.parquet')
    with pytest.raises(SettingError, match=r"row 5 of split 'test', column 'image' cannot be read"):
        load(dict(label=[0, 1] * 20))
