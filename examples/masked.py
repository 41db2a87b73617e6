"""Masked diffusion of grey levels: pixels are symbols, hidden one by one (Shi et al. 2024; Sahoo et al. 2024).

A pixel is one of 17 grey levels, or hidden. At time t, each is hidden with probability t. The network sees which ones
are hidden, and predicts the distribution of each pixel's level. The loss is an upper bound on the bits of a picture
(Shi et al. 2024, for alpha = 1 - t): the mean over t of 1/t times the summed cross-entropy of the hidden pixels.

Sampling starts at t = 1 with all pixels hidden; from t to s a hidden pixel is revealed with probability (t - s) / t.
`plain` is a flow of the same network with as many evaluations. `bits` is per pixel, on held-out digits.

    sh run.sh examples/masked.py                          digits
"""

import dataclasses
import itertools
from functools import partial

import torch
import torch.nn.functional as F

from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer, ProcessedBatch

LEVELS = 17  # 0 to 16; symbol 17 is 'hidden'


class Plain(ExampleDiffusionTrainer):
    def samplers(self):
        return {f'nfe_{n}': partial(self.draw, solver='adams', nfe=n) for n in (8, 32)}


class Masked(Plain):
    independent = False
    has_reference = False  # the network is not a denoiser of Gaussian noise

    def encode(self, x):  # (B, 1, H, W) in [0, 1] to (B, 18, H, W), one-hot symbols
        return F.one_hot((x[:, 0] * (LEVELS - 1)).round().long(), LEVELS + 1).permute(0, 3, 1, 2).float()

    def decode(self, x0):
        return x0[:, :LEVELS].argmax(1, keepdim=True) / (LEVELS - 1)

    def prepare_batch_fn(self, batch, is_train):
        x0, t = self.encode(batch[0]), self.time_sampler(self.uniforms(len(batch[0])))
        hidden = torch.rand_like(x0[:, :1]) < t[:, None, None, None]
        return ProcessedBatch(batch[0], x0, torch.where(hidden, self.all_hidden(x0), x0), t, batch[1])

    def all_hidden(self, x0):
        return F.one_hot(torch.tensor(LEVELS, device=x0.device)).view(1, -1, 1, 1).expand_as(x0).to(x0)

    def loss_fn(self, batch, model_fn):
        logits = model_fn(batch.x1, batch.t, batch.label)[:, :LEVELS]
        bits = F.cross_entropy(logits, batch.x0[:, :LEVELS], reduction='none') / torch.log(torch.tensor(2.0))
        loss = (bits * batch.x1[:, LEVELS]).mean((1, 2)) / batch.t  # only hidden pixels count
        self.log('train/bits', loss.detach())
        return loss

    def sample_inputs(self, n):
        inputs = super().sample_inputs(n)
        return dataclasses.replace(inputs, x1=self.all_hidden(inputs.x1), given=[], truth=None)

    def draw(self, model_fn, inputs, solver, nfe=0):
        x = inputs.x1
        for t, s in itertools.pairwise(torch.linspace(1, 0, (nfe or self.config.sample_nfe or 32) + 1).tolist()):
            logits = model_fn(x, x.new_full((len(x),), min(t, self.config.t_max)), inputs.label)[:, :LEVELS]
            level = (logits - (-torch.rand_like(logits).log()).log()).argmax(1)  # a sample, by Gumbel noise
            drawn = F.one_hot(level, LEVELS + 1).permute(0, 3, 1, 2).to(x)
            shown = (x[:, LEVELS:] == 1) & (torch.rand_like(x[:, :1]) < (t - s) / t)
            x = torch.where(shown, drawn, x)
        return x


if __name__ == '__main__':
    side_by_side(
        {'plain': dict(trainer_class=Plain), 'masked': dict(trainer_class=Masked)},
        numbers=('eval/bits*', 'final/*/label_agreement', 'final/*/frechet', 'final/*/nearest*'),
        default_flags='--preset digits_long --num_training_steps 1000',
    )
