"""The prediction types that a network may output and a loss may compare, their conversions, and loss weights.

Every prediction type is one row y = a x0 + b x1 of ROWS, with coefficients that depend on t through the process.
Together with xt = alpha x0 + sigma x1 it is a 2x2 system,

    det = alpha b - sigma a,    x0 = (b xt - sigma y) / det,    x1 = (alpha y - a xt) / det,

so one solution serves all pairs and a new type is one row. None marks a coefficient that is always zero: such a row
gives x1 = y / b or x0 = y / a directly, and xt gives the other.

Singular ends (nothing is added to a denominator to hide them; `check_time_range` keeps [t_min, t_max] away):
where alpha = 0, x1 and score outputs do not determine x0; where sigma = 0, an x0 output does not determine x1, and
the score is infinite; where det = 0, a velocity or v output determines neither. F has no singular end: its det is
-1 / (c_in sigma_data).

F is the preconditioned output of Karras et al. 2022 (eq. 7 and table 1, there for alpha = 1), for any alpha and sigma
and data of standard deviation sigma_data:

    x0 = c_skip xt + c_out F,    c_skip = alpha sigma_data^2 c_in^2,    c_out = sigma sigma_data c_in,
    c_in^-2 = alpha^2 sigma_data^2 + sigma^2

A loss is w(coefs) times the squared error of the target, with w (B,) of LOSS_WEIGHTS. A published loss is a pair of
weight and target; the docstring of each weight names its target. The same loss can be written with another target: if D
is the squared error of x0, the error of a type y = a x0 + b x1 is (a - b alpha / sigma)^2 D, so the error of the noise
x1 is SNR D, and the error of F is D / c_out^2. These are the same loss, whatever the network outputs:

    target x0, weight edm    = target F,  weight none
    target x1, weight none   = target x0, weight SNR (Ho et al. 2020, eq. 14)
    target v,  weight none   = target x0, weight SNR + 1 where variance is preserved (Salimans and Ho 2022, section 4)
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from config import Config, SettingError, choose
from processes import Coefs, GaussianProcess, check_process, get_process
from utils import bcast_right, double

# type -> (a, b) of y = a x0 + b x1; each a number, a (B,) tensor, or None for a structural zero.
ROWS: dict[str, Callable[[Coefs], tuple[Tensor | float | None, Tensor | float | None]]] = {
    'x0': lambda c: (1.0, None),
    'x1': lambda c: (None, 1.0),  # the noise
    'score': lambda c: (None, -1 / c.sigma),  # grad log p_t(xt | x0), Song et al. 2021
    'velocity': lambda c: (c.alpha_dot, c.sigma_dot),  # d xt / dt, Lipman et al. 2023
    'v': lambda c: (-c.sigma, c.alpha),  # Salimans and Ho 2022, appendix D, for any alpha and sigma
    'F': lambda c: (
        c.sigma * c.c_in / c.sigma_data,
        -c.alpha * c.c_in * c.sigma_data,
    ),  # x0 = c_skip xt + c_out F, above
}


class Prediction:
    """A prediction of (x0, x1) that can be read as any type: `.x0 .x1 .score .velocity .v .F`, each (B, C, H, W).

    Each is computed when first read; the types given at construction are returned unchanged.
    """

    def __init__(self, xt: Tensor, coefs: Coefs, **known: Tensor):
        self.xt, self.coefs, self.given = xt, coefs, tuple(known)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Tensor:
        if name not in ROWS:
            raise AttributeError(f'{name!r} is not a prediction type; the types are {", ".join(ROWS)}')
        value = self._solve(name) if name in ('x0', 'x1') else self._row(name)
        setattr(self, name, value)
        return value

    def _row(self, name: str) -> Tensor:
        """a x0 + b x1, touching only the terms that the row has."""
        a, b = self._coefficients(name)
        terms: list[Tensor] = [k * getattr(self, end) for k, end in ((a, 'x0'), (b, 'x1')) if k is not None]
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

    def _coefficients(self, name: str) -> tuple[Any, ...]:
        return tuple(map(self._image, ROWS[name](self.coefs)))

    def _image(self, k: Tensor | float | None) -> Any:
        """k in a shape that multiplies xt: a tensor (B, 1, ...), a number, or None."""
        return bcast_right(k, self.xt.ndim) if isinstance(k, Tensor) else k


def get_model_convert_fn(model_type: str) -> Callable[[Tensor | tuple, Tensor, Tensor, Coefs], Prediction]:
    """`convert(model_out, t, xt, coefs)`: a network output of this type, as a Prediction.

    A network may return a tuple; its first part is the prediction. Raises SettingError for an unknown `model_type`;
    `convert` raises ValueError for an output of another shape than xt.
    """
    choose('model_type', model_type, ROWS)

    def convert(model_out: Tensor | tuple, t: Tensor, xt: Tensor, coefs: Coefs) -> Prediction:
        out = model_out[0] if isinstance(model_out, tuple) else model_out
        if out.shape != xt.shape:  # one channel would be broadcast against two
            raise ValueError(
                f'the network returns {tuple(out.shape)} for xt of shape {tuple(xt.shape)}: an output of '
                f'model_type={model_type!r} must have the shape of xt. Return other outputs after it, in a tuple.'
            )
        return Prediction(xt, coefs, **{model_type: out})

    return convert


def get_target_fn() -> Callable[[Tensor, Tensor, Tensor, Tensor, Coefs], Prediction]:
    """`target_fn(t, xt, x0, x1, coefs)`: every possible target, as a Prediction."""

    def target_fn(t: Tensor, xt: Tensor, x0: Tensor, x1: Tensor, coefs: Coefs) -> Prediction:
        return Prediction(xt, coefs, x0=x0, x1=x1)

    return target_fn


def determinant(name: str, coefs: Coefs) -> Tensor:
    """alpha b - sigma a of the row y = a x0 + b x1, (B,): how far y moves if (x0, x1) moves by (-sigma, alpha)."""
    a, b = (0.0 if k is None else k for k in ROWS[name](coefs))
    return coefs.alpha * b - coefs.sigma * a


def error_factor(model_type: str, target_type: str, coefs: Coefs) -> Tensor:
    """d target / d output, (B,): by how much an error of the output is multiplied when it is read as the target.

    At a given xt, x0 and x1 move along (-sigma, alpha), so the factor is the quotient of the two determinants.
    """
    if model_type == target_type:
        return torch.ones_like(coefs.alpha)

    return determinant(target_type, coefs) / determinant(model_type, coefs)


def first_singular(
    process: GaussianProcess, model_type: str, t: float, needed: Iterable[str], limit: float = 1e6
) -> str | None:
    """The first of the types `needed` that an output of `model_type` cannot give at time t; None if it can give all.

    The types must be finite there, and an error of the output must not be multiplied by more than `limit`, beyond which
    float32 has no digit left.
    """
    time, one = torch.tensor([t], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    coefs = process(time)
    output = get_model_convert_fn(model_type)(one, time, 0 * one, coefs)
    for name in needed:
        scale = getattr(Prediction(0 * one, coefs, x0=one, x1=one), name)
        if not max(getattr(output, name).abs().item(), scale.abs().item()) <= limit:  # true for nan too
            return name
    return None


def check_ends(
    process: GaussianProcess, model_type: str, times: Iterable[float], needed: Iterable[str] = ('velocity', 'x1')
) -> None:
    """Raise SettingError if one of the times is a singular end for this output. For callers without a config."""
    choose('model_type', model_type, ROWS)
    for t in times:
        singular = first_singular(process, model_type, t, needed)
        if singular:
            raise SettingError(
                f'a network of model_type={model_type!r} cannot give the {singular} at t={t:g}, a singular end. '
                'Use t_min=0.001, t_max=0.999.'
            )


def check_time_range(config: Config, process: GaussianProcess) -> None:
    """Raise SettingError for a bad process, or an output that cannot become what is needed at t_min or at t_max.

    The output itself must be finite; training needs the target, the ODE the velocity and the SDE x1.
    """
    choose('target_type', config.target_type, ROWS)
    check_process(process, config.t_min, config.t_max)
    for setting in ('t_min', 't_max'):
        time = getattr(config, setting)
        needed = first_singular(
            process, config.model_type, time, dict.fromkeys((config.model_type, config.target_type, 'velocity', 'x1'))
        )
        if needed:
            remedy = f'--t_min {max(0.001, time):g}' if setting == 't_min' else f'--t_max {min(0.999, time):g}'
            raise SettingError(
                f'{setting}={time:g} touches a singular end: with process_name={config.process_name!r}, '
                f'model_type={config.model_type!r} cannot give the {needed} there '
                f'(target_type={config.target_type!r}; the ODE needs velocity, the SDE x1). Use {remedy}.'
            )


# ---------------------------------------------------------------- loss weights

LossWeight = Callable[[Coefs], Tensor]


def min_snr(c: Coefs, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma), for target x0 (Hang et al. 2023, section 3.4)."""
    return c.log_snr.exp().clamp(max=gamma)


def edm(c: Coefs) -> Tensor:
    """1 / c_out^2 = (alpha^2 sigma_data^2 + sigma^2) / (sigma sigma_data)^2, for target x0.

    Karras et al. 2022, table 1, for any alpha.
    """
    return 1 / (c.sigma * c.sigma_data * c.c_in).square()


def elbo(c: Coefs) -> Tensor:
    """-1/2 d log-SNR / dt, for target x1 and uniform times.

    The loss is then a bound on -log p(x0), per pixel (Kingma et al. 2021, eq. 17).
    """
    return c.sigma_dot / c.sigma - c.f


def sigmoid(c: Coefs, bias: float = 2.0) -> Tensor:
    """The ELBO's weight times sigmoid(bias - log-SNR), for target x1 and uniform times.

    Kingma and Gao 2023, section 4.
    """
    return elbo(c) * torch.sigmoid(bias - c.log_snr)


# name -> coefs -> (B,)
LOSS_WEIGHTS: dict[str, LossWeight] = {
    'none': lambda c: torch.ones_like(c.alpha),
    'min_snr': min_snr,
    'edm': edm,
    'elbo': elbo,
    'sigmoid': sigmoid,
}


def get_loss_weight(config: Config) -> LossWeight:
    """Raises SettingError for an unknown `loss_weight`, and for one that is infinite at t_min or t_max."""
    weight = choose('loss_weight', config.loss_weight, LOSS_WEIGHTS)
    for setting, inside in (('t_min', 0.001), ('t_max', 0.999)):
        time = getattr(config, setting)
        if not weight(get_process(config)(torch.tensor([time], dtype=torch.float64))).isfinite():
            raise SettingError(
                f'loss_weight={config.loss_weight!r} is infinite at {setting}={time:g} '
                f'with process_name={config.process_name!r}. Use --{setting} {inside}.'
            )
    return weight


# ---------------------------------------------------------------- the best prediction of all


def optimal_denoiser(data: Tensor, labels: Tensor | None = None) -> Callable[[Tensor, Coefs, Tensor | None], Tensor]:
    """`denoise(xt, coefs, label=None)`: E[x0 | xt], (B, C, H, W), if x0 is one of `data` (N, C, H, W), equally likely.

    If `labels` (N,) are given and a label is one of them, x0 is of that class. No network reaches a lower training
    loss: this denoiser has memorised the data (Karras et al. 2022, appendix B.3). Computed in float64; nan where
    sigma = 0.
    """
    flat = double(data.flatten(1))
    squares = flat.square().sum(1)

    def denoise(xt: Tensor, coefs: Coefs, label: Tensor | None = None) -> Tensor:
        alpha, sigma = double(coefs.alpha)[:, None], double(coefs.sigma)[:, None]
        logits = (alpha * (double(xt.flatten(1)) @ flat.T) - alpha.square() / 2 * squares) / sigma.square()  # (B, N)
        if labels is not None and label is not None:
            known = torch.isin(label, labels)
            logits = logits.masked_fill(known[:, None] & (label[:, None] != labels), -torch.inf)
        return (logits.softmax(1) @ flat).reshape(xt.shape).to(xt)

    return denoise
