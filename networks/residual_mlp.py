"""A residual MLP for points, vectors and other small data: forward(xt, time, label, **cond) -> like xt.

Notable features:
- data of any shape are flattened, and the output has their shape
- residual blocks with layer norm, whose scale and shift come from the embedding of time, class and conditions
- blocks and output start at zero, as in unet.py
"""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from unet import ConditionedNetwork, Conditions, zero_init


class Block(nn.Module):
    """x + linear(modulated norm(linear(norm(x)))), (B, width)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm1, self.linear1 = nn.LayerNorm(width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.norm2, self.linear2 = nn.LayerNorm(width), zero_init(nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.linear1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb).chunk(2, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return x + self.linear2(self.dropout(h))


class MLP(ConditionedNetwork):
    """`forward(xt (B, *shape), time (B,), label (B,) int64 or None, **cond)`.

    `width` (even): size of all hidden layers. `cond`: name -> shape of one item, see `Conditions`; conditions with a
    shape, of any rank, are flattened into vectors.
    """

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, width: int = 256, num_blocks: int = 2, dropout: float = 0.0,
        cond: Mapping[str, tuple[int, ...]] | None = None,
    ):  # fmt: skip
        super().__init__(num_classes, width, width)
        self.shape, size = tuple(shape), math.prod(shape)
        self.stem = nn.Linear(size, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(num_blocks)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), zero_init(nn.Linear(width, size)))
        self.conditions = Conditions(cond, width, flat=True)

    def forward(self, xt: Tensor, time: Tensor, label: Tensor | None = None, **cond: Tensor) -> Tensor:
        if xt.shape[1:] != self.shape:
            raise ValueError(f'xt has shape {tuple(xt.shape)}; this MLP wants (B, {", ".join(map(str, self.shape))})')
        emb = self.embedding(time, label, cond)
        x = self.stem(xt.reshape(len(xt), -1))
        for block in self.blocks:
            x = self.run(block, x, emb)
        return self.head(x).reshape(xt.shape)
