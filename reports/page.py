"""What a run's folder holds, as one page that needs no server and no network: curves, pictures, settings, numbers.

A run rewrites its own report.html whenever it draws samples. `compare.py` puts several runs on one page.
"""

import base64
import fnmatch
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import PRESETS, Config, SettingError
from runtime import files
from settings.same_run import migrated

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --line: #ccc; --faint: #777 }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #ddd; --line: #444; --faint: #999 } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2em auto;
       max-width: 78em; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } figcaption, .faint { color: var(--faint) }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top;
       border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
.row { display: flex; flex-wrap: wrap; gap: 1em 2em } figure { margin: 0 }
figure { overflow-x: auto; max-width: 100% } img { image-rendering: pixelated }
svg { max-width: 100%; height: auto; color: var(--text) } pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""
# Curves of a report: title -> names in the record; * stands for the rest of a name.
CURVES: dict[str, tuple[str, ...]] = {
    'loss': ('train/loss', 'eval/loss*'),
    'reference loss': ('eval/reference',),
    'Frechet distance of samples': ('eval/*/frechet*',),
    'training loss by time': ('train/loss_t_*',),
    'reference loss by time': ('eval/reference_t_*',),
    'gradient norm': ('train/grad_norm*',),
    'learning rate': ('train/lr',),
    'images per second': ('train/images_per_second',),
    'share of time waiting for data': ('train/waiting',),
}
GAUSSIAN, LINEAR = 'eval/reference_gaussian', ('images per second', 'share of time waiting for data', 'learning rate')
COLUMNS = (  # of a table of evaluations
    'weights solver time_grid nfe guidance_scale num seed detector label_agreement frechet real_frechet '
    'real_frechet_std wasserstein real_wasserstein real_wasserstein_std kid precision recall density coverage '
    'nearest_neighbour_ratio eval/reference bits_per_dim bits_per_dim_error'
).split()
PLACES = ('experiment_name', 'ckpt_dir')  # settings that tell where a run is, not what it does
STARTED = ('time', 'command', 'commit', 'host', 'device', 'processes', 'trainer')


@dataclass
class Run:
    """What the folder of a run holds."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    starts: list[dict[str, Any]] = field(default_factory=list)  # of run.json
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # of evaluation.jsonl

    @property
    def step(self) -> int:
        return self.lines[-1]['train/step'] if self.lines else 0

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one name of the record."""
        points = [(line['train/step'], line[name]) for line in self.lines if isinstance(line.get(name), (int, float))]
        return [step for step, _ in points], [value for _, value in points]

    def names(self, patterns: Sequence[str]) -> list[str]:
        """Names of the record that are among `patterns`, in which a * stands for anything but times."""
        found = list(dict.fromkeys(name for line in self.lines for name in line))
        alike = [(pattern, name) for pattern in patterns for name in found if ('_t_' in pattern) == ('_t_' in name)]
        return [name for pattern, name in alike if fnmatch.fnmatchcase(name, pattern)]

    def bounds(self, names: Sequence[str]) -> tuple[dict[str, float], float | None]:
        """(floors of the curves that have one, the reference loss of what has learned nothing), see reference.py."""
        level_of = {name: name.replace('loss', 'floor').replace('reference', 'reference_floor') for name in names}
        found = {level: self.curve(level)[1][-1:] for level in (*level_of.values(), GAUSSIAN)}  # [value] or []
        floors = {name: found[level][0] for name, level in level_of.items() if level != name and found[level]}
        return floors, next(iter(found[GAUSSIAN]), None) if list(names) == ['eval/reference'] else None

    def final(self) -> dict[str, float]:
        """The last value of each name of the record that tells how good the run is."""
        last = {name: value for line in self.lines for name, value in line.items() if '_t_' not in name}
        hidden = (GAUSSIAN, 'eval/reference_floor')
        return {k: v for k, v in last.items() if k.startswith(('eval/', 'final/')) and k not in hidden}

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the preset's."""
        default = as_json(vars(Config()) | PRESETS.get(self.config['preset'], {}))
        return {k: v for k, v in self.config.items() if k not in PLACES and (k not in default or default[k] != v)}

    def pictures(self) -> list[list[Path]]:
        """The sample pictures of each step, the oldest first."""
        paths = sorted((self.folder / 'samples').glob('step_*.png'))
        return [list(group) for _, group in itertools.groupby(paths, lambda path: path.name.split('_')[1])]

    def own_pictures(self) -> list[Path]:
        """The pictures that an experiment gave other names: of names that differ in their step_N only, the newest."""
        paths = sorted((self.folder / 'samples').glob('*.png'))
        newest = {re.sub(r'step_\d+', '', path.stem): path for path in paths if not path.stem.startswith('step_')}
        return [path for path in newest.values() if path.stem != 'data_and_augmented']


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as config.json has them: lists in place of tuples."""
    return json.loads(json.dumps(settings))


def lines_in(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, without a last one that a kill has cut; none if there is no file."""
    return [json.loads(line) for line in path.read_text().split('\n')[:-1] if line] if path.exists() else []


def read(folder: str | Path) -> Run:
    """Raises SettingError if the folder is not that of a run."""
    folder = Path(folder)
    try:
        config = migrated(json.loads((folder / 'config.json').read_text()))
        starts = json.loads((folder / 'run.json').read_text()) if (folder / 'run.json').exists() else []
        return Run(folder, config, lines_in(folder / 'metrics.jsonl'), starts, lines_in(folder / 'evaluation.jsonl'))
    except (OSError, ValueError) as error:
        raise SettingError(f'{str(folder)!r} is not the folder of a run ({error}). Pass ckpts/NAME.') from None


# ---------------------------------------------------------------- parts of a page

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> x, y
Bands = Mapping[str, Sequence[float]]  # name -> half a width at each point
NONE: Mapping[str, Any] = {}
GREY = '#808080'  # seen on white and on black
THEME: dict[str, Any] = {
    'svg.fonttype': 'none',  # letters stay letters
    **dict.fromkeys(('figure.facecolor', 'axes.facecolor'), 'none'),
    **dict.fromkeys(('axes.edgecolor', 'axes.titlecolor', 'xtick.color', 'ytick.color', 'legend.labelcolor'), GREY),
    **{'legend.fontsize': 7, 'legend.framealpha': 0},
}


def plot(curves: Curves, title: str, floors: Any = NONE, ceiling: float | None = None, bands: Bands = NONE) -> str:
    """Curves (x, y) as an <svg> element on no background; empty if there is no point. `floors`: for some of the curves,
    the level that they cannot get below, dotted. `ceiling`: with one floor, the range between the two is shaded.
    `bands`: for some of the curves, half the width of a band around each of their points."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves, file = {name: xy for name, xy in curves.items() if xy[0]}, io.StringIO()
    if not curves:
        return ''
    with rc_context(THEME):
        figure = Figure(figsize=(5.4, 3.2))
        draw(figure, curves, title, floors, ceiling, bands)
        figure.savefig(file, format='svg', metadata={'Date': None})
    text = file.getvalue()
    return text[text.index('<svg') :]


def draw(figure: Any, curves: Curves, title: str, floors: Any, ceiling: float | None, bands: Bands) -> None:
    """`plot` on a figure. Curves by time share a scale of colours, and have room for their legend on the right."""
    from matplotlib import colormaps

    by_time = all('_t_' in name for name in curves)
    ax = figure.add_axes((0.15, 0.1, 0.64 if by_time else 0.83, 0.8))
    lowest = min(value for _, y in curves.values() for value in y)
    for i, (name, (x, y)) in enumerate(curves.items()):
        color = colormaps['viridis'](0.1 + 0.8 * i / max(1, len(curves) - 1)) if by_time else f'C{i % 10}'
        label = 't ' + name.rpartition('_t_')[2].replace('_', ' to ') if by_time else name.replace('$', r'\$')
        ax.plot(x, y, color=color, label=label, linewidth=1.3, marker='.' if len(x) < 3 else None)
        if name in bands:
            low, high = ([v + side * w for v, w in zip(y, bands[name], strict=True)] for side in (-1, 1))
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        if name in floors and floors[name] > lowest / 20:  # a floor of next to nothing would squeeze the curves
            ax.axhline(floors[name], color=color, linestyle=':', linewidth=1, label=None if by_time else 'floor')
    if ceiling is not None:
        ax.axhspan(max(floors.values(), default=0), ceiling, color=GREY, alpha=0.15, label='what can be learned')
    if not title.startswith(LINEAR) and lowest > 0:
        logarithmic(ax)
    ax.set_title(title.replace('$', r'\$') + (', floors dotted' if by_time and floors else ''))  # no mathematics
    if len(curves) > 1 or floors:
        ax.legend(**(dict(loc='upper left', bbox_to_anchor=(1, 1)) if by_time else {}))


def logarithmic(ax: Any) -> None:
    """A logarithmic y axis; some of its many ticks between powers of ten have a number."""
    ax.set_yscale('log')
    few = '25' if ax.get_ylim()[1] > 3 * ax.get_ylim()[0] else '123456789'
    ax.yaxis.set_major_formatter(lambda value, _: f'{value:.3g}')
    ax.yaxis.set_minor_formatter(lambda value, _: f'{value:.3g}' if f'{value:e}'[0] in few else '')


def sweep_plots(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Frechet distance against network evaluations, and against guidance, of lines of evaluation.jsonl that differ
    in them; a curve for each choice of the rest. Only of lines with the detector, number, seed and step of the last."""
    alike = [x for x in lines if all(x.get(k) == lines[-1].get(k) for k in ('detector_digest', 'num', 'seed', 'step'))]
    rows = [dict(x, nfe=x.get('nfe') or x.get('num_sample_steps')) for x in alike]
    varied = [k for k in ('weights', 'solver', 'nfe', 'guidance_scale') if len({x.get(k) for x in rows}) > 1]
    plots = []
    for along in [k for k in ('nfe', 'guidance_scale') if k in varied]:
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for x in sorted(rows, key=lambda x: x.get(along, 0)):
            name = ', '.join(f'{k} {text_of(x.get(k))}' for k in varied if k != along) or 'frechet'
            xs, ys = curves.setdefault(name, ([], []))
            xs.append(x.get(along, 0))
            ys.append(x['frechet'])
        plots.append(plot(curves, f'Frechet distance ({lines[-1]["detector"]}) by {along}'))
    return plots


def images(captions: Mapping[Path, str]) -> str:
    """PNGs with captions in a row, inside the page; those that do not exist are left out."""

    def figure(path: Path, text: str) -> str:
        source = f'data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'
        return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'

    return row([figure(path, html.escape(caption)) for path, caption in captions.items() if path.exists()])


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Rows of cells, escaped."""

    def line(cells: Sequence[Any], tag: str) -> str:
        return '<tr>' + ''.join(f'<{tag}>{html.escape(text_of(cell))}</{tag}>' for cell in cells) + '</tr>'

    return '<table>' + (line(head, 'th') if head else '') + ''.join(line(row, 'td') for row in rows) + '</table>'


def text_of(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.4g}'
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else '' if value is None else str(value)


def aligned(rows: Sequence[Sequence[Any]], justify: Callable[[str, int], str] = str.ljust) -> str:
    """A table as plain text; the first row is its head."""
    text = [[text_of(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return '\n'.join('  '.join(map(justify, line, widths)).rstrip() for line in text)


def row(parts: Sequence[str]) -> str:
    return f'<div class="row">{"".join(parts)}</div>' if any(parts) else ''


def page(title: str, sections: Mapping[str, str]) -> str:
    """The whole document; sections that are empty are left out."""
    body = ''.join(f'<h2>{html.escape(name)}</h2>{text}' for name, text in sections.items() if text)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n'
    )


# ---------------------------------------------------------------- the report of one run


def report(run: Run) -> str:
    """The page of one run."""
    start = run.starts[-1] if run.starts else {}
    names = {title: run.names(patterns) for title, patterns in CURVES.items()}
    plots = [plot({n: run.curve(n) for n in shown}, title, *run.bounds(shown)) for title, shown in names.items()]
    head, *rows = evaluations(run.evaluations)
    captions = [{path: path.stem for path in paths} for paths in run.pictures()]
    return page(
        f'{run.folder.name}: step {run.step} of {run.config.get("num_training_steps", 0)}',
        {
            'Numbers': table(sorted(run.final().items())),
            'Evaluations': table(rows, head) + row(sweep_plots(run.evaluations)) if rows else '',
            'Curves': row(plots),
            'Newest samples': images(captions[-1] if captions else {}),
            'First samples': images(captions[0] if len(captions) > 1 else {}),
            'Newest samples on their way': images({run.folder / 'path.png': 'from what they started from, left'}),
            'Newest of other pictures': images({path: path.stem for path in run.own_pictures()}),
            'Data': images({run.folder / 'samples/data_and_augmented.png': 'as loaded, and as training sees them'}),
            'Settings that differ from the preset': table(sorted(run.changed().items())),
            'Started': table([(name, start[name]) for name in STARTED if name in start]),
        },
    )


def evaluations(lines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Lines of evaluation.jsonl as a table, the names of COLUMNS that occur first. Where steps were given, they stand
    for evaluations."""
    columns = [name for name in COLUMNS if any(line.get(name) is not None for line in lines)]
    with_steps = [dict(line, nfe=line.get('nfe') or f'{line.get("num_sample_steps")} steps') for line in lines]
    return [columns, *[[line.get(name) for name in columns] for line in with_steps]]


def update(folder: Path) -> None:
    """Write report.html of a run. A failure is printed, and the run continues."""
    try:
        files.write_text(folder / 'report.html', report(read(folder)))
    except Exception as error:  # a page is not worth a run
        print(f'warning: {folder}/report.html could not be written ({type(error).__name__}: {error})', flush=True)
