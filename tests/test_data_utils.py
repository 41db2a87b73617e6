"""The data sets: what they hold, and what is said when they cannot be had."""

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
from PIL import Image

import data_utils
from config import SettingError
from data_checks import DataError
from data_utils import DATASETS, setup_data_train_and_test

CPU = torch.device('cpu')


# ---------------------------------------------------------------- the data sets


def test_digits_is_the_agreed_split(tiny_config):
    train, _, test = setup_data_train_and_test(tiny_config(), CPU)
    digits, order = sklearn.datasets.load_digits(), np.random.default_rng(0).permutation(1797)
    for loader, chosen in ((train, order[:1500]), (test, order[1500:])):
        images, labels = loader.everything()
        assert images.shape == (len(chosen), 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert np.array_equal(images[:, 0].numpy() * 16, digits.images[chosen])  # k/16 is exact in float32
        assert np.array_equal(labels.numpy(), digits.target[chosen])


@pytest.mark.parametrize('name', DATASETS)
def test_specs_are_sensible(name):
    spec = DATASETS[name]
    channels, height, width = spec.shape
    assert channels in (1, 3) and height == width
    assert (height == 0) == (name == 'image_folder')  # whose size is a setting
    assert name not in ('digits', 'mnist') or not (spec.flip_keeps_label or spec.rotation_keeps_label)
    assert spec.max_value == (16 if name == 'digits' else 255)
    assert not spec.pixel_metrics or channels == 1


def test_an_unknown_data_set_lists_the_choices(tiny_config):
    with pytest.raises(SettingError, match=r"dataset='minst'.*digits, mnist, cifar10.*'mnist'"):
        data_utils.get_dataset(tiny_config(dataset='minst'))


@pytest.fixture
def server(tmp_path):
    """(folder, its address, paths asked for): a web server on this machine."""
    folder, asked = tmp_path / 'served', []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(folder))) as made:
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        yield folder, f'http://127.0.0.1:{made.server_port}/', asked
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
    asked = server[2]
    config = tiny_config(dataset=name)
    for again in (False, True):
        asked.clear()
        train, _, test = setup_data_train_and_test(config, CPU)
        assert bool(asked) is not again  # the second time nothing is downloaded
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
    """As those of a package that packs them anew. Unpacked, they are taken."""
    arrays = serve(server, monkeypatch)
    nowhere = f'http://127.0.0.1:{free_port()}/'
    monkeypatch.setattr(torchvision.datasets.MNIST, 'mirrors', [nowhere])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'url', nowhere + 'cifar-10-python.tar.gz')
    config = tiny_config(dataset=name)
    folder = (Path(config.data_dir) / file).parent
    folder.mkdir(parents=True)
    for path in server[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    packed_anew = folder / Path(file).name
    packed_anew.write_bytes(gzip.compress(gzip.decompress(packed_anew.read_bytes()), 1, mtime=1))
    with pytest.raises(SettingError) as caught:
        setup_data_train_and_test(config, CPU)
    text = str(caught.value)
    assert f'{packed_anew.name} in {folder}: there, but with other checksums' in text and 'not in' not in text
    assert re.search(remedy, text) and '\n' not in text and len(re.findall(r'\.gz', text.split(': there')[0])) == 1
    if name == 'mnist':
        for path in folder.glob('*.gz'):
            path.with_suffix('').write_bytes(gzip.decompress(path.read_bytes()))
        images, _ = setup_data_train_and_test(config, CPU)[0].everything()
        assert np.array_equal((images * 255).round().byte().numpy()[:, 0], arrays[0])


@pytest.mark.parametrize('name', ['digits', 'mnist', 'image_folder'])
@pytest.mark.parametrize('below', ['', 'below'])
def test_a_data_dir_that_is_no_folder_is_named(name, below, tiny_config, tmp_path):
    (tmp_path / 'file').write_text('')
    folder = str(tmp_path / 'file' / below)
    with pytest.raises(SettingError) as caught:
        setup_data_train_and_test(tiny_config(dataset=name, data_dir=folder), CPU)
    assert folder in str(caught.value)


# ---------------------------------------------------------------- your own images


def write_images(folder, sizes: dict[str, list[tuple[int, int]]]) -> None:
    """PNGs of these (width, height) for each class; every image has one colour, whose red part is its class."""
    for i, (name, of_class) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True)
        for j, size in enumerate(of_class):
            Image.new('RGB', size, (100 * i, 7 * j, 50)).save(folder / name / f'{j}.png')


def test_image_folder_through_loader_processes(tiny_config, tmp_path):
    sizes = [(40, 30), (16, 16), (9, 31), (100, 17)]
    write_images(tmp_path / 'data' / 'image_folder', {'cat': sizes * 2, 'dog': sizes * 2, 'owl': sizes})
    config = tiny_config(dataset='image_folder', image_size=16, num_workers=2, global_batch_size=16, batch_shards=2)
    spec = data_utils.get_dataset(config)
    assert (spec.shape, spec.num_classes) == ((3, 16, 16), 3)
    train, sampler, test = setup_data_train_and_test(config, CPU)
    assert sampler.num_images == 18
    for step in (0, 3):
        sampler.set_step(step)
        x, label = next(iter(train))
        assert x.shape == (8, 3, 16, 16) and x.dtype == torch.float32 and label.dtype == torch.int64
        assert torch.equal((x[:, 0] * 255).round(), (100.0 * label)[:, None, None].expand(8, 16, 16))
        assert torch.equal((x[:, 2] * 255).round(), torch.full((8, 16, 16), 50.0))
    direct, order = data_utils.load_image_folder(config)[0], next(iter(sampler))  # the order of the stream
    assert torch.equal((x * 255).round().byte(), torch.stack([direct[i][0] for i in order]))
    assert sum(len(x) for x, _ in test) == 2
    train.close()
    test.close()


def test_image_folder_leaves_out_what_is_hidden_and_says_what_it_found(tiny_config, tmp_path, capsys):
    folder = tmp_path / 'data' / 'image_folder'
    names = [f'class{i}' for i in range(10)]
    write_images(folder, {'.hidden': [(8, 8)], **{name: [(8, 8)] * 2 for name in names}})
    write_images(folder / 'class0', {'.thumbnails': [(8, 8)], 'below': [(8, 8)]})
    (folder / 'class1' / '._0.png').write_text('not an image')
    (folder / 'class1' / 'notes.txt').write_text('not an image')
    config = tiny_config(dataset='image_folder', image_size=8, num_workers=0)
    train, _, test = setup_data_train_and_test(config, CPU)
    shown = ', '.join([f'class0 3, {", ".join(f"{name} 2" for name in names[1:8])}', 'and 2 more'])
    assert capsys.readouterr().out == f'image_folder: 19 + 2 images, 10 classes: {shown}\n'
    assert train.size + test.size == 21 and data_utils.get_dataset(config).num_classes == 10


def test_the_fingerprint_of_an_image_folder(tiny_config, tmp_path):
    """Names and sizes of the files count; where the folder is does not."""

    def of(data_dir):
        data_utils.open_image_folder.cache_clear()
        config = tiny_config(dataset='image_folder', image_size=8, num_workers=0, data_dir=str(data_dir))
        return setup_data_train_and_test(config, CPU)[0].fingerprint

    write_images(tmp_path / 'data' / 'image_folder', {'cat': [(8, 8)] * 6, 'dog': [(8, 8)] * 5})
    usual = of(tmp_path / 'data')
    assert usual.startswith('10+1 items, 2 classes, ')
    (tmp_path / 'data').rename(tmp_path / 'moved')
    assert of(tmp_path / 'moved') == usual
    cat = tmp_path / 'moved' / 'image_folder' / 'cat'
    seen = {usual}
    for change in (
        lambda: Image.effect_noise((9, 9), 50).save(cat / '1.png'),
        lambda: Image.effect_noise((9, 9), 50).save(cat / 'new.png'),
        lambda: (cat / '2.png').rename(cat / 'other.png'),
        lambda: (cat / '3.png').rename(cat.parent / 'dog' / '33.png'),
    ):
        change()
        seen.add(of(tmp_path / 'moved'))
    assert len(seen) == 5


def test_a_link_to_nowhere_is_refused_before_training(tiny_config, tmp_path):
    folder = tmp_path / 'data' / 'image_folder'
    write_images(folder, {'cat': [(8, 8)] * 3})
    (folder / 'cat' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    with pytest.raises(SettingError, match=r'cat/gone\.png.*an image cannot be read'):
        setup_data_train_and_test(tiny_config(dataset='image_folder', image_size=8, num_workers=0), CPU)


def test_a_broken_image_is_named_also_where_the_folder_is_linked(tiny_config, tmp_path):
    write_images(tmp_path / 'own' / 'image_folder', {'cat': [(8, 8)] * 3})
    (tmp_path / 'linked').symlink_to(tmp_path / 'own')
    config = tiny_config(dataset='image_folder', image_size=8, data_dir=str(tmp_path / 'linked'))
    images = data_utils.open_image_folder(config)
    path = tmp_path / 'own' / 'image_folder' / 'cat' / '1.png'
    path.write_bytes(path.read_bytes()[:-30])
    assert images[0][0].shape == (3, 8, 8)
    with pytest.raises(DataError, match=f'^{path} cannot be read as an image'):
        images[1]


def test_image_folder_crops_the_middle(tiny_config, tmp_path):
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 200
    (tmp_path / 'data' / 'image_folder' / 'a').mkdir(parents=True)
    Image.fromarray(picture).save(tmp_path / 'data' / 'image_folder' / 'a' / 'x.png')
    image, label = data_utils.open_image_folder(tiny_config(dataset='image_folder', image_size=8))[0]
    assert torch.equal(image, torch.full((3, 8, 8), 200, dtype=torch.uint8)) and label == 0


@pytest.mark.parametrize(
    'images', [None, {}, {'cat': []}, {'cat': [(8, 8)]}], ids=['missing', 'empty', 'no image', 'one image']
)
def test_too_few_images_are_an_error_that_says_where_to_put_them(images, tiny_config, tmp_path):
    folder = tmp_path / 'data' / 'image_folder'
    if images is not None:
        folder.mkdir(parents=True)
        write_images(folder, images)
    with pytest.raises(SettingError, match='image_folder'):
        train, *_ = setup_data_train_and_test(tiny_config(dataset='image_folder', num_workers=0), CPU)
        next(iter(train))
