"""DataSpec's classes and their names; Part; checks of what `load` returns, their messages, and the fingerprint."""

import pickle
import re

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from config import SettingError
from data_loading.spec import DataSpec, Part, Rows, counted
from data_utils import DATASETS, setup_data_train_and_test
from runtime.errors import DataError

X, LABEL = torch.arange(24).view(12, 2).float(), torch.arange(12) % 3
SPEC = DataSpec(lambda config: (), num_classes=3, classes=('cat', 'dog', 'owl'))


class Named(TensorDataset):
    """A Dataset that knows its labels and its fingerprint."""

    labels = LABEL.tolist()

    def fingerprint(self) -> str:
        return 'mine'


def test_the_columns_of_a_grid_show_the_classes():
    columns = [DataSpec(lambda config: (), num_classes=n).columns() for n in (0, 1, 2, 3, 10, 12, 20, 21, 1000)]
    assert columns == [8, 8, 10, 9, 10, 12, 20, 10, 10]


@pytest.mark.parametrize(
    ('label', 'dropout', 'known'),
    [
        (LABEL, 0.1, True),
        (torch.tensor([3, 0]), 0.0, True),  # 3: no class
        (torch.tensor([4, 0]), 0.0, False),
        (torch.tensor([-1, 0]), 0.0, False),
        (LABEL, 1.0, False),  # the network has learned no classes
        (LABEL.float(), 0.0, False),
        (LABEL[:, None], 0.0, False),
        (LABEL[:0], 0.0, False),
        (None, 0.0, False),
    ],
)
def test_classes_are_known_if_the_network_has_learned_them(label, dropout, known):
    assert SPEC.known_classes(label, dropout) is (label if known else None)
    assert bool(SPEC.class_names(label, dropout)) == known


def test_numbers_of_things_are_singular_or_plural():
    assert [counted(n, 'class') for n in (0, 1, 2)] == ['0 classes', '1 class', '2 classes']
    assert [counted(n, 'image') for n in (1, 2)] == ['1 image', '2 images']


def test_classes_have_names_or_numbers():
    label = torch.tensor([2, 0, 3])
    assert SPEC.class_names(label, 0.0) == ['owl', 'cat', 'none']
    assert DataSpec(SPEC.load, num_classes=3).class_names(label, 0.0) == ['2', '0', 'none']
    assert DataSpec(SPEC.load, num_classes=1).class_names(torch.zeros(2).long(), 0.0) == []


def test_a_part_of_arrays_and_one_of_a_dataset_hold_the_same():
    arrays, dataset = Part((X, LABEL), 'mine'), Part(Named(X, LABEL), 'mine')
    assert dataset.arrays is None and arrays.classes(SPEC).equal(LABEL) and dataset.classes(SPEC).equal(LABEL)
    assert Part(TensorDataset(X, LABEL)).classes(SPEC) is None
    assert arrays.classes(DataSpec(SPEC.load)) is None  # the data have no classes
    for part in (arrays, dataset):
        few = part.first(5)
        assert (len(part), len(few), few.name) == (12, 5, 'mine') and not part.has_pairs
        assert few.classes(SPEC).equal(LABEL[:5])
        for i in range(5):
            assert all(map(torch.equal, few.items[i], (X[i], LABEL[i])))
    assert Part((X, LABEL, -X)).has_pairs and Part(TensorDataset(X, LABEL, -X)).first(2).has_pairs


@pytest.mark.parametrize(
    'labels',
    [range(1, 13), [0, 1], list('abc') * 4, [[0]] * 12, [-1] * 12, [0.5] * 12, None, [0, None] * 6],
    ids=['above', 'short', 'text', 'column', 'below', 'halves', 'none', 'mixed'],
)
def test_labels_of_a_dataset_that_are_not_classes_are_ignored(labels):
    """`labels` of a user's Dataset decides which classes are sampled and judged, if it holds classes."""
    dataset = Named(X, LABEL)
    dataset.labels = labels
    assert Part(dataset).classes(SPEC) is None


def test_the_contents_of_a_part_are_hashed():
    x, label = 'float32 (12, 2)', 'int64 (12,)'
    found = Part((X, LABEL)).contents()
    assert found[::2] == [x, label] and torch.equal(found[1], X) and torch.equal(found[3], LABEL)
    found = Part(TensorDataset(X, LABEL)).contents()
    assert found[::2] == ['float32 (1, 2)', 'int64 (1,)'] * 2
    assert torch.equal(torch.cat(found[1::4]), X[[0, -1]]) and torch.equal(torch.cat(found[3::4]), LABEL[[0, -1]])
    assert Part(Named(X, LABEL)).contents() == ['mine']
    assert Part(Rows(Named(X, LABEL), 2, 7)).contents() == ['mine range(2, 7)']


# ---------------------------------------------------------------- checks


CPU = torch.device('cpu')
IMAGES = torch.arange(24 * 3 * 4 * 5).reshape(24, 3, 4, 5).to(torch.uint8)
LABELS = torch.arange(24) % 5
GOOD = (IMAGES, LABELS)
POINTS = torch.linspace(-9, 9, 48).reshape(24, 2)


class Items(Dataset):
    """A list as a torch Dataset."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.fixture
def set_up(tiny_config, monkeypatch):
    """`set_up(loaded, **spec)`: the loaders of a data set whose `load` returns `loaded`, without loader processes."""

    def run(loaded, workers=0, **spec):
        spec = dict(num_classes=5) | spec
        monkeypatch.setitem(DATASETS, 'mine', DataSpec(lambda config: loaded, **spec))
        config = tiny_config(dataset='mine', global_batch_size=8, batch_shards=2, num_workers=workers)
        return setup_data_train_and_test(config, CPU)

    return run


FLOATS = dict(scale='float', num_classes=0)
NAN = POINTS.clone()
NAN[3, 1] = torch.nan
# case -> (result of load, arguments of the DataSpec, pattern of the message)
REFUSED = {
    'label num_classes': ((IMAGES, LABELS + 1), {}, "label goes from 1 to 5, .*=5 allows 0 to 4 .*'no label'.*=6"),
    'label 11': ((IMAGES, LABELS * 11), {}, 'label goes from 0 to 44'),
    'label -1': ((IMAGES, LABELS - 1), {}, 'label goes from -1 to 3.*Number the classes from 0'),
    'float labels': ((IMAGES, LABELS.float()), {}, r'label is float32 \(24,\).*whole number'),
    'one-hot labels': ((IMAGES, torch.eye(5)[LABELS].long()), {}, r'label is int64 \(24, 5\).*shape \(24,\)'),
    'images in [0, 1]': ((IMAGES / 255, LABELS), {}, r"x is float32 .*from 0 to 1\. .*must be uint8.*scale='float'"),
    'images in [-1, 1]': ((IMAGES / 127.5 - 1, LABELS), {}, r'from -1 to 1\. .*PILToTensor.*value_range='),
    '16 bits': ((IMAGES.numpy().astype(np.uint16) * 257, LABELS), {}, 'x is uint16 .*from 0 to 6.5'),
    'brighter than white': (GOOD, dict(max_value=16), r'x goes up to 255, above max_value=16.*max_value=255'),
    'a little brighter': ((IMAGES % 17 + 1, LABELS), dict(max_value=16), r'x goes up to 17, above max_value=16'),
    'other sides': (GOOD, dict(shape=(3, 32, 32)), r'items of shape \(3, 4, 5\), expected \(3, 32, 32\).*Resize'),
    'no channel': ((IMAGES[:, 0], LABELS), dict(shape=(1, 4, 5)), r'\(4, 5\), expected \(1, 4, 5\).*\[:, None\]'),
    'no channel, no shape': ((IMAGES[:, 0], LABELS), {}, r'\(4, 5\), expected \(C, H, W\).*images\[:, None\]'),
    'HWC': ((IMAGES.permute(0, 2, 3, 1), LABELS), dict(shape=(3, 4, 5)), r'permute\(0, 3, 1, 2\)'),
    'HWC, no shape': ((torch.zeros(24, 28, 28, 3).byte(), LABELS), {}, r'expected \(3, 28, 28\).*permute'),
    'RGBA last, no shape': ((torch.zeros(24, 28, 28, 4).byte(), LABELS), {}, r'expected \(4, 28, 28\).*permute'),
    'fewer labels': ((IMAGES, LABELS[:20]), {}, '24 x, 20 labels.*the same length'),
    'empty': ((IMAGES[:0], LABELS[:0]), {}, 'it is empty'),
    'an empty Dataset': (Items(), {}, 'it is empty'),
    'a number': ((IMAGES, LABELS, 3), {}, r'int\)\. It must be \(x, label\)'),
    'NaN': ((NAN, LABELS), FLOATS, '1 of 24 items hold NaN or infinite values, the first is number 3'),
    'float64 too large': ((POINTS.double() * 1e300, LABELS), FLOATS, 'items hold NaN or infinite'),
    'uint8 as floats': (GOOD, FLOATS, "x is uint8.*scale='float' takes floats.*float32"),
    'x1 of another shape': ((IMAGES, LABELS, IMAGES[:, :1]), {}, r'x1 is uint8 \(24, 1, 4, 5\), x is uint8 \(24, 3, 4'),
    'x1 of another type': ((IMAGES, LABELS, IMAGES / 255), {}, 'x1 is float32'),
    'fewer x1': ((IMAGES, LABELS, IMAGES[:9]), {}, '24 x, 24 labels, 9 x1'),
    'objects': ((np.array([None] * 24), LABELS), {}, 'object.*Convert'),
    'a float item': (Items((IMAGES[0] / 255, 0)), {}, 'first item: x is float32'),
    'an item with no channel': (Items((IMAGES[0, 0], 0)), {}, r'first item: x has items of shape \(4, 5\)'),
    'an item with a wrong label': (Items((IMAGES[0], 5)), {}, 'first item: label goes from 5 to 5'),
    'a single item': (Items(IMAGES[0]), {}, 'first item: uint8 .*It must be'),
    'an item of no array': (Items((object(), 0)), {}, r'cannot make a batch of \(object, int\)\.'),
}  # fmt: skip


@pytest.mark.parametrize('part', [0, 1])
@pytest.mark.parametrize('case', REFUSED)
def test_data_that_cannot_be_trained_on_are_refused_before(set_up, case, part):
    bad, spec, words = REFUSED[case]
    good = (POINTS, LABELS) if spec is FLOATS else GOOD
    if case in ('other sides', 'brighter than white', 'a little brighter', 'uint8 as floats') or 'no shape' in case:
        good = bad  # the message names the first part
    elif len(spec.get('shape', ())) == 3:
        good = (torch.zeros(24, *spec['shape'], dtype=torch.uint8), LABELS)
    with pytest.raises(SettingError) as caught:
        set_up((good, bad) if part else (bad, good), **spec)
    text = str(caught.value)
    named = 'held-out' if part and good is not bad else 'training'
    assert re.match(f"dataset='mine', {named} part", text) and re.search(words, text) and '\n' not in text, text


@pytest.mark.parametrize(
    'loaded, words',
    [
        (
            GOOD,
            r'load returned \(uint8 \(24, 3, 4, 5\), int64 \(24,\)\)\. It must return the training and the held-out',
        ),
        (IMAGES, r'load returned uint8'),
        ((GOOD, GOOD, GOOD), 'load returned'),
        (None, 'load returned NoneType'),
        (dict(train=GOOD, test=GOOD), 'load returned dict'),
        ((GOOD, None), r'NoneType\)'),
        (((*GOOD, IMAGES), GOOD), '3 entries in the training part, 2 in the held-out'),
        ((GOOD, (*GOOD, IMAGES)), '2 entries in the training part, 3 in the held-out'),
    ],
    ids=['x and y', 'one array', 'three parts', 'nothing', 'dict', 'no held-out part', 'x1 in one', 'x1 in the other'],
)
def test_load_must_return_two_parts(set_up, loaded, words):
    with pytest.raises(SettingError, match=words):
        set_up(loaded)


def test_an_unknown_scale_is_refused(set_up):
    with pytest.raises(SettingError, match=r"scale='unit' .*'image' or 'float'"):
        set_up((GOOD, GOOD), scale='unit')


@pytest.mark.parametrize('label_type', [np.uint8, np.int32, np.int64])
def test_numpy_arrays_come_out_as_tensors(set_up, label_type):
    part = (IMAGES.numpy()[:, ::-1], LABELS.numpy().astype(label_type))  # with a negative stride
    train, _, test = set_up((part, [part[0][:3], part[1][:3]]))
    assert train.spec.shape == test.spec.shape == (3, 4, 5)
    assert (train.size, test.size) == (24, 3)
    x, label = train.everything()
    assert torch.equal((255 * x).round().byte(), IMAGES.flip(1))
    assert label.dtype == torch.int64 and torch.equal(label, LABELS) and torch.equal(train.labels, LABELS)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_floats_come_out_as_they_are(set_up, dtype):
    """Points of any range; with num_classes 0 the second entry may be anything."""
    values, vectors = POINTS.to(dtype), torch.rand(24, 3, 2)
    train, *_ = set_up(((values, vectors), (values[:5], vectors[:5])), **FLOATS)
    x, label = train.take([3, 1, 3])
    assert train.spec.shape == (2,) and train.labels is None
    assert x.dtype == torch.float32 and torch.equal(x, values[[3, 1, 3]].float())
    assert torch.equal(label, vectors[[3, 1, 3]])


def test_pairs(set_up):
    """x1 is scaled like x, from arrays and from a Dataset; the label is not."""
    x1 = 255 - IMAGES
    arrays = (IMAGES, LABELS, x1)
    for part in (arrays, TensorDataset(*arrays)):
        train, _, test = set_up((part, part))
        for batch in (next(iter(train)), train.take([7, 2]), next(iter(test))):
            assert len(batch) == 3
            assert torch.allclose(batch[0] + batch[2], torch.ones(()))
        assert train.has_pairs and torch.equal(train.take([7, 2])[0], IMAGES[[7, 2]].float() / 255)
    assert not set_up((GOOD, GOOD))[0].has_pairs and not set_up((TensorDataset(*GOOD),) * 2)[0].has_pairs


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize(
    'item, words',
    [
        ((IMAGES[0], 7), 'label goes from 0 to 7'),
        (
            (IMAGES[0, :, :2], 0),
            r'batch of \(uint8 \(3, 4, 5\), int\) \(item \d\) and \(uint8 \(3, 2, 5\), int\) \(item 3\)\.',
        ),
        ((IMAGES[0].float(), 0), 'float32 .*3, 4, 5'),
    ],
)
def test_a_later_item_that_differs_is_one_line(set_up, workers, item, words):
    """The text of the error arrives from a loader process without its traceback."""
    train, *_ = set_up((Items(*[(IMAGES[0], 0)] * 3, item), TensorDataset(*GOOD)), workers=workers)
    with pytest.raises(DataError, match=f"^dataset='mine': .*{words}") as caught:
        next(iter(train))
    assert '\n' not in str(caught.value) and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    train.close()


def test_an_error_of_a_dataset_keeps_its_traceback(set_up):
    class Broken(Items):
        def __getitem__(self, i):
            return self.no_such_field if 0 < i < 3 else super().__getitem__(i)

    train, *_ = set_up((Broken(*[(IMAGES[0], 0)] * 4), TensorDataset(*GOOD)), workers=1)
    with pytest.raises(AttributeError, match=r'(?s)no_such_field'):
        next(iter(train))
    train.close()


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_depends_on_the_data(set_up):
    def of(*part, **spec):
        return set_up((part, GOOD), **spec)[0].fingerprint

    mark = of(*GOOD)
    assert mark == '24+24 items, 5 classes, c52444856c8d'  # must stay: it decides whether a run may resume
    assert of(IMAGES.numpy(), LABELS.numpy().astype(np.uint8)) == mark  # the same data, stored differently
    assert of(IMAGES.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), LABELS) == mark
    changed = IMAGES.clone()
    changed[11, 1, 2, 3] ^= 1
    others = [of(changed, LABELS), of(IMAGES, LABELS.flip(0)), of(IMAGES.flip(0), LABELS), of(*GOOD, num_classes=6)]
    part = (IMAGES.reshape(24, 3, 5, 4), LABELS)
    others.append(set_up((part, part))[0].fingerprint)
    assert len({mark, *others}) == 6
    train, _, test = set_up((GOOD, (changed, LABELS)))
    assert train.fingerprint == test.fingerprint != mark


def test_the_fingerprint_of_a_dataset(set_up):
    """Depends on its length, first and last item, or only on its own `fingerprint`; random items are drawn alike."""

    def of(part):
        return set_up((part, GOOD))[0].fingerprint

    mark = of(TensorDataset(IMAGES, LABELS))
    changed = IMAGES.clone()
    changed[-1, 0, 0, 0] ^= 1
    assert of(TensorDataset(IMAGES, LABELS)) == mark
    assert len({mark, of(TensorDataset(changed, LABELS)), of(TensorDataset(IMAGES[1:], LABELS[1:]))}) == 3

    class Noisy(TensorDataset):
        def __getitem__(self, i):
            return torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8), 0

    assert of(Noisy(IMAGES, LABELS)) == of(Noisy(IMAGES, LABELS))

    class Named(TensorDataset):
        def fingerprint(self):
            return self.name

    one, other = Named(IMAGES, LABELS), Named(IMAGES, LABELS)
    one.name, other.name = 'one', 'other'
    assert of(one) != of(other)


def test_rows_can_be_sent_to_a_process_that_was_not_forked():
    """As loader processes are on macOS. A lambda in them could not be pickled."""
    items = Rows(Named(X, LABEL), 2, 5)
    sent = pickle.loads(pickle.dumps(items))
    assert sent.fingerprint() == items.fingerprint() == f'{Named(X, LABEL).fingerprint()} range(2, 5)'
    assert sent.labels == LABEL[2:5].tolist() and torch.equal(sent[0][0], X[2])
