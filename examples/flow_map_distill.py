"""A flow map taught by a trained flow (Boffi, Albergo and Vanden-Eijnden 2024): Lagrangian and Eulerian distillation.

`teacher` is a plain run with velocity v. The student gives the average velocity u(x, t, s), so X(x, t, s) = x + (s - t)
u(x, t, s) leads from t to s in one step, as in flow_map.py. X is the flow of v if, for all x, t and s,

    lagrangian   dX/ds = v(X, s)                                the velocity where it arrives
    eulerian     dX/dt + v(x, t) . grad X = 0,  which is        it arrives at one point from all of a path
                 u = v + (s - t) du/dt  along v

The loss is the squared difference at xt, with the right sides held fixed. Where s = t, both say u = v. In contrast to
`flow_map.py`, v has no noise of a batch, and is not learned on the way. `self` is that page's Lagrangian rule with as
many steps as the student, without a teacher.            sh run.sh examples/flow_map_distill.py
"""

from dataclasses import dataclass
from functools import partial

import torch

import examples.flow_map as flow_map
from config import choose
from main import load_run
from scripts.compare import side_by_side
from utils import bcast_right, image_square_error, jvp

RULES = {rule: rule for rule in ('lagrangian', 'eulerian')}


@dataclass(frozen=True)
class Settings(flow_map.Settings):
    teacher: str = ''  # folder of the teacher's run


class Distilled(flow_map.FlowMap):
    def setup_networks(self):
        super().setup_networks()
        taught_by = load_run(self.config.teacher)
        self.modules['teacher'] = next(iter(taught_by.weights().values())).requires_grad_(False)

    def loss_fn(self, batch, model_fn):
        t, s, u = batch.t, batch.cond['s'], partial(model_fn, label=batch.label)
        xt, dt = self.process.compute_xt(batch.x0, batch.x1, self.process(t)), bcast_right(s - t, batch.x0.ndim)
        teacher = self.caller(self.modules['teacher'])  # not get_model_fn, which passes s
        with torch.no_grad():
            v = teacher(xt, t, batch.label)
        if choose('rule', self.config.rule, RULES) == 'lagrangian':
            average, slope = jvp(lambda s: u(xt, t, s=s), (s,), (torch.ones_like(s),))
            with torch.no_grad():
                target = teacher(xt + dt * average, s, batch.label)
            return image_square_error(average + dt * slope, target)  # where s = t: u and v
        average, slope = jvp(lambda x, t: u(x, t, s=s), (xt, t), (v, torch.ones_like(t)))
        return image_square_error(average, v + dt * slope.detach())


if __name__ == '__main__':
    own = dict(solver='flow_map', num_sample_steps=4, time_grid='uniform')
    taught = dict(own, trainer_class=Distilled, teacher=lambda c: f'{c.run_dir}_teacher')
    side_by_side(
        {'teacher': dict(own, trainer_class=flow_map.Plain, solver='euler')}
        | {'self': dict(own, trainer_class=flow_map.FlowMap)}
        | {rule: dict(taught, rule=rule) for rule in RULES},
        numbers=('final/*/wasserstein', 'final/steps_1/real_w*'),
        default_flags='--preset toy2d --time_input slow',
        config_class=Settings,
    )
