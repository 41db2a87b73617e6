"""The tables of solvers, of noise levels of the SDE, and of last steps."""

from collections.abc import Callable

from torch import Tensor

from processes import Coefs
from solvers.multistep import Multistep, angular, exponential, gaussian
from solvers.one_step import dopri5, euler, euler_maruyama, heun, midpoint, posterior_mean, rk4
from solvers.step import Solver, StepFn

# Song et al. 2021a, eq. 12 with sigma = 0, for any process
ddim = Multistep(exponential, 'x0', order=1)

# name -> Solver of a step (x, t, s, predict, noise) -> x at s < t. `memory` predictions are kept for the step, which
# makes one more.
SOLVERS: dict[str, Solver] = {
    'euler': Solver(euler, nfe=1, order=1),
    'heun': Solver(heun, nfe=2, order=2),
    'midpoint': Solver(midpoint, nfe=2, order=2),
    'rk4': Solver(rk4, nfe=4, order=4),
    'dopri5': Solver(dopri5, nfe=None, order=5),
    'ddim': Solver(ddim, nfe=1, order=1),
    # Lu et al. 2022b, algorithm 2 with exact integrals, and its third order
    'dpmpp_2m': Solver(Multistep(exponential, 'x0', order=2), nfe=1, order=2, memory=1),
    'dpmpp_3m': Solver(Multistep(exponential, 'x0', order=3), nfe=1, order=3, memory=2),
    # Zhao et al. 2023, p = 3 with exact integrals
    'unipc': Solver(Multistep(exponential, 'x0', order=3, corrector=4), nfe=1, order=4, memory=3),
    # the predictor-corrector of Adams, Bashforth and Moulton (Hairer et al. 1993, section III.1) in the angle
    'adams': Solver(
        Multistep(angular, 'v', order=4, corrector=5, taper=True),
        nfe=1,
        order=5,
        memory=4,
        few=Multistep(gaussian, 'x0', order=3, corrector=3),
    ),
    'euler_maruyama': Solver(euler_maruyama, nfe=1, order=1, stochastic=True),
    # Lu et al. 2022b, SDE-DPM-Solver++(2M); Xue et al. 2023 for noise other than natural
    'sde_dpmpp_2m': Solver(
        Multistep(exponential, 'x0', order=2, stochastic=True), nfe=1, order=2, stochastic=True, memory=1
    ),
}

# name -> coefs -> w^2 / (2 sigma) of the SDE, (B,)
SDE_NOISES: dict[str, Callable[[Coefs], Tensor]] = {
    'natural': lambda c: c.delta / c.sigma,  # w = g, the noise of the process itself (Song et al. 2021, eq. 6)
    'sigma': lambda c: c.sigma,  # w = sqrt(2) sigma
    # w^2 = alpha sigma_dot - sigma alpha_dot: constant in time for rf (1) and cosine (pi / 2), and the same SDE on
    # other processes. Near the data it is more than a step can bear, and `relative_noise` lowers it there
    'constant': lambda c: (c.alpha * c.sigma_dot - c.sigma * c.alpha_dot) / (2 * c.sigma),
}

# name -> the last step of a stochastic solver: noise added there would stay in the image.
LAST_STEPS: dict[str, StepFn] = {'mean': posterior_mean, 'ode': ddim}
