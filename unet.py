"""A UNet for images of any channels and size: forward(xt, time, label) -> (B, C, H, W).

Residual blocks with group norm, whose scale and shift come from the time and class embedding (Dhariwal and Nichol
2021), self-attention at chosen resolutions, and outputs initialised to zero, so that each block starts as the identity
and the network's first output is 0. Sides that the levels cannot halve are padded, and the output cropped.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(time: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): cosines and sines at frequencies from 1 down to 1/10000 (Vaswani et al. 2017, section 3.5).

    `time` should span some hundreds, or near times look alike.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=time.device) / (dim // 2))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero_init(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 4 channels, at most 32 of them."""
    groups = min(32, max(1, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """x + conv(modulated norm(conv(norm(x)))), from `c_in` to `c_out` channels."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = group_norm(c_out), zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """x + self-attention over the pixels, with heads of at most 64 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = -(-channels // 64)
        while channels % self.heads:
            self.heads += 1
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(tokens).reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C / heads)
        return x + self.out(y.transpose(1, 2).reshape(b, h * w, c)).transpose(1, 2).reshape(b, c, h, w)


class Level(nn.Module):
    """One residual block, followed by attention where this resolution has it."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float, attention: bool):
        super().__init__()
        self.block = ResBlock(c_in, c_out, c_emb, dropout)
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


class UNet(nn.Module):
    """`forward(xt (B, C, H, W), time (B,), label (B,) int64 or None)`.

    Label `num_classes` is the null class, which None means too. `attention_resolutions` names levels by their longer side;
    the middle, at the coarsest, always has attention.
    Raises ValueError if one of them is the side of no level.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        channels: int = 32,
        channel_mults: tuple[int, ...] = (1, 2),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (4,),
        dropout: float = 0.0,
    ):
        super().__init__()
        sides = [-(-max(shape[1:]) // 2**i) for i in range(len(channel_mults))]
        for side in attention_resolutions:
            if side not in sides:
                raise ValueError(
                    f'attention_resolutions={attention_resolutions}: images of {shape[1]}x{shape[2]} give levels of side {sides}'
                )
        attend = [side in attention_resolutions for side in sides]
        self.num_classes, self.multiple, c_emb = num_classes, 2 ** (len(channel_mults) - 1), 4 * channels

        self.time_mlp = nn.Sequential(nn.Linear(channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.class_embedding = nn.Embedding(num_classes + 1, c_emb)
        self.stem = nn.Conv2d(shape[0], channels, 3, padding=1)

        c, skips = channels, [channels]  # channels now, and of each tensor that a skip connection will bring back
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(channel_mults):
            if i > 0:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(num_res_blocks):
                self.down.append(Level(c, mult * channels, c_emb, dropout, attend[i]))
                c = mult * channels
                skips.append(c)
        self.middle = nn.ModuleList([Level(c, c, c_emb, dropout, attention=True), ResBlock(c, c, c_emb, dropout)])
        for i, mult in reversed(list(enumerate(channel_mults))):
            for _ in range(num_res_blocks + 1):
                self.up.append(Level(c + skips.pop(), mult * channels, c_emb, dropout, attend[i]))
                c = mult * channels
            if i > 0:
                c = channel_mults[i - 1] * channels
                self.up.append(
                    nn.Sequential(
                        nn.Upsample(scale_factor=2, mode='nearest'), nn.Conv2d(mult * channels, c, 3, padding=1)
                    )
                )
        self.head = nn.Sequential(group_norm(c), nn.SiLU(), zero_init(nn.Conv2d(c, shape[0], 3, padding=1)))

    def forward(self, xt: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            label = torch.full((len(xt),), self.num_classes, device=xt.device)
        emb = F.silu(self.time_mlp(sinusoid(time, self.stem.out_channels)) + self.class_embedding(label))

        height, width = xt.shape[2:]
        x = self.stem(F.pad(xt, (0, -width % self.multiple, 0, -height % self.multiple), mode='replicate'))
        skips = [x]
        for layer in self.down:
            x = layer(x, emb) if isinstance(layer, Level) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, emb)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], 1), emb) if isinstance(layer, Level) else layer(x)
        return self.head(x)[:, :, :height, :width]
