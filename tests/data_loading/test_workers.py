"""Loader processes: the data they send, and the error if they cannot be started."""

import os
import resource
import time
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from config import SettingError
from data_loading import packed, workers
from data_loading.loader import Loader
from data_loading.spec import DataSpec, Part
from runtime import stopping
from runtime.errors import DataError

X = torch.arange(24, dtype=torch.uint8).view(4, 1, 2, 3)
KINDS = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64]


def shared(tensors):
    """Whether any tensor is in /dev/shm."""
    return any(x.is_shared() for x in tensors)


def test_tensors_of_any_type_and_shape_arrive_as_they_were():
    sent = [X.to(kind) for kind in KINDS] + [X.mT, torch.tensor(3), torch.zeros(0, 3), X[:, :, 1]]
    loader = DataLoader([sent], batch_size=None, num_workers=1, collate_fn=workers.PipedTuple)
    (found,) = workers.read(loader, 'test')
    assert type(found) is tuple and not shared(found)
    for a, b in zip(found, sent, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    found[1][0] = 7  # the arrived tensors are writeable


def test_no_batch_of_a_dataset_takes_shared_memory():
    """Neither when it is made nor when it is sent: data are read even if /dev/shm is full."""
    spec = DataSpec(lambda config: (), (1, 2, 3), 4)
    loader = Loader(Part(TensorDataset(X, torch.arange(4))), [[2, 0], [1]], spec, torch.device('cpu'), 1)
    batches = list(workers.read(loader.workers, 'test'))
    assert not any(map(shared, batches))
    assert [label.tolist() for _, label in batches] == [[2, 0], [1]] and torch.equal(batches[0][0], X[[2, 0]])

    def made(items):
        return workers.PipedTuple(map(torch.tensor, map(torch.Tensor.is_shared, workers.stack_items(items, ''))))

    started = dict(num_workers=1, multiprocessing_context=workers.START_METHOD)
    loader = DataLoader(TensorDataset(X, X), batch_size=2, collate_fn=made, **started)
    assert [v.tolist() for batch in workers.read(loader, 'test') for v in batch] == [False] * 4


def test_the_error_of_a_batch_names_only_what_is_wrong():
    for items in ([(X[0], 1), (X[0, 0], 1)], [(X[0], 1), (X[0], 1, 2)], [(X[0], object())]):
        with pytest.raises(DataError, match=r'here: cannot make a batch of \(uint8 \(1, 2, 3\), \w+\)'):
            workers.stack_items(items, 'here')
    large = torch.zeros(1, dtype=torch.uint8).expand(2**46)  # 64 TiB of one byte
    with pytest.raises(RuntimeError, match="can't allocate memory") as error:
        workers.stack_items([(large, 1)], 'here')
    assert not isinstance(error.value, DataError)


def test_no_item_that_is_packed_takes_shared_memory():
    items = TensorDataset(X, torch.arange(4))
    loader = DataLoader(range(4), batch_size=2, num_workers=1, collate_fn=partial(packed.attempts, items))
    found = [item for batch in workers.read(loader, 'test') for item in batch]
    assert not any(map(shared, found)) and [int(label) for _, label in found] == [0, 1, 2, 3]


def test_loader_processes_that_cannot_be_started_name_the_setting():
    loader = DataLoader(range(4), num_workers=2)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 2, most[1]))
    try:
        with pytest.raises(SettingError, match=r'^num_workers=2: .*Too many open files.*--num_workers 0\.$'):
            workers.started(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


@pytest.mark.parametrize('num_workers, by', [(0, 'this process'), (1, '1 loader processes')])
def test_a_wait_for_data_ends_with_an_error_that_names_them(monkeypatch, num_workers, by):
    for name, value in dict(TICK=0.05, LINE_AFTER=0.1, LIMIT=0.3).items():
        monkeypatch.setattr(stopping, name, value)
    started = dict(num_workers=num_workers, multiprocessing_context=workers.START_METHOD if num_workers else None)
    loader = DataLoader([0], collate_fn=lambda items: time.sleep(1), **started)
    with pytest.raises(DataError, match=rf'^data of x, read by {by} \(num_workers\): nothing came'):
        list(workers.read(loader, 'x'))


class Broken(torch.utils.data.Dataset):
    """Item 2 is None, item 3 cannot be read."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i == 3:
            raise OSError('no such slice')
        return None if i == 2 else (X[i], 0)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_an_item_of_a_dataset_that_fails_is_named_by_its_number(num_workers, capfd):
    spec = DataSpec(lambda config: (), (1, 2, 3), 4)
    for items, error, words in [
        ([1, 3], OSError, 'no such slice'),
        ([1, 2], DataError, r'of \(uint8 \(1, 2, 3\), int\) \(item 1\) and NoneType \(item 2\)'),
    ]:
        loader = Loader(Part(Broken()), [items], spec, torch.device('cpu'), num_workers)
        with pytest.raises(error, match=words):
            list(workers.read(loader.workers, 'test'))
    assert 'item 3 of the data: OSError: no such slice\n' in capfd.readouterr().err
