"""Contrastive flow matching: also move away from the velocities of other pictures (Stoica et al. 2025).

    |v(xt, t) - u|^2 - lambda |v(xt, t) - u of another picture|^2,    lambda = 0.05

With other outputs and targets (`--model_type`, `--target_type`), these take the place of the velocities. The other
picture is a neighbour in the batch of one process, so results depend on the number of processes.

    sh run.sh examples/contrastive.py                     digits, after few steps
"""

import utils
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


class Contrastive(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        out = self.model_convert_fn(model_fn(xt, batch.t, batch.label), batch.t, xt, coefs)
        target = self.target_fn(batch.t, xt, batch.x0, batch.x1, coefs)
        v, u = (getattr(prediction, self.config.target_type) for prediction in (out, target))
        sq_err = utils.image_square_error(v, u) - 0.05 * utils.image_square_error(v, u.roll(1, 0))
        return self.loss_weight(coefs) * sq_err


if __name__ == '__main__':
    side_by_side(
        {'plain': {}, 'contrastive': dict(trainer_class=Contrastive)},
        numbers=('final/*/label_agreement', 'final/*/frechet'),
        default_flags='--preset digits_long --num_training_steps 400',
    )
