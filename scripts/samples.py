"""Samples of a run that is opened to read, for generate.py and evaluate.py, and the files that hold them.

Sample i starts from noise of its own, a function of (seed, i): it is the same in any batch and on any process. Each
file is whole or not there, so that a program that was stopped can resume.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import utils
from config import SettingError
from data_loading.spec import DataSpec
from evaluation.detectors import Detector
from evaluation.distances import Looked
from main import load_run
from reports.plots import image_grid, in_rows
from runtime import files, ranks, stopping
from runtime.errors import Stopped
from training import calling
from training.drawing import not_finite
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
        self.num, self.seed = num, seed
        self.as_in_data = self.run.batches.as_in_data if to_judge else contextlib.nullcontext
        self.labels = labels_of(labels, self.run.data, self.run.config.label_dropout)
        self.model_fn = self.run.get_model_fn(self.run.network)

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
        for batch in tqdm(batches, unit='batch', disable=None if ranks.is_main() else True, leave=False):
            stopping.raise_if_stopped()
            x, inputs = self.draw(batch)
            bad += not_finite(x)
            yield batch, x, inputs
        stopping.raise_if_stopped()
        if bad := int(ranks.all_reduce(torch.tensor(bad))):
            ranks.print_once(f'warning: {bad} samples have values that are not finite: try another --solver or --nfe')

    def write(self, out: 'Output', indices: list[int], at_once: int) -> None:
        """Draw and write the samples of these indices. Raises Stopped."""
        try:
            for batch, x, inputs in self.batches(indices, at_once):
                out.add(batch, x, inputs.label)
        except Stopped:
            ranks.print_once('stopped: the same command resumes, and draws nothing twice')
            raise

    def show_path(self, out: 'Output') -> None:
        """path.png: a row for each of the first samples, from noise to image; path.gif: the first grid, step by step.

        The frames are x(t) / sqrt(alpha^2 + sigma^2), decoded. Raises SettingError where `draw` is overridden so that
        it has no steps.
        """
        run, columns = self.run, self.run.data.columns()
        indices = range(min(self.num, 3 * columns))
        inputs = self.inputs(indices)
        with utils.NoiseOfEach(self.seed, 'draw', indices):
            frames = run.drawing.path(lambda fn, given: run.draw(fn, given, run.config.solver), self.model_fn, inputs)
        if not frames:
            raise SettingError(f'trajectory=True: {type(run).__name__}.draw does not use the solvers of the repo.')
        frames.insert(0, run.decode(inputs.x1).cpu())
        with files.whole(out.picture('path.png')) as temporary:
            torchvision.io.write_png(in_rows([x[:8] for x in frames]), str(temporary))
        grids = [Image.fromarray(image_grid(x, columns).permute(1, 2, 0).numpy()) for x in frames]
        durations = [100] * (len(grids) - 1) + [1500]
        with files.whole(out.picture('path.gif')) as temporary:
            grids[0].save(temporary, 'gif', save_all=True, append_images=grids[1:], duration=durations, loop=0)

    def numbers(self, detector: Detector, at_once: int) -> dict[str, float]:
        """Distances from the data, with as many training images, drawn at random, as a floor (`real_...`); and an
        experiment's own `sample_metrics`. Raises Stopped."""
        run, looked, kept, began = self.run, Looked(detector), [], time.monotonic()
        own = run.overrides('sample_metrics')
        for _, x, inputs in self.batches(range(self.num), at_once):
            looked.add(x, run.data.known_classes(inputs.label, run.config.label_dropout))
            kept += [x.cpu()] if own else []
        rate = self.num / (time.monotonic() - began)
        values = run.judge.compared(looked, self.num)
        width = looked.features[0].shape[1]
        if self.num <= width:
            ranks.print_once(
                f'warning: {self.num} samples for {width} features: frechet is far from its value for many samples, so '
                'compare it with real_frechet, or draw more'
            )
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
    """The classes that were requested, empty for all. Raises SettingError."""
    words, classes = labels.replace(',', ' ').split(), data.num_classes
    if not all(word.isdigit() and int(word) < classes for word in words):
        has = f'classes 0 to {classes - 1}' if classes else 'no classes'
        raise SettingError(f'labels={labels!r}: the run has {has}. Pass such numbers, as --labels 3,5.')
    if words and label_dropout == 1:
        raise SettingError(f'labels={labels!r}: the run has learned no classes (label_dropout=1). Leave it out.')
    untrained = [word for word in words if int(word) not in data.trained_classes]
    if untrained:
        text = f'class {untrained[0]} has no training items, so the run has not learned it'
        raise SettingError(f'labels={labels!r}: {text}. Pass others, as --labels {data.trained_classes[0]}.')
    return [int(word) for word in words]


class Output:
    """PNGs `out`/000/000123.png, or batches in `out`.npz.parts until all are there, and then `out`.npz; and a grid."""

    def __init__(self, out: str, are_images: bool, made_by: dict[str, Any]):
        """`made_by`: everything that the samples depend on. Raises SettingError if `out` cannot hold them."""
        self.path, self.where = Path(out).expanduser(), f'out={out!r}'
        self.one_file, self.images = self.path.suffix == '.npz', are_images
        self.folder = self.path.with_name(f'{self.path.name}.parts') if self.one_file else self.path
        if not self.images and not self.one_file:
            raise SettingError(
                f'{self.where}: these samples are not images in [0, 1], which PNGs could hold. Pass a file, such as '
                '--out x.npz, which holds floats; or have `decode` scale them to [0, 1] and end with .clamp(0, 1).'
            )
        self.made_by = json.loads(json.dumps(made_by))

    def claim(self) -> None:
        """Make the folder and say in it what will make the samples. Raises SettingError if there is something else."""
        record = self.folder / 'generate.json'
        if record.exists():
            before = json.loads(record.read_text())
            other = [f'{k}: {before.get(k)} -> {v}' for k, v in self.made_by.items() if before.get(k) != v]
            if other:
                raise SettingError(
                    f'{self.where} holds samples of other settings (there -> now): {"; ".join(other[:4])}. '
                    'Pass another --out, or remove it.'
                )
        elif self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
            raise SettingError(f'{self.where} already exists and was not written by generate.py. Pass another --out.')
        else:
            files.write_text(record, json.dumps(self.made_by, indent=1))

    def drawn(self) -> set[int]:
        """Indices of the samples that are there."""
        if self.one_file:
            return {int(i) for part in self.parts() for i in part['index']}
        return {int(path.stem) for path in self.folder.glob('[0-9]*/[0-9]*.png')}

    def parts(self) -> list[dict[str, Any]]:
        """x, label and index of the samples that are there: the finished file, if any, and batches."""
        parts = [arrays_of(path) for path in sorted(self.folder.glob('*.npz'))]
        if self.path.exists():
            x, label = arrays_of(self.path).values()
            parts.insert(0, dict(x=x, label=label, index=np.arange(len(x))))
        return parts

    def add(self, indices: Sequence[int], x: Tensor, label: Tensor | None) -> None:
        """Write these samples."""
        if self.images:  # uint8 (n, H, W, C)
            x = (x.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        array = (x if self.images else x.float()).cpu().numpy()
        if self.one_file:
            labels = np.full(len(indices), -1) if label is None else label.cpu().numpy()
            write_npz(self.folder / f'{indices[0]:08d}.npz', x=array, label=labels, index=np.array(indices))
            return
        for i, image in zip(indices, array, strict=True):
            with files.whole(self.png(i)) as temporary:
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, 'png')

    def png(self, i: int) -> Path:
        return self.folder / f'{i // 1000:03d}' / f'{i:06d}.png'

    def picture(self, name: str) -> Path:
        """The path of a picture of the samples: in the folder, or with the name of the file in front."""
        return self.path.with_name(f'{self.path.stem}_{name}') if self.one_file else self.folder / name

    def finish(self, shown: int, columns: int, names: Sequence[str]) -> None:
        """One .npz of the parts, arr_0 uint8 (N, H, W, C) and arr_1 the classes; and a grid of the first `shown`
        samples, which have these `names`."""
        if self.one_file:
            first = self.join_parts()[:shown]
        else:
            first = np.stack([np.array(Image.open(self.png(i))) for i in range(shown)])
        if self.images:
            x = torch.from_numpy(first).reshape(*first.shape[:3], -1).permute(0, 3, 1, 2)
            with files.whole(self.picture('grid.png')) as temporary:
                torchvision.io.write_png(image_grid(x / 255, columns, names=names), str(temporary))

    def join_parts(self) -> np.ndarray:
        """Write the .npz, and remove the parts that are in it; the samples (N, ...)."""
        parts = self.parts()
        index, rows = np.unique(np.concatenate([part['index'] for part in parts]), return_index=True)
        there = int((index == np.arange(len(index))).sum())  # without a gap: num or more
        x, label = (np.concatenate([part[name] for part in parts])[rows[:there]] for name in ('x', 'label'))
        write_npz(self.path, arr_0=x, arr_1=label)
        for path in self.folder.glob('*.npz'):
            if arrays_of(path)['index'].max() < there:
                path.unlink()
        return x


def write_npz(path: Path, **arrays: Any) -> None:
    with files.whole(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)


def arrays_of(path: Path) -> dict[str, Any]:
    """The arrays in an .npz."""
    with np.load(path) as arrays:
        return dict(arrays)
