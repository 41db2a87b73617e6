"""Points in the plane: a data set of floats that the user's own file adds."""

import torch
from sklearn.datasets import make_moons

from data_utils import DATASETS, DataSpec
from main import main
from trainer import ExampleDiffusionTrainer


def load_moons(config):
    x, y = make_moons(2000, noise=0.05, random_state=0)
    x, y = torch.tensor(x).float() - torch.tensor([0.5, 0.25]), torch.tensor(y).long()
    return (x[:1600], y[:1600]), (x[1600:], y[1600:])


DATASETS['moons'] = DataSpec(load_moons, num_classes=2, scale='float')


class Points(ExampleDiffusionTrainer):
    def sample_metrics(self, x, inputs):
        return {'upper': float((x[:, 1] > 0).float().mean())}


if __name__ == '__main__':
    main(trainer_class=Points)
