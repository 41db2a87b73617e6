"""Exercise 4: images fade. With a label of it the network knows how much, so that samples do not fade.

sh run.sh examples/solutions/fade.py --num_training_steps 300 --fade_prob 0.5
sh run.sh examples/solutions/fade.py --num_training_steps 300 --labelled_prob 0.5
"""

from dataclasses import dataclass

import torch

from augmentations import AUGMENTATIONS, LABELS
from config import Config
from main import main
from trainer import ExampleDiffusionTrainer


def fade(x, chosen, config):
    """x (B, C, H, W) in [0, 1], the chosen images (B,) times a factor between 0.3 and 1; returns them and a mask."""
    faded, label = labelled_fade(x, chosen, config)
    return faded, label[:, 0] > 0


def labelled_fade(x, chosen, config):
    """The same, with a label (B, 1): the part of the ink that is gone. 0 means unchanged."""
    gone = 0.7 * torch.rand(len(x), device=x.device) * chosen  # (B,)
    return x * (1 - gone)[:, None, None, None], gone[:, None]


# setting -> (function, field of the DataSpec that must be True; empty: none)
AUGMENTATIONS |= {'fade_prob': (fade, ''), 'labelled_prob': (labelled_fade, '')}
LABELS['labelled_prob'] = 1  # size of the label


@dataclass(frozen=True)
class Settings(Config):
    fade_prob: float = 0.0
    """Probability that an image fades."""
    labelled_prob: float = 0.0
    """The same, and the network gets the part that is gone."""


class Fade(ExampleDiffusionTrainer):
    def sample_metrics(self, x, inputs):
        return super().sample_metrics(x, inputs) | {'ink': float(x.mean())}


if __name__ == '__main__':
    main(trainer_class=Fade, config_class=Settings)
