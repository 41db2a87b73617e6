"""The path of a sample: its times, the network on a process other than the trained one, and the loop of steps."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import SettingError, choose
from prediction import ROWS, Prediction, check_ends, error_factor
from processes import Coefs, GaussianProcess
from solvers.step import Noise, Predict, coefs_at
from solvers.table import SOLVERS, TIME_GRIDS, Solver

Predictor = Callable[[Tensor, float, float | None, Coefs], Prediction]  # (xt, t, s, coefs at t) -> Prediction
Callback = Callable[[int, float, Tensor], None]  # (i, t, x) after step i, from 1, which led to x at t


LARGEST_ERROR, MOST_DATA = 5.0, 0.02  # see Steps.start


@dataclass(frozen=True)
class Steps:
    """A solver, its number of steps, and the times between which it steps."""

    solver: str = 'adams'  # key of SOLVERS
    num: int = 20
    nfe: int = 0  # budget of network evaluations, which sets the number of steps; 0: `num` steps
    grid: str = 'logistic'  # key of TIME_GRIDS
    t_min: float = 0.001
    t_max: float = 0.999
    shift: float = 1.0  # see shift_of

    def times(self, process: GaussianProcess, sampling_process: GaussianProcess, model_type: str) -> list[float]:
        """The times of `sampling_process` that the solver visits, decreasing; t_min and t_max are times of `process`.

        All checks that need no network are made here. Raises SettingError.
        """
        method = choose('solver', self.solver, SOLVERS)
        choose('time_grid', self.grid, TIME_GRIDS)
        self.check(method.nfe)
        seen = 1 if method.nfe == 1 else 2  # a solver of one evaluation a step never evaluates at t_min
        ends = [self.t_max, self.t_min]
        check_ends(process, model_type, ends[:seen])
        ends[0] = self.start(process, model_type)
        if sampling_process is not process:
            ends = sampling_process.time_of_log_snr(process.log_snr(torch.tensor(ends, dtype=torch.float64))).tolist()
            check_ends(sampling_process, 'v', ends[:seen], ('velocity',))
        n = self.nfe // method.nfe if self.nfe and method.nfe else self.num
        _, grids = method.for_steps(n, self.shift)
        return grids[self.grid](sampling_process, ends[0], ends[1], n).tolist()

    def start(self, process: GaussianProcess, model_type: str) -> float:
        """The time of the first step: t_max, or the latest time at which a relative error of the output is multiplied
        by at most LARGEST_ERROR in what the solver reads, x0 or the velocity.

        Nearer to noise the output says nothing about x0: where alpha falls like (1 - t)^2, so does the velocity. But
        a time is never skipped if the sample holds more of x0 there than MOST_DATA times its noise.
        """
        reads = SOLVERS[self.solver].reads
        if not reads:
            return self.t_max
        t = torch.linspace(self.t_min, self.t_max, 1025, dtype=torch.float64)[1:]
        coefs = process(t)

        def size(name: str) -> torch.Tensor:  # the median over times of the root mean square
            a, b = (0.0 if k is None else k for k in ROWS[name](coefs))
            return ((a**2 * coefs.sigma_data**2 + b**2) * torch.ones_like(t)).sqrt().median()

        error = error_factor(model_type, reads, coefs).abs() * size(model_type) / size(reads)
        if error[-1] <= LARGEST_ERROR:
            return self.t_max
        late = t[(error <= LARGEST_ERROR) | (coefs.alpha >= MOST_DATA * coefs.sigma)]
        return late[-1].item() if len(late) else self.t_max

    def check(self, cost: int | None) -> None:
        """Raise SettingError for bad numbers. `cost`: evaluations per step."""
        t_min, t_max = self.t_min, self.t_max
        if not 0 <= t_min < t_max <= 1:
            raise SettingError(f't_min={t_min:g}, t_max={t_max:g}: times need 0 <= t_min < t_max <= 1.')
        if self.num < 1:
            raise SettingError(f'num_steps={self.num}: must be at least 1.')
        if self.nfe and (cost is None or self.nfe < cost):
            need = (
                f'at least {cost} evaluations a step. Use {cost} or more'
                if cost
                else 'as many evaluations as its tolerance asks for. Set a number of steps instead'
            )
            raise SettingError(
                f'nfe={self.nfe} (--sample_nfe) with solver={self.solver!r}, which needs {need}, or another solver.'
            )


def on_path(
    predictor: Predictor, process: GaussianProcess, sampling_process: GaussianProcess
) -> Callable[..., Prediction]:
    """(x, t, s=None) -> Prediction: a network trained with `process`, at x and times t and s of `sampling_process`.

    Another path visits the same distributions at other times and scales: the network is evaluated at the time of equal
    log-SNR, at x scaled to match (Karras et al. 2022, section 3; Kingma et al. 2021, appendix).
    """

    def evaluate(x: Tensor, t: float, s: float | None = None) -> Prediction:
        here = coefs_at(sampling_process, t)
        if sampling_process is process:
            return predictor(x, t, s, on_device_of(x, here))
        time = process.time_of_log_snr(here.log_snr)
        trained = process(time)
        scale = torch.hypot(trained.alpha, trained.sigma) / torch.hypot(here.alpha, here.sigma)
        if s is not None:
            s = process.time_of_log_snr(coefs_at(sampling_process, s).log_snr).item()
        prediction = predictor(scale.item() * x, time.item(), s, on_device_of(x, trained))
        return Prediction(x, on_device_of(x, here), x0=prediction.x0, x1=prediction.x1)

    return evaluate


def on_device_of(x: Tensor, coefs: Coefs) -> Coefs:
    """Coefs (1,) of the CPU, on x's device and with its type. Filled there, not copied: a copy is a CPU-GPU sync."""
    values = {name: value for name, value in vars(coefs).items() if isinstance(value, Tensor)}
    return dataclasses.replace(coefs, **{name: x.new_full((1,), value.item()) for name, value in values.items()})


def follow(
    solver: Solver, times: list[float], x1: Tensor, predict: Predict, noise: Noise, callback: Callback | None = None,
    is_late: bool = False,
) -> Tensor:  # fmt: skip
    """x at the last time, from sigma x1 at the first, by one step of the solver between each two times.

    If the first time `is_late`, alpha x0 is added to sigma x1, with the x0 that the first evaluation predicts.
    """
    step, _ = solver.for_steps(len(times) - 1)
    start = predict.level(times[0])
    x = start.sigma * x1
    if is_late:
        first = predict(x, times[0])
        x = x + start.alpha * first.x0
        predict.known = Prediction(x, first.coefs, x0=first.x0)
        predict.past.clear()
    for i, (t, s) in enumerate(itertools.pairwise(times), 1):
        predict.steps_left = len(times) - i
        if solver.stochastic and predict.steps_left == 1:
            step = noise.last_step or step
        x = step(x, t, s, predict, noise)
        if callback is not None:
            callback(i, s, x)
    return x
