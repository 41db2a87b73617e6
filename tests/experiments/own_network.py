"""A user's own transformer and process, each added by one table entry, and own settings."""

from dataclasses import dataclass

import torch
from torch import nn

from config import Config
from main import main
from networks import NETWORKS
from processes import PROCESSES, GaussianProcess
from trainer import ExampleDiffusionTrainer
from unet import sinusoid


@dataclass(frozen=True)
class MyConfig(Config):
    depth: int = 2
    """Blocks of the transformer."""


class Transformer(nn.Module):
    def __init__(self, shape, num_classes, width, depth):
        super().__init__()
        c, h, w = shape
        self.patch, self.back = nn.Conv2d(c, width, 2, 2), nn.ConvTranspose2d(width, c, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, h * w // 4, width))
        self.classes = nn.Embedding(num_classes + 1, width)
        layers = [nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True) for _ in range(depth)]
        self.blocks = nn.ModuleList(layers)

    def forward(self, xt, time, label):
        x = self.patch(xt)
        tokens = x.flatten(2).mT + self.position + (sinusoid(time, x.shape[1]) + self.classes(label))[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.back(tokens.mT.reshape(x.shape)), tokens  # the first part is the prediction


class Quadratic(GaussianProcess):
    def alpha(self, t):
        return 1 - t**2

    def sigma(self, t):
        return t


NETWORKS['own'] = lambda config, shape, num_classes: Transformer(shape, num_classes, config.channels, config.depth)
PROCESSES['quadratic'] = lambda config: Quadratic()


class Own(ExampleDiffusionTrainer):
    pass


if __name__ == '__main__':
    main(trainer_class=Own, config_class=MyConfig)
