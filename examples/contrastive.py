"""Contrastive flow matching: away from the velocities of other pictures, too (Stoica et al. 2025).

    |v(xt, t) - u|^2 - lambda |v(xt, t) - u of another picture|^2,    lambda = 0.05

The other picture is a neighbour in the batch of one process, so it depends on the number of processes.

    sh run.sh examples/contrastive.py                     digits, after few steps
"""

import utils
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


class Contrastive(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        v = model_fn(xt, batch.t, batch.label)
        target = self.target_fn(batch.t, xt, batch.x0, batch.x1, coefs).velocity
        return utils.image_square_error(v, target) - 0.05 * utils.image_square_error(v, target.roll(1, 0))


if __name__ == '__main__':
    side_by_side(
        {'plain': {}, 'contrastive': dict(trainer_class=Contrastive)},
        numbers=('final/*/label_agreement', 'final/*/frechet'),
        usual='--preset digits_long --num_training_steps 400',
    )
