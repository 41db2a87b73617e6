"""Minibatch optimal transport over the whole global batch, on any number of processes (Tong et al. 2024)."""

import torch
from scipy.optimize import linear_sum_assignment

from main import main
from trainer import ExampleDiffusionTrainer


class OptimalTransport(ExampleDiffusionTrainer):
    def couple(self, x0, x1, label):
        cost = torch.cdist(x0.flatten(1), x1.flatten(1)).square()
        _, partner = linear_sum_assignment(cost.cpu().numpy())
        partner = torch.from_numpy(partner).to(x1.device)
        self.log('train/cost', cost.gather(1, partner[:, None]) / x0[0].numel())
        self.log('train/coupled', float(len(x0)))
        return x1[partner]


if __name__ == '__main__':
    main(trainer_class=OptimalTransport)
