"""Packed files: their contents, the disk space they take, and remains of a killed build."""

import os
import time
import zipfile

import numpy as np
import pytest
import torch

from config import SettingError
from data_loading import packed
from data_loading.labels import held_out_first, held_out_rows
from runtime.errors import DataError

X = torch.arange(6 * 3 * 4 * 5).reshape(6, 3, 4, 5)
LABEL = torch.arange(6) % 2


def write(path, x, label=LABEL, most=6, **facts):
    packed.write_rows(path, iter(zip(x, label.tolist(), strict=True)), most, 'title', facts)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('most', [6, 9])
def test_rows_are_stored_as_torch_stores_tensors(tmp_path, dtype, most):
    """Also with fewer rows than expected. torch also reads the file without mmap, with its own checks."""
    x, facts = X.to(dtype), dict(classes=('a', 'ä'), held_out=1)
    write(tmp_path / 'rows.pt', x, most=most, **facts)
    packed.write(tmp_path / 'tensors.pt', x, LABEL, **facts)
    in_place, wanted = packed.read(tmp_path / 'rows.pt'), packed.read(tmp_path / 'tensors.pt')
    in_memory = torch.load(tmp_path / 'rows.pt', weights_only=True)
    assert zipfile.ZipFile(tmp_path / 'rows.pt').testzip() is None  # checksums
    for found in (in_place, in_memory):
        assert torch.equal(found.pop('x'), x) and torch.equal(found.pop('label'), LABEL)
    wanted = {name: value for name, value in wanted.items() if name not in ('x', 'label')}
    assert in_place == in_memory == wanted and wanted.items() >= facts.items()
    assert packed.read(tmp_path / 'rows.pt')['x'].data_ptr() % 64 == 0  # aligned
    assert sorted(path.name for path in tmp_path.iterdir()) == ['rows.pt', 'tensors.pt']


def test_facts_may_be_completed_with_the_last_row(tmp_path):
    facts = dict(held_out=1)

    def rows():
        yield from zip(X.byte(), LABEL.tolist(), strict=True)
        facts['std'] = (0.1234, 5.0)

    packed.write_rows(tmp_path / 'x.pt', rows(), 6, 'title', facts)
    assert packed.read(tmp_path / 'x.pt')['std'] == (0.1234, 5.0)


def test_a_file_takes_the_room_of_its_rows_once(tmp_path, monkeypatch):
    path, size = tmp_path / 'x.pt', X.numel()
    monkeypatch.setattr(packed, 'space_for', lambda path: size - 1)
    with pytest.raises(packed.NoRoomError, match=r'this takes 3\.6e-07 GB; 3\.59e-07 GB are free there\. Make room'):
        write(path, X.byte())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(packed, 'space_for', lambda path: size)
    taken = []

    def rows():
        for x, label in zip(X.byte().repeat(10_000, 1, 1, 1), LABEL.repeat(10_000).tolist(), strict=True):
            taken.append(sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512)
            yield x, label

    packed.write_rows(path, rows(), 6, 'title', {})
    assert max(taken) <= path.stat().st_size < 1.3 * 10_000 * size  # 8 bytes for each label of 60


def test_rows_that_differ_or_are_missing_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(SettingError, match=r'title: item 1 is uint8 \(3, 4\), the first one uint8 \(3, 4, 5\)'):
        packed.write_rows(tmp_path / 'x.pt', iter([(X[0].byte(), 0), (X[1, :, :, 0].byte(), 1)]), 2, 'title', {})
    with pytest.raises(SettingError, match=r'item 2 is float32 .*the same shape and type'):
        rows = [(X[0].byte(), 0), (X[1].byte(), 1), (X[2].float(), 1)]
        packed.write_rows(tmp_path / 'x.pt', iter(rows), 3, 'title', {})
    with pytest.raises(SettingError, match='no item can be read'):
        packed.write_rows(tmp_path / 'x.pt', iter([]), 3, 'title', {})
    assert not list(tmp_path.iterdir())


class Broken(torch.utils.data.Dataset):
    """Items with one that cannot be read."""

    def __init__(self, broken):
        self.broken = broken

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i == self.broken:
            raise DataError(f'{i} cannot be read.')
        return X[i].byte(), int(LABEL[i])


@pytest.mark.parametrize(('broken', 'held_out'), [(1, 1), (2, 2), (5, 2)])
def test_an_item_that_is_left_out_leaves_the_others_in_their_part(tmp_path, broken, held_out):
    packed.build(Broken(broken), tmp_path / 'x.pt', 2, True, 'title')
    found = packed.read(tmp_path / 'x.pt')
    assert (found['held_out'], found['left_out'], len(found['x'])) == (held_out, 1, 5)
    assert torch.equal(found['x'], torch.cat([X[:broken], X[broken + 1 :]]).byte())


def test_a_file_of_another_version_is_refused(tmp_path):
    torch.save(packed.contents(X, LABEL, {}) | dict(format=packed.FORMAT + 1), tmp_path / 'x.pt')
    with pytest.raises(SettingError, match=r'was not written by prepare\.py of this version\. Make it again'):
        packed.read(tmp_path / 'x.pt')


def test_remains_of_a_killed_build_are_removed_by_the_next(tmp_path):
    """Unless they have changed within the last hour: another machine may be building."""
    path = tmp_path / 'x[1].pt'
    other, fresh, old = tmp_path / '.other.pt.7.tmp', tmp_path / '.x[1].pt.8.tmp', tmp_path / '.x[1].pt.9-0a1b2c3d.tmp'
    for file in (other, fresh, old):
        file.write_text('half')
    for file in (other, old):
        os.utime(file, (0, time.time() - 3700))
    assert packed.read_or_build(path, lambda: write(path, X.byte()))['x'].shape == (6, 3, 4, 5)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [other.name, fresh.name, '.x[1].pt.lock', path.name]
    )
    assert packed.read_or_build(path, lambda: pytest.fail('it is there'))['label'].tolist() == LABEL.tolist()


def test_the_digest_covers_pixels_classes_and_names():
    x, facts = torch.arange(24).view(6, 4).byte(), dict(classes=('a', 'b'), held_out=1)
    mark = packed.contents(x, LABEL, facts)['digest']
    assert mark == '9b804e78f9441a0f'  # must stay: it decides whether a run may resume
    other = x.clone()
    other[5, 3] = 1
    for changed in (
        packed.contents(other, LABEL, facts)['digest'],
        packed.contents(x, 1 - LABEL, facts)['digest'],
        packed.contents(x, LABEL, facts | dict(classes=('a', 'c')))['digest'],
    ):
        assert changed != mark


def test_how_many_are_held_out_by_default():
    assert [held_out_rows(0, n, '') for n in (5, 5000, 20_000)] == [1, 500, 1000]


def test_each_class_gives_its_share_and_keeps_its_last_item():
    labels = np.random.default_rng(0).permutation(np.repeat(range(4), (60, 30, 9, 1)))
    chosen = held_out_first(labels)[:20]
    assert np.bincount(labels[chosen], minlength=4).tolist() == [12, 6, 2, 0]
    assert all((chosen[labels[chosen] == k] == np.flatnonzero(labels == k)[:n]).all() for k, n in enumerate((12, 6, 2)))
    assert sorted(labels[held_out_first(labels)[96:]]) == [0, 1, 2, 3]  # the last of each
    assert held_out_first(['no class'] * 9).tolist() == list(range(9))
    assert sorted(held_out_first(range(9))) == list(range(9))  # one item per class: the order is still complete


@pytest.mark.parametrize('held_out', [0, 6])
def test_a_file_with_no_or_only_held_out_items_is_refused(held_out):
    with pytest.raises(SettingError, match=f'{held_out} of 6 items are held out. It must be at least one, and not all'):
        packed.parts_of(dict(x=X, label=LABEL, held_out=held_out))
    train, test, _ = packed.parts_of(dict(x=X, label=LABEL, held_out=5))
    assert (len(train[0]), len(test[0])) == (1, 5)
