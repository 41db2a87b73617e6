"""The table of data sets, and how loaders are set up from its entries."""

import pytest
import torch

import data_utils
from config import SettingError
from data_loading.toy2d import TOY2D
from data_utils import DATASETS, setup_data_train_and_test

CPU = torch.device('cpu')


@pytest.mark.parametrize('name', DATASETS)
def test_specs_are_sensible(name):
    spec = DATASETS[name]
    assert (spec.shape is None) == (name in ('image_folder', 'arrays', 'hub'))  # read from the files
    if spec.scale == 'float':
        assert name in TOY2D and spec.shape == (2,)
        return
    channels, height, width = spec.shape or (3, 1, 1)
    assert channels in (1, 3) and height == width
    assert name not in ('digits', 'mnist') or not (spec.flip_keeps_label or spec.rotation_keeps_label)
    assert spec.max_value == (16 if name == 'digits' else 255)


def test_an_unknown_data_set_lists_the_choices(tiny_config):
    with pytest.raises(SettingError, match=r"dataset='minst'.*digits, mnist, .*'mnist'"):
        data_utils.get_dataset(tiny_config(dataset='minst'))


@pytest.mark.parametrize('name', ['digits', 'mnist', 'image_folder'])
@pytest.mark.parametrize('below', ['', 'below'])
def test_a_data_dir_that_is_not_a_folder_is_named(name, below, tiny_config, tmp_path):
    (tmp_path / 'file').write_text('')
    folder = str(tmp_path / 'file' / below)
    with pytest.raises(SettingError) as caught:
        setup_data_train_and_test(tiny_config(dataset=name, data_dir=folder), CPU)
    assert folder in str(caught.value)


def test_held_out_are_the_first_of_the_held_out_part(tiny_config):
    few, whole = (setup_data_train_and_test(tiny_config(held_out=n), CPU)[2] for n in (10, 0))
    assert few.size == 10 and torch.equal(few.everything()[0], whole.take(range(10))[0])
    with pytest.raises(SettingError, match=r"held_out=298: dataset='digits' has 297 held-out images"):
        setup_data_train_and_test(tiny_config(held_out=298), CPU)


def test_facts_found_while_loading_replace_fields_of_the_spec(tiny_config, monkeypatch):
    part = torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.arange(9) % 3
    facts = dict(num_classes=3, classes=('a', 'b', 'c'), skipped='skipped 2 files')
    monkeypatch.setitem(DATASETS, 'mine', data_utils.DataSpec(lambda config: (part, part, facts)))
    train, _, test = setup_data_train_and_test(tiny_config(dataset='mine'), CPU)
    assert train.spec.classes == ('a', 'b', 'c') and train.labels.tolist() == [0, 1, 2] * 3
    assert train.about == 'mine: 9 + 9 held-out items of shape 1x4x4, 3 classes: a 6, b 6, c 6; skipped 2 files'
    assert train.fingerprint == test.fingerprint and train.fingerprint.startswith('9+9 items, 3 classes, ')
