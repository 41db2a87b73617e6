"""The EDM recipe as settings (Karras et al. 2022, table 1): noise up to 80, preconditioning, weights, times and solver.

xt = x0 + 80 t x1. The network outputs F, and the loss compares F, which is EDM's loss: `difference_from_table_1` is the
largest difference between the two in a batch of held-out images, relative to the loss. Samples are drawn by 18 steps of
Heun's method in sigma on EDM's grid down to 0.002 (36 evaluations; algorithm 1 without its last step to 0), and by 36
evaluations of the default solver. `plain` has the default settings and the same samplers.

    sh run.sh examples/edm.py                             digits
"""

from functools import partial

import torch

import utils
from config import only
from processes import PROCESSES, GaussianProcess
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


class LinearSigma(GaussianProcess):
    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return 80 * t


PROCESSES['edm'] = lambda config: LinearSigma()
EDM = dict(process_name='edm', t_min=0.002 / 80, t_max=1.0, model_type='F', target_type='F', time_input='log_snr')
EDM |= dict(time_sampler='log_normal', time_mean=-1.2, time_std=1.2)  # log-normal sigma


class Plain(ExampleDiffusionTrainer):
    def samplers(self):
        return {
            'heun_36': partial(self.draw, solver='heun', nfe=36, time_grid='edm'),
            'adams_36': partial(self.draw, solver='adams', nfe=36, time_grid='logistic'),
        }


class Edm(Plain):
    def loss_fn(self, batch, model_fn):
        loss = super().loss_fn(batch, model_fn)
        if not torch.is_grad_enabled():  # held-out images: recorded as eval/difference_from_table_1
            difference = (loss - self.table_1(batch, model_fn)).abs().max() / loss.mean()
            self.log('difference_from_table_1', difference)
        return loss

    def table_1(self, batch, model_fn):
        """lambda(sigma) |D(x0 + sigma x1; sigma) - x0|^2, (B,). c_in and c_noise are inside the network."""
        only(self.config, process_name='edm', model_type='F')
        sigma, std = utils.bcast_right(self.process.sigma(batch.t), batch.x0.ndim), self.config.sigma_data
        x = batch.x0 + sigma * batch.x1
        c_skip, c_out = std**2 / (sigma**2 + std**2), sigma * std / (sigma**2 + std**2).sqrt()
        denoised = c_skip * x + c_out * model_fn(x, batch.t, batch.label)
        weight = (sigma**2 + std**2) / (sigma * std) ** 2
        return (weight * (denoised - batch.x0).square()).flatten(1).mean(1)


if __name__ == '__main__':
    side_by_side(
        {'plain': dict(trainer_class=Plain), 'edm': dict(trainer_class=Edm, **EDM)},
        numbers=('final/*/label_agreement', 'final/*/frechet', 'eval/difference_from_table_1'),
        default_flags='--preset digits_long --num_training_steps 800',
    )
