"""Networks as functions, with precision, train or eval mode and torch.compile; and the loss on several processes.

One compiled function serves all networks of a run. torch looks at a module's structure and at the shapes and types of
its tensors, not at its identity, so a network and all of its moving averages share their code, and no weight is copied.

DistributedDataParallel wraps the loss. Inside it the networks are plain modules, so forward-mode derivatives, several
calls and a second network work on any number of processes as they do on one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import utils
from config import Config, SettingError
from runtime import ranks
from runtime.ranks import print_once
from sampling import ModelFn

P = ParamSpec('P')
R = TypeVar('R')
Call = Callable[[nn.Module, Tensor, Tensor, Tensor | None, dict[str, Tensor]], Any]

MODES = {'on': 'default', 'graphs': 'reduce-overhead'}  # choice of --compile -> mode of torch.compile
# Training steps, or samples, above which compiling, which takes some minutes, pays off. An estimate.
WORTH_COMPILING = 5000
# Versions of one function that torch keeps: training, evaluation, raw and averaged weights, with and without a
# condition, an odd batch, for each network of an experiment. Further versions run uncompiled.
MOST_VERSIONS = 32


def uncompiled(
    module: nn.Module, xt: Tensor, t: Tensor, label: Tensor | None, cond: dict[str, Tensor]
) -> Tensor | tuple[Tensor, ...]:
    return module(xt, t, label, **cond)


class Caller:
    """`caller(module)` is the network as a function of (xt, t, label, **cond). Each call takes care of train or eval
    mode, autocast and compiling."""

    def __init__(self, config: Config, device: torch.device):
        self.device, self.dtype = device, autocast_dtype(config.precision, device)
        chosen = config.compile
        if chosen == 'auto':  # long runs on a GPU
            worth_it = device.type == 'cuda' and config.num_training_steps >= WORTH_COMPILING
            chosen = 'on' if worth_it else 'off'
        self.call: Call = uncompiled if chosen == 'off' else Compiled(chosen, optional=config.compile == 'auto')

    def __call__(self, module: nn.Module, train: bool = False) -> ModelFn:
        def model_fn(xt: Tensor, t: Tensor, label: Tensor | None = None, **cond: Tensor) -> Any:
            if module.training != train:  # a walk over all modules
                module.train(train)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                out = self.call(module, xt, t, label, cond)
            try:
                return tuple(part.float() for part in out) if isinstance(out, tuple) else out.float()
            except AttributeError:
                what = f'{type(module).__name__}.forward returned {type(out).__name__}'
                raise TypeError(f'{what}: return a tensor, or a tuple of tensors, the prediction first.') from None

        return model_fn


@contextlib.contextmanager
def evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block all modules are in eval mode, so that no batch norm learns and no dropout acts. After it, the
    previous modes are back."""
    training = [part for module in modules.values() for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def in_eval_mode(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Decorator for methods of an object that has `experiment`: they run with all modules of the experiment in eval
    mode, also the modules that a hook calls directly."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with evaluating(self.experiment.modules):
            return method(self, *args, **kwargs)

    return wrapped


def settings_for(samples: int) -> dict[str, str]:
    """Settings for opening a run to draw this many samples: compile only for many."""
    return {} if samples >= WORTH_COMPILING else {'compile': 'off'}


class Compiled:
    """A network's forward pass, compiled: in training for the exact shapes, in evaluation for any batch size.

    A network that is itself being differentiated is called uncompiled: compiled code has neither forward mode nor
    second derivatives. If torch cannot compile and this is `optional`, warns and stays uncompiled; else raises
    SettingError.
    """

    def __init__(self, chosen: str, optional: bool):
        self.chosen, self.optional, self.called = chosen, optional, False
        self.call: Call = torch.compile(uncompiled, mode=MODES[chosen])
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_VERSIONS)

    def __call__(
        self, module: nn.Module, xt: Tensor, t: Tensor, label: Tensor | None, cond: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        inputs = [x for x in (xt, t, label, *cond.values()) if x is not None]
        is_differentiated = utils.is_transformed() or any(x.requires_grad for x in inputs)  # by an input
        if self.call is uncompiled or is_differentiated:
            return uncompiled(module, xt, t, label, cond)
        if not self.called:
            self.called, flags = True, f'(compile={self.chosen!r}; --compile off does without)'
            print_once(f'compiling the network, which may take minutes {flags}')
        xt = xt.contiguous()  # a sampler may pass another memory layout, for which torch would compile one more version
        if not module.training:
            for x in (xt, *inputs[1:]):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        from torch._dynamo.exc import TorchDynamoException  # here, because it takes a second if nothing is compiled

        try:
            out = self.call(module, xt, t, label, cond)
        except TorchDynamoException as error:
            summary = str(error).strip().split('\n\n')[0]
            reason = f'{type(error).__name__}: {" ".join(summary.split())}'
            if not self.optional:
                text = f'compile={self.chosen!r}: torch.compile failed with {reason}. Pass --compile off.'
                raise SettingError(text) from error
            print_once(f'warning: the network runs uncompiled, because torch.compile failed with {reason}')
            self.call = uncompiled
            return uncompiled(module, xt, t, label, cond)
        if self.chosen == 'graphs':  # the next replay of the CUDA graph writes into the same memory
            out = tree_map_only(Tensor, torch.clone, out)
        return out


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move to the device, in channels-last order, which suits GPU convolutions and exists only for 2-D ones."""
    order = torch.preserve_format if any(p.ndim > 4 for p in network.parameters()) else torch.channels_last
    return network.to(device, memory_format=order)  # pyright: ignore[reportCallIssue]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that the network computes in; None: float32. 'auto' is bfloat16 on a GPU that has it in hardware."""
    has_it = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == 'bfloat16' or (precision == 'auto' and has_it) else None


def set_precision(precision: str) -> None:
    """Set how GPUs multiply float32: by IEEE everywhere, by TensorFloat-32 everywhere, or by torch's default. cuDNN may
    search for the fastest convolutions, because shapes stay the same."""
    torch.backends.cudnn.benchmark = True
    if precision in ('float32', 'tf32'):  # the old flags: torch.compile in 2.11 fails once the new ones have been used
        torch.backends.cuda.matmul.allow_tf32 = precision == 'tf32'
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'


# ---------------------------------------------------------------- the loss, on all processes


class Loss(nn.Module):
    """A loss as a module: `forward(batch)` is `loss_fn(batch)`, which uses `modules`."""

    def __init__(self, modules: dict[str, nn.Module], loss_fn: Callable[[Any], Tensor]):
        super().__init__()
        self.trained, self.loss_fn = nn.ModuleDict(modules), loss_fn

    def forward(self, batch: Any) -> Tensor:
        losses = self.loss_fn(batch)
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if shape != batch.t.shape:
            shapes = f'shape {tuple(batch.t.shape)}, not {shape}'
            raise ValueError(f'loss_fn must return one loss per image, {shapes}')
        return losses


class ParallelLoss:
    """`losses(batch)` is the loss of each image, (B,), whose backward pass averages gradients over the processes.

    `modules`: all modules that `loss_fn` uses. `example`: a batch like a training batch, or a function that returns
    one, which is called when the loss is first used.
    """

    later: Callable[[], None] | None = None  # calls `share` when the loss is first used

    def __init__(self, modules: dict[str, nn.Module], loss_fn: Callable[[Any], Tensor], example: Any):
        self.losses: Loss | DistributedDataParallel = Loss(modules, loss_fn)
        if callable(example):
            self.later = lambda: self.share(modules, loss_fn, example())
        else:
            self.share(modules, loss_fn, example)

    def share(self, modules: dict[str, nn.Module], loss_fn: Callable[[Any], Tensor], example: Any) -> None:
        """If there are several processes, have them average their gradients."""
        self.later = None
        if ranks.world_size() > 1:
            device = example.x0.device
            # one of several modules need not take part in every step; a part of one module may not be used at all
            buffers = [buffer for module in modules.values() for buffer in module.buffers()]
            before = [buffer.clone() for buffer in buffers]
            with evaluating(modules):
                unused = len(modules) > 1 or has_unused(modules, loss_fn(example))
            for buffer, value in zip(buffers, before, strict=True):  # a batch norm may have learned from `example`
                buffer.copy_(value)
            self.losses = DistributedDataParallel(
                self.losses,
                # the local rank: the global one does not exist as a device on the second node
                device_ids=[device.index] if device.type == 'cuda' else None,
                gradient_as_bucket_view=True,
                find_unused_parameters=unused,
            )

    @staticmethod
    def before_begin(batch: Any, average: bool = True) -> Tensor:
        """Stands in for the loss until the networks exist."""
        raise RuntimeError('this trainer has no networks yet: call begin(), as main.build does')

    def __call__(self, batch: Any, average: bool = True) -> Tensor:
        """(B,). `average`: whether the backward pass averages the gradients, or leaves that to a later one."""
        if self.later is not None:
            devices = [torch.cuda.current_device()] if torch.cuda.device_count() else []
            with torch.random.fork_rng(devices):  # dropout has already been seeded for this step
                self.later()
        with contextlib.nullcontext() if average or isinstance(self.losses, Loss) else self.losses.no_sync():
            return self.losses(batch)


def has_unused(modules: dict[str, nn.Module], losses: Tensor) -> bool:
    """Whether losses (B,) do not depend on some trained parameters, such as the ones of a second output of the network:
    DistributedDataParallel would wait for their gradients."""
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    return any(g is None for g in torch.autograd.grad(losses.mean(), parameters, allow_unused=True))
