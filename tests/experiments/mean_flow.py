"""One-step generation: the average velocity between two times (Geng et al. 2025, eq. 6-11)."""

import dataclasses

import torch

import utils
from main import main
from solvers import SOLVERS, Solver
from trainer import ExampleDiffusionTrainer

SOLVERS['mean_flow'] = Solver(lambda x, t, s, predict, noise: x + (s - t) * predict(x, t, s).velocity, nfe=1, order=1)


class MeanFlow(ExampleDiffusionTrainer):
    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        s = prepared.t * torch.where(torch.rand_like(prepared.t) < 0.5, 1.0, torch.rand_like(prepared.t))
        return dataclasses.replace(prepared, cond={'s': s})

    def loss_fn(self, batch, model_fn):
        coefs, s = self.process(batch.t), batch.cond['s']
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        velocity = batch.x1 - batch.x0
        ones, zeros = torch.ones_like(s), torch.zeros_like(s)
        average, derivative = utils.jvp(
            lambda x, t, s: model_fn(x, t, batch.label, s=s), (xt, batch.t, s), (velocity, ones, zeros)
        )
        target = velocity - utils.bcast_right(batch.t - s, xt.ndim) * derivative
        return utils.image_square_error(average, target.detach())

    def samplers(self):
        return {'mean_flow': lambda model_fn, inputs: self.draw(model_fn, inputs, 'mean_flow')}


if __name__ == '__main__':
    main(trainer_class=MeanFlow)
