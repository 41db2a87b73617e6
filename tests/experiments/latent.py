"""Latents of a small autoencoder, trained at the start and kept in the checkpoint: 8x8 pixels become (4, 4, 4)."""

import torch
from torch import nn

from main import main
from trainer import ExampleDiffusionTrainer


class Latent(ExampleDiffusionTrainer):
    def __init__(self, *args):
        super().__init__(*args)
        autoencoder = nn.ModuleDict({'encode': nn.Conv2d(1, 4, 2, 2), 'decode': nn.ConvTranspose2d(4, 1, 2, 2)})
        self.modules['autoencoder'] = autoencoder.to(self.device)
        optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-2)
        images, *_ = self.train_loader.take(range(256))
        for _ in range(200):
            loss = (autoencoder['decode'](autoencoder['encode'](images)) - images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        autoencoder.requires_grad_(False)
        z = autoencoder['encode'](images)
        self.mean, self.std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)

    def encode(self, x):
        return (self.modules['autoencoder']['encode'](x) - self.mean) / self.std / 2

    def decode(self, x0):
        return self.modules['autoencoder']['decode'](2 * x0 * self.std + self.mean).clamp(0, 1)

    def state(self):
        return {'mean': self.mean, 'std': self.std}

    def load_state(self, state):
        self.mean, self.std = state['mean'].to(self.device), state['std'].to(self.device)


if __name__ == '__main__':
    main(trainer_class=Latent)
