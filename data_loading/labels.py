"""Turns labels of any type into classes, lists common names of labels and splits, and chooses the held-out items."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_loading.spec import counted, type_and_shape
from runtime.errors import SettingError

NAMES_OF_LABEL = ('labels', 'label', 'y', 'targets', 'target', 'arr_1', 'classes', 'class')
TRAIN = ('train', 'training')
HELD_OUT = ('val', 'valid', 'validation', 'test', 'testing', 'eval')  # in this order: the first found is held out
HINT = 'Numbers can be a condition instead: rename the array to cond_NAME (docs/experiments.md, Conditions).'


def one_for_each(label: np.ndarray, n: int, where: str) -> np.ndarray:
    """Labels of n items as (n,) whole numbers, strings or bools, from (n,), (n, 1) or one-hot (n, K). For anything
    else raises SettingError, with an expression that converts it."""
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    elif label.ndim == 2 and label.dtype.kind in 'biuf' and np.isin(label, (0, 1)).all() and (label.sum(1) == 1).all():
        label = label.argmax(1)
    kind, number, remedy = label.dtype.kind, label.dtype.kind in 'iu' and label.size > 0, ''
    if label.shape != (n,):
        several = label.ndim == 2 and len(label) == n
        remedy = f'There are {len(label)}.'
        remedy = f'labels.argmax(1) takes the largest of each row, labels[:, 0] a column. {HINT}' if several else remedy
    elif kind == 'f' and np.isnan(label).any():
        remedy = f'{np.isnan(label).sum()} of them are NaN: leave those items out.'
    elif kind == 'f':
        whole = (label == label.round()).all()
        remedy = f'{"labels.astype(int)" if whole else "np.digitize(labels, edges)"} turns floats into classes. {HINT}'
    elif number and label.min() < 0:
        remedy = 'Leave those items out (labels >= 0), or make them a class of their own: labels - labels.min().'
    elif kind not in 'biuUST':
        remedy = 'labels.astype(str) turns them into strings.'
    if remedy:
        found = type_and_shape(label) + (f', the smallest {label.min()}' if number else '')
        raise SettingError(
            f'{where}: labels are {found}. Each of {counted(n, "item")} needs one: a whole number from 0, a string or '
            f'a bool. {remedy}'
        )
    return np.char.decode(label, 'utf-8') if kind == 'S' else label


def classes_of(given: list[np.ndarray], names: Sequence[str] = ()) -> tuple[list[np.ndarray], dict[str, Any]]:
    """(classes (n,) int64 of each part, facts), from the labels (n,) of each part: every value that occurs is a class,
    in sorted order, named by its value, or by names[value]."""
    values, classes = np.unique(np.concatenate(given), return_inverse=True)
    known = values.dtype.kind in 'iu' and len(values) > 0 and values[-1] < len(names)
    found = tuple(str(names[value] if known else value) for value in values.tolist())
    parts = np.split(classes.astype(np.int64), np.cumsum([len(label) for label in given])[:-1])
    return parts, dict(num_classes=len(found), classes=found)


def number_in_class(label: np.ndarray) -> np.ndarray:
    """(n,): the number of items of the same class before each item, given the classes (n,)."""
    _, label, counts = np.unique(label, return_inverse=True, return_counts=True)
    number = np.empty(len(label), int)
    number[np.argsort(label, kind='stable')] = np.arange(len(label)) - np.repeat(np.cumsum(counts) - counts, counts)
    return number


def held_out_first(label: Any) -> np.ndarray:
    """(n,): the indices of n items, given the class of each, sorted so that the first k can be held out, for any k.

    Each class has its share of the first k, and its first items come first. The last item of each class comes after all
    others, so that it is held out last.
    """
    _, label, counts = np.unique(label, return_inverse=True, return_counts=True)
    number, of_class = number_in_class(label), counts[label]
    return np.argsort(np.where(number == of_class - 1, 1, (number + 0.5) / of_class), kind='stable')


def random_order(label: np.ndarray) -> np.ndarray:
    """(n,): the indices of `held_out_first`, after a shuffle that is the same in every run."""
    order = np.random.default_rng(0).permutation(len(label))
    return order[held_out_first(label[order])]


def held_out_rows(wanted: int, n: int, where: str, keep: int = 1) -> int:
    """The number of held-out items among n: `wanted`, or if that is 0 a tenth, at most 1000. At least `keep` items, one
    for each class, are left to train on. Raises SettingError."""
    most = n - keep
    if most < max(1, wanted):
        setting = f'{where}, held_out={wanted}' if wanted else where
        each = f'each of {keep} classes needs one' if keep > 1 else 'one is needed'
        most = f'of {counted(n, "item")} at most {max(0, most)} can be held out, as {each} to train on'
        raise SettingError(f'{setting}: {most}. Add items, or use a smaller --held_out.')
    return wanted or min(1000, max(1, n // 10), most)
