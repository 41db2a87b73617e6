"""Searches for the constants of the default solver and grid.

    python benchmarks/solver_search.py

It tries the values of CHOICES one constant at a time, with the repo's values for the others, on eight mixtures of
Gaussians with known solutions; benchmarks/solvers.py judges the default on three others. For each choice and each
number of evaluations it prints the ratio of median errors to the repo's constants, as the geometric mean over the
mixtures, and the same for the RMSE. It takes about four minutes on one core, and writes solver_search.json.

Mixtures are smoother than trained networks, so they are not the only criterion: wider widths and a grid at less noise
are better on them with few steps, and worse on networks of Fashion-MNIST (docs/log.md).
"""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from interleaved import write  # noqa: E402

from processes import GaussianProcess, RectifiedFlow  # noqa: E402
from sampling import sample  # noqa: E402
from solvers import (  # noqa: E402
    SOLVERS,
    TIME_GRIDS,
    Multistep,
    Solver,
    angular,
    equal_steps,
    gaussian,
    logistic,
)
from tests.oracle import random_mixture, ring  # noqa: E402

NFE = (4, 6, 8, 10, 15, 20, 35)
# (mixture, number of starts, small enough for a short search)
MIXTURES = [
    (ring(6, 0.15), 200),
    (ring(12, 0.05), 200),
    (random_mixture(2, 6, seed=3), 200),
    (random_mixture(4, 5, seed=17, scale=0.3, smallest=0.05, largest=0.3), 200),
    (random_mixture(8, 8, seed=5, smallest=0.05), 200),
    (random_mixture(16, 10, seed=13, scale=0.8, smallest=0.02, largest=0.3), 60),
    (random_mixture(32, 12, seed=7), 60),
    (random_mixture(48, 16, seed=11, scale=0.4, smallest=0.02, largest=0.5), 60),
]
# names of constants for paths of few steps begin with 'few'; `steps` is Solver.few_steps
REPO = dict(
    order=4, corrector=5, taper=True, centre=0.6, scale=1.2,
    steps=10, few_order=3, few_corrector=3, few_centre=1.64, narrowest=1 / 20, widest=2.5,
)  # fmt: skip
CHOICES = {
    'order': [2, 3, 5],
    'corrector': [0, 4],
    'taper': [False],
    'centre': [0.4, 0.8, 1.0],
    'scale': [1.0, 1.1, 1.4],
    'steps': [0, 6],
    'few_order': [2, 4],
    'few_corrector': [0, 2, 4],
    'few_centre': [1.24, 1.44, 1.84],
    'narrowest': [1 / 10, 1 / 40],
    'widest': [1.5, 4.0],
}


def errors(constants: dict, problems: list) -> dict[int, list[tuple[float, float]]]:
    """NFE -> (median, RMSE) for each mixture; errors are distances per dimension to the exact end point."""
    c = SimpleNamespace(**constants)
    formula = partial(gaussian, widths=(c.narrowest, c.widest))
    few = Multistep(formula, 'x0', c.few_order, c.few_corrector)
    many = Multistep(angular, 'v', c.order, c.corrector, c.taper)
    SOLVERS['tried'] = Solver(many, nfe=1, order=c.order, memory=6, few=few, few_steps=c.steps)

    def grid(process: GaussianProcess, t_max: float, t_min: float, n: int) -> torch.Tensor:
        variable = logistic(c.few_centre - 0.08 * n if n <= c.steps else c.centre, c.scale)
        return equal_steps('tried', process, t_max, t_min, n, variable)

    TIME_GRIDS['tried'] = grid
    found = {}
    for nfe in NFE:
        found[nfe] = []
        for model_fn, x1, exact in problems:
            x = sample(model_fn, RectifiedFlow(), x1, solver='tried', nfe=nfe, time_grid='tried')
            squares = (x - exact).square().mean(1)
            found[nfe].append((squares.sqrt().median().item(), squares.mean().sqrt().item()))
    return found


def main() -> None:
    torch.manual_seed(0)
    problems = []
    for mixture, n in MIXTURES:
        model_fn = mixture.as_model('velocity', RectifiedFlow())
        x1 = torch.randn(n, mixture.dim, dtype=torch.float64)
        exact = sample(model_fn, RectifiedFlow(), x1, solver='rk4', num_steps=250)
        problems.append((model_fn, x1, exact))
    baseline, lines = errors(REPO, problems), []
    print('| constant | median at ' + ' | '.join(map(str, NFE)) + ' | RMSE at ' + ' | '.join(map(str, NFE)) + ' |')
    print('|---' * (2 * len(NFE) + 1) + '|')
    for name, values in CHOICES.items():
        for value in values:
            found = errors(REPO | {name: value}, problems)
            ratios = [
                [
                    math.exp(
                        sum(math.log(a[i] / b[i]) for a, b in zip(found[n], baseline[n], strict=True)) / len(MIXTURES)
                    )
                    for n in NFE
                ]
                for i in (0, 1)
            ]
            lines.append(dict(constant=name, value=value, nfe=NFE, median=ratios[0], rmse=ratios[1]))
            print(f'| {name} {value:g} | ' + ' | '.join(f'{r:.2f}' for part in ratios for r in part) + ' |', flush=True)
    write('solver_search', dict(repo=REPO, ratios=lines))


if __name__ == '__main__':
    main()
