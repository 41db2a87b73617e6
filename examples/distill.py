"""A student that samples in one step, taught by the scores of two flows (Yin et al. 2024, algorithm 1).

`teacher` is a plain run. In the second run, `network` is the student: its prediction of x0 from pure noise is a sample.
A second network, `fake`, is a flow of the student's samples and trains along with it. At a noisy xt of a sample, the
teacher predicts an x0 likely under the data, `fake` one likely under the samples, and the student moves its sample by
the difference. Student and `fake` start as copies of the teacher. The two optimizers step together: each loss term
trains only one network. The paper's regression term, on pairs of noise and picture from the teacher, is left out; it
keeps more parts of the data.                         sh run.sh examples/distill.py
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch

import utils
from config import Config
from main import load_run
from optimizers import get_optimizer
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer


@dataclass(frozen=True)
class Settings(Config):
    teacher: str = ''  # folder of the teacher's run


class Flow(ExampleDiffusionTrainer):
    def samplers(self):
        return {f'steps_{n}': partial(self.draw, solver='euler', nfe=n, time_grid='uniform') for n in (1, 20)}


class Student(ExampleDiffusionTrainer):
    has_reference = False  # the student denoises only at t = 1

    def setup_networks(self):
        super().setup_networks()
        self.network.load_state_dict(load_run(self.config.teacher).network.state_dict())
        self.modules['teacher'] = copy.deepcopy(self.network).requires_grad_(False)
        self.modules['fake'] = copy.deepcopy(self.network)
        self.optimizers['fake'] = get_optimizer(self.config, self.modules['fake'])

    def sample(self, model_fn, x1, label):
        t = torch.full((len(x1),), self.config.t_max, device=x1.device)
        return self.model_convert_fn(model_fn(x1, t, label), t, x1, self.process(t)).x0

    def loss_fn(self, batch, model_fn):
        coefs = self.process(batch.t)
        x = self.sample(model_fn, batch.x1, batch.label)
        xt = self.process.compute_xt(x.detach(), batch.x1.roll(1, 0), coefs)  # noise of another sample in this process

        def x0(name):
            out = self.get_model_fn(self.modules[name], train=torch.is_grad_enabled())(xt, batch.t, batch.label)
            return self.model_convert_fn(out, batch.t, xt, coefs).x0

        fake = x0('fake')
        with torch.no_grad():
            real = x0('teacher')
            size = (x - real).abs().flatten(1).mean(1).clamp(min=1e-3)
            direction = (fake - real) / utils.bcast_right(size, x.ndim)
        learn_fake = utils.image_square_error(fake, x.detach()) / coefs.sigma.clamp(min=0.1) ** 2
        return utils.image_square_error(x, (x - direction).detach()) + learn_fake

    def draw(self, model_fn, inputs, solver):
        return self.sample(model_fn, inputs.x1, inputs.label)

    def samplers(self):
        return {'steps_1': partial(self.draw, solver='')}


if __name__ == '__main__':
    student = dict(trainer_class=Student, base_lr=2e-4, teacher=lambda c: f'{c.run_dir}_teacher')
    side_by_side(
        {'teacher': dict(trainer_class=Flow), 'student': student},
        numbers=('final/*/*wasserstein', 'final/*/recall'),
        default_flags='--preset toy2d',
        config_class=Settings,
    )
