"""A sample of p(x0 | xt) in one step: a flow map from new noise (Potaptchik et al. 2026, Meta Flow Maps).

A flow map from xt gives one x0. This one starts from new noise e, with t and xt as conditions: given these, the flow of
z = (1 - r) x0 + r e ends in the posterior of x0. With Z(z, r, s) = z + (s - r) u, u(z, r, s; t, xt) trains on e - x0
where s = r, and elsewhere on the Lagrangian rule of examples/flow_map.py: dZ/ds = u(Z, s, s; t, xt), right side fixed.
Numbers: the mean distance of N samples Z(e, 1, 0) from N exact ones, W, over STATES states xt at each t. `real`: other
exact samples. `sde_n`: the SDE of a plain flow in n evaluations. sh run.sh examples/stochastic_flow_map.py
"""

import dataclasses
from functools import partial

import torch

from config import only
from evaluation.distances import wasserstein
from sampling import sample
from scripts.compare import side_by_side
from solvers import SOLVERS, Solver
from trainer import ExampleDiffusionTrainer, SampleInputs
from utils import bcast_right, image_square_error, jvp

SOLVERS['map'] = Solver(lambda z, r, s, predict, noise: z + (s - r) * predict(z, r, s).velocity, nfe=1, order=1)
TIMES, STATES, N, STD = (0.3, 0.5, 0.7, 0.9), 64, 128, 0.05
MEANS = 0.7 * torch.stack([f(torch.arange(8) * torch.pi / 4) for f in (torch.cos, torch.sin)], 1)  # (8, 2)


def posterior(xt, t):
    """A sample of x0 (n, 2) for each xt (n, 2) at time t: Bayes, for equally likely N(m, STD^2), m in MEANS."""
    var = ((1 - t) * STD) ** 2 + t**2  # variance of xt in a component
    m = MEANS[(-(xt[:, None] - (1 - t) * MEANS).square().sum(2) / (2 * var)).softmax(1).multinomial(1)[:, 0]]
    return m + (1 - t) * STD**2 / var * (xt - (1 - t) * m) + STD * t / var**0.5 * torch.randn_like(m)


class Plain(ExampleDiffusionTrainer):
    def samplers(self):
        formulas = dict(process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        only(self.config, dataset='eight_gaussians', label_dropout=1.0, **formulas)
        return {'posterior': partial(self.draw, solver=self.config.solver)}  # for pictures

    def methods(self, model_fn, t, xt):  # name -> samples of the posterior
        sde = partial(sample, model_fn, self.process, xt / t, t_max=t, solver='sde_dpmpp_2m')
        return {f'sde_{n}': sde(nfe=n) for n in (1, 2, 4, 20)}

    @torch.no_grad()
    def sample_metrics(self, x, inputs):
        model_fn, found = self.get_model_fn(next(iter(self.weights().values()))), {}
        for t in TIMES:
            xt = ((1 - t) * posterior(torch.zeros(STATES, 2), 1) + t * torch.randn(STATES, 2)).repeat_interleave(N, 0)
            for name, x in {'real': posterior(xt, t), **self.methods(model_fn, t, xt.to(self.device))}.items():
                found[f'{name}_t={t:g}'] = sum(map(wasserstein, x.cpu().split(N), posterior(xt, t).split(N))) / STATES
        return found


class MetaFlowMap(Plain):
    has_reference = False  # a sample of x0 is not its mean

    def prepare_batch_fn(self, batch, is_train):
        batch = super().prepare_batch_fn(batch, is_train)
        r, (random, share, t) = batch.t, torch.rand(3, len(batch.t), device=self.device)
        xt = self.process.compute_xt(batch.x0, torch.randn_like(batch.x0), self.process(t))
        return dataclasses.replace(batch, cond={'s': torch.where(random < 0.75, r, share * r), 'at': t, 'state': xt})

    def loss_fn(self, batch, model_fn):
        r, s, x0, e = batch.t, batch.cond['s'], batch.x0, batch.x1
        z, ds = self.process.compute_xt(x0, e, self.process(r)), bcast_right(s - r, x0.ndim)
        u = partial(model_fn, at=batch.cond['at'], state=batch.cond['state'])
        average, slope = jvp(lambda s: u(z, r, s=s), (s,), (torch.ones_like(s),))
        target = torch.no_grad()(u)(z + ds * average, s, s=s)
        return image_square_error(average + ds * slope, torch.where(ds == 0, e - x0, target))

    def methods(self, model_fn, t, xt):
        given = SampleInputs(torch.randn_like(xt), cond={'at': torch.full_like(xt[:, 0], t), 'state': xt})
        return {f'steps_{n}': self.draw(model_fn, given, 'map', nfe=n) for n in (1, 2, 4)}


if __name__ == '__main__':
    meta = dict(trainer_class=MetaFlowMap, solver='map', time_grid='uniform')
    flags = '--preset toy2d --dataset eight_gaussians --label_dropout 1'
    side_by_side({'plain': dict(trainer_class=Plain), 'meta': meta}, default_flags=flags)
