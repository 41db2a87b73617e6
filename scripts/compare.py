"""Compare runs on one page: curves in shared plots, settings that differ, final numbers and samples side by side.

    sh run.sh compare.py ckpts/a ckpts/b ...       prints the table, and writes the page ckpts/compare.html

Runs that differ only in their seed are one row: the mean, the standard deviation over the seeds, and a band around
the curves. A difference that is not larger than these standard deviations is printed as none.

`side_by_side` trains the runs first: a method next to its baseline, as in examples/. With `--seeds 3` it trains each
with three seeds.
"""

import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import tyro

from config import Config, SettingError
from evaluation.distances import NOT_PRINTED
from reports import page
from reports.parts import Markup, blocks, images
from reports.seeds import Group, cells, changes_of, compares, grouped, text_of_changes
from runtime import command, files
from settings.same_run import FREE_ON_RESUME, changes, cut_middle, folder_name, in_name, older_folder_name
from utils import caption


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of the runs."""
    out: str = ''
    """Page to write; empty: compare.html next to the first run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and compare the runs."""
    options = command.options(Compare, argv, __doc__, 'runs', 'out')
    command.run(lambda: compare(options))


def compare(options: Compare) -> None:
    """Print the table and write the page. Raises SettingError."""
    from runtime.ranks import print_once

    if len(options.runs) < 2:
        raise SettingError('Pass two or more folders of runs: compare.py ckpts/a ckpts/b.')
    runs, folders = [page.read(folder) for folder in options.runs], folder_names(options.runs)
    if len({run.config.get('dataset') for run in runs}) > 1:
        print_once('warning: these runs are of different data sets, so their numbers cannot be compared')
    groups = grouped(runs)
    sizes = [len(group) for group in groups]
    first = [group[0] for group in groups]
    names = [folders[runs.index(run)] for run in first]
    labels = legend_labels(first, names)
    rows = [*([['run', *names]] if labels != names else []), *differing_settings(first)]
    table = numbers(groups)
    printed = [
        row for row in table if row[0] == 'step' or (compares(row[0]) and row[0].rpartition('/')[2] not in NOT_PRINTED)
    ]
    print_once('\n' + blocks([['', *labels], *rows, *cells(printed, sizes)]))
    print_once(text_of_changes(table, labels))
    path = Path(options.out or Path(options.runs[0]).parent / 'compare.html').expanduser()
    write_page(path, groups, names, labels)
    print_once(f'\n  page        {path}')


def side_by_side(
    parts: Mapping[str, Mapping[str, Any]],
    numbers: Sequence[str] = ('final/*',),
    default_flags: str = '',
    argv: Sequence[str] | None = None,
    config_class: type[Config] = Config,
) -> None:
    """Train several runs, one after the other, with the same seed, data and flags, and print their numbers. With
    `--seeds N` on the command line each is trained with N seeds, starting with `--seed`.

    `parts`: name of a run -> the settings in which it differs, and its `trainer_class`; a setting may be a function of
    the shared config. `numbers`: names in the record to show, where * stands for anything. `default_flags` come before
    the command line, which overrides them. A run is named after the script, the flags that differ from them, and the
    part. The same command resumes. Exits like main.main; a flag that a part would override is a SettingError.
    """
    from main import flags

    seeds, words = command.parsed(lambda: take_seeds(sys.argv[1:] if argv is None else argv))
    config = flags([*default_flags.split(), *words], config_class, object)  # the parts may read any setting
    before = flags(default_flags.split(), config_class, object)
    if config.experiment_name == config.default_name():
        changed = [in_name(name, now) for name, (_, now) in changes(dataclasses.asdict(before), config).items()]
        parts_of_name = [Path(sys.argv[0]).stem, *changed]
        older = older_folder_name(parts_of_name)  # continue runs that an older version has named
        name = older if any(Path(config.ckpt_dir).glob(f'{older}_*')) else folder_name(parts_of_name)
        config = dataclasses.replace(config, experiment_name=name)

    def work() -> None:
        from main import start
        from runtime import ranks

        folders: list[list[str]] = [[] for _ in parts]
        runs_of_seeds = [part_runs(parts, with_seed(config, i), before) for i in range(seeds)]
        for runs in runs_of_seeds:
            for part_folders, (part, (current, trainer_class)) in zip(folders, runs.items(), strict=True):
                ranks.print_once(f'\n{part}{f", seed {current.seed}" if seeds > 1 else ""}: {current.run_dir}')
                start(current, trainer_class)
                part_folders.append(str(current.run_dir))
        if not config.check:
            ranks.on_main(lambda: print_comparison(folders, list(parts), numbers))

    command.run(work)


def part_runs(
    parts: Mapping[str, Mapping[str, Any]], config: Config, before: Config
) -> dict[str, tuple[Config, type | None]]:
    """Config and trainer class of each part. Raises SettingError for a flag that a part would override."""
    runs = {}
    for part, changed in parts.items():
        settings = {'experiment_name': f'{config.experiment_name}_{part}', **changed}
        trainer_class = settings.pop('trainer_class', None)
        for name in changed.keys() & settings.keys():
            if not callable(changed[name]) and getattr(config, name) != getattr(before, name):
                own = f'{name}={getattr(config, name)!r}: run {part!r} of this file sets its own {name}'
                raise SettingError(f'{own}. Leave out --{name}, or change the file.')
        settings = {name: value(config) if callable(value) else value for name, value in settings.items()}
        runs[part] = dataclasses.replace(config, **settings), trainer_class
    return runs


def take_seeds(words: Sequence[str]) -> tuple[int, list[str]]:
    """Split a command line into (N of `--seeds N`, the other words); N is 1 by default. Raises SettingError."""
    joined = [part for word in words for part in (word.split('=', 1) if word.startswith('--seeds=') else [word])]
    if '--seeds' not in joined:
        return 1, list(words)
    at = joined.index('--seeds')
    number = ''.join(joined[at + 1 : at + 2])
    if not number.isdigit() or int(number) < 1:
        raise SettingError(f'seeds={number!r}: must be a whole number of 1 or more. Write --seeds 3.')
    return int(number), joined[:at] + joined[at + 2 :]


def with_seed(config: Config, i: int) -> Config:
    """The config with seed `config.seed + i`; for i > 0 the run's name gets the seed appended."""
    if i == 0:
        return config
    seed = config.seed + i
    return dataclasses.replace(config, seed=seed, experiment_name=f'{config.experiment_name}_seed={seed}')


def print_comparison(folders: Sequence[Sequence[str]], names: Sequence[str], patterns: Sequence[str]) -> None:
    """Print the numbers that match `patterns`, a row for each name and its folders, and write the page next to them."""
    groups = [[page.read(folder) for folder in seeds] for seeds in folders]
    table = numbers(groups, lambda run: {name: value for line in run.lines for name, value in line.items()})
    matching = [row for row in table if any(fnmatch(row[0], pattern) for pattern in patterns)]
    rows = [[name.removeprefix('final/'), *values] for name, *values in matching]
    text = blocks([['', *names], *cells(rows, [len(runs) for runs in groups])])
    print(f'\n{text}\n{text_of_changes(rows, names)}', flush=True)
    path = Path(f'{folders[0][0].removesuffix(names[0])}compared.html')
    write_page(path, groups, folder_names([seeds[0] for seeds in folders]), names)
    print(f'\n  page        {path}', flush=True)


def write_page(path: Path, groups: Sequence[Group], names: Sequence[str], labels: Sequence[str]) -> None:
    """`names`: the folder of the first run of each group; `labels`: names of the groups in plots."""
    first, sizes, table = [group[0] for group in groups], [len(group) for group in groups], numbers(groups)
    samples = [Markup(newest_samples(run)) for run in first]
    differ = [[f'{name}={page.text_of(value)}' for value in values] for name, *values in differing_settings(first)]
    about = [f'<b>{page.escaped(name)}</b>' for name in names]
    for texts in differ:
        about = [f'{cell}<br>{page.escaped(text)}' for cell, text in zip(about, texts, strict=True)]
    best = numbers(groups, lambda run: {title: value for title, (value, *_) in run.chosen().items()})
    columns = [['run', *map(Markup, about)], *([['newest samples', *samples]] if any(samples) else [])]
    plots = {title: shared_plot(groups, labels, title, patterns) for title, patterns in page.CURVES.items()}
    sections = {
        'Runs': by_run([*columns, *cells(best, sizes)]),
        'Curves': page.row([plots.pop(title) for title in page.MAIN]),
    }
    from_first = f'Differences from {labels[0]} (none: not more than the standard deviations of both together)'
    changed = changes_of(table)
    folded = {
        from_first: by_run([['', *labels[1:]], *changed]) if changed else '',
        'Other curves': page.row(list(plots.values())),
        'Samples of other samplers': ''.join(
            newest_samples(run, label, False) for run, label in zip(first, labels, strict=True)
        ),
        'All numbers at the end': by_run([['', *labels], *cells(table, sizes)]),
    }
    files.write_text(path, page.html_page(f'{sum(sizes)} runs', sections, folded))


def by_run(columns: Sequence[Sequence[Any]]) -> str:
    """An HTML table with a row for each run, from columns that begin with their heading."""
    head, *rows = zip(*columns, strict=True)
    return page.table(rows, head)


def folder_names(folders: Sequence[str]) -> list[str]:
    """The last part of each path; more parts if these are not unique. Raises SettingError."""
    for parts in range(1, 20):
        names = [os.sep.join(Path(folder).absolute().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise SettingError('The same folder is given twice. Pass each run once.')


def legend_labels(runs: Sequence, names: Sequence[str]) -> list[str]:
    """Labels of the runs in legends: the settings that differ, if short enough, else the names, cut in the middle."""
    rows = [row for row in differing_settings(runs) if row[0] not in FREE_ON_RESUME]
    labels = [', '.join(f'{name}={page.text_of(v[i])}' for name, *v in rows) for i in range(len(runs))]
    if len(set(labels)) == len(labels) and max(map(len, labels)) <= 60:
        return labels
    cut = [cut_middle(name, 40) for name in names]
    return cut if len(set(cut)) == len(cut) else list(names)


def differing_settings(runs: Sequence) -> list[list]:
    """[setting, values] for each setting that differs between runs, except names and paths. A setting that a run lacks
    counts as its default."""
    defaults = page.as_json(vars(Config()))
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    values = {name: [run.config.get(name, defaults.get(name)) for run in runs] for name in names}
    values['trainer'] = [(run.starts[-1:] or [{}])[0].get('trainer', {}).get('name') for run in runs]
    return [[name, *v] for name, v in values.items() if name not in page.PLACES and any(x != v[0] for x in v)]


EVALUATED = ('detector', 'weights', 'solver', 'time_grid', 'nfe', 'guidance_scale', 'num', 'seed')


def numbers_of(run: page.Run) -> dict[str, float]:
    """The step, held-out losses, final metrics, and the last result of each kind of evaluation."""
    values = {'step': run.step} | run.final()
    for line in run.evaluations:
        kind = ' '.join(str(line[k]) for k in EVALUATED if line.get(k) is not None)
        values |= {f'{k} ({kind})': line[k] for k in ('frechet', 'kid', 'label_agreement') if k in line}
    return values


def numbers(groups: Sequence[Group], read: Callable[[page.Run], Mapping[str, float]] = numbers_of) -> list[list]:
    """[name, a list of values over seeds for each group] for each number that any run has."""
    by_group = [[read(run) for run in group] for group in groups]
    names = dict.fromkeys(name for group in by_group for values in group for name in values)
    return [[name, *[[v[name] for v in group if v.get(name) is not None] for group in by_group]] for name in names]


def newest_samples(run: page.Run, label: str = '', from_first: bool = True) -> str:
    """HTML of the newest samples, with averaged weights if any, from the first sampler or from all the others."""
    last = [path for paths in run.pictures()[-1:] for path in paths]
    judged = [path for path in last if not path.stem.endswith('_raw')] or last
    chosen = judged[:1] if from_first else judged[1:]
    return images({path: f'{label}: {caption(path.stem)}'.removeprefix(': ') for path in chosen})


def shared_plot(groups: Sequence[Group], labels: Sequence[str], title: str, patterns: Sequence[str]) -> str:
    """One plot with a curve for each group: the first metric that matches `patterns`. A group of several seeds is shown
    as their mean, in a band of one standard deviation."""
    curves, bands, metric = {label: ([], []) for label in labels}, {}, ''
    for group, label in zip(groups, labels, strict=True):
        for metric in group[0].names(patterns)[:1]:
            values = [dict(zip(*run.curve(metric), strict=True)) for run in group]  # finite ones
            steps = [step for step in values[0] if all(step in curve for curve in values)]
            by_step = [[curve[step] for curve in values] for step in steps]
            curves[label] = steps, [statistics.fmean(v) for v in by_step]
            if len(group) > 1:
                bands[label] = [statistics.stdev(v) for v in by_step]
    return page.plot(curves, f'{title}: {metric}', bands=bands) if metric and 'by t' not in title else ''


if __name__ == '__main__':
    main()
