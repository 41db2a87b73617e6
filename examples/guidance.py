"""Four kinds of guidance: classifier-free, in an interval of times, by a worse model, and learned.

    cfg              v + (w - 1) (v - v without label)                    Ho and Salimans 2022, eq. 6
    interval         the same, only for t between 0.3 and 0.8            Kynkaanniemi et al. 2024
    autoguidance     v + (w - 1) (v - v of the weights after a quarter of the training)      Karras et al. 2024
    model guidance   trained on guided targets, sampled without guidance                     Tang et al. 2025

All samplers use about 20 network evaluations: those that compare two predictions at each step take 10 steps, the
interval 15. In training, model guidance costs three evaluations where the plain run costs one.

    sh run.sh examples/guidance.py                        digits, after few steps, to leave room for improvement
"""

import copy
from functools import partial

import torch

import utils
from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer

W = 2.0  # the guidance scale, for all kinds


class Plain(ExampleDiffusionTrainer):
    def setup_networks(self):
        super().setup_networks()
        self.modules['early'] = copy.deepcopy(self.network).requires_grad_(False)

    def train_step(self, micro_batches):
        super().train_step(micro_batches)
        if self.step == max(1, self.config.num_training_steps // 4):
            self.modules['early'].load_state_dict(self.network.state_dict())

    def samplers(self):
        guided = partial(self.draw, solver='adams', nfe=10, guidance_scale=W)
        return {
            'unguided': partial(self.draw, solver='adams', nfe=20),
            'cfg': guided,
            'interval': partial(guided, nfe=15, guidance_interval=(0.3, 0.8)),
            'autoguidance': partial(guided, guide_fn=self.get_model_fn(self.modules['early'])),
        }


class ModelGuidance(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        target = getattr(self.target_fn(batch.t, xt, batch.x0, batch.x1, coefs), self.config.target_type)

        def predicted(label):
            out = self.model_convert_fn(model_fn(xt, batch.t, label), batch.t, xt, coefs)
            return getattr(out, self.config.target_type)

        with torch.no_grad():
            none = torch.full_like(batch.label, self.data.num_classes)
            target = target + (1 - 1 / W) * (predicted(batch.label) - predicted(none))  # fixed point: cfg
        return self.loss_weight(coefs) * utils.image_square_error(predicted(batch.label), target)

    def samplers(self):
        return {'unguided': partial(self.draw, solver='adams', nfe=20)}


if __name__ == '__main__':
    side_by_side(
        {'plain': dict(trainer_class=Plain), 'model_guidance': dict(trainer_class=ModelGuidance)},
        numbers=('final/*/label_agreement', 'final/*/frechet'),
        default_flags='--preset digits_long --label_dropout 0.1 --num_training_steps 400',
    )
