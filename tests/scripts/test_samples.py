"""Files of samples: their paths, resuming, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from config import SettingError
from reports.plots import image_grid
from scripts.samples import SampleFiles

X = torch.linspace(0, 1, 6 * 64).view(6, 1, 8, 8)


def test_the_path_of_a_file_follows_from_its_index(tmp_path):
    out = SampleFiles(str(tmp_path / 'x'), True, {})
    assert out.png(123) == tmp_path / 'x/000/000123.png' and out.png(1234) == tmp_path / 'x/001/001234.png'


def test_a_folder_holds_the_images_and_a_grid(tmp_path):
    out = SampleFiles(str(tmp_path / 'x'), True, {})
    out.claim()
    out.add([0, 3], X[[0, 3]], None)
    assert out.existing() == {0, 3}
    out.add([1, 2, 4, 5], X[[1, 2, 4, 5]], None)
    out.finish(4, draw=partial(image_grid, columns=2))
    with Image.open(out.png(3)) as image:
        assert np.array_equal(np.array(image), (X[3, 0] * 255).round().byte().numpy())
    with Image.open(tmp_path / 'x/grid.png') as grid:
        assert grid.size == (2 + 2 * 106, 2 + 2 * 106)  # each 8 x 8 image is enlarged 13 times, to 104 pixels


def test_one_file_holds_all_samples_in_order_and_can_be_extended(tmp_path):
    out = SampleFiles(str(tmp_path / 'x.npz'), False, {})
    out.claim()
    label = torch.arange(6)
    out.add([4, 5], X[4:], label[4:])
    out.add([0, 1], X[:2], label[:2])
    out.finish(2)  # samples 2 and 3 are missing, so only samples 0 and 1 are in the file
    assert len(np.load(tmp_path / 'x.npz')['arr_0']) == 2 and out.existing() == {0, 1, 4, 5}
    out.add([2, 3], X[2:4], label[2:4])
    out.finish(6)
    whole = np.load(tmp_path / 'x.npz')
    assert np.array_equal(whole['arr_0'], X.numpy()) and whole['arr_1'].tolist() == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in (tmp_path / 'x.npz.parts').iterdir()] == ['generate.json']
    assert not (tmp_path / 'x_grid.png').exists()  # these samples are not images


def test_a_sample_in_two_batches_is_in_the_file_once_and_no_class_is_minus_one(tmp_path):
    out = SampleFiles(str(tmp_path / 'x.npz'), False, {})
    out.claim()
    for rows in (range(4), range(2, 6)):
        out.add(rows, X[list(rows)], None)
    out.finish(6)
    whole = np.load(tmp_path / 'x.npz')
    assert np.array_equal(whole['arr_0'], X.numpy()) and whole['arr_1'].tolist() == [-1] * 6


@pytest.mark.parametrize('layout', ['', 'channels_first', 'channels_last', 'no_channels'])
def test_floats_have_the_axes_of_the_data_and_their_conditions(tmp_path, layout):
    x = torch.randn(6, 1 if layout == 'no_channels' else 2, 5, 3)
    in_file = dict(channels_last=x.permute(0, 2, 3, 1), no_channels=x[:, 0]).get(layout, x)
    cond, drawn = dict(wind=torch.randn(6, 2), augmentation=torch.zeros(6, 9)), []
    for part in ([0, 1, 2], [3, 4, 5]):  # the second time, the file is finished
        out = SampleFiles(str(tmp_path / 'x.npz'), False, {}, layout)
        out.claim()
        out.add(part, x[part], None, {name: value[part] for name, value in cond.items()})
        out.finish(part[-1] + 1, draw=lambda x: drawn.append(x) or torch.zeros(3, 4, 4, dtype=torch.uint8))
    whole = np.load(tmp_path / 'x.npz')
    assert {*whole} == {'arr_0', 'arr_1', 'cond_wind'} and np.array_equal(whole['arr_0'], in_file.numpy())
    assert np.array_equal(whole['cond_wind'], cond['wind'].numpy()) and drawn[1].equal(x)


def test_a_longer_table_is_kept(tmp_path):
    out = SampleFiles(str(tmp_path / 'x'), True, {})
    out.claim()
    for label in ([1, 0, 1], [1, 0]):
        out.write_labels(label, ['cat', 'dog', 'none'])
        assert len((tmp_path / 'x/labels.csv').read_text().splitlines()) == 4


def test_samples_that_are_not_images_need_a_file(tmp_path):
    with pytest.raises(SettingError, match=r'PNGs hold only images in \[0, 1\]'):
        SampleFiles(str(tmp_path / 'x'), False, {})


def test_samples_of_other_settings_are_not_mixed(tmp_path):
    SampleFiles(str(tmp_path / 'x'), True, dict(seed=0, pair=(1, 2))).claim()
    SampleFiles(str(tmp_path / 'x'), True, dict(seed=0, pair=(1, 2))).claim()
    with pytest.raises(SettingError, match=r'of other settings \(there -> now\): seed: 0 -> 1. Pass another --out'):
        SampleFiles(str(tmp_path / 'x'), True, dict(seed=1, pair=(1, 2))).claim()
