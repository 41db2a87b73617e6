"""A stochastic interpolant between two data sets, with noise between (Albergo, Boffi and Vanden-Eijnden 2023, sec. 2).

    xt = (1 - t) x0 + t x1 + gamma(t) z,    gamma = 2 t (1 - t),    z ~ N(0, I);    x0 moons, x1 eight Gaussians

The network gives v = E[x1 - x0 | xt] and eta = E[z | xt]. With these, the velocity is v + gamma' eta and the score
-eta / gamma. For every noise level e >= 0, this SDE has the distribution of xt at all times, down and up:

    dx = v dt + eta dgamma - e eta |dt| + sqrt(2 e gamma) dw
`plain` is the flow without z. All take 100 steps; `real` is for fresh points.    sh run.sh examples/interpolant.py
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch

import utils
from config import only
from data_loading.toy2d import load_pairs
from data_utils import DATASETS, DataSpec
from evaluation.distances import distance_from_set
from networks import NETWORKS, mlp
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer, ProcessedBatch

DATASETS['moons_to_gaussians'] = DataSpec(partial(load_pairs, 'moons', 'eight_gaussians'), (2,), scale='float')
NETWORKS['two_outputs'] = lambda config, shape, num_classes: mlp(config, (2, *shape), num_classes)


@dataclass
class WithNoise(ProcessedBatch):
    z: torch.Tensor | None = None  # like x0


class Interpolant(ExampleDiffusionTrainer):
    gamma, noises = staticmethod(lambda t: 2 * t * (1 - t)), (0.0, 0.5, 2.0)

    def couple(self, x0, x1, label):  # new pairs in each batch
        return x1[torch.randperm(len(x1), device=x1.device)]

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        return WithNoise(**vars(prepared), z=torch.randn_like(prepared.x0))

    def loss_fn(self, batch, model_fn):
        xt = self.process.compute_xt(batch.x0, batch.x1, self.process(batch.t))
        xt = xt + utils.bcast_right(self.gamma(batch.t), xt.ndim) * batch.z
        out = model_fn(torch.stack([xt, xt], 1), batch.t)  # (B, 2, 2): v and eta
        return utils.image_square_error(out, torch.stack([batch.x1 - batch.x0, batch.z], 1))

    def draw(self, model_fn, inputs, solver, start=1, noise=0.0):
        x, steps = inputs.x1 if start else inputs.truth, self.config.sample_nfe or 100
        for t, s in itertools.pairwise(torch.linspace(start, 1 - start, steps + 1).tolist()):
            middle, dt = (t + s) / 2, abs(s - t)  # the middle of a step: the score is singular at 0 and 1
            v, eta = model_fn(torch.stack([x, x], 1), x.new_full((len(x),), middle)).unbind(1)
            x = x + (s - t) * v + (self.gamma(s) - self.gamma(t)) * eta - noise * dt * eta
            x = x + (2 * noise * self.gamma(middle) * dt) ** 0.5 * torch.randn_like(x)
        return x

    def samplers(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        down = {f'down_{e:g}': partial(self.draw, solver='', start=1, noise=e) for e in self.noises}
        return down | {f'up_{e:g}': partial(self.draw, solver='', start=0, noise=e) for e in self.noises}

    def sample_metrics(self, x, inputs):
        return distance_from_set(x, 'moons', '_x0') | distance_from_set(x, 'eight_gaussians', '_x1')


class Plain(Interpolant):
    gamma, noises = staticmethod(lambda t: 0 * t), (0.0,)


if __name__ == '__main__':
    own = dict(dataset='moons_to_gaussians', network='two_outputs')
    side_by_side(
        {'plain': dict(own, trainer_class=Plain), 'interpolant': dict(own, trainer_class=Interpolant)},
        numbers=('final/down*/*wasserstein_x0', 'final/up*/*wasserstein_x1'),
        default_flags='--preset toy2d',
    )
