"""report.html: one page with the pictures, numbers, curves and settings of a run, without a server or a network.

A run rewrites its own report.html whenever it draws samples. `compare.py` puts several runs on one page.
"""

import fnmatch
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import PRESETS, Config, SettingError
from reports.curves import CURVES, MAIN, NOTES, RECORD, plot, sweep_plots
from reports.parts import blocks as blocks
from reports.parts import escaped, html_page, images, row, table, text_of
from runtime import files
from runtime.alive import duration
from settings.same_run import FREE_ON_RESUME, class_defaults, migrated
from utils import caption

COLUMNS = (  # names in a table of evaluations, in this order
    'weights solver time_grid nfe guidance_scale num seed detector label_agreement real_label_agreement frechet '
    'real_frechet real_frechet_std wasserstein real_wasserstein real_wasserstein_std kid precision recall density '
    'coverage nearest_neighbour_ratio eval/reference bits_per_dim bits_per_dim_error'
).split()
STARTED = ('time', 'step', 'training', 'host', 'device', 'processes', 'trainer', 'commit', 'command')
CARD = '<div>{}<br><b>{}</b><p>{}</p><p class="faint">Good: {}</p></div>'
EARLIER = 3  # pictures of earlier steps, at most
# Settings for where a run and its record are stored; they do not change what it does.
PLACES = ('experiment_name', 'ckpt_dir', 'wandb', 'wandb_project', 'wandb_entity')
RECORDS = Path(__file__).parents[1] / 'docs/records'  # a folder for each preset, made by benchmarks/records.py
GAUSSIAN = 'eval/reference_gaussian'
# The numbers on top: name in the record -> title, meaning, what is good (by a level {} | if it is unknown), its name
MEANINGS = {
    'eval/reference': (
        'Reference loss', 'Squared error of the velocity on held-out data, comparable between all runs of a data set.',
        'well below {}, the loss of a model that knows only the mean and variance | the lower the better', GAUSSIAN,
    ),
    'label_agreement': (
        'Label agreement', 'Share of samples that a classifier of real images assigns to the requested class.',
        '{}, its share on held-out images | near 1', 'real_label_agreement',
    ),
    'frechet': (
        'Frechet distance', 'Distance of the samples as a whole from the training data.',
        'near {}, the distance of as many real items | near the distance of as many real items', 'real_frechet',
    ),
    'wasserstein': (
        'Wasserstein distance', 'How far the samples must be moved to match the training points.',
        'near {}, the distance of as many real points | near the distance of as many real points', 'real_wasserstein',
    ),
    'nearest_neighbour_ratio': (
        'Nearest-neighbour ratio', 'Distance from samples to the nearest training item, relative to held-out items.',
        'about 1; well below 1: training items were memorised; well above: samples lie off the data', '',
    ),
    'eval/loss': ('Held-out loss', 'The loss of the raw weights on held-out data.', 'near the training loss', ''),
}  # fmt: skip


@dataclass
class Run:
    """The contents of a run's folder."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # metrics.jsonl
    starts: list[dict[str, Any]] = field(default_factory=list)  # run.json
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # evaluation.jsonl

    @property
    def step(self) -> int:
        return self.lines[-1]['train/step'] if self.lines else 0

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one name of the record."""
        points = [(line['train/step'], line[name]) for line in self.lines if isinstance(line.get(name), (int, float))]
        return [step for step, _ in points], [value for _, value in points]

    def names(self, patterns: Sequence[str]) -> list[str]:
        """Names in the record that match `patterns`; a * matches anything but times."""
        found = list(dict.fromkeys(name for line in self.lines for name in line))
        alike = [(pattern, name) for pattern in patterns for name in found if ('_t_' in pattern) == ('_t_' in name)]
        return [name for pattern, name in alike if fnmatch.fnmatchcase(name, pattern)]

    def bounds(self, names: Sequence[str]) -> tuple[dict[str, float], float | None]:
        """(curve -> floor, reference loss of a model that knows only mean and variance): evaluation/reference.py."""
        level_of = {name: name.replace('loss', 'floor').replace('reference', 'reference_floor') for name in names}
        found = {level: self.curve(level)[1][-1:] for level in (*level_of.values(), GAUSSIAN)}  # [value] or []
        floors = {name: found[level][0] for name, level in level_of.items() if level != name and found[level]}
        return floors, next(iter(found[GAUSSIAN]), None) if list(names) == ['eval/reference'] else None

    def final(self) -> dict[str, float]:
        """The last value of each number in the record that says how good the run is."""
        last = {name: value for line in self.lines for name, value in line.items() if '_t_' not in name}
        hidden = (GAUSSIAN, 'eval/reference_floor')
        return {k: v for k, v in last.items() if k.startswith(('eval/', 'final/')) and k not in hidden}

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the preset."""
        default = as_json(vars(Config()) | PRESETS.get(self.config['preset'], {}))
        return {k: v for k, v in self.config.items() if k not in PLACES and (k not in default or default[k] != v)}

    @property
    def sampler(self) -> str:
        """Name of the first sampler in the final numbers; before there are any, the solver of the settings."""
        found = (name.split('/')[1] for line in self.lines for name in line if name.startswith('final/'))
        return next(found, str(self.config.get('solver')))

    def chosen(self) -> dict[str, tuple[Any, str, str]]:
        """title -> (value, meaning, what is good) of at most four numbers, from MEANINGS or the experiment. Numbers for
        samples are from the first sampler, and final if there are any."""
        last = {name: value for line in self.lines for name, value in line.items()}
        for before in (f'eval/{self.sampler}/', f'final/{self.sampler}/'):
            last |= {name.removeprefix(before): value for name, value in last.items() if name.startswith(before)}
        own = [name for name in last if '/' not in name and name not in COLUMNS]  # the experiment's numbers
        own = [name for name in own if not re.search(r'_(std|p\d\d)$', name)]  # without spreads and percentiles
        found = {}
        for name in [name for name in [*list(MEANINGS)[:-1], *own, *list(MEANINGS)[-1:]] if name in last][:4]:
            title, meaning, good, level = MEANINGS.get(name, (name, 'Computed by this experiment.', '', ''))
            with_level, _, without = good.partition(' | ')
            good = with_level.format(text_of(last[level])) if level in last else without or good
            found[title] = last[name], meaning, good
        return found

    def pictures(self) -> list[list[Path]]:
        """The sample pictures of each step, the oldest step first. Within a step, pictures of the weights by which the
        run is judged come first, beginning with the first sampler."""
        judged = next((f'_ema_{decay:g}' for decay in self.config.get('ema_decays', ())), '_raw')

        def order(path: Path) -> tuple:
            step, other = path.name.split('_')[1].zfill(12), f'_{self.sampler}_' not in path.stem
            return step, not path.stem.endswith(judged), path.stem.endswith('_raw'), other, path.name

        paths = sorted((self.folder / 'samples').glob('step_*.png'), key=order)
        return [list(group) for _, group in itertools.groupby(paths, lambda path: order(path)[0])]

    def same_noise(self) -> list[Path]:
        """The pictures of all steps with the sampler and weights of the newest one, the oldest first."""
        groups, drawn_by = self.pictures(), lambda path: path.stem.split('_')[2:]
        return [path for group in groups for path in group if drawn_by(path) == drawn_by(groups[-1][0])]

    def own_pictures(self) -> list[Path]:
        """The pictures that the experiment named itself; of names that differ only in step_N, the newest."""
        padded = lambda path: re.sub(r'\d+', lambda number: number[0].zfill(12), path.name)  # noqa: E731
        paths = sorted((self.folder / 'samples').glob('*.png'), key=padded)
        newest = {re.sub(r'step_\d+', '', path.stem): path for path in paths if not path.stem.startswith('step_')}
        return [path for path in newest.values() if path.stem != 'data_and_augmented']


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as config.json has them: lists in place of tuples."""
    return json.loads(json.dumps(settings))


def lines_in(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, without a last line that a kill has cut; none if there is no file."""
    return [json.loads(line) for line in path.read_text().split('\n')[:-1] if line] if path.exists() else []


def read(folder: str | Path) -> Run:
    """Read the folder of a run. Raises SettingError if it is not one."""
    folder = Path(folder)
    try:
        config = migrated(json.loads((folder / 'config.json').read_text()))
        starts = json.loads((folder / 'run.json').read_text()) if (folder / 'run.json').exists() else []
        return Run(folder, config, lines_in(folder / 'metrics.jsonl'), starts, lines_in(folder / 'evaluation.jsonl'))
    except (OSError, ValueError) as error:
        raise SettingError(f'{str(folder)!r} is not the folder of a run ({error}). Pass ckpts/NAME.') from None


def record_for(run: Run) -> Run | None:
    """The kept record of the run's preset, if settings that shape learning, except the seed, and trainer are equal."""
    folder, free = RECORDS / str(run.config.get('preset')), FREE_ON_RESUME - {'data_path'} | {'seed'}
    if not (folder / 'config.json').exists():
        return None

    def experiment(run: Run) -> tuple:
        settings = as_json(class_defaults(Config)) | run.config  # a setting that a record lacks is newer
        return {k: v for k, v in settings.items() if k not in free}, (run.starts[-1:] or [{}])[0].get('trainer')

    kept = read(folder)
    return kept if experiment(run) == experiment(kept) else None


# ---------------------------------------------------------------- the report of one run


def report(run: Run) -> str:
    """The page of one run."""
    newest, same = [[], *run.pictures()][-1], run.same_noise()[:-1]
    earlier = same[:: max(1, -(-len(same) // EARLIER))]
    strip = {
        'Data': images({run.folder / 'samples/data_and_augmented.png': 'as read, and as prepared for training'}),
        'Newest samples': images({path: caption(path.stem) for path in newest[:1]}),
        'The same noise at earlier steps': images({path: caption(path.stem).partition(', ')[0] for path in earlier}),
    }
    numbers = [CARD.format(*map(escaped, (title, *about))) for title, about in run.chosen().items()]
    curves = {title: figure(run, title) for title in CURVES}
    head, *rows = list(zip(*evaluations(run.evaluations), strict=True)) or [()]  # a column per evaluation
    each = lambda paths: row([images({path: caption(path.stem)}) for path in paths])  # noqa: E731
    return html_page(
        f'{run.folder.name}: step {run.step} of {run.config.get("num_training_steps", 0)}',
        {
            '': row([f'<section><h2>{title}</h2>{text}</section>' for title, text in strip.items() if text], 'strip'),
            'Numbers': row(numbers, 'cards') + state(run),
            'Curves': row([curves.pop(title) for title in MAIN]),
        },
        {
            'Other curves': row(list(curves.values())),
            'Evaluations': table(rows, head) + row(sweep_plots(run.evaluations)) if rows else '',
            'Paths of the newest samples': images({run.folder / 'path.png': 'from the start of sampling to its end'}),
            'Other samplers and weights': each(newest[1:]),
            'Other pictures, the newest of each name': each(run.own_pictures()),
            'All numbers': table(sorted(run.final().items())),
            'Settings that differ from the preset': table(sorted(run.changed().items())),
            'Starts': table([started(run, i) for i in range(len(run.starts))], STARTED),
        },
    )


def figure(run: Run, title: str) -> str:
    """The plot of a title of CURVES, with its note; '' if the record has no curve for it."""
    names = run.names(CURVES[title])
    curves = {name: run.curve(name) for name in names}
    if names and title in ('loss', 'reference loss') and (record := record_for(run)):
        curves[RECORD] = record.curve(CURVES[title][0])
    svg = plot(curves, title, *run.bounds(names))
    return f'<figure>{svg}<figcaption>{NOTES.get(title, "")}</figcaption></figure>' if svg else ''


def state(run: Run) -> str:
    """A paragraph about when the final numbers will come; '' if they are there, or if there will be none."""
    total = run.config.get('num_training_steps', 0)
    if not run.config.get('final_eval') or any(name.startswith('final/') for name in run.final()):
        return ''
    after = 'follow after the last step' if run.step < total else 'are being computed, if there are any for these data'
    return f'<p class="faint">Step {run.step:,} of {total:,}: the final numbers {after}.</p>'


def started(run: Run, i: int) -> list[Any]:
    """The cells of the i-th start, in the order of STARTED; the training time is computed from the recorded speed."""
    begin, end = ([start.get('step', 0) for start in run.starts] + [run.step])[i : i + 2]
    seconds, trainer = 0.0, run.starts[i].get('trainer') or {}
    for line in run.lines:
        if begin < line['train/step'] <= end and line.get('train/images_per_second'):
            images = (line['train/step'] - begin) * run.config['global_batch_size']
            seconds, begin = seconds + images / line['train/images_per_second'], line['train/step']
    where = ':'.join(trainer[part] for part in ('file', 'name') if trainer.get(part))
    time, commit = str(run.starts[i].get('time'))[:16].replace('T', ' '), (run.starts[i].get('commit') or '')[:10]
    more = dict(training=duration(seconds), trainer=where, time=time, commit=commit)
    return [(run.starts[i] | more).get(name) for name in STARTED]


def evaluations(lines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The lines of evaluation.jsonl as rows of a table; the first row has the names of COLUMNS that occur. A line with
    num_sample_steps has `N steps` as its nfe."""
    columns = [name for name in COLUMNS if any(line.get(name) is not None for line in lines)]
    with_steps = [dict(line, nfe=line.get('nfe') or f'{line.get("num_sample_steps")} steps') for line in lines]
    return [columns, *[[line.get(name) for name in columns] for line in with_steps]]


def update(folder: Path) -> None:
    """Write report.html of a run. On failure, print a warning and let the run continue."""
    try:
        files.write_text(folder / 'report.html', report(read(folder)))
    except Exception as error:  # a broken page must not end the run
        print(f'warning: {folder}/report.html could not be written ({type(error).__name__}: {error})', flush=True)
