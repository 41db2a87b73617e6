"""Finds the data in the arrays of a file by their names: x, labels, x1 and conditions, of one part or of two."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from data_loading.labels import HELD_OUT, NAMES_OF_LABEL, TRAIN
from data_loading.spec import type_and_shape
from data_loading.stores import AXIS
from runtime.errors import SettingError
from runtime.ranks import print_once

NAMES_OF_X = ('images', 'x', 'data', 'samples', 'arr_0')
NAMES_OF_CLASSES = ('class_names', 'label_names', 'names', 'classes')
CONDITION = 'cond_'  # begins the name of an array that is a condition


class Named(NamedTuple):
    """One part of the data in a file, with the name of its x."""

    name: str
    x: Any
    label: np.ndarray | None
    x1: Any = None
    cond: Mapping[str, Any] = {}

    def like_x(self) -> Iterator[tuple[str, Any]]:
        yield from [(self.name, self.x)] + [('x1', self.x1)] * (self.x1 is not None)

    def in_memory(self) -> 'Named':
        x1 = None if self.x1 is None else self.x1[:]
        return self._replace(x=self.x[:], x1=x1, cond={name: value[:] for name, value in self.cond.items()})


def roles(names: Iterable[str]) -> dict[tuple[str, str], str]:
    """(split, name without it, in lower case) -> name in the file; a condition keeps its case."""
    there: dict[tuple[str, str], str] = {}
    for name in names:
        words = name.replace('/', '_').split('_')
        whole = words[:-1] == [CONDITION[:-1]]  # cond_valid is a condition, not `cond` of the part `valid`
        at = next((i for i in (0, -1) if words[i].lower() in TRAIN + HELD_OUT and not whole), None)
        split, key = '' if at is None else words.pop(at).lower(), '_'.join(words)
        there.setdefault((split, key if key.startswith(CONDITION) else key.lower()), name)
    return there


def parts_in(arrays: dict[str, Any], where: str) -> tuple[list[Named], list[str], str]:
    """([all data], or [the training part, the held-out part]; class names, if the file has them; a text that lists
    unused arrays). Raises SettingError."""
    there = roles(arrays)

    def named(splits: tuple[str, ...], names: tuple[str, ...]) -> list[tuple[str, str]]:
        return [(split, name) for split in splits for name in names if (split, name) in there]

    found = [*named(('', *TRAIN), NAMES_OF_X)[:1], *named(HELD_OUT, NAMES_OF_X)[:1]]
    if not found or found[0][0] in HELD_OUT:
        wanted = f'Name the data one of {", ".join(NAMES_OF_X)}, or x_train and x_test'
        raise SettingError(f'{where} holds {", ".join(arrays)}. {wanted}.')
    n = arrays[there[found[0]]].shape[:1]
    texts = [there[key] for key in named(('',), NAMES_OF_CLASSES) if arrays[there[key]].dtype.kind in 'US']
    texts = [name for name in texts if arrays[name].shape != n][:1]
    more = {key for split, key in there if split in ('', *dict(found)) and (key == 'x1' or key.startswith(CONDITION))}
    parts, used = [], set(texts)
    for split, name in found:
        x = there[split, name]
        label = next((there[key] for key in named((split,), NAMES_OF_LABEL) if there[key] not in texts), None)
        lacking = sorted(key for key in more if (split, key) not in there)
        if lacking:
            example = ' and '.join(f'{lacking[0]}_{part}' for part, _ in found if part) or lacking[0]
            raise SettingError(f'{where}: {x} has no {", ".join(lacking)}. Each part needs its own: {example}.')
        mine = {key: arrays[there[split, key]] for key in sorted(more)}
        used |= {x, label, *(there[split, key] for key in more)}
        x1, cond = mine.pop('x1', None), {key.removeprefix(CONDITION): value for key, value in mine.items()}
        parts.append(Named(x, arrays[x], arrays[label][...] if label else None, x1, cond))
    check_fit(parts, where)
    unused = {name: array for name, array in arrays.items() if name not in used}
    text = about_unused(unused, n, parts[0].label is not None)
    if text:
        print_once(f'arrays: {text}')
    return parts, [str(name) for key in texts for name in arrays[key]], text


def is_number(x: Any) -> bool:  # whether torch has its type
    return x.dtype.kind in 'biuf' and x.dtype.itemsize <= 8


def check_fit(parts: list[Named], where: str) -> None:
    """Raise SettingError if the arrays of the parts do not fit together."""
    for part in parts:
        name, x, label = part[:3]
        if x.ndim < 2 or not is_number(x) or x.dtype != parts[0].x.dtype or 0 in x.shape[1:]:
            raise SettingError(
                f'{where}: {name}: the data are {type_and_shape(x)}. They must be whole numbers or floats of at '
                'most 64 bits, with two or more axes, the first over items; the training and the held-out part must '
                'have the same type.'
            )
        if (label is None) != (parts[0].label is None) or (len(parts) == 2 and len(x) == 0):
            raise SettingError(f'{where}: {name}: both parts need items, and labels if one of them has labels.')
        for other, value in (*part.like_x(), *((CONDITION + key, value) for key, value in part.cond.items())):
            fits = value.shape[:1] == x.shape[:1] and is_number(value)
            if other == 'x1':
                fits = value.shape == x.shape and (value.dtype == x.dtype or {value.dtype.kind, x.dtype.kind} == {'f'})
            if not fits:
                raise SettingError(
                    f'{where}: {other} is {type_and_shape(value)}, and {name} is {type_and_shape(x)}. x1 must have the '
                    'shape and type of x, and a condition one row of numbers for each x.'
                )


def about_unused(unused: dict[str, Any], n: tuple[int, ...], has_labels: bool) -> str:
    """A text that lists unused arrays, and how to use those that have a row for each of n items."""
    if not unused:
        return ''
    listed = [f'{name} {type_and_shape(array)}' for name, array in unused.items()]
    listed[12:] = [f'and {len(listed) - 12} more'] * (len(listed) > 12)
    text = f'not used: {", ".join(listed)}'
    rows = [name for name, array in unused.items() if array.shape[:1] == n and not name.endswith(AXIS)]
    maybe = [name for name in rows if unused[name].dtype.kind in 'biuUS']
    if maybe and not has_labels:
        text += f'. If {maybe[0]} holds the classes, rename it to labels'
    numbers = [name for name in rows if unused[name].dtype.kind in 'biuf']
    if numbers:
        text += f'. To give {numbers[0]} to the network as a condition, rename it to {CONDITION}{numbers[0]}'
    return text
