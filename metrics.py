"""How good are samples of small grey images? Computed on pixels in [-1, 1], images flattened to (N, D)."""

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets (N, D), (M, D), in squared units (Dowson and Landau 1982, eq. 16).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def nearest_neighbour_ratio(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Mean distance of a sample to its nearest training image, over that of a held-out image.

    About 1 for samples from the data's distribution; well below 1 when training images were memorised.
    """

    def mean_distance(x: Tensor) -> Tensor:
        return torch.cat([torch.cdist(part, train).min(1).values for part in x.split(500)]).mean()

    return float(mean_distance(samples) / mean_distance(held_out))


def label_agreement(samples: Tensor, labels: Tensor, train: Tensor, train_labels: Tensor, limit: int = 5000) -> float:
    """Share of samples in which a support-vector classifier, trained on at most `limit` real images, sees the asked label."""
    classifier = SVC(gamma='scale').fit(train[:limit].numpy(), train_labels[:limit].numpy())
    return float(np.mean(classifier.predict(samples.numpy()) == labels.numpy()))


def pixel_metrics(
    samples: Tensor, labels: Tensor, train: Tensor, train_labels: Tensor, held_out: Tensor
) -> dict[str, float]:
    """All of the above for images (N, C, H, W) in [-1, 1].

    `frechet_real` is what a perfect sampler of the training data would get: as many training images drawn with replacement.
    """
    samples, train, held_out = (x.cpu().float().flatten(1) for x in (samples, train, held_out))
    labels, train_labels = labels.cpu(), train_labels.cpu()
    drawn = np.random.default_rng(0).integers(len(train), size=len(samples))
    return {
        'label_agreement': label_agreement(samples, labels, train, train_labels),
        'frechet_pixels': frechet_distance(samples, train),
        'frechet_real': frechet_distance(train[drawn], train),
        'nearest_neighbour_ratio': nearest_neighbour_ratio(samples, train, held_out),
    }


def describe(values: dict[str, float]) -> str:
    """`pixel_metrics` in words."""
    return (
        f'  a classifier of real images sees the asked label in {values["label_agreement"]:.1%}\n'
        f'  Frechet distance to the training images, in pixels: {values["frechet_pixels"]:.3f} (as many real ones: {values["frechet_real"]:.3f})\n'
        f'  nearest-neighbour ratio: {values["nearest_neighbour_ratio"]:.3f} (well below 1 would be memorising)'
    )
