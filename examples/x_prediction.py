"""Let the network output the picture: nine output-loss pairs, on a transformer with large patches (Li and He 2025).

The whole digit, 8 x 8 pixels, is one token of 64 numbers, and the transformer is 32 wide. Pictures lie near a surface
of few dimensions, so x0 fits through; noise and velocity fill all 64 dimensions and do not. The type that the loss
compares matters less than the type of the output. One loop makes nine runs with the same network, steps and seeds.

    sh run.sh examples/x_prediction.py                                digits, half a minute each
    sh run.sh examples/x_prediction.py --dit_patch 2 --dit_width 128  where all outputs fit through
"""

from functools import partial

from scripts.compare import side_by_side
from trainer import ExampleDiffusionTrainer

NAMES = {'x0': 'x0', 'noise': 'x1', 'v': 'velocity'}
CELLS = {
    f'{output}_{loss}': dict(model_type=NAMES[output], target_type=NAMES[loss]) for output in NAMES for loss in NAMES
}


class Mine(ExampleDiffusionTrainer):
    def samplers(self):
        return {'adams': partial(self.draw, solver='adams')}


if __name__ == '__main__':
    side_by_side(
        {name: dict(trainer_class=Mine, **settings) for name, settings in CELLS.items()},
        numbers=('final/*/frechet', 'final/*/label_agreement'),
        default_flags='--preset digits_long --network dit --dit_patch 8 --dit_width 32 --dit_heads 4 --dit_depth 6 '
        '--num_training_steps 1000 --time_sampler logit_normal --t_min 0.02 --t_max 0.98',
    )
