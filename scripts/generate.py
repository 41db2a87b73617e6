"""Samples of a trained run, as PNGs in a folder or as one .npz.

    sh run.sh generate.py --run ckpts/NAME --num 50000 --out samples/
    NPROC=4 sh run.sh generate.py --run ckpts/NAME --num 50000 --out samples.npz --solver adams --nfe 20

Sample i starts from noise of its own, a function of (seed, i), so that it is the same for any number of processes and
any batch size, to float32 rounding. The same command resumes after a stop, and draws nothing twice.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from config import SettingError
from runtime import command, files

if TYPE_CHECKING:
    from torch import Tensor

    from training.experiment import SampleInputs


@dataclasses.dataclass(frozen=True)
class Generate:
    """Draw samples of a trained run."""

    run: str
    """Folder of the run, or one of its .pt files."""
    out: str
    """Folder for PNGs, 1000 in each folder below it, or a file FILE.npz."""
    num: int = 64
    """How many samples."""
    weights: str = 'ema'
    """ema (the run's first moving average), another by its name (ema_0.999), raw, or posthoc_0.1 (docs/numbers.md)."""
    labels: str = ''
    """Classes in turn, such as 3,5; empty: all of them."""
    solver: str | None = None
    """Key of SOLVERS in solvers/table.py; default: the run's own (so for the four flags below)."""
    nfe: int | None = None
    """Network evaluations for each sample; 0: num_sample_steps steps."""
    num_sample_steps: int | None = None
    """Steps for each sample, if nfe is 0."""
    time_grid: str | None = None
    """Key of TIME_GRIDS in solvers/table.py."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance; 1 is none."""
    seed: int = 0
    """Another seed gives other samples."""
    batch_size: int = 64
    """Samples that each process draws at once."""
    trajectory: bool = False
    """Also show the paths of the first samples from noise to image: path.png, a row for each, and path.gif."""


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the flags say."""
    import tyro

    options = command.parsed(lambda: tyro.cli(Generate, args=argv, use_underscores=True, description=__doc__))
    command.run(lambda: generate(options))


def generate(options: Generate) -> None:
    """Draw what is not there yet, all processes together. Raises SettingError and Stopped."""
    if options.num < 1 or options.batch_size < 1:
        raise SettingError(f'num={options.num}, batch_size={options.batch_size}: must be at least 1.')
    Generation(options).run()


class Generation:
    """The samples that the options ask for, of a run that is opened to read."""

    def __init__(self, options: Generate):
        """Raises SettingError."""
        from evaluation.detectors import digest_of
        from main import load_run
        from reports.pictures import kind, num_shown
        from scripts.sample_files import Output

        self.options = options
        self.trained = trained = load_run(options.run, options.weights, **sampling_settings(options))
        self.labels = labels_of(options, trained.data.num_classes, trained.config.label_dropout)
        made_by = dict(step=trained.step, weights=options.weights, labels=options.labels, sample_seed=options.seed)
        made_by['weights_digest'] = digest_of(trained.network)
        self.kind, self.columns = kind(trained.decode(trained.example.x0[:1])), trained.data.columns()
        self.shown = min(options.num, num_shown(self.kind, self.columns, trained.data.num_classes))
        self.out = Output(options.out, options.num, self.kind == 'images', vars(trained.config) | made_by)
        self.model_fn = trained.get_model_fn(trained.network)
        if options.trajectory and self.kind != 'images':
            raise SettingError('trajectory=True: these samples are not images.')

    def run(self) -> None:
        """Raises Stopped."""
        from runtime import ranks, stopping

        o, c = self.options, self.trained.config
        ranks.on_main(self.out.claim)
        todo = sorted(set(range(o.num)) - ranks.on_main(self.out.drawn))
        already = f', {o.num - len(todo)} of them are there' if len(todo) < o.num else ''
        which = f'{o.run} at step {self.trained.step}, weights {o.weights}, solver {c.solver}'
        ranks.print_once(f'{which}: {o.num} samples to {o.out}{already}')
        stopping.catch_stop_signals()
        began = time.monotonic()
        self.draw_all([todo[i : i + o.batch_size] for i in range(0, len(todo), o.batch_size)])
        speed = f', {len(todo) / (time.monotonic() - began):.1f} images/s' if todo else ''
        label = self.inputs_of(range(self.shown)).label
        names = self.trained.data.class_names(label, c.label_dropout)
        ranks.on_main(lambda: self.out.finish(self.shown, self.columns, names))
        if o.trajectory:
            ranks.on_main_alone(self.show_path)
        ranks.print_once(f'{o.num} samples in {o.out}{speed}')

    def draw_all(self, batches: list[list[int]]) -> None:
        """Draw and write the samples of these indices. Raises Stopped."""
        from tqdm import tqdm

        from runtime import ranks, stopping
        from runtime.errors import Stopped

        solver = self.trained.config.solver
        with tqdm(total=sum(map(len, batches)), unit='image', disable=None if ranks.is_main() else True) as bar:
            try:
                for i in range(0, len(batches), ranks.world_size()):
                    stopping.raise_if_stopped()
                    for indices in batches[i + ranks.rank() : i + ranks.rank() + 1]:  # one, or none in the last round
                        inputs = self.inputs_of(indices)
                        x = draw_alone(self.trained, self.model_fn, inputs, indices, self.options.seed, solver)
                        self.out.add(indices, x, inputs.label)
                    bar.update(sum(map(len, batches[i : i + ranks.world_size()])))
                stopping.raise_if_stopped()
            except Stopped:
                ranks.print_once('stopped: the same command resumes, and draws nothing twice')
                raise

    def inputs_of(self, indices: Sequence[int]) -> 'SampleInputs':
        """What the samples of these indices start from."""
        import torch

        inputs = inputs_of(self.trained, indices, self.options.seed, self.options.num)
        if self.labels:
            label = torch.tensor([self.labels[i % len(self.labels)] for i in indices], device=self.trained.device)
            inputs = dataclasses.replace(inputs, label=label)
        return inputs

    def show_path(self) -> None:
        """path.png: a row for each of the first samples, from noise to image; path.gif: the first grid, step by step.

        The frames are x(t) / sqrt(alpha^2 + sigma^2), decoded. Raises SettingError where `draw` is overridden so that
        it has no steps.
        """
        import torchvision
        from PIL import Image

        from reports.plots import image_grid, in_rows
        from utils import NoiseOfEach

        indices, trained = list(range(min(self.options.num, 3 * self.columns))), self.trained
        inputs, solver = self.inputs_of(indices), trained.config.solver
        with NoiseOfEach(self.options.seed, 'draw', indices):
            frames = trained.drawing.path(lambda fn, given: trained.draw(fn, given, solver), self.model_fn, inputs)
        if not frames:
            raise SettingError(f'trajectory=True: {type(trained).__name__}.draw does not use the solvers of the repo.')
        frames.insert(0, trained.decode(inputs.x1).cpu())
        with files.whole(self.out.picture('path.png')) as temporary:
            torchvision.io.write_png(in_rows([x[:8] for x in frames]), str(temporary))
        grids = [Image.fromarray(image_grid(x, self.columns).permute(1, 2, 0).numpy()) for x in frames]
        durations = [100] * (len(grids) - 1) + [1500]
        with files.whole(self.out.picture('path.gif')) as temporary:
            grids[0].save(temporary, 'gif', save_all=True, append_images=grids[1:], duration=durations, loop=0)


def draw_alone(
    experiment: Any, model_fn: Any, inputs: 'SampleInputs', indices: Sequence[int], seed: int, solver: str
) -> 'Tensor':
    """Decoded samples (n, ...) of these indices, drawn by this process without the others; their noise is a function of
    (seed, index)."""
    import torch

    from runtime import ranks
    from utils import NoiseOfEach

    with torch.no_grad(), ranks.alone(), NoiseOfEach(seed, 'draw', indices):
        return experiment.decode(experiment.draw(model_fn, inputs, solver))


def inputs_of(experiment: Any, indices: Sequence[int], seed: int, num: int) -> 'SampleInputs':
    """What the samples of these indices, of `num` in all, start from: a function of (seed, index), unless the
    experiment has a sample_inputs of its own."""
    import torch

    import utils

    if experiment.overrides('sample_inputs'):
        whole = all_inputs(experiment, num)
        return utils.rows(whole, torch.tensor(indices, device=whole.x1.device))
    with utils.NoiseOfEach(seed, 'sample_inputs', indices):
        return experiment.batches.sample_inputs(len(indices), indices)


@functools.lru_cache(maxsize=1)
def all_inputs(experiment: Any, n: int) -> 'SampleInputs':
    """An experiment's own inputs of all samples."""
    return experiment.sample_inputs(n)


def sampling_settings(options: Generate) -> dict[str, Any]:
    """The settings of sampling that were given, and no compiling for few samples."""
    from training import calling

    same = ('solver', 'num_sample_steps', 'time_grid', 'guidance_scale')
    given = {name: getattr(options, name) for name in same} | dict(sample_nfe=options.nfe)
    return calling.settings_for(options.num) | {name: value for name, value in given.items() if value is not None}


def labels_of(options: Generate, classes: int, label_dropout: float) -> list[int]:
    """The classes that were requested, empty for all. Raises SettingError."""
    words = options.labels.replace(',', ' ').split()
    if not all(word.isdigit() and int(word) < classes for word in words):
        has = f'classes 0 to {classes - 1}' if classes else 'no classes'
        raise SettingError(f'labels={options.labels!r}: the run has {has}. Pass such numbers, as --labels 3,5.')
    if words and label_dropout == 1:
        text = f'labels={options.labels!r}: the run has learned no classes (label_dropout=1). Leave it out.'
        raise SettingError(text)
    return [int(word) for word in words]


if __name__ == '__main__':
    main()
