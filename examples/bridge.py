"""A Schroedinger bridge between two data sets, by iterated Markovian fitting (Shi et al. 2023; De Bortoli et al. 2024).

Pairs (x0, x1) are joined by Brownian bridges, xt = (1 - t) x0 + t x1 + S sqrt(t (1 - t)) z. The network predicts the
displacement that remains over the root of the time that remains: down to x0 for class 0, up to x1 for class 1. After
random pairs, half of the pairs are a true x1 and an x0 that the moving average draws from it, half the reverse. The
fixed point is nearest to Brownian motion with noise S. `least`: least E |x1 - x0|^2.  sh run.sh examples/bridge.py
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from config import only
from data_loading.toy2d import load_pairs
from data_utils import DATASETS, DataSpec
from evaluation.distances import distance_from_set, wasserstein
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer, ProcessedBatch

DATA, S, STEPS = 'moons_and_gaussians', 0.4, 20
DATASETS[DATA] = DataSpec(partial(load_pairs, 'moons', 'eight_gaussians'), (2,), 2, scale='float')


@dataclass
class WithNoise(ProcessedBatch):
    noise: torch.Tensor | None = None  # like x0


class Plain(ExampleDiffusionTrainer):
    has_reference, first = False, 1.0  # first: share of the steps with random pairs

    def prepare_batch_fn(self, batch, is_train):
        (x0, _, x1), way = batch, torch.arange(len(batch[0]), device=self.device) % 2
        prepared = super().prepare_batch_fn((x0, way, x1[torch.randperm(len(x1))] if is_train else x1), is_train)
        x0, x1, up = prepared.x0, prepared.x1, way[:, None] == 1
        if is_train and self.step > self.first * self.config.num_training_steps:
            model_fn, start = self.get_model_fn(next(iter(self.ema.networks.values()))), torch.where(up, x1, x0)
            drawn = torch.no_grad()(self.travel)(model_fn, start, 1 - way)  # the other end
            x0, x1 = torch.where(up, drawn, x0), torch.where(up, x1, drawn)
        z = S * (prepared.t * (1 - prepared.t)).sqrt()[:, None] * torch.randn_like(x0)
        return WithNoise(**vars(prepared) | dict(x0=x0, x1=x1, noise=z))

    def loss_fn(self, batch, model_fn):
        xt = self.process.compute_xt(batch.x0, batch.x1, self.process(batch.t)) + batch.noise
        end = torch.where(batch.label[:, None] == 1, batch.x1, batch.x0)
        left = torch.where(batch.label == 1, 1 - batch.t, batch.t)[:, None]
        return (model_fn(xt, batch.t, batch.label) - (end - xt) / left.sqrt()).square().mean(1)

    def travel(self, model_fn, x, way):  # way (n,): 0 down, 1 up; the network gets it as the class
        for left, next_left in pairwise((torch.linspace(1, 0, STEPS + 1) ** 2).tolist()):
            t = torch.where(way == 1, 1 - left, left).clamp(self.config.t_min, self.config.t_max)
            share, std = (left - next_left) / left, S * ((left - next_left) * next_left / left) ** 0.5
            x = x + share * left**0.5 * model_fn(x, t, way) + std * torch.randn_like(x)
        return x

    def draw(self, model_fn, inputs, solver, way=0):
        return self.travel(model_fn, (inputs.x1, inputs.truth)[way], torch.full_like(inputs.label, way))

    def samplers(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        return {'down': partial(self.draw, solver='', way=0), 'up': partial(self.draw, solver='', way=1)}

    def sample_metrics(self, x, inputs):
        down, up = (float((x - start).square().sum(1).mean()) for start in (inputs.x1, inputs.truth))  # one applies
        costs = {'cost_down': down, 'cost_up': up, 'least': wasserstein(inputs.x1.cpu(), inputs.truth.cpu()) ** 2}
        return costs | distance_from_set(x, 'moons', '_x0') | distance_from_set(x, 'eight_gaussians', '_x1')


class Bridge(Plain):
    first = 0.25


if __name__ == '__main__':
    side_by_side(
        {c.__name__.lower(): dict(trainer_class=c, dataset=DATA) for c in (Plain, Bridge)},
        numbers=('final/down/*_x0', 'final/down/cost_down', 'final/up/*_x1', 'final/up/cost_up', 'final/up/least'),
        default_flags='--preset toy2d',
    )
