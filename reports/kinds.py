"""Pictures of each kind of data: the table KINDS, heat maps, slices, curves, and points in the plane."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import pad

from reports.plots import (
    LINE_HEIGHT,
    WIDEST,
    Panel,
    draw_images,
    enlarged,
    factor_for,
    join_pictures,
    range_of,
    rendered_text,
    stacked,
    text_width,
    titled,
)

IN_FILES = (1, 3, 4)  # channels that a PNG can hold
# Colours that colour-blind people tell apart (Okabe and Ito 2008), the strongest first.
COLOURS = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7', '#000000')
LIGHT = '#d9d9d9'  # lines at round values behind curves
MARKERS = 'os^Dvp*'  # a class takes the next marker when all colours have been used with the one before


def draw_fields(panel: Panel, blank: Tensor | None = None, least: int = 0, note: str = '') -> Tensor:
    """Draw floats (n, C, H, W) as heat maps, channels below each other, each with a colour bar: all tiles of a channel
    share one scale.

    Pixels that `blank` (H, W) marks are white. `least`: the length of the side to enlarge until it can be seen; 0: the
    shorter one. `note` comes after the title."""
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps['viridis'](np.arange(256))[:, :3] * 255).round().to(torch.uint8)  # (256, 3)
    cells, bars, factor = [], [], factor_for(panel.side(), panel.x.shape[2:], least)
    for channel, limits in zip(panel.x.float().cpu().unbind(1), panel.scaled_by.unbind(1), strict=True):
        low, high = range_of(limits)
        shades = ((channel - low) / (high - low) * 255).nan_to_num(0).clamp(0, 255).round().long()
        cell = colours[shades] if blank is None else colours[shades].masked_fill(blank[..., None], 255)
        shown = enlarged(cell.permute(0, 3, 1, 2), factor)
        h = max(shown.shape[2], 2 * LINE_HEIGHT)  # room for two lines of text
        cells.append(pad(shown, (0, 0, 0, h + 1 - shown.shape[2]), value=255))
        bar = colours[torch.linspace(255, 0, h).round().long()].T[:, :, None].expand(3, h, 10)
        words = [rendered_text(f'{value:.3g}', 52) for value in (high, low)]  # as wide as -0.000123
        words.insert(1, torch.full((3, h - 2 * LINE_HEIGHT, 52), 255, dtype=torch.uint8))
        bars.append(pad(torch.cat([bar, stacked(words)], 2), (0, 0, 0, 1), value=255))
    scale = 'one colour scale' if len(bars) == 1 else 'a colour scale for each channel'
    return panel.picture(torch.cat(cells, 2)[:, :, :-1], ', '.join(filter(None, (note, scale))), stacked(bars))


def draw_volumes(panel: Panel) -> Tensor:
    """Draw floats (n, C, D, H, W) as heat maps of their middle slices: H x W, D x W below it, H x D at its right."""

    def slices(x: Tensor) -> Tensor:  # (n, C, H + 1 + D, W + 1 + D), adjacent slices share an axis
        d, h, w = x.shape[2:]
        left = torch.cat([pad(x[:, :, d // 2], (0, 0, 0, 1)), x[:, :, :, h // 2]], 2)
        return torch.cat([pad(left, (0, 1)), pad(x[..., w // 2].mT, (0, 0, 0, d + 1))], 3)

    d, h, w = panel.x.shape[2:]
    blank = torch.ones(h + 1 + d, w + 1 + d, dtype=torch.bool)
    blank[:h, :w] = blank[h + 1 :, :w] = blank[:h, w + 1 :] = False
    across = max(2, min(panel.across, WIDEST // (blank.shape[1] * factor_for(48, blank.shape, min(d, h, w)))))
    planes = dataclasses.replace(panel, x=slices(panel.x), scale=panel.scaled_by, across=across)
    return draw_fields(planes, blank, min(d, h, w), 'middle slices: H x W, D x W below, H x D at right')


def draw_signals(panel: Panel) -> Tensor:
    """Draw floats (n, C, L) as curves on one scale, a colour for each channel, with light lines at a few values, which
    are written at the right of the first row."""
    from matplotlib.ticker import MaxNLocator

    (low, high), (_, channels, length) = range_of(panel.scaled_by), panel.x.shape
    wide, tall, fine = max(panel.width(), panel.side()), 64, 3  # drawn three times as large, for smooth lines
    height = lambda value: (1 - (value - low) / (high - low)) * (tall - 4) + 2  # noqa: E731
    lines = [float(v) for v in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= v <= high]
    y = height(panel.x.double().cpu().nan_to_num(low).clamp(low, high))
    x = np.linspace(2, wide - 2, length)
    cells = []
    for curves in y.numpy():
        image = Image.new('RGB', (fine * wide, fine * tall), 'white')
        for value in lines:
            ImageDraw.Draw(image).line([(0, fine * height(value)), (fine * wide, fine * height(value))], LIGHT, fine)
        for i, curve in enumerate(curves):
            points = [(fine * float(a), fine * float(b)) for a, b in zip(x, curve, strict=True)]
            ImageDraw.Draw(image).line(points, COLOURS[i % len(COLOURS)], fine)
        cells.append(np.array(image.resize((wide, tall), Image.Resampling.LANCZOS)))
    axis = torch.full((3, tall, max(text_width(f'{v:.6g}') for v in [*lines, 0]) + 6), 255, dtype=torch.uint8)
    for value in lines:
        top = min(max(round(height(value)) - LINE_HEIGHT // 2, 0), tall - LINE_HEIGHT)
        axis[:, top : top + LINE_HEIGHT] = rendered_text(f'{value:.6g}', axis.shape[2])
    words = [f'channel {i}' for i in range(channels)]
    names = [rendered_text(word, text_width(word), colour) for word, colour in zip(words, COLOURS, strict=False)]
    legend = axis if channels == 1 else join_pictures([axis, stacked(names)], 2)
    note = f'{length} points, values from {low:.3g} to {high:.3g}'
    return panel.picture(torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2), note, legend)


# ---------------------------------------------------------------- points in the plane


def draw_points(panel: Panel) -> Tensor:
    """Draw points (n, 2) with equal axes, a colour for each class: samples in front of the data in grey, or of contours
    of the density; or paths, each a line from a black dot to a coloured one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=100, layout='constrained')
    ax, points, names = figure.add_subplot(aspect='equal', adjustable='datalim'), panel.x.double().cpu(), panel.names
    points = torch.where(points.isfinite(), points, torch.nan)
    if panel.times:
        paths, names = points.view(-1, 2, len(panel.times), 2)[:, 0], names[::2]  # (n, states, 2)
        ax.plot(*paths.permute(2, 1, 0).numpy(), color='grey', linewidth=0.4, alpha=0.5, zorder=1)
        ax.scatter(*paths[:, 0].T.numpy(), s=3, color='black', linewidths=0)
        shown = paths[:, -1]
    else:
        shown, names = points[panel.real :], names[panel.real :]
        ax.scatter(*points[: panel.real].T.numpy(), s=3, color='silver', linewidths=0)
    if panel.scale is not None:
        ax.update_datalim(panel.scale[panel.scale.isfinite().all(1)].double().cpu().numpy())
    classes = list(dict.fromkeys(names))
    for i, name in enumerate(classes or ['']):
        chosen = torch.tensor([not names or other == name for other in names or shown])
        text = name.replace('$', r'\$')  # $ does not begin a formula
        marker, colour = MARKERS[i // len(COLOURS) % len(MARKERS)], COLOURS[i % len(COLOURS)]
        ax.scatter(*shown[chosen].T.numpy(), s=6, c=colour, marker=marker, label=text, alpha=0.7, linewidths=0)
    if panel.density is not None:
        ax.apply_aspect()
        x, y = (np.linspace(*limits, 200) for limits in (ax.get_xlim(), ax.get_ylim()))
        density = panel.density(torch.from_numpy(np.stack(np.meshgrid(x, y), -1)).reshape(-1, 2)).view(200, 200).numpy()
        if (peak := density.max()) > np.finfo(float).tiny:  # it is 0 everywhere around points that are far away
            ax.contour(x, y, density, peak * np.array([0.05, 0.5]), colors='grey', linewidths=0.8, zorder=0)
    if 1 < len(classes) <= 10:
        figure.legend(loc='outside lower center', ncols=5, fontsize=7, markerscale=2, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    title = ', '.join(filter(None, (panel.title, 'grey lines: density of the data' if panel.density else '')))
    return titled(torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1), title)


# kind -> (whether decoded samples x are of this kind, f(panel): a picture (3, H, W) uint8). The last that fits is used.
KINDS: dict[str, tuple[Callable[[Tensor], bool], Callable[[Panel], Tensor]]] = {
    'signals': (lambda x: x.ndim == 3, draw_signals),
    'points': (lambda x: x.ndim == 2 and x.shape[1] == 2, draw_points),
    'volumes': (lambda x: x.ndim == 5, draw_volumes),
    'fields': (lambda x: x.ndim == 4, draw_fields),
    'images': (lambda x: x.ndim == 4 and x.shape[1] in IN_FILES, draw_images),  # in [0, 1]
}


def kind(x: Tensor, are_images: bool = True) -> str | None:
    """The key of KINDS for decoded samples x (n, ...), or None. `are_images` is False if x may leave [0, 1]."""
    fit = [name for name, (fits, _) in KINDS.items() if fits(x) and (are_images or name != 'images')]
    return fit[-1] if fit else None
