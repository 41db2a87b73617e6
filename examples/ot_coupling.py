"""Pair noise and points by chance, by optimal transport, or each point with the nearest of a few noises.

A flow learns straight paths if nearby points are paired, and straight paths need few steps (Tong et al. 2024,
algorithm 3). `ot` pairs a batch exactly, with the least sum of squared distances, and within each class: across
classes, the noise would depend on the class. `immiscible` is cheaper and needs no assignment: of four noises it takes
the nearest to the point (Li et al. 2025, Improved Immiscible Diffusion).

    sh run.sh examples/ot_coupling.py                     on moons
    sh run.sh examples/ot_coupling.py --preset digits_long
"""

from functools import partial

import torch
from scipy.optimize import linear_sum_assignment

from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


class Chance(ExampleDiffusionTrainer):
    def samplers(self):  # 2, 4 and 8 evaluations of the network
        return {f'euler_{n}': partial(self.draw, solver='euler', nfe=n, time_grid='uniform') for n in (2, 4, 8)}


class OptimalTransport(Chance):
    def couple(self, x0, x1, label):
        paired = torch.empty_like(x1)
        for value in label.unique():
            rows = (label == value).nonzero()[:, 0]
            cost = torch.cdist(x0[rows].flatten(1), x1[rows].flatten(1)).square()
            _, partner = linear_sum_assignment(cost.cpu().numpy())  # CPU-GPU sync
            paired[rows] = x1[rows[torch.from_numpy(partner).to(rows.device)]]
        self.log('train/distance', (x0 - paired).flatten(1).norm(dim=1))
        return paired


class Immiscible(Chance):
    def couple(self, x0, x1, label):
        several = torch.stack([x1, *(self.process.sample_base(x0) for _ in range(3))])  # (4, B, ...)
        nearest = (several - x0).flatten(2).norm(dim=2).argmin(0)  # (B,)
        paired = several[nearest, torch.arange(len(x0), device=x0.device)]
        self.log('train/distance', (x0 - paired).flatten(1).norm(dim=1))
        return paired


if __name__ == '__main__':
    side_by_side(
        {
            'chance': dict(trainer_class=Chance),
            'ot': dict(trainer_class=OptimalTransport),
            'immiscible': dict(trainer_class=Immiscible),
        },
        numbers=('final/*/wasserstein', 'final/euler_2/real_w*', 'final/*/frechet'),
        default_flags='--preset toy2d',
    )
