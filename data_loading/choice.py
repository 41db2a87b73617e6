"""Chooses the classes and held-out items for samples: in turn for pictures, as often as in the data for numbers."""

import functools
from collections.abc import Sequence

import numpy as np

from data_loading.labels import number_in_class
from data_loading.loader import Loader
from data_loading.spec import DataSpec
from runtime.errors import SettingError


def classes_in_turn(data: DataSpec, n: int) -> np.ndarray:
    """(n,): the trained classes in turn."""
    return np.resize(data.trained_classes or (0,), n)


def classes_in_proportion(data: DataSpec, n: int) -> np.ndarray:
    """(n,): the trained classes, each as often as in the training data, also in the first k for any k; in turn if their
    counts are not known. Each place goes to the class that is furthest behind its share."""
    # a power of 2, so that the cache also serves other n
    return proportional(data.counts, 1 << n.bit_length())[:n] if data.counts else classes_in_turn(data, n)


@functools.lru_cache(maxsize=4)
def proportional(counts: tuple[int, ...], n: int) -> np.ndarray:
    """(n,): the classes of `classes_in_proportion`."""
    share, used, classes = np.array(counts) / sum(counts), np.zeros(len(counts)), np.zeros(n, int)
    for i in range(n):
        classes[i] = np.argmax(share * (i + 1) - used)
        used[classes[i]] += 1
    return classes


def held_out_order(loader: Loader, n: int, in_turn: bool, classes: Sequence[int] = ()) -> list[int]:
    """Indices of n items of `loader`, from trained classes only: at random, the same every time; or `in_turn`, one
    class after another, if classes are known. When all items are used, the order starts again. With `classes`, item i
    is of class `classes[i % len(classes)]`; num_classes is any class. Raises SettingError if a class has no items."""
    order = np.arange(loader.size) if in_turn else np.random.default_rng(0).permutation(loader.size)
    if loader.labels is not None:
        labels = loader.labels.numpy()
        if in_turn:
            order = np.lexsort((labels, number_in_class(labels)))
        trained = np.isin(labels[order], loader.spec.trained_classes)
        order = order[trained] if trained.any() else order
        of_class = {c: order[(labels[order] == c) | (c == loader.spec.num_classes)] for c in classes}
        for c, items in of_class.items():
            if not len(items):
                raise SettingError(f'labels={c}: samples start from held-out items, and none is of this class.')
        if classes:
            wanted = [(of_class[classes[i % len(classes)]], i // len(classes)) for i in range(n)]
            return [int(items[turn % len(items)]) for items, turn in wanted]
    return np.resize(order, n).tolist()
