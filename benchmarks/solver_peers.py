"""Solvers of other packages with one signature, for benchmarks/solvers.py: (velocity, x, times) -> x at the last time.

All solve `rf` from T_MAX to T_MIN.
"""

import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from processes import RectifiedFlow
from sampling import TIME_GRIDS

T_MAX, T_MIN = 0.999, 0.001
Velocity = Callable[[Tensor, float], Tensor]  # (xt, t) -> d xt / dt of rf
Peer = Callable[[Velocity, Tensor, list[float]], Tensor]  # (velocity, x at the first time, times) -> x at the last


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
    """k-diffusion works on x / alpha, with sigma / alpha as time."""

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        t = (sigma[0] / (1 + sigma[0])).item()
        xt = (1 - t) * y
        return xt - t * velocity(xt, t)

    sigmas = torch.tensor([t / (1 - t) for t in times], dtype=x.dtype)
    return (1 - times[-1]) * getattr(k_diffusion(), name)(denoise, x / (1 - times[0]), sigmas, disable=True, **settings)


def k_diffusion():
    """Only k_diffusion.sampling: the package's __init__ imports twenty other packages."""
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


def azula_sampler(name: str, order: int, schedule: str, velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """azula takes equal steps in its schedule's time, between the times with the log-SNRs of T_MAX and T_MIN."""
    import azula.noise
    import azula.sample
    from azula.denoise import Denoiser, DiracPosterior

    alpha_sigma = getattr(azula.noise, schedule)()

    def time_of(ratio: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma = alpha_sigma(torch.tensor(middle, dtype=torch.float64))
            low, high = (middle, high) if sigma / alpha < ratio else (low, middle)
        return middle

    class Denoise(Denoiser):
        schedule = staticmethod(alpha_sigma)

        def forward(self, xt: Tensor, time: Tensor) -> DiracPosterior:
            alpha, sigma = alpha_sigma(time)
            t, y = (sigma / (alpha + sigma)).item(), xt / (alpha + sigma)
            return DiracPosterior(y - t * velocity(y, t))

    start, stop = time_of(T_MAX / (1 - T_MAX)), time_of(T_MIN / (1 - T_MIN))
    sampler = getattr(azula.sample, name)(
        Denoise(), order=order, start=start, stop=stop, steps=steps, silent=True, dtype=torch.float64
    )
    ends = torch.tensor([start, stop], dtype=torch.float64)
    first, last = torch.stack(alpha_sigma(ends)).sum(0).tolist()
    return sampler(first * x) / last


AZULA = [
    (name, order)
    for name in ('vABSampler', 'zABSampler', 'zEABSampler', 'xEABSampler', 'REABSampler')
    for order in (2, 3, 4)
]
SCHEDULES = ('RectifiedSchedule', 'CosineSchedule', 'VPSchedule', 'VESchedule', 'DecaySchedule')

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
