"""A solver of your own: copy this file, and change the step.

    sh run.sh examples/own_solver.py --experiment_name two_step

Move the step and its line into solvers/table.py, and `sh tests/run.sh tests/solvers tests/test_sampling.py` will check
its order of convergence, its cost, and that its samples have the right distribution.
"""

from dataclasses import dataclass

from config import Config
from main import main
from solvers import SOLVERS, Solver


def two_step(x, t, s, predict, noise):
    """One step from time t to s < t: takes x (B, ...) at t, returns x at s.

    `predict(x, t)` evaluates the network, with guidance if any, and gives every prediction type: .x0 .x1 .score
    .velocity .v .F. `predict.past` holds (time, prediction) of earlier calls, the newest first. This is a two-step
    method (Bashforth and Adams 1883, for steps of any length); its first step is Euler's.
    `noise` is for SDE solvers: see euler_maruyama in solvers/one_step.py.
    """
    past = list(predict.past)
    h, now = s - t, predict(x, t).velocity
    if not past:
        return x + h * now
    before, last = past[0]
    return x + h * now + h**2 / (2 * (t - before)) * (now - last.velocity)


# nfe: network evaluations per step; order: order of convergence; memory: number of predictions in predict.past.
SOLVERS['two_step'] = Solver(two_step, nfe=1, order=2, memory=1)


@dataclass(frozen=True)
class Settings(Config):
    solver: str = 'two_step'


if __name__ == '__main__':
    main(config_class=Settings)
