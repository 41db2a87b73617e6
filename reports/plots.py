"""Pictures (3, H, W) uint8: panels of cells with text around them. kinds.py draws data other than images."""

import functools
import importlib.util
import itertools
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor
from torch.nn.functional import pad

from data_loading.spec import DataSpec
from runtime.ranks import print_first_time

GAP, APART, BETWEEN = 2, 8, 16  # pixels between cells, between groups of rows, between panels
LINE_HEIGHT = 13  # pixels of a line of text
GREY = 160  # colour of gaps and empty cells: both white and black cells have a visible edge
WIDEST = 1200  # pixels of a row of more than two images
LONGEST = 400  # pixels of the longer side of a cell that is enlarged
Density = Callable[[Tensor], Tensor]  # (N, 2) -> (N,)


class GridBlock(NamedTuple):
    """A grid: rows of indices of items, -1 for an empty cell."""

    rows: list[list[int]]
    top: Sequence[str] = ()  # text above the columns
    left: Sequence[str] = ()  # text left of the rows
    starts: Collection[int] = ()  # rows with extra space above


@dataclass(frozen=True)
class Panel:
    """Items of one kind to show together: data and samples, or paths."""

    x: Tensor  # (n, ...) as decode returns it, data first
    names: Sequence[str] = ()  # the class of each, if there are classes; for paths, the text left of each row
    real: int = 0  # how many of x are data
    title: str = ''
    across: int = 10  # most cells in a row
    times: Sequence[str] = ()  # for paths: x is a path of this many states, their predicted x0, the next path, ...
    density: Density | None = None  # the true density of points
    scale: Tensor | None = None  # items that set the scale or the axes, so that several pictures agree; None: x

    @property
    def scaled_by(self) -> Tensor:
        return (self.x if self.scale is None else self.scale).float().cpu()

    def width(self) -> int:
        """Least pixels for the width of a cell of signals, fields or images."""
        if self.x.ndim == 3:
            return min(max(96, self.x.shape[2] * (not self.times)), 240)
        return self.x.shape[3] * factor_for(48, self.x.shape[2:])

    def blocks(self) -> list[GridBlock]:
        """Grids to put below each other. Each class has a column, or several, with data on top."""
        if self.times:
            rows = torch.arange(len(self.x)).view(-1, len(self.times)).tolist()
            return [GridBlock(rows, self.times, self.names, range(2, len(rows), 2))]
        names = [*self.names] or [''] * len(self.x)
        classes = list(dict.fromkeys(names[self.real :]))
        items = {name: ([], []) for name in dict.fromkeys(names)}  # class -> its data, its samples
        for i, name in enumerate(names):
            items[name][i >= self.real].append(i)
        across = max(2, min(self.across, WIDEST // self.width())) if self.x.ndim > 2 else self.across
        wide = max(1, min(across // len(classes), max(len(samples) for _, samples in items.values())))
        at_once = -(-len(classes) // -(-len(classes) // across))  # classes in a block: blocks of about equal width
        blocks = []
        for part in (classes[k : k + at_once] for k in range(0, len(classes), at_once)):
            depth = max(-(-len(items[name][1]) // wide) for name in part)
            columns = [
                filled(items[name][0], wide * bool(self.real)) + filled(items[name][1], wide * depth) for name in part
            ]
            rows = np.array(columns).reshape(len(part), -1, wide).swapaxes(0, 1).reshape(-1, len(part) * wide).tolist()
            top = [name for name in part for _ in range(wide)] if self.names else []
            blocks.append(GridBlock(rows, top, ['data', *[''] * depth], [1]) if self.real else GridBlock(rows, top))
        return blocks

    def side(self) -> int:
        """Least pixels for the shorter side of a cell, so that the grid is large enough and names fit."""
        if self.times:
            return 48
        (row, *_), top = self.blocks()[0][:2]
        longest = max((text_width(name) // list(top).count(name) for name in top), default=0)
        return max(48, (400 if self.across > 5 else 200) // len(row), min(longest, 80))

    def picture(self, cells: Tensor, note: str = '', legend: Tensor | None = None) -> Tensor:
        """The picture of cells (n, 3, h, w) uint8, one for each x, a note after the title, and a legend at right."""
        cells = torch.cat([cells.cpu(), torch.full_like(cells[:1], GREY, device='cpu')])  # the last one is empty
        grids = [grid(cells[torch.tensor(b.rows)], b.top, b.left, b.starts) for b in self.blocks()]
        if legend is not None:
            above = LINE_HEIGHT * bool(self.blocks()[0].top) + GAP
            grids[0] = join_pictures([grids[0], pad(legend, (0, 0, above, 0), value=255)], 2 * GAP)
        return titled(stacked(grids), ', '.join(filter(None, (self.title, note))))


def filled(indices: list[int], n: int) -> list[int]:
    """The first n indices, filled up with -1."""
    return [*indices[:n], *[-1] * (n - len(indices))]


def grid(cells: Tensor, top: Sequence[str], left: Sequence[str], starts: Collection[int]) -> Tensor:
    """Cells (rows, columns, 3, h, w) uint8 on grey, with the text of a GridBlock. Adjacent columns with the same text
    share one label."""
    rows, columns, _, h, w = cells.shape
    margin, above = max(map(text_width, left), default=-4) + 4, LINE_HEIGHT * any(top) + GAP
    ys = [above + y * (h + GAP) + APART * sum(0 < start <= y for start in starts) for y in range(rows)]
    xs = [margin + GAP + x * (w + GAP) for x in range(columns)]
    picture = torch.full((3, ys[-1] + h + GAP, xs[-1] + w + GAP), 255, dtype=torch.uint8)
    for y, row, word in itertools.zip_longest(ys, cells, left[:rows]):
        picture[:, y - GAP : y + h + GAP, margin:] = GREY
        for x, cell in zip(xs, row, strict=True):
            picture[:, y : y + h, x : x + w] = cell
        if word:
            line = y + (h - LINE_HEIGHT) // 2
            picture[:, line : line + LINE_HEIGHT, :margin] = rendered_text(word, margin)
    for word, group in itertools.groupby(zip(xs, top, strict=False), lambda pair: pair[1]):
        (begin, _), *_, (last, _) = [*group] * 2
        picture[:, :LINE_HEIGHT, begin : last + w] = rendered_text(word, last + w - begin)
    return picture


def join_pictures(pictures: Sequence[Tensor], gap: int = BETWEEN) -> Tensor:
    """Pictures from left to right on white, as one."""
    height = max(picture.shape[1] for picture in pictures)
    padded = [pad(picture, (0, gap, 0, height - picture.shape[1]), value=255) for picture in pictures]
    return torch.cat(padded, 2)[:, :, : sum(picture.shape[2] + gap for picture in pictures) - gap]


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures from top to bottom on white, as one."""
    return join_pictures([picture.mT for picture in pictures], 0).mT


def titled(picture: Tensor, title: str) -> Tensor:  # below its title, if it has one
    return stacked([rendered_text(title, text_width(title) + 4), picture]) if title else picture


# ---------------------------------------------------------------- images


def image_grid(images: Tensor, columns: int, names: Sequence[str] = (), title: str = '') -> Tensor:
    """Images (n, C, H, W) in [0, 1], row by row; if each has a name, images of one name are below each other."""
    return draw_images(Panel(images, names, title=title, across=columns))


def draw_images(panel: Panel) -> Tensor:
    """Draw images unchanged, or scaled if values leave [0, 1]: the title then gives the values of black and white.
    Three channels are a colour image, a fourth is a grey image below it; other numbers of channels are grey images."""
    x, by = panel.x.float().cpu(), panel.scaled_by
    (low, high), scaled = range_of(by), bool(((by < 0) | (by > 1)).any())
    unit = ((x - low) / (high - low) if scaled else x).nan_to_num(0).clamp(0, 1)
    levels = (unit * 255).round().to(torch.uint8)
    colour = [levels[:, :3]] if levels.shape[1] in (3, 4) else []
    cells = torch.cat([*colour, *(c.expand(-1, 3, -1, -1) for c in levels.split(1, 1)[3 * len(colour) :])], 2)
    note = f'black {low:.3g}, white {high:.3g}' if scaled else ''
    return panel.picture(enlarged(cells, factor_for(panel.side(), x.shape[2:])), note)


def range_of(x: Tensor) -> tuple[float, float]:
    """The lowest and the highest finite value, widened if they are equal."""
    finite = x[x.isfinite()].double()
    low, high = map(float, finite.aminmax()) if finite.numel() else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def factor_for(side: int, shape: Sequence[int], shorter: int = 0) -> int:
    """Pixels for each value of cells (..., *shape), so that the shorter side (or `shorter` values) has `side` pixels,
    unless the longer one would exceed LONGEST."""
    return max(1, min(-(-side // (shorter or min(shape))), LONGEST // max(shape)))


def enlarged(cells: Tensor, factor: int) -> Tensor:
    """Each pixel of cells (..., h, w) as a square of `factor` pixels."""
    return cells.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


# ---------------------------------------------------------------- text


def titles_of(data: DataSpec, label: Tensor | None, label_dropout: float) -> list[str]:
    """The class name of each sample (n,), or its number if no font has the letters of the name; empty if the network
    was trained without classes."""
    names = data.class_names(label, label_dropout)
    missing = sorted({name for name in names if font_of(name) is None})
    if missing:
        words = ', '.join(missing[:3])
        print_first_time(f'no font here has the letters of {words}: pictures show the numbers of such classes')
    numbers = [] if label is None else label.tolist()
    return [str(numbers[i]) if name in missing else name for i, name in enumerate(names)]


@functools.cache
def font_of(text: str) -> Any:
    """The first font with all letters of the text: DejaVu, which comes with matplotlib, or Pillow's; else None."""
    matplotlib = importlib.util.find_spec('matplotlib')  # only located: importing it is slow
    assert matplotlib is not None and matplotlib.origin is not None
    dejavu = Path(matplotlib.origin).with_name('mpl-data') / 'fonts/ttf/DejaVuSans.ttf'
    if any(unicodedata.bidirectional(c) in ('R', 'AL') for c in text) and not features.check('raqm'):
        return None  # right-to-left and joined letters need this library
    for font in (ImageFont.truetype(str(dejavu), 10), ImageFont.load_default(10)):
        drawn = lambda c, font=font: np.asarray(font.getmask(c)).tobytes()  # noqa: E731
        if not any(drawn(c) == drawn('\uffff') for c in text if not c.isspace()):  # the box for a missing letter
            return font
    return None


def text_width(text: str) -> int:  # pixels
    return -int(-(font_of(text) or ImageFont.load_default(10)).getlength(text) // 1)


def rendered_text(text: str, width: int, colour: str = 'black') -> Tensor:
    """One line of text on white, (3, LINE_HEIGHT, width), cut if it does not fit."""
    image, font = Image.new('RGB', (width, LINE_HEIGHT), 'white'), font_of(text) or ImageFont.load_default(10)
    if text_width(text) > width:
        while text and text_width(text + '\u2026') > width:
            text = text[:-1]
        text += '\u2026'
    ImageDraw.Draw(image).text((width / 2, LINE_HEIGHT / 2), text, colour, font, anchor='mm')
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
