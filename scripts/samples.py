"""Open a run read-only and draw its samples, for generate.py and evaluate.py. outputs.py writes them to files.

The noise of sample i is a function of (seed, i), so a sample is the same in any batch and on any process.
"""

import contextlib
import csv
import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torchvision
from torch import Tensor

import utils
from config import SettingError
from data_loading.spec import DataSpec
from evaluation.detectors import Detector
from evaluation.distances import SampleFeatures
from main import load_run
from reports import page
from reports.pictures import PATHS_OF_POINTS
from reports.plots import titles_of
from runtime import alive, files, ranks, stopping
from scripts.outputs import SampleFiles, write_gif
from training import calling
from training.drawing import State, not_finite
from training.experiment import SampleInputs


class Samples:
    """Samples 0 to num - 1 of a run. Sampling settings replace the run's own."""

    def __init__(
        self, run: str, weights: str, num: int, seed: int, labels: str = '', to_judge: bool = False, **settings: Any
    ):
        """`labels`: classes in turn, such as '3,5'; empty: all classes, in turn or, with `to_judge`, as often as in
        the data. `to_judge`: the samples will be compared with the data. Settings that are None are the run's own.
        Raises SettingError."""
        changed = {name: value for name, value in settings.items() if value is not None}
        self.run = load_run(run, weights, **calling.settings_for(num), **changed)
        for module in self.run.modules.values():  # not only the network: encode and decode may call others directly
            module.eval()
        self.num, self.seed, self.num_not_finite = num, seed, 0
        if to_judge:
            self.run.train_loader.open()
            self.run.test_loader.open()
        self.as_in_data = self.run.batches.as_in_data if to_judge else contextlib.nullcontext
        self.labels = parse_labels(labels, self.run.data, self.run.config.label_dropout)
        self.model_fn = self.run.get_model_fn(self.run.network)
        self.inputs([0])  # if inputs are data, load them now: all processes are here, and no work is lost if they fail

    @cached_property
    def own_inputs(self) -> SampleInputs:
        """Inputs of all samples, for an experiment that overrides sample_inputs."""
        with self.as_in_data():
            return self.run.drawing.inputs(self.num)

    def inputs(self, indices: Sequence[int]) -> SampleInputs:
        """The inputs from which the samples with these indices start: noise (or data), labels and conditions."""
        run = self.run
        if run.overrides('sample_inputs'):
            inputs = utils.rows(self.own_inputs, torch.tensor(indices, device=self.own_inputs.x1.device))
        else:
            with utils.NoiseOfEach(self.seed, 'sample_inputs', indices), self.as_in_data():
                inputs = run.batches.sample_inputs(len(indices), indices, self.labels)
        if not self.labels:
            return inputs
        label = torch.tensor([self.labels[i % len(self.labels)] for i in indices], device=run.device)
        return dataclasses.replace(inputs, label=label)

    def label(self, at_once: int) -> Tensor | None:
        """(num,) the classes of all samples, or None if the network has learned no classes."""
        if not self.labels and self.run.overrides('sample_inputs'):
            label = self.own_inputs.label
        else:
            parts = [self.inputs(range(i, min(i + at_once, self.num))).label for i in range(0, self.num, at_once)]
            label = None if parts[0] is None else torch.cat([part for part in parts if part is not None])
        return self.run.data.known_classes(label, self.run.config.label_dropout)

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, SampleInputs]:
        """Draw the samples with these indices on this process: decoded samples (n, ...) and their inputs."""
        inputs = self.inputs(indices)
        with torch.no_grad(), ranks.as_one_process(), utils.NoiseOfEach(self.seed, 'draw', indices):
            return self.run.decode(self.run.draw(self.model_fn, inputs, self.run.config.solver)), inputs

    def batches(self, indices: Sequence[int], at_once: int) -> Iterator[tuple[list[int], Tensor, SampleInputs]]:
        """Draw this process's share in batches: yields (indices, decoded samples, inputs). Several processes may draw
        the last sample. Raises Stopped."""
        share = [indices[i] for i in ranks.my_items(len(indices))]
        batches, bad = [share[i : i + at_once] for i in range(0, len(share), at_once)], 0
        for batch in alive.with_progress(batches, 'drawing samples', len(batches), 'batch'):
            stopping.raise_if_stopped()
            x, inputs = self.draw(batch)
            bad += not_finite(x)
            yield batch, x, inputs
        stopping.raise_if_stopped()
        self.num_not_finite = int(ranks.all_reduce(torch.tensor(bad)))
        if self.num_not_finite:
            ranks.print_once(
                f'warning: {self.num_not_finite} samples have values that are not finite: try another --solver or --nfe'
            )

    def show_path(self, out: SampleFiles) -> None:
        """Write path.png, with the states of the first samples and the x0 predicted at each, and path.gif, the grid of
        samples step by step. Raises SettingError if an overridden `draw` takes no solver steps."""
        run, columns = self.run, min(10, self.run.data.columns())
        most = PATHS_OF_POINTS if run.gallery.kind == 'points' else 8
        indices = range(min(self.num, max(most, 3 * columns)))
        inputs = self.inputs(indices)
        with utils.NoiseOfEach(self.seed, 'draw', indices):
            states = run.drawing.path(lambda fn, given: run.draw(fn, given, run.config.solver), self.model_fn, inputs)
        if not states:
            raise SettingError(f'trajectory=True: {type(run).__name__}.draw does not use the solvers of the repo.')
        first, label = [State(t, x[:most], x0[:most]) for t, x, x0 in states], inputs.label
        path = run.gallery.path_of(first, None if label is None else label[:most])
        with files.atomic_write(out.picture('path.png')) as temporary:
            torchvision.io.write_png(path, str(temporary))
        names = titles_of(run.data, label, run.config.label_dropout)
        same = dict(across=columns, scale=torch.cat([state.x for state in states]))
        frames = [run.gallery.draw_items(x, names, title=f't = {t:.3f}', **same) for t, x, _ in states]
        write_gif(out.picture('path.gif'), frames, 100)

    def pictures_of_training(self) -> list[Tensor]:
        """The run's own pictures (3, H, W) of samples, all from the same noise. Raises SettingError if it has none."""
        folder = self.run.config.run_dir
        if paths := page.read(folder).same_noise():
            return [torchvision.io.read_image(str(path), torchvision.io.ImageReadMode.RGB) for path in paths]
        why = f'{folder}/samples has no pictures step_*.png. A run draws them with --sample_every above 0'
        raise SettingError(f'training_gif=True: {why}; leave --training_gif out.')

    def numbers(self, detector: Detector, at_once: int) -> dict[str, float]:
        """Distances of the samples from the data, unless these are of another kind, the same for as many random
        training items as a floor (`real_...`), and the experiment's own `sample_metrics`. If a sample is not finite,
        only the speed. Raises Stopped."""
        run, kept, began = self.run, [], time.monotonic()
        sampled = SampleFeatures(detector, run.judge.data)
        own = run.overrides('sample_metrics')
        for _, x, inputs in self.batches(range(self.num), at_once):
            if not not_finite(x):  # otherwise no distances are computed, see below
                sampled.add(x, run.data.known_classes(inputs.label, run.config.label_dropout))
            kept += [x.cpu()] if own else []
        rate = self.num / (time.monotonic() - began)
        if self.num_not_finite:
            return dict(images_per_second=rate)
        values = run.judge.compare_with_data(sampled, self.num)
        width = 0 if sampled.mismatch else sampled.features[0].shape[1]
        if self.num <= width:
            few = f'{self.num} samples are too few for {width} features: frechet is far from its value for many samples'
            ranks.print_once(f'warning: {few}. Compare it with real_frechet, or draw more')
        if own:  # the chosen detector's metrics replace the experiment's of the same name
            x = ranks.gather_items(torch.cat(kept), self.num).to(run.device)
            values = run.judge.numbers(x, self.inputs(range(self.num))) | values
        return values | dict(images_per_second=rate)

    def losses(self, bits: int) -> dict[str, float]:
        """The held-out loss and the reference loss, also by time, and bits per dimension of `bits` images."""
        judge, network = self.run.judge, self.run.network
        values = {'eval/loss': judge.held_out_loss(network)}
        if judge.has_reference:
            values |= judge.reference_loss(network)
        return values | (judge.bits_per_dim(network, bits) if bits else {})


def parse_labels(labels: str, data: DataSpec, label_dropout: float) -> list[int]:
    """The classes that are requested by name or number; empty for all. A number that is also a name means the name; a
    name with a comma must be in double quotes. Raises SettingError."""
    known = {name: i for i, name in enumerate(data.classes)}
    if not all(name.isdecimal() for name in data.classes) or not data.classes:  # else a number would be ambiguous
        known = {str(i): i for i in range(data.num_classes)} | known
    parts = [part.strip() for row in csv.reader(labels.splitlines(), skipinitialspace=True) for part in row]
    words = [word for part in parts for word in ([part] if part in known else part.split())]
    unknown = [word for word in words if word not in known]
    untrained = [word for word in words if known.get(word) not in data.trained_classes]
    wrong = ''
    if unknown and not data.num_classes:
        wrong = 'the run has no classes. Leave out --labels'
    elif unknown and not data.classes:
        wrong = f'the run has classes 0 to {data.num_classes - 1}. Pass their numbers, such as --labels 3,5'
    elif unknown:
        quoted = [f', and a name with a comma in quotes: --labels \'"{name}"\'' for name in data.classes if ',' in name]
        names = ', '.join([f'{i} {name!r}' for i, name in enumerate(data.classes)][:100])
        wrong = f'{unknown[0]!r} is not a class. Pass names or numbers, separated by commas{"".join(quoted[:1])}. '
        wrong += f'The classes are {names}{", ..." if data.num_classes > 100 else ""}'
    elif words and label_dropout == 1:
        wrong = 'the run has learned no classes (label_dropout=1). Leave out --labels'
    elif untrained:
        wrong = f'class {untrained[0]} has no training items, so the run has not learned it. '
        wrong += f'Pass others, such as --labels {data.trained_classes[0]}'
    if wrong:
        raise SettingError(f'labels={labels!r}: {wrong}.')
    return [known[word] for word in words]
