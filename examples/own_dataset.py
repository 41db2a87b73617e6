"""A data set of your own: copy this file, and change `load`.

    sh run.sh examples/own_dataset.py                     discs and rings
    sh run.sh examples/own_dataset.py --num_training_steps 300 --experiment_name first_try

If your pictures are files in a folder, or arrays in a file, no code is needed: see docs/data.md.
"""

from dataclasses import dataclass

import numpy as np

from config import Config
from data_utils import DATASETS, DataSpec
from main import main


def load(config):
    """Returns two pairs, the pictures to train on and those held out: ((images, labels), (images, labels)).

    images: uint8 (N, C, H, W), numpy or torch.          labels: integers (N,) from 0 to num_classes - 1.
    It must return the same every time, so that a run can be resumed: all randomness comes from config.seed.
    """
    rng = np.random.default_rng(config.seed)
    n = 2200
    label = rng.integers(2, size=n)  # 0: disc, 1: ring
    centre, radius = rng.uniform(5, 11, (n, 2, 1, 1)), rng.uniform(2.5, 4.5, (n, 1, 1))
    place = np.arange(16)
    distance = np.hypot(place[:, None] - centre[:, 0], place - centre[:, 1])  # (n, 16, 16), to the centre
    outside = np.where(label[:, None, None] == 0, distance - radius, abs(distance - radius) - 1)
    images = (255 * np.clip(0.5 - outside, 0, 1)).astype(np.uint8)[:, None]  # (n, 1, 16, 16), with soft edges
    return (images[200:], label[200:]), (images[:200], label[:200])


# The key is the name for --dataset. Pictures show the names in `classes`. Without classes, leave out both settings.
DATASETS['discs_and_rings'] = DataSpec(load, num_classes=2, classes=('disc', 'ring'))


@dataclass(frozen=True)
class Settings(Config):  # other defaults for this file; flags on the command line win
    dataset: str = 'discs_and_rings'
    num_training_steps: int = 600
    attention_resolutions: tuple[int, ...] = (8,)  # must be a side in the UNet: 16, 8


if __name__ == '__main__':
    main(config_class=Settings)
