"""Pairs by chance, by optimal transport or Sinkhorn, and what a condition does to them (Cheng and Schwing 2025).

A flow learns straight paths if nearby points are paired, and straight paths need few steps (Tong et al. 2024,
algorithm 3). But if the pairs depend on a condition c of x0, then x1 given c is no longer what sampling starts from.
C2OT gives each x1 the condition of its x0 in pairs drawn by chance, and adds it to the cost of transport:

    cost(x0, x1) = |x0 - x1|^2 + w |c(x0) - c(x1)|^2        w = 0: plain optimal transport, w = inf: pairs by chance
w is such that a share `ratio` of all pairs costs no more than the pair by chance of the same x0. `immiscible` takes the
nearest of four (Li et al. 2025). x0 are moons, x1 eight Gaussians, c is the first coordinate of x0. That of a sample
should be the same: `condition_error` is the root mean square difference.   sh run.sh examples/ot_coupling.py
"""

import dataclasses
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment

from config import Config, choose
from data_loading.toy2d import load_pairs
from data_utils import DATASETS, DataSpec
from evaluation.distances import distance_from_set
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer

DATASETS['gaussians_to_moons'] = DataSpec(partial(load_pairs, 'moons', 'eight_gaussians'), (2,), scale='float')


def sinkhorn(cost, reg=0.05, rounds=30):  # (B, B) -> the plan with entropy `reg`: rows and columns sum to 1
    log_plan = -cost / reg
    for dim in [1, 0] * rounds:
        log_plan = log_plan - log_plan.logsumexp(dim, keepdim=True)
    return log_plan.exp()


COUPLINGS = {  # cost of x0 (rows) and x1 (columns), (B, B) -> partner of each x0, (B,)
    'chance': lambda cost: torch.arange(len(cost), device=cost.device),
    'immiscible': lambda cost: (cost / (torch.rand_like(cost).argsort(1) < 4)).argmin(1),
    'ot': lambda cost: torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(cost.device),  # CPU-GPU sync
    'sinkhorn': lambda cost: sinkhorn(cost).multinomial(1)[:, 0],
}


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    coupling: str = 'ot'  # key of COUPLINGS
    ratio: float = 1.0  # 1: w = 0; 0: w is so large that pairs keep the condition


class Coupled(ExampleDiffusionTrainer):
    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        return dataclasses.replace(prepared, label=None, cond={'first': prepared.x0[:, :1]})

    def couple(self, x0, x1, label):
        x1 = x1[torch.randperm(len(x1), device=x1.device)]  # pairs by chance, the diagonal of the cost
        cost, apart = ((a[:, None] - b).square().sum(2) for a, b in ((x0, x1), (x0[:, :1], x0[:, :1])))
        w = ((cost.diagonal()[:, None] - cost) / apart).nan_to_num(torch.inf)  # (B, B): at equal cost
        k = 1 + round((1 - self.config.ratio) * (w.numel() - 1))  # quantile() refuses large batches
        cost = cost + apart * w.clamp(0, 1e12).flatten().kthvalue(k).values
        return x1[choose('coupling', self.config.coupling, COUPLINGS)(cost)]

    def samplers(self):
        return {f'euler_{n}': partial(self.draw, solver='euler', nfe=n, time_grid='uniform') for n in (1, 2, 4, 40)}

    def sample_metrics(self, x, inputs):
        error = (x[:, :1] - inputs.cond['first'].to(x)).square().mean().sqrt()
        return distance_from_set(x, 'moons') | {'condition_error': float(error)}


if __name__ == '__main__':
    settings = {name: dict(coupling=name) for name in COUPLINGS} | {'c2ot': dict(coupling='ot', ratio=0.05)}
    side_by_side(
        {name: dict(own, trainer_class=Coupled, dataset='gaussians_to_moons') for name, own in settings.items()},
        numbers=('final/*/wasserstein', 'final/*/condition_error', 'final/euler_1/real_w*'),
        default_flags='--preset toy2d --global_batch_size 256',
        config_class=Settings,
    )
