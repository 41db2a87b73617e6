"""How networks are called: as they are, or compiled by torch.compile.

One compiled function serves all networks of a run. torch looks at a module's structure and at the shapes and types of
its tensors, not at its identity, so a network and all of its moving averages share their code, and no weight is copied.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from config import Config, SettingError
from runtime.ranks import print_once
from sampling import ModelFn

Call = Callable[[nn.Module, Tensor, Tensor, Tensor | None, dict[str, Tensor]], Any]

MODES = {'on': 'default', 'graphs': 'reduce-overhead'}  # choice of --compile -> mode of torch.compile
# Training steps from which on compiling, some minutes of it, takes less time than it saves. An estimate: no GPU was at
# hand. The same number of samples, of some ten evaluations each and many at once, is no less work.
WORTH_COMPILING = 5000
# Versions of one function that torch keeps: training, evaluation, raw and averaged weights, with and without a
# condition, an odd batch, for each network of an experiment. What is beyond them runs as it is.
MOST_VERSIONS = 32


def plainly(
    module: nn.Module, xt: Tensor, t: Tensor, label: Tensor | None, cond: dict[str, Tensor]
) -> Tensor | tuple[Tensor, ...]:
    return module(xt, t, label, **cond)


def get_call(config: Config, device: torch.device) -> Call:
    """`plainly`, or the same compiled, as `config.compile` says: auto compiles long runs on a GPU."""
    chosen = config.compile
    if chosen == 'auto':
        worth_it = device.type == 'cuda' and config.num_training_steps >= WORTH_COMPILING
        chosen = 'on' if worth_it else 'off'
    return plainly if chosen == 'off' else Compiled(chosen, optional=config.compile == 'auto')


def settings_for(samples: int) -> dict[str, str]:
    """Settings of a run that is opened to draw so many samples: of few, none is worth compiling for."""
    return {} if samples >= WORTH_COMPILING else {'compile': 'off'}


class Compiled:
    """`plainly`, compiled: in training for the shapes that come, in evaluation for any size of the batch.

    A network that is being differentiated itself is called as it is: compiled code has neither forward mode nor second
    derivatives. If torch cannot compile, an `optional` one says so and goes on as it is; else that is a SettingError.
    """

    def __init__(self, chosen: str, optional: bool):
        self.chosen, self.optional, self.called = chosen, optional, False
        self.call: Call = torch.compile(plainly, mode=MODES[chosen])
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_VERSIONS)

    def __call__(
        self, module: nn.Module, xt: Tensor, t: Tensor, label: Tensor | None, cond: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        inputs = [x for x in (xt, t, label, *cond.values()) if x is not None]
        if self.call is plainly or is_differentiated(inputs):
            return plainly(module, xt, t, label, cond)
        if not self.called:
            self.called = True
            print_once(
                f'compiling the network, which may take minutes (compile={self.chosen!r}; --compile off does without)'
            )
        xt = xt.contiguous()  # in a sampler it may have the order of what it is computed from: one more version
        if not module.training:
            for x in (xt, *inputs[1:]):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            out = self.call(module, xt, t, label, cond)
        except dynamo_errors() as error:
            about = str(error).strip().split('\n\n')[0]
            reason = f'{type(error).__name__}: {" ".join(about.split())}'
            if not self.optional:
                raise SettingError(
                    f'compile={self.chosen!r}: torch.compile failed with {reason}. Pass --compile off.'
                ) from error
            print_once(f'warning: the network runs uncompiled, because torch.compile failed with {reason}')
            self.call = plainly
            return plainly(module, xt, t, label, cond)
        if self.chosen == 'graphs':  # whose next replay writes into the same memory
            out = tree_map_only(Tensor, torch.clone, out)
        return out


def is_differentiated(inputs: Iterable[Tensor]) -> bool:
    """Whether the network itself is being differentiated: by an input, in forward mode, or by torch.func."""
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    transformed = functorch.peek_interpreter_stack() is not None
    return in_forward_mode or transformed or any(x.requires_grad for x in inputs)


def dynamo_errors() -> type[Exception]:
    """What torch.compile raises where it cannot compile; imported when it is used, for it takes a second."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """On the device, in channels-last order: GPUs' convolutions want it, and those in three dimensions have none."""
    if any(p.ndim > 4 for p in network.parameters()):
        return network.to(device)
    return network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What the network computes in if not float32. auto: bfloat16 on a GPU that has it in hardware."""
    has_it = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == 'bfloat16' or (precision == 'auto' and has_it) else None


def as_model_fn(
    module: nn.Module, train: bool, device: torch.device, dtype: torch.dtype | None, call: Call = plainly
) -> ModelFn:
    """`module` as a function of (xt, t, label, **cond) that hides train/eval mode and autocast when it is called, and
    whether it is compiled."""

    def model_fn(xt: Tensor, t: Tensor, label: Tensor | None = None, **cond: Tensor) -> Any:
        if module.training != train:  # a walk over all modules
            module.train(train)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = call(module, xt, t, label, cond)
        return tuple(part.float() for part in out) if isinstance(out, tuple) else out.float()

    return model_fn


def set_precision(precision: str) -> None:
    """How GPUs compute products of float32: float32 is IEEE everywhere, tf32 is TensorFloat-32 everywhere; else torch's
    settings stay. And let cuDNN look for the fastest convolutions: shapes stay the same.

    By the older of torch's two sets of flags. After the newer ones these cannot be read, as torch.compile does in
    torch 2.11; in all versions they set the newer ones too.
    """
    torch.backends.cudnn.benchmark = True
    if precision in ('float32', 'tf32'):
        torch.backends.cuda.matmul.allow_tf32 = precision == 'tf32'
        torch.backends.cudnn.allow_tf32 = precision == 'tf32'
