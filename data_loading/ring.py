"""A linear stochastic system on a ring, whose law after any number of steps is known: for tests of forecasts.

    du = (0.02 u_yy - c u_y - 0.1 u) dt + noise that is white in space and time

Waves move by two points in a step and lose their memory at a rate that depends on their wavenumber. States are
(N, 1, POINTS) with a standard deviation of 0.5.
"""

import math

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from config import Config

POINTS = 16
SIZES = 20_000, 25  # training pairs, held-out pairs; each held-out state starts an ensemble


def law(x: Tensor, steps: float) -> tuple[Tensor, Tensor]:
    """The law of the state `steps` steps after x (N, 1, POINTS), which is Gaussian: the mean, of that shape, and the
    standard deviation of the noise for each wavenumber, (POINTS / 2 + 1,) in units of white noise."""
    k = torch.arange(POINTS // 2 + 1)
    rate = 0.1 + 0.02 * k**2
    decay = torch.exp(-steps * torch.complex(rate, 4 * math.pi * k / POINTS))
    return irfft(decay * rfft(x), n=POINTS), (0.0690 / rate * (1 - decay.abs() ** 2)).sqrt()


def draw(x: Tensor, steps: float, generator: torch.Generator | None = None) -> Tensor:
    """A state `steps` steps after each x (N, 1, POINTS)."""
    mean, std = law(x, steps)
    return mean + irfft(std * rfft(torch.randn(x.shape, generator=generator)), n=POINTS)


def noise_std(steps: float) -> float:
    """Standard deviation of the state at a point `steps` steps after a known one."""
    _, std = law(torch.zeros(1, 1, POINTS), steps)
    return float(irfft(std, n=POINTS).norm())


def spectrum(x: Tensor, steps: float) -> Tensor:
    """The expected energy (N, POINTS / 2 + 1) by wavenumber (`evaluation.scores.energy_spectrum`), `steps` after x."""
    mean, std = law(x, steps)
    energy = rfft(mean[:, 0], norm='forward').abs() ** 2 + std**2 / POINTS
    return energy * torch.tensor([0.5] + [1.0] * (POINTS // 2 - 1) + [0.5])


def load_ring(config: Config) -> tuple[tuple[Tensor, ...], ...]:
    """The training and the held-out part: (the next state, 0, a state of the stationary law), from config.seed."""
    seeded = torch.Generator().manual_seed(config.seed)
    states = [draw(torch.zeros(n, 1, POINTS), 1000, seeded) for n in SIZES]
    return tuple((draw(x, 1, seeded), torch.zeros(len(x)), x) for x in states)
