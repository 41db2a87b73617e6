"""Accuracy per network evaluation: this repo's solvers beside those of diffusers and k-diffusion.

    pip install -r benchmarks/requirements.txt      (k-diffusion with --no-deps: of what it asks for, its solvers need
                                                    only torchsde)
    python benchmarks/solvers.py                    two mixtures of Gaussians with exact models, in float64
    python benchmarks/solvers.py --checkpoint ckpts/digits/last.pt
                                                    a trained network instead, against its own converged samples

All start from the same noise at t = 0.999 of `rf` and go to t = 0.001; the error of a sample is its distance per
dimension (RMS) to the exact end point. Every peer is run on every grid (three of them with a checkpoint), and its best
figure is taken, for each number of evaluations and each measure by itself. Prints tables in markdown, and draws
benchmarks/solvers.png (or solvers_digits.png).
"""

import argparse
import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from oracle import random_mixture, ring  # noqa: E402

from config import Config  # noqa: E402
from processes import RectifiedFlow  # noqa: E402
from sampling import TIME_GRIDS, sample  # noqa: E402
from saving import load_for_sampling  # noqa: E402
from solvers import SOLVERS  # noqa: E402

NFE = (6, 8, 10, 15, 20, 35, 50)
T_MAX, T_MIN = 0.999, 0.001
Velocity = Callable[[Tensor, float], Tensor]  # (xt, t) -> d xt / dt of rf
Peer = Callable[[Velocity, Tensor, list[float]], Tensor]  # (velocity, x at the first time, times) -> x at the last

# ---------------------------------------------------------------- peers


def diffusers_scheduler(name: str, velocity: Velocity, x: Tensor, times: list[float], **settings) -> Tensor:
    import diffusers

    scheduler = getattr(diffusers, name)(prediction_type='flow_prediction', use_flow_sigmas=True, **settings)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor(times, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(times) - 1)  # only an index here
    for i, t in enumerate(times[:-1]):
        x = scheduler.step(velocity(x, t), i, x, return_dict=False)[0]
    return x


def k_diffusion_sampler(name: str, velocity: Velocity, x: Tensor, times: list[float], **settings) -> Tensor:
    """It works on x / alpha with sigma / alpha for time."""

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        t = (sigma[0] / (1 + sigma[0])).item()
        xt = (1 - t) * y
        return xt - t * velocity(xt, t)

    sigmas = torch.tensor([t / (1 - t) for t in times], dtype=x.dtype)
    return (1 - times[-1]) * getattr(k_diffusion(), name)(denoise, x / (1 - times[0]), sigmas, disable=True, **settings)


def k_diffusion():
    """k_diffusion.sampling alone: the package's __init__ imports twenty others."""
    if 'k_diffusion' not in sys.modules:
        package = types.ModuleType('k_diffusion')
        package.__path__ = list(importlib.util.find_spec('k_diffusion').submodule_search_locations)
        sys.modules['k_diffusion'] = package
    import k_diffusion.sampling

    return k_diffusion.sampling


def classical_rk4(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    for t, s in itertools.pairwise(times):
        h, m = s - t, (s + t) / 2
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, m)
        k3 = velocity(x + h / 2 * k2, m)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, s))
    return x


# name -> (solver, evaluations per step)
PEERS: dict[str, tuple[Peer, int]] = {
    'RK4': (classical_rk4, 4),
    'k-diffusion heun': (partial(k_diffusion_sampler, 'sample_heun'), 2),
    'k-diffusion dpm_2': (partial(k_diffusion_sampler, 'sample_dpm_2'), 2),
    'k-diffusion lms': (partial(k_diffusion_sampler, 'sample_lms'), 1),
    'k-diffusion dpmpp_2m': (partial(k_diffusion_sampler, 'sample_dpmpp_2m'), 1),
    'k-diffusion dpmpp_3m': (
        partial(k_diffusion_sampler, 'sample_dpmpp_3m_sde', eta=0.0, noise_sampler=lambda *_: 0),
        1,
    ),
}
for order in (2, 3):
    for final in (True, False):
        PEERS[f'diffusers DPM++ {order}M' + (' lower at the end' if final else '')] = (
            partial(
                diffusers_scheduler,
                'DPMSolverMultistepScheduler',
                solver_order=order,
                lower_order_final=final,
                final_sigmas_type='sigma_min',
            ),
            1,
        )
        PEERS[f'diffusers UniPC-{order}' + (' lower at the end' if final else '')] = (
            partial(
                diffusers_scheduler,
                'UniPCMultistepScheduler',
                solver_order=order,
                lower_order_final=final,
                final_sigmas_type='sigma_min',
            ),
            1,
        )
    PEERS[f'diffusers DEIS-{order}'] = (partial(diffusers_scheduler, 'DEISMultistepScheduler', solver_order=order), 1)


def shifted(shift: float, n: int) -> list[float]:
    """Uniform in t, then the flow shift of Esser et al. 2024, eq. 23, scaled to the same ends."""
    u = torch.linspace(T_MAX, T_MIN, n + 1, dtype=torch.float64)
    t = shift * u / (1 + (shift - 1) * u)
    return (T_MIN + (t - t[-1]) * (T_MAX - T_MIN) / (t[0] - t[-1])).tolist()


PEER_GRIDS: dict[str, Callable[[int], list[float]]] = {
    'uniform t': partial(shifted, 1.0),
    'shift 3': partial(shifted, 3.0),
    'shift 1/2': partial(shifted, 1 / 2),
    'shift 1/3': partial(shifted, 1 / 3),
    'shift 1/4': partial(shifted, 1 / 4),
    'log-SNR': lambda n: TIME_GRIDS['log_snr'](RectifiedFlow(), T_MAX, T_MIN, n).tolist(),
    'rho 7': lambda n: TIME_GRIDS['edm'](RectifiedFlow(), T_MAX, T_MIN, n).tolist(),
    'cosine': lambda n: TIME_GRIDS['cosine'](RectifiedFlow(), T_MAX, T_MIN, n).tolist(),
}

# ---------------------------------------------------------------- measuring

Errors = tuple[float, float]  # root mean square, median


def errors(x: Tensor, exact: Tensor) -> Errors:
    squares = (x - exact).flatten(1).square().mean(1)
    return squares.mean().sqrt().item(), squares.sqrt().median().item()


# ours that are drawn
LINES = [
    ('adams', 'logistic'),
    ('unipc', 'logistic'),
    ('dpmpp_3m', 'log_snr'),
    ('rk4', 'logistic'),
    ('heun', 'uniform'),
    ('euler', 'uniform'),
]
ODE = [name for name, solver in SOLVERS.items() if not solver.stochastic and solver.nfe]


def measure(
    model_fn: Callable,
    x1: Tensor,
    label: Tensor | None,
    reference_steps: int,
    pairs: Iterable[tuple[str, str]],
    peer_grids: Iterable[str],
) -> tuple[dict, dict]:
    """(ours, peers): name, grid, NFE -> errors, against `reference_steps` steps of RK4 on the default grid."""
    process = RectifiedFlow()
    exact = sample(model_fn, process, x1, label, solver='rk4', num_steps=reference_steps)

    @torch.no_grad()
    def velocity(x: Tensor, t: float) -> Tensor:
        return model_fn(x.to(x1), torch.full((len(x),), t, dtype=x1.dtype), label)

    ours, theirs = {}, {}
    for nfe in NFE:
        for name, grid in pairs:
            if nfe >= SOLVERS[name].nfe:
                ours[name, grid, nfe] = errors(
                    sample(model_fn, process, x1, label, solver=name, nfe=nfe, time_grid=grid), exact
                )
        for name, (peer, cost) in PEERS.items():
            if nfe >= cost:
                for grid in peer_grids:
                    theirs[name, grid, nfe] = errors(peer(velocity, T_MAX * x1, PEER_GRIDS[grid](nfe // cost)), exact)
        print(f'  {nfe} evaluations done', file=sys.stderr, flush=True)
    return ours, theirs


def best(results: dict, nfe: int, measure: int) -> tuple[float, str]:
    return min(
        (value[measure], f'{name}, {grid}')
        for (name, grid, n), value in results.items()
        if n == nfe and math.isfinite(value[measure])
    )


def report(title: str, ours: dict, theirs: dict) -> None:
    print(
        f'\n**{title}**\n\n'
        '| NFE | measure | adams, logistic | best peer | ratio | which peer | our best other |\n'
        '|---|---|---|---|---|---|---|'
    )
    for i, name in enumerate(('RMSE', 'median')):
        for nfe in NFE:
            default, (peer, which) = ours['adams', 'logistic', nfe][i], best(theirs, nfe, i)
            value, other = best({k: v for k, v in ours.items() if k[0] != 'adams'}, nfe, i)
            print(
                f'| {nfe} | {name} | {default:.2g} | {peer:.2g} | {default / peer:.2f} | {which} '
                f'| {value:.2g} ({other}) |'
            )


@torch.no_grad()
def frechet_table(network: Callable, config: Config, n: int = 1000) -> None:
    """Frechet distance in pixels to the training images: what the error of the solver costs in the end.

    The network's own error is included.
    """
    from data_utils import get_dataset
    from metrics import frechet_distance

    data = get_dataset(config)
    (images, _), _ = data.load(config)
    real = images.flatten(1) / data.max_value * 2 - 1
    x1, label = torch.randn(n, *data.shape), torch.arange(n) % data.num_classes
    rows = (
        ('adams', 'logistic'),
        ('unipc', 'logistic'),
        ('dpmpp_2m', 'log_snr'),
        ('heun', 'uniform'),
        ('euler', 'uniform'),
    )
    print(
        f'\n**Frechet distance of {n} samples, in pixels**\n\n| solver, grid | '
        + ' | '.join(map(str, NFE))
        + ' |\n'
        + '|---' * (len(NFE) + 1)
        + '|'
    )
    for solver, grid in rows:
        samples = [
            sample(network, RectifiedFlow(), x1, label, solver=solver, time_grid=grid, nfe=nfe).clamp(-1, 1)
            for nfe in NFE
        ]
        print(
            f'| {solver}, {grid} | '
            + ' | '.join(f'{frechet_distance(x.flatten(1), real):.3f}' for x in samples)
            + ' |',
            flush=True,
        )


def draw(panels: list[tuple[str, dict, dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(panels), 2, figsize=(11, 4.2 * len(panels)), squeeze=False)
    for row, (title, ours, theirs) in zip(axes, panels, strict=True):
        for i, (axis, name) in enumerate(zip(row, ('RMSE', 'median'), strict=True)):
            for solver, grid in LINES:
                points = [(n, ours[solver, grid, n][i]) for n in NFE if (solver, grid, n) in ours]
                axis.plot(
                    *zip(*points, strict=True),
                    marker='o',
                    markersize=4,
                    linewidth=3 if solver == 'adams' else 1.2,
                    label=f'{solver}, {grid}',
                )
            axis.plot(
                NFE,
                [best(theirs, n, i)[0] for n in NFE],
                'k--',
                marker='s',
                markersize=4,
                label='best of diffusers,\nk-diffusion and RK4',
            )
            axis.set(
                xscale='log',
                yscale='log',
                xlabel='network evaluations',
                ylabel=f'{name} error per dimension',
                title=title,
            )
            axis.set_xticks(NFE, map(str, NFE))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--checkpoint', help='a trained rf network with velocity output, instead of the mixtures')
    parser.add_argument('--samples', type=int, default=0, help='start points; 0: 4000 in 2-D, 400 in 64-D, 100 images')
    arguments = parser.parse_args()
    torch.manual_seed(0)
    panels = []
    if arguments.checkpoint:
        network, _, config = load_for_sampling(arguments.checkpoint)
        if (config.process_name, config.model_type) != ('rf', 'velocity'):
            parser.error(
                f'{arguments.checkpoint} is of {config.process_name}, {config.model_type}; '
                'the comparison needs rf and velocity'
            )
        n = arguments.samples or 100
        label = torch.arange(n) % 10
        panels.append(
            (
                f'a trained network: {config.dataset}',
                *measure(network, torch.randn(n, 1, 8, 8), label, 75, LINES, ('uniform t', 'shift 1/3', 'log-SNR')),
            )
        )
        frechet_table(network, config)
    else:
        for title, mixture, n in (
            ('8 modes in 2 dimensions', ring(8, 0.1), arguments.samples or 4000),
            ('20 anisotropic modes in 64 dimensions', random_mixture(64, 20), arguments.samples or 400),
        ):
            x1 = torch.randn(n, mixture.dim, dtype=torch.float64)
            panels.append(
                (
                    title,
                    *measure(
                        mixture.as_model('velocity', RectifiedFlow()),
                        x1,
                        None,
                        500,
                        list(itertools.product(ODE, TIME_GRIDS)),
                        PEER_GRIDS,
                    ),
                )
            )
    for panel in panels:
        report(*panel)
    draw(panels, ROOT / 'benchmarks' / ('solvers_digits.png' if arguments.checkpoint else 'solvers.png'))


if __name__ == '__main__':
    main()
