"""Draws samples of an experiment on all processes together: for pictures, metrics and files."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import utils
from config import SettingError
from runtime import alive, ranks, stopping
from runtime.errors import RankFailed
from runtime.ranks import print_first_time, print_once
from sampling import ModelFn, get_sample_fn
from solvers import SOLVERS
from solvers.path import Callback
from training.batches import Batches
from training.calling import in_eval_mode
from training.experiment import Experiment, SampleInputs, Sampler
from training.independence import base_is_normal


class State(NamedTuple):
    """Samples at a time t between noise and data, as `decode` returns them, (n, ...)."""

    t: float
    x: Tensor  # x(t) / sqrt(alpha^2 + sigma^2)
    x0: Tensor  # the network's prediction at t


class Drawing:
    """Draws samples of an experiment with the settings of its config, and measures how long it takes."""

    def __init__(self, experiment: Experiment, batches: Batches):
        self.experiment, self.batches = experiment, batches
        self.seconds_per_sample = 0.0  # measured when samples were last drawn
        self.samples_at_end: dict[str, int] = {}  # part of the trainer -> samples that it draws after the last step
        self.evaluations = 0.0  # expected NFE of a sample
        self.nfe, self.guidance = 0.0, experiment.config.guidance_scale  # the last samples' values, for titles
        self.watching: tuple[Callback, ...] = ()  # see `with_settings`
        self.replaced: dict[str, Any] = {}

    @cached_property
    def sample_fn(self) -> Callable[..., Tensor]:  # made when it is first used: a constructor may set null_cond
        experiment = self.experiment
        num_classes = experiment.data.num_classes
        return get_sample_fn(experiment.config, experiment.process, num_classes, experiment.null_cond)

    def inputs(self, n: int) -> SampleInputs:
        """The inputs of n samples: the same on every rank and every time, even if the experiment's hook is random."""
        utils.seed_everything(self.experiment.config.seed, 'sample_inputs')
        inputs = self.experiment.sample_inputs(n)
        utils.seed_everything(self.experiment.config.seed, 'after sample_inputs')
        return inputs

    def check(self) -> None:
        """Raise SettingError for settings of sampling that cannot work."""
        self.refuse_sde_solver(self.experiment.config.solver)
        _ = self.sample_fn

    @in_eval_mode
    def draw(self, model_fn: ModelFn, inputs: SampleInputs, solver: str, **settings: Any) -> Tensor:
        """x0 (n, ...) by this solver; `settings` replace settings of the config. Between two steps, a stop request on
        any process ends the drawing on all. Raises SettingError, Stopped."""
        self.refuse_sde_solver(solver)
        if inputs.label is None and not self.learned_no_label:
            print_first_time(
                'warning: label=None, but with label_dropout=0 the network has learned only classes: pass a label (n,)'
            )
        given = dict(x1=inputs.x1, label=inputs.label, cond=inputs.cond, solver=solver)
        replaced: dict[str, Any] = self.replaced | ({'nfe': 0} if 'num_steps' in settings else {})
        both = [calls.get('on_prediction') for calls in (settings, replaced)]
        predicted = [call for call in both if call is not None]
        settings = given | replaced | settings | dict(on_prediction=lambda *seen: [call(*seen) for call in predicted])
        self.guidance = settings.get('guidance_scale', self.experiment.config.guidance_scale)
        callbacks = [call for call in (settings.pop('callback', None), *self.watching) if call is not None]

        def after_step(i: int, t: float, x: Tensor) -> None:
            stopping.raise_if_stopped()
            for callback in callbacks:
                callback(i, t, x)

        return self.sample_fn(model_fn, callback=after_step, **settings)

    @cached_property
    def learned_no_label(self) -> bool:  # whether some or all labels are left out in training, as far as is known
        never_dropped = self.experiment.data.num_classes > 1 and self.experiment.config.label_dropout == 0
        return not never_dropped or self.batches.shape_example.label is None

    @contextlib.contextmanager
    def with_settings(self, watching: Callback | None = None, **replaced: Any) -> Iterator[None]:
        """In every `draw` within the block, these arguments of `sample` replace the config's, and `watching` is called
        after each step. A setting that is passed to `draw` itself wins."""
        before = self.watching, self.replaced
        self.watching = self.watching if watching is None else (*self.watching, watching)
        self.replaced = self.replaced | replaced
        try:
            yield
        finally:
            self.watching, self.replaced = before

    @cached_property
    def base_is_normal(self) -> bool:
        """Whether the base of the process is N(0, I)."""
        return base_is_normal(self.experiment.process, self.batches.shape_example.x0)

    @property
    def has_score(self) -> bool:
        """Whether the network knows the score: x0 and x1 are independent, and x1 ~ N(0, I)."""
        return self.experiment.independent and not self.are_paired and self.base_is_normal

    @property
    def are_paired(self) -> bool:
        return self.experiment.couple is not None or self.batches.train_loader.has_pairs

    def default_solvers(self) -> list[str]:
        """The config's solver and, where the network knows the score, one of the other kind (ODE or SDE); only the
        config's if both give the same samples."""
        own, other = self.own_and_other
        return [own, other] if self.has_score and not self.ignores_solver else [own]

    @property
    def own_and_other(self) -> tuple[str, str]:
        own = self.experiment.config.solver
        return own, 'adams' if SOLVERS[own].stochastic else 'sde_dpmpp_2m'

    @cached_property
    @in_eval_mode
    def ignores_solver(self) -> bool:
        """Whether the experiment overrides `draw` by one that gives the same samples with every solver. All ranks find
        this out together, before training, and agree."""
        if not self.experiment.overrides('draw'):
            return False
        drawn, model_fn = list[Tensor](), self.experiment.get_model_fn(self.experiment.weights()['raw'])
        with ranks.as_one_process(), torch.no_grad(), self.with_settings(num_steps=2, nfe=0):
            for solver in self.own_and_other:
                inputs = self.inputs(2)
                utils.seed_everything(self.experiment.config.seed, 'first_drawing')
                drawn.append(self.experiment.draw(model_fn, inputs, solver))
        alike = not ranks.any_rank(not torch.equal(*drawn))
        if alike:
            print_once(f'draw of {type(self.experiment).__name__} ignores the solver: its samples are drawn once')
        return alike

    def refuse_sde_solver(self, solver: str) -> None:
        """Raise SettingError for an SDE solver where the network does not know the score."""
        if solver in SOLVERS and SOLVERS[solver].stochastic and not self.has_score:
            name = type(self.experiment).__name__
            why = f'x0 and x1 are not independent, or x1 is not N(0, I) ({name}.independent is False)'
            if self.are_paired:
                why = f'{"`couple`" if self.experiment.couple is not None else "the data set"} pairs x0 and x1'
            elif self.experiment.independent:
                why = f'sample_base of {type(self.experiment.process).__name__} is not N(0, I)'
            raise SettingError(
                f'solver={solver!r} follows the score, which would be wrong: {why}. Use an ODE solver: --solver adams.'
            )

    @torch.no_grad()
    @in_eval_mode
    def samples(self, sampler: Sampler, module: nn.Module, inputs: SampleInputs) -> Tensor:
        """Decoded samples (n, ...) on every rank, from inputs that every rank has; the processes share the work.

        Raises Stopped and, on every rank, RankFailed if one rank ran out of memory.
        """
        n, model_fn, began = len(inputs.x1), self.experiment.get_model_fn(module), time.monotonic()
        calls: list[int] = []

        def counted(xt: Tensor, *given: Any, **cond: Tensor) -> Any:
            calls.append(1)
            return model_fn(xt, *given, **cond)

        own = torch.tensor(ranks.my_items(n), device=self.experiment.device)
        drawn: list[Tensor] = []
        parts = own.split(self.batches.images_at_once)
        with out_of_memory_on_any_rank(), alive.print_while(f'drawing {n} samples') as doing:
            for i, part in enumerate(parts):
                doing.share = i / len(parts)
                utils.seed_everything(self.experiment.config.seed, 'generate', ranks.rank(), i)  # SDE noise
                drawn.append(self.experiment.decode(sampler(counted, utils.rows(inputs, part))))
                stopping.raise_if_stopped()
        samples = ranks.gather_items(torch.cat(drawn), n)
        if bad := not_finite(samples):
            print_once(f'warning: {bad} of {n} samples have values that are not finite')
        self.nfe = len(calls) / len(parts)
        self.seconds_per_sample = (time.monotonic() - began) / n
        return samples

    def seconds_at_end(self, images_per_second: float) -> float:
        """Estimated seconds of drawing after the last step: from the rate of samples if some were drawn, else from the
        rate of training, where a third of the time is the forward pass."""
        return sum(self.samples_at_end.values()) * (
            self.seconds_per_sample or self.evaluations / (3 * images_per_second)
        )

    @torch.no_grad()
    @in_eval_mode
    def path(self, sampler: Sampler, model_fn: ModelFn, inputs: SampleInputs) -> list[State]:
        """The states of samples on this process: x1, then the state after each step of the solver. Empty for a sampler
        that does not use `draw`. If a sampler calls it several times, the path of the last call, without its x1."""
        stages: list[list[tuple[float, Tensor]]] = []  # states of each call
        seen: list[tuple[float, Tensor]] = []

        def watch(i: int, t: float, x: Tensor) -> None:
            if i == 1 or not stages:
                stages.append([])
            stages[-1].append((t, x.clone()))

        predicted = lambda t, prediction: seen.append((t, prediction.x0))  # noqa: E731
        with self.with_settings(watching=watch, on_prediction=predicted):
            sampler(model_fn, inputs)
        steps = stages[-1] if stages else []
        x0, self.nfe = dict(seen), float(len(seen))  # the last evaluation at each time is the one at the state itself
        coefs = [self.experiment.process(torch.tensor([t], dtype=torch.float64)) for t, _ in steps]
        path = [(t, x / float(torch.hypot(c.alpha, c.sigma))) for (t, x), c in zip(steps, coefs, strict=True)]
        if x0 and len(stages) == 1:
            path.insert(0, (max(x0), inputs.x1))
        known, states = path[0][1] if path else inputs.x1, list[State]()
        for t, x in path:
            known = x0.get(t, known)  # nothing is predicted at the last time
            states.append(State(t, *(self.experiment.decode(part).cpu() for part in (x, known))))
            if states[-1].x.shape != states[0].x.shape:
                del states[:-1]
        return states

    def weights_shown(self) -> dict[str, nn.Module]:
        """The networks to draw pictures with: the averages; the raw one only with raw_pictures or without averages."""
        weights = self.experiment.weights()
        averages = {name: module for name, module in weights.items() if name != 'raw'}
        return weights if self.experiment.config.raw_pictures else averages or weights

    def samplers_and_weights(self) -> Iterator[tuple[str, Sampler, str, nn.Module]]:
        """(sampler's name, sampler, weights' name, network) of all pictures."""
        for sampler_name, sampler in self.experiment.samplers().items():
            for weights, module in self.weights_shown().items():
                yield sampler_name, sampler, weights, module


def not_finite(x: Tensor) -> int:
    """The number of samples (n, ...) that have values that are not finite."""
    return len(x) - int(x.isfinite()[:, None].flatten(1).all(1).sum())  # x may be (n,)


@contextlib.contextmanager
def out_of_memory_on_any_rank() -> Iterator[None]:
    """Around drawing that calls stopping.raise_if_stopped: if one rank runs out of memory, all raise RankFailed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not utils.is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f'rank {ranks.rank()}: {error}', flush=True)
        stopping.raise_if_stopped(failed=True)
        raise RankFailed('this process ran out of memory') from error


def no_memory(step: int, sampler: str, what: str) -> str:
    text = f'step {step}: not enough memory to draw with {sampler}; {what} left out, and the run continues.'
    return f'{text} A smaller --global_batch_size or more --accumulation_steps draw fewer at once.'
