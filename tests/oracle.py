"""Data with known answers: a mixture of Gaussians, its exact expectations under any process, in float64.

Points are (B, D) here, so xt has two dimensions; the models take images too, (B, C, H, W) with D = C H W.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from config import Config
from prediction import Prediction
from processes import PROCESSES, Coefs, GaussianProcess, get_process
from solvers import Predict

F64 = torch.float64


class VariancePreserving(GaussianProcess):
    """Has closed-form derivatives, because tests compute them a hundred thousand times."""

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)


class SquaredCosine(VariancePreserving):
    """alpha = cos^2(pi t / 2): the velocity vanishes at t = 1, where alpha falls like (1 - t)^2."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t)).square()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        sine, cosine = (torch.sin(math.pi / 2 * u).square() for u in (t, 1 - t))
        return (sine * (1 + cosine)).sqrt()  # sqrt(1 - cos^4), accurate at t = 0


class ShiftedCosine(VariancePreserving):
    """alpha = cos(angle) / cos(angle at 0), angle = pi / 2 (t + offset) / (1 + offset), variance preserving (Nichol and
    Dhariwal 2021, eq. 17). sigma_dot is infinite at t = 0."""

    def __init__(self, offset: float = 0.1):
        self.offset = offset

    def alpha(self, t: Tensor) -> Tensor:
        wide = math.pi / 2 / (1 + self.offset)
        return torch.sin(wide * (1 - t)) / math.sin(wide)

    def alpha_dot(self, t: Tensor) -> Tensor:
        wide = math.pi / 2 / (1 + self.offset)
        return -wide * torch.cos(wide * (1 - t)) / math.sin(wide)

    def sigma(self, t: Tensor) -> Tensor:
        alpha = self.alpha(t)
        wide = math.pi / 2 / (1 + self.offset)  # 1 - alpha = 2 sin cos / sin, without a difference of near numbers
        return (2 * torch.sin(wide * t / 2) * torch.cos(wide * (1 - t / 2)) / math.sin(wide) * (1 + alpha)).sqrt()


OTHERS = {'squared_cosine': SquaredCosine(), 'shifted_cosine': ShiftedCosine()}
ALL_PROCESSES = [*PROCESSES, *OTHERS]


@functools.cache
def process_named(name: str) -> GaussianProcess:
    return OTHERS[name] if name in OTHERS else get_process(Config(process_name=name))


def base_noise(n: int, dim: int = 2) -> Tensor:
    """(n, dim), the same every time; a larger n only adds rows."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=F64)


def at(process: GaussianProcess, t: float, n: int = 1) -> Coefs:
    return process(torch.full((n,), t, dtype=F64))


class GaussianMixture:
    """sum_k w_k N(mean_k, cov_k); component k has class label[k]. As a model, label = classes means 'no label'."""

    def __init__(self, means: Tensor, covariances: Tensor, labels: Tensor | None = None, weights: Tensor | None = None):
        """means (K, D), covariances (K, D, D), labels (K,) int64, weights (K,)."""
        k, self.dim = means.shape
        self.means = means.to(F64)
        self.values, self.vectors = torch.linalg.eigh(covariances.to(F64))  # (K, D), (K, D, D)
        self.values = self.values.clamp(min=0)
        self.labels = torch.zeros(k, dtype=torch.int64) if labels is None else labels
        self.classes = int(self.labels.max()) + 1
        self.log_weights = torch.log_softmax(torch.zeros(k, dtype=F64) if weights is None else weights.to(F64).log(), 0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x0 (n, D) and labels (n,)."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, dtype=F64, generator=generator) * self.values[k].sqrt()
        return self.means[k] + torch.einsum('nij,nj->ni', self.vectors[k], z), self.labels[k]

    def components(self, xt: Tensor, c: Coefs, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-density of each component, including its weight (K, B); xt - alpha mean and variances in its eigenbasis.

        The last two are (K, B, D).
        """
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        y = torch.einsum('kbi,kij->kbj', xt - alpha * self.means[:, None], self.vectors)
        variance = (alpha**2 * self.values[:, None] + sigma**2).expand_as(y)
        log_p = self.log_weights[:, None] - (y**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1) / 2
        if label is not None:
            in_class = (self.labels[:, None] == label) | (label == self.classes)
            log_p = log_p.masked_fill(~in_class, -math.inf) - torch.where(
                in_class, self.log_weights[:, None], -math.inf
            ).logsumexp(0)
        return log_p, y, variance

    def log_prob(self, xt: Tensor, c: Coefs, label: Tensor | None = None) -> Tensor:
        """log p_t(xt), (B,) in nats."""
        return self.components(xt, c, label)[0].logsumexp(0)

    def prediction(self, xt: Tensor, c: Coefs, label: Tensor | None = None) -> Prediction:
        """E[x0 | xt] and E[x1 | xt], computed separately, so that both are right at both ends."""
        log_p, y, variance = self.components(xt, c, label)
        share = log_p.softmax(0)[..., None]
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        x0 = self.means[:, None] + torch.einsum(
            'kbj,kij->kbi', alpha * self.values[:, None] * y / variance, self.vectors
        )
        x1 = torch.einsum('kbj,kij->kbi', sigma * y / variance, self.vectors)
        return Prediction(xt, c, x0=(share * x0).sum(0), x1=(share * x1).sum(0))

    def as_model(
        self, model_type: str, process: GaussianProcess, shape: tuple[int, ...] = ()
    ) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """A perfect network: model_fn(xt, t, label), computed in float64, returned in the type of xt."""

        def model_fn(xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            out = getattr(self.prediction(xt.to(F64).flatten(1), process(t.to(F64)), label), model_type)
            return out.reshape(xt.shape).to(xt.dtype)

        return model_fn


def exact_predict(process: GaussianProcess, mixture: GaussianMixture, memory: int = 0) -> Predict:
    """The Predict that a solver calls, with a perfect network."""
    return Predict(lambda x, t: mixture.prediction(x, at(process, t, len(x))), process, memory)


class GivenMean:
    """x0 ~ N(mean, std^2 I), where the mean is a condition, drawn from N(0, spread^2 I) and unknown where it is nan."""

    def __init__(self, std: float = 0.3, spread: float = 0.8):
        self.std, self.spread = std, spread

    def moments(self, xt: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x0, each like xt."""
        return mean.nan_to_num(), self.std**2 + self.spread**2 * mean.isnan().to(xt)

    def prediction(self, xt: Tensor, c: Coefs, mean: Tensor) -> Prediction:
        """E[x0 | xt, mean] and E[x1 | xt, mean], float64."""
        (centre, variance), alpha, sigma = self.moments(xt, mean), c.alpha[:, None], c.sigma[:, None]
        z = (xt - alpha * centre) / (alpha**2 * variance + sigma**2)
        return Prediction(xt, c, x0=centre + alpha * variance * z, x1=sigma * z)

    def flow(self, xt: Tensor, t: Coefs, s: Coefs, mean: Tensor) -> Tensor:
        """Where the probability-flow ODE leads from xt at time t by time s: it moves and stretches a Gaussian."""
        centre, variance = self.moments(xt, mean)
        at_t, at_s = (((c.alpha**2)[:, None] * variance + (c.sigma**2)[:, None]).sqrt() for c in (t, s))
        return s.alpha[:, None] * centre + at_s / at_t * (xt - t.alpha[:, None] * centre)

    def as_model(self, model_type: str, process: GaussianProcess) -> Callable[..., Tensor]:
        """A perfect network: model_fn(xt, t, label, mean=...)."""

        def model_fn(xt: Tensor, t: Tensor, label: Tensor | None = None, *, mean: Tensor) -> Tensor:
            return getattr(self.prediction(xt.to(F64), process(t.to(F64)), mean.to(F64)), model_type).to(xt.dtype)

        return model_fn

    def as_flow_map(self, process: GaussianProcess) -> Callable[..., Tensor]:
        """A perfect network of two times: the average velocity (x(s) - xt) / (s - t) (Geng et al. 2025, eq. 3)."""

        def model_fn(xt: Tensor, t: Tensor, label: Tensor | None = None, *, mean: Tensor, s: Tensor) -> Tensor:
            there = self.flow(xt, process(t), process(s), mean)
            return (there - xt) / (s - t)[:, None]

        return model_fn


def ring(modes: int = 8, std: float = 0.1, classes: int = 2) -> GaussianMixture:
    """Modes on the unit circle; neighbours have different labels."""
    angle = 2 * math.pi * torch.arange(modes, dtype=F64) / modes
    return GaussianMixture(
        torch.stack([angle.cos(), angle.sin()], 1),
        std**2 * torch.eye(2, dtype=F64).expand(modes, 2, 2),
        torch.arange(modes) % classes,
    )


def random_mixture(
    dim: int,
    modes: int,
    seed: int = 0,
    scale: float = 0.5,
    smallest: float = 0.03,
    largest: float = 0.4,
    classes: int = 2,
) -> GaussianMixture:
    """Anisotropic modes: normal means of this scale, random axes, standard deviations log-uniform between these two."""
    g = torch.Generator().manual_seed(seed)
    means = scale * torch.randn(modes, dim, generator=g, dtype=F64)
    axes = torch.linalg.qr(torch.randn(modes, dim, dim, generator=g, dtype=F64))[0]
    std = smallest * (largest / smallest) ** torch.rand(modes, dim, generator=g, dtype=F64)
    weights = torch.softmax(torch.randn(modes, generator=g, dtype=F64) / 2, 0)
    return GaussianMixture(means, axes @ torch.diag_embed(std**2) @ axes.mT, torch.arange(modes) % classes, weights)


RING = ring(8, 0.1)
