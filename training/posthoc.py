"""Averaged weights whose averaging length is chosen after training, mixed from the averages in a run's checkpoints.

Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, section 3.2, from averages of
either type of ema.EMA.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import SettingError
from ema import EMA_TYPES, gamma_of
from runtime.ranks import print_once
from saving import load_checkpoint

POSTHOC = 'posthoc_'  # posthoc_0.1: averaged weights with this relative width
MOST_STEPS = 20_000  # the profiles of longer trainings are computed for blocks of steps


def posthoc_weights(checkpoint: Path, name: str, network: nn.Module) -> dict[str, Any]:
    """Weights of `network` by their `name`, posthoc_WIDTH: WIDTH is the standard deviation of the averaged steps as a
    fraction of the training so far, such as 0.1.

    They are mixed from all averages in the run's checkpoints up to this one; the error of the mixture is printed.
    Buffers are the checkpoint's. Raises SettingError for another name, or if there are too few averages for this width.
    """
    width = float(name.removeprefix(POSTHOC)) if re.fullmatch(r'posthoc_0?[.]\d+', name) else 0.0
    if not 0.01 <= width <= 0.25:
        raise SettingError(f'weights={name!r}: write posthoc_ and a width from 0.01 to 0.25, such as posthoc_0.1.')
    last = load_checkpoint(checkpoint)
    n, kind = last['ema']['num_updates'], last['ema'].get('kind', 'exponential')
    others = sorted({*checkpoint.parent.glob('step_*.pt'), *checkpoint.parent.glob('last*.pt')} - {checkpoint})
    saved: dict[tuple[float, int], Path] = {}
    for path in [*others, checkpoint]:
        ema = (last if path == checkpoint else load_checkpoint(path))['ema']
        if 0 < ema['num_updates'] <= n:
            saved |= {(decay, ema['num_updates']): path for decay in (0.0, *ema['networks'])}
    keys = list(saved)
    factors, error = posthoc_mixture(keys, width, n, kind) if len(keys) > 1 else (np.ones(1), 1.0)
    print_once(f'{name}: mixed from {len(keys)} averages in {checkpoint.parent}, within {error:.1%} of this profile')
    if error > 0.3:
        raise SettingError(
            f'weights={name!r}: the averages in {checkpoint.parent} give this profile with an error of {error:.0%}. '
            'Choose another width, or save more averages in training: lower --keep_every, or add a longer --ema_decays.'
        )
    mixed = {key for key, _ in network.named_parameters(remove_duplicate=False)}
    total = {key: doubled(value) * 0 if key in mixed else value for key, value in last['network'].items()}
    for path in dict.fromkeys(saved.values()):
        found = last if path == checkpoint else load_checkpoint(path)
        for (decay, updates), factor in zip(keys, factors, strict=True):
            if saved[decay, updates] == path:
                weights = found['ema']['networks'][decay] if decay else found['network']
                for key in mixed:
                    total[key] = total[key] + factor * doubled(weights[key])
    return {key: value.to(last['network'][key].dtype) for key, value in total.items()}


def doubled(x: Tensor) -> Tensor:
    """x in double precision, real or complex."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def weights_of_steps(decay: float, n: int, kind: str = 'exponential') -> np.ndarray:
    """(n,): the shares of the weights after update 1, ..., n in the average at update n. The rest is the share of the
    initial weights. Raw weights have the decay 0."""
    decays = EMA_TYPES[kind if decay else 'exponential'](decay, np.arange(1, n + 1))
    later = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # product of the decays after each update
    return (1 - decays) * later


def power_profile(relative_width: float, n: int) -> np.ndarray:
    """(n,): the same for an average whose length grows with the training: update k has a share proportional to k^gamma.
    Its standard deviation is `relative_width` times n (Karras et al. 2024, eq. 2 and algorithm 2)."""
    counts = (np.arange(1, n + 1) / n) ** gamma_of(relative_width)
    return counts / counts.sum()


def posthoc_mixture(
    saved: Sequence[tuple[float, int]], relative_width: float, n: int, kind: str = 'exponential'
) -> tuple[np.ndarray, float]:
    """(factors, error) of the mixture of saved averages that is nearest to the power profile at update n.

    An average is (decay, number of updates), with decay 0 for raw weights. The factors sum to 1. `error` is the norm of
    the difference divided by the profile's norm.
    """
    blocks = np.arange(0, n, -(-n // MOST_STEPS))  # the first step of each block
    profiles = np.zeros((len(saved), len(blocks)))
    for row, (decay, updates) in zip(profiles, saved, strict=True):
        row[:] = np.add.reduceat(np.pad(weights_of_steps(decay, updates, kind), (0, n - updates)), blocks)
    target = np.add.reduceat(power_profile(relative_width, n), blocks)
    free = profiles[1:] - profiles[0]  # with factors that sum to 1
    factors = np.linalg.lstsq(free.T, target - profiles[0], rcond=1e-10)[0]
    factors = np.concatenate([[1 - factors.sum()], factors])
    return factors, float(np.linalg.norm(factors @ profiles - target) / np.linalg.norm(target))
