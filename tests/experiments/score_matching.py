"""A loss that differentiates the network: sliced score matching of the denoised density (Song et al. 2019, eq. 8)."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from main import main
from trainer import ExampleDiffusionTrainer


class Sliced(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs).requires_grad_()
        v = torch.randn_like(xt)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            score = model_fn(xt, batch.t, batch.label)
        slope = torch.autograd.grad((score * v).sum(), xt, create_graph=torch.is_grad_enabled())[0]
        return ((slope * v).flatten(1).sum(1) + (score * v).flatten(1).sum(1).square() / 2) / xt[0].numel()


if __name__ == '__main__':
    main(trainer_class=Sliced)
