"""Pairs (x0, x1) as a data set: each digit with its own fixed noise, like pairs from a first round of reflow."""

import torch

from data_utils import DATASETS, DataSpec, load_digits
from main import main
from trainer import ExampleDiffusionTrainer


def load_pairs(config):
    noise = torch.randn(1797, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    train, held_out = ((images / 8 - 1, labels) for images, labels in load_digits(config))
    return (*train, noise[:1500]), (*held_out, noise[1500:])


DATASETS['pairs'] = DataSpec(load_pairs, num_classes=10, scale='float')


class Reflow(ExampleDiffusionTrainer):
    def decode(self, x0):
        return (x0 / 2 + 0.5).clamp(0, 1)

    def samplers(self):
        return {f'euler_{n}': lambda fn, inputs, n=n: self.draw(
            fn, inputs, 'euler', num_steps=n, nfe=0, time_grid='uniform'
        ) for n in (1, 2, 4)}  # fmt: skip

    def sample_metrics(self, x, inputs):
        return {'rmse': float((x - self.decode(inputs.truth)).square().mean().sqrt())}


if __name__ == '__main__':
    main(trainer_class=Reflow)
