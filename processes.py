"""Gaussian processes between data and noise: xt = alpha(t) x0 + sigma(t) x1.

x0 is the data (t = 0), x1 ~ N(0, I) the noise (t = 1), t in [0, 1] has shape (B,). alpha falls, sigma rises, so the
log-SNR log(alpha^2 / sigma^2) falls with t; alpha(0) = 1 (`check_process`). Dots are derivatives with respect to t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config, SettingError, choose
from utils import bcast_right, double


@dataclass(frozen=True)
class Coefs:
    """A process at times t; every tensor is (B,).

    The process solves dx = f x dt + g dw (Song et al. 2021, eq. 5), with f and g from Kingma et al. 2021, appendix A.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor
    sigma_data: float = 0.5  # assumed standard deviation of x0

    @property
    def f(self) -> Tensor:
        """Drift alpha_dot / alpha, per unit time. Infinite where alpha = 0."""
        return self.alpha_dot / self.alpha

    @property
    def delta(self) -> Tensor:
        """g^2 / 2 = sigma sigma_dot - f sigma^2. Infinite where alpha = 0."""
        return self.sigma * self.sigma_dot - self.f * self.sigma.square()

    @property
    def g(self) -> Tensor:
        """Diffusion sqrt(2 delta)."""
        return (2 * self.delta).sqrt()

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2)."""
        return log_snr(self.alpha, self.sigma)

    @property
    def c_in(self) -> Tensor:
        """The factor that gives xt unit variance."""
        return c_in(self.alpha, self.sigma, self.sigma_data)


def log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2)."""
    return 2 * (alpha.log() - sigma.log())


def c_in(alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / sqrt(alpha^2 sigma_data^2 + sigma^2) (Karras et al. 2022, eq. 7, for any alpha)."""
    return ((sigma_data * alpha).square() + sigma.square()).rsqrt()


class GaussianProcess:
    """A subclass defines `alpha` and `sigma`, each (B,) -> (B,), and nothing else.

    alpha falls and sigma rises with t, elementwise, in float32 and in float64. `alpha_dot`, `sigma_dot` and
    `time_of_log_snr` follow from these two; override them where a closed form is known, which is faster.
    `sigma_data`, the assumed standard deviation of the data, enters c_in, the output F, the weight edm, the grid
    logistic, and the solver adams with few steps.
    """

    sigma_data: float = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        return _derivative(self.alpha, t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return _derivative(self.sigma, t)

    def __call__(self, t: Tensor) -> Coefs:
        return Coefs(self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t), self.sigma_data)

    def compute_xt(self, x0: Tensor, x1: Tensor, coefs: Coefs) -> Tensor:
        """alpha x0 + sigma x1, (B, ...)."""
        return bcast_right(coefs.alpha, x0.ndim) * x0 + bcast_right(coefs.sigma, x1.ndim) * x1

    def sample_base(self, x0_like: Tensor) -> Tensor:
        """x1 ~ N(0, I) with the shape, type and device of `x0_like`."""
        return torch.randn_like(x0_like)

    def log_snr(self, t: Tensor) -> Tensor:
        return log_snr(self.alpha(t), self.sigma(t))

    @torch.no_grad()
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t in [0, 1] at which log_snr(t) has this value; 0 or 1 for values beyond the ends. No gradient.

        Interpolates in a table over u = logit(t), and refines by two secant steps: the error of t is below 1e-7 t, in
        float64. In u, the log-SNR is nearly linear at an end where alpha or sigma is a power of t or 1 - t. Each call
        makes the table of 4096 numbers again, because a process may have parameters that change or are learned.
        """
        wanted = -double(log_snr)
        u = torch.linspace(-40, 36, 4096, dtype=wanted.dtype, device=wanted.device)  # t from 4e-18 to 1 - 2e-16
        spacing = 76 / 4095
        noise = -self.log_snr(torch.sigmoid(u))  # rises with u
        # alpha or sigma may round to 0 near the ends, where log-SNR is then infinite or nan
        noise = torch.where(noise.isnan(), u.sign() * 1e4, noise).clamp(-1e4, 1e4).cummax(0).values

        i = torch.searchsorted(noise, wanted).clamp(1, len(u) - 1)
        low, high = u[i - 1], u[i]
        slope = spacing / (noise[i] - noise[i - 1])
        guess = low + ((wanted - noise[i - 1]) * slope).clamp(0, spacing)
        for _ in range(2):
            guess = guess + (wanted + self.log_snr(torch.sigmoid(guess))) * slope
            guess = torch.minimum(torch.maximum(guess, low), high)
        t = torch.where(wanted <= noise[0], 0.0, torch.where(wanted >= noise[-1], 1.0, torch.sigmoid(guess)))
        return t.to(log_snr.dtype)


def _derivative(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d fn / dt at each t, by forward-mode differentiation; fn acts elementwise."""
    return torch.func.jvp(fn, (t.clone(),), (torch.ones_like(t),))[1]  # a clone, because jvp refuses an expanded t


class RectifiedFlow(GaussianProcess):
    """Straight lines: alpha = 1 - t, sigma = t (Liu et al. 2023; Lipman et al. 2023 with sigma_min = 0)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


class Cosine(GaussianProcess):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): variance preserving.

    Nichol and Dhariwal 2021, section 3.2, without their offset.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # the cosine, accurate where it is small, and 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))


class LinearVP(GaussianProcess):
    """dx = -beta x / 2 dt + sqrt(beta) dw with beta linear in t (Ho et al. 2020; Song et al. 2021, eq. 32-33).

    With B(t) the integral of beta: alpha = exp(-B/2), sigma = sqrt(1 - exp(-B)). sigma_dot is infinite at t = 0.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t.square()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.integral(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2 * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.beta(t) / 2 * self.alpha(t).square() / self.sigma(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        integral = torch.nn.functional.logsigmoid(log_snr).abs()  # B(t) = -log alpha^2
        integral = integral.clamp(max=(self.beta_min + self.beta_max) / 2)  # B(1)
        slope = self.beta_max - self.beta_min
        t = 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))
        return t.clamp(0, 1)


class VarianceExploding(GaussianProcess):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, eq. 31). Nowhere singular."""

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 80.0):
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self.log_ratio * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.log_ratio * self.sigma(t)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr / 2 - math.log(self.sigma_min)) / self.log_ratio).clamp(0, 1)


PROCESSES: dict[str, Callable[[Config], GaussianProcess]] = {
    'rf': lambda config: RectifiedFlow(),
    'cosine': lambda config: Cosine(),
    'linear_vp': lambda config: LinearVP(config.beta_min, config.beta_max),
    've': lambda config: VarianceExploding(config.sigma_min, config.sigma_max),
}


def check_process(process: GaussianProcess, t_min: float, t_max: float) -> None:
    """Raise SettingError unless alpha and sigma lead from data at t = 0 to noise. Checks 65 times in [t_min, t_max]."""
    t = torch.linspace(t_min, t_max, 65, dtype=torch.float64)
    name = f'the process {type(process).__name__}'
    for times in (t, t.float()):  # networks are trained in float32
        for what, value in {'alpha': process.alpha(times), 'sigma': process.sigma(times)}.items():
            if not isinstance(value, Tensor) or value.shape != t.shape:
                raise SettingError(f'{what} of {name} must give a tensor of the shape of t, (B,)')
            bad = ~(value.isfinite() & (value >= 0))
            if bad.any():
                where = f't={times[bad][0]:g} in {str(times.dtype).removeprefix("torch.")}'
                raise SettingError(
                    f'{what} of {name} must be finite and not negative: it is {value[bad][0]:g} at {where}. '
                    'Use --t_min 0.001 --t_max 0.999, or change the formula'
                )
    alpha, sigma = process.alpha(t), process.sigma(t)
    rises = ~(log_snr(alpha, sigma).diff() < 0)
    start = process.alpha(0 * t[:1]).item()
    if rises.any() or abs(start - 1) > 0.05:
        why = f'alpha / sigma does not fall at t={t[:-1][rises][0]:g}' if rises.any() else f'alpha(0) is {start:g}'
        raise SettingError(
            f'{name} does not lead from data at t = 0 to noise at t = 1: {why}. alpha must be 1 at t = 0, and '
            'alpha / sigma must fall with t. Where t = 1 is the data, write 1 - t for t; scale the data in encode.'
        )


def get_process(config: Config) -> GaussianProcess:
    """Raises SettingError for an unknown `process_name`."""
    process = choose('process_name', config.process_name, PROCESSES)(config)
    process.sigma_data = config.sigma_data
    return process
