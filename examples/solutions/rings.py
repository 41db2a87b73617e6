"""Exercise 3: two rings in the plane.

sh run.sh examples/solutions/rings.py --preset toy2d --dataset rings --num_training_steps 500
"""

import math

import torch

from data_utils import DATASETS, DataSpec
from main import main
from trainer import ExampleDiffusionTrainer

RADII = torch.tensor([0.3, 0.9])  # (2,), one for each class


def load(config):
    generator = torch.Generator().manual_seed(config.seed)
    label = torch.randint(2, (5000,), generator=generator)
    angle = 2 * math.pi * torch.rand(5000, generator=generator)
    radius = RADII[label] + 0.02 * torch.randn(5000, generator=generator)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)  # (N, 2)
    return (x[500:], label[500:]), (x[:500], label[:500])


DATASETS['rings'] = DataSpec(load, num_classes=2, classes=('inner', 'outer'), scale='float')


class Rings(ExampleDiffusionTrainer):
    def sample_metrics(self, x, inputs):  # x (n, 2)
        radius = x.norm(dim=1).cpu()
        wrong = (radius - RADII[inputs.label.cpu()]).abs() > 0.15
        return super().sample_metrics(x, inputs) | {'wrong_ring': float(wrong.float().mean())}


if __name__ == '__main__':
    main(trainer_class=Rings)
