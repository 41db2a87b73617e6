"""A second network with its own optimizer: a discriminator of the predicted x0, which adds a term to the loss."""

import torch
import torch.nn.functional as F
from torch import nn

import utils
from ema import EMA
from main import main
from trainer import ExampleDiffusionTrainer


class Adversarial(ExampleDiffusionTrainer):
    def setup_networks(self):
        super().setup_networks()
        critic = nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.SiLU(), nn.Linear(32, 1)).to(self.device)
        critic(self.example.x0)
        self.modules['critic'] = critic
        self.optimizers['critic'] = torch.optim.Adam(critic.parameters(), 1e-3)
        self.emas['critic'] = EMA(critic, (0.9,))

    def loss_fn(self, batch, model_fn):
        critic = self.modules['critic']
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        fake = self.model_convert_fn(model_fn(xt, batch.t, batch.label), batch.t, xt, coefs).x0
        real_or_fake = F.softplus(critic(fake.detach())) + F.softplus(-critic(batch.x0))  # trains only the critic
        fool = F.softplus(-utils.frozen(critic)(fake))  # trains only the network
        self.log('train/critic', real_or_fake)
        return utils.image_square_error(fake, batch.x0) + 0.01 * fool[:, 0] + real_or_fake[:, 0]


if __name__ == '__main__':
    main(trainer_class=Adversarial)
