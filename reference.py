"""The loss that all runs of a data set share, and levels that losses are seen against: what no network can beat, and
what one reaches that knows next to nothing."""

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import utils
from batches import ProcessedBatch
from logging_utils import RunningMeans
from prediction import get_model_convert_fn, optimal_denoiser
from sampling import ModelFn

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer

GOLDEN = (math.sqrt(5) - 1) / 2
MOST_IMAGES = 1024  # whose loss is averaged
MOST_PRODUCTS = 2e10  # of pixels of these and of all images: seconds on a CPU


def reference_errors(
    trainer: 'BaseDiffusionTrainer', batch: ProcessedBatch, index: Tensor, model_fn: ModelFn
) -> tuple[Tensor, Tensor]:
    """(errors (B,), times (B,) of the straight line) for held-out images number `index` (B,).

    An error e of x0 makes one of -alpha / sigma e in x1 = (xt - alpha x0) / sigma, so the velocity's is
    1 + alpha / sigma times as large.
    """
    t = 0.001 + 0.998 * ((index.double() + 0.5) * GOLDEN).frac()  # spread evenly (Weyl's sequence)
    time = trainer.process.time_of_log_snr(2 * (1 / t - 1).log()).to(batch.x0.dtype)
    coefs = trainer.process(time)
    x1 = noise_of(index, batch.x0) if trainer.independent else batch.x1
    xt = trainer.process.compute_xt(batch.x0, x1, coefs)
    cond = batch.cond | ({'s': time} if 's' in batch.cond else {})  # of two times: the velocity at one
    out = model_fn(xt, time, batch.label, **cond)
    x0 = get_model_convert_fn(trainer.config.model_type)(out, time, xt, coefs).x0
    return utils.image_square_error(x0, batch.x0) * (1 + coefs.alpha / coefs.sigma).square(), t.to(batch.x0.dtype)


def noise_of(index: Tensor, like: Tensor) -> Tensor:
    """N(0, I) of the shape of `like`, for each image a function of its number alone."""
    noise = torch.empty(like.shape)
    for i, number in enumerate(index.tolist()):
        noise[i].normal_(generator=torch.Generator().manual_seed(number))
    return noise.to(like)


def bounds(trainer: 'BaseDiffusionTrainer') -> dict[str, float]:
    """Levels for the record, the same on every rank; empty where they do not hold. The processes share the work.

    train/floor                the training loss of the optimal denoiser of the training images, which has learned them
                               by heart, also by time: no network can be below it
    eval/reference_floor       the same of the reference loss, on training images
    eval/reference_gaussian    the reference loss of a network that knows only mean and variance of each pixel: one that
                               has learned something is below it
    """
    n = number_of_images(trainer)
    return computed(trainer, n) if n else {}


def number_of_images(trainer: 'BaseDiffusionTrainer') -> int:
    """How many images are averaged over; 0 where the optimal denoiser is not known or takes too long."""
    c, loader = trainer.config, trainer.train_loader
    usual = all(getattr(type(trainer), name).__module__ == 'trainer' for name in ('loss_fn', 'prepare_batch_fn'))
    usual &= trainer.independent and not trainer.example.cond and trainer.has_reference
    usual &= type(trainer.process).sample_base.__module__ == 'processes'
    usual &= not (c.flip_prob or c.rotate_prob or c.translate_prob or c.dequantize or c.overfit)
    size = loader.size * trainer.example.x0[0].numel()
    n = int(min(MOST_IMAGES, MOST_PRODUCTS // size))
    return n // c.batch_shards * c.batch_shards if usual and n >= 128 and loader.resident is not None else 0


def computed(trainer: 'BaseDiffusionTrainer', n: int) -> dict[str, float]:
    """`bounds`, from n images."""
    x, label, *_ = trainer.train_loader.everything()
    x0 = trainer.encode(x.to(trainer.device))
    labels = label.to(trainer.device) if trainer.data.num_classes and trainer.config.label_dropout < 1 else None
    mean, variance = x0.mean(0), x0.var(0)
    optimal = optimal_denoiser(x0, labels)

    def model_fn(kind: str, xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        coefs = trainer.process(t)
        if kind == 'optimal':
            clean = optimal(xt, coefs, label)
        else:
            alpha, sigma = (utils.bcast_right(v, xt.ndim) for v in (coefs.alpha, coefs.sigma))
            gain = alpha * variance / (alpha.square() * variance + sigma.square())
            clean = mean + gain * (xt - alpha * mean)
        return getattr(get_model_convert_fn('x0')(clean, t, xt, coefs), trainer.config.model_type)

    with torch.no_grad():
        values = averaged(trainer, n, 'train/floor', functools.partial(model_fn, 'optimal'), reference=False)
        values |= averaged(trainer, n, 'eval/reference_floor', functools.partial(model_fn, 'optimal'))
        gaussian = averaged(trainer, n, 'eval/reference_gaussian', functools.partial(model_fn, 'gaussian'))
    return values | {name: value for name, value in gaussian.items() if '_t_' not in name}


def averaged(
    trainer: 'BaseDiffusionTrainer', n: int, name: str, model_fn: ModelFn, reference: bool = True
) -> dict[str, float]:
    """The mean of the reference loss or of the run's own, also by time, over the first n training images."""
    means = RunningMeans(trainer.device)
    for batch, index in prepared(trainer, n):
        if reference:
            losses, t = reference_errors(trainer, batch, index, model_fn)
        else:
            losses, t = trainer.loss_fn(batch, model_fn), batch.t
        means.add('', losses.double().sum(), len(losses))
        means.add_by_time('_t', losses, t)
    return {name + key: value for key, value in means.means().items()}


def prepared(trainer: 'BaseDiffusionTrainer', n: int) -> Iterator[tuple[ProcessedBatch, Tensor]]:
    """The first n training images as shards, prepared as in training, and their numbers: those of this process."""
    rows = (torch.arange(n) % trainer.train_loader.size).view(trainer.config.batch_shards, -1)
    for shard in trainer.train_sampler.my_shards:
        batch = trainer.train_loader.take(rows[shard].tolist())
        yield trainer.draw_shard(batch, shard, 'bounds'), rows[shard].to(trainer.device)
