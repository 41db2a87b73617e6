"""Samples and their log-likelihoods in a few evaluations: the flow map of (x, log p) (Ai et al. 2025, "F2D2").

Along dx/dt = v(x, t), d log p / dt = -div v. One network gives averages from t to s, of the velocity (u) and of the
divergence (D), so that one evaluation leads to

    X(x, t, s) = x + (s - t) u(x, t, s)    with    log p_s(X) = log p_t(x) - (s - t) D(x, t, s)

for s < t (samples) and s > t (the density of data). Where s = t, it trains on x1 - x0 and the exact div u(x, t, t);
elsewhere on d/ds (s - t) (u, D)(x, t, s) = (u, D)(X, s, s), with the right side held fixed, as in flow_map.py. Held-out
points have the mean `nats_n` of -log p in n evaluations, and `error_n` of |log p - exact|. `plain` is a flow without D:
n Euler steps or 32 of adams, with two backward passes each.               sh run.sh examples/few_step_likelihood.py
"""

import itertools
import math

import torch

from config import choose
from data_loading.toy2d import TOY2D
from evaluation.likelihood import log_likelihood
from examples.flow_map import FlowMap, Plain, Settings
from networks import NETWORKS, mlp
from scripts.compare import side_by_side
from utils import bcast_right, jvp

NETWORKS['three'] = lambda config, shape, num_classes, cond=None: mlp(config, (3,), num_classes, cond)


class PlainLikelihood(Plain):
    def log_prob(self, model_fn, x0, n):
        steps = dict(solver='euler' if n < 10 else 'adams', num_steps=n)
        return log_likelihood(model_fn, self.process, x0, divergence='exact', **steps).log_prob

    def sample_metrics(self, x, inputs):
        x0, model_fn = self.test_loader.everything()[0], self.get_model_fn(next(iter(self.weights().values())))
        exact = choose('dataset', self.config.dataset, TOY2D).density(x0).log()
        found = {n: self.log_prob(model_fn, x0.to(self.device), n).cpu().double() for n in (1, 2, 4, 8, 32)}
        nats = {f'nats_{n}': float(-log_p.mean()) for n, log_p in (found | {'exact': exact}).items()}
        errors = {f'error_{n}': float((log_p - exact).abs().mean()) for n, log_p in found.items()}
        return super().sample_metrics(x, inputs) | nats | errors


class JointMap(PlainLikelihood, FlowMap):
    def prepare_batch_fn(self, batch, is_train):
        new = super().prepare_batch_fn(batch, is_train)
        new.cond['s'] = torch.where(torch.rand_like(new.t) < 0.5, new.t, self.time_sampler(torch.rand_like(new.t)))
        return new

    def get_model_fn(self, module, train=False):  # a point gets a third coordinate, 0, where D comes out
        fn = super().get_model_fn(module, train)
        return lambda xt, *given, **s: fn(torch.nn.functional.pad(xt, (0, 1)), *given, **s).split([2, 1], 1)

    def loss_fn(self, batch, model_fn):
        t, s = batch.t, batch.cond['s']
        xt, dt = self.process.compute_xt(batch.x0, batch.x1, self.process(t)), bcast_right(s - t, 2)
        both = lambda x, t, s: torch.cat(model_fn(x, t, batch.label, s=s), 1)  # noqa: E731  (B, 3)
        average, slope = jvp(lambda s: both(xt, t, s), (s,), (torch.ones_like(s),))
        with torch.no_grad():
            arrived = both(xt + dt * average[:, :2], s, s)
            d0, d1 = (jvp(lambda x: both(x, t, t), (xt,), (e.expand_as(xt),))[1] for e in torch.eye(2).to(xt))
        here = torch.cat([batch.x1 - batch.x0, d0[:, :1] + d1[:, 1:2]], 1)
        return (average + dt * slope - torch.where(dt == 0, here, arrived)).square() @ t.new_tensor([0.5, 0.5, 0.05])

    def log_prob(self, model_fn, x0, n):
        x, total = (1 - self.config.t_min) * x0, 2 * math.log(1 - self.config.t_min)
        for t, s in itertools.pairwise(torch.linspace(self.config.t_min, self.config.t_max, n + 1).tolist()):
            u, divergence = model_fn(x, x.new_full((len(x),), t), s=x.new_full((len(x),), s))
            x, total = x + (s - t) * u, total + (s - t) * divergence[:, 0]
        return total - (x.square() / s**2 + math.log(2 * math.pi * s**2)).sum(1) / 2  # N(0, s^2) at t_max


if __name__ == '__main__':
    own = dict(trainer_class=JointMap, rule='lagrangian', network='three', solver='flow_map', label_dropout=1.0)
    side_by_side(
        {'plain': own | dict(trainer_class=PlainLikelihood, network='mlp', solver='euler'), 'map': own},
        numbers=('final/steps_1/nats*', 'final/steps_1/error*', 'final/*/wasserstein'),
        default_flags='--preset toy2d --time_input slow --time_grid uniform',
        config_class=Settings,
    )
