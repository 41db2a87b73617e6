"""The contract between an experiment and the parts of a trainer: a batch, the inputs of sampling, and the hooks.

trainer.py has the defaults of the hooks. The parts (training/, evaluation/, reports/) see an experiment as the Protocol
below, and never write to it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from augmentations import Augmenter
from config import Config
from data_loading.spec import DataSpec
from processes import GaussianProcess
from sampling import ModelFn


@dataclass
class ProcessedBatch:
    """A prepared batch: all randomness of a training step, except dropout, has been drawn. May be subclassed."""

    x_original: Tensor  # (B, ...) as loaded; images are in [0, 1]
    x0: Tensor  # (B, ...) encoded; noise is added to it
    x1: Tensor  # (B, ...) base sample
    t: Tensor  # (B,)
    label: Tensor | None  # (B,) int64 class; num_classes means 'no label'
    augmentation_label: Tensor | None = None  # (B,) bool: whether this image was augmented
    cond: dict[str, Tensor] = field(default_factory=dict)  # named conditions besides the class, each (B, ...)


NO_BESIDE = (
    'SampleInputs has no `beside`: pass given=[...], what the samples were made from as decode returns it, and '
    'truth=x0, the held-out data that belong to them; beside[1] is now self.decode(inputs.truth).'
)


@dataclass
class SampleInputs:
    """The inputs of samples: x1, labels, conditions. May be subclassed."""

    x1: Tensor  # (n, ...)
    label: Tensor | None = None  # (n,) int64
    cond: dict[str, Tensor] = field(default_factory=dict)  # as in training, each (n, ...)
    _: KW_ONLY
    truth: Tensor | None = None  # (n, ...) the held-out x0 that belongs to these inputs, where x1 is data
    given: list[Tensor] = field(default_factory=list)  # sources of the samples, to show next to them; decoded

    def __new__(cls, *args: Any, **kwargs: Any) -> 'SampleInputs':
        if 'beside' in kwargs or (cls is SampleInputs and len(args) > 3):  # `beside` was the fourth
            raise TypeError(NO_BESIDE)
        return super().__new__(cls)

    @property
    def beside(self) -> None:
        raise AttributeError(NO_BESIDE)


Sampler = Callable[[ModelFn, SampleInputs], Tensor]  # -> x0 (n, ...)


class Experiment(Protocol):
    """The attributes and hooks of an experiment that the parts of a trainer use."""

    config: Config
    device: torch.device
    data: DataSpec
    modules: dict[str, nn.Module]
    process: GaussianProcess
    augmenter: Augmenter
    independent: Any  # whether x0 and x1 are independent; a bool once the trainer has begun
    has_reference: bool  # False: eval/reference is left out
    null_cond: Mapping[str, Tensor | float]
    couple: Any  # None, or a function (x0, x1, label) -> x1

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, x0: Tensor) -> Tensor: ...
    def prepare_batch_fn(self, batch: tuple[Tensor, ...], is_train: bool) -> ProcessedBatch: ...
    def loss_fn(self, batch: Any, model_fn: ModelFn) -> Tensor: ...
    def sample_inputs(self, n: int) -> SampleInputs: ...
    def draw(self, model_fn: ModelFn, inputs: Any, solver: str) -> Tensor: ...
    def samplers(self) -> Mapping[str, Sampler]: ...
    def sample_metrics(self, x: Tensor, inputs: Any) -> dict[str, float]: ...
    def show(self, name: str, x: Tensor, inputs: Any) -> None: ...
    def after_sampling(self, name: str, x: Tensor, inputs: Any) -> None: ...
    def get_model_fn(self, module: nn.Module, train: bool = False) -> ModelFn: ...
    def weights(self) -> dict[str, nn.Module]: ...
    def overrides(self, name: str) -> bool: ...


class Moved:
    """An attribute that is gone: reading it raises an AttributeError with the new name."""

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, thing: object, owner: type) -> Any:
        if thing is None:
            return self
        raise AttributeError(f'{type(thing).__name__}.{self.old} is now {self.new}')


class Renamed(Moved):
    """Setting it raises too: an experiment that sets it expects it to be read."""

    def __set__(self, thing: object, value: Any) -> None:
        self.__get__(thing, type(thing))


class OldNames:
    """Names that trainers had in older versions: each raises an error that gives the new name."""

    sample_fn = Renamed('draw(model_fn, inputs, solver, **settings)')
    logger = Renamed('the methods picture(name, image), log(name, value) and histogram(name, values)')
    shards = Renamed('batches.steps(step), which gives the micro-batches of each step from there on')
    save = Moved('checkpoints.save(step)')
    finished = Moved('checkpoints.finished')
    draw_shard = Moved('batches.draw_shard(batch, shard, step)')

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if 'beside' in inspect.signature(getattr(cls, 'show', cls.__init_subclass__)).parameters:
            raise TypeError(
                f'{cls.__name__}.show(name, x, beside) is now show(name, x, inputs). inputs.given has what the samples '
                'were made from, self.decode(inputs.truth) the held-out data that belong to them.'
            )
