"""The second round of a rectified flow: train on pairs made by the first round (Liu et al. 2023, algorithm 1).

In the second run, x0 is what the first run draws from the noise x1 of each batch, with 20 evaluations. Noise and point
then belong together, so paths hardly cross: they are nearly straight, and one step follows them closely.
`straightness` is E |(x1 - x0) - v(xt, t)|^2 along paths of 50 steps, 0 for straight lines. `longer` is
the first run with as many steps as both rounds together; drawing the pairs costs more than that.

    sh run.sh examples/reflow.py                          on moons
"""

import dataclasses
from functools import partial

import torch

import utils
from config import Config, only
from evaluation.distances import distance_from_set
from main import load_run
from sampling import sample
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    first: str = ''
    """Folder of the first run."""


class Flow(ExampleDiffusionTrainer):
    def samplers(self):
        only(self.config, process_name='rf')  # paths of other processes are curved
        return {f'euler_{n}': partial(self.draw, solver='euler', nfe=n, time_grid='uniform') for n in (1, 2, 4)}

    def sample_metrics(self, x, inputs):
        straightness = self.straightness(inputs, steps=50)
        return distance_from_set(x, self.config.dataset, label=inputs.label) | {'straightness': straightness}

    @torch.no_grad()
    def straightness(self, inputs, steps):
        x, velocities = inputs.x1, []
        model_fn = self.get_model_fn(next(iter(self.weights().values())))
        for i in range(steps):
            t = x.new_full((len(x),), 1 - (i + 0.5) / steps)
            out = model_fn(x, t, inputs.label)
            velocities.append(self.model_convert_fn(out, t, x, self.process(t)).velocity)
            x = x - velocities[-1] / steps
        return float(torch.stack([utils.image_square_error(inputs.x1 - x, v) for v in velocities]).mean())


class Second(Flow):
    independent = False

    def setup_networks(self):
        self.modules['first'] = load_run(self.config.first).network.requires_grad_(False)
        super().setup_networks()

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        first = self.get_model_fn(self.modules['first'])
        x0 = sample(first, self.process, prepared.x1, prepared.label, model_type=self.config.model_type, num_steps=20)
        return dataclasses.replace(prepared, x0=x0)


if __name__ == '__main__':
    longer = dict(trainer_class=Flow, num_training_steps=lambda c: 2 * c.num_training_steps)
    second = dict(trainer_class=Second, first=lambda c: f'{c.run_dir}_first')
    side_by_side(
        {'first': dict(trainer_class=Flow), 'longer': longer, 'second': second},
        numbers=('final/*/wasserstein', 'final/euler_1/*'),
        default_flags='--preset toy2d',
        config_class=Settings,
    )
