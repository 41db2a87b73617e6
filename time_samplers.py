"""How training times are drawn: a time sampler is an inverse CDF, t = sampler(u).

u ~ U(0, 1) and t have shape (n,); t lies in [t_min, t_max]. Whether u is independent or stratified is the trainer's
business (`BaseDiffusionTrainer.uniforms`), so both work with every sampler.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from config import Config, SettingError, choose

TimeSampler = Callable[[Tensor], Tensor]


def uniform(t_min: float, t_max: float) -> TimeSampler:
    """t ~ U(t_min, t_max)."""
    return lambda u: (t_min + (t_max - t_min) * u).clamp(t_min, t_max)


def logit_normal(mean: float, std: float, t_min: float, t_max: float) -> TimeSampler:
    """logit(t) ~ N(mean, std^2), conditioned on [t_min, t_max] (Esser et al. 2024, section 3.1)."""
    ends = torch.tensor([t_min, t_max], dtype=torch.float64)
    low, high = torch.special.ndtr((torch.logit(ends) - mean) / std).tolist()
    if not high > low:
        raise SettingError(
            f'time_mean={mean:g}, time_std={std:g}: no time between t_min={t_min:g} and t_max={t_max:g} is likely at all. Use --time_mean 0 --time_std 1.'
        )

    def sampler(u: Tensor) -> Tensor:
        z = torch.special.ndtri(low + (high - low) * u.double())
        return torch.sigmoid(mean + std * z).to(u.dtype).clamp(t_min, t_max)

    return sampler


TIME_SAMPLERS: dict[str, Callable[[Config], TimeSampler]] = {
    'uniform': lambda config: uniform(config.t_min, config.t_max),
    'logit_normal': lambda config: logit_normal(config.time_mean, config.time_std, config.t_min, config.t_max),
}


def get_time_sampler(config: Config) -> TimeSampler:
    """Raises SettingError for an unknown `time_sampler`."""
    return choose('time_sampler', config.time_sampler, TIME_SAMPLERS)(config)
