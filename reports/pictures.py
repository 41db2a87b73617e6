"""Pictures of a run: samples below real data, the data as read and as trained on, paths of samples."""

import itertools
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import utils
from config import SettingError
from data_loading.choice import held_out_order
from logging_utils import Record
from runtime import ranks, stopping
from runtime.errors import RankFailed
from runtime.ranks import print_once
from training.batches import Batches
from training.calling import in_eval_mode
from training.drawing import Drawing, State, no_memory, out_of_memory_on_any_rank
from training.experiment import Experiment, SampleInputs

POINTS_SHOWN = 1000
PATHS_OF_POINTS = 200


class Gallery:
    """Draws and writes the pictures of an experiment."""

    def __init__(self, experiment: Experiment, batches: Batches, record: Record, drawing: Drawing):
        self.experiment, self.config, self.data = experiment, experiment.config, experiment.data
        self.batches, self.record, self.drawing = batches, record, drawing
        self.step = 0  # step of the newest samples
        self.titles: dict[str, str] = {}  # name of the newest picture -> its title

    @cached_property
    def kind(self) -> str | None:
        """The kind of the samples, a key of KINDS or None."""
        return self.kind_of(self.experiment.decode(self.batches.shape_example.x0[:1]))

    def kind_of(self, x: Tensor) -> str | None:  # x: decoded samples
        from reports.kinds import kind

        return kind(x, kind(x) != 'images' or self.are_images)

    @cached_property
    @in_eval_mode
    def are_images(self) -> bool:
        """Whether samples are images in [0, 1] that a PNG can hold: the data are images, or `decode` keeps everything
        within [0, 1]. Values slightly outside are clipped."""
        from reports.kinds import IN_FILES, kind

        if facts := self.batches.train_loader.facts:
            return facts['are_images']
        # x0 this far from all data stays within [0, 1] only if `decode` clips
        far = 1 if self.data.scale == 'image' else 1000
        with torch.no_grad():
            x = self.experiment.decode(far * self.batches.example.x0[:8])
        return kind(x) == 'images' and x.shape[1] in IN_FILES and utils.is_nearly_unit(x)

    def about(self) -> dict[str, Any]:
        """Facts about the data and the samples for a checkpoint: see Batches.about."""
        return self.batches.about(self.are_images)

    @property
    def num_shown(self) -> int:
        """Number of samples in a picture: about 60, fewer volumes or channels; up to 100 classes; 1000 points."""
        columns, classes = self.data.columns(), len(self.data.trained_classes)
        if self.kind == 'points':
            return POINTS_SHOWN
        below = {'fields': 1, 'volumes': 2}.get(str(self.kind), 0)  # heat maps below each other, for each channel
        below = below * self.experiment.decode(self.batches.shape_example.x0[:1]).shape[1] if below else 1
        return min(classes, 100) if classes > 20 else columns * max(1, max(3, 60 // columns) // below)

    @in_eval_mode
    def rehearse(self, step: int) -> None:
        """Draw 2 samples in 2 steps with every sampler, so that a broken one fails now. At step 0, show the data."""
        inputs = self.drawing.inputs(2)
        weights, module = list(self.experiment.weights().items())[-1]  # raw: the last of them
        model_fn, c, samplers = self.experiment.get_model_fn(module), self.config, self.experiment.samplers()
        steps, rows = list[int](), list[int]()

        def counting(xt: Tensor, *given: Any, **cond: Tensor) -> Any:
            rows.append(len(xt))
            return model_fn(xt, *given, **cond)

        within = self.drawing.with_settings(lambda i, *_: steps.append(i), num_steps=2, nfe=0)
        with self.record.logging_apart(), within, torch.no_grad():
            for name, sampler in samplers.items():
                utils.seed_everything(self.config.seed, 'first_drawing')
                x = self.experiment.decode(sampler(counting, inputs))
                if x.is_floating_point() and not x.isfinite().all():
                    raise SettingError(
                        f'sampler {name!r} gives values that are not finite, with the {weights} weights that the run '
                        'starts from. Use another --solver or --time_grid.'
                    )
                # a bool, so that no pixels are sent to the other ranks
                ranks.on_main_as_one_process(lambda x=x: self.picture_of(x, inputs) is None)
        if c.guidance_scale != 1 and not steps:
            text = 'no sampler takes steps of a solver, so it has no effect, unless code of the experiment reads it'
            print_once(f'warning: guidance_scale={c.guidance_scale:g}: {text}. Leave out --guidance_scale.')
        times = (c.sample_nfe or c.num_sample_steps) / 2 if steps else 1
        self.drawing.evaluations = sum(rows) / 2 / max(1, len(samplers)) * times
        pictures = len(samplers) * len(self.drawing.weights_shown())
        self.drawing.samples_at_end['gallery'] = self.config.final_pictures * pictures * self.num_shown
        if step == 0:
            with self.record.logging_apart():
                ranks.on_main_as_one_process(self.show_data)

    @in_eval_mode
    def draw(self, step: int) -> dict[str, float]:
        """Draw pictures of samples with all samplers and weights, and of paths; return what the experiment logs."""
        self.step = step
        with self.record.logging_apart() as logged:
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
            self.titles = {name: self.title(sampler_name, weights)}
            ranks.on_main_as_one_process(partial(self.show_one, name, x, inputs))

    def title(self, sampler: str, weights: str) -> str:
        """Title of a picture: how its samples were drawn."""
        nfe = f'{self.drawing.nfe:.3g} evaluations, ' if self.drawing.nfe else ''
        return f'{sampler}, {nfe}{weights.replace("_", " ")}, guidance {self.drawing.guidance:g}, step {self.step}'

    def show_one(self, name: str, x: Tensor, inputs: SampleInputs) -> None:
        self.experiment.show(name, x, inputs)
        self.experiment.after_sampling(name, x, inputs)

    def sample_paths(self) -> None:
        """Draw the paths of some samples, with the first sampler and the judged weights. Every process draws all of
        them."""
        first = next(self.drawing.samplers_and_weights(), None)
        if self.kind is None or first is None:
            return
        sampler_name, sampler, weights, module = first
        most = PATHS_OF_POINTS if self.kind == 'points' else 6
        few = self.drawing.inputs(min(most, self.config.global_batch_size // self.config.batch_shards))
        utils.seed_everything(self.config.seed, 'show_paths')
        try:
            with out_of_memory_on_any_rank():
                states = self.drawing.path(sampler, self.experiment.get_model_fn(module), few)
                stopping.raise_if_stopped()
        except RankFailed:
            print_once(no_memory(self.step, sampler_name, 'the picture of the path is'))
            return
        if states and self.kind_of(states[0].x) is not None:
            what = 'paths from the black dots' if self.kind == 'points' else 'states, with the predicted x0 below each'
            title = f'{self.title(sampler_name, weights)}: {what}'
            ranks.on_main(lambda: self.record.picture('path', self.path_of(states, few.label, title), self.step, '.'))

    def path_of(self, states: Sequence[State], label: Tensor | None, title: str = '', at_most: int = 10) -> Tensor:
        """The picture of a path: states of samples (n, ...) from left to right, in about equal changes, with the x0
        that the network predicted below each. Paths of points are lines through all states."""
        name = self.kind_of(states[0].x)
        if name != 'points':
            moves = [(a.x - b.x).double().square().mean().sqrt() for a, b in itertools.pairwise(states)]
            moved = torch.tensor([0.0, *moves], dtype=torch.float64).nan_to_num(1).cumsum(0)
            wanted = torch.linspace(0, moved[-1].item(), at_most, dtype=torch.float64)
            states = [states[i] for i in (moved[:, None] - wanted).abs().argmin(0).unique()]
        x = torch.stack([part for state in states for part in (state.x, state.x0)], 1)  # (n, 2 states, ...)
        x = x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 2)
        names = self.names(label) or ['xt'] * len(states[0].x)
        left = [word for name in names for word in (name, 'x0')]
        times = [f't={state.t:.3g}' for state in states]
        return self.draw_items(x, left, title=title, times=times)

    def draw_items(self, x: Tensor, names: Sequence[str], **settings: Any) -> Tensor:
        """The picture of items of a known kind; `settings` of a `Panel`."""
        from reports.kinds import KINDS
        from reports.plots import Panel

        return KINDS[str(self.kind_of(x))][1](Panel(x, names, **settings))

    def names(self, label: Tensor | None) -> list[str]:
        from reports.plots import titles_of

        return titles_of(self.data, label, self.config.label_dropout)

    def show(self, name: str, x: Tensor, inputs: SampleInputs) -> None:
        """Write the picture of decoded samples (n, ...), if their kind is known."""
        picture = self.picture_of(x, inputs, self.titles.get(name, name))
        if picture is not None:
            self.record.picture(name, picture, self.step)

    @torch.no_grad()
    def picture_of(self, x: Tensor, inputs: SampleInputs, title: str = '') -> Tensor | None:
        """A picture (3, H, W) uint8 of samples x below real data, each class in its own column; None without a kind.
        Samples made from data are shown to the right of their inputs and, if known, the truth, each with a title."""
        from data_loading.toy2d import TOY2D
        from reports.plots import join_pictures, titled

        if self.kind_of(x) is None:
            return None
        names, toy = self.names(inputs.label), TOY2D.get(self.config.dataset)
        names, density = names if len(names) == len(x) else [], toy.density if toy and self.kind == 'points' else None
        x, across = x.cpu(), min(10, self.data.columns())
        if not inputs.given and inputs.truth is None:
            real, classes = self.real_data if density is None else (x[:0], [])
            if real.shape[1:] != x.shape[1:] or bool(names) != bool(classes):
                real, classes = x[:0], []
            items, names = torch.cat([real, x]), [*classes, *names]
            return self.draw_items(items, names, real=len(real), title=title, across=across, density=density)
        truth = [] if inputs.truth is None else [self.experiment.decode(inputs.truth)]
        parts = [('given', part) for part in inputs.given] + [('truth', part) for part in truth] + [('samples', x)]
        panels = [
            self.draw_items(part.cpu(), names if len(names) == len(part) else (), title=word, across=min(5, across))
            for word, part in parts
            if self.kind_of(part) is not None
        ]
        return titled(join_pictures(panels), title)

    def training_data(self, n: int) -> tuple[Tensor, ...]:
        """A batch of n training items as read, the classes in turn if they are known."""
        loader, n = self.batches.train_loader, min(n, self.batches.train_loader.size)
        order = self.batches.train_sampler.permutation(0)[:n].tolist()
        return loader.take(order if loader.labels is None else held_out_order(loader, n, in_turn=True))

    @cached_property
    def real_data(self) -> tuple[Tensor, list[str]]:
        """Some training data, encoded and decoded like samples, and the names of their classes."""
        n = POINTS_SHOWN if self.kind == 'points' else max(20, min(100, len(self.data.trained_classes)))
        batch = self.training_data(n)
        utils.seed_everything(self.config.seed, 'show_data')
        with self.record.logging_apart():
            x0 = self.batches.prepared(batch).x0
            x = torch.cat([self.experiment.decode(part).cpu() for part in x0.split(self.batches.images_at_once)])
        return x, self.names(batch[1])

    @torch.no_grad()
    def show_data(self) -> None:
        """Draw some training items, as read and as trained on. On rank 0."""
        from reports.plots import join_pictures

        most = POINTS_SHOWN if self.kind == 'points' else min(50, self.num_shown)
        n, classes = min(most, self.config.global_batch_size), len(self.data.trained_classes)
        first = self.training_data(n - n % classes if 0 < classes <= n else n)
        utils.seed_everything(self.config.seed, 'show_data')
        batch = self.experiment.prepare_batch_fn(first, is_train=True)
        names = self.names(first[1])
        parts = {'as read': batch.x_original, 'as trained': self.experiment.decode(batch.x0)}
        kinds = {title: self.kind_of(x) for title, x in parts.items()}
        shown = {title: x[: n if kinds[title] == 'points' else 50].cpu() for title, x in parts.items() if kinds[title]}
        if shown:
            panels = [self.draw_items(x, names[: len(x)], title=title, across=5) for title, x in shown.items()]
            self.record.picture('data_and_augmented', join_pictures(panels), 0)

    def update_page(self, step: int = 0, line: dict[str, float] | None = None) -> None:
        """Write report.html of the run as it is now, after writing the values so far of this step's `line`."""
        from reports import page

        self.record.write(step, line or {})
        ranks.on_main(lambda: page.update(self.config.run_dir))
