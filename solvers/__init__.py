"""Solvers: steps from time t to s < t, on the way from noise to data, and the times of the steps. Read in this order:

step.py         the ODE and the SDE, the signature of a step: (x, t, s, predict, noise) -> x at s, and its noise
one_step.py     methods that remember nothing: euler, heun, midpoint, rk4, dopri5; euler_maruyama for the SDE
multistep.py    methods that remember predictions, and their weights: ddim, dpmpp, unipc, adams
table.py        SOLVERS, SDE_NOISES, LAST_STEPS, TIME_GRIDS: an entry that you add is tested automatically
path.py         a whole path: its times, the network on a process other than the trained one, all steps

sampling.py uses them.
"""

from solvers.multistep import Multistep, angular, gaussian
from solvers.path import Predictor, Steps, on_path
from solvers.step import Noise, Predict, StepFn, coefs_at, relative_noise
from solvers.table import LAST_STEPS, SDE_NOISES, SOLVERS, TIME_GRIDS, Solver, equal_steps, logistic, shift_of

__all__ = [
    'LAST_STEPS', 'SDE_NOISES', 'SOLVERS', 'TIME_GRIDS', 'Multistep', 'Noise', 'Predict', 'Predictor', 'Solver',
    'StepFn', 'Steps', 'angular', 'coefs_at', 'equal_steps', 'gaussian', 'logistic', 'on_path', 'relative_noise',
    'shift_of',
]  # fmt: skip
