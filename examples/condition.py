"""Condition a digit on how much ink it has and how far it leans, and request both, with guidance.

A condition is a named tensor besides the class: here a vector of two measured numbers, in standard deviations of the
data. It is dropped together with the label for one picture in ten, so that guidance strengthens both (Ho and Salimans
2022). `ink_error` and `slant_error` are root mean square differences between requested and measured numbers of 1000
samples, each with the numbers of a held-out digit. `plain` gets only the class.

    sh run.sh examples/condition.py                       digits
"""

import dataclasses
from functools import partial

import torch

from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


def measured(x):
    """Ink and slant (B, 2) of pictures (B, 1, 8, 8) in [0, 1], scaled to about mean 0 and standard deviation 1."""
    ink = x.mean((1, 2, 3))
    weight = x[:, 0] / x.sum((1, 2, 3), keepdim=True)[:, 0].clamp(min=1e-6)  # (B, 8, 8), sums to 1
    place = torch.linspace(-1, 1, x.shape[2], device=x.device)
    down, right = place[:, None], place[None]
    down, right = (p - (weight * p).sum((1, 2), keepdim=True) for p in (down, right))
    slant = -(weight * down * right).sum((1, 2)) / (weight * down**2).sum((1, 2)).clamp(min=1e-6)
    return torch.stack([(ink - 0.306) / 0.034, (slant + 0.04) / 0.121], 1)


class Conditioned(ExampleDiffusionTrainer):
    null_cond = {'measured': 0.0}

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        return dataclasses.replace(prepared, cond={'measured': measured(self.decode(prepared.x0))})

    def samplers(self):
        return {f'guidance_{w}': partial(self.draw, solver='adams', guidance_scale=w) for w in (1, 2, 3)}

    def sample_metrics(self, x, inputs):
        error = (measured(x) - inputs.cond['measured'].to(x.device)).square().mean(0).sqrt()
        return super().sample_metrics(x, inputs) | {'ink_error': float(error[0]), 'slant_error': float(error[1])}


class Plain(Conditioned):
    """Has the same conditions, but the network does not see them."""

    def get_model_fn(self, module, train=False):
        model_fn = super().get_model_fn(module, train)
        return lambda xt, t, label=None, measured=None: model_fn(xt, t, label)


if __name__ == '__main__':
    side_by_side(
        {'plain': dict(trainer_class=Plain), 'told': dict(trainer_class=Conditioned)},
        numbers=('final/*_error', 'final/*/label_agreement', 'final/*/frechet'),
        default_flags='--preset digits_long --num_training_steps 800 --label_dropout 0.1',
    )
