"""Images as one picture: grids, with names, next to each other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GAP = 16  # pixels between two grids


def next_to_each_other(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (3, H, W) uint8 from left to right on white, as one."""
    height = max(picture.shape[1] for picture in pictures)
    gaps = [GAP] * (len(pictures) - 1) + [0]
    white = [(0, right, 0, height - picture.shape[1]) for picture, right in zip(pictures, gaps, strict=True)]
    pad = torch.nn.functional.pad
    return torch.cat([pad(picture, sides, value=255) for picture, sides in zip(pictures, white, strict=True)], 2)


def within_unit(x: Tensor) -> Tensor:
    """x as it is if it lies in [0, 1], else scaled linearly into it."""
    low, high = x.aminmax()
    return x if (low >= 0 and high <= 1) or high == low else (x - low) / (high - low)


def in_rows(frames: list[Tensor], at_most: int = 12) -> Tensor:
    """Frames, each of images (n, C, H, W), as a picture (3, H', W') uint8 with a row for each image."""
    rows = torch.stack(frames, 1)  # (n, frames, C, H, W)
    shown = rows[:, torch.linspace(0, rows.shape[1] - 1, min(rows.shape[1], at_most)).round().long()]
    return image_grid(shown.flatten(0, 1), shown.shape[1])


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
            picture[:, y + h - gap : y + h - gap + height, x : x + w - gap] = rendered_text(names[i], w - gap)
    if names and by_column:
        top = torch.full((3, LINE_HEIGHT, picture.shape[2]), 255, dtype=torch.uint8)
        for i, name in enumerate(names[:columns]):
            top[:, :, gap + i * w : (i + 1) * w] = rendered_text(name, w - gap)
        picture = torch.cat([top, picture], 1)
    return picture


LINE_HEIGHT = 13  # pixels of a line of text in a picture


def rendered_text(text: str, width: int) -> Tensor:
    """One line of text in black on white, (3, LINE_HEIGHT, width) uint8, cut off where it does not fit."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new('RGB', (width, LINE_HEIGHT), 'white')
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(10)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + '\u2026', font) > width:
            text = text[:-1]
        text += '\u2026'
    draw.text((width / 2, LINE_HEIGHT / 2), text, 'black', font, anchor='mm')
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
