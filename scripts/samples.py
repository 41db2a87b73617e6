"""Samples of a run that is opened to read, for generate.py and evaluate.py; outputs.py has the files that hold them.

Sample i starts from noise of its own, a function of (seed, i): it is the same in any batch and on any process.
"""

import contextlib
import csv
import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

import utils
from config import SettingError
from data_loading.spec import DataSpec
from evaluation.detectors import Detector
from evaluation.distances import Looked
from main import load_run
from reports import page
from reports.plots import image_grid, titles_of
from runtime import alive, files, ranks, stopping
from scripts.outputs import Output, write_gif
from training import calling
from training.drawing import State, not_finite
from training.experiment import SampleInputs


class Samples:
    """The samples 0 to num - 1 of a run, with settings of sampling in place of the run's own."""

    def __init__(
        self, run: str, weights: str, num: int, seed: int, labels: str = '', to_judge: bool = False, **settings: Any
    ):
        """`labels`: classes in turn, such as '3,5'; empty: all of them, in turn or, if the samples are `to_judge`, as
        often as in the data. Settings that are None are the run's own. Raises SettingError."""
        given = {name: value for name, value in settings.items() if value is not None}
        self.run = load_run(run, weights, **calling.settings_for(num), **given)
        for module in self.run.modules.values():  # also those that encode and decode call themselves
            module.eval()
        self.num, self.seed, self.bad = num, seed, 0  # bad: how many were not finite
        if to_judge:
            self.open_data()
        self.as_in_data = self.run.batches.as_in_data if to_judge else contextlib.nullcontext
        self.labels = labels_of(labels, self.run.data, self.run.config.label_dropout)
        self.model_fn = self.run.get_model_fn(self.run.network)
        self.inputs([0])  # before any work, on all processes: loads the data if inputs are data

    def open_data(self) -> None:
        """Load the data that the samples are judged by. Raises SettingError."""
        try:
            self.run.train_loader.open()
            self.run.test_loader.open()
        except SettingError:
            path = self.run.config.data_path
            if not path or self.run.config.dataset == 'hub' or Path(path).expanduser().exists():
                raise
            text = 'evaluate.py compares samples with the data, and they are gone from there'
            raise SettingError(f'data_path={path!r}: {text}. Pass their new place as --data_path.') from None

    @cached_property
    def own_inputs(self) -> SampleInputs:
        """Inputs of all samples, of an experiment with a sample_inputs of its own."""
        with self.as_in_data():
            return self.run.drawing.inputs(self.num)

    def inputs(self, indices: Sequence[int]) -> SampleInputs:
        """What the samples of these indices start from."""
        run = self.run
        if run.overrides('sample_inputs'):
            inputs = utils.rows(self.own_inputs, torch.tensor(indices, device=self.own_inputs.x1.device))
        else:
            with utils.NoiseOfEach(self.seed, 'sample_inputs', indices), self.as_in_data():
                inputs = run.batches.sample_inputs(len(indices), indices)
        if not self.labels:
            return inputs
        label = torch.tensor([self.labels[i % len(self.labels)] for i in indices], device=run.device)
        return dataclasses.replace(inputs, label=label)

    def label(self, at_once: int) -> Tensor | None:
        """(num,) the classes of all samples, None if the network has learned none."""
        if not self.labels and self.run.overrides('sample_inputs'):
            label = self.own_inputs.label
        else:
            parts = [self.inputs(range(i, min(i + at_once, self.num))).label for i in range(0, self.num, at_once)]
            label = None if parts[0] is None else torch.cat([part for part in parts if part is not None])
        return self.run.data.known_classes(label, self.run.config.label_dropout)

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, SampleInputs]:
        """The decoded samples (n, ...) of these indices and what they started from, by this process only."""
        inputs = self.inputs(indices)
        with torch.no_grad(), ranks.alone(), utils.NoiseOfEach(self.seed, 'draw', indices):
            return self.run.decode(self.run.draw(self.model_fn, inputs, self.run.config.solver)), inputs

    def batches(self, indices: Sequence[int], at_once: int) -> Iterator[tuple[list[int], Tensor, SampleInputs]]:
        """(indices, decoded samples, what they started from) of this process's share, in batches. Several processes may
        draw the last sample. Raises Stopped."""
        mine = [indices[i] for i in ranks.my_items(len(indices))]
        batches, bad = [mine[i : i + at_once] for i in range(0, len(mine), at_once)], 0
        for batch in alive.each(batches, 'drawing samples', len(batches), 'batch'):
            stopping.raise_if_stopped()
            x, inputs = self.draw(batch)
            bad += not_finite(x)
            yield batch, x, inputs
        stopping.raise_if_stopped()
        self.bad = int(ranks.all_reduce(torch.tensor(bad)))
        if self.bad:
            ranks.print_once(
                f'warning: {self.bad} samples have values that are not finite: try another --solver or --nfe'
            )

    def show_path(self, out: Output) -> None:
        """path.png: the states of the first samples and the x0 predicted there; path.gif: the first grid, step by step.

        Raises SettingError where `draw` is overridden so that it has no steps.
        """
        run, columns = self.run, min(10, self.run.data.columns())
        indices = range(min(self.num, 3 * columns))
        inputs = self.inputs(indices)
        with utils.NoiseOfEach(self.seed, 'draw', indices):
            states = run.drawing.path(lambda fn, given: run.draw(fn, given, run.config.solver), self.model_fn, inputs)
        if not states:
            raise SettingError(f'trajectory=True: {type(run).__name__}.draw does not use the solvers of the repo.')
        few, label = [State(t, x[:8], x0[:8]) for t, x, x0 in states], inputs.label
        path = run.gallery.path_of(few, None if label is None else label[:8])
        with files.whole(out.picture('path.png')) as temporary:
            torchvision.io.write_png(path, str(temporary))
        names = titles_of(run.data, label, run.config.label_dropout)
        frames = [image_grid(state.x, columns, names, f't = {state.t:.3f}') for state in states]
        write_gif(out.picture('path.gif'), frames, 100)

    def pictures_of_training(self) -> list[Path]:
        """The run's own pictures of samples, which start from the same noise. Raises SettingError if there are none."""
        folder = self.run.config.run_dir
        if found := page.read(folder).same_noise():
            return found
        why = f'{folder}/samples has no pictures step_*.png. A run draws them with --sample_every above 0'
        raise SettingError(f'training_gif=True: {why}; leave --training_gif out.')

    def numbers(self, detector: Detector, at_once: int) -> dict[str, float]:
        """Distances from the data, with as many training images, drawn at random, as a floor (`real_...`); and an
        experiment's own `sample_metrics`; of samples that are not finite only the speed. Raises Stopped."""
        run, looked, kept, began = self.run, Looked(detector), [], time.monotonic()
        own = run.overrides('sample_metrics')
        for _, x, inputs in self.batches(range(self.num), at_once):
            if not not_finite(x):  # else there will be no numbers
                looked.add(x, run.data.known_classes(inputs.label, run.config.label_dropout))
            kept += [x.cpu()] if own else []
        rate = self.num / (time.monotonic() - began)
        if self.bad:
            return dict(images_per_second=rate)
        values = run.judge.compared(looked, self.num)
        width = looked.features[0].shape[1]
        if self.num <= width:
            few = f'{self.num} samples for {width} features give a frechet far from that of many samples'
            ranks.print_once(f'warning: {few}: compare it with real_frechet, or draw more')
        if own:  # a number of the chosen detector goes before one of the same name
            x = ranks.gather_items(torch.cat(kept), self.num).to(run.device)
            values = run.judge.numbers(x, self.inputs(range(self.num))) | values
        return values | dict(images_per_second=rate)

    def losses(self, bits: int) -> dict[str, float]:
        """The held-out loss of the run and the reference loss, by time; bits per dimension of this many images."""
        judge, network = self.run.judge, self.run.network
        values = {'eval/loss': judge.held_out_loss(network)}
        if judge.has_reference:
            values |= judge.reference_loss(network)
        return values | (judge.bits_per_dim(network, bits) if bits else {})


def labels_of(labels: str, data: DataSpec, label_dropout: float) -> list[int]:
    """The classes that were requested by name or number, empty for all. A name that is a number is a name; one with a
    comma is in double quotes. Raises SettingError."""
    known = {name: i for i, name in enumerate(data.classes)}
    if not all(name.isdecimal() for name in data.classes) or not data.classes:  # else a number would mean two things
        known = {str(i): i for i in range(data.num_classes)} | known
    parts = [part.strip() for row in csv.reader(labels.splitlines(), skipinitialspace=True) for part in row]
    words = [word for part in parts for word in ([part] if part in known else part.split())]
    unknown = [word for word in words if word not in known]
    untrained = [word for word in words if known.get(word) not in data.trained_classes]
    wrong = ''
    if unknown and not data.num_classes:
        wrong = 'the run has no classes. Leave --labels out'
    elif unknown and not data.classes:
        wrong = f'the run has classes 0 to {data.num_classes - 1}. Pass such numbers, as --labels 3,5'
    elif unknown:
        quoted = [f', and a name with a comma in quotes: --labels \'"{name}"\'' for name in data.classes if ',' in name]
        names = ', '.join([f'{i} {name!r}' for i, name in enumerate(data.classes)][:100])
        wrong = f'{unknown[0]!r} is not a class. Pass names or numbers, with commas between them{"".join(quoted[:1])}. '
        wrong += f'The classes are {names}{", ..." if data.num_classes > 100 else ""}'
    elif words and label_dropout == 1:
        wrong = 'the run has learned no classes (label_dropout=1). Leave it out'
    elif untrained:
        wrong = f'class {untrained[0]} has no training items, so the run has not learned it. '
        wrong += f'Pass others, as --labels {data.trained_classes[0]}'
    if wrong:
        raise SettingError(f'labels={labels!r}: {wrong}.')
    return [known[word] for word in words]
