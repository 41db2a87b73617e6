"""A UNet for signals, images and volumes of any channels and size, and the parts that all networks share.

Notable features (after Dhariwal and Nichol 2021):
- residual blocks with group norm, whose scale and shift come from the embedding of time, class and conditions
- self-attention at chosen resolutions, and always in the middle
- blocks and output start at zero: at first each block is the identity, and the output is 0
- sides that cannot be halved once for each further level are padded, and the output is cropped
- one code for 1, 2 and 3 axes besides the channels: the tables CONV and RESIZE hold what differs

To write a network, subclass `ConditionedNetwork`, which makes the embedding with `sinusoid` and `Conditions`, or
`FieldNetwork`, which also pads; and add it to the table in networks/table.py.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils import bcast_right, is_transformed

# number of axes besides the channels -> their names, the convolution over them, and the interpolation between values
SIDES = {1: 'L', 2: 'H, W', 3: 'D, H, W'}
CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
RESIZE = {1: 'linear', 2: 'bilinear', 3: 'trilinear'}
Conv = Callable[..., nn.Module]  # (channels in, channels out, kernel, ...) -> a convolution


def sinusoid(time: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): cosines and sines at frequencies from 1 down to 1/10000 (Vaswani et al. 2017, section 3.5).

    `time` should span some hundreds, or nearby times look alike.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=time.device) / (dim // 2))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero_init(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Conditions(nn.Module):
    """The named conditions that a network takes besides the class, {name: shape of one item}, and their embeddings.

    A number, shape (), becomes a sinusoid of 1000 times its value, as the time does, so it should be of order 1; a
    vector (D,) is used as it is. Each goes through a small MLP, whose last layer starts at zero; the embedding is their
    sum.
    A condition with as many axes as the data, (C, H, W) for images, becomes channels after the channels of xt; with
    `flat` it counts as a vector.
    A condition that a call leaves out, or gives as None, adds nothing: no embedding, and channels of zeros.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | None, dim: int, flat: bool = False, axes: int = 2):
        """`dim`: size of the embedding. `axes`: number of axes of the data besides the channels. Raises ValueError for
        any other shape."""
        super().__init__()
        self.shapes = {name: tuple(shape) for name, shape in (shapes or {}).items()}
        self.images = [name for name, shape in self.shapes.items() if len(shape) == 1 + axes and not flat]
        self.channels = sum(self.shapes[name][0] for name in self.images)  # in addition to the channels of xt
        self.mlps, self.dim = nn.ModuleDict(), dim
        for name, shape in self.shapes.items():
            if len(shape) not in (0, 1, 1 + axes) and not flat:
                raise ValueError(
                    f'condition {name!r} has shape {shape}. '
                    f'Use () for a number, (D,) for a vector or, as the data, (C, {SIDES[axes]}) for channels'
                )
            if name not in self.images:
                size, bias = math.prod(shape) if shape else dim, name != 'augmentation'  # its zeros mean: nothing
                last = zero_init(nn.Linear(dim, dim, bias))
                self.mlps[f'mlp_{name}'] = nn.Sequential(nn.Linear(size, dim, bias), nn.SiLU(), last)  # `type` is taken

    def given(self, cond: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The conditions that are not None. Raises TypeError for an undeclared name, ValueError for another shape."""
        unknown = ', '.join(sorted(set(cond) - set(self.shapes)))
        if unknown:
            known = ', '.join(self.shapes) or 'none'
            raise TypeError(f'the network does not know the condition {unknown}; it was built with cond: {known}')
        if self.training and 'augmentation' in self.shapes.keys() - cond.keys():
            raise TypeError('the network needs cond augmentation: pass **batch.cond to model_fn, or --geometric_prob 0')
        for name, value in cond.items():
            shape = self.shapes[name]
            fixed = 1 if name in self.images else len(shape)  # an image may have other sides than declared
            if value is not None and (value.ndim != 1 + len(shape) or value.shape[1 : 1 + fixed] != shape[:fixed]):
                wanted = ', '.join(map(str, ('B', *shape)))
                raise ValueError(f'condition {name!r} has shape {tuple(value.shape)}, not ({wanted})')
        return {name: value for name, value in cond.items() if value is not None}

    def embed(self, cond: Mapping[str, Tensor | None]) -> Tensor | float:
        """Numbers and vectors as one embedding (B, dim); 0 without any."""
        total = 0.0
        for name, value in self.given(cond).items():
            if name not in self.images:
                x = value.flatten(1).float() if self.shapes[name] else sinusoid(1000 * value, self.dim)
                total = total + self.mlps[f'mlp_{name}'](x)
        return total

    def with_images(self, xt: Tensor, cond: Mapping[str, Tensor | None]) -> Tensor:
        """xt (B, C, ...) and the images, resized to its sides, joined along the channels."""
        parts = [xt]
        for name in self.images:
            image = cond.get(name)
            if image is None:
                image = xt.new_zeros(len(xt), self.shapes[name][0], *xt.shape[2:])
            elif image.shape[2:] != xt.shape[2:]:
                image = F.interpolate(image.to(xt.dtype), size=xt.shape[2:], mode=RESIZE[xt.ndim - 2])
            parts.append(image.to(xt.dtype))
        return torch.cat(parts, 1) if self.images else xt


class ConditionedNetwork(nn.Module):
    """A network that turns time, class and conditions into one embedding; a subclass adds `forward`.

    Label `num_classes` is the null class, and so is None.
    """

    conditions: Conditions
    arguments: Mapping[str, Any] = {}  # arguments of the constructor, if networks/table.py called it
    checkpointing = False  # whether the backward pass computes the inside of each block again, instead of keeping it

    def __init__(self, num_classes: int, frequencies: int, dim: int, conditions: Conditions | None = None):
        """`frequencies`: size of the sinusoid of the time, even. `dim`: size of the embedding. A subclass that passes
        no conditions sets `self.conditions` later: the order decides which initial weights a seed gives."""
        super().__init__()
        if conditions is not None:
            self.conditions = conditions
        self.num_classes, self.frequencies = num_classes, frequencies
        self.time_mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embedding = nn.Embedding(num_classes + 1, dim)

    def embedding(self, time: Tensor, label: Tensor | None, cond: Mapping[str, Tensor | None]) -> Tensor:
        """(B, dim), from time (B,), label (B,) int64 and conditions (B, ...)."""
        if label is None or self.num_classes == 0:  # data without classes may have labels, which mean nothing
            label = torch.full((len(time),), self.num_classes, device=time.device)
        emb = self.time_mlp(sinusoid(time, self.frequencies)) + self.class_embedding(label)
        return F.silu(emb + self.conditions.embed(cond))

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        again = self.checkpointing and torch.is_grad_enabled() and not is_transformed()  # torch.func cannot do it again
        return checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)


class FieldNetwork(ConditionedNetwork):
    """A network for signals, images or volumes, by the shape of the data; a subclass crops its output to xt's sides."""

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, frequencies: int, dim: int,
        cond: Mapping[str, tuple[int, ...]] | None, multiple: int, padding: str = 'zeros',
    ):  # fmt: skip
        """`multiple`: what all sides are padded to. `padding`: of `self.conv` too. Raises ValueError for other data."""
        axes = len(shape) - 1
        if axes not in CONV:
            kinds = f'a {type(self).__name__} is for images (C, H, W), signals (C, L) and volumes (C, D, H, W)'
            raise ValueError(f'{kinds}, but x is {shape}. Use --network mlp, or, for signals, --array_layout')
        super().__init__(num_classes, frequencies, dim, Conditions(cond, dim, axes=axes))
        self.in_channels, self.axes, self.multiple = shape[0], axes, multiple  # channels of xt, not of conditions
        self.periodic, self.conv = padding == 'circular', partial(CONV[axes], padding_mode=padding)

    def padded(self, xt: Tensor, cond: Mapping[str, Tensor | None]) -> Tensor:
        """xt (B, C, ...) and the conditions that are channels, continued at the end of each side: by the last values,
        or periodically."""
        if xt.ndim != 2 + self.axes or xt.shape[1] != self.in_channels:
            wanted = f'this {type(self).__name__} wants (B, {self.in_channels}, {SIDES[self.axes]})'
            raise ValueError(f'xt has shape {tuple(xt.shape)}; {wanted}')
        x = self.conditions.with_images(xt, cond)
        sides = [(side, -(-side // self.multiple) * self.multiple) for side in xt.shape[2:]]
        if self.periodic:
            return x.tile(1, 1, *(-(-new // side) for side, new in sides))[(..., *(slice(new) for _, new in sides))]
        return F.pad(x, [n for side, new in reversed(sides) for n in (0, new - side)], mode='replicate')


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with at most 32 groups, of at least 4 channels; docs/log.md compares it with 32 groups everywhere."""
    groups = min(32, max(1, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """x + conv(modulated norm(conv(norm(x)))), from `c_in` to `c_out` channels; `conv` makes the convolutions."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float, conv: Conv = nn.Conv2d):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), conv(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = group_norm(c_out), zero_init(conv(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(c_in, c_out, 1, padding_mode='zeros') if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = bcast_right(self.modulation(emb), x.ndim).chunk(2, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """x + self-attention over all positions of x (B, C, ...), with heads of at most 64 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = -(-channels // 64)
        while channels % self.heads:
            self.heads += 1
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        b, n, c = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        return x + self.out(y.transpose(1, 2).reshape(b, n, c)).transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """One residual block, followed by attention where this resolution has it."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float, conv: Conv, attention: bool):
        super().__init__()
        self.block = ResBlock(c_in, c_out, c_emb, dropout, conv)
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


def attended_levels(shape: tuple[int, ...], levels: int, attention_resolutions: tuple[int, ...]) -> list[bool]:
    """Whether each level of data (C, ...), from the finest, has attention; its longest side decides."""
    sides = [-(-max(shape[1:]) // 2**i) for i in range(levels)]
    if not set(attention_resolutions) <= set(sides):
        raise ValueError(
            f'attention_resolutions={attention_resolutions}: data of {"x".join(map(str, shape[1:]))} give levels of '
            f'side {sides}. Choose --attention_resolutions among these (none: pass the flag without a value), '
            'or use the preset of the data set'
        )
    return [side in attention_resolutions for side in sides]


class UNet(FieldNetwork):
    """`forward(xt, time (B,), label (B,) int64 or None, **cond)`, for data (C, L), (C, H, W) or (C, D, H, W).

    `attention_resolutions` names levels by their longest side; the middle, at the coarsest, always has attention.
    `cond`: name -> shape of one item, see `Conditions`.
    `padding`: 'zeros', or 'circular' for periodic data: shifting the input by `multiple` shifts the output, if all
    sides are multiples of it.
    Raises ValueError for data of another number of axes, and if no level has the side of an attention resolution.
    """

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, channels: int = 32, channel_mults: tuple[int, ...] = (1, 2),
        num_res_blocks: int = 2, attention_resolutions: tuple[int, ...] = (4,), dropout: float = 0.0,
        cond: Mapping[str, tuple[int, ...]] | None = None, padding: str = 'zeros',
    ):  # fmt: skip
        c_emb, multiple = 4 * channels, 2 ** (len(channel_mults) - 1)
        super().__init__(shape, num_classes, channels, c_emb, cond, multiple, padding)
        attend, conv = attended_levels(shape, len(channel_mults), attention_resolutions), self.conv
        self.stem = conv(shape[0] + self.conditions.channels, channels, 3, padding=1)

        c, skips = channels, [channels]  # channels of x, and of each tensor that waits for its skip connection
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(channel_mults):
            if i > 0:
                self.down.append(conv(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(num_res_blocks):
                self.down.append(Stage(c, mult * channels, c_emb, dropout, conv, attend[i]))
                c = mult * channels
                skips.append(c)
        self.middle = nn.ModuleList([Stage(c, c, c_emb, dropout, conv, True), ResBlock(c, c, c_emb, dropout, conv)])
        for i, mult in reversed(list(enumerate(channel_mults))):
            for _ in range(num_res_blocks + 1):
                self.up.append(Stage(c + skips.pop(), mult * channels, c_emb, dropout, conv, attend[i]))
                c = mult * channels
            if i > 0:
                c = channel_mults[i - 1] * channels
                upsample = nn.Upsample(scale_factor=2, mode='nearest')
                self.up.append(nn.Sequential(upsample, conv(mult * channels, c, 3, padding=1)))
        self.head = nn.Sequential(group_norm(c), nn.SiLU(), zero_init(conv(c, shape[0], 3, padding=1)))

    def forward(self, xt: Tensor, time: Tensor, label: Tensor | None = None, **cond: Tensor) -> Tensor:
        emb = self.embedding(time, label, cond)
        x = self.stem(self.padded(xt, cond))
        skips = [x]
        for layer in self.down:
            x = self.run(layer, x, emb) if isinstance(layer, Stage) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = self.run(layer, x, emb)
        for layer in self.up:
            x = self.run(layer, torch.cat([x, skips.pop()], 1), emb) if isinstance(layer, Stage) else layer(x)
        return self.head(x)[(..., *map(slice, xt.shape[2:]))]
