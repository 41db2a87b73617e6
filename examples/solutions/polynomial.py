"""Exercise 5: a process that preserves variance and has no square root at 0.

    sh run.sh examples/solutions/polynomial.py --preset toy2d --num_training_steps 500 --process_name polynomial

alpha = 1 - t^2 and alpha^2 + sigma^2 = 1, so sigma = t sqrt(2 - t^2). With sqrt(1 - alpha^2) instead, rounding would
spoil small times.
"""

from main import main
from processes import PROCESSES, GaussianProcess


class Polynomial(GaussianProcess):
    def alpha(self, t):  # (B,) -> (B,)
        return 1 - t**2

    def sigma(self, t):
        return t * (2 - t**2).sqrt()


PROCESSES['polynomial'] = lambda config: Polynomial()

if __name__ == '__main__':
    main()
