"""Classes from labels of any kind, for arrays and tables, and the names that labels and held-out parts go by."""

from collections.abc import Sequence

import numpy as np

from data_loading.spec import describe
from runtime.errors import SettingError

NAMES_OF_LABEL = ('labels', 'label', 'y', 'targets', 'target', 'arr_1', 'classes', 'class')
HELD_OUT_SPLITS = ('validation', 'valid', 'val', 'test', 'eval')


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
        remedy = 'labels.argmax(1) takes the largest of a row, labels[:, 0] a column.' if several else 'Check the file.'
        if label.ndim == 1:
            raise SettingError(f'{where}: there are {len(label)} labels for {n} items. {remedy}')
    elif kind == 'f' and np.isnan(label).any():
        remedy = f'{np.isnan(label).sum()} of them are NaN: leave those items out.'
    elif kind == 'f':
        whole = (label == label.round()).all()
        remedy = f'{"labels.astype(int)" if whole else "np.digitize(labels, edges)"} makes classes of floats.'
    elif number and label.min() < 0:
        remedy = 'Leave those items out (labels >= 0), or make them a class of their own: labels - labels.min().'
    elif kind not in 'biuUST':
        remedy = 'labels.astype(str) makes texts of them.'
    if remedy:
        found = f'{describe(label)}' + (f', from {label.min()}' if number else '')
        raise SettingError(
            f'{where}: labels are {found}. One whole number from 0, text or bool for each of {n} is needed. {remedy}'
        )
    return np.char.decode(label, 'utf-8') if kind == 'S' else label


def classes_of(label: np.ndarray, names: Sequence[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    """(classes (n,) int64, their names) of labels (n,): each value that occurs is a class, in sorted order, with the
    value as its name, or names[value]."""
    values, classes = np.unique(label, return_inverse=True)
    known = label.dtype.kind in 'iu' and len(values) > 0 and values[-1] < len(names)
    return classes.astype(np.int64), tuple(str(names[value] if known else value) for value in values.tolist())
