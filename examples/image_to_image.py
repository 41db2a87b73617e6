"""Restore degraded digits by a flow that starts at the degraded picture, not at noise (Albergo et al. 2024).

The coupling depends on the data: x0 is a picture, x1 its degraded copy with some noise. In both runs the network gets
the degraded picture as a condition besides xt, and no class. `rmse` is the error of restored held-out digits, in units
of the grey scale [0, 1], after 1, 2, 5 and 20 evaluations of the network.

    sh run.sh examples/image_to_image.py                              lower halves are missing
    sh run.sh examples/image_to_image.py --degradation blurred        or small
"""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F

from config import Config, choose
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


def small(x):  # a quarter of the side length, then enlarged again
    return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)


DEGRADATIONS = {
    'masked': lambda x: torch.cat([x[:, :, : x.shape[2] // 2], torch.full_like(x[:, :, x.shape[2] // 2 :], -1)], 2),
    'blurred': lambda x: F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode='replicate'), 5, stride=1),
    'small': small,
}


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    degradation: str = 'masked'
    """How pictures are degraded: a key of DEGRADATIONS."""
    noise: float = 0.3
    """Standard deviation of the noise on the degraded picture, which makes several answers possible."""


class FromNoise(ExampleDiffusionTrainer):
    independent = False  # sampling inputs come from held-out pictures, which are shown as the truth

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        degrade = choose('degradation', self.config.degradation, DEGRADATIONS)
        return dataclasses.replace(prepared, cond={'degraded': degrade(prepared.x0)})

    def samplers(self):
        return {f'euler_{n}': partial(self.draw, solver='euler', nfe=n, time_grid='uniform') for n in (1, 2, 5, 20)}

    def sample_metrics(self, x, inputs):
        truth = self.decode(inputs.truth)
        return {'rmse': float((x - truth).square().mean().sqrt()), **super().sample_metrics(x, inputs)}


class FromDegraded(FromNoise):
    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        degraded = prepared.cond['degraded']
        return dataclasses.replace(prepared, x1=degraded + self.config.noise * prepared.x1)


if __name__ == '__main__':
    side_by_side(
        {'from_noise': dict(trainer_class=FromNoise), 'from_degraded': dict(trainer_class=FromDegraded)},
        numbers=('final/*/rmse', 'final/*/frechet'),
        default_flags='--preset digits_long --num_training_steps 800 --label_dropout 1',
        config_class=Settings,
    )
