"""A network of your own: copy this file, and change the class.

    sh run.sh examples/own_network.py

It is any module with `forward(xt, time, label)` that returns a tensor of the shape of xt: the velocity, or the type
that --model_type names. Its input has about unit variance, whatever the process.
"""

from dataclasses import dataclass

import torch
from torch import nn

from config import Config
from main import main
from networks import NETWORKS
from unet import sinusoid, zero_init


class Mixer(nn.Module):
    """MLPs that mix pixels and channels in turn (after Tolstikhin et al. 2021)."""

    def __init__(self, shape, num_classes, width, depth):
        super().__init__()
        channels, height, side = shape  # shape of one picture of the data
        self.embed = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)  # the last one means 'no label'
        self.pixels = nn.ModuleList(self.mlp(height * side, 2 * height * side) for _ in range(depth))
        self.channels = nn.ModuleList(self.mlp(width, 2 * width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.head = zero_init(nn.Linear(width, channels))  # the first output is 0

    def mlp(self, dim, hidden):
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, xt, time, label=None):
        """xt (B, C, H, W); time (B,), which is 1000 t by default; label (B,) int64."""
        if label is None:
            label = torch.full((len(xt),), self.label.num_embeddings - 1, device=xt.device)
        embedding = self.time(sinusoid(time, self.label.embedding_dim)) + self.label(label)  # (B, width)
        x = self.embed(xt.flatten(2).transpose(1, 2))  # (B, H W, width)
        for i, (pixels, channels) in enumerate(zip(self.pixels, self.channels, strict=True)):
            x = x + pixels((self.norms[2 * i](x) + embedding[:, None]).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x) + embedding[:, None])
        return self.head(x).transpose(1, 2).reshape(xt.shape)


@dataclass(frozen=True)
class Settings(Config):
    network: str = 'mixer'
    mixer_width: int = 96
    """Channels of the mixer."""
    mixer_depth: int = 4
    """Pairs of MLPs of the mixer."""


def build(config, shape, num_classes):
    """`shape` of one x0 and `num_classes` come from the data. Conditions: docs/experiments.md."""
    return Mixer(shape, num_classes, config.mixer_width, config.mixer_depth)


NETWORKS['mixer'] = build

if __name__ == '__main__':
    main(config_class=Settings)
