"""x1 is data: digits without their lower half, plus a little noise, become whole. They are a condition too."""

import dataclasses

import torch

from main import main
from trainer import ExampleDiffusionTrainer


class Restore(ExampleDiffusionTrainer):
    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        degraded = prepared.x0.clone()
        degraded[:, :, 4:] = -1
        x1 = degraded + 0.1 * torch.randn_like(degraded)
        return dataclasses.replace(prepared, x1=x1, cond={'degraded': degraded})

    def sample_metrics(self, x, inputs):
        return {'rmse': float((x - self.decode(inputs.truth)).square().mean().sqrt())}


if __name__ == '__main__':
    main(trainer_class=Restore)
