"""What a run shows: grids of samples, the data and what augmentation makes of them, scatter plots of points."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import utils
from config import SettingError
from data_loading.toy2d import TOY2D
from optimizers import get_lr
from reports import points
from runtime import errors, ranks, stopping
from runtime.ranks import print_once
from sampling import ModelFn
from solvers import SOLVERS

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer
    from training.batches import SampleInputs

Sampler = Callable[[ModelFn, 'SampleInputs'], Tensor]
POINTS_SHOWN = 1000
GAP = 16  # pixels between grids side by side


@dataclass
class Drawing:
    """What a trainer knows of its drawing of samples."""

    seconds: float = 0.0  # that a sample took when some were last drawn
    at_end: int = 0  # how many will be drawn after the last step, for pictures and numbers
    label: Tensor | None = None  # classes of the samples that `show` is asked to show


# ---------------------------------------------------------------- pictures


def kind(x: Tensor) -> str | None:
    """What decoded samples (n, ...) can be shown as: 'images' (n, 1, 3 or 4, H, W), 'points' (n, 2), or None."""
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return 'images'
    return 'points' if x.ndim == 2 and x.shape[1] == 2 else None


def picture_of(
    x: Tensor,
    beside: list[Tensor],
    columns: int,
    names: Sequence[str] = (),
    label: Tensor | None = None,
    density: points.Density | None = None,
    titles: Sequence[str] = (),
) -> Tensor | None:
    """x, right of those of `beside` that are of its kind, as one picture (3, H, W) uint8; None if it cannot be shown.

    `names` stand at images: one for each of x, and for each of those of `beside` that are as many. Points are coloured
    by `label`, with `titles`, and beside them is the density that they should have.

    Images that leave [0, 1] are scaled, all of one tensor alike: the smallest value is black and the largest white.
    """
    shown = [part for part in (*beside, x) if kind(part) == kind(x)]
    if kind(x) == 'points':
        titles = titles or {2: ['x1', 'samples'], 3: ['x1', 'x0', 'samples']}.get(len(shown), ())
        return points.scatter(shown, titles, label, density)
    if kind(x) is None:
        return None
    grids = [
        utils.image_grid(within_unit(part), columns, names=names if len(part) == len(names) else ()) for part in shown
    ]
    height = max(grid.shape[1] for grid in grids)
    apart = [GAP] * (len(grids) - 1) + [0]
    white = [(0, right, 0, height - grid.shape[1]) for grid, right in zip(grids, apart, strict=True)]
    return torch.cat([torch.nn.functional.pad(grid, pad, value=255) for grid, pad in zip(grids, white, strict=True)], 2)


def within_unit(x: Tensor) -> Tensor:
    """x as it is if it lies in [0, 1], else scaled linearly into it."""
    low, high = x.aminmax()
    return x if (low >= 0 and high <= 1) or high == low else (x - low) / (high - low)


# ---------------------------------------------------------------- samples


def columns(trainer: 'BaseDiffusionTrainer') -> int:
    """Of a grid of samples: a class a column, if there are 2 to 20; of few classes, all of them several times."""
    classes = trainer.data.num_classes
    return classes * max(1, 10 // classes) if 2 <= classes <= 20 else 10 if classes > 20 else 8


def num_shown(trainer: 'BaseDiffusionTrainer') -> int:
    """How many samples a picture has: about 60 images, but at least one of each of up to 100 classes, or enough points
    to see a density."""
    if kind(trainer.decode(trainer.example.x0[:1])) == 'points':
        return POINTS_SHOWN
    row, classes = columns(trainer), trainer.data.num_classes
    if classes > 20:
        return -(-min(classes, 100) // row) * row
    return row * max(3, 60 // row)


def classes_of(trainer: 'BaseDiffusionTrainer', label: Tensor | None) -> Tensor | None:
    """`label` (n,) if it holds classes that the network has learned, or num_classes (none of them); else None."""
    classes = trainer.data.num_classes
    if label is None or label.ndim != 1 or classes < 2 or trainer.config.label_dropout == 1:
        return None
    whole = not (label.is_floating_point() or label.is_complex()) and len(label) > 0
    return label if whole and label.min() >= 0 and label.max() <= classes else None


def names_of(trainer: 'BaseDiffusionTrainer', label: Tensor | None) -> list[str]:
    """The names of the classes of samples (n,), to stand at them; empty if the network has learned none."""
    data, classes = trainer.data, classes_of(trainer, label)
    names = [*(data.classes or map(str, range(data.num_classes))), 'none']
    return [] if classes is None else [names[i] for i in classes.tolist()]


def show(trainer: 'BaseDiffusionTrainer', name: str, x: Tensor, beside: list[Tensor]) -> None:
    """On rank 0: images as a grid, points as a scatter plot, with those of `beside` on the left; else nothing."""
    label, toy = trainer.drawing.label, TOY2D.get(trainer.config.dataset)
    names, density = names_of(trainer, label), toy.density if toy else None
    picture = picture_of(x, beside, columns(trainer), names, classes_of(trainer, label), density)
    if picture is not None:
        trainer.logger.log_picture(name, picture, trainer.step)


def solvers(trainer: 'BaseDiffusionTrainer') -> list[str]:
    """The config's solver and, where an SDE is right, one of the other kind: ODE and SDE."""
    mine = trainer.config.solver
    return [mine, 'adams' if SOLVERS[mine].stochastic else 'sde_dpmpp_2m'] if trainer.independent else [mine]


def refuse_score(trainer: 'BaseDiffusionTrainer', solver: str) -> None:
    """Raise SettingError for an SDE solver where x0 and x1 are not independent."""
    if solver in SOLVERS and SOLVERS[solver].stochastic and not trainer.independent:
        raise SettingError(
            f'solver={solver!r} follows the score, which would be wrong: x0 and x1 are not independent '
            f'({type(trainer).__name__}.independent is False). Use an ODE solver: --solver adams.'
        )


@torch.no_grad()
def generate(trainer: 'BaseDiffusionTrainer', sampler: Sampler, module: nn.Module, inputs: 'SampleInputs') -> Tensor:
    """Decoded samples (n, ...) on every rank, from inputs that every rank has; the work is shared out.

    Raises errors.Stopped and, on every rank, errors.RankFailed if one of them ran out of memory.
    """
    c, n, model_fn = trainer.config, len(inputs.x1), trainer.get_model_fn(module)
    mine = torch.tensor(ranks.my_items(n), device=trainer.device)
    at_once = trainer.shards_per_micro_step() * c.global_batch_size // c.batch_shards  # as many images as in training
    drawn: list[Tensor] = []
    began = time.monotonic()
    with short_of_memory_together():
        for i, part in enumerate(mine.split(at_once)):
            utils.seed_everything(c.seed, 'generate', ranks.rank(), i)  # for the SDE
            drawn.append(trainer.decode(sampler(model_fn, utils.rows(inputs, part))))
            stopping.raise_if_stopped()
    samples = ranks.gather_items(torch.cat(drawn), n)
    trainer.drawing.seconds = (time.monotonic() - began) / n
    return samples


@contextlib.contextmanager
def short_of_memory_together() -> Iterator[None]:
    """Around drawing that calls stopping.raise_if_stopped: who runs out of memory tells the others by it, so that
    errors.RankFailed is raised on every rank."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f'rank {ranks.rank()}: {error}', flush=True)
        stopping.raise_if_stopped(failed=True)


def ways(trainer: 'BaseDiffusionTrainer') -> Iterator[tuple[str, Sampler, str, nn.Module]]:
    """(sampler's name, sampler, weights' name, network) of all pictures."""
    for sampler_name, sampler in trainer.samplers().items():
        for weights, module in trainer.weights().items():
            yield sampler_name, sampler, weights, module


def no_memory(trainer: 'BaseDiffusionTrainer', sampler: str, what: str) -> str:
    return (
        f'step {trainer.step}: not enough memory to draw with {sampler}; {what} left out, and the run goes on. '
        'A smaller --global_batch_size or more --accumulation_steps draw fewer at once.'
    )


def sample_grids(trainer: 'BaseDiffusionTrainer') -> None:
    """A picture of the samples of every sampler and all weights, with what they started from on the left."""
    inputs = trainer.sample_inputs(num_shown(trainer))
    beside = inputs.beside or [trainer.decode(inputs.x1)]
    trainer.drawing.label = inputs.label
    for sampler_name, sampler, weights, module in ways(trainer):
        try:
            x = generate(trainer, sampler, module, inputs)
        except errors.RankFailed:
            print_once(no_memory(trainer, sampler_name, 'this picture is'))
            continue
        name = f'step_{trainer.step:07d}_{sampler_name}_{weights}'
        ranks.on_main(functools.partial(trainer.show, name, x, beside))
    trainer.drawing.label = None


def show_paths(trainer: 'BaseDiffusionTrainer') -> None:
    """A picture of the way of some samples, from what they start from, by the first sampler and the weights by which
    the run is judged: a row for each image, a line for each point. Every process draws them all."""
    shown = kind(trainer.decode(trainer.example.x0[:1]))
    if shown is None:
        return
    sampler_name, sampler, _, module = next(ways(trainer))
    most = 6 if shown == 'images' else 200
    few = trainer.sample_inputs(min(most, trainer.config.global_batch_size // trainer.config.batch_shards))
    utils.seed_everything(trainer.config.seed, 'show_paths')
    try:
        with torch.no_grad(), short_of_memory_together():
            frames = path(trainer, lambda: sampler(trainer.get_model_fn(module), few))
            stopping.raise_if_stopped()
    except errors.RankFailed:
        print_once(no_memory(trainer, sampler_name, 'the picture of the path is'))
        return
    if frames and kind(frames[0]) == shown:
        start = trainer.decode(few.x1).cpu()
        frames = [start, *frames] if start.shape == frames[0].shape else frames
        picture = in_rows(frames) if shown == 'images' else points.paths(frames, classes_of(trainer, few.label))
        ranks.on_main(lambda: trainer.logger.log_picture('path', picture, trainer.step, '.'))


def path(trainer: 'BaseDiffusionTrainer', draw: Callable[[], Tensor]) -> list[Tensor]:
    """x(t) / sqrt(alpha^2 + sigma^2), decoded, (n, ...) after each step of the solver while `draw()` runs; empty if it
    does not use the trainer's `sample_fn`."""
    usual, frames = trainer.sample_fn, []

    def recorded(*args: Any, callback: Any = None, **kwargs: Any) -> Tensor:
        def record(i: int, t: float, x: Tensor) -> None:
            coefs = trainer.process(torch.tensor([t], dtype=torch.float64))
            frames.append(trainer.decode(x / float(torch.hypot(coefs.alpha, coefs.sigma))).cpu())
            if frames[-1].shape != frames[0].shape:  # a sampler of several stages: the path of the last one
                del frames[:-1]
            if callback is not None:
                callback(i, t, x)

        return usual(*args, callback=record, **kwargs)

    trainer.sample_fn = recorded
    try:
        draw()
    finally:
        trainer.sample_fn = usual
    return frames


def in_rows(frames: list[Tensor], at_most: int = 12) -> Tensor:
    """Frames, each of images (n, C, H, W), as a picture (3, H', W') uint8 with a row for each image."""
    rows = torch.stack(frames, 1)  # (n, frames, C, H, W)
    shown = rows[:, torch.linspace(0, rows.shape[1] - 1, min(rows.shape[1], at_most)).round().long()]
    return utils.image_grid(shown.flatten(0, 1), shown.shape[1])


def first_drawing(trainer: 'BaseDiffusionTrainer') -> None:
    """Draw 2 samples in 2 steps with every sampler: a broken one is an error at once, and not after hours."""
    inputs = trainer.sample_inputs(2)
    usual = trainer.sample_fn
    trainer.sample_fn = functools.partial(usual, num_steps=2, nfe=0)
    try:
        for name, sampler in trainer.samplers().items():
            utils.seed_everything(trainer.config.seed, 'first_drawing')
            with torch.no_grad():
                x = trainer.decode(sampler(trainer.get_model_fn(trainer.network), inputs))
            if x.is_floating_point() and not x.isfinite().all():
                raise SettingError(
                    f'sampler {name!r} gives values that are not finite, with the weights of step {trainer.step}. '
                    'Use another --solver or --time_grid.'
                )
            picture_of(x, inputs.beside, columns(trainer))
    finally:
        trainer.sample_fn = usual


def show_data_and_schedule(trainer: 'BaseDiffusionTrainer') -> None:
    """A picture of the first images as loaded, left, and as training sees them, right; a plot of the learning rate."""
    if ranks.is_main():
        n = min(64, trainer.config.global_batch_size)
        first = trainer.train_loader.take(trainer.train_sampler.permutation(0)[:n].tolist())
        utils.seed_everything(trainer.config.seed, 'show_data')
        batch = trainer.prepare_batch_fn(first, is_train=True)
        label, titles = classes_of(trainer, first[1]), ['data', 'as trained on']
        picture = picture_of(trainer.decode(batch.x0), [batch.x_original], 8, label=label, titles=titles)
        if picture is not None:
            trainer.logger.log_picture('data_and_augmented', picture, 0)
        total = trainer.config.num_training_steps
        curve = [(step, get_lr(trainer.config, step)) for step in range(0, total, max(1, total // 200))]
        trainer.logger.log_curve('lr_schedule', curve, 'step', 'lr')
