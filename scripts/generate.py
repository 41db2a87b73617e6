"""Samples of a trained run, as PNGs in a folder or as one .npz.

    sh run.sh generate.py --run ckpts/NAME --num 50000 --out samples/
    NPROC=4 sh run.sh generate.py --run ckpts/NAME --num 50000 --out samples.npz --solver adams --nfe 20

Sample i starts from noise of its own, a function of (seed, i), so that it is the same for any number of processes and
any batch size, to float32 rounding. Cut off, the same command goes on, and draws nothing twice.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from config import SettingError
from runtime import command, errors

if TYPE_CHECKING:
    from scripts.sample_files import Output
    from trainer import BaseDiffusionTrainer
    from training.batches import SampleInputs


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
    """Key of SOLVERS in solvers.py; as in the run if it is not given, as all that follow."""
    nfe: int | None = None
    """Network evaluations for each sample; 0: num_sample_steps steps."""
    num_sample_steps: int | None = None
    """Steps for each sample, if nfe is 0."""
    time_grid: str | None = None
    """Key of TIME_GRIDS in sampling.py."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance; 1 is none."""
    seed: int = 0
    """Another seed gives other samples."""
    batch_size: int = 64
    """Samples that each process draws at once."""
    trajectory: bool = False
    """Also show how the first samples come about: path.png, a row for each, and path.gif."""


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the flags say."""
    import tyro

    options = command.parsed(lambda: tyro.cli(Generate, args=argv, use_underscores=True, description=__doc__))
    command.run(lambda: generate(options))


def generate(options: Generate) -> None:
    """Draw what is not there yet, all processes together. Raises SettingError and errors.Stopped."""
    import torch
    from tqdm import tqdm

    from evaluation.detectors import digest_of
    from main import load_run
    from reports import pictures
    from runtime import ranks, stopping
    from scripts.sample_files import Output
    from utils import NoiseOfEach

    if options.num < 1 or options.batch_size < 1:
        raise SettingError(f'num={options.num}, batch_size={options.batch_size}: must be at least 1.')
    trainer = load_run(options.run, options.weights, **sampling_settings(options))
    labels = labels_of(options, trainer)
    mine = dict(step=trainer.step, weights=options.weights, labels=options.labels, sample_seed=options.seed)
    mine['weights_digest'] = digest_of(trainer.network)
    out = Output(options.out, options.num, trainer, mine)
    if options.trajectory and not out.images:
        raise SettingError('trajectory=True: these samples are no images.')
    ranks.on_main(out.claim)
    todo = sorted(set(range(options.num)) - ranks.on_main(out.drawn))
    batches = [todo[i : i + options.batch_size] for i in range(0, len(todo), options.batch_size)]
    already = f', {options.num - len(todo)} of them are there' if len(todo) < options.num else ''
    ranks.print_once(
        f'{options.run} at step {trainer.step}, weights {options.weights}, solver {trainer.config.solver}: '
        f'{options.num} samples to {options.out}{already}'
    )
    stopping.catch_stop_signals()
    model_fn = trainer.get_model_fn(trainer.network)
    began = time.monotonic()
    bar = tqdm(total=len(todo), unit='image', disable=None if ranks.is_main() else True)
    try:
        for i in range(0, len(batches), ranks.world_size()):
            stopping.raise_if_stopped()
            for indices in batches[i + ranks.rank() : i + ranks.rank() + 1]:  # one, or none in the last round
                inputs = inputs_of(trainer, indices, labels, options)
                with torch.no_grad(), stopping.asking_nobody(), NoiseOfEach(options.seed, 'draw', indices):
                    x = trainer.decode(trainer.draw(model_fn, inputs, trainer.config.solver))
                out.add(indices, x, inputs.label)
            bar.update(sum(map(len, batches[i : i + ranks.world_size()])))
        stopping.raise_if_stopped()
    except errors.Stopped:
        ranks.print_once('stopped: the same command goes on, and draws nothing twice')
        raise
    finally:
        bar.close()
    speed = f', {len(todo) / (time.monotonic() - began):.1f} images/s' if todo else ''
    label = inputs_of(trainer, range(out.shown), labels, options).label
    ranks.on_main(lambda: out.finish(pictures.names_of(trainer, label)))
    if options.trajectory:
        ranks.on_main(lambda: show_path(options, trainer, labels, out))
    ranks.print_once(f'{options.num} samples in {options.out}{speed}')


def sampling_settings(options: Generate) -> dict[str, Any]:
    """The settings of sampling that were given, and no compiling for few samples."""
    from training import calling

    names = dict(solver='solver', nfe='sample_nfe', num_sample_steps='num_sample_steps', time_grid='time_grid')
    names |= dict(guidance_scale='guidance_scale')
    given = {setting: getattr(options, name) for name, setting in names.items() if getattr(options, name) is not None}
    return calling.settings_for(options.num) | given


def labels_of(options: Generate, trainer: 'BaseDiffusionTrainer') -> list[int]:
    """The classes that were asked for, empty for all. Raises SettingError."""
    classes = trainer.data.num_classes
    words = options.labels.replace(',', ' ').split()
    if not all(word.isdigit() and int(word) < classes for word in words):
        has = f'classes 0 to {classes - 1}' if classes else 'no classes'
        raise SettingError(f'labels={options.labels!r}: the run has {has}. Pass such numbers, as --labels 3,5.')
    if words and trainer.config.label_dropout == 1:
        raise SettingError(
            f'labels={options.labels!r}: the run has learned no classes (label_dropout=1). Leave it out.'
        )
    return [int(word) for word in words]


def inputs_of(
    trainer: 'BaseDiffusionTrainer', indices: Sequence[int], labels: list[int], options: Generate
) -> 'SampleInputs':
    """What the samples of these indices start from. An experiment's own `sample_inputs` is asked for all samples."""
    import torch

    import utils
    from training.batches import sample_inputs

    if utils.overridden(trainer, 'sample_inputs'):
        whole = all_inputs(trainer, options.num)
        inputs = utils.rows(whole, torch.tensor(indices, device=whole.x1.device))
    else:
        with utils.NoiseOfEach(options.seed, 'sample_inputs', indices):
            inputs = sample_inputs(trainer, len(indices), indices)
    if labels:
        label = torch.tensor([labels[i % len(labels)] for i in indices], device=trainer.device)
        inputs = dataclasses.replace(inputs, label=label)
    return inputs


@functools.lru_cache(maxsize=1)
def all_inputs(trainer: 'BaseDiffusionTrainer', n: int) -> 'SampleInputs':
    """An experiment's own inputs of all samples."""
    return trainer.sample_inputs(n)


def show_path(options: Generate, trainer: 'BaseDiffusionTrainer', labels: list[int], out: 'Output') -> None:
    """path.png: a row for each of the first samples, from noise to image; path.gif: the first grid as it comes about.

    What is shown is x(t) / sqrt(alpha^2 + sigma^2), decoded. Raises SettingError where `draw` does not use the
    trainer's `sample_fn`.
    """
    import torch
    import torchvision
    from PIL import Image

    import utils
    from reports import pictures
    from runtime import stopping
    from utils import NoiseOfEach

    indices = list(range(min(options.num, 3 * out.columns)))
    inputs = inputs_of(trainer, indices, labels, options)
    model_fn = trainer.get_model_fn(trainer.network)
    with torch.no_grad(), stopping.asking_nobody(), NoiseOfEach(options.seed, 'draw', indices):
        frames = pictures.path(trainer, lambda: trainer.draw(model_fn, inputs, trainer.config.solver))
    if not frames:
        raise SettingError(f'trajectory=True: {type(trainer).__name__}.draw does not call self.sample_fn.')
    frames.insert(0, trainer.decode(inputs.x1).cpu())
    torchvision.io.write_png(pictures.in_rows([x[:8] for x in frames]), str(out.beside('path.png')))
    grids = [Image.fromarray(utils.image_grid(x, out.columns).permute(1, 2, 0).numpy()) for x in frames]
    durations = [100] * (len(grids) - 1) + [1500]
    grids[0].save(out.beside('path.gif'), save_all=True, append_images=grids[1:], duration=durations, loop=0)


if __name__ == '__main__':
    main()
