"""Samples in one step: a generator whose samples drift towards the data while it trains (Deng et al. 2026).

A field V moves each sample x = f(x1) towards data y and away from other samples y', and f trains on x + V, held fixed.
With the kernel k(x, y) = exp(-|x - y| / tau),

    V(x) = E[k(x, y) (y - x)] / E[k(x, y)] - E[k(x, y') (y' - x)] / E[k(x, y')]

V changes its sign if data and samples change places, so it is 0 where both have the same distribution. V is summed over
TAUS, in units of the mean distance between samples and data; pairs are of one class. The paper also scales V to unit
size, normalizes the kernel over x, too, and compares features of a pretrained network instead of pixels.
V needs many samples at once. It is computed within each of the `batch_shards` parts of a batch, which are the same on
one and on two processes; more processes need more and smaller parts, which give other numbers.

    sh run.sh examples/drifting.py                        on moons, next to a flow map in one step
"""

import torch

from config import only
from examples.flow_map import FlowMap, Settings
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer
from utils import image_square_error

TAUS = 0.02, 0.05, 0.2


def mean_shift(x, y, excluded, tau):
    """(n, D): sum of k (y - x) / sum of k for each x (n, D), over the rows of y (m, D) not `excluded` (n, m)."""
    weights = (-torch.cdist(x, y) / tau).masked_fill(excluded, -torch.inf).softmax(1).nan_to_num()  # 0 if all are
    return weights @ y - weights.sum(1, keepdim=True) * x


@torch.no_grad()
def drift(x, data, label):
    """V (n, D) at the samples x (n, D), for data (n, D) of the same classes label (n,)."""
    other = label[:, None] != label
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    taus = [tau * torch.cdist(x, data)[~other].mean() for tau in TAUS]
    return sum(mean_shift(x, data, other, tau) - mean_shift(x, x, other | itself, tau) for tau in taus)


class Drifting(ExampleDiffusionTrainer):
    has_reference = False

    def draw(self, model_fn, inputs, solver='', **settings):
        t = torch.full((len(inputs.x1),), self.config.t_max, device=self.device)
        return inputs.x1 - model_fn(inputs.x1, t, inputs.label)

    def loss_fn(self, batch, model_fn):
        x, size = self.draw(model_fn, batch), self.config.global_batch_size // self.config.batch_shards
        shards = map(drift, x.detach().flatten(1).split(size), batch.x0.flatten(1).split(size), batch.label.split(size))
        return image_square_error(x, x.detach() + torch.cat(list(shards)).view_as(x))

    def samplers(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity', loss_weight='none')
        return {'steps_1': self.draw}


if __name__ == '__main__':
    flow_map = dict(trainer_class=FlowMap, solver='flow_map', num_sample_steps=4, time_grid='uniform')
    side_by_side(
        {'drifting': dict(trainer_class=Drifting), 'flow_map': flow_map},
        numbers=('final/steps_1/*wasserstein', 'final/steps_1/label_agreement', 'final/steps_1/frechet'),
        default_flags='--preset toy2d --time_input slow --global_batch_size 1024 --batch_shards 2 '
        '--num_training_steps 1000',
        config_class=Settings,
    )
