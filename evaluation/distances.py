"""Distances between samples and data, computed from features (N, D) of both. detectors.py makes the features."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from config import SettingError
from data_loading.toy2d import TOY2D
from runtime import alive

if TYPE_CHECKING:
    from evaluation.detectors import Detector, JudgedData

MOST_ROWS = 50_000  # training images in distances between pairs
CHUNK = 2048  # rows of a matrix of distances at once
DRAWS = 20  # draws of real data that a floor averages


@dataclass
class SampleFeatures:
    """Collects features of samples, and whether their classes were recognised, for this process's share of samples."""

    detector: 'Detector'
    data: 'JudgedData'
    mismatch: str = ''  # why the samples cannot be compared with the data; empty if they can
    features: list[Tensor] = field(default_factory=list)
    classes: list[Tensor] = field(default_factory=list)  # one entry for each batch whose classes are known
    recognised: list[Tensor] = field(default_factory=list)  # the same, if the detector predicts classes

    @torch.no_grad()
    def add(self, x: Tensor, classes: Tensor | None) -> None:
        """Add decoded samples (n, ...) and their requested classes (n,), or None."""
        if mismatch := self.data.mismatch(x):
            self.mismatch = mismatch
            return
        self.features.append(self.detector.features(x).cpu())
        self.classes += [] if classes is None else [classes.cpu()]
        if self.detector.predict is not None and classes is not None:
            self.recognised.append((self.detector.predict(x) == classes.to(x.device)).float().cpu())


class Moments:
    """Mean and covariance of features in float64, converted part by part."""

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

    @cached_property
    def root(self) -> Tensor:  # the symmetric square root of the covariance
        values, vectors = torch.linalg.eigh(self.cov)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2), by symmetric eigenvalues in float64.

    The FID, if the features are Inception's (Heusel et al. 2017, eq. 6; Dowson and Landau 1982, eq. 16).
    """
    cross = torch.linalg.eigvalsh(b.root @ a.cov @ b.root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)


def radii(x: Tensor, k: int) -> Tensor:
    """(N,): the distance of each row to its k-th nearest other row."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(CHUNK)])


def density_coverage(samples: Tensor, data: Tensor, k: int = 5) -> tuple[float, float]:
    """(density, coverage) of samples (N, D) against data (M, D) (Naeem et al. 2020, eq. 4 and 5).

    Each data point has a ball that reaches to its k-th neighbour. Density is the mean number of balls that a sample
    lies in, divided by k; coverage is the share of balls that contain a sample.
    """
    reach = radii(data, k)
    inside, nearest = 0, torch.full((len(data),), torch.inf)
    for part in samples.split(CHUNK):
        distance = torch.cdist(part, data)
        inside += int((distance < reach).sum())
        nearest = torch.minimum(nearest, distance.min(0).values)
    return inside / (k * len(samples)), float((nearest < reach).float().mean())


def mean_nearest_distance(x: Tensor, data: Tensor) -> float:
    """Mean distance of a row of x to the nearest row of data."""
    return float(torch.cat([torch.cdist(part, data).min(1).values for part in x.split(CHUNK)]).mean())


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The Wasserstein-2 distance of two sets of N points each (N, D): the root mean square distance of the pairs in the
    exact transport plan, which takes seconds for N = 2000 or more."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a.cpu().double(), b.cpu().double()).square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def real_draws(n: int, size: int, of_data: Tensor | None, wanted: Tensor | None) -> Iterator[Tensor]:
    """DRAWS draws of indices (n,) of training items, at random with replacement. If the classes of the data `of_data`
    (size,) are known, items have the classes `wanted` (n,); where a class has no training items, any item is drawn."""
    of_classes = []
    if of_data is not None and wanted is not None:
        of_classes = [(wanted == i, (of_data == i).nonzero().flatten()) for i in wanted.unique()]
    for seed in range(DRAWS):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randint(size, (n,), generator=draw)
        for places, items in of_classes:
            if len(items):
                rows[places] = items[torch.randint(len(items), (int(places.sum()),), generator=draw)]
        yield rows


def floor(name: str, values: Sequence[float]) -> dict[str, float]:
    """real_<name>, the value for a perfect sampler: the mean over draws of real data; and their standard deviation."""
    return {f'real_{name}': float(np.mean(values)), f'real_{name}_std': float(np.std(values, ddof=1))}


@alive.print_while('comparing the samples with the data')
def compare(
    samples: Tensor, train: Tensor, held_out: Tensor, most: int | None = None, classes: Tensor | None = None,
    wanted: Tensor | None = None, is_standard: bool = True,
) -> dict[str, float]:  # fmt: skip
    """All distances of samples from the training data, by features (N, D), (M, D), (K, D).

    frechet                  Frechet distance to all training images
    real_frechet             its floor, the value for a perfect sampler, from `real_draws` of N training images;
                             `classes` (M,) of the training images and `wanted` (N,) of the samples, if they have any
    nearest_neighbour_ratio  mean distance of samples to the nearest of all training images, divided by the same for
                             held-out images; below 1 where training images were memorised
    kid, kid_std             mean and standard deviation over subsets (Binkowski et al. 2018), by torch-fidelity; its
                             kernel has a unit, so features are divided by their standard deviation unless `is_standard`
    precision, recall        with 3 neighbours (Kynkaanniemi et al. 2019), by torch-fidelity
    density, coverage        with 5 neighbours
    wasserstein              in the plane only, of at most 1000 samples and as many data; with its floor

    kid to coverage use at most `most` training images (None: MOST_ROWS). Floors come with their standard deviation,
    such as real_frechet_std. Raises SettingError for fewer than 10 rows, and for samples that are not finite.
    """
    if min(len(samples), len(train), len(held_out)) < 10:
        counts = f'{len(samples)} samples, {len(train)} training and {len(held_out)} held-out images'
        raise SettingError(f'{counts}: a comparison needs at least 10 of each. Draw more samples with --num.')
    if bad := int((~samples.isfinite().all(1)).sum()):
        remedy = 'Try another --solver or --time_grid, or look at the training loss'
        raise SettingError(f'{bad} of {len(samples)} samples have values that are not finite. {remedy}.')
    moments = Moments(train)
    rows = real_draws(len(samples), len(train), classes, wanted)
    values = {'frechet': frechet(Moments(samples), moments)}
    values |= floor('frechet', [frechet(Moments(train[i]), moments) for i in rows])
    if train.shape[1] == 2:
        values |= in_the_plane(samples, train, classes, wanted)
    values['nearest_neighbour_ratio'] = mean_nearest_distance(samples, train) / max(
        mean_nearest_distance(held_out, train), 1e-12
    )
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: most or MOST_ROWS].sort().values
    return values | neighbourhoods(samples, train[some], is_standard)


def in_the_plane(
    samples: Tensor, train: Tensor, classes: Tensor | None, wanted: Tensor | None, most: int = 1000
) -> dict[str, float]:
    """wasserstein of points from at most `most` of the data, and its floor, drawn from the rest of the data."""
    n = min(most, len(samples), len(train) // 4)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    some, rest = train[order[:n]], order[n:]
    rows = real_draws(n, len(rest), None if classes is None else classes[rest], None if wanted is None else wanted[:n])
    real = floor('wasserstein', [wasserstein(train[rest[i]], some) for i in rows])
    return {'wasserstein': wasserstein(samples[:n], some)} | real


def neighbourhoods(samples: Tensor, train: Tensor, is_standard: bool = True) -> dict[str, float]:
    """The numbers of `compare` that need distances between pairs of rows."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    size, (one, two) = min(1000, len(samples), len(train)), (samples.double(), train.double())
    if not is_standard:
        mean = two.mean(0)
        std = (two - mean).std().clamp(min=1e-12)
        one, two = (one - mean) / std, (two - mean) / std
    kid = kid_features_to_metric(one, two, kid_subset_size=size, kid_subsets=100, verbose=False)
    prc = prc_features_to_metric(samples, train, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    density, coverage = density_coverage(samples, train)
    return dict(
        kid=kid['kernel_inception_distance_mean'], kid_std=kid['kernel_inception_distance_std'],
        precision=prc['precision'], recall=prc['recall'], density=density, coverage=coverage,
    )  # fmt: skip


def distance_from_set(x: Tensor, name: str, end: str = '', label: Tensor | None = None) -> dict[str, float]:
    """wasserstein, the distance of points (n, 2) from n new points of the set `name` of data_loading/toy2d.py, and its
    floor real_wasserstein, from DRAWS other draws of the set. `label` (n,): the classes of the points, which all these
    draws share. `end` is appended to the names."""
    given = label is not None and len(label) and int(label.max()) < TOY2D[name].num_classes
    classes = label.cpu().numpy() if label is not None and given else None
    draws = (TOY2D[name].draw(np.random.default_rng(seed), len(x), classes)[0] for seed in range(1, DRAWS + 2))
    new, *others = map(torch.from_numpy, draws)
    found = {'wasserstein': wasserstein(x.cpu(), new)}
    found |= floor('wasserstein', [wasserstein(other, new) for other in others])
    return {f'{key}{end}': value for key, value in found.items()}


# name of a number -> the line that a run prints
SENTENCES = {
    'label_agreement': 'samples in which a classifier of real images sees the requested label: {:.1%}',
    'real_label_agreement': 'held-out images in which it sees the true label: {:.1%}',
    'frechet': 'Frechet distance to the training images: {:.4g}',
    'real_frechet': 'the same distance for as many real images: {:.4g}',
    'wasserstein': 'Wasserstein-2 distance to the training points: {:.4g}',
    'real_wasserstein': 'the same distance for as many real points: {:.4g}',
    'precision': 'samples that look like data (precision): {:.1%}',
    'recall': 'data that look like samples (recall): {:.1%}',
    'nearest_neighbour_ratio': 'nearest-neighbour ratio: {:.3f} (well below 1 would mean memorising)',
}
NOT_PRINTED = ('kid', 'kid_std', 'density', 'coverage')  # only in the record


def describe_numbers(values: dict[str, float]) -> str:
    """Numbers for samples, one per line: the sentence of a number of this file, the name of an experiment's own number;
    then a caution for each misleading number."""
    lines = []
    for name, text in SENTENCES.items():
        spread = values.get(f'{name}_std')
        more = '' if spread is None else f' (standard deviation {spread:.2g} over {DRAWS} draws)'
        lines += [f'  {text.format(values[name])}{more}'] if name in values else []
    known = (*NOT_PRINTED, *SENTENCES, *(f'{name}_std' for name in SENTENCES))
    lines += [f'  {name}: {value:.4g}' for name, value in values.items() if name not in known]
    return '\n'.join(lines + [f'  caution: {text}' for text in cautions(values)])


def cautions(values: dict[str, float]) -> list[str]:
    """Reasons why numbers for samples are misleading, one sentence each."""
    precision, recall = values.get('precision', 0.0), values.get('recall', 0.0)
    if not values.get('frechet', 0) > 10 * values.get('real_frechet', torch.inf):
        return []
    if recall < 0.1 < precision:
        text = 'recall is almost 0, so the samples lie in the wide neighbourhoods of a few unusual images, as noise may'
        return [f'precision means little here: {text}']
    if precision < 0.1 < recall:
        text = 'precision is almost 0, so the samples lie so far apart that their neighbourhoods hold the data'
        return [f'recall means little here: {text}']
    return []


def frequencies_caution(wanted: Tensor | None, labels: Tensor | None, num_classes: int) -> list[str]:
    """A caution if samples (N,) and training items (M,) differ in the frequencies of their classes; else []."""
    if wanted is None or labels is None or wanted.max() >= num_classes:
        return []
    sampled, trained = (torch.bincount(x, minlength=num_classes).double() / len(x) for x in (wanted, labels))
    differing = float((sampled - trained).abs().sum()) / 2
    if differing <= 0.1 + (num_classes / (2 * math.pi * len(wanted))) ** 0.5:  # random classes differ by this much
        return []
    text = f'{differing:.0%} of them would need another class. The distances count this as an error of the network'
    return [f'the classes of the samples have other frequencies than in the training data: {text}']
