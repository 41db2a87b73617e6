"""The data sets of scikit-learn and torchvision: their contents, and the errors when they cannot be had."""

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

from config import SettingError
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
    """(folder, its address, requested paths): a web server on this machine."""
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
    """As from a package that repacks them. Unpacked, they are taken."""
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
