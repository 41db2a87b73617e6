"""DataSpec's classes and their names; Part, which is arrays or a Dataset."""

import pytest
import torch
from torch.utils.data import TensorDataset

from data_loading.spec import DataSpec, Part, Rows

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
        (LABEL, 1.0, False),  # the network has learned none
        (LABEL.float(), 0.0, False),
        (LABEL[:, None], 0.0, False),
        (LABEL[:0], 0.0, False),
        (None, 0.0, False),
    ],
)
def test_classes_are_known_if_the_network_has_learned_them(label, dropout, known):
    assert SPEC.known_classes(label, dropout) is (label if known else None)
    assert bool(SPEC.class_names(label, dropout)) == known


def test_classes_have_names_or_numbers():
    label = torch.tensor([2, 0, 3])
    assert SPEC.class_names(label, 0.0) == ['owl', 'cat', 'none']
    assert DataSpec(SPEC.load, num_classes=3).class_names(label, 0.0) == ['2', '0', 'none']
    assert DataSpec(SPEC.load, num_classes=1).class_names(torch.zeros(2).long(), 0.0) == []


def test_a_part_of_arrays_and_one_of_a_dataset_hold_the_same():
    arrays, dataset = Part((X, LABEL), 'mine'), Part(Named(X, LABEL), 'mine')
    assert dataset.arrays is None and arrays.labels.tolist() == dataset.labels == LABEL.tolist()
    assert Part(TensorDataset(X, LABEL)).labels is None
    for part in (arrays, dataset):
        few = part.first(5)
        assert (len(part), len(few), few.name) == (12, 5, 'mine') and not part.has_pairs
        assert list(few.labels) == LABEL[:5].tolist()
        for i in range(5):
            assert all(map(torch.equal, few.items[i], (X[i], LABEL[i])))
    assert Part((X, LABEL, -X)).has_pairs and Part(TensorDataset(X, LABEL, -X)).first(2).has_pairs
    assert arrays.to(torch.device('meta')).arrays[0].is_meta and dataset.to(torch.device('meta')) is dataset


def test_the_contents_of_a_part_are_hashed():
    x, label = 'float32 (12, 2)', 'int64 (12,)'
    found = Part((X, LABEL)).contents()
    assert found[::2] == [x, label] and torch.equal(found[1], X) and torch.equal(found[3], LABEL)
    found = Part(TensorDataset(X, LABEL)).contents()
    assert found[::2] == ['float32 (1, 2)', 'int64 (1,)'] * 2
    assert torch.equal(torch.cat(found[1::4]), X[[0, -1]]) and torch.equal(torch.cat(found[3::4]), LABEL[[0, -1]])
    assert Part(Named(X, LABEL)).contents() == ['mine']
    assert Part(Rows(Named(X, LABEL), 2, 7)).contents() == ['mine range(2, 7)']
