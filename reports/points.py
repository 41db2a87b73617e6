"""Pictures of points in the plane: scatter plots with classes, the exact density, and paths."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Density = Callable[[Tensor], Tensor]  # (N, 2) -> (N,)


def scatter(
    sets: Sequence[Tensor], titles: Sequence[str] = (), label: Tensor | None = None, density: Density | None = None
) -> Tensor:
    """Points (n, 2) of each set in a plot of its own, then the density that they should have: (3, H, W) uint8.

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
        (left, right), (low, high) = axes[len(sets) - 1].get_xlim(), axes[len(sets) - 1].get_ylim()
        x, y = np.linspace(left, right, 100), np.linspace(low, high, 100)
        grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1)).reshape(-1, 2)
        axes[-1].pcolormesh(x, y, density(grid).reshape(100, 100).numpy(), cmap='magma', shading='nearest')
        axes[-1].set_title('exact density', fontsize=10)
    return rendered(figure)


def paths(frames: Sequence[Tensor], label: Tensor | None = None) -> Tensor:
    """The path of each point, frames (n, 2) from first to last, as a line that ends in a dot: (3, H, W)."""
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * n, 4), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, n, squeeze=False)[0]
    for ax in axes:
        ax.set_aspect('equal')
    return figure, axes


def limit(ax, points: Tensor) -> None:
    """Equal axes that hold the finite points, with some room."""
    points = points[points.isfinite().all(1)].double().cpu()
    if len(points) == 0:
        return
    low, high = points.amin(0), points.amax(0)
    half = 0.55 * max(float((high - low).max()), 1e-6)
    for axis, centre in zip('xy', ((low + high) / 2).tolist(), strict=True):
        ax.set(**{f'{axis}lim': (centre - half, centre + half)})


def rendered(figure) -> Tensor:
    """The figure as (3, H, W) uint8."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format='png')
    return torch.from_numpy(np.array(Image.open(file).convert('RGB'))).permute(2, 0, 1)
