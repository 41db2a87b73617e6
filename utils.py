"""Small helpers: shapes, bundles of tensors, derivatives, errors, seeds, pictures. Images are (B, C, H, W)."""

import dataclasses
import functools
import hashlib
import random
import resource
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Bundle = TypeVar('Bundle')  # an instance of a dataclass of tensors

# torch's own forward-mode code is scripted when first used, and warns about itself.
warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)


def bcast_right(v: Tensor, ndim: int) -> Tensor:
    """(B,) to (B, 1, ..., 1) with `ndim` dimensions, so that it multiplies images."""
    return v.reshape(v.shape + (1,) * (ndim - v.ndim))


def rows(bundle: Bundle, index: slice | Tensor) -> Bundle:
    """The same dataclass with these rows of every tensor in it, also of those in its dicts and lists.

    `index` is a slice, or a tensor of row numbers or of truth values. Fields of any other type are kept as they are.
    """
    return _map_tensors(lambda tensors: tensors[0][index], [bundle], type(bundle).__name__)


def concat(bundles: Sequence[Bundle]) -> Bundle:
    """The rows of all bundles, one after the other, tensor by tensor, also in dicts and lists.

    Fields of any other type are those of the first bundle. Raises ValueError where one bundle has a tensor (or a key,
    or an item) that another has not.
    """
    return _map_tensors(torch.cat, list(bundles), type(bundles[0]).__name__)


def _map_tensors(fn: Callable[[list[Tensor]], Tensor], values: list[Any], name: str) -> Any:
    """Like values[0], with `fn` of the tensors at the same place in all of `values` where it has a tensor."""
    first = values[0]
    alike = [isinstance(value, Tensor) == isinstance(first, Tensor) for value in values]
    children = [] if isinstance(first, Tensor) else [_children(value) for value in values]
    if not all(alike) or any(inside.keys() != children[0].keys() for inside in children):
        raise ValueError(f'{name} must hold the same tensors (keys, number of items) in all parts that are joined')
    if isinstance(first, Tensor):
        return fn(values)
    new = {key: _map_tensors(fn, [inside[key] for inside in children], f'{name}.{key}') for key in children[0]}
    if isinstance(first, dict):
        return new
    if isinstance(first, list | tuple):
        return type(first)(new.values())
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        return dataclasses.replace(first, **new)
    return first


def _children(value: Any) -> dict:
    """What a bundle, dict, list or tuple holds, by name or number; nothing for any other value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return (
        {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    )


def jvp(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """fn(*inputs) and its derivative along `tangents`, both of the output's shape; None as a tangent means zero.

    In forward mode: one pass, whatever the number of inputs. Both results can be backpropagated, also on several
    processes, as long as DDP holds the loss and not the network. Attention is computed by plain matrix products: its
    fused kernels have no forward mode. `fn` may not change a buffer in place, as batch norm does in training.
    """
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def of_moving(*values: Tensor) -> Tensor:
        args = list(inputs)
        for i, value in zip(moving, values, strict=True):
            args[i] = value
        return fn(*args)

    if len(inputs) != len(tangents):
        raise ValueError(f'jvp needs one tangent (or None) for each input, not {len(tangents)} for {len(inputs)}')
    if not moving:
        out = fn(*inputs)
        return out, torch.zeros_like(out)
    primals = tuple(inputs[i].clone() for i in moving)  # an expanded tensor, whose elements share memory, is refused
    with sdpa_kernel(SDPBackend.MATH):
        result = torch.func.jvp(of_moving, primals, tuple(tangents[i] for i in moving))
    return result[0], result[1]


def frozen(module: nn.Module) -> Callable[..., Any]:
    """A function that calls `module`: gradients reach its inputs, not its weights, as in a GAN's generator loss."""
    weights = {name: p.detach() for name, p in module.named_parameters()}  # share memory: they follow the optimizer
    return lambda *args, **kwargs: torch.func.functional_call(module, weights, args, kwargs)


def image_square_error(a: Tensor, b: Tensor) -> Tensor:
    """Squared error of each image, (B,): the mean over all but the batch, so that losses compare across resolutions.

    a and b are (B, ...). Raises ValueError if their shapes differ: (B, 1) and (B,) would give B x B errors.
    """
    if a.shape != b.shape:
        raise ValueError(f'image_square_error compares tensors of one shape, not {tuple(a.shape)} and {tuple(b.shape)}')
    return (a - b).square()[:, None].flatten(1).mean(1)


@functools.cache
def _seed_accelerator() -> Callable[[int], None]:
    """Seeds the generators of all GPUs, now or as soon as they are used; does nothing on a machine without."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return lambda seed: None
    module = torch.get_device_module(accelerator)
    return getattr(module, 'manual_seed_all', module.manual_seed)


def hashed(*key: int | str) -> int:
    """A seed of 64 bits."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), 'little')


def seed_everything(*key: int | str) -> None:
    """Seed torch (all devices), numpy and random from a hash of `key`.

    A hash, because torch's CPU generator keeps only the low 32 bits of a seed: sums and shifts of keys would collide.
    """
    seed = hashed(*key)
    # What torch.manual_seed does for the devices there are; for each kind there is not, it formats a stack trace.
    torch.default_generator.manual_seed(seed)
    _seed_accelerator()(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class NoiseOfEach(TorchFunctionMode):
    """While this is entered, the random numbers of row i of a batch are a function of (*key, indices[i]) alone.

    So a sample does not depend on the batch it is drawn in, or on the device. It holds for rand, randn and their
    _like forms, of results with len(indices) rows; other random functions are seeded for the batch.
    """

    RANDOM: ClassVar[dict[Callable, str]] = {
        torch.randn: 'normal', torch.randn_like: 'normal', torch.rand: 'uniform', torch.rand_like: 'uniform'
    }  # fmt: skip

    def __init__(self, *key: Any):
        super().__init__()
        *self.key, self.indices = key

    def __enter__(self) -> 'NoiseOfEach':
        seed_everything(*self.key, 'batch', *self.indices[:1])
        self.generators = [torch.Generator().manual_seed(hashed(*self.key, i)) for i in self.indices]
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        draw = self.RANDOM.get(func)
        if draw is None or out.ndim == 0 or len(out) != len(self.generators):
            return out
        row = torch.empty(out.shape[1:], dtype=torch.float32)
        rows = [getattr(row, f'{draw}_')(generator=generator).clone() for generator in self.generators]
        return torch.stack(rows).to(out)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held, in GB: on its GPU if it has one, else in main memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def image_grid(images: Tensor, columns: int, min_side: int = 48, gap: int = 2, names: Sequence[str] = ()) -> Tensor:
    """Images (B, C, H, W) in [0, 1], row by row, as one picture (3, H', W') uint8.

    Small images are enlarged by a whole factor until their shorter side has `min_side` pixels. Missing cells stay
    white. `names`, one for each image, stand above the columns if all images of a column have the same, else below
    each image.
    """
    b, _, h, w = images.shape
    factor = -(-min_side // min(h, w))
    cells = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    cells = cells[:, :3] if cells.shape[1] >= 3 else cells[:, :1].expand(-1, 3, -1, -1)
    cells = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    by_column = all(name == names[i % columns] for i, name in enumerate(names))
    height = 0 if by_column or not names else LINE_HEIGHT  # of a line below each image
    h, w = h * factor + gap, w * factor + gap
    rows = -(-b // columns)
    picture = torch.full((3, rows * (h + height) + gap, columns * w + gap), 255, dtype=torch.uint8)
    for i, cell in enumerate(cells):
        y, x = gap + i // columns * (h + height), gap + i % columns * w
        picture[:, y : y + h - gap, x : x + w - gap] = cell
        if height:
            picture[:, y + h - gap : y + h - gap + height, x : x + w - gap] = written(names[i], w - gap)
    if names and by_column:
        above = [written(name, w - gap) for name in names[:columns]]
        top = torch.full((3, LINE_HEIGHT, picture.shape[2]), 255, dtype=torch.uint8)
        for i, line in enumerate(above):
            top[:, :, gap + i * w : (i + 1) * w] = line
        picture = torch.cat([top, picture], 1)
    return picture


LINE_HEIGHT = 13  # pixels of a line of text in a picture


def written(text: str, width: int) -> Tensor:
    """One line of text in black on white, (3, LINE_HEIGHT, width) uint8; what does not fit is cut off."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new('RGB', (width, LINE_HEIGHT), 'white')
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(10)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + '\u2026', font) > width:
            text = text[:-1]
        text += '\u2026'
    draw.text((width / 2, LINE_HEIGHT / 2), text, 'black', font, anchor='mm')
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class BeginsWhenBuilt(type):
    """Metaclass that calls `begin` once all constructors are through: what a subclass's __init__ adds is then known."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        built = super().__call__(*args, **kwargs)
        built.begin()
        return built


def overridden(thing: object, name: str, base: str = 'BaseDiffusionTrainer') -> bool:
    """Whether the attribute or method `name` of `thing` is its own or of a subclass of the class named `base`."""
    return name in vars(thing) or next(cls.__name__ for cls in type(thing).__mro__ if name in vars(cls)) != base


def quiet_frozen(modules: dict[str, nn.Module]) -> None:
    """Put modules that nothing trains, a teacher or an autoencoder, into eval mode: no dropout, no batch statistics."""
    for module in modules.values():
        if not any(p.requires_grad for p in module.parameters()):
            module.eval()


def moved_parameters(
    modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, list[nn.Parameter]]:
    """The parameters that each optimizer moves.

    Raises ValueError for one that two move, that none does, or that is in no module: it would be neither saved nor
    averaged over the processes.
    """
    moved = {name: [p for g in optimizer.param_groups for p in g['params']] for name, optimizer in optimizers.items()}
    owner: dict[int, str] = {}
    known = {id(p) for module in modules.values() for p in module.parameters()}
    for name, parameters in moved.items():
        for p in parameters:
            if id(p) not in known:
                raise ValueError(
                    f'optimizers[{name!r}] moves a parameter of shape {tuple(p.shape)} that is in no module. Put its '
                    'module into self.modules (for a lone parameter: torch.nn.ParameterList([p])).'
                )
            if owner.setdefault(id(p), name) != name:
                raise ValueError(
                    f'optimizers {owner[id(p)]!r} and {name!r} move the same parameter of shape {tuple(p.shape)}'
                )
    for name, module in modules.items():
        left = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in owner]
        if left:
            raise ValueError(
                f'modules[{name!r}]: no optimizer moves {", ".join(left[:3])}. Put one into self.optimizers, or call '
                'requires_grad_(False) on the module.'
            )
    return moved
