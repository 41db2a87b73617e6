"""Samples of a density known up to a constant: a learned transport with weights (Albergo and Vanden-Eijnden 2025).

There are no data. The energy U(x, t) turns from N(0, I) at t = 1, where walkers start, into 40 narrow modes at t = 0.
Let s = 1 - t. With any drift b, walkers have weights exp(A), whose mean is Z(s) / Z(0):

    dx = (b - e grad U) ds + sqrt(2 e) dW,    dA = (div b - grad U . b - dU/ds) ds               (algorithm 1)
    loss = (div b - grad U . b - dU/ds + dF/ds)^2,    F = -log Z                                 (PINN objective)
b and dF/ds learn at positions of earlier walkers. Without b (`ais`), this is annealed importance sampling. The noise e
is chosen after training; `nets_0.01` has e = 0.01 where the modes are sharp. The weights, of evaluation/annealing.py,
are exact for any number of steps. `real_log_z` is the exact value.                  sh run.sh examples/nets.py
"""

import math

import torch
from torch import nn

from config import only
from data_utils import DATASETS, DataSpec
from evaluation.annealing import effective_sample_size, log_mean_weight, no_drift, walk
from optimizers import get_optimizer
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer, ProcessedBatch
from utils import jvp

NOISES, TIMES = (0.001, 0.003, 0.01), 16  # TIMES: of a walker in a batch
MEANS, STD = 2 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 1, math.log1p(math.e) / 40
DATASETS['none'] = DataSpec(lambda config: [(torch.zeros(n, 2), torch.zeros(n)) for n in (4096, 1024)], scale='float')


def energy(x, t):  # (n, 2), (n,) -> U (n,), dU/dx (n, 2), dU/dt (n,)
    with torch.enable_grad():
        x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
        modes = -(-(x[:, None] - MEANS.to(x)).square().sum(2) / (2 * STD**2)).logsumexp(1)  # not normalised
        sharp = torch.expm1(4 * (1 - t)) / math.expm1(4)
        u = sharp * modes + (1 - sharp) * (x.square().sum(1) / 2 + math.log(2 * math.pi))
        return u.detach(), *torch.autograd.grad(u.sum(), (x, t))


class Nets(ExampleDiffusionTrainer):
    independent, has_reference = False, False

    def setup_networks(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        super().setup_networks()
        self.modules['dF'] = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 1)).to(self.device)
        self.optimizers['dF'] = get_optimizer(self.config, self.modules['dF'])

    def walk(self, drift, x, times, noise=NOISES[1]):
        return walk(energy, lambda x, t: -drift(x, t), x, times.to(x), noise * torch.exp(4 * times.to(x)))

    @torch.no_grad()
    def prepare_batch_fn(self, batch, is_train):
        x1 = torch.randn(-(-len(batch[0]) // TIMES), 2, device=self.device)  # (walkers, 2)
        times = 1 - (torch.arange(TIMES) + torch.rand(TIMES)) / TIMES
        x = self.walk(self.get_model_fn(self.network) if self.step else no_drift, x1, times)[0].flatten(0, 1)
        x, t = x[: len(batch[0])], times.to(x).repeat_interleave(len(x1))[: len(batch[0])]
        return ProcessedBatch(x, x, torch.randn_like(x), t, None)

    def loss_fn(self, batch, model_fn):  # the network is dx/dt = -b
        x, t, axes = batch.x0, batch.t, torch.eye(2).to(batch.x0)
        _, force, du_dt = energy(x, t)
        (v, dv_1), (_, dv_2) = (jvp(lambda x: model_fn(x, t), (x,), (axis.expand_as(x),)) for axis in axes)
        return ((force * v).sum(1) - dv_1[:, 0] - dv_2[:, 1] + du_dt + self.modules['dF'](t[:, None])[:, 0]).square()

    def sample_metrics(self, x, inputs):
        times = torch.linspace(1, 0, (self.config.sample_nfe or self.config.num_sample_steps) + 1)
        numbers = {'real_log_z': math.log(len(MEANS) * 2 * math.pi * STD**2)}
        drifts = {'ais': no_drift, 'nets': self.get_model_fn(next(iter(self.weights().values())))}
        for name, e in ((name, e) for name in drifts for e in NOISES):
            a = self.walk(drifts[name], inputs.x1, times, e)[1].double()
            numbers |= {f'ess_{name}_{e:g}': effective_sample_size(a), f'log_z_{name}_{e:g}': log_mean_weight(a)}
        return {name: float(value) for name, value in numbers.items()}


if __name__ == '__main__':
    flags = '--num_sample_steps 100 --batch_shards 2 --global_batch_size 1024 --num_training_steps 1500'
    side_by_side({'nets': dict(trainer_class=Nets, dataset='none')}, ('final/adams/*',), f'--preset toy2d {flags}')
