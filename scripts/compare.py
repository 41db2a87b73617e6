"""Several runs on one page: curves over each other, settings that differ, final numbers and samples side by side.

sh run.sh compare.py ckpts/a ckpts/b ...           the table is printed, and all is in ckpts/compare.html

Runs that differ only in their seed are one row: the mean, the standard deviation over the seeds, and a band around
the curves. A difference that is not larger than these standard deviations is printed as none.

`side_by_side` trains them first: an idea next to what it claims to improve, as in examples/. There `--seeds 3` trains
each with three seeds.
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
    """Compare the runs that the flags name."""
    options = command.options(Compare, argv, __doc__, 'runs', 'out')
    command.run(lambda: compare(options))


def compare(options: Compare) -> None:
    """Raises SettingError."""
    from runtime.ranks import print_once

    if len(options.runs) < 2:
        raise SettingError('Pass two or more folders of runs: compare.py ckpts/a ckpts/b.')
    runs, folders = [page.read(folder) for folder in options.runs], names_of(options.runs)
    if len({run.config.get('dataset') for run in runs}) > 1:
        print_once('warning: these runs are of different data sets, so that their numbers do not compare')
    groups = grouped(runs)
    sizes = [len(group) for group in groups]
    first = [group[0] for group in groups]
    names = [folders[runs.index(run)] for run in first]
    labels = labels_of(first, names)
    rows = [*([['run', *names]] if labels != names else []), *differences(first)]
    found = numbers(groups)
    printed = [
        row for row in found if row[0] == 'step' or (compares(row[0]) and row[0].rpartition('/')[2] not in NOT_PRINTED)
    ]
    print_once('\n' + blocks([['', *labels], *rows, *cells(printed, sizes)]))
    print_once(text_of_changes(found, labels))
    path = Path(options.out or Path(options.runs[0]).parent / 'compare.html').expanduser()
    write_page(path, groups, names, labels)
    print_once(f'\n  page        {path}')


def side_by_side(
    parts: Mapping[str, Mapping[str, Any]],
    numbers: Sequence[str] = ('final/*',),
    usual: str = '',
    argv: Sequence[str] | None = None,
    config_class: type[Config] = Config,
) -> None:
    """Train several runs, one after the other, with the same seed, data and flags, and print their numbers. With
    `--seeds N` on the command line each is trained with N seeds, from that of the settings on.

    `parts`: name of a run -> the settings in which it differs, and its `trainer_class`; a setting may be a function of
    the shared config. `numbers`: names in the record to show, * stands for anything. `usual`: flags that come before
    those of the command line, which win. A run is named after the script, the flags that differ from `usual`, and the
    part. The same command resumes. Ends as main.main does, and with SettingError for a flag that a part would overrule.
    """
    from main import flags

    seeds, words = command.parsed(lambda: take_seeds(sys.argv[1:] if argv is None else argv))
    config = flags([*usual.split(), *words], config_class, object)  # the parts may read any setting
    before = flags(usual.split(), config_class, object)
    if config.experiment_name == config.default_name():
        changed = [in_name(name, now) for name, (_, now) in changes(dataclasses.asdict(before), config).items()]
        parts_of_name = [Path(sys.argv[0]).stem, *changed]
        older = older_folder_name(parts_of_name)
        name = older if any(Path(config.ckpt_dir).glob(f'{older}_*')) else folder_name(parts_of_name)
        config = dataclasses.replace(config, experiment_name=name)

    def work() -> None:
        from main import start
        from runtime import ranks

        folders: list[list[str]] = [[] for _ in parts]
        several = [runs_of(parts, of_seed(config, i), before) for i in range(seeds)]
        for runs in several:
            for place, (part, (current, trainer_class)) in zip(folders, runs.items(), strict=True):
                ranks.print_once(f'\n{part}{f", seed {current.seed}" if seeds > 1 else ""}: {current.run_dir}')
                start(current, trainer_class)
                place.append(str(current.run_dir))
        if not config.check:
            ranks.on_main(lambda: show(folders, list(parts), numbers))

    command.run(work)


def runs_of(
    parts: Mapping[str, Mapping[str, Any]], config: Config, before: Config
) -> dict[str, tuple[Config, type | None]]:
    """Settings and trainer class of each part. Raises SettingError for a flag that one of them would overrule."""
    runs = {}
    for part, changed in parts.items():
        settings = {'experiment_name': f'{config.experiment_name}_{part}', **changed}
        trainer_class = settings.pop('trainer_class', None)
        for name in changed.keys() & settings.keys():
            if not callable(changed[name]) and getattr(config, name) != getattr(before, name):
                own = f'{name}={getattr(config, name)!r}: run {part!r} of this file has its own {name}'
                raise SettingError(f'{own}. Leave out --{name}, or change the file.')
        settings = {name: value(config) if callable(value) else value for name, value in settings.items()}
        runs[part] = dataclasses.replace(config, **settings), trainer_class
    return runs


def take_seeds(words: Sequence[str]) -> tuple[int, list[str]]:
    """(N, the other words) of a command line with `--seeds N`; N is 1 without it. Raises SettingError."""
    joined = [part for word in words for part in (word.split('=', 1) if word.startswith('--seeds=') else [word])]
    if '--seeds' not in joined:
        return 1, list(words)
    at = joined.index('--seeds')
    number = ''.join(joined[at + 1 : at + 2])
    if not number.isdigit() or int(number) < 1:
        raise SettingError(f'seeds={number!r}: must be a whole number of 1 or more. Write --seeds 3.')
    return int(number), joined[:at] + joined[at + 2 :]


def of_seed(config: Config, i: int) -> Config:
    """The settings of the i-th seed, from 0, with a name of its own from the second on."""
    if i == 0:
        return config
    seed = config.seed + i
    return dataclasses.replace(config, seed=seed, experiment_name=f'{config.experiment_name}_seed={seed}')


def show(folders: Sequence[Sequence[str]], names: Sequence[str], patterns: Sequence[str]) -> None:
    """Print the numbers of the runs in the folders of each of the `names`, and write their page next to them."""
    groups = [[page.read(folder) for folder in several] for several in folders]
    found = numbers(groups, lambda run: {name: value for line in run.lines for name, value in line.items()})
    shown = [row for row in found if any(fnmatch(row[0], pattern) for pattern in patterns)]
    rows = [[name.removeprefix('final/'), *values] for name, *values in shown]
    table = blocks([['', *names], *cells(rows, [len(runs) for runs in groups])])
    print(f'\n{table}\n{text_of_changes(rows, names)}', flush=True)
    path = Path(f'{folders[0][0].removesuffix(names[0])}compared.html')
    write_page(path, groups, names_of([several[0] for several in folders]), names)
    print(f'\n  page        {path}', flush=True)


def write_page(path: Path, groups: Sequence[Group], names: Sequence[str], labels: Sequence[str]) -> None:
    """`names`: of the folders of the first runs; `labels`: of the groups, in plots."""
    first, sizes, found = [group[0] for group in groups], [len(group) for group in groups], numbers(groups)
    shown = [Markup(newest(run)) for run in first]
    differ = [[f'{name}={page.text_of(value)}' for value in values] for name, *values in differences(first)]
    about = [f'<b>{page.escaped(name)}</b>' for name in names]
    for texts in differ:
        about = [f'{cell}<br>{page.escaped(text)}' for cell, text in zip(about, texts, strict=True)]
    best = numbers(groups, lambda run: {title: value for title, (value, *_) in run.chosen().items()})
    columns = [['run', *map(Markup, about)], *([['newest samples', *shown]] if any(shown) else [])]
    plots = {title: over(groups, labels, title, patterns) for title, patterns in page.CURVES.items()}
    sections = {
        'Runs': by_run([*columns, *cells(best, sizes)]),
        'Curves': page.row([plots.pop(title) for title in page.MAIN]),
    }
    from_first = f'Differences from {labels[0]} (none: not more than the standard deviations of both together)'
    changed = changes_of(found)
    folded = {
        from_first: by_run([['', *labels[1:]], *changed]) if changed else '',
        'Other curves': page.row(list(plots.values())),
        'Samples of other samplers': ''.join(
            newest(run, label, False) for run, label in zip(first, labels, strict=True)
        ),
        'All numbers at the end': by_run([['', *labels], *cells(found, sizes)]),
    }
    files.write_text(path, page.page(f'{sum(sizes)} runs', sections, folded))


def by_run(columns: Sequence[Sequence[Any]]) -> str:
    """A table of columns, each with its head, in which every run is a row."""
    head, *rows = zip(*columns, strict=True)
    return page.table(rows, head)


def names_of(folders: Sequence[str]) -> list[str]:
    """The last part of each folder, or as many parts as tell them apart."""
    for parts in range(1, 20):
        names = [os.sep.join(Path(folder).absolute().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise SettingError('The same folder is given twice.')


def labels_of(runs: Sequence, names: Sequence[str]) -> list[str]:
    """What a legend calls the runs: the settings that differ, if that is short, else their names, cut in the middle."""
    told = [row for row in differences(runs) if row[0] not in FREE_ON_RESUME]
    labels = [', '.join(f'{name}={page.text_of(v[i])}' for name, *v in told) for i in range(len(runs))]
    if len(set(labels)) == len(labels) and max(map(len, labels)) <= 60:
        return labels
    cut = [cut_middle(name, 40) for name in names]
    return cut if len(set(cut)) == len(cut) else list(names)


def differences(runs: Sequence) -> list[list]:
    """Settings that are not the same in all runs, without names and places; one that a run lacks has its default."""
    defaults = page.as_json(vars(Config()))
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    values = {name: [run.config.get(name, defaults.get(name)) for run in runs] for name in names}
    values['trainer'] = [(run.starts[-1:] or [{}])[0].get('trainer', {}).get('name') for run in runs]
    return [[name, *v] for name, v in values.items() if name not in page.PLACES and any(x != v[0] for x in v)]


EVALUATED = ('detector', 'weights', 'solver', 'time_grid', 'nfe', 'guidance_scale', 'num', 'seed')


def numbers_of(run: page.Run) -> dict[str, float]:
    """The step, held-out losses and final metrics; of evaluations, the last of each kind."""
    values = {'step': run.step} | run.final()
    for line in run.evaluations:
        kind = ' '.join(str(line[k]) for k in EVALUATED if line.get(k) is not None)
        values |= {f'{k} ({kind})': line[k] for k in ('frechet', 'kid', 'label_agreement') if k in line}
    return values


def numbers(groups: Sequence[Group], of: Callable[[page.Run], Mapping[str, float]] = numbers_of) -> list[list]:
    """[name, values of the seeds of each group] for each number that a run has."""
    found = [[of(run) for run in group] for group in groups]
    names = dict.fromkeys(name for group in found for values in group for name in values)
    return [[name, *[[f[name] for f in group if f.get(name) is not None] for group in found]] for name in names]


def newest(run: page.Run, label: str = '', of_first: bool = True) -> str:
    """The newest samples of the weights by which a run is judged, by its first sampler; or by all others."""
    last = [path for paths in run.pictures()[-1:] for path in paths]
    judged = [path for path in last if not path.stem.endswith('_raw')] or last
    chosen = judged[:1] if of_first else judged[1:]
    return images({path: f'{label}: {caption(path.stem)}'.removeprefix(': ') for path in chosen})


def over(groups: Sequence[Group], labels: Sequence[str], title: str, patterns: Sequence[str]) -> str:
    """One plot of a curve of all groups: of the curves that a report shows together, the first that a run has. Of
    several seeds, their mean, in a band of the standard deviation over them."""
    curves, bands, metric = {label: ([], []) for label in labels}, {}, ''
    for group, label in zip(groups, labels, strict=True):
        for metric in group[0].names(patterns)[:1]:
            values = [dict(zip(*run.curve(metric), strict=True)) for run in group]  # finite ones
            steps = [step for step in values[0] if all(step in others for others in values)]
            at = [[others[step] for others in values] for step in steps]
            curves[label] = steps, [statistics.fmean(v) for v in at]
            if len(group) > 1:
                bands[label] = [statistics.stdev(v) for v in at]
    return page.plot(curves, f'{title}: {metric}', bands=bands) if metric and 'by time' not in title else ''


if __name__ == '__main__':
    main()
