"""Small helpers: shapes, errors per image, seeds, pictures. Images are (B, C, H, W)."""

import hashlib
import random
import resource
import sys

import numpy as np
import torch
from torch import Tensor


def bcast_right(v: Tensor, ndim: int) -> Tensor:
    """(B,) to (B, 1, ..., 1) with `ndim` dimensions, so that it multiplies images."""
    return v.reshape(v.shape + (1,) * (ndim - v.ndim))


def image_square_error(a: Tensor, b: Tensor) -> Tensor:
    """Squared error of each image, (B,): the mean over C, H, W, so that losses compare across resolutions."""
    return (a - b).square().flatten(1).mean(1)


def seed_everything(*key: int | str) -> None:
    """Seed torch (all devices), numpy and random from a hash of `key`.

    A hash, because torch's CPU generator keeps only the low 32 bits of a seed: sums and shifts of keys would collide.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), 'little')
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held, in GB: on its GPU if it has one, else in main memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def image_grid(images: Tensor, columns: int, min_side: int = 48, gap: int = 2) -> Tensor:
    """Images (B, C, H, W) in [0, 1], row by row, as one picture (3, H', W') uint8.

    Small images are enlarged by a whole factor until their shorter side has `min_side` pixels. Missing cells stay white.
    """
    b, _, h, w = images.shape
    factor = -(-min_side // min(h, w))
    cells = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    cells = cells[:, :3] if cells.shape[1] >= 3 else cells[:, :1].expand(-1, 3, -1, -1)
    cells = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    h, w = h * factor + gap, w * factor + gap
    rows = -(-b // columns)
    picture = torch.full((3, rows * h + gap, columns * w + gap), 255, dtype=torch.uint8)
    for i, cell in enumerate(cells):
        y, x = gap + i // columns * h, gap + i % columns * w
        picture[:, y : y + h - gap, x : x + w - gap] = cell
    return picture
