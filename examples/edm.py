"""EDM by settings alone (Karras et al. 2022, table 1): noise up to 80, its preconditioning, weights, times and solver.

xt = x0 + sigma(t) x1. The network outputs F, and the loss compares F, which is EDM's loss: `difference_from_table_1` is
the largest difference of the two on held-out images, relative to the loss. Numbers of samples are at 18 steps of Heun's
method on EDM's grid (36 evaluations), and with as many of the default solver, for the default settings (`plain`) too.

    sh run.sh examples/edm.py                             digits
"""

from functools import partial

import torch

import utils
from compare import side_by_side
from trainer import ExampleDiffusionTrainer

EDM = dict(
    process_name='ve',  # alpha = 1, sigma from sigma_min to sigma_max
    sigma_min=0.002,
    sigma_max=80.0,
    t_min=0.0,
    t_max=1.0,
    model_type='F',
    target_type='F',
    time_sampler='log_normal',  # of sigma
    time_mean=-1.2,
    time_std=1.2,
    time_input='log_snr',  # c_noise, times a constant
    sigma_data=0.5,
)


class Plain(ExampleDiffusionTrainer):
    def samplers(self):
        return {
            'heun_36': partial(self.draw, solver='heun', nfe=36, time_grid='edm'),
            'adams_36': partial(self.draw, solver='adams', nfe=36, time_grid='logistic'),
        }


class Edm(Plain):
    def loss_fn(self, batch, model_fn):
        loss = super().loss_fn(batch, model_fn)
        if not torch.is_grad_enabled():  # held-out images: into the record as eval/difference_from_table_1
            difference = (loss - self.table_1(batch, model_fn)).abs().max() / loss.mean()
            self.log('difference_from_table_1', difference)
        return loss

    def table_1(self, batch, model_fn):
        """lambda(sigma) |D(x0 + sigma x1; sigma) - x0|^2, (B,). c_in and c_noise are inside of the network."""
        sigma, std = utils.bcast_right(self.process.sigma(batch.t), batch.x0.ndim), self.config.sigma_data
        x = batch.x0 + sigma * batch.x1
        c_skip, c_out = std**2 / (sigma**2 + std**2), sigma * std / (sigma**2 + std**2).sqrt()
        denoised = c_skip * x + c_out * model_fn(x, batch.t, batch.label)
        weight = (sigma**2 + std**2) / (sigma * std) ** 2
        return (weight * (denoised - batch.x0).square()).flatten(1).mean(1)


if __name__ == '__main__':
    side_by_side(
        {'plain': dict(trainer_class=Plain), 'edm': dict(trainer_class=Edm, **EDM)},
        numbers=('final/*/label_agreement', 'final/*/frechet_pixels', 'eval/difference_from_table_1'),
        usual='--num_training_steps 800',
    )
