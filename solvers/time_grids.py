"""Time grids: the n + 1 times that a solver of n steps visits, from t_max down to t_min."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from config import SettingError
from processes import GaussianProcess

# (sigma / alpha, sigma_data) -> a variable u that rises from noise to data, and its inverse: (u, sigma_data) -> ratio
Variable = tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]


def logistic(centre: float, scale: float = 1.2) -> Variable:
    """Equal shares of a logistic distribution of log(alpha / sigma), centred where sigma = centre sigma_data alpha."""
    return (
        lambda ratio, std: 1 / (1 + (ratio / (centre * std)) ** (1 / scale)),
        lambda u, std: centre * std * (1 / u - 1) ** scale,
    )


GRID_VARIABLES: dict[str, Variable] = {
    'log_snr': (lambda ratio, std: -ratio.log(), lambda u, std: (-u).exp()),  # Lu et al. 2022, section 3.3
    'edm': (lambda ratio, std: -(ratio ** (1 / 7)), lambda u, std: (-u) ** 7),  # Karras et al. 2022, eq. 5, rho = 7
    'cosine': (lambda ratio, std: -ratio.atan(), lambda u, std: (-u).tan()),  # equal angles
    # dense where images form, between what `uniform` is for rf (scale 1) and log_snr (scale infinite)
    'logistic': logistic(centre=0.6),
}


def equal_steps(
    name: str, process: GaussianProcess, t_max: float, t_min: float, n: int, variable: Variable | None = None
) -> Tensor:
    """n + 1 times, float64, at equal steps of a variable, by default the one of this name in GRID_VARIABLES.

    Raises SettingError if it is infinite at an end.
    """
    forward, inverse = variable or GRID_VARIABLES[name]
    ends = torch.tensor([t_max, t_min], dtype=torch.float64)
    first, last = forward((-process.log_snr(ends) / 2).exp(), process.sigma_data).tolist()
    if not (math.isfinite(first) and math.isfinite(last)):
        raise SettingError(
            f'time_grid={name!r} is infinite at t_max={t_max:g} or t_min={t_min:g}. Use --t_min 0.001 --t_max 0.999.'
        )
    inner = inverse(torch.linspace(first, last, n + 1, dtype=torch.float64)[1:-1], process.sigma_data)
    return torch.cat([ends[:1], process.time_of_log_snr(-2 * inner.log()), ends[1:]])


def logistic_of_few(process: GaussianProcess, t_max: float, t_min: float, n: int) -> Tensor:
    """The grid logistic for at most some ten steps: at more noise, the more the fewer they are."""
    return equal_steps('logistic', process, t_max, t_min, n, logistic(centre=1.64 - 0.08 * n))


TimeGrid = Callable[[GaussianProcess, float, float, int], Tensor]

# name -> (process, t_max, t_min, n) -> n + 1 decreasing times, float64.
TIME_GRIDS: dict[str, TimeGrid] = {
    'uniform': lambda process, t_max, t_min, n: torch.linspace(t_max, t_min, n + 1, dtype=torch.float64),
} | {name: partial(equal_steps, name) for name in GRID_VARIABLES}
