"""A Schroedinger bridge between two sets, by iterated Markovian fitting (Shi et al. 2023; De Bortoli et al. 2024).

Pairs (x0, x1) are joined by Brownian bridges, xt = (1 - t) x0 + t x1 + S sqrt(t (1 - t)) z. The network learns the way
that is left, over the root of the time left: down to x0 for class 0, up to x1 for class 1. At first the pairs are
random. Then half of them are a true x1 and the x0 that the moving average draws from it, for the way up, and half a
true x0 and the x1 drawn from it, for the way down. What this leaves unchanged is the bridge: of all ways between the
sets with this noise, the nearest to Brownian motion. `cost` is E |x1 - x0|^2, `least` that of the best plan without
noise; `plain` keeps the random pairs.               sh run.sh examples/bridge.py
"""

import dataclasses
import itertools
from functools import partial

import torch

import utils
from data_loading.toy2d import load_pairs
from data_utils import DATASETS, DataSpec
from evaluation import pixel_metrics
from evaluation.distances import wasserstein
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer

DATA, S, STEPS = 'moons_and_gaussians', 0.4, 20
DATASETS[DATA] = DataSpec(partial(load_pairs, 'moons', 'eight_gaussians'), (2,), 2, scale='float')


class Plain(ExampleDiffusionTrainer):
    has_reference, first = False, 1.0  # first: share of the steps that have random pairs

    def prepare_batch_fn(self, batch, is_train):
        x0, _, x1 = batch
        way = torch.arange(len(x0), device=self.device) % 2
        prepared = super().prepare_batch_fn((x0, way, x1[torch.randperm(len(x1))] if is_train else x1), is_train)
        x0, x1, up = prepared.x0, prepared.x1, (prepared.label == 1)[:, None]
        if is_train and self.step > self.first * self.config.num_training_steps:
            model_fn = self.get_model_fn(next(iter(self.ema.networks.values())))
            with torch.no_grad():  # the other end, drawn from that which is true
                drawn = self.travel(model_fn, torch.where(up, x1, x0), 1 - prepared.label)
            x0, x1 = torch.where(up, drawn, x0), torch.where(up, x1, drawn)
        noise = S * (prepared.t * (1 - prepared.t)).sqrt()[:, None] * torch.randn_like(x0)
        return dataclasses.replace(prepared, x0=x0, x1=x1, x_original=noise)  # a place for the noise

    def loss_fn(self, batch, model_fn):
        xt = self.process.compute_xt(batch.x0, batch.x1, self.process(batch.t)) + batch.x_original
        end = torch.where((batch.label == 1)[:, None], batch.x1, batch.x0)
        left = torch.where(batch.label == 1, 1 - batch.t, batch.t)[:, None]
        return utils.image_square_error(model_fn(xt, batch.t, batch.label), (end - xt) / left.sqrt())

    def travel(self, model_fn, x, way):  # (n,) 0 down, 1 up: towards the end that the network sees
        for left, next_left in itertools.pairwise((torch.linspace(1, 0, STEPS + 1) ** 2).tolist()):
            t = torch.where(way == 1, 1 - left, left).clamp(self.config.t_min, self.config.t_max)
            share, std = (left - next_left) / left, S * ((left - next_left) * next_left / left) ** 0.5
            x = x + share * left**0.5 * model_fn(x, t, way) + std * torch.randn_like(x)
        return x

    def draw(self, model_fn, inputs, solver, way=0):  # from x1 or x0, which are beside the samples
        return self.travel(model_fn, inputs.beside[way], torch.full_like(inputs.label, way))

    def samplers(self):
        return {'down': partial(self.draw, solver='', way=0), 'up': partial(self.draw, solver='', way=1)}

    def sample_metrics(self, x, inputs):
        down, up = (float((x - start.to(x)).square().sum(1).mean()) for start in inputs.beside)  # one of them counts
        least = wasserstein(*(end.cpu() for end in inputs.beside)) ** 2
        to_x0, to_x1 = (
            pixel_metrics.distance_from_set(x, *end) for end in (('moons', '_x0'), ('eight_gaussians', '_x1'))
        )
        return {'cost_down': down, 'cost_up': up, 'least': least, **to_x0, **to_x1}


class Bridge(Plain):
    first = 0.25


if __name__ == '__main__':
    side_by_side(
        {name: dict(trainer_class=c, dataset=DATA) for name, c in (('plain', Plain), ('bridge', Bridge))},
        numbers=('final/down/*_x0', 'final/down/cost_down', 'final/up/*_x1', 'final/up/cost_up', 'final/up/least'),
        usual='--preset toy2d',
    )
