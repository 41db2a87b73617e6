"""One model for all snapshots of a moving distribution and the times between (Albergo et al. 2023, Multimarginal).

    x(a) = sum_k a_k x_k,    sum_k a_k = 1;    x_k is a point of the snapshot at t = k / 3, k = 0, 1, 2, 3
The network learns g_k(a, x) = E[x_k | x(a) = x] for all weights a. A path a(t) is chosen after training; along it,
dx/dt = sum_k da_k/dt g_k moves points through the laws of x(a). `edges` leads from one snapshot to the next in straight
lines, `curved` replaces the middle one by the mean of two parabolas, `direct` leads from the last to the first. Two
Gaussians circle the origin; t = 1/2 is held out. Pairs of snapshots are random, or optimal from each to the next.
`linear`: midpoints of optimal pairs; `real`: draws from the law.       sh run.sh examples/multimarginal.py
"""

import dataclasses
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch

from config import only
from data_loading.toy2d import circling, load_snapshots, optimal_partners
from data_utils import DATASETS, DataSpec
from evaluation.distances import floor, wasserstein
from networks import NETWORKS, mlp
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer

DATASETS['random_pairs'] = DataSpec(partial(load_snapshots, (0, 1 / 3, 2 / 3, 1), False), (4, 2), scale='float')
DATASETS['optimal_pairs'] = DataSpec(partial(load_snapshots, (0, 1 / 3, 2 / 3, 1), True), (4, 2), scale='float')
NETWORKS['each_snapshot'] = lambda config, shape, num_classes, cond: mlp(config, (4, 2), num_classes, cond)
PATHS = {  # t -> a (4,)
    'edges': lambda t: (1 - (3 * t - torch.arange(4)).abs()).clamp(min=0),
    'curved': lambda t: PATHS['edges'](t) + max(0, (3 * t - 1) * (2 - 3 * t) / 4) * torch.tensor([-1, 1, 1, -1]),
    'direct': lambda t: torch.tensor([1 - t, 0, 0, t]),
}


@cache
def expected(t, n):  # n points at time t, and the distances from them that linear interpolation and other draws have
    exact, a, b, *others = (circling(np.random.default_rng(i), n, s) for i, s in enumerate([t, 1 / 3, 2 / 3] + 5 * [t]))
    found = {'linear': wasserstein((a + optimal_partners(a, b)) / 2, exact)} if t == 0.5 else {}
    return exact, found | floor('wasserstein', [wasserstein(other, exact) for other in others])


class Multimarginal(ExampleDiffusionTrainer):
    independent, encode = False, staticmethod(lambda x: x[:, 0])  # samples start from held-out points at t = 1

    def prepare_batch_fn(self, batch, is_train):
        prepared, z2 = super().prepare_batch_fn(batch, is_train), torch.randn(len(batch[0]), 4, device=self.device) ** 2
        a = 1.3 * z2 / z2.sum(1, keepdim=True) - 0.3 / 4  # from a simplex that is a little larger, for curved paths
        return dataclasses.replace(prepared, x1=batch[0][:, -1], cond={'a': a})

    def loss_fn(self, batch, model_fn):
        xa = torch.einsum('bk,bkd->bd', batch.cond['a'], batch.x_original)
        return (model_fn(torch.stack([xa] * 4, 1), 0 * batch.t, **batch.cond) - batch.x_original).square().mean((1, 2))

    def draw(self, model_fn, inputs, solver, path='edges', stop=0.0):
        x, steps = inputs.x1, self.config.sample_nfe or self.config.num_sample_steps
        for t, s in pairwise(torch.linspace(1, stop, steps + 1).tolist()):
            a, da = PATHS[path]((t + s) / 2).to(x), (PATHS[path](s) - PATHS[path](t)).to(x)
            g = model_fn(torch.stack([x] * 4, 1), x.new_zeros(len(x)), a=a.expand(len(x), 4))
            x = x + torch.einsum('k,bkd->bd', da, g)
        return x

    def show(self, name, x, inputs):
        super().show(name, x, dataclasses.replace(inputs, truth=expected(0.5 if 'half' in name else 0.0, len(x))[0]))

    def samplers(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        stops = {'edges_half': 0.5, 'curved_half': 0.5, 'edges_0': 0.0, 'direct_0': 0.0}
        return {name: partial(self.draw, solver='', path=name.split('_')[0], stop=t) for name, t in stops.items()}

    def sample_metrics(self, x, inputs):
        references = {'_half': expected(0.5, len(x)), '_0': expected(0.0, len(x))}  # one applies
        found = {f'wasserstein{end}': wasserstein(x.cpu(), exact) for end, (exact, _) in references.items()}
        return found | {f'{name}{end}': value for end, (_, more) in references.items() for name, value in more.items()}


if __name__ == '__main__':
    runs = {name: dict(trainer_class=Multimarginal, dataset=f'{name}_pairs') for name in ('random', 'optimal')}
    flags = '--preset toy2d --network each_snapshot --num_sample_steps 100'
    side_by_side(runs, ('final/*_half/*_half', 'final/*_0/*_0'), flags)
