"""Solvers: how samples go from noise to data, from time t to s < t, and the times that they visit. Read in this order:

step.py         the two equations, what a step is: (x, t, s, predict, noise) -> x at s, and the noise it may draw
one_step.py     methods that remember nothing: euler, heun, midpoint, rk4, dopri5; euler_maruyama of the SDE
multistep.py    methods that remember predictions, and their weights: ddim, dpmpp, unipc, adams
table.py        SOLVERS, SDE_NOISES, LAST_STEPS, TIME_GRIDS: an entry of yours is tested as soon as it is there
path.py         a whole path: its times, the network on a process other than the one it was trained with, all steps

sampling.py puts them to use.
"""

from solvers.multistep import Multistep, angular, gaussian
from solvers.path import Predictor, Steps, on_path
from solvers.step import Noise, Predict, StepFn, coefs_at, relative_noise
from solvers.table import LAST_STEPS, SDE_NOISES, SOLVERS, TIME_GRIDS, Solver, equal_steps, logistic

__all__ = [
    'LAST_STEPS', 'SDE_NOISES', 'SOLVERS', 'TIME_GRIDS', 'Multistep', 'Noise', 'Predict', 'Predictor', 'Solver',
    'StepFn', 'Steps', 'angular', 'coefs_at', 'equal_steps', 'gaussian', 'logistic', 'on_path', 'relative_noise',
]  # fmt: skip
