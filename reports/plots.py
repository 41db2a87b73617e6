"""Tensors as pictures (3, H, W) uint8: grids of images, and plots of points in the plane."""

import functools
import importlib.util
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from data_loading.spec import DataSpec
from runtime.ranks import print_once

GAP = 16  # pixels between two grids
LINE_HEIGHT = 13  # pixels of a line of text
Density = Callable[[Tensor], Tensor]  # (N, 2) -> (N,)


# ---------------------------------------------------------------- images


def next_to_each_other(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (3, H, W) uint8 from left to right on white, as one."""
    height, pad = max(picture.shape[1] for picture in pictures), torch.nn.functional.pad
    padded = [pad(picture, (0, GAP, 0, height - picture.shape[1]), value=255) for picture in pictures]
    return torch.cat(padded, 2)[:, :, :-GAP]


def within_unit(x: Tensor) -> Tensor:
    """x as it is if its finite values lie in [0, 1], else scaled so that they do; NaN becomes 0."""
    finite = x[x.isfinite()]
    low, high = finite.aminmax() if finite.numel() else (0, 1)
    return (x if (low >= 0 and high <= 1) or high == low else (x - low) / (high - low)).nan_to_num(0)


def in_rows(frames: list[Tensor], at_most: int = 12) -> Tensor:
    """Frames, each of images (n, C, H, W), with a row for each image; all on one scale, if some leave [0, 1]."""
    rows = within_unit(torch.stack(frames, 1))  # (n, frames, C, H, W)
    shown = rows[:, torch.linspace(0, rows.shape[1] - 1, min(rows.shape[1], at_most)).round().long()]
    return image_grid(shown.flatten(0, 1), shown.shape[1])


def image_grid(images: Tensor, columns: int, min_side: int = 48, gap: int = 2, names: Sequence[str] = ()) -> Tensor:
    """Images (B, C, H, W) in [0, 1], row by row; each is drawn as its `panels`, below each other.

    Small images are enlarged by a whole factor until their shorter side has `min_side` pixels. Missing cells stay
    white. `names`, one for each image, stand above the columns if all images of a column have the same, else below
    each image.
    """
    factor = -(-min_side // min(images.shape[2:]))
    cells = torch.cat(panels((images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()), 2)
    cells = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    b, _, h, w = cells.shape
    by_column = all(name == names[i % columns] for i, name in enumerate(names))
    above, below = (LINE_HEIGHT if names and by_column else 0), (0 if by_column else LINE_HEIGHT)
    height, width = above + -(-b // columns) * (gap + h + below) + gap, columns * (gap + w) + gap
    picture = torch.full((3, height, width), 255, dtype=torch.uint8)
    for i, cell in enumerate(cells):
        y, x = above + gap + i // columns * (gap + h + below), gap + i % columns * (gap + w)
        picture[:, y : y + h, x : x + w] = cell
        if below or (above and i < columns):
            line = y + h if below else 0
            picture[:, line : line + LINE_HEIGHT, x : x + w] = rendered_text(names[i], w)
    return picture


def panels(images: Tensor) -> list[Tensor]:
    """Images (B, C, H, W) as pictures (B, 3, H, W): one channel in grey, three in colour, four as three in colour and
    one in grey, any other number as that many in grey."""
    colour = [images[:, :3]] if images.shape[1] in (3, 4) else []
    greys = [images[:, i : i + 1].expand(-1, 3, -1, -1) for i in range(3 * len(colour), images.shape[1])]
    return [*colour, *greys]


# ---------------------------------------------------------------- text


def titles_of(data: DataSpec, label: Tensor | None, label_dropout: float) -> list[str]:
    """The class name of each sample (n,), or its number where no font has the letters of the name; empty if the network
    has learned no classes."""
    names = data.class_names(label, label_dropout)
    missing = sorted({name for name in names if font_of(name) is None})
    if missing:
        say_missing(
            f'no font here has the letters of {", ".join(missing[:3])}: pictures show the numbers of such classes'
        )
    numbers = [] if label is None else label.tolist()
    return [str(numbers[i]) if name in missing else name for i, name in enumerate(names)]


say_missing = functools.cache(print_once)  # says the same once


@functools.cache
def font_of(text: str) -> Any:
    """The first font that has all letters of the text, Pillow's or DejaVu, which comes with matplotlib; else None."""
    matplotlib = importlib.util.find_spec('matplotlib')  # found, not imported: that takes a while
    assert matplotlib is not None and matplotlib.origin is not None
    dejavu = Path(matplotlib.origin).with_name('mpl-data') / 'fonts/ttf/DejaVuSans.ttf'
    if any(unicodedata.bidirectional(c) in ('R', 'AL') for c in text) and not features.check('raqm'):
        return None  # from right to left, or joined: only this library can
    for font in (ImageFont.load_default(10), ImageFont.truetype(str(dejavu), 9)):
        drawn = lambda c, font=font: np.asarray(font.getmask(c)).tobytes()  # noqa: E731
        if not any(drawn(c) == drawn('\uffff') for c in text if not c.isspace()):  # a box: the font lacks this letter
            return font
    return None


def rendered_text(text: str, width: int) -> Tensor:
    """One line of text in black on white, (3, LINE_HEIGHT, width), cut off where it does not fit."""
    image = Image.new('RGB', (width, LINE_HEIGHT), 'white')
    draw, font = ImageDraw.Draw(image), font_of(text) or ImageFont.load_default(10)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + '\u2026', font) > width:
            text = text[:-1]
        text += '\u2026'
    draw.text((width / 2, LINE_HEIGHT / 2), text, 'black', font, anchor='mm')
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------- points in the plane


def scatter(
    sets: Sequence[Tensor], titles: Sequence[str] = (), label: Tensor | None = None, density: Density | None = None
) -> Tensor:
    """Points (n, 2) of each set in a plot of its own, then the density that they should have.

    All plots except the first also have room for the last set, to compare. `label` (n,): classes, as colours, in sets
    of n points.
    """
    figure, axes = subplots(len(sets) + (density is not None))
    for i, (ax, points) in enumerate(zip(axes, sets, strict=False)):
        shown = colours(label if label is not None and len(label) == len(points) else None)
        ax.scatter(*points.double().cpu().T.numpy(), s=4, alpha=0.6, linewidths=0, **shown)
        limit(ax, points if i == 0 and len(sets) > 1 else torch.cat([points, sets[-1].to(points)]))
        ax.set_title(titles[i] if titles else '', fontsize=10)
    if density is not None:
        x, y = (np.linspace(low, high, 100) for low, high in (axes[-2].get_xlim(), axes[-2].get_ylim()))
        grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1)).reshape(-1, 2)
        axes[-1].pcolormesh(x, y, density(grid).reshape(100, 100).numpy(), cmap='magma', shading='nearest')
        axes[-1].set_title('exact density', fontsize=10)
    return rendered(figure)


def paths(frames: Sequence[Tensor], label: Tensor | None = None) -> Tensor:
    """The path of each point, frames (n, 2) from first to last, as a line that ends in a dot."""
    figure, (ax,) = subplots(1)
    lines = torch.stack(list(frames)).double().cpu().numpy()  # (frames, n, 2)
    ax.plot(lines[:, :, 0], lines[:, :, 1], color='grey', linewidth=0.4, alpha=0.5)
    ax.scatter(*lines[0].T, s=3, color='black', linewidths=0)
    ax.scatter(*lines[-1].T, s=8, linewidths=0, zorder=3, **colours(label))
    limit(ax, torch.from_numpy(lines).flatten(0, 1))
    return rendered(figure)


def colours(label: Tensor | None) -> dict:
    """Arguments of scatter() that colour points by class."""
    return {} if label is None else dict(c=label.cpu(), cmap='tab10', vmin=0, vmax=10)


def subplots(n: int):
    """A figure, and its n square plots in a row, 400 pixels each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * n, 4), dpi=100, layout='constrained')
    return figure, figure.subplots(1, n, squeeze=False, subplot_kw=dict(aspect='equal'))[0]


def limit(ax, points: Tensor) -> None:
    """Equal axes that hold the finite points, with some room."""
    points = points[points.isfinite().all(1)].double().cpu()
    if len(points) > 0:
        low, high = points.amin(0), points.amax(0)
        half = 0.55 * max(float((high - low).max()), 1e-6)
        x, y = ((low + high) / 2).tolist()
        ax.set(xlim=(x - half, x + half), ylim=(y - half, y + half))


def rendered(figure) -> Tensor:
    """The figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)
