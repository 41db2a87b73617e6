"""What a network may output, what a loss may compare, and how one becomes the other.

Every prediction type is one row y = a x0 + b x1 of ROWS, with coefficients that depend on t through the process.
Together with xt = alpha x0 + sigma x1 it is a 2x2 system,

    det = alpha b - sigma a,    x0 = (b xt - sigma y) / det,    x1 = (alpha y - a xt) / det,

so one solution serves all pairs and a new type is one row. None marks a coefficient that is zero by structure:
such a row gives its own x1 = y / b or x0 = y / a directly, and the other from xt.

Singular ends (nothing is added to a denominator to hide them; `check_time_range` keeps [t_min, t_max] away):
where alpha = 0, x1 and score outputs do not determine x0; where sigma = 0, an x0 output does not determine x1, and
the score is infinite; where det = 0, a velocity or v output determines neither.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from config import Config, SettingError, choose
from processes import Coefs, GaussianProcess
from utils import bcast_right

# type -> (a, b) of y = a x0 + b x1; each a number, a (B,) tensor, or None for a structural zero.
ROWS: dict[str, Callable[[Coefs], tuple[Tensor | float | None, Tensor | float | None]]] = {
    'x0': lambda c: (1.0, None),
    'x1': lambda c: (None, 1.0),  # the noise
    'score': lambda c: (None, -1 / c.sigma),  # grad log p_t(xt | x0), Song et al. 2021
    'velocity': lambda c: (c.alpha_dot, c.sigma_dot),  # d xt / dt, Lipman et al. 2023
    'v': lambda c: (-c.sigma, c.alpha),  # Salimans and Ho 2022, appendix D, for any alpha and sigma
}


class Prediction:
    """One knowledge of (x0, x1), read as any type: `.x0 .x1 .score .velocity .v`, each (B, C, H, W).

    Each is computed when first asked for; those given at construction are returned as they came.
    """

    def __init__(self, xt: Tensor, coefs: Coefs, **known: Tensor):
        self.xt, self.coefs, self.given = xt, coefs, tuple(known)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Tensor:
        if name not in ROWS:
            raise AttributeError(f'{name!r} is not a prediction type; there are {", ".join(ROWS)}')
        value = self._solve(name) if name in ('x0', 'x1') else self._row(name)
        setattr(self, name, value)
        return value

    def _row(self, name: str) -> Tensor:
        """a x0 + b x1, touching only the terms that the row has."""
        a, b = self._coefficients(name)
        terms = [k * getattr(self, end) for k, end in ((a, 'x0'), (b, 'x1')) if k is not None]
        return sum(terms[1:], terms[0])

    def _solve(self, end: str) -> Tensor:
        """x0 or x1 from xt and the one given type."""
        (given,) = self.given
        y, (a, b) = getattr(self, given), self._coefficients(given)
        alpha, sigma = self._image(self.coefs.alpha), self._image(self.coefs.sigma)
        if a is None:
            return y / b if end == 'x1' else (self.xt - sigma * self.x1) / alpha
        if b is None:
            return y / a if end == 'x0' else (self.xt - alpha * self.x0) / sigma
        det = alpha * b - sigma * a
        return (b * self.xt - sigma * y) / det if end == 'x0' else (alpha * y - a * self.xt) / det

    def _coefficients(self, name: str) -> tuple[Tensor | float | None, ...]:
        return tuple(map(self._image, ROWS[name](self.coefs)))

    def _image(self, k: Tensor | float | None) -> Tensor | float | None:
        return bcast_right(k, self.xt.ndim) if isinstance(k, Tensor) else k


def get_model_convert_fn(model_type: str) -> Callable[[Tensor, Tensor, Tensor, Coefs], Prediction]:
    """`convert(model_out, t, xt, coefs)`: a network output of this type, as a Prediction. Raises SettingError if unknown."""
    choose('model_type', model_type, ROWS)

    def convert(model_out: Tensor, t: Tensor, xt: Tensor, coefs: Coefs) -> Prediction:
        return Prediction(xt, coefs, **{model_type: model_out})

    return convert


def get_target_fn() -> Callable[[Tensor, Tensor, Tensor, Tensor, Coefs], Prediction]:
    """`target_fn(t, xt, x0, x1, coefs)`: every possible target, as a Prediction."""

    def target_fn(t: Tensor, xt: Tensor, x0: Tensor, x1: Tensor, coefs: Coefs) -> Prediction:
        return Prediction(xt, coefs, x0=x0, x1=x1)

    return target_fn


def check_time_range(config: Config, process: GaussianProcess, limit: float = 1e6) -> None:
    """Raise SettingError if the network's output, at t_min or t_max, cannot become what training and sampling need.

    The output itself must be finite; training needs the target, the ODE the velocity and the SDE x1. An error of the output must not be multiplied by
    more than `limit`, beyond which float32 has no digit left.
    """
    convert = get_model_convert_fn(config.model_type)
    choose('target_type', config.target_type, ROWS)
    for setting in ('t_min', 't_max'):
        time = getattr(config, setting)
        t = torch.tensor([time], dtype=torch.float64)
        coefs, one = process(t), torch.ones(1, 1, dtype=torch.float64)
        for needed in dict.fromkeys((config.model_type, config.target_type, 'velocity', 'x1')):
            gain = getattr(convert(one, t, 0 * one, coefs), needed)
            scale = getattr(Prediction(0 * one, coefs, x0=one, x1=one), needed)
            if not max(gain.abs().item(), scale.abs().item()) <= limit:  # also for nan
                remedy = f'--t_min {max(0.001, time):g}' if setting == 't_min' else f'--t_max {min(0.999, time):g}'
                raise SettingError(
                    f'{setting}={time:g} touches a singular end: with process_name={config.process_name!r}, '
                    f'model_type={config.model_type!r} cannot give the {needed} there '
                    f'(target_type={config.target_type!r}; the ODE needs velocity, the SDE x1). Use {remedy}.'
                )
