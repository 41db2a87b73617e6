"""log p(x0) by the probability-flow ODE (Chen et al. 2018, eq. 8; Song et al. 2021, appendix D.2).

Along dx/dt = velocity(x, t) the log-density changes by d log p / dt = -div velocity, so from t_min to t_max

    log p(x at t_min) = log p(x at t_max) + integral of div velocity dt.

x is of any shape (B, ...).
"""

import itertools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import SettingError, choose
from prediction import check_ends
from processes import GaussianProcess
from sampling import Guidance, ModelFn, check_given
from solvers import SOLVERS, TIME_GRIDS, Noise, Predict, on_path
from solvers.one_step import torchdiffeq_options
from utils import bcast_right


class LogLikelihood(NamedTuple):
    log_prob: Tensor  # (B,) nats, for a density with respect to x0 in its own units
    standard_error: Tensor  # (B,) nats, from the spread of log_prob over probes; 0 if exact, nan for a single probe
    nfe: int  # evaluations of the network, each with one backward pass per probe


# name -> (like x (B, ...), number) -> vectors (P, B, ...) with E[e e^T] = I; the exact divergence sums over all unit
# vectors.
PROBES = {
    'exact': lambda x, n: (
        torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    ),
    'rademacher': lambda x, n: torch.randint(0, 2, (n, *x.shape), device=x.device).to(x) * 2 - 1,  # Hutchinson 1989
    'gaussian': lambda x, n: torch.randn(n, *x.shape, dtype=x.dtype, device=x.device),
}
METHODS = ('adams', 'dopri5', 'euler', 'midpoint', 'rk4')  # keys of SOLVERS; torchdiffeq runs all but the first


def log_likelihood(
    model_fn: ModelFn,
    process: GaussianProcess,
    x0: Tensor,
    label: Tensor | None = None,
    *,
    cond: Mapping[str, Tensor] | None = None,
    model_type: str = 'velocity',
    solver: str | None = None,
    num_steps: int = 32,
    time_grid: str = 'logistic',
    tolerance: float | None = None,
    t_min: float = 0.001,
    t_max: float = 0.999,
    divergence: str = 'rademacher',
    num_probes: int = 1,
    guidance_scale: float = 1.0,
    grad: bool = False,
) -> LogLikelihood:
    """log p(x0) of x0 (B, ...), in its precision; given label (B,) and cond (name -> (B, ...)) if there are any.

    divergence  exact (one backward pass per dimension and evaluation: small data only), or Hutchinson's estimate with
                `num_probes` fixed random vectors, rademacher or gaussian
    solver      adams (the default), euler, midpoint and rk4 take `num_steps` steps on `time_grid`; dopri5, the default
                if a tolerance is given, keeps relative and absolute errors within `tolerance`, or 1e-5

    The ODE starts from alpha(t_min) x0, whose density is the data's, except for smoothing by sigma(t_min). At t_max the
    density is approximated by N(alpha E[x0 | x], sigma^2), exact up to squares of alpha sigma_data / sigma. Raises
    SettingError for a stochastic solver or a guided model, whose density this ODE does not give, for a singular end,
    for a label or conditions that are not (B, ...), and for a tolerance that the solver ignores.
    With `grad`, log_prob can be differentiated by x0, conditions and weights, for the same probes, also by a caller
    under torch.no_grad. Each evaluation stays in memory, and the network must have second derivatives (not ReLU's).
    """
    cond, solver = cond or {}, solver or ('adams' if tolerance is None else 'dopri5')
    check_method(solver, tolerance, guidance_scale)
    if not x0.is_floating_point():
        raise SettingError(f'x0 must be floating point, not {x0.dtype}: a density needs it. Pass dequantize(x0).')
    if num_probes < 1 or num_steps < 1:
        raise SettingError(f'num_probes={num_probes}, num_steps={num_steps}: both must be at least 1.')
    probes = choose('divergence', divergence, PROBES)(x0, num_probes)
    times = choose('time_grid', time_grid, TIME_GRIDS)(process, t_max, t_min, num_steps).flip(0).to(x0)
    check_ends(process, model_type, (t_min, t_max))
    check_given(label, cond, len(x0))
    predict = Predict(on_path(Guidance().predictor(model_fn, label, cond, model_type), process, process), process)
    field = Field(predict, probes, exact=divergence == 'exact', grad=grad)

    start, end = process(times[:1]), process(times[-1:])
    with torch.set_grad_enabled(grad):
        x, total = integrate(field, bcast_right(start.alpha, x0.ndim) * x0, times, solver, tolerance or 1e-5)
        mean = bcast_right(end.alpha, x.ndim) * predict(x, t_max).x0
        z = ((x - mean) / bcast_right(end.sigma, x.ndim)).reshape(len(x), -1)
        log_normal = -(z.square() + math.log(2 * math.pi)).sum(1) / 2 - z.shape[1] * end.sigma.log()  # log p(x), (B,)
        log_prob = log_normal + total.mean(0) + z.shape[1] * start.alpha.log()
    spread = total.detach().std(0) if len(total) > 1 else torch.full_like(log_prob, torch.nan)
    error = torch.zeros_like(log_prob) if field.exact else spread / math.sqrt(num_probes)
    return LogLikelihood(log_prob, error, predict.nfe)


def check_method(solver: str, tolerance: float | None, guidance_scale: float) -> None:
    """Raise SettingError unless this solver's samples have a density that an ODE gives."""
    if solver in SOLVERS and SOLVERS[solver].stochastic:
        raise SettingError(
            f'solver={solver!r} draws noise, so its samples have no density that an ODE can give. '
            f'Use solver="dopri5", or one of {", ".join(METHODS)}.'
        )
    if guidance_scale != 1:
        text = f'guidance_scale={guidance_scale:g}: a guided velocity is not the flow of any known density.'
        raise SettingError(f'{text} Use guidance_scale=1.')
    choose('solver', solver, dict.fromkeys(METHODS))
    if tolerance is not None and solver != 'dopri5':
        raise SettingError(f'tolerance={tolerance:g}: solver={solver!r} takes num_steps steps. Use solver="dopri5".')


@dataclass(frozen=True)
class Field:
    """`field(x, t, name)`: the prediction `name`, such as v, shaped like x; and the terms of its divergence, (P, B)."""

    predict: Predict
    probes: Tensor  # (P, B, ...)
    exact: bool  # the probes are all unit vectors, and their terms are summed to (1, B)
    grad: bool = False  # both results can be differentiated

    def __call__(self, x: Tensor, t: float, name: str) -> tuple[Tensor, Tensor]:
        kernels = sdpa_kernel(SDPBackend.MATH) if self.grad else nullcontext()  # others have no second derivative
        with torch.enable_grad(), kernels:
            x = x if self.grad and x.requires_grad else x.detach().requires_grad_()
            value = getattr(self.predict(x, t), name)
            products = gradients(value, x, self.probes, create_graph=self.grad) * self.probes
        terms = products.reshape(len(self.probes), len(x), -1).sum(2)
        terms = terms.sum(0, keepdim=True) if self.exact else terms
        return value if self.grad else value.detach(), terms


def integrate(field: Field, x: Tensor, times: Tensor, solver: str, tolerance: float) -> tuple[Tensor, Tensor]:
    """x (B, ...) at the last time, and the integral of the velocity's divergence, (P, B)."""
    from torchdiffeq import odeint

    start = x, x.new_zeros(1 if field.exact else len(field.probes), len(x))
    if solver == 'adams':
        return adams(field, *start, times.tolist())
    ends = times[[0, -1]] if solver == 'dopri5' else times
    options = torchdiffeq_options(ends) if solver == 'dopri5' else None
    change = lambda t, state: field(state[0], t.item(), 'velocity')  # noqa: E731
    x, total = odeint(change, start, ends, rtol=tolerance, atol=tolerance, method=solver, options=options)
    return x[-1], total[-1]


def adams(field: Field, x: Tensor, total: Tensor, times: list[float]) -> tuple[Tensor, Tensor]:
    """The same as `integrate`, by the solver adams; `total` (P, B) is 0.

    With n = hypot(alpha, sigma), y = x / n follows dy / dtheta = v / n (solvers.angular). div_y (v / n) = div_x v, and
    a volume in x is n^D times as large as in y. So n times the integral over theta takes the same steps as x, with n
    times the divergence in the place of v.
    """
    shape, terms = x.shape, len(total)

    def length(t: float) -> float:
        return math.hypot(*predict.level(t)[:2])

    def evaluate(state: Tensor, t: float) -> Any:
        v, divergence = field(state[:, :-terms].reshape(shape), t, 'v')
        return SimpleNamespace(v=torch.cat([v.reshape(len(x), -1), length(t) * divergence.T], 1))

    predict, step = Predict(evaluate, field.predict.process, SOLVERS['adams'].memory), SOLVERS['adams'].step
    state = torch.cat([x.reshape(len(x), -1), total.T], 1)
    for t, s in itertools.pairwise(times):
        state = step(state, t, s, predict, Noise(lambda coefs: coefs.sigma, scale=0.0))  # an ODE: there is no noise
    grown = (state.shape[1] - terms) * math.log(length(times[-1]) / length(times[0]))
    return state[:, :-terms].reshape(shape), state[:, -terms:].T / length(times[-1]) + grown


def gradients(y: Tensor, x: Tensor, vectors: Tensor, at_once: int = 16, create_graph: bool = False) -> Tensor:
    """(P, *x.shape): the gradient of sum(y e) with respect to x, for each e of `vectors` (P, *y.shape).

    `at_once` vectors share one backward pass, if the network's operations can be batched.
    """
    gradient = partial(
        torch.autograd.grad, y, x, retain_graph=len(vectors) > 1 or create_graph, create_graph=create_graph
    )
    if len(vectors) == 1:
        return gradient(vectors[0])[0][None]
    try:
        return torch.cat([gradient(part, is_grads_batched=True)[0] for part in vectors.split(at_once)])
    except RuntimeError:  # for example a custom autograd function without a vmap rule
        return torch.stack([gradient(e)[0] for e in vectors])


def dequantize(images: Tensor, levels: int = 256) -> Tensor:
    """Integer images (B, C, H, W) in 0 ... levels - 1, plus uniform noise of one level, scaled to [-1, 1] (Theis et al.
    2016, section 3.1)."""
    return (images + torch.rand(images.shape, device=images.device)) * (2 / levels) - 1


def bits_per_dim(log_prob: Tensor, shape: tuple[int, ...], levels: int = 256) -> Tensor:
    """Bits per pixel and channel of images (C, H, W), from log p after `dequantize`: an upper bound on the code length
    of the integers (Theis et al. 2016, section 3.1)."""
    return -log_prob / (math.prod(shape) * math.log(2)) + math.log2(levels / 2)
