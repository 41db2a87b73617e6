"""Plots of curves as <svg> elements, for light and dark pages, with the name of each line at its end."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The plots of a report: title -> names in the record; * stands for the rest of a name.
CURVES: dict[str, tuple[str, ...]] = {
    'loss': ('train/loss', 'eval/loss*'),
    'reference loss': ('eval/reference',),
    'Frechet distance of samples': ('eval/*/frechet*',),
    'training loss by t': ('train/loss_t_*',),
    'reference loss by t': ('eval/reference_t_*',),
    'gradient norm': ('train/grad_norm*',),
    'learning rate': ('train/lr',),
    'samples per second': ('train/images_per_second',),
    'share of time waiting for data': ('train/waiting',),
}
MAIN = ('loss', 'reference loss', 'Frechet distance of samples', 'training loss by t')  # the others are folded
FROM_ZERO = ('samples per second', 'share of time waiting for data', 'learning rate')
UNITS = dict.fromkeys(('training loss by t', 'reference loss by t'), 'loss') | {
    'reference loss': 'squared error of the velocity',
    'Frechet distance of samples': 'Frechet distance',
    'share of time waiting for data': 'share',
}  # label of the y axis, where it is not the title
RECORD = 'record of this preset'  # a grey line, last in its plot
GREY = "Grey: the record of this preset (docs/records), if all settings that shape learning are the preset's."
NOTES = {
    'loss': GREY,
    'reference loss': f'On held-out data. {GREY} Dotted, if known: the loss of a model that knows only the mean and '
    'variance of each value, and the floor, the lowest possible loss on the training data, reached only by memorising '
    'them.',
    'training loss by t': 'Data are at t = 0, noise is at t = 1. Dotted: floors, where known.',
    'reference loss by t': 'Data are at t = 0, noise is at t = 1. Dotted: floors, where known.',
}
LABELS = [  # name in the record -> label at the end of its line
    (r'train/loss', 'training'),
    (r'eval/loss', 'held-out, raw'),
    (r'eval/loss_ema_(.+)', r'held-out, EMA \1'),
    (r'eval/reference', 'this run'),
    (r'.+_t_(.+)_(.+)', r't \1 to \2'),
    (r'(?:eval|final)/(.+)/[^/]+', r'\1'),
    (r'train/grad_norm_?(.*)', r'network \1'),
]
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> x, y
Bands = Mapping[str, Sequence[float]]  # name -> half the width at each point
NONE: Mapping[str, Any] = {}
# Each has a contrast of about 3 on the white and on the dark page, and colour-blind people can tell them apart.
COLOURS = ('#2b7bd1', '#d8720c', '#0a9a74', '#c4569b', '#8c8c3a', '#1f9bb5', '#8d6fd1', '#808080')
TEXT, LINE = '#0c0c0c', '#0d0d0d'  # replaced by the colours of the page
THEME: dict[str, Any] = {
    'svg.fonttype': 'none',  # text stays text
    **dict.fromkeys(('figure.facecolor', 'axes.facecolor'), 'none'),
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.titlecolor', 'xtick.labelcolor', 'ytick.labelcolor'), TEXT),
    **dict.fromkeys(('axes.edgecolor', 'xtick.color', 'ytick.color', 'grid.color'), LINE),
    **dict.fromkeys(('axes.spines.top', 'axes.spines.right'), False),
    **{'axes.grid': True, 'axes.titlelocation': 'left', 'axes.titlesize': 11, 'axes.titleweight': 'bold'},
}


def plot(
    curves: Curves, title: str, floors: Any = NONE, ceiling: float | None = None, bands: Bands = NONE, x: str = 'step'
) -> str:
    """Plot curves as an <svg> element, transparent, in the colours of the page; '' if no curve has a point.

    Colours follow the order of `curves`, so a curve keeps its colour in every plot, even where others have no points.
    Dotted lines: `floors`, curve -> the lowest level it can reach, and `ceiling`, a level above all curves.
    `bands`: curve -> half the width of a band around each of its points. `x`: the label of the x axis.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    if not any(x for x, _ in curves.values()):
        return ''
    with rc_context(THEME):
        longest = max(16, *(len(label_of(name)) for name in curves))
        figure = Figure(figsize=(3.9 + 0.09 * min(longest, 45), 3.1))
        draw(figure, curves, title, floors, ceiling, bands, x)
        figure.savefig(file, format='svg', metadata={'Date': None})
    text = file.getvalue().replace(TEXT, 'currentColor').replace(LINE, 'var(--line)')
    return text[text.index('<svg') :].replace('<svg', f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def label_of(name: str) -> str:
    """The label of a line, by LABELS."""
    for pattern, text in LABELS:
        if found := re.fullmatch(pattern, name):
            return found.expand(text).strip()
    return name


def draw(
    figure: Any, curves: Curves, title: str, floors: Any, ceiling: float | None, bands: Bands, x_name: str
) -> None:
    """Draw `plot` on a figure. Curves by time take their colours from a scale, in the order of their times."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    by_time = all('_t_' in name for name in curves)
    by_share = LinearSegmentedColormap.from_list('', (COLOURS[0], '#b04fb0', COLOURS[1]))
    kind, width = title.partition(': ')[0], figure.get_size_inches()[0]
    ax = figure.add_axes((0.75 / width, 0.15, 3 / width, 0.74))
    values = [value for _, y in curves.values() for value in y]
    ends, levels = [], {} if ceiling is None else {'mean, variance': ceiling}
    for i, (name, (x, y)) in enumerate(curves.items()):
        if not x:
            continue
        color = to_hex(by_share(i / max(1, len(curves) - 1))) if by_time else COLOURS[i % len(COLOURS)]
        color = COLOURS[-1] if name == RECORD else color
        style = ('-', '--', ':', '-.')[i // len(COLOURS) % 4] if not by_time else '-'
        ax.plot(x, y, color=color, linestyle=style, linewidth=1.6, marker='o' if len(x) < 3 else None, markersize=4)
        ends.append((x[-1], y[-1], label_of(name), color))
        if name == RECORD:
            ax.lines[-1].set_zorder(1)  # below the lines of the run
        if name in bands:
            low, high = ([v + side * w for v, w in zip(y, bands[name], strict=True)] for side in (-1, 1))
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        if name in floors and floors[name] > min(values) / 20:  # a floor near 0 would squeeze the curves
            ax.axhline(floors[name], color=color, linestyle=':', linewidth=1)
            levels |= {} if by_time else {'floor': floors[name]}
    for level in levels.values():
        ax.axhline(level, color=COLOURS[-1], linestyle=':', linewidth=1)
    last = max(x for x, *_ in ends)
    if x_name == 'step':
        ax.set_xlim(0, 1.02 * last)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        ax.xaxis.set_major_formatter(lambda value, _: f'{value:,.6g}')
    scale(ax, kind, [*values, *levels.values()])
    ax.set(xlabel=x_name, ylabel=UNITS.get(kind, kind.partition(' (')[0]))
    ax.yaxis.set_label_coords(-0.2, 0.5)
    ax.set_title(title.replace('$', r'\$'), x=-0.21, pad=10)  # $ does not begin a formula
    if len(curves) > 1 or levels:
        label_ends(ax, [*ends, *((last, level, label, TEXT) for label, level in levels.items())])


def scale(ax: Any, kind: str, values: Sequence[float]) -> None:
    """Set the y axis: from 0 for shares, speeds and rates; logarithmic if values span more than a factor of 5;
    otherwise wide enough that noise does not look like a trend."""
    low, high = min(values), max(values)
    if kind in FROM_ZERO:
        ax.set_ylim(0, 1 if kind.startswith('share') else 1.05 * high or 1)
    elif low > 0 and high > 5 * low:
        logarithmic(ax)
    elif (room := 0.1 * max(abs(low), abs(high)) - (high - low) / 2) > 0:
        ax.set_ylim(low - room, high + room)


def logarithmic(ax: Any) -> None:
    """A logarithmic y axis, with numbers at 2 and 5 between the powers of ten."""
    ax.set_yscale('log')
    ax.yaxis.set_major_formatter(lambda value, _: f'{value:.3g}')
    ax.yaxis.set_minor_formatter(lambda value, _: f'{value:.3g}' if f'{value:e}'[0] in '25' else '')


def label_ends(ax: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names (x, y, name, colour) to the right of the ends of lines, moved up or down until none overlaps another."""
    gap = min(0.08, 1.05 / len(ends))
    to_axes = ax.transData + ax.transAxes.inverted()
    at = [(to_axes.transform((x, y)), label, color) for x, y, label, color in ends]
    placed = sorted((float(y), float(x), label, color) for (x, y), label, color in at)
    heights, top = list[float](), 1.03
    for y, *_ in placed:  # up, from the lowest; then down again from the top of the plot
        heights.append(max([y, *(height + gap for height in heights[-1:])]))
    for i in reversed(range(len(heights))):
        heights[i] = top = min(heights[i], top)
        top -= gap
    for (y, x, label, color), height in zip(placed, heights, strict=True):
        ax.plot([x, 1.04], [y, height], transform=ax.transAxes, color=color, linewidth=0.5, clip_on=False)
        text = label if len(label) <= 45 else f'{label[:22]}\u2026{label[-22:]}'
        size, place = min(9.5, 115 * gap), dict(transform=ax.transAxes, va='center')
        ax.text(1.05, height, text.replace('$', r'\$'), color=color, fontsize=size, **place)


def sweep_plots(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Plots of the Frechet distance against network evaluations and against guidance, where the lines of
    evaluation.jsonl differ in these; each choice of the other settings is a curve.

    Only lines with the detector, number, seed and step of the last line count. Samples that are not finite have no
    distance."""
    known = [x for x in lines if isinstance(x.get('frechet'), (int, float))]
    alike = [x for x in known if all(x.get(k) == lines[-1].get(k) for k in ('detector_digest', 'num', 'seed', 'step'))]
    rows = [dict(x, nfe=x.get('nfe') or x.get('num_sample_steps')) for x in alike]
    varied = [k for k in ('weights', 'solver', 'nfe', 'guidance_scale') if len({x.get(k) for x in rows}) > 1]
    plots = []
    for along in [k for k in ('nfe', 'guidance_scale') if k in varied]:
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for x in sorted(rows, key=lambda x: x.get(along, 0)):
            value = lambda k, x=x: f'{x[k]:.4g}' if isinstance(x.get(k), float) else f'{x.get(k)}'  # noqa: E731
            name = ', '.join(f'{k} {value(k)}' for k in varied if k != along) or 'frechet'
            xs, ys = curves.setdefault(name, ([], []))
            xs.append(x.get(along, 0))
            ys.append(x['frechet'])
        title = f'Frechet distance ({lines[-1]["detector"]}) by {along}'
        plots.append(plot(curves, title, x=dict(nfe='network evaluations').get(along, 'guidance scale')))
    return plots
