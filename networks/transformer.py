"""A diffusion transformer for signals, images and volumes of any size: forward(xt, time, label, **cond) -> like xt.

Peebles and Xie 2023 (DiT), with later improvements of plain transformers, as in Li and He 2025 (JiT). Notable
features:
- patches of more than 128 values enter through a bottleneck of 128
- time, class and conditions steer each block by scale, shift and gate, which start at zero (adaLN-Zero): at first each
  block is the identity, and the output is 0
- RMS norms without weights, normalised queries and keys, SwiGLU instead of an MLP with GELU
- positions enter twice: sinusoids added to the tokens say where a patch is, and rotations of queries and keys say how
  far apart two patches are
- fused attention; under `utils.jvp` plain products, which have a forward mode
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import FieldNetwork, zero_init

BOTTLENECK = 128
DIT_SIZES = {  # Peebles and Xie 2023, table 1: depth, width, heads
    'S': (12, 384, 6),
    'B': (12, 768, 12),
    'L': (24, 1024, 16),
    'XL': (28, 1152, 16),
}


def angles(sides: Sequence[int], dim: int, device: torch.device) -> Tensor:
    """(N, dim): the angles of each of the N places of a grid with these sides, row by row. An equal part of the
    dimensions encodes each coordinate (the first ones get the rest), at frequencies from 1 down to 1/10000."""
    places = torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides)).reshape(-1, len(sides))
    dims = [-(-(dim - i) // len(sides)) for i in range(len(sides))]  # they add up to dim
    frequencies = [10_000 ** -torch.linspace(0, 1, n, device=device) for n in dims]
    return torch.cat([places[:, i, None] * frequencies[i] for i in range(len(sides))], 1)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """x (..., N, D) with the pairs (x_i, x_{i + D/2}) of each token rotated by its angles (N, D/2) (Su et al. 2021)."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def rms_norm(x: Tensor) -> Tensor:
    """x divided by its root mean square over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Attention(nn.Module):
    """Self-attention of all tokens (B, N, width); queries and keys are normalised, then rotated by their positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = turn(rms_norm(q) * self.q_scale, angle), turn(rms_norm(k) * self.k_scale, angle)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)  # (B, heads, N, width / heads)
        return self.out(y.transpose(1, 2).reshape(b, n, width))


class SwiGLU(nn.Module):
    """W (silu(U x) * V x), with about as many weights as an MLP with a hidden layer of 4 x width (Shazeer 2020)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        hidden = -(-8 * width // 3 // 8) * 8  # 8/3 of the width, rounded up to a multiple of 8
        self.gate_and_value, self.out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, -1)
        return self.out(self.dropout(F.silu(gate) * value))


class Block(nn.Module):
    """x + gate * f(scale * norm(x) + shift), for attention and then for the SwiGLU."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width, dropout)
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, emb: Tensor, angle: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)  # (B, 1, width)
        x = x + gate1 * self.attention(rms_norm(x) * (1 + scale1) + shift1, angle)
        return x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)


class DiT(FieldNetwork):
    """`forward(xt, time (B,), label (B,) int64 or None, **cond)`, for data (C, L), (C, H, W) or (C, D, H, W).

    `patch`: side of a patch; sides that are not a multiple of it are padded, and the output is cropped.
    `cond`: name -> shape of one item, see `unet.Conditions`.
    Raises ValueError for data of another number of axes, and if a head's width is not a multiple of 4.
    """

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, depth: int = 12, width: int = 384, heads: int = 6,
        patch: int = 2, dropout: float = 0.0, cond: Mapping[str, tuple[int, ...]] | None = None,
    ):  # fmt: skip
        if width % (4 * heads):
            raise ValueError(f'width={width} with heads={heads}: the width must be a multiple of 4 x heads')
        super().__init__(shape, num_classes, 256, width, cond, patch)
        self.patch, self.heads = patch, heads
        channels = shape[0] + self.conditions.channels
        self.patchify = self.conv(channels, width, patch, stride=patch)
        if channels * patch**self.axes > BOTTLENECK:
            narrow = self.conv(channels, BOTTLENECK, patch, stride=patch, bias=False)
            self.patchify = nn.Sequential(narrow, self.conv(BOTTLENECK, width, 1))
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(depth)])
        self.modulation = zero_init(nn.Linear(width, 2 * width))
        self.head = zero_init(nn.Linear(width, shape[0] * patch**self.axes))

    def forward(self, xt: Tensor, time: Tensor, label: Tensor | None = None, **cond: Tensor) -> Tensor:
        emb = self.embedding(time, label, cond)
        x = self.patchify(self.padded(xt, cond))  # (B, width, rows, columns)
        grid = x.shape[2:]
        place = angles(grid, x.shape[1] // 2, x.device)
        angle = angles(grid, x.shape[1] // self.heads // 2, x.device)
        x = x.flatten(2).transpose(1, 2) + torch.cat([place.cos(), place.sin()], 1)  # (B, rows x columns, width)
        for block in self.blocks:
            x = self.run(block, x, emb, angle)
        scale, shift = self.modulation(emb)[:, None].chunk(2, -1)
        x = self.head(rms_norm(x) * (1 + scale) + shift)  # (B, rows x columns, C patch^2)
        return self.unpatchify(x, grid)[(..., *map(slice, xt.shape[2:]))]

    def unpatchify(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, rows x columns, C patch^2) -> (B, C, rows patch, columns patch), and likewise for 1 and 3 axes."""
        n, sides = len(grid), [self.patch * side for side in grid]
        x = x.reshape(len(x), *grid, self.in_channels, *n * [self.patch])
        x = x.permute(0, *(axis for i in range(n) for axis in (1 + i, 2 + n + i)), 1 + n)  # row, in patch, column, ...
        return x.reshape(len(x), *sides, self.in_channels).movedim(-1, 1)
