"""Exercise 2: the network outputs noise, and the loss compares velocities, without conversions of the repo.

    sh run.sh examples/solutions/noise.py --preset toy2d --num_training_steps 500 --model_type x1

xt = (1 - t) x0 + t x1, so x0 = (xt - t x1) / (1 - t), and the velocity x1 - x0 is (x1 - xt) / (1 - t).
"""

import utils
from config import only
from main import main
from trainer import ExampleDiffusionTrainer


class Noise(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        only(self.config, process_name='rf', model_type='x1', target_type='velocity')
        t = utils.bcast_right(batch.t, batch.x0.ndim)  # (B, 1, ...)
        xt = (1 - t) * batch.x0 + t * batch.x1
        noise = model_fn(xt, batch.t, batch.label)
        return utils.image_square_error((noise - xt) / (1 - t), batch.x1 - batch.x0)  # (B,)


if __name__ == '__main__':
    main(trainer_class=Noise)
