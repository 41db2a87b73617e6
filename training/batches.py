"""How the batch of a step comes about: shards, coupling, conditions that are dropped, and what sampling starts from.

A global batch is always drawn as `batch_shards` shards. Before a shard is prepared the generators are seeded from a
hash of (seed, step, shard), so that a shard is the same on any number of processes, and in a run that was killed and
resumed.
The functions take a trainer; some of them are its methods (trainer.py).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import utils
from config import SettingError
from data_loading.loader import Loader
from runtime.ranks import print_once
from sampling import nulled

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer


@dataclass
class ProcessedBatch:
    """A prepared batch: all randomness of a training step has been drawn when this exists. May be subclassed."""

    x_original: Tensor  # (B, ...) as loaded; images are in [0, 1]
    x0: Tensor  # (B, ...) encoded: what is noised
    x1: Tensor  # (B, ...) base sample
    t: Tensor  # (B,)
    label: Tensor | None  # (B,) int64 class; num_classes means 'no label'
    augmentation_label: Tensor | None = None  # (B,) bool: was anything done to this image?
    cond: dict[str, Tensor] = field(default_factory=dict)  # named inputs of the network beside the class, each (B, ...)


@dataclass
class SampleInputs:
    """What sampling starts from. May be subclassed."""

    x1: Tensor  # (n, ...)
    label: Tensor | None = None  # (n,) int64
    cond: dict[str, Tensor] = field(default_factory=dict)  # as in training, each (n, ...)
    beside: list[Tensor] = field(default_factory=list)  # shown left of the samples, as decode returns them; empty: x1


def shards(trainer: 'BaseDiffusionTrainer') -> Iterator[ProcessedBatch]:
    """This process's shards of all training steps from `trainer.step` on, prepared.

    Where an experiment overrides `couple`, every process prepares all shards of a step, couples them and takes its own.
    """
    sampler = trainer.train_sampler
    sampler.all_shards = trainer.couples
    sampler.set_step(trainer.step)
    loaded = iter(trainer.train_loader)
    for step in itertools.count(trainer.step):
        drawn = (trainer.draw_shard(next(loaded), shard, step) for shard in sampler.shards_read)
        yield from couple_shards(trainer, list(drawn), sampler.my_shards, step) if trainer.couples else drawn


def draw_shard(
    trainer: 'BaseDiffusionTrainer', batch: tuple[Tensor, ...], shard: int, step: int | str
) -> ProcessedBatch:
    """Shard `shard` of the global batch of a step, before it is coupled; step 'evaluate' is the held-out data."""
    trainer.shard_position = (shard % trainer.config.batch_shards, trainer.config.batch_shards)
    utils.seed_everything(trainer.config.seed, 'batch', step, shard)
    is_train = step != 'evaluate'
    prepared = trainer.prepare_batch_fn(batch, is_train=is_train)
    return prepared if trainer.couples else drop_conditions(trainer, prepared, is_train)


def couple_shards(
    trainer: 'BaseDiffusionTrainer', drawn: list[ProcessedBatch], mine: Sequence[int], step: int | str
) -> list[ProcessedBatch]:
    """The shards of one global batch, coupled; of these, those at the positions `mine`."""
    sizes = [len(shard.t) for shard in drawn]
    whole = utils.concat(drawn)
    utils.seed_everything(trainer.config.seed, 'couple', step)
    x1 = trainer.couple(whole.x0, whole.x1, whole.label)
    if x1.shape != whole.x1.shape:
        raise ValueError(f'couple must return x1 of shape {tuple(whole.x1.shape)}, not {tuple(x1.shape)}')
    whole = drop_conditions(trainer, dataclasses.replace(whole, x1=x1), is_train=step != 'evaluate')
    ends = np.cumsum([0, *sizes])
    return [utils.rows(whole, slice(int(ends[i]), int(ends[i + 1]))) for i in mine]


def drop_conditions(trainer: 'BaseDiffusionTrainer', batch: ProcessedBatch, is_train: bool) -> ProcessedBatch:
    """In training, with probability label_dropout for each image, the null class in place of the label and the null
    value of every condition that has one (Ho and Salimans 2022, algorithm 1). With label_dropout 1, always."""
    probability = trainer.config.label_dropout
    if probability == 0 or (not is_train and probability < 1):
        return batch
    dropped = torch.rand(len(batch.t), device=batch.t.device) < probability
    label = batch.label
    if label is not None and label.ndim == 1 and not label.is_floating_point():
        label = torch.where(dropped, trainer.data.num_classes, label)
    nulls = nulled(batch.cond, trainer.null_cond)
    cond = {
        name: torch.where(utils.bcast_right(dropped, value.ndim), nulls[name], value)
        if name in trainer.null_cond
        else value
        for name, value in batch.cond.items()
    }
    return dataclasses.replace(batch, label=label, cond=cond)


def uniforms(trainer: 'BaseDiffusionTrainer', n: int) -> Tensor:
    """(n,) numbers in [0, 1] for the time sampler. If `stratified`, one in each of n x shards equal intervals: a shard
    takes every `shards`-th interval, in random order. If `antithetic`, in pairs u, 1 - u. Else independent."""
    u = torch.rand(n, device=trainer.device)
    if trainer.config.antithetic:
        return torch.cat([u[: (n + 1) // 2], 1 - u[: n // 2]])
    if not trainer.config.stratified:
        return u
    shard, of = trainer.shard_position
    return (shard + of * torch.randperm(n, device=trainer.device) + u) / (of * n)


def example(trainer: 'BaseDiffusionTrainer', draw: str = 'first') -> ProcessedBatch:
    """A prepared batch of the first images; another `draw` has other noise, times and conditions for them.

    Raises SettingError if its parts do not fit together.
    """
    n = min(64, trainer.config.global_batch_size, trainer.train_loader.size)
    utils.seed_everything(trainer.config.seed, 'example', draw)
    prepared = trainer.prepare_batch_fn(trainer.train_loader.take(range(n)), is_train=False)
    trainer.means.clear()  # what it logged is of no step
    check_shapes(prepared, f'{type(trainer).__name__}.prepare_batch_fn')
    return drop_conditions(trainer, prepared, is_train=False)


def check_shapes(batch: ProcessedBatch, made_by: str) -> None:
    """Raise SettingError if a part of the batch does not have one row for each x0, x1 not its shape, or t not (B,)."""
    rows, shape = len(batch.x0), tuple(batch.x0.shape)
    parts = {'t': batch.t, 'x1': batch.x1, 'label': batch.label}
    for name, value in {**parts, **{f'cond[{key!r}]': value for key, value in batch.cond.items()}}.items():
        wanted = {'t': (rows,), 'x1': shape}.get(name, (rows, *value.shape[1:]) if value is not None else None)
        if value is not None and tuple(value.shape) != wanted:
            raise SettingError(
                f'{made_by} gives {name} of shape {tuple(value.shape)}, and x0 of shape {shape}: {name} must be '
                f'{wanted if name in ("t", "x1") else f"({rows}, ...), one value for each x0"}'
            )


def sample_inputs(trainer: 'BaseDiffusionTrainer', n: int, numbers: Sequence[int] | None = None) -> SampleInputs:
    """What n samples start from, the same every time; `numbers` are theirs among many, by default 0 to n - 1.

    Noise, and the classes in turn. Where the network has other conditions, these are of held-out data; where x1 is data
    (`independent` is False) x1 is held out too, and shown left of the samples.
    """
    classes, unlabelled = trainer.data.num_classes, trainer.config.label_dropout == 1
    numbers = range(n) if numbers is None else numbers
    utils.seed_everything(trainer.config.seed, 'sample_inputs')
    if trainer.independent and not trainer.example.cond:
        x1 = trainer.process.sample_base(torch.zeros(n, *trainer.shape, device=trainer.device))
        label = torch.tensor(list(numbers), device=trainer.device) % max(1, classes)
        return SampleInputs(x1, torch.full_like(label, classes) if unlabelled else label)
    turns = classes_in_turn(trainer.test_loader, max(numbers) + 1)
    batch = trainer.test_loader.take([turns[i] for i in numbers])
    utils.seed_everything(trainer.config.seed, 'sample_inputs')
    batch = drop_conditions(trainer, trainer.prepare_batch_fn(batch, is_train=False), is_train=False)
    if trainer.independent:
        return SampleInputs(batch.x1, batch.label, batch.cond)
    return SampleInputs(batch.x1, batch.label, batch.cond, [trainer.decode(batch.x1), trainer.decode(batch.x0)])


def classes_in_turn(loader: Loader, n: int) -> list[int]:
    """Indices of n images of `loader`, a class after the other if known; from the first again when all are taken."""
    order = np.arange(loader.size)
    if loader.labels is not None:
        labels = loader.labels.numpy()
        nth = np.zeros(loader.size, int)  # how many of its class come before it
        for label in np.unique(labels):
            nth[labels == label] = np.arange((labels == label).sum())
        order = np.lexsort((labels, nth))
    return np.resize(order, n).tolist()


def is_independent(trainer: 'BaseDiffusionTrainer') -> bool:
    """Whether x1 is the process's base, drawn anew for each image: as a subclass says, else as can be seen. Prints what
    it sees in the data."""
    seen, name = signs_of_dependence(trainer), type(trainer).__name__
    if utils.overridden(trainer, 'independent'):
        if trainer.independent and seen:
            print_once(
                f'warning: {name}.independent is True, but {seen}. Samples start from noise and SDE solvers follow a '
                'wrong score. Set independent = False.'
            )
        return trainer.independent
    if seen:
        print_once(
            f'{name}.independent is False, because {seen}: samples start from x1 of held-out data, and there are no '
            'SDE samples. Set `independent` in the class to decide this yourself.'
        )
    return not (seen or trainer.couples or trainer.train_loader.has_pairs)


def signs_of_dependence(trainer: 'BaseDiffusionTrainer') -> str | None:
    """What shows in the first images that x1 is not drawn from the process's base for each image anew; None if nothing.

    Two preparations of the same images are compared: where x1 is made of x0, it is alike in both.
    """
    x0, x1, again = trainer.example.x0, trainer.example.x1, example(trainer, 'again').x1
    if not x1.is_floating_point() or len(x1) < 8 or x1.shape != again.shape:
        return None
    first, second = ((x - x.mean(0)).flatten(1).double() for x in (x1, again))
    products = (first * second).sum(1)  # (n,), of mean 0 if the two have nothing in common
    if products.mean() > 5 * products.std() / len(products) ** 0.5:
        correlation = float(products.sum() / (first.norm() * second.norm()))
        return f'x1 goes with x0 (two draws of x1 for the same images correlate by {correlation:.2f})'
    base = trainer.process.sample_base(x0)
    (mean, std), (usual_mean, usual_std) = ((float(x.mean()), float(x.std())) for x in (x1, base))
    chance = max(0.05, 5 / x1.numel() ** 0.5)
    if abs(mean - usual_mean) > chance * usual_std or abs(std / usual_std - 1) > chance:
        return (
            f'x1 has mean {mean:.2f} and standard deviation {std:.2f}, and the base of process '
            f'{trainer.config.process_name!r} has {usual_mean:.2f} and {usual_std:.2f}'
        )
    return None


def warning_of_scale(trainer: 'BaseDiffusionTrainer') -> str | None:
    """What is odd about x0 of the first images, with the numbers and the remedy; None if nothing is."""
    x0 = trainer.example.x0
    if not x0.is_floating_point():
        return None
    finite = x0[x0.isfinite()]
    bad = x0.numel() - finite.numel()
    low, high = (float(v) for v in finite.aminmax()) if finite.numel() else (float('nan'), float('nan'))
    numbers = f'x0 of the first {len(x0)} images lies in [{low:.4g}, {high:.4g}]'
    if bad:
        return f'{numbers}, and {bad} of its {x0.numel()} values are not finite. Mend the data, or override encode.'
    if low == high:
        return f'x0 of the first {len(x0)} images is {low:.4g} everywhere. Look at the data, and at encode.'
    std, sigma_data = float(finite.double().std()), trainer.config.sigma_data
    as_assumed = 0.8 < std / sigma_data < 1.25 and abs(float(finite.mean())) < sigma_data and high - low < 20 * std
    if (low < -1.5 or high > 1.5) and not as_assumed:
        return (
            f'{numbers}, standard deviation {std:.3g}. The defaults (sigma_data={trainer.config.sigma_data:g}, the '
            'time grid) are made for data in [-1, 1]: override encode and decode, e.g. with '
            f'(x - {float(finite.mean()):.3g}) / {2 * std:.3g} and its inverse, or set --sigma_data {std:.3g}.'
        )
    return None
