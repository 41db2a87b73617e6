"""Time samplers, which draw the training times: each is an inverse CDF, t = sampler(u).

u ~ U(0, 1) and t have shape (n,), one type and one device; t lies in [t_min, t_max]. `Batches.uniforms` in
training/batches.py makes u independent, stratified or antithetic, so all three work with every sampler. A call copies
nothing to the device: everything that does not depend on u is computed once, as floats.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from config import Config, SettingError, choose
from processes import GaussianProcess, get_process
from utils import double

TimeSampler = Callable[[Tensor], Tensor]


def uniform(t_min: float, t_max: float) -> TimeSampler:
    """t ~ U(t_min, t_max)."""
    return lambda u: (t_min + (t_max - t_min) * u).clamp(t_min, t_max)


def truncated_normal(mean: float, std: float, low: float, high: float) -> TimeSampler:
    """u -> z ~ N(mean, std^2), conditioned on [low, high], in float64 if possible.

    The CDF is evaluated in the tail where it is small, so that no digits cancel. Raises SettingError if nearly the
    whole distribution lies outside.
    """
    a, b = (low - mean) / std, (high - mean) / std
    sign = -1 if a > 0 else 1  # in the left half small probabilities keep their digits
    cdf_a, cdf_b = (math.erfc(-sign * x / math.sqrt(2)) / 2 for x in (a, b))
    if abs(cdf_b - cdf_a) < 1e-3:
        raise SettingError(
            f'time_mean={mean:g}, time_std={std:g}: less than a thousandth of this normal distribution lies between '
            f'{low:g} and {high:g}, where t_min and t_max are. Use --time_mean {min(max(mean, low), high):.3g}.'
        )

    def sampler(u: Tensor) -> Tensor:
        u = double(u)
        return mean + std * sign * torch.special.ndtri(cdf_a + (cdf_b - cdf_a) * u)

    return sampler


def logit_normal(mean: float, std: float, t_min: float, t_max: float) -> TimeSampler:
    """logit(t) ~ N(mean, std^2), conditioned on [t_min, t_max] (Esser et al. 2024, section 3.1)."""
    normal = truncated_normal(mean, std, *torch.tensor([t_min, t_max], dtype=torch.float64).logit().tolist())
    return lambda u: torch.sigmoid(normal(u)).to(u.dtype).clamp(t_min, t_max)


def log_normal(process: GaussianProcess, mean: float, std: float, t_min: float, t_max: float) -> TimeSampler:
    """log(sigma / alpha) ~ N(mean, std^2), conditioned on [t_min, t_max].

    Karras et al. 2022, table 1, has mean -1.2 and std 1.2.
    """
    ends = -process.log_snr(torch.tensor([t_min, t_max], dtype=torch.float64)) / 2
    normal = truncated_normal(mean, std, *ends.tolist())
    return lambda u: process.time_of_log_snr(-2 * normal(u)).to(u.dtype).clamp(t_min, t_max)


TIME_SAMPLERS: dict[str, Callable[[Config], TimeSampler]] = {
    'uniform': lambda config: uniform(config.t_min, config.t_max),
    'logit_normal': lambda config: logit_normal(config.time_mean, config.time_std, config.t_min, config.t_max),
    'log_normal': lambda config: log_normal(
        get_process(config), config.time_mean, config.time_std, config.t_min, config.t_max
    ),
}


def get_time_sampler(config: Config) -> TimeSampler:
    """Raises SettingError for an unknown `time_sampler`."""
    return choose('time_sampler', config.time_sampler, TIME_SAMPLERS)(config)
