"""Pictures of each kind of data: the table KINDS, heat maps, curves, and points in the plane."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import pad

from reports.plots import LINE_HEIGHT, Panel, draw_images, enlarged, range_of, rendered_text, stacked, titled

IN_FILES = (1, 3, 4)  # channels that a PNG can hold
# Colours that colour-blind people tell apart (Okabe and Ito 2008), the strongest first.
COLOURS = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7', '#000000')
MARKERS = 'os^Dvp*'  # a class takes the next marker when all colours have been used with the one before


def draw_fields(panel: Panel) -> Tensor:
    """Draw floats (n, C, H, W) as heat maps, channels below each other, each with a colour bar of its own range."""
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps['viridis'](np.arange(256))[:, :3] * 255).round().to(torch.uint8)  # (256, 3)
    cells, bars, factor = [], [], -(-panel.side() // min(panel.x.shape[2:]))
    for channel in panel.x.float().cpu().unbind(1):
        low, high = range_of(channel)
        shades = ((channel - low) / (high - low) * 255).nan_to_num(0).clamp(0, 255).round().long()
        cell = enlarged(colours[shades].permute(0, 3, 1, 2), factor)
        cells.append(pad(cell, (0, 0, 0, 1), value=255))
        h = cell.shape[2]
        bar = colours[torch.linspace(255, 0, h).round().long()].T[:, :, None].expand(3, h, 10)
        words = [rendered_text(f'{value:.3g}', 52) for value in (high, low)]  # as wide as -0.000123
        words.insert(1, torch.full((3, h - 2 * LINE_HEIGHT, 52), 255, dtype=torch.uint8))
        bars.append(pad(torch.cat([bar, stacked(words)], 2), (0, 0, 0, 1), value=255))
    return panel.picture(torch.cat(cells, 2)[:, :, :-1], legend=stacked(bars))


def draw_signals(panel: Panel) -> Tensor:
    """Draw floats (n, C, L) as curves on one scale, a colour for each channel."""
    low, high = range_of(panel.x)
    wide, tall, fine = max(96, panel.side()), 64, 3  # drawn at three times the size, then scaled down, for smooth lines
    y = (1 - (panel.x.double().cpu().nan_to_num(low) - low) / (high - low)) * (tall - 4) + 2
    x = np.linspace(2, wide - 2, y.shape[2])
    cells = []
    for curves in y.numpy():
        image = Image.new('RGB', (fine * wide, fine * tall), 'white')
        for i, curve in enumerate(curves):
            points = [(fine * float(a), fine * float(b)) for a, b in zip(x, curve, strict=True)]
            ImageDraw.Draw(image).line(points, COLOURS[i % len(COLOURS)], fine)
        cells.append(np.array(image.resize((wide, tall), Image.Resampling.LANCZOS)))
    return panel.picture(torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2), f'values from {low:.3g} to {high:.3g}')


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
    'fields': (lambda x: x.ndim == 4, draw_fields),
    'images': (lambda x: x.ndim == 4 and x.shape[1] in IN_FILES, draw_images),  # in [0, 1]
}


def kind(x: Tensor, are_images: bool = True) -> str | None:
    """The key of KINDS for decoded samples x (n, ...), or None. `are_images` is False if x may leave [0, 1]."""
    fit = [name for name, (fits, _) in KINDS.items() if fits(x) and (are_images or name != 'images')]
    return fit[-1] if fit else None
