"""The reference loss, comparable between all runs of a data set, and two baselines for it: the optimal denoiser of the
training images, and a Gaussian for each pixel."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import utils
from augmentations import AUGMENTATIONS
from logging_utils import RunningMeans
from prediction import get_model_convert_fn, optimal_denoiser
from processes import Coefs
from runtime import ranks, stopping
from runtime.errors import RankFailed
from sampling import ModelFn
from training.batches import Batches
from training.calling import in_eval_mode
from training.drawing import out_of_memory_on_any_rank
from training.experiment import Experiment, ProcessedBatch

GOLDEN = (math.sqrt(5) - 1) / 2
MOST_DRAWS, LEAST_DRAWS = 8192, 1000  # noisy images over which a baseline is averaged
MOST_VALUES = 2e8  # numbers in the data set, which every draw is compared with
AT_ONCE, VALUES_AT_ONCE = 256, 2**22  # draws in a batch, and numbers in all its images


class Reference:
    """The mean square error of the velocity x1 - x0 of the straight line xt = (1 - t) x0 + t x1, at uniform times,
    unweighted, with independent x1.

    It does not depend on a run's process, output, loss and times: a network of another process is evaluated at the time
    of equal log-SNR. It is not defined for runs whose x1 is not independent noise.
    """

    def __init__(self, experiment: Experiment, batches: Batches):
        self.experiment, self.batches = experiment, batches

    def errors(self, batch: ProcessedBatch, index: Tensor, model_fn: ModelFn) -> tuple[Tensor, Tensor]:
        """(errors (B,), times (B,) on the straight line) for the images with numbers `index` (B,).

        An error e of x0 causes an error -alpha / sigma e of x1 = (xt - alpha x0) / sigma, so the error of the velocity
        is 1 + alpha / sigma times as large.
        """
        process = self.experiment.process
        t = 0.001 + 0.998 * ((utils.double(index) + 0.5) * GOLDEN).frac()  # spread evenly (Weyl's sequence)
        time = process.time_of_log_snr(2 * (1 / t - 1).log()).to(batch.x0.dtype)
        coefs = process(time)
        x1 = noise_of(index, batch.x0)
        xt = process.compute_xt(batch.x0, x1, coefs)
        cond = batch.cond | ({'s': time} if 's' in batch.cond else {})  # a flow map: s = t gives the velocity
        out = model_fn(xt, time, batch.label, **cond)
        x0 = get_model_convert_fn(self.experiment.config.model_type)(out, time, xt, coefs).x0
        return utils.image_square_error(x0, batch.x0) * (1 + coefs.alpha / coefs.sigma).square(), t.to(batch.x0.dtype)

    @in_eval_mode
    def baselines(self) -> dict[str, float]:
        """Baselines for the record, the same on every rank; unknown ones are left out. The processes share the work.
        They are means over up to MOST_DRAWS draws, exact to a percent for digits.

        train/floor              training loss of the optimal denoiser, which has memorised the training images, also by
                                 time: no network has a smaller one
        eval/reference_floor     its reference loss, on training images
        eval/reference_gaussian  reference loss of a network that knows only mean and variance of each pixel
        """
        experiment, c, n = self.experiment, self.experiment.config, self.number_of_draws()
        if n == 0:
            return {}
        changed = c.dequantize or c.overfit or any(getattr(c, probability) for probability in AUGMENTATIONS)
        means = RunningMeans(experiment.device)
        try:
            with torch.no_grad(), out_of_memory_on_any_rank():
                optimal, gaussian = self.known_denoisers()
                self.add_losses(means, n, 'eval/reference_floor', optimal)
                self.add_losses(means, n, 'eval/reference_gaussian', gaussian)
                if not changed and not experiment.overrides('loss_fn'):
                    self.add_losses(means, n, 'train/floor', optimal)
                stopping.raise_if_stopped()
        except RankFailed:
            return {}
        return {name: value for name, value in means.means().items() if 'gaussian_t_' not in name}

    def number_of_draws(self) -> int:
        """Number of noisy images that a baseline averages; 0 if the optimal denoiser is unknown or takes too long."""
        experiment, loader = self.experiment, self.batches.train_loader
        known = experiment.independent and experiment.couple is None and not experiment.overrides('prepare_batch_fn')
        known &= not self.batches.example.cond.keys() - {'augmentation'}
        if ranks.any_rank(not known or loader.has_pairs or loader.resident is None or loader.size < 16):
            return 0
        first = loader.take(range(16))[0]
        with torch.no_grad():
            known &= torch.equal(experiment.encode(first), experiment.encode(first))
        products = loader.size * self.batches.example.x0[0].numel()  # for one draw
        budget = 2e10 if experiment.device.type == 'cpu' else 1e12
        n = int(min(MOST_DRAWS, budget // products)) if known and products <= MOST_VALUES else 0
        n = n // experiment.config.batch_shards * experiment.config.batch_shards
        return n if n >= LEAST_DRAWS else 0

    def known_denoisers(self) -> tuple[ModelFn, ModelFn]:
        """The optimal denoisers of the training images, and of a Gaussian with the mean and variance of each pixel, as
        networks with the output `model_type`."""
        experiment = self.experiment
        x, label, *_ = self.batches.train_loader.everything()
        x0 = torch.cat([experiment.encode(part.to(experiment.device)) for part in x.split(1024)])
        has_classes = experiment.data.num_classes and experiment.config.label_dropout < 1
        mean, variance = x0.mean(0), x0.var(0)

        def gaussian(xt: Tensor, coefs: Coefs, label: Tensor | None) -> Tensor:
            alpha, sigma = (utils.bcast_right(v, xt.ndim) for v in (coefs.alpha, coefs.sigma))
            return mean + alpha * variance / (alpha.square() * variance + sigma.square()) * (xt - alpha * mean)

        def as_network(denoise: Any, xt: Tensor, t: Tensor, label: Tensor | None = None, **_: Tensor) -> Tensor:
            coefs = experiment.process(t)
            clean = get_model_convert_fn('x0')(denoise(xt, coefs, label), t, xt, coefs)
            return getattr(clean, experiment.config.model_type)

        optimal = optimal_denoiser(x0, label.to(experiment.device) if has_classes else None)
        return partial(as_network, optimal), partial(as_network, gaussian)

    def add_losses(self, means: RunningMeans, n: int, name: str, model_fn: ModelFn) -> None:
        """Add losses for this process's shards of n noisy training images: the run's own loss if `name` begins with
        train/, else the reference loss."""
        loader, sampler = self.batches.train_loader, self.batches.train_sampler
        training = name.startswith('train/')
        at_once = min(AT_ONCE, max(1, VALUES_AT_ONCE // self.batches.example.x0[0].numel()))
        numbers = torch.arange(n).view(self.experiment.config.batch_shards, -1)
        for shard in sampler.my_shards:
            for i, draws in enumerate(numbers[shard].split(at_once)):
                stopping.raise_if_stopped()
                loaded = loader.take((draws % loader.size).tolist())
                batch = self.batches.draw_shard(loaded, shard, f'levels {i}' if training else 'evaluate', training)
                if training:
                    losses, t = self.experiment.loss_fn(batch, model_fn), batch.t
                else:
                    losses, t = self.errors(batch, draws.to(self.experiment.device), model_fn)
                means.add(name, utils.double(losses).sum(), len(losses))
                means.add_by_time(f'{name}_t', losses, t)


def noise_of(index: Tensor, like: Tensor) -> Tensor:
    """N(0, I) in the shape of `like`; an image's noise depends only on its number."""
    noise = torch.empty(like.shape)
    for i, number in enumerate(index.tolist()):
        noise[i].normal_(generator=torch.Generator().manual_seed(number))
    return noise.to(like)
