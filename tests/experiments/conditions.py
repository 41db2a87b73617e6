"""Class, a float (mean brightness) and a text embedding together, with dropout to a null value and guidance."""

import dataclasses

import torch

from main import main
from trainer import ExampleDiffusionTrainer


class Conditions(ExampleDiffusionTrainer):
    null_cond = {'ink': 0.0, 'text': 0.0}

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        ink = prepared.x_original.mean((1, 2, 3))
        text = torch.cos(torch.arange(16, device=self.device) * batch[1][:, None])  # an embedding of the digit's name
        return dataclasses.replace(prepared, cond={'ink': ink, 'text': text})

    def sample_metrics(self, x, inputs):
        asked, got = inputs.cond['ink'].cpu(), x.mean((1, 2, 3)).cpu()
        return {'ink_correlation': float(torch.corrcoef(torch.stack([asked, got]))[0, 1])}


if __name__ == '__main__':
    main(trainer_class=Conditions)
