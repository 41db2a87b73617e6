"""Checks the data that the `load` of a DataSpec returns: once before training, then every batch of a loader process."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_loading.spec import Arrays, DataSpec, Part, type_and_shape
from data_loading.workers import PipedTuple, stack_items
from runtime.errors import DataError, SettingError

HOW_TO_RETURN = (
    'It must return the training and the held-out part: (x, label), (held_out_x, held_out_label) or Datasets'
)
EMPTY = 'it is empty. Put at least one item into it.'
TAKEN = ('self', 'x', 'xt', 't', 'time', 'label', 'augmentation')  # names of other inputs of a network


def check_parts(spec: DataSpec, loaded: Any, where: str) -> tuple[DataSpec, Part, Part]:
    """(`spec` with the shape of the data and the facts that came with them, training part, held-out part), from what
    `spec.load` returned. Checks only the first item of a Dataset. Raises SettingError, which calls the data `where`.
    """
    if isinstance(loaded, tuple) and len(loaded) == 3 and isinstance(loaded[2], dict):
        spec, loaded = replace(spec, **loaded[2]), loaded[:2]
    if spec.scale not in ('image', 'float'):
        raise SettingError(f"{where}: scale={spec.scale!r} of its DataSpec must be 'image' or 'float'.")
    if not isinstance(loaded, (tuple, list)) or len(loaded) != 2 or not all(map(may_be_part, loaded)):
        raise SettingError(f'{where}: load returned {type_and_shape(loaded)}. {HOW_TO_RETURN}.')
    check_names(spec.conditions, where)
    parts, entries = [], []
    for source, name in zip(loaded, ('training', 'held-out'), strict=True):
        here = f'{where}, {name} part'
        try:
            if isinstance(source, (tuple, list)):
                source = first = check_arrays(source, spec, here)
            elif len(source) == 0:
                raise DataError(f'{here}: {EMPTY}')
            else:
                first = collate([source[0]], spec, f'{here}, first item')
        except DataError as error:
            raise SettingError(str(error)) from None
        shapes = tuple(tuple(array.shape[1:]) for array in first[len(first) - len(spec.conditions) :])
        spec = replace(spec, shape=tuple(first[0].shape[1:]), condition_shapes=shapes)
        parts.append(Part(source, where, len(spec.conditions)))
        entries.append(len(first))
    if entries[0] != entries[1]:
        counted = f'{entries[0]} entries in the training part, {entries[1]} in the held-out part'
        raise SettingError(f'{where}: {counted}. {HOW_TO_RETURN}.')
    return spec, *parts


def check_names(conditions: Sequence[str], where: str) -> None:
    """Raise SettingError unless a network can take these names as keywords."""
    for i, name in enumerate(conditions):
        why = 'is the name of another input of the network' if name in TAKEN else ''
        why = why if name.isidentifier() else 'has other characters than letters, digits and _, or begins with a digit'
        if why or name in conditions[:i]:
            raise SettingError(f'{where}: condition {name!r} {why or "is there twice"}. Rename it.')


def may_be_part(part: Any) -> bool:
    """Whether `part` is a tuple of arrays, or a Dataset of known length."""
    has_both = hasattr(part, '__len__') and hasattr(part, '__getitem__')
    return has_both and not isinstance(part, (Tensor, np.ndarray, dict, str))


def collate(items: list, spec: DataSpec, where: str, numbers: Sequence[int] = ()) -> Arrays:
    """A checked batch of items of a Dataset; errors name items by their `numbers`. Raises DataError."""
    return PipedTuple(check_arrays(stack_items(items, where, numbers), spec, where, numbers))


def check_arrays(arrays: Any, spec: DataSpec, where: str, numbers: Sequence[int] = ()) -> Arrays:
    """Tensors from tensors or numpy arrays: x and x1 as `check_values` makes them, class labels int64, conditions as
    `check_condition` makes them.

    Raises DataError with the value found, the value expected and a remedy.
    """
    names = spec.conditions
    is_tuple = isinstance(arrays, (tuple, list)) and len(arrays) - len(names) in (2, 3)
    if not is_tuple or not all(isinstance(array, (Tensor, np.ndarray)) and array.ndim for array in arrays):
        more = ''.join(f', {name}' for name in names)
        raise DataError(
            f'{where}: {type_and_shape(arrays)}. It must be (x, label{more}) or (x, label, x1{more}), of tensors or '
            'arrays.'
        )
    try:
        arrays = [torch.from_numpy(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a for a in arrays]
    except TypeError as error:
        raise DataError(f'{where}: {type_and_shape(arrays)}: {error} Convert it to uint8, int64 or float32.') from None
    x, label, *more = arrays
    x1, cond = more[: len(more) - len(names)], more[len(more) - len(names) :]
    if len({len(array) for array in arrays}) > 1:
        entries = ['x', 'labels', *['x1' for _ in x1], *names]
        counts = [f'{len(array)} {name}' for array, name in zip(arrays, entries, strict=True)]
        raise DataError(f'{where}: {", ".join(counts)}. x, labels, x1 and conditions must have the same length.')
    if len(x) == 0:
        raise DataError(f'{where}: {EMPTY}')
    x = check_values(x, spec, f'{where}: x', numbers)
    check_shape(tuple(x.shape[1:]), spec, f'{where}: x')
    x1 = [check_values(values, spec, f'{where}: x1', numbers) for values in x1]
    if x1 and x1[0].shape != x.shape:
        raise DataError(
            f'{where}: x1 is {type_and_shape(x1[0])}, x is {type_and_shape(x)}. x and x1 must have the same shape.'
        )
    label = check_labels(label, spec.num_classes, f'{where}: label') if spec.num_classes else label
    shapes = spec.condition_shapes or [tuple(value.shape[1:]) for value in cond]
    cond = [
        check_condition(value, tuple(shape), f'{where}: condition {name!r}', numbers)
        for name, shape, value in zip(names, shapes, cond, strict=True)
    ]
    return x, label, *x1, *cond


def check_values(x: Tensor, spec: DataSpec, where: str, numbers: Sequence[int] = ()) -> Tensor:
    """`x` as uint8 up to max_value for images, as finite float32 for floats, and within a value_range if there is one.
    Errors name an item by its number in `numbers`, else by its index."""
    if spec.scale == 'image' and not spec.value_range:
        if x.dtype != torch.uint8:
            raise DataError(
                f'{where} is {type_and_shape(x)}, from {x.double().min():.4g} to {x.double().max():.4g}. Images '
                'must be uint8: convert them (in torchvision, transforms.PILToTensor()), or pass value_range=(BLACK, '
                "WHITE) to the DataSpec, or scale='float' to use the values as they are."
            )
        if spec.max_value < 255 and x.max() > spec.max_value:
            remedy = f'Pass max_value={x.max()} to the DataSpec, or 255 if all values may occur'
            raise DataError(f'{where} goes up to {x.max()}, above max_value={spec.max_value} (white). {remedy}.')
        return x
    if not x.is_floating_point() and not spec.value_range:
        remedy = "Convert it to float32, or pass scale='image' to the DataSpec for uint8 images"
        raise DataError(f"{where} is {type_and_shape(x)}, but scale='float' takes floats as they are. {remedy}.")
    x = x.float()
    refuse_items(~x.isfinite(), where, numbers)
    if spec.value_range:
        low, high = spec.value_range
        what = f'values outside value_range=({low:g}, {high:g})'
        remedy = f'The values go from {x.min():g} to {x.max():g}: widen the range, or fix the items'
        refuse_items((x < low) | (x > high), where, numbers, what, remedy)
    return x


def check_condition(value: Tensor, shape: tuple[int, ...], where: str, numbers: Sequence[int]) -> Tensor:
    """`value` as finite float32, or as the whole numbers it is. Raises DataError."""
    if value.is_complex() or value.shape[1:] != shape:
        wanted = f'real numbers, items of shape {shape}'
        raise DataError(f'{where} is {type_and_shape(value)}. It must be {wanted}, in both parts of the data.')
    if not value.is_floating_point():
        return value
    refuse_items(~value.isfinite(), where, numbers)
    return value.float()


def refuse_items(
    wrong: Tensor, where: str, numbers: Sequence[int], what: str = 'NaN or infinite values',
    remedy: str = 'Fix them or leave them out',
) -> None:  # fmt: skip
    """Raise DataError if any value is `wrong` (N, ...): it counts the items, and names the first."""
    if wrong.any():
        bad = wrong.reshape(len(wrong), -1).any(1).nonzero().flatten().tolist()
        first = numbers[bad[0]] if len(numbers) else bad[0]
        raise DataError(
            f'{where}: {len(bad)} of {len(wrong)} items hold {what}, the first is number {first}. {remedy}.'
        )


def check_shape(found: tuple[int, ...], spec: DataSpec, where: str) -> None:
    """Raise DataError unless an item has the spec's shape, or, if that is None, a shape that images can have."""
    wanted = spec.shape
    if wanted is None and spec.scale == 'image':
        if len(found) < 3:
            wanted = ('C', 'H', 'W')
        elif len(found) == 3 and found[2] <= 4 < found[0]:
            wanted = found[2:] + found[:2]
    if wanted is None or tuple(wanted) == found:
        return
    remedy = 'Resize the data in load'
    if len(found) == len(wanted) - 1:
        remedy = 'If the channel is missing, add it: images[:, None]'
    elif found[-1:] + found[:-1] == tuple(wanted):
        remedy = 'If the channels come last, put them first: images.permute(0, 3, 1, 2)'
    shapes = f'items of shape {found}, expected ({", ".join(map(str, wanted))})'
    raise DataError(f'{where} has {shapes}. {remedy}. If the shape is right, pass shape={found} to the DataSpec.')


def check_labels(label: Tensor, n: int, where: str) -> Tensor:
    """`label` as int64, one class from 0 to n - 1 for each item. Raises DataError."""
    if label.ndim != 1 or label.is_floating_point() or label.is_complex():
        wanted = f'one whole number for each item, shape ({len(label)},). With num_classes=0 labels may be anything'
        raise DataError(f'{where} is {type_and_shape(label)}, but num_classes={n} needs {wanted}.')
    label = label.long()
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= n:
        allowed = f"num_classes={n} allows 0 to {n - 1} ({n} means 'no label')"
        remedy = f'Number the classes from 0, or pass num_classes={max(high, 0) + 1} to the DataSpec'
        raise DataError(f'{where} goes from {low} to {high}, but {allowed}. {remedy}.')
    return label
