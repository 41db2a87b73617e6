"""Dispersive loss: push the features of different pictures apart (Wang and He 2025).

    loss + 0.5 log mean exp(-|z_i - z_j|^2 / (dim tau)),    z: dim features in the middle of the network, tau = 0.5

The mean is over pairs of pictures in the batch of one process, so it depends on the number of processes.

    sh run.sh examples/dispersive.py                      digits, after few steps
"""

import torch

from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


class Dispersive(ExampleDiffusionTrainer):
    def setup_networks(self):
        net = self.network.net
        middle = net.middle[0] if hasattr(net, 'middle') else net.blocks[len(net.blocks) // 2]
        middle.register_forward_hook(lambda module, inputs, out: setattr(self, 'features', out))
        super().setup_networks()  # moving averages are copies, with this hook

    def loss_fn(self, batch, model_fn):
        loss = super().loss_fn(batch, model_fn)
        z = self.features.flatten(1).float()
        distances = torch.cdist(z, z).square() / z.shape[1]
        dispersion = (-distances / 0.5).exp().mean().log()
        self.log('train/dispersion', dispersion.detach())
        return loss + 0.5 * dispersion


if __name__ == '__main__':
    side_by_side(
        {'plain': {}, 'dispersive': dict(trainer_class=Dispersive)},
        numbers=('final/*/label_agreement', 'final/*/frechet'),
        default_flags='--preset digits_long --num_training_steps 400',
    )
