"""Batches for training, evaluation and sampling: shards, coupling, label dropout, inputs for samplers.

A global batch is always drawn as `batch_shards` shards. Before a shard is prepared the generators are seeded from a
hash of (seed, step, shard), so that a shard is the same on any number of processes, and in a run that was killed and
resumed. The hooks `prepare_batch_fn` and `couple` of the experiment do the rest.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from config import SettingError
from data_loading.choice import classes_in_proportion, classes_in_turn, held_out_order
from data_loading.loader import HeldOutSampler, Loader, StreamSampler, facts_of
from runtime import ranks, stopping
from sampling import nulled
from training.calling import in_eval_mode
from training.experiment import Experiment, ProcessedBatch, SampleInputs


class Batches:
    """Prepared batches of an experiment. Randomness is a function of (seed, step, shard)."""

    def __init__(self, experiment: Experiment, train_loader: Loader, train_sampler: StreamSampler, test_loader: Loader):
        self.experiment, self.config = experiment, experiment.config
        self.train_loader, self.train_sampler, self.test_loader = train_loader, train_sampler, test_loader
        self.shard_position = (0, 1)  # (index, number of shards) of the shard that is being prepared
        self.classes_as_in_data = False  # see `as_in_data`

    def __enter__(self) -> None:
        # Fork now: later, while a thread writes a checkpoint, a fork could copy a lock that is never released.
        self.test_loader.start_workers()

    def __exit__(self, *error: object) -> None:
        self.train_loader.close()
        self.test_loader.close()

    # ---------------------------------------------------------------- training

    def steps(self, first: int) -> Iterator[Iterator[ProcessedBatch]]:
        """This process's micro-batches for every training step from `first` on. Take all of a step before the next one.

        If the experiment has `couple`, every process prepares all shards of a step, couples them and keeps its own.
        """
        self.train_sampler.all_shards = self.experiment.couple is not None
        self.train_sampler.set_step(first)
        loaded = iter(self.train_loader)
        for step in itertools.count(first):
            yield self.micro_batches(step, loaded)

    def micro_batches(self, step: int, loaded: Iterator[tuple[Tensor, ...]]) -> Iterator[ProcessedBatch]:
        """This process's parts of the global batch of a step, from the shards of `loaded`."""
        sampler = self.train_sampler
        shards = (self.draw_shard(next(loaded), shard, step) for shard in sampler.shards_read)
        if self.experiment.couple is not None:
            shards = iter(self.couple_shards(list(shards), sampler.my_shards, step))
        for _ in range(self.config.accumulation_steps):
            yield utils.concat(list(itertools.islice(shards, self.shards_per_micro_step)))

    @property
    def shards_per_micro_step(self) -> int:  # shards of this process in one forward pass
        return len(self.train_sampler.my_shards) // self.config.accumulation_steps

    @property
    def images_at_once(self) -> int:  # images of this process in one forward pass
        return self.shards_per_micro_step * self.config.global_batch_size // self.config.batch_shards

    def draw_shard(
        self, batch: tuple[Tensor, ...], shard: int, step: int | str, is_train: bool = True
    ) -> ProcessedBatch:
        """Shard `shard` of the global batch of a step, before coupling; `step` is part of the seed."""
        self.shard_position = (shard % self.config.batch_shards, self.config.batch_shards)
        utils.seed_everything(self.config.seed, 'batch', step, shard)
        prepared = self.with_conditions(batch, is_train)
        return prepared if self.experiment.couple is not None else self.drop_conditions(prepared, is_train)

    def with_conditions(self, batch: tuple[Tensor, ...], is_train: bool) -> ProcessedBatch:
        """The batch that the experiment prepares, with the conditions of the data. Its own of the same name replaces
        one, and None removes it."""
        self.experiment.augmenter.labels = None
        prepared = self.experiment.prepare_batch_fn(batch, is_train=is_train)
        given = getattr(batch, 'cond', {})
        given = given | self.experiment.augmenter.condition(prepared.x0)
        if not given:
            return prepared
        cond = {name: value for name, value in (given | prepared.cond).items() if value is not None}
        return dataclasses.replace(prepared, cond=cond)

    def couple_shards(
        self, drawn: list[ProcessedBatch], own: Sequence[int], step: int | str, is_train: bool = True
    ) -> list[ProcessedBatch]:
        """Couple the shards of one global batch; returns this process's own, which are at the positions `own`."""
        sizes = [len(shard.t) for shard in drawn]
        together = utils.concat(drawn)
        utils.seed_everything(self.config.seed, 'couple', step)
        x1 = self.experiment.couple(together.x0, together.x1, together.label)
        if x1.shape != together.x1.shape:
            raise ValueError(f'couple must return x1 of shape {tuple(together.x1.shape)}, not {tuple(x1.shape)}')
        together = self.drop_conditions(dataclasses.replace(together, x1=x1), is_train)
        ends = np.cumsum([0, *sizes])
        return [utils.rows(together, slice(int(ends[i]), int(ends[i + 1]))) for i in own]

    def drop_conditions(self, batch: ProcessedBatch, is_train: bool) -> ProcessedBatch:
        """In training, replace label and conditions of each image by the null class and the null values, if they have
        one, with probability label_dropout (Ho and Salimans 2022, algorithm 1). With label_dropout 1, always."""
        probability, null_cond = self.config.label_dropout, self.experiment.null_cond
        if probability == 0 or (not is_train and probability < 1):
            return batch
        dropped = torch.rand(len(batch.t), device=batch.t.device) < probability
        label, nulls = batch.label, nulled(batch.cond, null_cond)
        if label is not None and label.ndim == 1 and not label.is_floating_point():
            label = torch.where(dropped, self.experiment.data.num_classes, label)
        cond = dict(batch.cond)
        for name in null_cond.keys() & cond.keys():
            cond[name] = torch.where(utils.bcast_right(dropped, cond[name].ndim), nulls[name], cond[name])
        return dataclasses.replace(batch, label=label, cond=cond)

    def uniforms(self, n: int) -> Tensor:
        """(n,) numbers in [0, 1] for the time sampler. If `stratified`, one in each of n x shards equal intervals: a
        shard takes every `shards`-th interval, in random order. If `antithetic`, pairs u, 1 - u."""
        device = self.experiment.device
        u = torch.rand(n, device=device)
        if self.config.antithetic:
            return torch.cat([u[: (n + 1) // 2], 1 - u[: n // 2]])
        if not self.config.stratified:
            return u
        shard, shards = self.shard_position
        return (shard + shards * torch.randperm(n, device=device) + u) / (shards * n)

    # ---------------------------------------------------------------- the example, held-out data

    @cached_property
    def example(self) -> ProcessedBatch:  # the shapes of x0 and of the conditions are read off it
        return self.draw_example('first')

    def tiny_batch(self) -> ProcessedBatch:
        """As many rows of `example` as one forward pass of training takes."""
        return utils.rows(self.example, slice(self.images_at_once))

    @cached_property
    def shape_example(self) -> ProcessedBatch:
        """A batch with the shapes of `example`; zeros in a run that is opened to read, whose data may be missing."""
        facts = self.train_loader.facts
        if not facts:
            return self.example
        zeros = lambda shape: torch.zeros(8, *shape, device=self.experiment.device)  # noqa: E731
        x, x0, t = map(zeros, (self.experiment.data.shape, facts['shape'], ()))
        cond = {name: zeros(shape) for name, shape in facts['cond'].items()}
        return ProcessedBatch(x, x0, x0, t, t.long(), cond=cond)

    def draw_example(self, draw: str) -> ProcessedBatch:
        """A prepared batch of the first images; another `draw` gives other noise, times and conditions."""
        n, self.shard_position = min(64, self.config.global_batch_size, self.train_loader.size), (0, 1)
        utils.seed_everything(self.config.seed, 'example', draw)
        return self.prepared(self.train_loader.take(range(n)))

    @in_eval_mode
    def prepared(self, batch: tuple[Tensor, ...]) -> ProcessedBatch:
        """Prepare a batch as outside of training: with null conditions only if label_dropout is 1. Raises SettingError
        if its parts do not fit together."""
        prepared = self.with_conditions(batch, is_train=False)
        check_shapes(prepared, f'{type(self.experiment).__name__}.prepare_batch_fn')
        return self.drop_conditions(prepared, is_train=False)

    def about(self, are_images: bool) -> dict[str, Any]:
        """The data and shapes that the network was built for, and facts about its samples, for checkpoints."""
        spec, example = self.train_loader.spec, self.example
        return dict(
            shape=tuple(example.x0.shape[1:]),
            num_classes=spec.num_classes,
            classes=list(spec.classes),
            about_data=self.train_loader.about,
            cond={name: tuple(value.shape[1:]) for name, value in example.cond.items()},
            facts=facts_of(self.train_loader, independent=bool(self.experiment.independent), are_images=are_images),
        )

    def held_out(self, rounds: int | None = None) -> Iterator[tuple[ProcessedBatch, Tensor]]:
        """(prepared batch, indices (B,) of its images in the held-out part), for all images or the first `rounds`. The
        processes share the work, with as many images at once as in training. Raises Stopped."""
        pieces, loaded, at_once = self.test_loader.batch_sampler, iter(self.test_loader), self.shards_per_micro_step
        assert isinstance(pieces, HeldOutSampler)
        couples = pieces.all_shards = self.experiment.couple is not None
        for number in range(min(rounds or pieces.rounds, pieces.rounds)):
            stopping.raise_if_stopped()
            numbers = pieces.numbers(number)
            read = [(next(loaded), piece) for piece in numbers]
            with ranks.as_one_process():  # hooks may draw samples, and some processes have fewer images than others
                drawn = [self.draw_shard(batch, piece, 'evaluate', is_train=False) for batch, piece in read]
            if couples:
                shards = self.train_sampler.my_shards
                own = [i for i, piece in enumerate(numbers) if piece % self.config.batch_shards in shards]
                drawn = self.couple_shards(drawn, own, f'evaluate {number}', is_train=False)
                numbers = [numbers[i] for i in own]
            for i in range(0, len(drawn), at_once):  # in the last round some processes have none
                together = list(zip(numbers[i : i + at_once], drawn[i : i + at_once], strict=True))
                index = [torch.arange(len(part.t)) + pieces.first_index(piece) for piece, part in together]
                yield utils.concat([part for _, part in together]), torch.cat(index).to(self.experiment.device)

    # ---------------------------------------------------------------- inputs of samplers

    @contextlib.contextmanager
    def as_in_data(self) -> Iterator[None]:
        """Within the block `sample_inputs` gives classes as often as the training data have them, and held-out data in
        their own order: for metrics, which compare samples with all data. Outside it, classes in turn: for pictures."""
        before, self.classes_as_in_data = self.classes_as_in_data, True
        try:
            yield
        finally:
            self.classes_as_in_data = before

    @utils.keeps_generators()
    def sample_inputs(self, n: int, indices: Sequence[int] | None = None, classes: Sequence[int] = ()) -> SampleInputs:
        """Inputs of n samples, the same every time; `indices`: which samples of the run these are, default the first n.

        x1 is noise, and labels are the trained classes in turn, or as within `as_in_data`. Other conditions come from
        held-out data. Where x1 is data (`independent` is False), it is held-out data too, and also in `given`.
        `classes`: the classes of the held-out items, in turn.
        """
        experiment, seed, data = self.experiment, self.config.seed, self.experiment.data
        indices, self.shard_position = range(n) if indices is None else indices, (0, 1)
        order = classes_in_proportion if self.classes_as_in_data else classes_in_turn
        utils.seed_everything(seed, 'sample_inputs')
        if experiment.independent and not self.shape_example.cond.keys() - {'augmentation'}:
            shape = self.shape_example.x0.shape[1:]
            x1 = experiment.process.sample_base(torch.zeros(n, *shape, device=experiment.device))
            label = torch.from_numpy(order(data, max(indices) + 1)[list(indices)]).to(experiment.device)
            label = torch.full_like(label, data.num_classes) if self.config.label_dropout == 1 else label
            return SampleInputs(x1, label, experiment.augmenter.condition(x1, is_augmented=False))
        turns = held_out_order(self.test_loader, max(indices) + 1, not self.classes_as_in_data, classes)
        batch = self.test_loader.take([turns[i] for i in indices])
        utils.seed_everything(seed, 'sample_inputs')
        batch = self.prepared(batch)
        if experiment.independent:
            return SampleInputs(batch.x1, batch.label, batch.cond)
        given = [experiment.decode(batch.x1)]
        return SampleInputs(batch.x1, batch.label, batch.cond, truth=batch.x0, given=given)


def check_shapes(batch: ProcessedBatch, made_by: str) -> None:
    """Raise SettingError unless each part of the batch has one row per x0, x1 the shape of x0, and t the shape (B,)."""
    rows, shape = len(batch.x0), tuple(batch.x0.shape)
    parts: dict[str, Any] = {f'cond[{name!r}]': value for name, value in batch.cond.items()}
    for name, value in {'t': batch.t, 'x1': batch.x1, 'label': batch.label, **parts}.items():
        wanted = {'t': (rows,), 'x1': shape}.get(name)
        if value is not None and (tuple(value.shape) != wanted if wanted else value.shape[:1] != (rows,)):
            raise SettingError(
                f'{made_by} gives {name} of shape {tuple(value.shape)}, and x0 of shape {shape}: {name} must be '
                f'{wanted or f"({rows}, ...), one value for each x0"}'
            )
