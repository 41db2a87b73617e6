"""Scores of samples that an experiment's `sample_metrics` may return: ensembles, spectra, two samples, known densities.

crps, spread_skill           an ensemble of forecasts against what was observed
energy_spectrum              energy of fields by wavenumber
c2st, mmd_squared, sliced_wasserstein    two sets of samples
kl_divergence, kl_histogram  samples against a known density

Each is tested against a closed form. distances.py has the distances that every run records.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# ---------------------------------------------------------------- ensembles


def crps(ensemble: Tensor, truth: Tensor) -> Tensor:
    """The fair continuous ranked probability score (...) of an ensemble (M, ...) for `truth` (...), in its units.

    mean |x_i - y| - sum_ij |x_i - x_j| / (2 M (M - 1)): its mean over ensembles is the score of the law that members
    are drawn from (Gneiting and Raftery 2007; Ferro 2014). Lower is better. M is at least 2.
    """
    m = len(ensemble)
    weight = (2 * torch.arange(m).to(ensemble) - m + 1) / (m * (m - 1))  # so the sum over pairs costs only a sort
    return (ensemble - truth).abs().mean(0) - torch.tensordot(weight, ensemble.sort(0).values, 1)


def spread_skill(ensemble: Tensor, truth: Tensor) -> float:
    """Spread over skill of an ensemble (M, ...) for `truth` (...): 1 if the truth could be one of its members.

    The root of (M + 1) / M times the mean variance of members, over the root mean square error of the ensemble's mean
    (Fortin et al. 2014). Below 1 the ensemble is too narrow. M is at least 2.
    """
    spread = ensemble.var(0).mean() * (len(ensemble) + 1) / len(ensemble)
    return float((spread / (ensemble.mean(0) - truth).square().mean()).sqrt())


# ---------------------------------------------------------------- fields


def energy_spectrum(x: Tensor) -> Tensor:
    """Energy (B, K) of fields (B, C, *grid) with one, two or three axes, by wavenumber k = 0, 1, ... in cycles a side.

    E(k) sums |x_hat|^2 / 2 over channels and over the shell k - 1/2 <= |wavenumber| < k + 1/2. All E(k) sum to half
    the mean over the grid of x^2, summed over channels (Parseval).
    """
    axes = [torch.fft.fftfreq(n, 1 / n, device=x.device) for n in x.shape[2:]]
    squares = torch.stack(torch.meshgrid(*axes, indexing='ij')).square().sum(0)
    shell = squares.sqrt().add(0.5).long()
    power = torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm='forward').abs().square().sum(1) / 2
    return power.new_zeros(len(x), int(shell.max()) + 1).index_add_(1, shell.flatten(), power.flatten(1))


# ---------------------------------------------------------------- two sets of samples


def c2st(a: Tensor, b: Tensor, folds: int = 5, seed: int = 0) -> float:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): the held-out accuracy, over `folds` parts, of a network
    with two hidden layers that learns to tell samples a (N, D) from samples b (N, D). 0.5: it cannot; 1: always.

    For equal laws its standard deviation is about 0.35 / sqrt(N).
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = torch.cat([a, b]).cpu().double().numpy(), [0] * len(a) + [1] * len(b)
    hidden = 2 * (min(100, 10 * x.shape[1]),)
    network = MLPClassifier(hidden, tol=1e-3, max_iter=1000, random_state=seed)
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(make_pipeline(StandardScaler(), network), x, y, cv=parts).mean())


def mmd_squared(a: Tensor, b: Tensor, bandwidth: float | None = None) -> float:
    """The unbiased squared maximum mean discrepancy of samples a (N, D) and b (M, D) (Gretton et al. 2012): 0 in the
    mean for equal laws, and negative half of the time.

    The kernel is exp(-|x - y|^2 / (2 bandwidth^2)); None: the median distance of a point of a and a point of b. Pass a
    number to compare values of different samples.
    """
    a, b = a.double(), b.double()
    h = bandwidth or float(torch.cdist(a, b).median())
    aa, bb, ab = ((-torch.cdist(x, y).square() / (2 * h**2)).exp() for x, y in ((a, a), (b, b), (a, b)))
    within = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]  # without the pairs (x, x)
    return float(within[0] + within[1] - 2 * ab.mean())


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """The sliced Wasserstein-2 distance of two sets of N points each (N, D) (Bonneel et al. 2015): the root mean, over
    at least `directions` lines, of the squared distance between the projections. |shift| / sqrt(D) for a shift.

    The lines are the axes of random orthonormal bases, so that all directions count the same.
    """
    d, draw = a.shape[1], torch.Generator().manual_seed(seed)
    bases = torch.linalg.qr(torch.randn(-(-directions // d), d, d, generator=draw, dtype=torch.float64)).Q
    lines = bases.transpose(0, 1).flatten(1).to(a.device)  # (D, at least `directions`)
    gap = (a.double() @ lines).sort(0).values - (b.double() @ lines).sort(0).values
    return float(gap.square().mean().sqrt())


# ---------------------------------------------------------------- known densities


def kl_divergence(x: Tensor, log_density: Callable[[Tensor], Tensor], k: int = 5) -> float:
    """KL(law of x | density) in nats, from samples x (N, D) and log_density(x) (N,), for small D.

    The entropy of the law is estimated from the distance of each sample to its k-th nearest other one (Kozachenko and
    Leonenko 1987). Infinite if a sample lies where the density is 0, and then `kl_histogram` is not.
    """
    from evaluation.distances import radii

    n, d = x.shape
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)  # log volume of the unit ball
    psi = torch.digamma(torch.tensor([n, k], dtype=torch.float64))
    entropy = psi[0] - psi[1] + ball + d * radii(x.double(), k).log().mean()
    return float(-entropy - log_density(x).double().mean())


def kl_histogram(x: Tensor, density: Callable[[Tensor], Tensor], low: float, high: float, bins: int = 64) -> float:
    """KL(density | law of x) in nats, from a histogram of samples x (N, D) on bins^D cells of [low, high]^D.

    density(points) (n,) is read in the middle of each cell. Each cell counts half a sample more than it has, so that
    an empty one is not infinite. The estimate is about bins^D / (2 N) too large.
    """
    d, width = x.shape[1], (high - low) / bins
    cell = ((x - low) / width).floor().long()
    inside, places = cell[((cell >= 0) & (cell < bins)).all(1)], bins ** torch.arange(d - 1, -1, -1, device=x.device)
    cell = (inside * places).sum(1)  # CUDA has no matrix product of whole numbers
    q = (torch.bincount(cell, minlength=bins**d).double() + 0.5) / (len(x) + bins**d / 2)
    middles = low + width * (torch.arange(bins, device=x.device) + 0.5)
    p = density(torch.cartesian_prod(*[middles] * d).reshape(-1, d)).double()
    return float(torch.xlogy(p / p.sum(), p / p.sum() / q).sum())
