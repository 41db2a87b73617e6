"""Data sets, the order of their images, and how a step's images are dealt to processes."""

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import pickle
import socket
import struct
import tarfile
import threading

import numpy as np
import pytest
import sklearn.datasets
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data_utils
from config import Config, SettingError
from data_utils import DATASETS, Loader, StreamSampler, setup_data_train_and_test
from runtime import ranks

CPU = torch.device('cpu')


@pytest.fixture
def as_process(monkeypatch):
    """`as_process(rank, world_size)`: what this process is from now on, with nobody to talk to."""

    def become(rank, world_size):
        monkeypatch.setattr(ranks, 'rank', lambda: rank)
        monkeypatch.setattr(ranks, 'world_size', lambda: world_size)
        monkeypatch.setattr(ranks, 'on_main', lambda fn: fn() if rank == 0 else None)
        monkeypatch.setattr(ranks, 'on_each', lambda fn: fn())

    return become


def take_steps(sampler: StreamSampler, first: int, steps: int) -> list[list[int]]:
    """Image indices of each step from `first`, in order of shard."""
    sampler.set_step(first)
    shards = iter(sampler)
    return [list(itertools.chain.from_iterable(next(shards) for _ in sampler.my_shards)) for _ in range(steps)]


# ---------------------------------------------------------------- the order of the images


def test_each_epoch_visits_each_image_once(tiny_config):
    stream = np.concatenate(
        take_steps(StreamSampler(100, tiny_config(global_batch_size=32)), 0, 25)
    )  # 800 positions, 8 epochs
    epochs = stream.reshape(8, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8  # in another order each time


def test_a_batch_larger_than_the_data_set(tiny_config):
    (first,) = take_steps(StreamSampler(10, tiny_config(global_batch_size=32)), 0, 1)
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))


@pytest.mark.parametrize('k', [1, 3, 7, 40])
def test_starting_at_a_step_equals_skipping_to_it(tiny_config, k):
    config = tiny_config(global_batch_size=24)
    assert take_steps(StreamSampler(101, config), k, 9) == take_steps(StreamSampler(101, config), 0, k + 9)[k:]


def test_the_stream_is_a_function_of_the_seed_alone(tiny_config):
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(runs))
        np.random.seed(len(runs))
        runs.append(take_steps(StreamSampler(50, tiny_config(seed=seed)), 0, 5))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize('world', [2, 4, 8])
def test_processes_together_see_the_same_images_in_each_step(tiny_config, as_process, world):
    config = tiny_config(global_batch_size=32, batch_shards=8)
    alone = take_steps(StreamSampler(70, config), 2, 6)
    shares = []
    for rank in range(world):
        as_process(rank, world)
        shares.append(take_steps(StreamSampler(70, config), 2, 6))
    together = [list(itertools.chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert together == alone


def test_overfit_repeats_the_first_batch(tiny_config):
    usual = take_steps(StreamSampler(200, tiny_config()), 0, 3)
    again = take_steps(StreamSampler(200, tiny_config(overfit=True)), 0, 3)
    assert again == [usual[0]] * 3
    assert usual[1] != usual[0]


# ---------------------------------------------------------------- loaders


@pytest.mark.parametrize('world, accumulation', [(3, 1), (16, 1), (4, 4)])
def test_shards_that_cannot_be_dealt_are_refused(tiny_config, as_process, world, accumulation):
    as_process(0, world)
    with pytest.raises(
        SettingError, match=f'batch_shards=8 is not divisible by {world} processes.*accumulation_steps={accumulation}'
    ):
        setup_data_train_and_test(tiny_config(batch_shards=8, accumulation_steps=accumulation), CPU)


def test_three_processes_share_the_held_out_images(tiny_config, as_process):
    seen, batches, rounds = [], [], []
    for rank in range(3):
        as_process(rank, 3)
        *_, loader = setup_data_train_and_test(tiny_config(global_batch_size=42, batch_shards=6), CPU)
        images = [x for x, _ in loader]
        assert [len(x) for x, _ in loader] == [len(x) for x in images]  # it can be gone through again
        seen += images
        batches.append(len(images))
        rounds.append(loader.rounds)
    digits = sklearn.datasets.load_digits().images[np.random.default_rng(0).permutation(1797)][1500:] / 16
    pixels = sorted(map(bytes, torch.cat(seen).numpy().astype(np.float32)))
    assert pixels == sorted(map(bytes, digits.astype(np.float32)))
    assert rounds == [max(batches)] * 3  # so that no process leaves the loop early
    assert batches == [15, 14, 14]  # 43 batches of 7, the last of 3


def test_train_loader_goes_on_from_a_step(tiny_config):
    loader, sampler, _ = setup_data_train_and_test(tiny_config(), CPU)
    sampler.set_step(2)
    x, label = next(iter(loader))
    digits, order = sklearn.datasets.load_digits(), np.random.default_rng(0).permutation(1797)
    chosen = order[take_steps(StreamSampler(1500, tiny_config()), 2, 1)[0][:4]]
    assert np.array_equal(x[:, 0].numpy() * 16, digits.images[chosen])
    assert np.array_equal(label.numpy(), digits.target[chosen])


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
    """[train images (50, 3, 32, 32), train labels, test images (20, 3, 32, 32), test labels], served as a tar.gz of pickles."""
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
    direct, order = data_utils.load_image_folder(config)[0], take_steps(StreamSampler(18, config), 3, 1)[0]
    assert torch.equal(
        (x * 255).round().byte(), torch.stack([direct[i][0] for i in order[:8]])
    )  # the order of the stream
    assert sum(len(x) for x, _ in test) == 2


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


def test_loader_scales_by_the_largest_pixel(tiny_config):
    images = torch.tensor([0, 8, 16], dtype=torch.uint8).reshape(3, 1, 1, 1)
    loader = Loader((images, torch.arange(3)), [[2, 0], [1]], tiny_config(), DATASETS['digits'], CPU)
    assert [(x.flatten().tolist(), label.tolist()) for x, label in loader] == [([1.0, 0.0], [2, 0]), ([0.5], [1])]


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 40),
    shard_size=st.integers(1, 5),
    shards=st.sampled_from([1, 2, 4]),
    step=st.integers(0, 30),
    seed=st.integers(0, 9),
)
def test_a_step_is_a_cut_of_the_stream_of_permutations(num_images, shard_size, shards, step, seed):
    """Against the stream written out from its beginning, for data sets smaller and larger than a batch."""
    batch = shards * shard_size
    epochs = range((step + 1) * batch // num_images + 1)
    stream = np.concatenate([np.random.default_rng((seed, epoch)).permutation(num_images) for epoch in epochs])
    sampler = StreamSampler(num_images, Config(seed=seed, global_batch_size=batch, batch_shards=shards))
    assert take_steps(sampler, step, 1)[0] == stream[step * batch : (step + 1) * batch].tolist()
