"""An afternoon's work in this repo: a loss of one's own. Data, samples, numbers and resuming come with it."""

from main import main
from trainer import ExampleDiffusionTrainer


class Mine(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        weight = 1 / (1 + self.process.log_snr(batch.t).exp())
        return weight * super().loss_fn(batch, model_fn)


if __name__ == '__main__':
    main(trainer_class=Mine)
