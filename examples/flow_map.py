"""Samples in one, two or four steps: a flow map that teaches itself (Boffi et al. 2025).

The network gives the average velocity u(x, t, s) from t to s, so that X(x, t, s) = x + (s - t) u(x, t, s) follows the
flow in one step. Where s = t, it trains on x1 - x0; elsewhere on one of these rules, with the right side held fixed:

    lagrangian   dX/ds = u(X, s, s)                                    the velocity where it arrives
    eulerian     u = v + (s - t) du/dt,  along v = x1 - x0             mean flow (Geng et al. 2025, eq. 6 to 11)
    semigroup    X(x, t, s) = X(X(x, t, r), r, s),  r = (t + s) / 2    shortcut models (Frans et al. 2025)
    uniform      the same,  r = t + share (s - t),  share uniform      PSD-U (Boffi et al. 2025)
Training costs three to four plain flows. Time is 30 t: with 1000 t, du/dt is noise.  sh run.sh examples/flow_map.py
"""

import dataclasses
from functools import partial

import torch

from config import Config, choose, only
from networks import TIME_INPUTS
from scripts.compare import side_by_side
from solvers import SOLVERS, Solver
from trainer import ExampleDiffusionTrainer, ProcessedBatch
from utils import bcast_right, image_square_error, jvp

SOLVERS['flow_map'] = Solver(lambda x, t, s, predict, noise: x + (s - t) * predict(x, t, s).velocity, nfe=1, order=1)
RULES = {rule: rule for rule in ('lagrangian', 'eulerian', 'semigroup', 'uniform')}
TIME_INPUTS['slow'] = lambda t, process: 30 * t
WithMiddle = dataclasses.make_dataclass('WithMiddle', [('share', torch.Tensor, None)], bases=(ProcessedBatch,))


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    rule: str = 'lagrangian'


class Plain(ExampleDiffusionTrainer):
    def samplers(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        return {f'steps_{n}': partial(self.draw, solver=self.config.solver, nfe=n) for n in (1, 2, 4, 20)}


class FlowMap(Plain):
    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        s = prepared.t * torch.where(torch.rand_like(prepared.t) < 0.75, 1.0, torch.rand_like(prepared.t))
        share = torch.rand_like(s) if self.config.rule == 'uniform' else torch.full_like(s, 0.5)
        return WithMiddle(**vars(prepared) | dict(cond={'s': s}), share=share)

    def sample_inputs(self, n):
        return dataclasses.replace(super().sample_inputs(n), cond={})  # the solver passes s

    def get_model_fn(self, module, train=False):
        fn = super().get_model_fn(module, train)  # other solvers get the velocity, s = t
        return lambda xt, t, label=None, s=None: fn(xt, t, label, s=t if s is None else s)

    def loss_fn(self, batch, model_fn):
        t, s, v, u = batch.t, batch.cond['s'], batch.x1 - batch.x0, partial(model_fn, label=batch.label)
        xt, dt = self.process.compute_xt(batch.x0, batch.x1, self.process(t)), bcast_right(s - t, v.ndim)
        fixed, rule = torch.no_grad()(u), choose('rule', self.config.rule, RULES)
        if rule == 'lagrangian':
            average, slope = jvp(lambda s: u(xt, t, s=s), (s,), (torch.ones_like(s),))
            target, average = fixed(xt + dt * average, s, s=s), average + dt * slope  # dX/ds
        elif rule == 'eulerian':
            average, slope = jvp(lambda x, t: u(x, t, s=s), (xt, t), (v, torch.ones_like(t)))
            target = v + dt * slope.detach()
        else:
            r, a = t + batch.share * (s - t), bcast_right(batch.share, xt.ndim)
            average, first = u(xt, t, s=s), fixed(xt, t, s=r)
            target = a * first + (1 - a) * fixed(xt + a * dt * first, r, s=s)
        return image_square_error(average, torch.where(bcast_right(s == t, xt.ndim), v, target))


if __name__ == '__main__':
    own = dict(trainer_class=FlowMap, solver='flow_map', num_sample_steps=4, time_grid='uniform')
    side_by_side(
        {'plain': dict(own, trainer_class=Plain, solver='euler')} | {rule: dict(own, rule=rule) for rule in RULES},
        numbers=('final/*/wasserstein', 'final/steps_1/real_w*', 'final/*/frechet'),
        default_flags='--preset toy2d --time_input slow',
        config_class=Settings,
    )
