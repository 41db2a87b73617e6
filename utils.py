"""Small helpers: shapes, bundles of tensors, derivatives, errors, seeds. Images are (B, C, H, W)."""

import contextlib
import dataclasses
import functools
import hashlib
import random
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

NO_FLOAT64 = ['mps']  # devices without it: Apple's GPU
Bundle = TypeVar('Bundle')  # an instance of a dataclass of tensors

# torch's own forward-mode code is scripted when first used, and warns about itself.
warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)


def bcast_right(v: Tensor, ndim: int) -> Tensor:
    """(B,) to (B, 1, ..., 1) with `ndim` dimensions, so that it multiplies images."""
    return v.reshape(v.shape + (1,) * (ndim - v.ndim))


def double(x: Tensor) -> Tensor:
    """x in float64, or in float32 on a device without it."""
    return x.float() if x.device.type in NO_FLOAT64 else x.double()


def rows(bundle: Bundle, index: slice | Tensor) -> Bundle:
    """The same dataclass with these rows of every tensor in it, also in its dicts and lists; other fields are kept.

    `index` is a slice, or a tensor of row numbers or of bools.
    """
    return _map_tensors(lambda tensors: tensors[0][index], [bundle], type(bundle).__name__)


def concat(bundles: Sequence[Bundle]) -> Bundle:
    """The rows of all bundles, one after the other, tensor by tensor, also in dicts and lists; other fields are taken
    from the first. Raises ValueError where one bundle has a tensor, a key or an item that another does not have."""
    return _map_tensors(torch.cat, list(bundles), type(bundles[0]).__name__)


def _map_tensors(fn: Callable[[list[Tensor]], Tensor], values: list[Any], name: str) -> Any:
    """values[0], where each tensor is replaced by `fn` of the tensors at its place in all `values`."""
    first, tensors = values[0], sum(isinstance(value, Tensor) for value in values)
    if tensors == len(values):
        return fn(values)
    children = [_children(value) for value in values]
    if tensors or any(inside.keys() != children[0].keys() for inside in children):
        raise ValueError(f'{name} must hold the same tensors (keys, number of items) in all parts that are joined')
    new = {key: _map_tensors(fn, [inside[key] for inside in children], f'{name}.{key}') for key in children[0]}
    if isinstance(first, dict):
        return new
    if isinstance(first, list | tuple):
        return type(first)(new.values())
    return dataclasses.replace(first, **new) if new else first


def _children(value: Any) -> dict:
    """The contents of a bundle, dict, list or tuple, by name or number; empty for any other value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    is_bundle = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} if is_bundle else {}


def jvp(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """fn(*inputs) and its derivative along `tangents`, both of the output's shape; None as a tangent means zero.

    One pass in forward mode; both results can be backpropagated. Attention is computed by plain matrix products: its
    fused kernels have no forward mode. `fn` must not change a buffer in place, as batch norm does in training.
    """
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def fn_of_moving(*values: Tensor) -> Tensor:
        args = list(inputs)
        for i, value in zip(moving, values, strict=True):
            args[i] = value
        return fn(*args)

    if len(inputs) != len(tangents):
        raise ValueError(f'jvp needs one tangent (or None) for each input, not {len(tangents)} for {len(inputs)}')
    if not moving:
        out = fn(*inputs)
        return out, torch.zeros_like(out)
    primals = tuple(inputs[i].clone() for i in moving)  # torch refuses an expanded tensor, whose elements share memory
    with sdpa_kernel(SDPBackend.MATH):
        result = torch.func.jvp(fn_of_moving, primals, tuple(tangents[i] for i in moving))
    return result[0], result[1]


def is_transformed() -> bool:
    """True inside `jvp` and the transforms of torch.func. Always False in compiled code."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return torch.autograd.forward_ad._current_level >= 0 or functorch.peek_interpreter_stack() is not None


def frozen(module: nn.Module) -> Callable[..., Any]:
    """A function that calls `module`: gradients reach its inputs, not its weights, as in a GAN's generator loss."""
    weights = {name: p.detach() for name, p in module.named_parameters()}  # share memory: they follow the optimizer

    def call(*args: Any, **kwargs: Any) -> Any:
        networks = [part for part in module.modules() if getattr(part, 'checkpointing', False)]
        for part in networks:  # a block that is computed again would find its own weights
            part.checkpointing = False  # pyright: ignore[reportArgumentType]
        try:
            return torch.func.functional_call(module, weights, args, kwargs)
        finally:
            for part in networks:
                part.checkpointing = True  # pyright: ignore[reportArgumentType]

    return call


def image_square_error(a: Tensor, b: Tensor) -> Tensor:
    """Squared error of each image, (B,): the mean over all but the batch, so that losses compare across resolutions.

    a and b are (B, ...). Raises ValueError if their shapes differ: (B, 1) and (B,) would give B x B errors.
    """
    if a.shape != b.shape:
        raise ValueError(f'image_square_error compares tensors of one shape, not {tuple(a.shape)} and {tuple(b.shape)}')
    return (a - b).square()[:, None].flatten(1).mean(1)


@functools.cache
def _seed_accelerator() -> Callable[[int], None]:
    """A function that seeds all GPUs, now or when they are first used; it does nothing on a machine without GPUs."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return lambda seed: None
    module = torch.get_device_module(accelerator)
    return getattr(module, 'manual_seed_all', module.manual_seed)


def seed_of(*key: int | str) -> int:
    """A seed of 64 bits."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), 'little')


def seed_everything(*key: int | str) -> None:
    """Seed torch (all devices), numpy and random from a hash of `key`.

    A hash, because torch's CPU generator keeps only the low 32 bits of a seed: sums and shifts of keys would collide.
    """
    seed = seed_of(*key)
    # Not torch.manual_seed, which formats a stack trace for each kind of device that the machine lacks.
    torch.default_generator.manual_seed(seed)
    _seed_accelerator()(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def keeps_generators() -> Iterator[None]:
    """A decorator of a function that seeds: the torch generators of its caller stay as they were."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield


class NoiseOfEach(TorchFunctionMode):
    """A context in which the random numbers of row i of a batch are a function of (*key, indices[i]) only, so that a
    sample does not depend on its batch or on the device.

    This holds for rand, randn and their _like forms with len(indices) rows; other random functions are seeded once for
    the batch.
    """

    RANDOM: ClassVar[dict[Callable, str]] = {
        torch.randn: 'normal', torch.randn_like: 'normal', torch.rand: 'uniform', torch.rand_like: 'uniform'
    }  # fmt: skip

    def __init__(self, *key: Any):
        super().__init__()
        *self.key, self.indices = key

    def __enter__(self) -> 'NoiseOfEach':
        seed_everything(*self.key, 'batch', *self.indices[:1])
        self.generators = [torch.Generator().manual_seed(seed_of(*self.key, i)) for i in self.indices]
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        draw = self.RANDOM.get(func)
        if draw is None or out.ndim == 0 or len(out) != len(self.generators):
            return out
        row = torch.empty(out.shape[1:], dtype=torch.float32)
        rows = [getattr(row, f'{draw}_')(generator=generator).clone() for generator in self.generators]
        return torch.stack(rows).to(out)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error means that memory ran out. On the CPU, torch raises a plain RuntimeError."""
    on_cpu = isinstance(error, RuntimeError) and 'DefaultCPUAllocator' in str(error)
    return on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held, in GB: on its GPU if it has one, else in main memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def without_step(name: str) -> str:
    """`name` without a part like step_0000100_, which names of pictures have."""
    return re.sub(r'step_\d{7,}_', '', name)


def caption(name: str) -> str:
    """The name of a picture as text: 'step 60, adams, averaged weights (EMA 0.98)' for step_0000060_adams_ema_0.98."""
    name = re.sub(r'(?:^|_)step_(\d+)(?=_|$)', lambda found: f', step {int(found[1]):,}, ', name)
    for pattern, text in ((r'ema_([\d.e-]+)', r'averaged weights (EMA \1)'), ('raw', 'raw weights')):
        name = re.sub(rf'_{pattern}(?=[_,]|$)', f', {text}, ', name)
    return ', '.join(filter(None, (part.strip('_ ') for part in name.split(', '))))


def is_nearly_unit(x: Tensor) -> bool:
    """Whether all values lie in [0, 1] or close enough to clip them, as in images."""
    return float(x.min()) >= -0.25 and float(x.max()) <= 1.25
