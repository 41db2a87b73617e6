"""The order of the data, the shares of the processes, and loader processes."""

import gc
import itertools
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset
from torch.utils.data._utils import signal_handling

from config import Config, SettingError
from data_loading.loader import HeldOutSampler, Loader, StreamSampler
from data_loading.spec import Part
from data_utils import DATASETS, DataSpec, setup_data_train_and_test
from runtime import ranks, stopping
from runtime.errors import DataError
from runtime.ranks import cores_per_process
from tests.helpers import ROOT, processes_with, wait_until

CPU = torch.device('cpu')
IMAGES = torch.arange(40 * 3 * 4 * 4).reshape(40, 3, 4, 4).to(torch.uint8)
LABELS = torch.arange(40) % 7


@pytest.fixture
def as_process(monkeypatch):
    """`as_process(rank, world_size)`: pretend to be this rank, without other processes to talk to."""

    def become(rank, world_size):
        monkeypatch.setattr(ranks, 'rank', lambda: rank)
        monkeypatch.setattr(ranks, 'world_size', lambda: world_size)
        monkeypatch.setattr(ranks, 'on_main', lambda fn: fn() if rank == 0 else None)
        monkeypatch.setattr(ranks, 'on_each', lambda fn, patient=False: fn())

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


def test_the_stream_is_a_function_of_the_seed_only(tiny_config):
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(runs))
        np.random.seed(len(runs))
        runs.append(take_steps(StreamSampler(50, tiny_config(seed=seed)), 0, 5))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize('world', [2, 4, 8])
def test_processes_together_see_the_same_images_in_each_step(tiny_config, as_process, world):
    config = tiny_config(global_batch_size=32, batch_shards=8)
    single = take_steps(StreamSampler(70, config), 2, 6)
    shares = []
    for rank in range(world):
        as_process(rank, world)
        shares.append(take_steps(StreamSampler(70, config), 2, 6))
    together = [list(itertools.chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert together == single


def test_overfit_repeats_the_first_batch(tiny_config):
    steps = take_steps(StreamSampler(200, tiny_config()), 0, 3)
    again = take_steps(StreamSampler(200, tiny_config(overfit=True)), 0, 3)
    assert again == [steps[0]] * 3
    assert steps[1] != steps[0]


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
    assert rounds == [8] * 3  # rounds have 6 pieces, so that no process leaves the loop early
    assert batches == [15, 14, 14]  # 43 pieces of 7, the last of 3


def test_train_loader_resumes_from_a_step(tiny_config):
    loader, sampler, _ = setup_data_train_and_test(tiny_config(), CPU)
    sampler.set_step(2)
    x, label = next(iter(loader))
    digits, order = sklearn.datasets.load_digits(), np.random.default_rng(0).permutation(1797)
    chosen = order[take_steps(StreamSampler(1500, tiny_config()), 2, 1)[0][:4]]
    assert np.array_equal(x[:, 0].numpy() * 16, digits.images[chosen])
    assert np.array_equal(label.numpy(), digits.target[chosen])


def test_loader_scales_by_the_largest_pixel():
    images = torch.tensor([0, 8, 16], dtype=torch.uint8).reshape(3, 1, 1, 1)
    loader = Loader(Part((images, torch.arange(3))), [[2, 0], [1]], DATASETS['digits'], CPU, num_workers=0)
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


# ---------------------------------------------------------------- the held-out part


@pytest.mark.parametrize('world', [1, 2, 4])
def test_held_out_pieces_are_dealt_like_the_shards_of_a_step(tiny_config, as_process, world):
    """103 images in pieces of 4: 26 pieces, in 4 rounds of 8, the last of 2 pieces, the last piece of 3 images."""
    config = tiny_config(global_batch_size=32, batch_shards=8)
    rounds = [[] for _ in range(4)]
    for rank in range(world):
        as_process(rank, world)
        sampler = HeldOutSampler(103, config)
        assert sampler.rounds == 4
        numbers = [sampler.numbers(i) for i in range(4)]
        assert numbers[:3] == [[8 * i + shard for shard in sampler.my_shards] for i in range(3)]
        flat = list(itertools.chain.from_iterable(numbers))
        pieces = [list(range(103))[4 * number : 4 * number + 4] for number in flat]
        assert list(sampler) == list(sampler) == pieces
        assert [sampler.first_index(number) for number in flat] == [piece[0] for piece in pieces]
        for i in range(4):
            rounds[i] += numbers[i]
        sampler.all_shards = True
        assert [sampler.numbers(i) for i in range(4)] == [list(range(8 * i, min(8 * i + 8, 26))) for i in range(4)]
        assert list(itertools.chain.from_iterable(sampler)) == list(range(103))
    assert rounds == [list(range(8 * i, min(8 * i + 8, 26))) for i in range(4)]


def test_no_piece_of_the_held_out_part_is_empty(tiny_config):
    sampler = HeldOutSampler(12, tiny_config(global_batch_size=32, batch_shards=8))
    assert list(map(len, sampler)) == [4, 4, 4]


def test_one_process_can_read_the_shards_of_all(tiny_config, as_process):
    config = tiny_config(global_batch_size=32, batch_shards=8)
    single = take_steps(StreamSampler(70, config), 2, 3)
    as_process(1, 2)
    sampler = StreamSampler(70, config)
    assert sampler.my_shards == sampler.shards_read == range(4, 8)
    sampler.all_shards = True
    assert sampler.my_shards == range(4, 8) and sampler.shards_read == range(8)
    sampler.set_step(2)
    shards = iter(sampler)
    assert [list(itertools.chain.from_iterable(next(shards) for _ in range(8))) for _ in range(3)] == single


# ---------------------------------------------------------------- batches of loaders


@pytest.fixture
def set_up(tiny_config, monkeypatch):
    """`set_up(part, workers=0)`: the loaders of a data set with `part` as training and as held-out part."""
    made = []

    def run(part, workers=0, **settings):
        monkeypatch.setitem(DATASETS, 'mine', DataSpec(lambda config: (part, part), num_classes=7))
        settings = dict(global_batch_size=8, batch_shards=2, num_workers=workers) | settings
        made.append(setup_data_train_and_test(tiny_config(dataset='mine', **settings), CPU))
        return made[-1]

    yield run
    for train, _, test in made:
        train.close()
        test.close()


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('resident', [True, False])
def test_take_gives_the_items_of_these_indices(set_up, resident, workers):
    part = (IMAGES, LABELS) if resident else TensorDataset(IMAGES, LABELS)
    train, sampler, test = set_up(part, workers)
    assert train.size == test.size == 40 and train.spec.shape == (3, 4, 4) and not train.has_pairs
    for indices in ([3, 39, 3], torch.tensor([5]), np.array([0, 1])):
        x, label = train.take(indices)
        assert torch.equal(x, IMAGES[indices].float() / 255) and torch.equal(label, LABELS[indices])
    sampler.set_step(3)
    for indices, batch in zip(itertools.islice(sampler, 5), train, strict=False):  # as iteration gives them
        assert all(map(torch.equal, batch, train.take(indices)))
    for number, batch in zip(test.batch_sampler.numbers(0), test, strict=False):
        first = test.batch_sampler.first_index(number)
        assert all(map(torch.equal, batch, test.take(range(first, first + 4))))
    assert test.rounds == 5
    if resident:
        assert torch.equal(train.labels, LABELS) and torch.equal(train.everything()[0], IMAGES.float() / 255)
    else:
        assert train.labels is None


@pytest.mark.parametrize('all_shards', [False, True])
def test_the_indices_of_a_step_are_copied_at_once(set_up, monkeypatch, as_process, all_shards):
    copies = []
    original = Loader._to_device
    monkeypatch.setattr(Loader, '_to_device', lambda self, i: copies.append(i.tolist()) or original(self, i))
    as_process(0, 2)
    train, sampler, _ = set_up((IMAGES, LABELS), batch_shards=8, global_batch_size=16)
    sampler.all_shards = all_shards
    shards = 8 if all_shards else 4
    batches = list(itertools.islice(train, 3 * shards))
    assert len(copies) == 3
    expected = list(itertools.islice(sampler, 3 * shards))
    assert list(itertools.chain.from_iterable(copies)) == list(itertools.chain.from_iterable(expected))
    assert all(torch.equal(label, LABELS[i]) for (_, label), i in zip(batches, expected, strict=True))


# ---------------------------------------------------------------- loader processes


def test_loader_processes_outlive_a_stop_and_end_with_close(set_up):
    """Stop signals from other processes are meant for the trainer; only the parent ends a loader process."""
    before_this = set(multiprocessing.active_children())
    train, sampler, _ = set_up(TensorDataset(IMAGES, LABELS), workers=1)
    batches = iter(train)  # still alive when the loader is closed
    before = next(batches)
    (process,) = set(multiprocessing.active_children()) - before_this
    for name in stopping.STOP_SIGNALS:
        subprocess.run(['kill', f'-{int(name)}', str(process.pid)], check=True)
    time.sleep(0.5)
    assert process.is_alive() and all(map(torch.equal, before, next(iter(train))))
    train.close()
    assert not process.is_alive()
    train.close()
    sampler.set_step(0)
    assert all(map(torch.equal, before, next(iter(train))))  # by new processes
    (process,) = set(multiprocessing.active_children()) - before_this
    process.terminate()  # as multiprocessing does when the parent ends
    process.join(10)
    assert process.exitcode == 0


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere loader processes are not forked')
def test_a_dataset_that_cannot_be_pickled_is_read_whatever_the_default_start_method_is(set_up, monkeypatch):
    """From Python 3.14 on it is forkserver, which pickles the data set."""

    class Local(TensorDataset):
        pass

    default = multiprocessing.context._default_context
    monkeypatch.setattr(default, '_actual_context', multiprocessing.get_context('forkserver'))
    train, _, _ = set_up(Local(IMAGES, LABELS), workers=1)
    assert len(next(iter(train))[0]) > 0
    train.close()


def test_close_ends_loader_processes_that_have_only_just_started(set_up, monkeypatch):
    """SIGTERM kills them then; torch raised 'DataLoader worker is killed by signal' in the process that closed."""
    train, _, _ = set_up(TensorDataset(IMAGES, LABELS), workers=2)
    monkeypatch.setattr(signal_handling, '_set_worker_signal_handlers', lambda: time.sleep(20))
    train.start_workers()
    running = set(multiprocessing.active_children())
    train.close()
    time.sleep(0.2)  # the signal handler of torch runs at the next line of Python
    assert running and not running & set(multiprocessing.active_children())


@pytest.mark.parametrize('how', ['reading', 'gone early'])
def test_loader_processes_end_with_a_killed_parent(how):
    """Also if the parent's exit handlers do not run, and if it has ended before they check for it."""
    script = SCRIPT + 'print(*(process.pid for process in multiprocessing.active_children()), flush=True)\nos._exit(9)'
    ended = subprocess.run(
        [sys.executable, '-c', script, how, '.'], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    pids = ended.stdout.splitlines()[-1].split()
    assert ended.returncode == 9 and len(pids) == min(2, cores_per_process())
    assert wait_until(lambda: not set(map(int, pids)) & set(processes_with('python')), 5)


SCRIPT = """
import multiprocessing, os, sys, time
import torch
from torch.utils.data import TensorDataset
from config import Config
from data_utils import DATASETS, DataSpec, setup_data_train_and_test

class Broken(TensorDataset):
    def __getitem__(self, i):
        return 1 / 0 if 0 < i < 39 else super().__getitem__(i)

how = sys.argv[1]
part = (Broken if how == 'error' else TensorDataset)(torch.zeros(40, 3, 4, 4).byte(), torch.zeros(40).long())
DATASETS['mine'] = DataSpec(lambda config: (part, part))
config = Config(dataset='mine', num_workers=2, data_dir=sys.argv[2])
train, sampler, test = setup_data_train_and_test(config, torch.device('cpu'))
batches = iter(train.workers if how == 'only the iterator is left' else train)
if how == 'only the iterator is left':
    keep = [batches]
    keep.append(keep)  # a reference cycle, which is never collected
    del train, batches
elif how == 'gone early':
    begin = train.workers.worker_init_fn
    train.workers.worker_init_fn = lambda worker: (time.sleep(1), begin(worker))
    train.start_workers()
else:
    next(batches)
print('read')
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize('how', ['reading', 'error', 'only the iterator is left'])
def test_a_script_that_reads_a_batch_ends(how, tmp_path):
    command = [sys.executable, '-c', SCRIPT, how, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if how == 'error':
        assert ended.returncode == 1 and 'ZeroDivisionError' in ended.stderr
    else:
        assert (ended.returncode, ended.stdout.splitlines()[-1], ended.stderr) == (0, 'read', '')


def test_no_more_loader_processes_than_cores(set_up, monkeypatch, recwarn):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(6)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    train, *_ = set_up(TensorDataset(IMAGES, LABELS), workers=16)
    assert train.workers.num_workers == 3 and not recwarn.list
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    assert set_up(TensorDataset(IMAGES, LABELS), workers=4)[0].workers.num_workers == 1
    assert set_up(TensorDataset(IMAGES, LABELS), workers=0)[0].workers.num_workers == 0


# ---------------------------------------------------------------- several machines

# Four ranks on two simulated machines; `load` downloads missing data to the folder, and lists the ranks that did so.
MACHINES = """
import json, os, sys, time
from pathlib import Path
import torch
from config import Config
from data_utils import DATASETS, DataSpec, setup_data_train_and_test
from runtime import ranks

def load(config):
    folder, rank = Path(config.data_dir), ranks.rank()
    if case == 'fails' and rank == 2:
        raise PermissionError(13, 'no entry', str(folder))
    if not (folder / 'images').exists():
        with open(folder / 'downloads', 'a') as downloads:
            downloads.write(f'{rank} ')
        time.sleep(0.5)
        (folder / 'images').touch()
    value = 1 + (case == 'differs' and os.environ['GROUP_RANK'] == '1')
    part = (torch.full((8, 1, 4, 4), value, dtype=torch.uint8), torch.zeros(8).long())
    return part, part

ranks.setup()
DATASETS['mine'] = DataSpec(load, num_classes=1)
seen = {}
for case in ('shared', 'own', 'differs', 'fails'):
    folder = f'{sys.argv[1]}/{case}' + ('' if case == 'shared' else os.environ['GROUP_RANK'])
    try:
        train, *_ = setup_data_train_and_test(Config(dataset='mine', data_dir=folder), torch.device('cpu'))
        seen[case] = train.fingerprint
    except Exception as error:
        seen[case] = f'{type(error).__name__}: {error}'
Path(sys.argv[1], f'{ranks.rank()}.json').write_text(json.dumps(seen))
ranks.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_process_of_each_machine_downloads_and_all_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(4):
        of_torchrun = dict(RANK=rank, WORLD_SIZE=4, LOCAL_RANK=rank % 2, LOCAL_WORLD_SIZE=2, GROUP_RANK=rank // 2,
                           MASTER_ADDR='127.0.0.1', MASTER_PORT=port, OMP_NUM_THREADS=1)  # fmt: skip
        env = os.environ | {name: str(value) for name, value in of_torchrun.items()}
        processes.append(subprocess.Popen([sys.executable, '-c', MACHINES, str(tmp_path)], cwd=ROOT, env=env))
    assert [process.wait(150) for process in processes] == [0] * 4
    seen = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(4)]
    assert seen == seen[:1] * 4
    assert seen[0]['shared'] == seen[0]['own'] and seen[0]['own'].startswith('8+8 items, 1 classes, ')
    assert re.match('SettingError: data_dir=.*on machine 1 it holds other data', seen[0]['differs'])
    assert re.match('SettingError: data_dir=.*no entry', seen[0]['fails'])
    downloads = {folder: (tmp_path / folder / 'downloads').read_text() for folder in ('shared', 'own0', 'own1')}
    assert downloads == {'shared': '0 ', 'own0': '0 ', 'own1': '2 '}


@pytest.mark.parametrize('workers', [0, 1])
def test_an_item_of_a_dataset_is_called_by_its_number(tiny_config, monkeypatch, workers):
    x = torch.zeros(60, 1, 4, 4)
    x[37] = torch.nan
    part = TensorDataset(x, torch.zeros(60))
    monkeypatch.setitem(DATASETS, 'mine', DataSpec(lambda config: (part, part), scale='float'))
    train, _, test = setup_data_train_and_test(tiny_config(dataset='mine', num_workers=workers), CPU)
    for loader in (train, test):
        with pytest.raises(DataError, match='1 of 4 items hold NaN or infinite values, the first is number 37'):
            list(itertools.islice(loader, 16))
        loader.close()
    with pytest.raises(DataError, match='1 of 2 items hold NaN or infinite values, the first is number 37'):
        test.take([3, 37])


def test_a_dataset_of_float_images_is_scaled_by_its_range(tiny_config, monkeypatch):
    x = torch.linspace(-1, 1, 20 * 3 * 16).view(20, 3, 4, 4)
    for part in (TensorDataset(x, torch.zeros(20)), (x, torch.zeros(20))):
        spec = DataSpec(lambda config, part=part: (part, part), value_range=(-1.0, 1.0))
        monkeypatch.setitem(DATASETS, 'mine', spec)
        train, *_ = setup_data_train_and_test(tiny_config(dataset='mine', num_workers=0), CPU)
        assert torch.allclose(train.take(range(20))[0], (x + 1) / 2)
    with pytest.raises(
        SettingError, match=r'outside value_range=\(0, 1\), the first is number 0\. The values go from -1 to 1'
    ):
        monkeypatch.setitem(DATASETS, 'mine', replace(spec, value_range=(0.0, 1.0)))
        setup_data_train_and_test(tiny_config(dataset='mine'), CPU)


def test_a_loader_that_is_not_closed_ends_its_processes_at_once(tmp_path):
    data = [(torch.zeros(1, 2, 2, dtype=torch.uint8), 0)] * 8
    config = Config(dataset='own', global_batch_size=8, num_workers=1)
    part, spec = Part(data), DataSpec(lambda c: None, (1, 2, 2))
    loader = Loader(part, StreamSampler(8, config), spec, torch.device('cpu'), 1)
    batches = iter(loader)
    next(batches)
    loader.circle = loader  # so that torch's iterator and the loader are collected together
    (process,) = loader.workers._iterator._workers
    began = time.monotonic()
    del loader, batches
    gc.collect()
    assert not process.is_alive() and time.monotonic() - began < 3
