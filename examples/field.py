"""Periodic random fields of a known law, made by this page: does a network learn their spectrum, and that they wrap?

White noise on N x N points, with every Fourier mode k scaled by sqrt(P(k)), is a Gaussian field of power spectrum P.
Its xt has the power (1 - t)^2 P + t^2, so the least possible squared error of the velocity is known:

    E |x1 - x0 - E[x1 - x0 | xt]|^2 = P / ((1 - t)^2 P + t^2) for each mode,    sqrt(P) pi / 2 on average over t

`reference`, on held-out fields, can fall to this `least`. `spectrum_error` is the root mean square over wave numbers of
E / E_exact - 1, where E is the power of all modes of a wave number. `seam` is the mean squared difference of neighbours
across the border, divided by the exact one; `real_...` is for as many exact draws. Zeros around a field let a
convolution see the border (Kamb and Ganguli 2025), but these fields wrap: `circular`.   sh run.sh examples/field.py
"""

from functools import partial

import torch

from config import only
from data_utils import DATASETS, DataSpec
from evaluation.scores import energy_spectrum
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer

N = 16
modes = torch.fft.fftfreq(N, 1 / N)
k = torch.hypot(modes[:, None], modes)  # (N, N), the wave number of each mode
P = (1 + k**2 / 4) ** -2.5
P = 0.25 * P / P.mean()  # the variance of a point is the mean of P


def draw(n, seed):  # (n, 1, N, N)
    white = torch.randn(n, 1, N, N, generator=torch.Generator().manual_seed(seed))
    return torch.fft.ifft2(P.sqrt() * torch.fft.fft2(white)).real


def load(config):
    x = draw(22_000, 2 * config.seed)
    return (x[2000:], torch.zeros(20_000)), (x[:2000], torch.zeros(2000))


DATASETS['random_fields'] = DataSpec(load, (1, N, N), scale='float')


def least(low=0.001, high=0.999):
    """The least mean squared error of the velocity, at uniform times from low to high."""
    angles = [torch.atan(t / (1 - t) / P.sqrt()) for t in (low, high)]
    return float((P.sqrt() * (angles[1] - angles[0])).mean() / (high - low))


def errors(x, name=''):
    """Spectrum and seam of fields (n, 1, N, N) against the exact law."""
    E = energy_spectrum(x).mean(0)
    E_exact = torch.bincount((k + 0.5).long().flatten(), P.flatten()) / (2 * N**2)
    seam = sum((x.select(axis, 0) - x.select(axis, -1)).square().mean() for axis in (2, 3)) / 2
    exact = (P * (2 - 2 * torch.cos(2 * torch.pi * modes / N))).mean()
    error = (E / E_exact - 1).square().mean().sqrt()
    return {f'{name}spectrum_error': float(error), f'{name}seam': float(seam / exact)}


class Field(ExampleDiffusionTrainer):
    def samplers(self):
        only(self.config, dataset='random_fields', translate_prob=0.0, crop_prob=0.0, geometric_prob=0.0)
        return {'samples': partial(self.draw, solver=self.config.solver)}

    def sample_metrics(self, x, inputs):
        return errors(x.cpu()) | errors(draw(len(x), 2 * self.config.seed + 1), 'real_') | {'least': least()}


if __name__ == '__main__':
    side_by_side(
        {padding: dict(trainer_class=Field, padding=padding) for padding in ('zeros', 'circular')},
        numbers=('eval/reference', 'final/*'),
        default_flags='--dataset random_fields --ema_decays 0.99 --global_batch_size 64 --num_training_steps 400',
    )
