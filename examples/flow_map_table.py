"""Flow maps on the checkerboard, next to the table of their authors (Boffi et al. 2025, flow-maps.github.io).

`kl_n` is the KL divergence of the board from samples in n steps, `theirs_n` the authors' number, whose estimator is not
published. Ours sums p log(p / q) over CELLS x CELLS cells: p is a cell's exact share, q its share of the samples (half
a sample if it is empty). The floor `kl_real` is for exact points. In training, a fifth of the samples draw the curve.
Theirs took up to 500,000 batches of 64,000; ours 30,000 of 1024.              sh run.sh examples/flow_map_table.py
"""

import dataclasses
from functools import partial

import torch
from torch import nn

from examples.flow_map import RULES, FlowMap, Settings
from networks import NETWORKS, TIME_INPUTS
from scripts.compare import side_by_side
from utils import rows

CELLS, SAMPLES, STEPS, THEIRS = 64, 100_000, (1, 2, 4, 8, 16), {
    'lagrangian': (0.0864, 0.0765, 0.0708, 0.0699, 0.0710),
    'eulerian': (0.0983, 0.0921, 0.0834, 0.0816, 0.0751),
    'semigroup': (0.1456, 0.0891, 0.0812, 0.0717, 0.0689),
    'uniform': (0.1113, 0.1067, 0.0747, 0.0727, 0.0679),
}  # fmt: skip
TIME_INPUTS['same'], NETWORKS['layers'] = lambda t, process: t, lambda *shapes, **cond: Layers()


class Layers(nn.Sequential):
    def __init__(self):
        hidden = [layer for width in (4, 256, 256, 256) for layer in (nn.Linear(width, 256), nn.GELU('tanh'))]
        super().__init__(*hidden, nn.Linear(256, 2))

    def forward(self, xt, time, label=None, *, s):
        return super().forward(torch.cat([xt, time[:, None], s[:, None]], 1))


def board(n):  # as in data_loading/toy2d.py
    row, pair = torch.randint(4, (n,)), torch.randint(2, (n,))
    return 0.45 * (torch.stack([2 * pair + row % 2, row], 1) + torch.rand(n, 2)) - 0.9


def divergence(x):  # from points (n, 2)
    n, i = torch.histogramdd(x.cpu(), [CELLS] * 2, range=[-0.9, 0.9] * 2).hist, torch.arange(CELLS) * 4 // CELLS
    q = n[(i[:, None] + i) % 2 == 0].double().clamp(min=0.5) / len(x)  # the shares of dark cells
    return -float((q * len(q)).log().mean())


class Table(FlowMap):
    def prepare_batch_fn(self, batch, is_train):  # data never repeat; s < t are two uniform times
        prepared = super().prepare_batch_fn((board(len(batch[0])).to(self.device), *batch[1:]), is_train)
        t, other = prepared.t, self.time_sampler(torch.rand_like(prepared.t))
        other = torch.where(prepared.cond['s'] < t, other, t)
        return dataclasses.replace(prepared, t=t.maximum(other), cond={'s': t.minimum(other)})

    def loss_fn(self, batch, model_fn):  # as in flow_map.py, but where s = t, the rule costs nothing
        same, losses = batch.cond['s'] == batch.t, torch.empty_like(batch.t)
        losses[same] = super(FlowMap, self).loss_fn(rows(batch, same), model_fn)
        losses[~same] = super().loss_fn(rows(batch, ~same), model_fn)
        return losses

    def samplers(self):
        return {'map': super().samplers()['steps_4']}

    def sample_metrics(self, x, inputs):
        n = SAMPLES if self.step >= self.config.num_training_steps else SAMPLES // 5
        inputs = dataclasses.replace(inputs, x1=torch.randn(n, 2, device=self.device), label=None)
        draw = partial(self.draw, self.get_model_fn(next(iter(self.weights().values()))), inputs, 'flow_map')
        found = {f'kl_{steps}': divergence(draw(nfe=steps)) for steps in STEPS} | {'kl_real': divergence(board(n))}
        return found | {f'theirs_{steps}': kl for steps, kl in zip(STEPS, THEIRS[self.config.rule], strict=True)}


if __name__ == '__main__':
    own = dict(trainer_class=Table, network='layers', dataset='checkerboard', solver='flow_map', time_grid='uniform')
    side_by_side(
        {rule: dict(own, rule=rule) for rule in RULES},
        default_flags='--preset toy2d --time_input same --global_batch_size 1024 --num_training_steps 30000 '
        '--eval_metrics_every 2500 --sample_every 0 --eval_every 5000 --t_min 0 --t_max 1 --compile off',
        config_class=Settings,
    )
