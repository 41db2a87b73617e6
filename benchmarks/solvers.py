"""Compares accuracy per network evaluation: this repo's solvers and those in diffusers, k-diffusion and azula.

    pip install -r benchmarks/requirements.txt      (k-diffusion and azula with --no-deps: of their dependencies, the
                                                    solvers need only torchsde and einops)
    python benchmarks/solvers.py ring               a mixture of Gaussians with an exact model, in float64; also
                                                    anisotropic, held_out and sharp; squared_cosine and shifted_cosine
                                                    are sharp on processes other than rf
    python benchmarks/solvers.py digits --checkpoint ckpts/digits_long/last.pt
                                                    a trained network, against its own converged samples
    python benchmarks/solvers.py ring --nfe 4 6     only these numbers of evaluations: each takes minutes

All start from the same noise at t = 0.999 and go to t = 0.001 of the process, which for all peers is `rf`; the error of
a sample is its distance per dimension (RMS) to the exact end point on its process. Solvers of diffusers and k-diffusion
run on every grid (with a checkpoint, on three), azula's on its own schedules (two). The best peer is chosen separately
for each number of evaluations and each measure. Each run prints a table in markdown, adds its results to
benchmarks/solvers.json, and draws all results in benchmarks/solvers.png.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from solver_peers import AZULA, PEER_GRIDS, PEERS, SCHEDULES, T_MAX, azula_sampler  # noqa: E402

from config import Config  # noqa: E402
from processes import GaussianProcess, RectifiedFlow  # noqa: E402
from sampling import sample  # noqa: E402
from saving import load_for_sampling  # noqa: E402
from solvers import SOLVERS  # noqa: E402
from tests.oracle import ShiftedCosine, SquaredCosine, random_mixture, ring  # noqa: E402

NFE = (4, 6, 8, 10, 15, 20, 35, 50)

# ---------------------------------------------------------------- measuring

Errors = tuple[float, float]
MEASURES = ('median', 'RMSE')


def errors(x: Tensor, exact: Tensor) -> Errors:
    squares = (x - exact).flatten(1).square().mean(1)
    return squares.sqrt().median().item(), squares.mean().sqrt().item()


# our solvers, the default first
OURS = [
    ('adams', 'logistic'),
    ('unipc', 'logistic'),
    ('dpmpp_3m', 'log_snr'),
    ('midpoint', 'logistic'),
    ('midpoint', 'uniform'),
    ('rk4', 'logistic'),
    ('heun', 'uniform'),
    ('euler', 'uniform'),
]


@dataclass
class Problem:
    title: str
    model_fn: Callable
    x1: Tensor
    label: Tensor | None
    reference_steps: int  # steps of RK4 on the default grid for the exact end points
    process: GaussianProcess  # for our solvers
    model_of_rf: Callable | None = None  # the model for peers, if the process is not rf
    peer_grids: tuple[str, ...] = tuple(PEER_GRIDS)
    schedules: tuple[str, ...] = SCHEDULES


def measure(problem: Problem, numbers: Iterable[int]) -> Iterator[tuple[int, dict[str, Errors], dict[str, Errors]]]:
    """(NFE, ours, peers): name and grid -> errors."""
    x1, of_rf = problem.x1, problem.model_of_rf or problem.model_fn

    def ours(model_fn: Callable = problem.model_fn, process: GaussianProcess = problem.process, **more: Any) -> Tensor:
        return sample(model_fn, process, x1, problem.label, **more)

    @torch.no_grad()
    def velocity(x: Tensor, t: float) -> Tensor:
        return of_rf(x.to(x1), torch.full((len(x),), t, dtype=x1.dtype), problem.label)

    exact, start = ours(solver='rk4', num_steps=problem.reference_steps), T_MAX * x1.double()
    theirs_exact = exact
    if problem.model_of_rf is not None:
        theirs_exact = ours(of_rf, RectifiedFlow(), solver='rk4', num_steps=problem.reference_steps)
    for nfe in numbers:
        mine = {
            f'{name}, {grid}': errors(ours(solver=name, nfe=nfe, time_grid=grid), exact)
            for name, grid in OURS
            if nfe >= SOLVERS[name].nfe
        }
        theirs = {
            f'{name}, {grid}': errors(peer(velocity, start, PEER_GRIDS[grid](nfe // cost)), theirs_exact)
            for name, (peer, cost) in PEERS.items()
            for grid in problem.peer_grids
            if nfe >= cost
        }
        theirs |= {
            f'azula {name} {order}, {schedule}': errors(
                azula_sampler(name, order, schedule, velocity, start, nfe), theirs_exact
            )
            for name, order in AZULA
            for schedule in problem.schedules
        }
        print(f'  {nfe} evaluations done', file=sys.stderr, flush=True)
        yield nfe, mine, theirs


def best(results: dict[str, Errors], measure: int) -> tuple[float, str]:
    return min((value[measure], name) for name, value in results.items() if math.isfinite(value[measure]))


def summary(mine: dict[str, Errors], theirs: dict[str, Errors]) -> dict[str, Any]:
    """The results to keep for one number of evaluations: ours, and for each measure the three best peers."""
    peers = {}
    for i, name in enumerate(MEASURES):
        left = dict(theirs)
        peers[name] = []
        for _ in range(3):
            value, which = best(left, i)
            del left[which]
            peers[name].append([which, value])
    return dict(ours={name: dict(zip(MEASURES, value, strict=True)) for name, value in mine.items()}, peers=peers)


def report(title: str, found: dict[str, Any]) -> None:
    print(
        f'\n**{title}**\n\n| NFE | measure | adams, logistic | best peer | ratio | which peer | our best other |\n'
        '|---|---|---|---|---|---|---|'
    )
    for name in MEASURES:
        for nfe in sorted(found, key=int):
            ours = {which: value[name] for which, value in found[nfe]['ours'].items()}
            default, (which, peer) = ours.pop('adams, logistic'), found[nfe]['peers'][name][0]
            value, other = min((value, other) for other, value in ours.items())
            print(
                f'| {nfe} | {name} | {default:.2g} | {peer:.2g} | {default / peer:.2f} | {which} '
                f'| {value:.2g} ({other}) |'
            )


@torch.no_grad()
def frechet_table(network: Callable, config: Config, n: int = 500) -> None:
    """Print the Frechet distance in pixels to the training images, to see how much the solver's error matters.

    The distance includes the network's own error.
    """
    from data_utils import get_dataset
    from evaluation.distances import Moments, frechet

    data = get_dataset(config)
    (images, _), _ = data.load(config)
    real = images.flatten(1) / data.max_value * 2 - 1
    x1, label = torch.randn(n, *data.shape), torch.arange(n) % data.num_classes
    rows = (('adams', 'logistic'), ('dpmpp_2m', 'log_snr'), ('euler', 'uniform'))
    numbers = NFE[:6]
    print(
        f'\n**Frechet distance of {n} samples, in pixels**\n\n| solver, grid | '
        + ' | '.join(map(str, numbers))
        + ' |\n'
        + '|---' * (len(numbers) + 1)
        + '|'
    )
    for solver, grid in rows:
        samples = [
            sample(network, RectifiedFlow(), x1, label, solver=solver, time_grid=grid, nfe=nfe).clamp(-1, 1)
            for nfe in numbers
        ]
        print(
            f'| {solver}, {grid} | '
            + ' | '.join(f'{frechet(Moments(x.flatten(1)), Moments(real)):.3f}' for x in samples)
            + ' |',
            flush=True,
        )


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(11, 4.2 * len(results)), squeeze=False)
    for row, result in zip(axes, results.values(), strict=True):
        found = result['nfe']
        numbers = sorted(map(int, found))
        for axis, name in zip(row, MEASURES, strict=True):
            for which in (f'{solver}, {grid}' for solver, grid in OURS):
                points = [(n, found[str(n)]['ours'][which][name]) for n in numbers if which in found[str(n)]['ours']]
                wide = 3 if which.startswith('adams') else 1.2
                axis.plot(*zip(*points, strict=True), marker='o', markersize=4, linewidth=wide, label=which)
            peers = [found[str(n)]['peers'][name][0][1] for n in numbers]
            label = 'best of diffusers,\nk-diffusion, azula, RK4'
            axis.plot(numbers, peers, 'k--', marker='s', markersize=4, label=label)
            axis.set(xscale='log', yscale='log', xlabel='network evaluations', title=result['title'])
            axis.set_ylabel(f'{name} error per dimension')
            axis.set_xticks(numbers, map(str, numbers))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=60)


sharp = partial(random_mixture, 8, 10, smallest=0.02, largest=0.05)
MIXTURES: dict[str, tuple[str, Callable, int, GaussianProcess]] = {
    'ring': ('8 modes in 2 dimensions', partial(ring, 8, 0.1), 1000, RectifiedFlow()),
    'anisotropic': ('20 anisotropic modes in 64 dimensions', partial(random_mixture, 64, 20), 100, RectifiedFlow()),
    'held_out': (
        '16 wider modes in 64 dimensions',
        partial(random_mixture, 64, 16, seed=21, scale=0.6, smallest=0.02, largest=0.5),
        100,
        RectifiedFlow(),
    ),
    'sharp': ('10 sharp modes in 8 dimensions', sharp, 2000, RectifiedFlow()),
    'squared_cosine': ('10 sharp modes, alpha = cos^2(pi t / 2)', sharp, 2000, SquaredCosine()),
    'shifted_cosine': ('10 sharp modes, a shifted cosine', sharp, 2000, ShiftedCosine(0.1)),
}


def problem_of(name: str, checkpoint: str, n: int) -> Problem:
    """The mixture `name`, or the network of the checkpoint. Raises SystemExit for a network that cannot be compared."""
    torch.manual_seed(0)
    if not checkpoint:
        title, mixture, default_n, process = MIXTURES[name]
        mixture, rf = mixture(), RectifiedFlow()
        x1 = torch.randn(n or default_n, mixture.dim, dtype=torch.float64)
        of_rf = None if isinstance(process, RectifiedFlow) else mixture.as_model('velocity', rf)
        return Problem(title, mixture.as_model('velocity', process), x1, None, 250, process, of_rf)
    network, _, config = load_for_sampling(checkpoint)
    if (config.process_name, config.model_type) != ('rf', 'velocity'):
        sys.exit(f'{checkpoint} has {config.process_name}, {config.model_type}. Give a checkpoint with rf, velocity.')
    if config.dataset not in ('digits', 'fashion_mnist'):
        sys.exit(f'{checkpoint} was trained on {config.dataset}. Give one trained on digits or fashion_mnist.')
    side = 8 if config.dataset == 'digits' else 28
    x1, label = torch.randn(n or 50, 1, side, side), torch.arange(n or 50) % 10
    few = ('uniform t', 'shift 1/3', 'log-SNR')
    title = f'a trained network: {config.dataset}'
    grids = dict(peer_grids=few, schedules=('RectifiedSchedule', 'CosineSchedule'))
    return Problem(title, network, x1, label, 75, RectifiedFlow(), **grids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('problem', help=f'one of {", ".join(MIXTURES)}; with --checkpoint, a name for its results')
    parser.add_argument('--checkpoint', default='', help='a trained rf network with velocity output')
    parser.add_argument('--nfe', type=int, nargs='+', default=NFE, help='numbers of evaluations')
    parser.add_argument('--samples', type=int, default=0, help='start points; 0: 1000 in 2-D, 100 in 64-D, 50 images')
    parser.add_argument('--frechet', action='store_true', help='with --checkpoint: only Frechet distances to the data')
    arguments = parser.parse_args()
    if not arguments.checkpoint and arguments.problem not in MIXTURES:
        parser.error(f'{arguments.problem!r} is not one of {", ".join(MIXTURES)}. Choose one, or give --checkpoint.')
    if arguments.frechet:
        network, _, config = load_for_sampling(arguments.checkpoint)
        frechet_table(network, config)
        return
    problem = problem_of(arguments.problem, arguments.checkpoint, arguments.samples)
    path = Path(__file__).with_suffix('.json')
    for nfe, mine, theirs in measure(problem, arguments.nfe):
        results = json.loads(path.read_text()) if path.exists() else {}
        result = results.setdefault(arguments.problem, dict(title=problem.title, starts=len(problem.x1), nfe={}))
        result['nfe'][str(nfe)] = summary(mine, theirs)
        path.write_text(json.dumps(results, indent=1) + '\n')
    report(problem.title, result['nfe'])
    draw(results, path.with_suffix('.png'))


if __name__ == '__main__':
    main()
