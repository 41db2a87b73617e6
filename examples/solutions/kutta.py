"""Exercise 6: Kutta's method of order 3 (Kutta 1901).

    sh run.sh examples/solutions/kutta.py --preset toy2d --num_training_steps 500 --solver kutta --time_grid uniform \\
        --experiment_name kutta

The run needs a name: the solver is not a part of the default name, and the plain run has that name already.
"""

from main import main
from solvers import SOLVERS, Solver


def kutta(x, t, s, predict, noise):
    """One step from t to s < t: Simpson's rule for the integral of the velocity."""
    h = s - t
    k1 = predict(x, t).velocity
    k2 = predict(x + h / 2 * k1, t + h / 2).velocity
    k3 = predict(x + h * (2 * k2 - k1), s).velocity
    return x + h / 6 * (k1 + 4 * k2 + k3)


SOLVERS['kutta'] = Solver(kutta, nfe=3, order=3)

if __name__ == '__main__':
    main()
