"""The second round of a rectified flow: train on the pairs that the first one makes (Liu et al. 2023, algorithm 1).

The first run draws 20,000 points from noise. The second run has these pairs (x0, x1) as its data, so that noise and
point belong together, and its paths hardly cross: they are nearly straight, and one step nearly follows them.
`straightness` is E |(x1 - x0) - v(xt, t)|^2 along paths of 50 steps (section 2.2), 0 for straight lines. `longer` is
the first run with as many steps as both rounds have together.

    sh run.sh examples/reflow.py                          on moons
"""

from functools import partial
from pathlib import Path

import torch

import main
import metrics
import utils
from compare import side_by_side
from data_utils import DATASETS, DataSpec
from trainer import ExampleDiffusionTrainer


def load(config):
    """(x0, label, x1) drawn by the run `first`, and held out, new noise for the held-out points."""
    first = Path(config.ckpt_dir, config.experiment_name.replace('_second', '_first'))
    file = first / 'pairs.pt'
    if not file.exists():  # drawn once: another number of threads might round otherwise
        trainer = main.load_run(first)
        utils.seed_everything(config.seed, 'pairs')
        inputs = trainer.sample_inputs(22_000)
        x0 = trainer.draw(trainer.get_model_fn(trainer.network), inputs, 'adams')
        torch.save((x0.cpu(), inputs.label.cpu(), inputs.x1.cpu()), file)
    pairs = torch.load(file)
    return tuple(x[:20_000] for x in pairs), tuple(x[20_000:] for x in pairs)


DATASETS['pairs_of_first'] = DataSpec(load, (2,), num_classes=2, scale='float')


class Flow(ExampleDiffusionTrainer):
    def samplers(self):
        return {f'euler_{n}': partial(self.draw, solver='euler', nfe=n, time_grid='uniform') for n in (1, 2, 4)}

    def sample_metrics(self, x, inputs):
        return metrics.distance_from_set(x, 'moons') | {'straightness': self.straightness(inputs, steps=50)}

    @torch.no_grad()
    def straightness(self, inputs, steps):
        x, velocities = inputs.x1, []
        model_fn = self.get_model_fn(next(iter(self.weights().values())))
        for i in range(steps):
            t = x.new_full((len(x),), 1 - (i + 0.5) / steps)
            velocities.append(model_fn(x, t, inputs.label))
            x = x - velocities[-1] / steps
        return float(torch.stack([utils.image_square_error(inputs.x1 - x, v) for v in velocities]).mean())


if __name__ == '__main__':
    second = dict(trainer_class=Flow, dataset='pairs_of_first')
    side_by_side(
        {
            'first': dict(trainer_class=Flow),
            'longer': dict(trainer_class=Flow, num_training_steps=4000),
            'second': second,
        },
        numbers=('final/*/wasserstein', 'final/euler_1/*'),
        usual='--preset toy2d',
    )
