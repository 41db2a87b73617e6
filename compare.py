"""Several runs on one page: curves over each other, settings that differ, final numbers and samples side by side.

sh run.sh compare.py ckpts/a ckpts/b ...           the table is printed, and all is in ckpts/compare.html
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

import report
from config import FREE_ON_RESUME, Config, SettingError
from config_tools import cut_middle
from runtime import command


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of the runs."""
    out: str = ''
    """Page to write; empty: compare.html beside the first run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the runs that the flags name."""
    options = command.parsed(lambda: tyro.cli(Compare, args=argv, use_underscores=True, description=__doc__))
    command.run(lambda: compare(options))


def compare(options: Compare) -> None:
    """Raises SettingError."""
    from runtime.ranks import print_once

    if len(options.runs) < 2:
        raise SettingError('Pass two or more folders of runs: compare.py ckpts/a ckpts/b.')
    runs = [report.read(folder) for folder in options.runs]
    if len({run.config.get('dataset') for run in runs}) > 1:
        print_once('warning: these runs are of different data sets, so that their numbers do not compare')
    names = names_of(options.runs)
    labels = labels_of(runs, names)
    rows = [*([['run', *names]] if labels != names else []), *differences(runs), *numbers(runs)]
    text = [['', *labels], *[[report.text_of(cell) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    print_once('\n'.join('  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in text))
    plots = [over(runs, labels, title, names) for title, names in report.CURVES.items()]
    newest = [(label, run.pictures()[-1]) for run, label in zip(runs, labels, strict=True) if run.pictures()]
    sections = {
        'Settings that differ': report.table([['run', *names], *differences(runs)], ['', *labels]),
        'Numbers at the end': report.table(numbers(runs), ['', *labels]),
        'Curves': report.row([text for text in plots if text]),
        'Newest samples': report.row([report.image(path, f'{label}: {path.stem}') for label, path in newest]),
    }
    path = Path(options.out or Path(options.runs[0]).parent / 'compare.html').expanduser()
    report.write(path, report.page(f'{len(runs)} runs', sections))
    print_once(f'\n  page        {path}')


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
    labels = [', '.join(f'{name}={report.text_of(v[i])}' for name, *v in told) for i in range(len(runs))]
    if len(set(labels)) == len(labels) and max(map(len, labels)) <= 60:
        return labels
    cut = [cut_middle(name, 40) for name in names]
    return cut if len(set(cut)) == len(cut) else list(names)


def differences(runs: Sequence) -> list[list]:
    """Settings that are not the same in all runs, without names and places; one that a run lacks has its default."""
    usual = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(Config()).items()}
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    values = {name: [run.config.get(name, usual.get(name)) for run in runs] for name in names}
    hidden = ('experiment_name', 'ckpt_dir')
    return [[name, *v] for name, v in values.items() if name not in hidden and any(x != v[0] for x in v)]


def numbers(runs: Sequence) -> list[list]:
    """The step, held-out losses and final metrics of each run; of evaluations, the last of each kind."""
    found = []
    for run in runs:
        values = {'step': run.lines[-1]['train/step'] if run.lines else 0} | run.final()
        for line in run.evaluations:
            kind = ' '.join(str(line.get(k)) for k in ('detector', 'weights', 'solver', 'nfe', 'guidance_scale', 'num'))
            values |= {f'{k} ({kind})': line[k] for k in ('frechet', 'kid', 'label_agreement') if k in line}
        found.append(values)
    names = list(dict.fromkeys(name for values in found for name in values))
    return [[name, *[values.get(name) for values in found]] for name in names]


def over(runs: Sequence, labels: Sequence[str], title: str, patterns: Sequence[str]) -> str:
    """One plot of a curve of all runs: of those that a report shows together, the first that a run has."""
    curves, metric = {}, ''
    for run, label in zip(runs, labels, strict=True):
        for name in run.names(patterns)[:1]:
            curves[label], metric = run.curve(name), name
    return report.plot(curves, f'{title}: {metric}') if curves and 'by time' not in title else ''


if __name__ == '__main__':
    main()
