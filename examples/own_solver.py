"""A solver of your own: copy this file, and change the step.

    sh run.sh examples/own_solver.py

Move the step and its line into solvers/table.py, and `sh tests/run.sh tests/solvers tests/test_sampling.py` will check
its order of convergence, its cost, and that its samples have the right distribution.
"""

from dataclasses import dataclass

from config import Config
from main import main
from solvers import SOLVERS, Solver


def two_step(x, t, s, predict, noise):
    """One step from time t to s < t: x (B, ...) at t becomes what is returned, at s.

    `predict(x, t)` asks the network, with guidance if there is any, and gives every prediction type: .x0 .x1 .score
    .velocity .v .F. `predict.past` holds (time, prediction) of the calls before this one, the newest first: this is a
    method of two steps (Bashforth and Adams 1883, for steps of any length), which begins with a step of Euler's.
    `noise` is for SDE solvers: see euler_maruyama in solvers/one_step.py.
    """
    past = list(predict.past)
    h, now = s - t, predict(x, t).velocity
    if not past:
        return x + h * now
    before, last = past[0]
    return x + h * now + h**2 / (2 * (t - before)) * (now - last.velocity)


# nfe: evaluations of the network a step; order: of convergence; memory: how many predictions predict.past holds.
SOLVERS['two_step'] = Solver(two_step, nfe=1, order=2, memory=1)


@dataclass(frozen=True)
class Settings(Config):
    solver: str = 'two_step'


if __name__ == '__main__':
    main(config_class=Settings)
