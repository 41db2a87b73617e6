"""Labels of any kind as classes, the names that labels and parts of the data go by, and which items are held out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_loading.spec import counted, describe
from runtime.errors import SettingError

NAMES_OF_LABEL = ('labels', 'label', 'y', 'targets', 'target', 'arr_1', 'classes', 'class')
TRAIN = ('train', 'training')
HELD_OUT = ('val', 'valid', 'validation', 'test', 'testing', 'eval')  # of several, the first is held out
OR = 'Numbers can be a condition instead: docs/experiments.md, Conditions.'


def one_for_each(label: np.ndarray, n: int, where: str) -> np.ndarray:
    """Labels of n items as (n,) whole numbers, texts or bools, from (n,) or (n, 1) of them, or one-hot (n, K). Raises
    SettingError, with the expression that makes labels of something else."""
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    elif label.ndim == 2 and label.dtype.kind in 'biuf' and np.isin(label, (0, 1)).all() and (label.sum(1) == 1).all():
        label = label.argmax(1)
    kind, number, remedy = label.dtype.kind, label.dtype.kind in 'iu' and label.size > 0, ''
    if label.shape != (n,):
        several = label.ndim == 2 and len(label) == n
        remedy = f'There are {len(label)}.'
        remedy = f'labels.argmax(1) takes the largest of a row, labels[:, 0] a column. {OR}' if several else remedy
    elif kind == 'f' and np.isnan(label).any():
        remedy = f'{np.isnan(label).sum()} of them are NaN: leave those items out.'
    elif kind == 'f':
        whole = (label == label.round()).all()
        remedy = f'{"labels.astype(int)" if whole else "np.digitize(labels, edges)"} makes classes of floats. {OR}'
    elif number and label.min() < 0:
        remedy = 'Leave those items out (labels >= 0), or make them a class of their own: labels - labels.min().'
    elif kind not in 'biuUST':
        remedy = 'labels.astype(str) makes texts of them.'
    if remedy:
        found = describe(label) + (f', the smallest {label.min()}' if number else '')
        raise SettingError(
            f'{where}: labels are {found}. One whole number from 0, text or bool for each of {counted(n, "item")} is '
            f'needed. {remedy}'
        )
    return np.char.decode(label, 'utf-8') if kind == 'S' else label


def classes_of(given: list[np.ndarray], names: Sequence[str] = ()) -> tuple[list[np.ndarray], dict[str, Any]]:
    """(classes (n,) int64 of each part, facts), from labels (n,) of each: every value that occurs is a class, in sorted
    order, with the value as its name, or names[value]."""
    values, classes = np.unique(np.concatenate(given), return_inverse=True)
    known = values.dtype.kind in 'iu' and len(values) > 0 and values[-1] < len(names)
    found = tuple(str(names[value] if known else value) for value in values.tolist())
    parts = np.split(classes.astype(np.int64), np.cumsum([len(label) for label in given])[:-1])
    return parts, dict(num_classes=len(found), classes=found)


def number_in_class(label: np.ndarray) -> np.ndarray:
    """(n,): how many items of the same class come before each item, given the classes (n,)."""
    _, label, counts = np.unique(label, return_inverse=True, return_counts=True)
    number = np.empty(len(label), int)
    number[np.argsort(label, kind='stable')] = np.arange(len(label)) - np.repeat(np.cumsum(counts) - counts, counts)
    return number


def held_out_first(label: Any) -> np.ndarray:
    """(n,): the indices of n items, given the class of each, in an order whose first ones are held out.

    Among any number of first ones each class has its share, its first items in the order given. The last item of each
    class comes after all others.
    """
    _, label, counts = np.unique(label, return_inverse=True, return_counts=True)
    number, of_class = number_in_class(label), counts[label]
    return np.argsort(np.where(number == of_class - 1, 1, (number + 0.5) / of_class), kind='stable')


def random_order(label: np.ndarray) -> np.ndarray:
    """(n,): indices as `held_out_first` gives them, after a shuffle that is the same in every run."""
    order = np.random.default_rng(0).permutation(len(label))
    return order[held_out_first(label[order])]


def held_out_rows(wanted: int, n: int, where: str, keep: int = 1) -> int:
    """How many of n items are held out: `wanted`, or a tenth and at most 1000 if that is 0; `keep` of them, one of each
    class, are left to train on. Raises SettingError."""
    most = n - keep
    if most < max(1, wanted):
        setting = f'{where}, held_out={wanted}' if wanted else where
        each = f'each of {keep} classes needs one' if keep > 1 else 'one is needed'
        most = f'of {counted(n, "item")} at most {max(0, most)} can be held out, as {each} to train on'
        raise SettingError(f'{setting}: {most}. Add items, or use a smaller --held_out.')
    return wanted or min(1000, max(1, n // 10), most)
