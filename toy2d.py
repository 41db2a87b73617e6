"""Points in the plane, drawn from the seed: distributions that are quickly learned and easily looked at.

Each is centred and has a standard deviation of about 0.5, as the settings assume.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from config import Config

SIZES = 20_000, 2_000  # points to train on, held out
Points = tuple[np.ndarray, np.ndarray]  # (N, 2), classes (N,)


def moons(rng: np.random.Generator, n: int) -> Points:
    """Two half circles that reach into each other, one a class, with a little noise."""
    label, angle = rng.integers(2, size=n), rng.uniform(0, math.pi, n)
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], 1)
    x = np.where(label[:, None] == 0, upper, -upper)
    return 0.65 * x + rng.normal(0, 0.04, (n, 2)), label


def spirals(rng: np.random.Generator, n: int) -> Points:
    """Two arms of a spiral, one a class, of one and a half turns."""
    label, along = rng.integers(2, size=n), np.sqrt(rng.uniform(0.02, 1, n))
    angle = 3 * math.pi * along + math.pi * label
    return along[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.02, (n, 2)), label


def checkerboard(rng: np.random.Generator, n: int) -> Points:
    """The eight dark squares of a board of four by four, which fills [-0.9, 0.9]^2; no classes."""
    row, pair = rng.integers(4, size=n), rng.integers(2, size=n)
    corner = np.stack([2 * pair + row % 2, row], 1)
    return 0.45 * (corner + rng.uniform(0, 1, (n, 2))) - 0.9, np.zeros(n, int)


def eight_gaussians(rng: np.random.Generator, n: int) -> Points:
    """Eight Gaussians of standard deviation 0.05 on a circle of radius 0.7, one a class."""
    label = rng.integers(8, size=n)
    centre = 0.7 * np.stack([np.cos(label * math.pi / 4), np.sin(label * math.pi / 4)], 1)
    return centre + rng.normal(0, 0.05, (n, 2)), label


TOY2D: dict[str, tuple[Callable[[np.random.Generator, int], Points], int]] = {  # and the number of classes
    'moons': (moons, 2),
    'spirals': (spirals, 2),
    'checkerboard': (checkerboard, 0),
    'eight_gaussians': (eight_gaussians, 8),
}


def load_points(name: str, config: Config) -> tuple[tuple[Tensor, Tensor], ...]:
    """The training and the held-out part, each points (N, 2) and classes (N,): a function of the seed."""
    rng = np.random.default_rng([config.seed, list(TOY2D).index(name)])
    parts = (TOY2D[name][0](rng, n) for n in SIZES)
    return tuple((torch.from_numpy(x).float(), torch.from_numpy(label).long()) for x, label in parts)


LOADERS = {name: (partial(load_points, name), num_classes) for name, (_, num_classes) in TOY2D.items()}
