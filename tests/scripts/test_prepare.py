"""prepare.py: a data set as one file, of pixels or of latents."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from config import SettingError
from data_loading import packed
from data_loading.images import list_images
from data_utils import DATASETS, DataSpec, setup_data_train_and_test
from scripts.prepare import PrepareConfig, prepare
from tests.data_loading.test_images import write_images
from tests.helpers import ROOT, launch_env

CPU = torch.device('cpu')
ENCODER = """
import torch

def encode(x):
    assert x.min() >= 0 and x.max() <= 1
    return torch.cat([3 * x.mean((2, 3), keepdim=True) + 1, x[:, :1, :1, :1]], 1)

def broken(x):
    return x[:3].mean((2, 3))

def infinite(x):
    return x / 0
"""


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / 'encoder.py').write_text(ENCODER)
    return str(tmp_path / 'encoder.py')


def load(config, path, **settings):
    train, _, test = setup_data_train_and_test(config(dataset='arrays', data_path=str(path), **settings), CPU)
    return train, test


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.take(range(a.size)), b.take(range(b.size)), strict=True))


def test_a_prepared_folder_gives_the_same_data_as_the_folder(tiny_config, tmp_path):
    write_images(tmp_path / 'images', {'cat': [(9, 9)] * 20, 'dog': [(30, 9)] * 15})
    given = dict(dataset='image_folder', data_path=str(tmp_path / 'images'), image_size=(8, 6), held_out=5)
    prepare(PrepareConfig(**given, out=str(tmp_path / 'x.pt')))
    direct = setup_data_train_and_test(tiny_config(**given), CPU)
    train, test = load(tiny_config, tmp_path / 'x.pt')
    assert (train.size, test.size) == (30, 5) and train.spec.classes == ('cat', 'dog') and train.spec.shape == (3, 8, 6)
    assert same(train, direct[0]) and same(test, direct[2])


@pytest.mark.parametrize('latents', [False, True])
def test_unreadable_images_are_skipped_wherever_they_are(tiny_config, tmp_path, encoder, latents):
    write_images(tmp_path / 'images', {'cat': [(9, 9)] * 20, 'dog': [(9, 9)] * 20})
    given = dict(dataset='image_folder', data_path=str(tmp_path / 'images'), image_size=(8,), held_out=5)
    given['data_dir'] = str(tmp_path / 'data')
    names = list_images(tiny_config(**given)).files
    for i in (0, 7, 39):  # a held-out image, a training image and the last one
        (tmp_path / 'images' / names[i]).write_bytes(b'no image')
    more = dict(latents=f'{encoder}:encode') if latents else {}
    prepare(PrepareConfig(**given, **more, skip_unreadable=True, out=str(tmp_path / 'x.pt')))
    train, test = load(tiny_config, tmp_path / 'x.pt')
    assert (train.size, test.size) == (33, 4)
    with pytest.raises(SettingError, match='cannot be read'):
        prepare(PrepareConfig(**given, **more, out=str(tmp_path / 'y.pt')))
    assert not (tmp_path / 'y.pt').exists()


def test_a_data_set_with_a_held_out_part_keeps_it(tiny_config, tmp_path):
    prepare(PrepareConfig(dataset='digits', out=str(tmp_path / 'x.pt')))
    direct = setup_data_train_and_test(tiny_config(), CPU)
    train, test = load(tiny_config, tmp_path / 'x.pt')
    assert train.spec.max_value == 16 and same(train, direct[0]) and same(test, direct[2])


def test_floats_stay_floats(tiny_config, tmp_path):
    np.save(tmp_path / 'x.npy', np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    prepare(PrepareConfig(dataset='arrays', data_path=str(tmp_path / 'x.npy'), out=str(tmp_path / 'x.pt')))
    direct = setup_data_train_and_test(tiny_config(dataset='arrays', data_path=str(tmp_path / 'x.npy')), CPU)
    train, test = load(tiny_config, tmp_path / 'x.pt')
    assert train.spec.scale == 'float' and same(train, direct[0]) and same(test, direct[2])


def test_images_with_a_value_range_stay_images_and_an_encoder_gets_them_in_0_to_1(tiny_config, tmp_path, encoder):
    np.save(tmp_path / 'x.npy', np.random.default_rng(0).uniform(-3, 3, (40, 3, 6, 6)))
    given = dict(dataset='arrays', data_path=str(tmp_path / 'x.npy'), value_range=(-3.0, 3.0))
    direct = setup_data_train_and_test(tiny_config(**given), CPU)
    prepare(PrepareConfig(**given, out=str(tmp_path / 'x.pt')))
    train, test = load(tiny_config, tmp_path / 'x.pt')
    assert train.spec.scale == 'image' and same(train, direct[0]) and same(test, direct[2])
    prepare(PrepareConfig(**given, out=str(tmp_path / 'z.pt'), latents=f'{encoder}:encode'))
    z, _ = load(tiny_config, tmp_path / 'z.pt')[0].everything()
    assert torch.equal(z[:, 3, 0, 0], direct[0].everything()[0][:, 0, 0, 0])


def test_latents_and_their_moments(tiny_config, tmp_path, encoder):
    write_images(tmp_path / 'images', {'cat': [(9, 9)] * 50, 'dog': [(9, 9)] * 30})
    given = dict(dataset='image_folder', data_path=str(tmp_path / 'images'), image_size=(8,))
    prepare(PrepareConfig(**given, out=str(tmp_path / 'z.pt'), latents=f'{encoder}:encode'))
    train, test = load(tiny_config, tmp_path / 'z.pt')
    z = torch.cat([test.everything()[0], train.everything()[0]])
    direct = setup_data_train_and_test(tiny_config(**given), CPU)
    x = torch.cat([direct[2].everything()[0], direct[0].everything()[0]])
    torch.testing.assert_close(z[:, :3, 0, 0], 3 * x.mean((2, 3)) + 1)
    assert torch.equal(z[:, 3, 0, 0], x[:, 0, 0, 0]) and train.spec.scale == 'float' and train.spec.num_classes == 2
    rows = train.everything()[0].double().transpose(0, 1).flatten(1)  # the moments ignore held-out images
    torch.testing.assert_close(torch.tensor(train.spec.mean).double(), rows.mean(1))
    torch.testing.assert_close(torch.tensor(train.spec.std).double(), rows.std(1, correction=0))


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        (dict(out='x.npy'), r'pass the file to write, as --out FILE\.pt'),
        (dict(latents='{0}:nothing'), "has no function 'nothing'"),
        (dict(latents='gone.py:encode'), "there is no file 'gone.py'"),
        (dict(latents='{0}:broken'), r'\(64, 1, 8, 8\) became \(3, 1\)\. The encoder must return finite'),
        (dict(latents='{0}:infinite'), 'with values that are not finite'),
        (dict(dataset='nothing'), "dataset='nothing'"),
    ],
)
def test_impossible_settings_are_refused_and_leave_no_file(tmp_path, encoder, settings, words):
    settings = {name: value.format(encoder) for name, value in settings.items()}
    with pytest.raises(SettingError, match=words):
        prepare(PrepareConfig(**(dict(dataset='digits', out=str(tmp_path / 'x.pt')) | settings)))
    assert {path.name for path in tmp_path.iterdir()} - {'__pycache__'} == {'encoder.py'}


def test_pairs_are_refused(tmp_path, monkeypatch):
    pairs = torch.zeros(9, 2), torch.zeros(9), torch.ones(9, 2)
    monkeypatch.setitem(DATASETS, 'pairs', DataSpec(lambda config: (pairs, pairs), scale='float'))
    with pytest.raises(SettingError, match=r"dataset='pairs': prepare\.py cannot store pairs \(x, label, x1\)"):
        prepare(PrepareConfig(dataset='pairs', data_dir=str(tmp_path), out=str(tmp_path / 'x.pt')))
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / 'x.pt').write_text('mine')
    with pytest.raises(SettingError, match='already exists'):
        prepare(PrepareConfig(dataset='digits', out=str(tmp_path / 'x.pt')))
    assert (tmp_path / 'x.pt').read_text() == 'mine'


def test_a_lack_of_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, 'space_for', lambda path: 1000)
    with pytest.raises(SettingError, match='Make room, or choose another place'):
        prepare(PrepareConfig(dataset='digits', out=str(tmp_path / 'x.pt')))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_as_a_command(tmp_path):
    command = ['sh', 'run.sh', 'prepare.py', '--dataset', 'digits', '--out', str(tmp_path / 'x.pt')]
    done = subprocess.run(command, cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f'train on it: sh run.sh --dataset arrays --data_path {tmp_path / "x.pt"}' in done.stdout
    assert 'digest' in done.stdout and Path(tmp_path / 'x.pt').stat().st_size < 200_000
    again = subprocess.run(command, cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=100)
    assert again.returncode == 2 and again.stderr.startswith('SettingError: out=') and 'Traceback' not in again.stderr


def test_latents_keep_their_classes_and_constant_channels_have_std_0(tiny_config, tmp_path):
    (tmp_path / 'e.py').write_text(
        'import torch\ndef encode(x):\n'
        '    constant = torch.linspace(0.1, 1, 50).view(-1, 1, 1).expand(len(x), 50, *x.shape[2:])\n'
        '    return torch.cat([x[:, :1], constant], 1)\n'
    )
    prepare(PrepareConfig(dataset='digits', latents=f'{tmp_path}/e.py:encode', out=str(tmp_path / 'z.pt')))
    train, _ = load(tiny_config, tmp_path / 'z.pt')
    direct = setup_data_train_and_test(tiny_config(), CPU)[0]
    (z, label), (x, direct_label) = train.everything(), direct.everything()
    assert torch.equal(label, direct_label) and torch.allclose(z[:, :1], x)  # 16 grey levels, in [0, 1]
    assert np.isfinite(train.spec.std).all() and max(train.spec.std[1:]) < 1e-6
