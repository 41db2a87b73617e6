"""Distances between samples and data, computed from features (N, D) of both. detectors.py makes the features."""

import numpy as np
import torch
from torch import Tensor

from config import SettingError
from data_loading.toy2d import TOY2D

MOST_ROWS = 50_000  # training images of which distances between pairs are computed
CHUNK = 2048  # rows of a table of distances at once


class Moments:
    """Mean and covariance of rows that come in parts, in float64."""

    def __init__(self, features: Tensor):
        """`features` (N, D), N at least 2."""
        self.n = len(features)
        parts = features.split(CHUNK)
        self.mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / self.n
        self.cov = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        for part in parts:
            centred = part.double() - self.mean
            self.cov += centred.T @ centred
        self.cov /= self.n - 1


def frechet(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by symmetric eigenvalues in float64.

    The FID, if the features are Inception's (Heusel et al. 2017, eq. 6; Dowson and Landau 1982, eq. 16).
    """
    values, vectors = torch.linalg.eigh(a.cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)


def radii(x: Tensor, k: int) -> Tensor:
    """(N,): the distance of each row to its k-th nearest other row."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(CHUNK)])


def density_coverage(samples: Tensor, data: Tensor, k: int = 5) -> tuple[float, float]:
    """(density, coverage) of samples (N, D) by data (M, D) (Naeem et al. 2020, eq. 4 and 5).

    Density is the mean number, over k, of balls around data points, as far as their k-th neighbour, that a sample lies
    in; coverage is the share of the balls that hold a sample.
    """
    reach = radii(data, k)
    inside, nearest = 0, torch.full((len(data),), torch.inf)
    for part in samples.split(CHUNK):
        distance = torch.cdist(part, data)
        inside += int((distance < reach).sum())
        nearest = torch.minimum(nearest, distance.min(0).values)
    return inside / (k * len(samples)), float((nearest < reach).float().mean())


def nearest(x: Tensor, data: Tensor) -> float:
    """Mean distance of a row of x to the nearest row of data."""
    return float(torch.cat([torch.cdist(part, data).min(1).values for part in x.split(CHUNK)]).mean())


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The Wasserstein-2 distance of two sets of as many points (N, D): the root mean square distance of the pairs of
    the exact transport plan, which takes seconds from N = 2000 on."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a.double(), b.double()).square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def compare(samples: Tensor, train: Tensor, held_out: Tensor, most: int | None = None) -> dict[str, float]:
    """All distances of samples from the training data, by features (N, D), (M, D), (K, D).

    frechet and nearest_neighbour_ratio, with all training images, the rest with at most `most` (None: MOST_ROWS);
    real_frechet of as many training images as samples, drawn at random: what a perfect sampler would get; kid, the mean
    over subsets, and kid_std (Binkowski et al. 2018); precision and recall with 3 neighbours (Kynkaanniemi et al.
    2019); density and coverage with 5; nearest_neighbour_ratio, the mean distance to the nearest training image over
    that of held-out images, below 1 where training images were memorised. In the plane also wasserstein, of at most
    1000 samples and as many of the data, and real_wasserstein, of as many held-out points. kid, precision and recall
    are computed by torch-fidelity.
    Raises SettingError for fewer than 10 rows of a kind, and for samples that are not finite.
    """
    if min(len(samples), len(train), len(held_out)) < 10:
        raise SettingError(
            f'{len(samples)} samples, {len(train)} training and {len(held_out)} held-out images: at least 10 of each '
            'are needed to compare. Draw more by --num.'
        )
    bad = int((~samples.isfinite().all(1)).sum())
    if bad:
        raise SettingError(
            f'{bad} of {len(samples)} samples have values that are not finite, so they have no distance from the data. '
            'Try another --solver or --time_grid, or look at the training loss.'
        )
    draw = torch.Generator().manual_seed(0)
    real = train[torch.randint(len(train), (len(samples),), generator=draw)]
    moments = Moments(train)
    values = {'frechet': frechet(Moments(samples), moments), 'real_frechet': frechet(Moments(real), moments)}
    everything = train
    if len(train) > (most or MOST_ROWS):
        train = train[torch.randperm(len(train), generator=draw)[: most or MOST_ROWS]]
    if train.shape[1] == 2:
        n = min(1000, len(samples), len(train), len(held_out))
        some = train[torch.randperm(len(train), generator=draw)[:n]]
        values |= {'wasserstein': wasserstein(samples[:n], some), 'real_wasserstein': wasserstein(held_out[:n], some)}
    ratio = nearest(samples, everything) / max(nearest(held_out, everything), 1e-12)
    return values | neighbourhoods(samples, train) | dict(nearest_neighbour_ratio=ratio)


def neighbourhoods(samples: Tensor, train: Tensor) -> dict[str, float]:
    """The numbers of `compare` that look at pairs of rows."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    size = min(1000, len(samples), len(train))
    kid = kid_features_to_metric(samples.double(), train.double(), kid_subset_size=size, kid_subsets=100, verbose=False)
    prc = prc_features_to_metric(samples, train, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    density, coverage = density_coverage(samples, train)
    return dict(
        kid=kid['kernel_inception_distance_mean'], kid_std=kid['kernel_inception_distance_std'],
        precision=prc['precision'], recall=prc['recall'], density=density, coverage=coverage,
    )  # fmt: skip


def distance_from_set(x: Tensor, name: str, end: str = '') -> dict[str, float]:
    """wasserstein, the distance of points (n, 2) from as many new points of a set of data_loading/toy2d.py, and
    real_wasserstein, that of two draws of the set. `end` is added to the names."""
    new, other = (torch.from_numpy(TOY2D[name].draw(np.random.default_rng(seed), len(x))[0]) for seed in (1, 2))
    return {f'wasserstein{end}': wasserstein(x.cpu(), new), f'real_wasserstein{end}': wasserstein(other, new)}


# name of a number -> the line that a run prints
SENTENCES = {
    'label_agreement': 'a classifier of real images sees the requested label in {:.1%}',
    'frechet': 'Frechet distance to the training images: {:.4g}',
    'real_frechet': 'the same distance of as many real images: {:.4g}',
    'wasserstein': 'Wasserstein-2 distance to the training points: {:.4g}',
    'real_wasserstein': 'the same distance of as many held-out points: {:.4g}',
    'precision': 'samples that look like data (precision): {:.1%}',
    'recall': 'data that look like samples (recall): {:.1%}',
    'nearest_neighbour_ratio': 'nearest-neighbour ratio: {:.3f} (well below 1 would be memorising)',
}
NOT_PRINTED = ('kid', 'kid_std', 'density', 'coverage')  # they are in the record


def describe(values: dict[str, float]) -> str:
    """Numbers for samples, one a line: a sentence for each of this file, the name for those of an experiment."""
    own = [f'  {name}: {value:.4g}' for name, value in values.items() if name not in (*NOT_PRINTED, *SENTENCES)]
    return '\n'.join([f'  {text.format(values[k])}' for k, text in SENTENCES.items() if k in values] + own)
