"""Samples in one or two steps: consistency training and distillation (Song et al. 2023), next to a flow map.

A consistency function f(x, t) = x - t u(x, t) is the end, at t = 0, of the path of the flow through x at time t. It is
constant along a path, so f at t trains on f at an earlier time r of the path, by a moving average of the weights:

    |f(xt, t) - f_average(xr, r)|^2 / (t (t - r)),    r = t (1 - 2^-k),    k = 1 ... 8 in the course of training

In `training`, xr has the x0 and x1 of xt; in `distillation`, it is an Euler step from xt along the run `plain`. The
shrinking steps are from Geng et al. 2024 (ECT). The last average gives the target; with `--ema_decays 0.999 0.001` it
is nearly the trained network (Song and Dhariwal 2024). Step k + 1 of n is f((1 - t) x + t new noise, t), t = 1 - k/n.
All runs but `plain` cost the same evaluations. A backward pass counts 2, a derivative in s 1, and 2 backward, so a step
of `plain` takes 3, `training` 4, `distillation` 5 and `lagrangian` 7. `distillation` also pays for `plain`.
                                                      sh run.sh examples/consistency.py
"""

import dataclasses

import torch

import examples.flow_map as flow_map
from main import load_run
from scripts.compare import side_by_side
from utils import bcast_right, image_square_error


@dataclasses.dataclass(frozen=True)
class Settings(flow_map.Settings):
    flow: str = ''  # Folder of the run of a flow, for distillation.


def f(model_fn, x, t, label):
    return x - bcast_right(t, x.ndim) * model_fn(x, t, label)


class Consistency(flow_map.Plain):
    has_reference = False

    def setup_networks(self):
        super().setup_networks()
        if self.config.flow:
            self.modules['flow'] = load_run(self.config.flow).network.requires_grad_(False)

    def prepare_batch_fn(self, batch, is_train):
        prepared, k = super().prepare_batch_fn(batch, is_train), 1 + 8 * self.step // self.config.num_training_steps
        return flow_map.WithMiddle(**vars(prepared), share=torch.full_like(prepared.t, 0.5 ** min(8, k)))

    def loss_fn(self, batch, model_fn):
        t, r = batch.t, batch.t * (1 - batch.share)
        xt, xr = (self.process.compute_xt(batch.x0, batch.x1, self.process(time)) for time in (t, r))
        with torch.no_grad():
            if self.config.flow:
                xr = xt + bcast_right(r - t, xt.ndim) * self.get_model_fn(self.modules['flow'])(xt, t, batch.label)
            target = f(self.get_model_fn(list(self.weights().values())[-2:][0]), xr, r, batch.label)
        return image_square_error(f(model_fn, xt, t, batch.label), target) / (t * (t - r))

    def draw(self, model_fn, inputs, solver, nfe=0, **settings):
        t, n = torch.full((len(inputs.x1),), self.config.t_max, device=self.device), nfe or self.config.sample_nfe or 1
        x = f(model_fn, inputs.x1, t, inputs.label)
        for s in (1 - k / n for k in range(1, n)):
            x = f(model_fn, (1 - s) * x + s * torch.randn_like(x), 0 * t + s, inputs.label)
        return x

    def samplers(self):
        return dict(list(super().samplers().items())[:2])


if __name__ == '__main__':
    own, ours = dict(solver='flow_map', num_sample_steps=4, time_grid='uniform'), dict(trainer_class=Consistency)
    steps = lambda share: lambda c: round(share * c.num_training_steps)  # noqa: E731
    side_by_side(
        {
            'plain': dict(own, trainer_class=flow_map.Plain, solver='euler'),
            'training': dict(ours, num_training_steps=steps(7 / 4)),
            'distillation': dict(ours, num_training_steps=steps(4 / 5), flow=lambda c: f'{c.run_dir}_plain'),
            'lagrangian': dict(own, trainer_class=flow_map.FlowMap),
        },
        numbers=('final/steps_[12]/wasserstein', 'final/steps_1/real_w*'),
        default_flags='--preset toy2d --time_input slow --num_training_steps 1000',
        config_class=Settings,
    )
