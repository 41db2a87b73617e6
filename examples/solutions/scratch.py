"""Exercise 8: a trainer without ExampleDiffusionTrainer: batch, loss, sampler and a number, all written out.

    sh run.sh examples/solutions/scratch.py --preset toy2d --num_training_steps 500

With the same seed it learns the same as the plain trainer, to the last digit.
"""

from config import only
from main import main
from trainer import BaseDiffusionTrainer, ProcessedBatch
from utils import bcast_right


class Scratch(BaseDiffusionTrainer):
    def prepare_batch_fn(self, batch, is_train):
        x, label = batch
        x0 = self.encode(x)
        x1 = self.process.sample_base(x0)
        t = self.time_sampler(self.uniforms(len(x0)))
        return ProcessedBatch(x, x0, x1, t, label)

    def loss_fn(self, batch, model_fn):
        t = bcast_right(batch.t, batch.x0.ndim)
        velocity = model_fn((1 - t) * batch.x0 + t * batch.x1, batch.t, batch.label)
        return (velocity - (batch.x1 - batch.x0)).square().flatten(1).mean(1)  # (B,)

    def samplers(self):
        only(self.config, process_name='rf', model_type='velocity', target_type='velocity')
        return {'by_hand': self.by_hand}

    def by_hand(self, model_fn, inputs):
        """Euler's method from sigma(t_max) x1 = t_max x1 to t_min."""
        c, x = self.config, self.config.t_max * inputs.x1
        h = (c.t_max - c.t_min) / c.num_sample_steps
        for i in range(c.num_sample_steps):
            t = x.new_full((len(x),), c.t_max - i * h)
            x = x - h * model_fn(x, t, inputs.label)
        return x


if __name__ == '__main__':
    main(trainer_class=Scratch)
