"""Pictures of a run: grids of samples, the data and augmented data, scatter plots, paths of samples."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import utils
from config import SettingError
from logging_utils import Record
from optimizers import get_lr
from runtime import ranks, stopping
from runtime.errors import RankFailed
from runtime.ranks import print_once
from training.batches import Batches
from training.calling import in_eval_mode
from training.drawing import Drawing, no_memory, out_of_memory_on_any_rank
from training.experiment import Experiment, SampleInputs

POINTS_SHOWN = 1000
IN_FILES = (1, 3, 4)  # channels that a PNG can hold


def kind(x: Tensor) -> str | None:
    """What decoded samples (n, ...) can be shown as: 'images' (n, C, H, W), 'points' (n, 2), or None."""
    if x.ndim == 4:
        return 'images'
    return 'points' if x.ndim == 2 and x.shape[1] == 2 else None


class Gallery:
    """Draws and writes the pictures of an experiment."""

    def __init__(self, experiment: Experiment, batches: Batches, record: Record, drawing: Drawing):
        self.experiment, self.config, self.data = experiment, experiment.config, experiment.data
        self.batches, self.record, self.drawing = batches, record, drawing
        self.step = 0  # of the last sampling

    @cached_property
    def kind(self) -> str | None:
        """The `kind` of the samples."""
        return kind(self.experiment.decode(self.batches.like.x0[:1]))

    @cached_property
    @in_eval_mode
    def are_images(self) -> bool:
        """Whether samples are images in [0, 1], which PNGs can hold: the data are images, or `decode` keeps everything
        within [0, 1]. A little more is clipped."""
        if facts := self.batches.train_loader.facts:
            return facts['are_images']
        far = 1 if self.data.scale == 'image' else 1000
        with torch.no_grad():
            x = self.experiment.decode(far * self.batches.example.x0[:8])
        return kind(x) == 'images' and x.shape[1] in IN_FILES and utils.is_nearly_unit(x)

    def about(self) -> dict[str, Any]:
        """What a checkpoint holds of the data and of samples: see Batches.about."""
        return self.batches.about(self.are_images)

    @property
    def num_shown(self) -> int:
        """How many samples a picture has: about 60 images, each of up to 100 classes; or enough points."""
        columns, classes = self.data.columns(), len(self.data.trained_classes)
        if self.kind == 'points':
            return POINTS_SHOWN
        if classes > 20:
            return -(-min(classes, 100) // columns) * columns
        parts = self.drawn_parts if self.kind == 'images' else 1
        return columns * max(1, max(3, 60 // columns) // parts)

    @cached_property
    def drawn_parts(self) -> int:
        """Pictures that show one sample, below each other: see plots.panels."""
        from reports import plots

        return len(plots.panels(self.experiment.decode(self.batches.like.x0[:1])))

    @in_eval_mode
    def rehearse(self, step: int) -> None:
        """Draw 2 samples in 2 steps with every sampler, so that a broken one fails now. At step 0, show the data."""
        inputs = self.drawing.inputs(2)
        weights, module = list(self.experiment.weights().items())[-1]  # the raw ones
        model_fn, c, samplers = self.experiment.get_model_fn(module), self.config, self.experiment.samplers()
        steps, rows = list[int](), list[int]()

        def counting(xt: Tensor, *given: Any, **cond: Tensor) -> Any:
            rows.append(len(xt))
            return model_fn(xt, *given, **cond)

        within = self.drawing.within(lambda i, *_: steps.append(i), num_steps=2, nfe=0)
        with self.record.apart(), within, torch.no_grad():
            for name, sampler in samplers.items():
                utils.seed_everything(self.config.seed, 'first_drawing')
                x = self.experiment.decode(sampler(counting, inputs))
                if x.is_floating_point() and not x.isfinite().all():
                    raise SettingError(
                        f'sampler {name!r} gives values that are not finite, with the {weights} weights that the run '
                        'starts from. Use another --solver or --time_grid.'
                    )
                self.picture_of(x, inputs)
        times = (c.sample_nfe or c.num_sample_steps) / 2 if steps else 1
        self.drawing.evaluations = sum(rows) / 2 / max(1, len(samplers)) * times
        ways = len(samplers) * len(self.experiment.weights())
        self.drawing.at_end['gallery'] = self.config.final_pictures * ways * self.num_shown
        if step == 0:
            if self.kind == 'images' and self.drawn_parts > 1:
                print_once('pictures show the channels of an image below each other, the first three of four in colour')
            with self.record.apart():
                ranks.on_main_alone(self.show_data)

    @in_eval_mode
    def draw(self, step: int) -> dict[str, float]:
        """Pictures of samples of all samplers and weights, and of some paths; returns what the experiment logs."""
        self.step = step
        with self.record.apart() as logged:
            self.sample_grids()
            self.sample_paths()
        return logged

    def sample_grids(self) -> None:
        inputs = self.drawing.inputs(self.num_shown)
        for sampler_name, sampler, weights, module in self.drawing.samplers_and_weights():
            try:
                x = self.drawing.samples(sampler, module, inputs)
            except RankFailed:
                print_once(no_memory(self.step, sampler_name, 'this picture is'))
                continue
            name = f'step_{self.step:07d}_{sampler_name}_{weights}'
            ranks.on_main_alone(partial(self.show_one, name, x, inputs))

    def show_one(self, name: str, x: Tensor, inputs: SampleInputs) -> None:
        self.experiment.show(name, x, inputs)
        self.experiment.after_sampling(name, x, inputs)

    def sample_paths(self) -> None:
        """A picture of the paths of some samples by the first sampler and the judged weights: a row for each image, a
        line for each point. Every process draws them all."""
        first = next(self.drawing.samplers_and_weights(), None)
        if self.kind is None or first is None:
            return
        sampler_name, sampler, _, module = first
        most = 6 if self.kind == 'images' else 200
        few = self.drawing.inputs(min(most, self.config.global_batch_size // self.config.batch_shards))
        utils.seed_everything(self.config.seed, 'show_paths')
        try:
            with out_of_memory_on_any_rank():
                frames = self.drawing.path(sampler, self.experiment.get_model_fn(module), few)
                stopping.raise_if_stopped()
        except RankFailed:
            print_once(no_memory(self.step, sampler_name, 'the picture of the path is'))
            return
        if frames and kind(frames[0]) == self.kind:
            from reports import plots

            start = self.experiment.decode(few.x1).cpu()
            frames = [start, *frames] if start.shape == frames[0].shape else frames
            if self.kind == 'images':
                picture = plots.in_rows(frames)
            else:
                picture = plots.paths(frames, self.data.known_classes(few.label, self.config.label_dropout))
            ranks.on_main(lambda: self.record.picture('path', picture, self.step, '.'))

    def show(self, name: str, x: Tensor, inputs: SampleInputs) -> None:
        """Write the picture of decoded samples (n, ...), if they can be shown."""
        picture = self.picture_of(x, inputs)
        if picture is not None:
            self.record.picture(name, picture, self.step)

    def picture_of(self, x: Tensor, inputs: SampleInputs) -> Tensor | None:
        """What samples x were made from, the truth if known, and x, as one picture (3, H, W) uint8, or None."""
        named = [('x1', part) for part in inputs.given or [self.experiment.decode(inputs.x1)]]
        named += [] if inputs.truth is None else [('x0', self.experiment.decode(inputs.truth))]
        shown = [(title, part) for title, part in [*named, ('samples', x)] if kind(part) == kind(x)]
        titles, parts = zip(*shown, strict=True)
        return self.joined(parts, titles, inputs.label)

    def joined(
        self, parts: Sequence[Tensor], titles: Sequence[str], label: Tensor | None, are_data: bool = False
    ) -> Tensor | None:
        """Batches of one kind from left to right as one picture (3, H, W) uint8: images as grids, points as scatter
        plots; else None. Samples have the names of their classes, or the exact density of a data set that has one.

        A batch of images that leaves [0, 1] is scaled: its smallest value is black and its largest white.
        """
        from reports import plots

        if kind(parts[-1]) == 'images':
            columns = 8 if are_data else self.data.columns()
            names = [] if are_data else plots.titles_of(self.data, label, self.config.label_dropout)
            named = [(plots.within_unit(x), names if len(x) == len(names) else ()) for x in parts]
            return plots.next_to_each_other([plots.image_grid(x, columns, names=n) for x, n in named])
        if kind(parts[-1]) == 'points':
            from data_loading.toy2d import TOY2D

            toy = None if are_data else TOY2D.get(self.config.dataset)
            classes = self.data.known_classes(label, self.config.label_dropout)
            return plots.scatter(parts, titles, classes, toy.density if toy else None)
        return None

    def show_data(self) -> None:
        """A picture of the first images, as loaded on the left and as trained on on the right; a plot of the learning
        rate. On rank 0."""
        n, sampler = min(64, self.config.global_batch_size), self.batches.train_sampler
        first = self.batches.train_loader.take(sampler.permutation(0)[:n].tolist())
        utils.seed_everything(self.config.seed, 'show_data')
        batch = self.experiment.prepare_batch_fn(first, is_train=True)
        x0 = self.experiment.decode(batch.x0)
        parts = [part for part in (batch.x_original, x0) if kind(part) == kind(x0)]
        picture = self.joined(parts, ['data', 'as trained on'], first[1], are_data=True)
        if picture is not None:
            self.record.picture('data_and_augmented', picture, 0)
        total = self.config.num_training_steps
        curve = [(step, get_lr(self.config, step)) for step in range(0, total, max(1, total // 200))]
        self.record.curve('lr_schedule', curve, 'step', 'lr')

    def update_page(self, step: int = 0, line: dict[str, float] | None = None) -> None:
        """Write report.html of the run as it is now; before that what the record's `line` of this step has so far."""
        from reports import page

        self.record.write(step, line or {})
        ranks.on_main(lambda: page.update(self.config.run_dir))
