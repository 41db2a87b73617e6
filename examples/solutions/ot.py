"""Exercise 7: noise is paired with points so that the transport of the whole batch is cheapest (Tong et al. 2024).

sh run.sh examples/solutions/ot.py --preset toy2d --label_dropout 1 --global_batch_size 128 --num_training_steps 600
sh run.sh ...the same... --coupling chance
"""

from dataclasses import dataclass
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment

from config import Config
from main import main
from trainer import ExampleDiffusionTrainer


@dataclass(frozen=True)
class Settings(Config):
    coupling: str = 'ot'
    """ot or chance."""


class Coupled(ExampleDiffusionTrainer):
    def couple(self, x0, x1, label):  # the whole global batch: (B, ...), (B, ...), (B,)
        if self.config.coupling == 'chance':
            return x1
        cost = torch.cdist(x0.flatten(1), x1.flatten(1)).square()  # (B, B)
        return x1[torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(x1.device)]

    def loss_fn(self, batch, model_fn):
        self.log('train/pair_cost', (batch.x0 - batch.x1).square().flatten(1).sum(1))
        return super().loss_fn(batch, model_fn)

    def samplers(self):
        return {f'euler_{n}': partial(self.draw, solver='euler', nfe=n, time_grid='uniform') for n in (1, 2, 20)}


if __name__ == '__main__':
    main(trainer_class=Coupled, config_class=Settings)
