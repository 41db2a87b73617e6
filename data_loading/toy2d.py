"""Toy distributions of points in the plane: quick to learn, easy to look at, and with a known density.

Points are drawn from the seed. Each set is centred and has a standard deviation of about 0.5, as the settings assume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import Config

SIZES = 20_000, 2_000  # points to train on, held out


@dataclass(frozen=True)
class Curves:
    """Points on curves, one per class, plus Gaussian noise: `curve(label, u)` is (..., 2), u in [0, 1]."""

    curve: Callable[[np.ndarray, np.ndarray], np.ndarray]
    noise: float
    num_classes: int

    def draw(self, rng: np.random.Generator, n: int, label: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, 2) and their classes (n,), which are drawn, too, unless given."""
        label = rng.integers(self.num_classes, size=n) if label is None else label
        u = rng.uniform(0, 1, n)
        return self.curve(label, u) + rng.normal(0, self.noise, (n, 2)), label

    def density(self, x: Tensor) -> Tensor:
        """The density (N,) float64 at points (N, 2): the mean of Gaussians at 500 points along each curve."""
        label, u = np.meshgrid(np.arange(self.num_classes), (np.arange(500) + 0.5) / 500)
        centres, counts = torch.from_numpy(self.curve(label, u)).reshape(-1, 2).unique(dim=0, return_counts=True)
        distances = (torch.cdist(part, centres) / self.noise for part in x.double().split(4096))
        sums = torch.cat([(-d.square() / 2).exp() @ counts.double() for d in distances])
        return sums / (counts.sum() * 2 * math.pi * self.noise**2)


class Checkerboard:
    """The eight dark squares of a 4 x 4 board that fills [-0.9, 0.9]^2; no classes."""

    num_classes = 0

    def draw(self, rng: np.random.Generator, n: int, label: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        row, pair = rng.integers(4, size=n), rng.integers(2, size=n)
        corner = np.stack([2 * pair + row % 2, row], 1)
        return 0.45 * (corner + rng.uniform(0, 1, (n, 2))) - 0.9, np.zeros(n, int)

    def density(self, x: Tensor) -> Tensor:
        square = ((x.double() + 0.9) / 0.45).floor()
        inside = ((square >= 0) & (square < 4)).all(1) & (square.sum(1) % 2 == 0)
        return inside.double() / (8 * 0.45**2)


def moons(label: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Two interleaved half circles."""
    upper = np.stack([np.cos(math.pi * u) - 0.5, np.sin(math.pi * u) - 0.25], -1)
    return 0.65 * np.where(label[..., None] == 0, upper, -upper)


def spirals(label: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Two spiral arms of one and a half turns each."""
    along = np.sqrt(0.02 + 0.98 * u)
    angle = 3 * math.pi * along + math.pi * label
    return along[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)


def eight_gaussians(label: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Eight points on a circle of radius 0.7."""
    return 0.7 * np.stack([np.cos(label * math.pi / 4), np.sin(label * math.pi / 4)], -1)


TOY2D: dict[str, Curves | Checkerboard] = {
    'moons': Curves(moons, noise=0.04, num_classes=2),
    'spirals': Curves(spirals, noise=0.02, num_classes=2),
    'checkerboard': Checkerboard(),
    'eight_gaussians': Curves(eight_gaussians, noise=0.05, num_classes=8),
}


def load_points(name: str, config: Config) -> tuple[tuple[Tensor, Tensor], ...]:
    """The training and the held-out part, each of points (N, 2) and classes (N,), drawn from config.seed."""
    rng = np.random.default_rng([config.seed, list(TOY2D).index(name)])
    parts = (TOY2D[name].draw(rng, n) for n in SIZES)
    return tuple((torch.from_numpy(x).float(), torch.from_numpy(label).long()) for x, label in parts)


def load_pairs(first: str, second: str, config: Config) -> tuple[tuple[Tensor, ...], ...]:
    """Like load_points, but pairs (x0, class of x0, x1) of independent draws from two sets."""
    ends = zip(load_points(first, config), load_points(second, config), strict=True)
    return tuple((x0, label, x1) for (x0, label), (x1, _) in ends)


def circling(rng: np.random.Generator, n: int, t: float) -> Tensor:
    """Points (n, 2) of a law that moves: at time t, half of them around each of two opposite places on a circle, at the
    angles pi t and pi t + pi."""
    side, angle = 1 - 2 * (rng.permutation(n)[:, None] % 2), math.pi * t
    centre = 0.7 * np.array([math.cos(angle), math.sin(angle)])
    return torch.from_numpy(side * centre + rng.normal(0, 0.1, (n, 2))).float()


def optimal_partners(a: Tensor, b: Tensor) -> Tensor:
    """The points b (n, 2), in the order of their partners a (n, 2) in the exact transport plan."""
    from scipy.optimize import linear_sum_assignment

    return b[linear_sum_assignment(torch.cdist(a, b).square())[1]]


def load_snapshots(times: tuple[float, ...], optimal: bool, config: Config) -> tuple[tuple[Tensor, ...], ...]:
    """The training and the held-out part: a point of `circling` at each of the times, (n, len(times), 2), and 0. Points
    are drawn independently, or, if `optimal`, each is the optimal partner of the point at the time before."""
    rng, parts = np.random.default_rng([config.seed, len(TOY2D)]), []
    for n in (2000, 1000):
        x = [circling(rng, n, t) for t in times]
        for i in range(optimal * (len(times) - 1)):
            x[i + 1] = optimal_partners(x[i], x[i + 1])
        parts.append((torch.stack(x, 1), torch.zeros(n)))
    return tuple(parts)
