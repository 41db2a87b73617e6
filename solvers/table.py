"""The tables: SOLVERS, SDE_NOISES, LAST_STEPS, TIME_GRIDS. New entries are tested automatically."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from config import SettingError
from processes import Coefs, GaussianProcess
from solvers.multistep import Multistep, angular, exponential, gaussian
from solvers.one_step import dopri5, euler, euler_maruyama, heun, midpoint, posterior_mean, rk4
from solvers.step import StepFn

# ---------------------------------------------------------------- time grids: the n + 1 times, from t_max down to t_min

# (sigma / alpha, sigma_data) -> a variable u that rises from noise to data, and its inverse: (u, sigma_data) -> ratio
Variable = tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]


def logistic(centre: float, scale: float) -> Variable:
    """Equal shares of a logistic distribution of log(alpha / sigma), centred where sigma = centre sigma_data alpha."""
    return (
        lambda ratio, std: 1 / (1 + (ratio / (centre * std)) ** (1 / scale)),
        lambda u, std: centre * std * (1 / u - 1) ** scale,
    )


CENTRE, SCALE = 0.6, 1.1  # the grid logistic, for points
GRID_VARIABLES: dict[str, Variable] = {
    'log_snr': (lambda ratio, std: -ratio.log(), lambda u, std: (-u).exp()),  # Lu et al. 2022, section 3.3
    'edm': (lambda ratio, std: -(ratio ** (1 / 7)), lambda u, std: (-u) ** 7),  # Karras et al. 2022, eq. 5, rho = 7
    'cosine': (lambda ratio, std: -ratio.atan(), lambda u, std: (-u).tan()),  # equal angles
    # dense where images form, between what `uniform` is for rf (scale 1) and log_snr (scale infinite)
    'logistic': logistic(CENTRE, SCALE),
}
LARGEST_SHIFT = 8.0  # 64 x 64 pixels; fine detail needs small steps near the data in pictures of any size


def shift_of(shape: tuple[int, ...]) -> float:
    """The factor of sigma / alpha by which the grid logistic is shifted for items (C, ...) of this shape.

    With k^2 times as many places (pixels, voxels), noise averages out over k^2 of them, so shapes form at k times the
    noise (Esser et al. 2024, eq. 23). The grid was chosen on points and on 8 x 8 pixels; for these, k is 1.
    """
    return min(max(1.0, math.sqrt(math.prod(shape[1:]) / 64)), LARGEST_SHIFT)


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


TimeGrid = Callable[[GaussianProcess, float, float, int], Tensor]

# name -> (process, t_max, t_min, n) -> n + 1 decreasing times, float64.
TIME_GRIDS: dict[str, TimeGrid] = {
    'uniform': lambda process, t_max, t_min, n: torch.linspace(t_max, t_min, n + 1, dtype=torch.float64),
} | {name: partial(equal_steps, name) for name in GRID_VARIABLES}


# ---------------------------------------------------------------- solvers


@dataclass(frozen=True)
class Solver:
    step: StepFn
    nfe: int | None  # network evaluations per step; None: it varies
    # The error is O(h^order) in the step h; for an SDE, the error in distribution. This is the global order: the first
    # steps of a multistep method, and the last ones with `taper`, are of lower order.
    order: int
    stochastic: bool = False
    memory: int = 0  # earlier predictions that a step looks back at
    few: StepFn | None = None  # replaces `step` on a path of at most `few_steps` steps
    few_steps: int = 10  # with so few, extrapolation by polynomials is unreliable
    reads: str = ''  # part of a prediction that steps use: velocity or x0; '': unknown, so paths start at t_max

    def for_steps(self, n: int, shift: float = 1.0) -> tuple[StepFn, Mapping[str, TimeGrid]]:
        """The step and the table of time grids for a path of n steps. `shift`: see shift_of.

        A solver that has its own step for `few` steps takes them at more noise on the grid logistic.
        """
        few = self.few if n <= self.few_steps else None
        if few is None and shift == 1:
            return self.step, TIME_GRIDS
        variable = logistic(shift * CENTRE, SCALE) if few is None else logistic(shift * (1.64 - 0.08 * n), 1.2)
        return few or self.step, TIME_GRIDS | {'logistic': partial(equal_steps, 'logistic', variable=variable)}


# Song et al. 2021a, eq. 12 with sigma = 0, for any process
ddim = Multistep(exponential, 'x0', order=1)
adams_few = Multistep(gaussian, 'x0', order=3, corrector=3)  # for `adams` in few steps

# name -> Solver of a step (x, t, s, predict, noise) -> x at s < t. The step finds the last `memory` predictions in
# `predict.past`, and makes one more.
SOLVERS: dict[str, Solver] = {
    'euler': Solver(euler, nfe=1, order=1, reads='velocity'),
    'heun': Solver(heun, nfe=2, order=2, reads='velocity'),
    'midpoint': Solver(midpoint, nfe=2, order=2, reads='velocity'),
    'rk4': Solver(rk4, nfe=4, order=4, reads='velocity'),
    'dopri5': Solver(dopri5, nfe=None, order=5, reads='velocity'),
    'ddim': Solver(ddim, nfe=1, order=1, reads='x0'),
    # Lu et al. 2022b, algorithm 2 with exact integrals, and its third order
    'dpmpp_2m': Solver(Multistep(exponential, 'x0', order=2), nfe=1, order=2, memory=1, reads='x0'),
    'dpmpp_3m': Solver(Multistep(exponential, 'x0', order=3), nfe=1, order=3, memory=2, reads='x0'),
    # Zhao et al. 2023, p = 3 with exact integrals
    'unipc': Solver(Multistep(exponential, 'x0', order=3, corrector=4), nfe=1, order=4, memory=3, reads='x0'),
    # the predictor-corrector of Adams, Bashforth and Moulton (Hairer et al. 1993, section III.1) in the angle;
    # it takes v, which is as well-conditioned as x0
    'adams': Solver(
        Multistep(angular, 'v', order=4, corrector=5, taper=True), nfe=1, order=5, memory=4, few=adams_few, reads='x0'
    ),
    'euler_maruyama': Solver(euler_maruyama, nfe=1, order=1, stochastic=True, reads='velocity'),
    # Lu et al. 2022b, SDE-DPM-Solver++(2M); Xue et al. 2023 for noise other than natural
    'sde_dpmpp_2m': Solver(
        Multistep(exponential, 'x0', order=2, stochastic=True), nfe=1, order=2, stochastic=True, memory=1, reads='x0'
    ),
}

# name -> coefs -> w^2 / (2 sigma) of the SDE, (B,)
SDE_NOISES: dict[str, Callable[[Coefs], Tensor]] = {
    'natural': lambda c: c.delta / c.sigma,  # w = g, the noise of the process itself (Song et al. 2021, eq. 6)
    'sigma': lambda c: c.sigma,  # w = sqrt(2) sigma
    # w^2 = alpha sigma_dot - sigma alpha_dot: constant in time for rf (1) and cosine (pi / 2), and the same SDE on
    # other processes. Near the data it is too much noise for one step, so `relative_noise` lowers it there
    'constant': lambda c: (c.alpha * c.sigma_dot - c.sigma * c.alpha_dot) / (2 * c.sigma),
}

# name -> the last step of a stochastic solver, which adds no noise, since that would stay in the image.
LAST_STEPS: dict[str, StepFn] = {'mean': posterior_mean, 'ode': ddim}
