"""A process of your own between data and noise: copy this file, and change alpha and sigma.

    sh run.sh examples/own_process.py

All else follows from these two: the derivatives, the velocity, the score, the log-SNR and its inverse, conversions
between predictions, time grids and solvers. Move the class and its line into processes.py, and `sh tests/run.sh` will
compare it with the exact scores, velocities, densities and samples of a mixture of Gaussians.
"""

from dataclasses import dataclass

import torch

from config import Config
from main import main
from processes import PROCESSES, GaussianProcess


class Trigonometric(GaussianProcess):
    """xt = cos(t^a pi / 2) x0 + sin(t^a pi / 2) x1.

    `alpha` and `sigma` take times (B,) in [0, 1] and return (B,). alpha(0) must be 1, and alpha / sigma must
    decrease with t. torch differentiates them, so write them with torch functions.
    """

    def __init__(self, power):
        self.power = power

    def alpha(self, t):
        return torch.cos(t**self.power * torch.pi / 2)

    def sigma(self, t):
        return torch.sin(t**self.power * torch.pi / 2)


@dataclass(frozen=True)
class Settings(Config):
    process_name: str = 'trigonometric'
    power: float = 1.5
    """trigonometric: power of t; above 1, xt stays near the data for longer."""


PROCESSES['trigonometric'] = lambda config: Trigonometric(config.power)  # name -> constructor

if __name__ == '__main__':
    main(config_class=Settings)
