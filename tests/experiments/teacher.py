"""A frozen teacher and a moving average as targets, and a learned loss weight with its own optimizer."""

import copy

import torch
from torch import nn

import utils
from main import main
from trainer import ExampleDiffusionTrainer


class Taught(ExampleDiffusionTrainer):
    def setup_networks(self):
        super().setup_networks()
        self.modules['teacher'] = copy.deepcopy(self.network).requires_grad_(False)
        self.modules['log_variance'] = nn.Linear(1, 1).to(self.device)  # the loss's, at each time (Karras et al. 2024)
        self.optimizers['log_variance'] = torch.optim.SGD(self.modules['log_variance'].parameters(), 1e-2)

    def loss_fn(self, batch, model_fn):
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        with torch.no_grad():
            taught = self.get_model_fn(self.modules['teacher'])(xt, batch.t, batch.label)
            average = self.get_model_fn(self.ema.networks[0.999])(xt, batch.t, batch.label)
        out = model_fn(xt, batch.t, batch.label)
        error = utils.image_square_error(out, batch.x1 - batch.x0) + 0.1 * utils.image_square_error(
            out, average + taught
        )
        u = self.modules['log_variance'](batch.t[:, None])[:, 0]
        return error / u.exp() + u


if __name__ == '__main__':
    main(trainer_class=Taught)
