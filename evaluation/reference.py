"""The loss that all runs of a data set share, and levels that losses are seen against: what no network can beat, and
what one reaches that knows next to nothing."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import utils
from augmentations import AUGMENTATIONS
from logging_utils import RunningMeans
from prediction import get_model_convert_fn, optimal_denoiser
from processes import Coefs
from runtime import errors, ranks, stopping
from sampling import ModelFn
from training.batches import ProcessedBatch

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer

GOLDEN = (math.sqrt(5) - 1) / 2
MOST_DRAWS, LEAST_DRAWS = 8192, 1000  # of noisy images over which a level is averaged
MOST_VALUES = 2e8  # of a data set that every draw is compared with
AT_ONCE = 256  # draws


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


def levels(trainer: 'BaseDiffusionTrainer') -> dict[str, float]:
    """Levels for the record, the same on every rank; those that are not known are left out. The processes share the
    work. Estimated from up to MOST_DRAWS draws, of digits to a percent.

    train/floor                the training loss of the optimal denoiser of the training images, which has learned them
                               by heart, also by time: no network has a smaller one
    eval/reference_floor       the same of the reference loss, on training images
    eval/reference_gaussian    the reference loss of a network that knows only mean and variance of each pixel: one that
                               has learned something is below it
    """
    c, n = trainer.config, number_of_draws(trainer)
    if n == 0:
        return {}
    changed = c.dequantize or c.overfit or any(getattr(c, probability) for probability in AUGMENTATIONS)
    wanted = {'eval/reference_floor': 'optimal', 'eval/reference_gaussian': 'gaussian'}
    if not changed and type(trainer).loss_fn.__module__ == 'trainer':
        wanted['train/floor'] = 'optimal'
    means = RunningMeans(trainer.device)
    try:
        with torch.no_grad():
            denoisers = known_denoisers(trainer)
            for name, denoiser in wanted.items():
                add_losses(trainer, means, n, name, denoisers[denoiser])
        stopping.raise_if_stopped()
    except errors.RankFailed:
        return {}
    except (torch.OutOfMemoryError, MemoryError):
        with contextlib.suppress(errors.RankFailed):
            stopping.raise_if_stopped(failed=True)
        return {}
    return {name: value for name, value in means.means().items() if 'gaussian_t_' not in name}


def number_of_draws(trainer: 'BaseDiffusionTrainer') -> int:
    """How many noisy images the levels are means over; 0 where the optimal denoiser is not known or takes too long."""
    c, loader = trainer.config, trainer.train_loader
    known = trainer.independent and trainer.has_reference and not (trainer.couples or loader.has_pairs)
    known &= not trainer.example.cond and type(trainer.process).sample_base.__module__ == 'processes'
    known &= type(trainer).prepare_batch_fn.__module__ == 'trainer' and loader.size >= 16
    if ranks.any_rank(not known or loader.resident is None):
        return 0
    first = loader.take(range(16))[0]
    with torch.no_grad():
        known &= torch.equal(trainer.encode(first), trainer.encode(first))
    products = loader.size * trainer.example.x0[0].numel()  # for one draw
    budget = 2e10 if trainer.device.type == 'cpu' else 1e12
    n = int(min(MOST_DRAWS, budget // products)) if known and products <= MOST_VALUES else 0
    n = n // c.batch_shards * c.batch_shards
    return n if n >= LEAST_DRAWS else 0


def known_denoisers(trainer: 'BaseDiffusionTrainer') -> dict[str, ModelFn]:
    """The optimal denoiser of the training images, and that of a Gaussian with the mean and variance of each pixel, as
    networks that output what the config says."""
    x, label, *_ = trainer.train_loader.everything()
    x0 = torch.cat([trainer.encode(part) for part in x.split(1024)])
    labels = label.to(trainer.device) if trainer.data.num_classes and trainer.config.label_dropout < 1 else None
    mean, variance = x0.mean(0), x0.var(0)
    optimal = optimal_denoiser(x0, labels)

    def gaussian(xt: Tensor, coefs: Coefs, label: Tensor | None) -> Tensor:
        alpha, sigma = (utils.bcast_right(v, xt.ndim) for v in (coefs.alpha, coefs.sigma))
        return mean + alpha * variance / (alpha.square() * variance + sigma.square()) * (xt - alpha * mean)

    def as_network(denoise: Callable[..., Tensor], xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        coefs = trainer.process(t)
        clean = get_model_convert_fn('x0')(denoise(xt, coefs, label), t, xt, coefs)
        return getattr(clean, trainer.config.model_type)

    return {
        'optimal': functools.partial(as_network, optimal),
        'gaussian': functools.partial(as_network, gaussian),
    }


def add_losses(trainer: 'BaseDiffusionTrainer', means: RunningMeans, n: int, name: str, model_fn: ModelFn) -> None:
    """Add to the means what n draws of noisy training images give: the reference loss, or the run's own if `name` is
    one of training. This process takes its shards of them."""
    training = name.startswith('train/')
    numbers = torch.arange(n).view(trainer.config.batch_shards, -1)
    for shard in trainer.train_sampler.my_shards:
        for i, draws in enumerate(numbers[shard].split(AT_ONCE)):
            stopping.raise_if_stopped()
            loaded = trainer.train_loader.take((draws % trainer.train_loader.size).tolist())
            step = f'levels {i}' if training else 'evaluate'
            batch = trainer.draw_shard(loaded, shard, step)
            if training:
                losses, t = trainer.loss_fn(batch, model_fn), batch.t
            else:
                losses, t = reference_errors(trainer, batch, draws.to(trainer.device), model_fn)
            means.add(name, losses.double().sum(), len(losses))
            means.add_by_time(f'{name}_t', losses, t)
