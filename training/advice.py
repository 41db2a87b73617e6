"""Advice: warnings about settings that make a network learn badly, with the flags that help; and checks on the first
images: whether x0 and conditions have the expected scale, and whether decode is the inverse of encode.

A loss multiplies an error of the output by the loss weight and by the factor between output and target (prediction.py).
`effective_weight` is the product; `pair_warning` warns if it is almost zero at most times.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from config import Config, SettingError, choose
from prediction import LOSS_WEIGHTS, ROWS, determinant, error_factor, get_loss_weight
from processes import Coefs, GaussianProcess
from time_samplers import TIME_SAMPLERS, get_time_sampler
from utils import double

# pair_warning warns below the first and above the second
LEAST_NOISY_SHARE = 0.05
LARGEST_ERROR_AT_NOISE = 2.0
LARGEST_CONDITION = 10.0  # condition_warning warns above it


def effective_weight(config: Config, process: GaussianProcess, t: Tensor) -> Tensor:
    """The weight of a squared error of the network's output in the loss at times t, (B,) float64: the weight of the
    target's error, from `loss_weight`, times (d target / d output)^2."""
    coefs = process(t.double())
    weight = choose('loss_weight', config.loss_weight, LOSS_WEIGHTS)(coefs)
    return weight * error_factor(config.model_type, config.target_type, coefs).square()


def drawn_times(config: Config, n: int = 20_000) -> Tensor:
    """n times with the density of the run's time sampler, (n,) float64."""
    return get_time_sampler(config)((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def drawn_weights(config: Config, process: GaussianProcess) -> Tensor:
    """The weight of each drawn time in the loss of a new network, which outputs 0; largest first. That is the effective
    weight times the mean square of the right output."""
    t = drawn_times(config)
    return (effective_weight(config, process, t) * mean_square_of_output(config, process(t))).sort(descending=True)[0]


def mean_square_of_output(config: Config, coefs: Coefs) -> Tensor:
    """(B,): the mean square of the right output, for x0 and x1 of mean 0 and standard deviation sigma_data and 1."""
    a, b = (0.0 if k is None else k for k in ROWS[config.model_type](coefs))
    return (a**2 * config.sigma_data**2 + b**2) * torch.ones_like(coefs.alpha)


def is_uneven(weights: Tensor) -> bool:
    """Whether at least half of the times have less than an eighth of the mean weight."""
    return not 8 * weights.median() >= weights.mean()  # infinite and NaN weights count as uneven


def noisy_share(config: Config, process: GaussianProcess) -> float:
    """The share of noisy times, sigma > 3 alpha, in the loss of a network whose error of x1 - x0, the velocity of the
    straight line, is the same at all times. A loss on x1 has the factor alpha / (alpha + sigma), so it nearly ignores
    these times, which decide what an image shows."""
    coefs = process(drawn_times(config))
    factor = determinant(config.target_type, coefs) / (coefs.alpha + coefs.sigma)
    weight = choose('loss_weight', config.loss_weight, LOSS_WEIGHTS)(coefs) * factor.square()
    return (weight[coefs.sigma > 3 * coefs.alpha].sum() / weight.sum()).item()


def error_at_noise(config: Config, process: GaussianProcess, ratio: float = 10.0) -> float:
    """The error of x1 - x0 at sigma = `ratio` alpha if the output is wrong by its own size (its root mean square over
    the drawn times): 1 / alpha on the straight line if the output is x1, and about one half if it is F."""
    size = mean_square_of_output(config, process(drawn_times(config))).mean().sqrt()
    noisy = process(process.time_of_log_snr(torch.tensor([-2 * math.log(ratio)], dtype=torch.float64)))
    return (size * ((noisy.alpha + noisy.sigma) / determinant(config.model_type, noisy)).abs()).item()


def settings_warnings(
    config: Config, process: GaussianProcess, sides: Sequence[int], num_classes: int, size: int
) -> tuple[str | None, ...]:
    """All warnings about settings: for x0 with these sides, and for this number of classes and of training items."""
    of_data = data_warning(config, num_classes, size), padding_warning(config, sides)
    return *of_data, pair_warning(config, process), lr_warning(config)


def pair_warning(config: Config, process: GaussianProcess) -> str | None:
    """None, or why a network with this output learns badly from this target's loss, and the flags that help.

    A few times near an end may have nearly all the weight: where the network predicts x1 and the loss compares
    velocities, an error of the output is multiplied by 1 / alpha. The noisy times may have so little weight that a
    short run never learns them. Or small errors of the output change what an image shows. docs/pairs.md has
    measurements.
    """
    reasons, weights = list[str](), drawn_weights(config, process)
    share, error = noisy_share(config, process), error_at_noise(config, process)
    if is_uneven(weights):
        times = [config.t_min, (config.t_min + config.t_max) / 2, config.t_max]
        at = effective_weight(config, process, torch.tensor(times, dtype=torch.float64)).tolist()
        shares = weights.cumsum(0) / weights.sum()
        reasons.append(
            f"may learn badly or not at all: the loss weighs a squared error of the network's output by {at[0]:.3g} at "
            f't={times[0]:g}, {at[1]:.3g} at t={times[1]:g}, {at[2]:.3g} at t={times[2]:g}. '
            f'{shares[len(shares) // 100 - 1]:.0%} of the weight falls on 1% of the drawn times, '
            f'{1 - shares[len(shares) // 2 - 1]:.1g} of it on half of them.'
        )
    elif share < LEAST_NOISY_SHARE:
        reasons.append(
            'learns slowly what an image shows: that is decided at noisy times (sigma > 3 alpha), which have only '
            f'{share:.1%} of the weight in this loss.'
        )
    if error > LARGEST_ERROR_AT_NOISE:
        reasons.append(
            f'{"This output" if reasons else "learns slowly what an image shows: this output"} enlarges small errors: '
            f'where it is wrong by 1% of its size, at sigma = 10 alpha, x1 - x0 is wrong by {error:.2g}%.'
        )
    if not reasons:
        return None
    names = ('model_type', 'target_type', 'loss_weight', 'time_sampler')
    given = ', '.join(f'{name}={getattr(config, name)!r}' for name in names)
    best, kept = find_remedy(config, process), well_spread(config, process)
    if best is None:
        remedy = 'Let more noise in: raise --t_max, or the --sigma_max or --beta_max of the process.'
    elif kept and 'model_type' in best:
        remedy = f'Use {as_flags(best)}, or, to keep the output, many more steps and {as_flags(kept)}.'
    else:
        remedy = f'Use {as_flags(best)}.'
    return f'{given} {" ".join(reasons)} {remedy}'


def find_remedy(config: Config, process: GaussianProcess) -> dict[str, Any] | None:
    """The settings to change so that no warning is left; None if nothing helps, as in a time range without noise."""
    if error_at_noise(config, process) <= LARGEST_ERROR_AT_NOISE:
        return well_spread(config, process)
    change = well_spread(dataclasses.replace(config, model_type='F'), process)
    return None if change is None else dict(model_type='F') | change


def well_spread(config: Config, process: GaussianProcess) -> dict[str, Any] | None:
    """The fewest changes that spread the weight well over the times: other times, the output's own loss, another loss
    or weight, or two of these. {} if it is well spread already, None if nothing helps."""
    times = [{}, *(dict(time_sampler=name) for name in TIME_SAMPLERS), dict(time_sampler='logit_normal', time_mean=1.0)]
    losses = [{}, *(dict(target_type=name) for name in (config.model_type, *ROWS))]
    losses += [dict(loss_weight=name) for name in LOSS_WEIGHTS]
    for loss, time in sorted(itertools.product(losses, times), key=lambda pair: len(pair[0]) + bool(pair[1])):
        change: dict[str, Any] = {name: v for name, v in {**loss, **time}.items() if v != getattr(config, name)}
        changed = dataclasses.replace(config, **change)
        try:
            get_loss_weight(changed)
            even = not is_uneven(drawn_weights(changed, process))
            if even and noisy_share(changed, process) >= LEAST_NOISY_SHARE:
                return change
        except SettingError:  # infinite at an end of the range, or no time of the sampler is in it
            continue
    return None


def as_flags(settings: dict[str, Any]) -> str:
    return ' '.join(f'--{name} {value}' for name, value in settings.items())


def lr_warning(config: Config) -> str | None:
    """None, or a warning that the learning rate does not suit the optimizer, with the remedy."""
    if config.optimizer not in ('adamw', 'adam', 'adamax', 'nadam', 'radam') or config.base_lr <= 3e-3:
        return None
    given = f'base_lr={config.base_lr:g}, optimizer={config.optimizer!r}'
    return f'{given}: muon learns well at this rate, but Adam and its kin need 1e-3 or less. Pass --base_lr 1e-3.'


def padding_warning(config: Config, sides: Sequence[int]) -> str | None:
    """None, or a warning that a UNet with circular padding cannot wrap around at these sides of x0, with the remedy."""
    multiple = 2 ** (len(config.channel_mults) - 1)
    if (config.network, config.padding) != ('unet', 'circular') or not any(side % multiple for side in sides):
        return None
    return (
        f"padding='circular': the UNet continues sides of {'x'.join(map(str, sides))} to multiples of {multiple}, so "
        'it does not see that the last values meet the first ones. Use fewer --channel_mults, or data of other sides.'
    )


def data_warning(config: Config, num_classes: int, size: int) -> str | None:
    """None, or a warning that a setting does not suit this number of classes or of training items, with the remedy."""
    dropout, n = config.label_dropout, config.global_batch_size
    if num_classes == 0 and dropout not in (1, config.baseline()['label_dropout']):
        return (
            f'label_dropout={dropout:g}: the data have no classes, so only conditions that have a null value are '
            'dropped (null_cond of the trainer class).'
        )
    if n > 2 * size:
        return f'global_batch_size={n}: each step reads the {size} training items {n / size:.0f} times.'
    return None


# ---------------------------------------------------------------- checks on the first images


def round_trip_warning(x: Tensor, back: Tensor) -> str | None:
    """Why `back` = decode(encode(x)) of the first data x (B, ...) looks wrong, or None."""
    if back.shape != x.shape or not x.is_floating_point():  # a decoder may make pictures of latents
        return None
    error, std = (float(double(v).square().mean().sqrt()) for v in (back - x, x - x.mean()))
    if not error > 0.5 * std:
        return None
    return (
        f'decode(encode(x)) differs from the first data x by {error:.3g} (root mean square; their standard deviation '
        f'is {std:.3g}), so samples are shown and written on another scale. Override decode as the inverse of encode.'
    )


def scale_warning(x0: Tensor, sigma_data: float) -> str | None:
    """Why x0 (B, ...) of the first images looks wrong, with the numbers and the remedy, or None."""
    if not x0.is_floating_point():
        return None
    finite = x0[x0.isfinite()]
    bad = x0.numel() - finite.numel()
    low, high = (float(v) for v in finite.aminmax()) if finite.numel() else (float('nan'), float('nan'))
    numbers = f'x0 of the first {len(x0)} images lies in [{low:.4g}, {high:.4g}]'
    if bad:
        return f'{numbers}, and {bad} of its {x0.numel()} values are not finite. Fix the data, or override encode.'
    if low == high:
        return f'x0 of the first {len(x0)} images is {low:.4g} everywhere. Look at the data, and at encode.'
    std = float(double(finite).std())
    if std < sigma_data / 5:
        return (
            f'{numbers}, standard deviation {std:.3g}. The defaults are made for about sigma_data={sigma_data:g}, and '
            'samples of such data are mostly noise. Check that images use their whole range of values, override '
            f'encode and decode, or set --sigma_data {std:.3g}.'
        )
    as_assumed = 0.8 < std / sigma_data < 1.25 and abs(float(finite.mean())) < sigma_data and high - low < 20 * std
    if (low < -1.5 or high > 1.5) and not as_assumed:
        return (
            f'{numbers}, standard deviation {std:.3g}. The defaults (sigma_data={sigma_data:g}, the time grid) are '
            'made for data in [-1, 1]: override encode and decode, e.g. with '
            f'(x - {float(finite.mean()):.3g}) / {2 * std:.3g} and its inverse, or set --sigma_data {std:.3g}.'
        )
    return None


def condition_warning(cond: dict[str, Tensor]) -> str | None:
    """Why a condition (B, ...) of the first images is too large for a network, with the remedy, or None."""
    for name, value in cond.items():
        x = double(value)
        if x.numel() and float(x.abs().max()) > LARGEST_CONDITION:
            return (
                f'condition {name!r} of the first {len(x)} images lies in [{x.min():.4g}, {x.max():.4g}], and networks '
                f'need numbers of order 1. Store (x - {x.mean():.3g}) / {max(float(x.std()), 1e-6):.3g}, or the like.'
            )
    return None
