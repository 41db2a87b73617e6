"""Weights of the squared error, by noise level: loss = w(coefs) error of the target. w is (B,), from a process at times t.

A published loss is a pair of weight and target, here named with each; the same loss is had from another target by the factor between their
errors. With D the error of x0, the error of a type y = a x0 + b x1 (prediction.py) is (a - b alpha / sigma)^2 D: that of the noise x1 is SNR D,
that of F is D / c_out^2. So these are the same loss, whatever the network outputs:

    target x0, weight edm    = target F,  weight none
    target x1, weight none   = target x0, weight SNR (Ho et al. 2020, eq. 14)
    target v,  weight none   = target x0, weight SNR + 1, for a variance-preserving process (Salimans and Ho 2022, section 4)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from config import Config, SettingError, choose
from processes import Coefs, get_process

LossWeight = Callable[[Coefs], Tensor]


def min_snr(c: Coefs, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma), for target x0 (Hang et al. 2023, section 3.4)."""
    return c.log_snr.exp().clamp(max=gamma)


def edm(c: Coefs) -> Tensor:
    """1 / c_out^2 = (alpha^2 sigma_data^2 + sigma^2) / (sigma sigma_data)^2, for target x0 (Karras et al. 2022, table 1, for any alpha)."""
    return 1 / (c.sigma * c.sigma_data * c.c_in).square()


def elbo(c: Coefs) -> Tensor:
    """-1/2 d log-SNR / dt, for target x1 and uniform times: the loss is a bound on -log p(x0), per pixel (Kingma et al. 2021, eq. 17)."""
    return c.sigma_dot / c.sigma - c.f


def sigmoid(c: Coefs, bias: float = 2.0) -> Tensor:
    """The ELBO's weight times sigmoid(bias - log-SNR), for target x1 and uniform times (Kingma and Gao 2023, section 4)."""
    return elbo(c) * torch.sigmoid(bias - c.log_snr)


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
    for setting, usual in (('t_min', 0.001), ('t_max', 0.999)):
        time = getattr(config, setting)
        if not weight(get_process(config)(torch.tensor([time], dtype=torch.float64))).isfinite():
            raise SettingError(
                f'loss_weight={config.loss_weight!r} is infinite at {setting}={time:g} with process_name={config.process_name!r}. Use --{setting} {usual}.'
            )
    return weight
