"""How good are samples of small grey images? Images are flattened to (N, D); pixels in [-1, 1] are the unit."""

import numpy as np
import torch
from torch import Tensor

from data_loading.toy2d import TOY2D
from evaluation.distances import Moments, frechet, wasserstein


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets (N, D), (M, D), in squared units.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64 (Dowson and Landau 1982, eq. 16).
    A set needs two points.
    """
    return frechet(Moments(a), Moments(b))


def nearest_neighbour_ratio(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Mean distance of a sample to its nearest training image, over that of a held-out image.

    About 1 for samples from the data's distribution; well below 1 when training images were memorised.
    """

    def mean_distance(x: Tensor) -> Tensor:
        return torch.cat([torch.cdist(part, train).min(1).values for part in x.split(500)]).mean()

    return float(mean_distance(samples) / mean_distance(held_out))


def label_agreement(samples: Tensor, labels: Tensor, train: Tensor, train_labels: Tensor, limit: int = 5000) -> float:
    """Share of samples in which a classifier of real images sees the asked label.

    It is a support-vector classifier, trained on at most `limit` images, of two classes or more.
    """
    from sklearn.svm import SVC  # a second to import, and needed once

    classifier = SVC(gamma='scale').fit(train[:limit].numpy(), train_labels[:limit].numpy())
    return float(np.mean(classifier.predict(samples.numpy()) == labels.numpy()))


def pixel_metrics(
    samples: Tensor, labels: Tensor | None, train: Tensor, train_labels: Tensor | None, held_out: Tensor
) -> dict[str, float]:
    """All of the above for images (N, C, H, W) in [0, 1], as `decode` returns them.

    They are scaled to [-1, 1] here, the unit of the distances. `frechet_real` is what a perfect sampler of the training
    data would get: as many training images drawn with replacement. `label_agreement` is left out where there is
    nothing to agree with: no labels (None), or one class.
    Raises ValueError for fewer than two images of a kind, for values that are not finite, for unlike shapes, and for
    training images outside [0, 1].
    """
    images = dict(samples=samples, train=train, held_out=held_out)
    for name, x in images.items():
        if len(x) < 2 or x.shape[1:] != train.shape[1:] or not x.isfinite().all():
            raise ValueError(
                f'pixel_metrics needs at least 2 {name}, finite and of the shape {tuple(train.shape[1:])} of the '
                f'training images, not {len(x)} of shape {tuple(x.shape[1:])} with {int((~x.isfinite()).sum())} '
                'values that are not finite.'
            )
    low, high = train.min().item(), train.max().item()
    if low < 0 or high > 1:
        raise ValueError(f'pixel_metrics takes images in [0, 1]; the training images lie in [{low:g}, {high:g}].')
    samples, train, held_out = (2 * x.cpu().float().flatten(1) - 1 for x in images.values())
    drawn = np.random.default_rng(0).integers(len(train), size=len(samples))
    values = {}
    if labels is not None and train_labels is not None and len(train_labels.unique()) > 1:
        values['label_agreement'] = label_agreement(samples, labels.cpu(), train, train_labels.cpu())
    return values | {
        'frechet_pixels': frechet_distance(samples, train),
        'frechet_real': frechet_distance(train[drawn], train),
        'nearest_neighbour_ratio': nearest_neighbour_ratio(samples, train, held_out),
    }


def distance_from_set(x: Tensor, name: str, end: str = '') -> dict[str, float]:
    """wasserstein: that of points (n, 2) from as many new ones of the set in toy2d.py; real_wasserstein: that of other
    new ones. `end` is added to the names."""
    new, other = (torch.from_numpy(TOY2D[name].draw(np.random.default_rng(seed), len(x))[0]) for seed in (1, 2))
    return {f'wasserstein{end}': wasserstein(x.cpu(), new), f'real_wasserstein{end}': wasserstein(other, new)}


# what `describe` says of each value
SENTENCES = {
    'frechet': 'Frechet distance to the training images: {:.4g}',
    'real_frechet': 'the same distance of as many real images: {:.4g}',
    'wasserstein': 'Wasserstein-2 distance to the training points: {:.4g}',
    'real_wasserstein': 'the same distance of as many held-out points: {:.4g}',
    'precision': 'samples that look like data (precision): {:.1%}',
    'recall': 'data that look like samples (recall): {:.1%}',
    'label_agreement': 'a classifier of real images sees the asked label in {:.1%}',
    'frechet_pixels': 'Frechet distance to the training images, in pixels: {:.3f}',
    'frechet_real': 'the same distance of as many real images: {:.3f}',
    'nearest_neighbour_ratio': 'nearest-neighbour ratio: {:.3f} (well below 1 would be memorising)',
}
UNSAID = ('kid', 'kid_std', 'density', 'coverage')  # left to the reader of the record


def describe(values: dict[str, float]) -> str:
    """Numbers for samples, a line each: of this module and distances.py in words, those of an experiment by name."""
    own = [f'  {name}: {value:.4g}' for name, value in values.items() if name not in UNSAID and name not in SENTENCES]
    return '\n'.join([f'  {text.format(values[k])}' for k, text in SENTENCES.items() if k in values] + own)
