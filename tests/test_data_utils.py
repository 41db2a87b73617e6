"""The data sets of scikit-learn and torchvision, the table of data sets, and loaders made from its entries."""

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import re
import socket
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
import torchvision

import data_utils
from config import SettingError
from data_loading.toy2d import TOY2D
from data_utils import DATASETS, setup_data_train_and_test

CPU = torch.device('cpu')


def test_digits_is_the_agreed_split(tiny_config):
    train, _, test = setup_data_train_and_test(tiny_config(), CPU)
    digits, order = sklearn.datasets.load_digits(), np.random.default_rng(0).permutation(1797)
    for loader, chosen in ((train, order[:1500]), (test, order[1500:])):
        images, labels = loader.everything()
        assert images.shape == (len(chosen), 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert np.array_equal(images[:, 0].numpy() * 16, digits.images[chosen])  # k/16 is exact in float32
        assert np.array_equal(labels.numpy(), digits.target[chosen])


@pytest.fixture
def server(tmp_path):
    """(served folder, its address, requested paths): a web server on this machine."""
    folder, requested = tmp_path / 'served', []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requested.append(self.path)

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(folder))) as made:
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        yield folder, f'http://127.0.0.1:{made.server_port}/', requested
        made.shutdown()


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def serve_mnist(server, monkeypatch) -> list[np.ndarray]:
    """[train images (60, 28, 28), train labels, test images (20, 28, 28), test labels], served as idx-ubyte files."""
    folder, address, _ = server
    rng = np.random.default_rng(1)
    shapes = ((60, 28, 28), (60,), (20, 28, 28), (20,))
    arrays = [rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8) for shape in shapes]
    resources = []
    for (name, _), array in zip(torchvision.datasets.MNIST.resources, arrays, strict=True):
        header = struct.pack(f'>I{array.ndim}I', 0x0800 + array.ndim, *array.shape)  # 08: unsigned bytes
        (folder / name).write_bytes(gzip.compress(header + array.tobytes()))
        resources.append((name, md5(folder / name)))
    monkeypatch.setattr(torchvision.datasets.MNIST, 'mirrors', [address])
    monkeypatch.setattr(torchvision.datasets.MNIST, 'resources', resources)
    return arrays


def serve_cifar10(server, monkeypatch) -> list[np.ndarray]:
    """[train images (50, 3, 32, 32), labels, test images (20, 3, 32, 32), labels], served as a tar.gz of pickles."""
    folder, address, _ = server
    rng = np.random.default_rng(2)
    batches = [
        dict(data=rng.integers(0, 256, (n, 3072), dtype=np.uint8), labels=rng.integers(0, 10, n).tolist())
        for n in (10,) * 5 + (20,)
    ]
    contents = [*batches, dict(label_names=list('abcdefghij'))]
    names = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch', 'batches.meta']
    sums = {}
    archive = folder / 'cifar-10-python.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
        for name, content in zip(names, contents, strict=True):
            raw = pickle.dumps(content)
            sums[name] = hashlib.md5(raw).hexdigest()
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, 'url', address + archive.name)
    monkeypatch.setattr(cifar, 'tgz_md5', md5(archive))
    monkeypatch.setattr(cifar, 'train_list', [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(cifar, 'test_list', [['test_batch', sums['test_batch']]])
    monkeypatch.setattr(cifar, 'meta', cifar.meta | {'md5': sums['batches.meta']})
    images = [batch['data'].reshape(-1, 3, 32, 32) for batch in batches]
    labels = [np.array(batch['labels']) for batch in batches]
    return [np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5]]


@pytest.mark.parametrize('name, serve', [('mnist', serve_mnist), ('cifar10', serve_cifar10)])
def test_downloaded_pixels_come_out_as_they_went_in(name, serve, server, tiny_config, monkeypatch):
    arrays = serve(server, monkeypatch)
    requested = server[2]
    config = tiny_config(dataset=name)
    for again in (False, True):
        requested.clear()
        train, _, test = setup_data_train_and_test(config, CPU)
        assert bool(requested) is not again  # the second time nothing is downloaded
        for loader, images, labels in ((train, *arrays[:2]), (test, *arrays[2:])):
            got, got_labels = loader.everything()
            assert got.shape[1:] == DATASETS[name].shape
            assert np.array_equal((got * 255).round().byte().numpy().reshape(images.shape), images)
            assert np.array_equal(got_labels.numpy(), labels)
            assert got_labels.dtype == torch.int64


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize('name', ['mnist', 'cifar10'])
def test_no_network_says_what_to_do(name, tiny_config, monkeypatch):
    nowhere = f'http://127.0.0.1:{free_port()}/'
    monkeypatch.setattr(torchvision.datasets.MNIST, 'mirrors', [nowhere])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'url', nowhere + 'cifar-10-python.tar.gz')
    with pytest.raises(SettingError, match='--dataset digits') as caught:
        setup_data_train_and_test(tiny_config(dataset=name), CPU)
    assert f"dataset='{name}'" in str(caught.value) and tiny_config().data_dir in str(caught.value)


@pytest.mark.parametrize(
    'name, serve, file, remedy',
    [
        ('mnist', serve_mnist, 'MNIST/raw/train-images-idx3-ubyte.gz', r'gunzip -k .*MNIST/raw/\*\.gz\.$'),
        ('cifar10', serve_cifar10, 'cifar-10-python.tar.gz', r'copy it again\.$'),
    ],
)
def test_files_with_other_checksums_are_not_called_absent(name, serve, file, remedy, server, tiny_config, monkeypatch):
    """Such files come from a package that repacks them. Unpacked, they are accepted."""
    arrays = serve(server, monkeypatch)
    nowhere = f'http://127.0.0.1:{free_port()}/'
    monkeypatch.setattr(torchvision.datasets.MNIST, 'mirrors', [nowhere])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'url', nowhere + 'cifar-10-python.tar.gz')
    config = tiny_config(dataset=name)
    folder = (Path(config.data_dir) / file).parent
    folder.mkdir(parents=True)
    for path in server[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    repacked = folder / Path(file).name
    repacked.write_bytes(gzip.compress(gzip.decompress(repacked.read_bytes()), 1, mtime=1))
    with pytest.raises(SettingError) as caught:
        setup_data_train_and_test(config, CPU)
    text = str(caught.value)
    assert f'{repacked.name} in {folder}: there, but with other checksums' in text and 'not in' not in text
    assert re.search(remedy, text) and '\n' not in text and len(re.findall(r'\.gz', text.split(': there')[0])) == 1
    if name == 'mnist':
        for path in folder.glob('*.gz'):
            path.with_suffix('').write_bytes(gzip.decompress(path.read_bytes()))
        images, _ = setup_data_train_and_test(config, CPU)[0].everything()
        assert np.array_equal((images * 255).round().byte().numpy()[:, 0], arrays[0])


FASHION = Path('/usr/share/datasets/fashion-mnist')  # Debian's dataset-fashion-mnist


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(tiny_config, capsys):
    config = tiny_config(dataset='fashion_mnist', held_out=1000)
    folder = Path(config.data_dir, 'FashionMNIST/raw')
    folder.mkdir(parents=True)
    for path in FASHION.glob('*.gz'):
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    train, _, test = setup_data_train_and_test(config, CPU)
    assert (train.size, test.size, train.spec.shape) == (60_000, 1000, (1, 28, 28))
    assert train.labels.bincount().tolist() == [6000] * 10
    x, _ = train.everything()
    assert x.mean().item() == pytest.approx(0.2860, abs=1e-4) and x.std().item() == pytest.approx(0.3530, abs=1e-4)
    assert 'T-shirt/top 6' in capsys.readouterr().out and train.spec.classes[9] == 'Ankle boot'
    with pytest.raises(SettingError, match=r"held_out=10001: dataset='fashion_mnist' has 10000 held-out images"):
        setup_data_train_and_test(tiny_config(dataset='fashion_mnist', held_out=10_001), CPU)


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
