"""Several runs on one page: curves over each other, settings that differ, final numbers and samples side by side.

sh run.sh compare.py ckpts/a ckpts/b ...           the table is printed, and all is in ckpts/compare.html

`side_by_side` trains them first: an idea next to what it claims to improve, as in examples/.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import tyro

from config import Config, SettingError
from reports import page
from runtime import command, files
from settings.same_run import FREE_ON_RESUME, changes, cut_middle, folder_name, in_name


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of the runs."""
    out: str = ''
    """Page to write; empty: compare.html next to the first run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the runs that the flags name."""
    options = command.parsed(lambda: tyro.cli(Compare, args=argv, use_underscores=True, description=__doc__))
    command.run(lambda: compare(options))


def compare(options: Compare) -> None:
    """Raises SettingError."""
    from runtime.ranks import print_once

    if len(options.runs) < 2:
        raise SettingError('Pass two or more folders of runs: compare.py ckpts/a ckpts/b.')
    runs = [page.read(folder) for folder in options.runs]
    if len({run.config.get('dataset') for run in runs}) > 1:
        print_once('warning: these runs are of different data sets, so that their numbers do not compare')
    names = names_of(options.runs)
    labels = labels_of(runs, names)
    rows = [*([['run', *names]] if labels != names else []), *differences(runs), *numbers(runs)]
    print_once(page.aligned([['', *labels], *rows]))
    path = Path(options.out or Path(options.runs[0]).parent / 'compare.html').expanduser()
    write_page(path, runs, names, labels)
    print_once(f'\n  page        {path}')


def side_by_side(
    parts: Mapping[str, Mapping[str, Any]],
    numbers: Sequence[str] = ('final/*',),
    usual: str = '',
    argv: Sequence[str] | None = None,
    config_class: type[Config] = Config,
) -> None:
    """Train several runs, one after the other, with the same seed, data and flags, and print their numbers.

    `parts`: name of a run -> the settings in which it differs, and its `trainer_class`; a setting may be a function of
    the shared config. `numbers`: names in the record to show, * stands for anything. `usual`: flags that come before
    those of the command line, which win. A run is named after the script, the flags that differ from `usual`, and the
    part. The same command resumes. Ends as main.main does, and with SettingError for a flag that a part would overrule.
    """
    from main import flags

    config = flags([*usual.split(), *(sys.argv[1:] if argv is None else argv)], config_class)
    before = flags(usual.split(), config_class)
    if config.experiment_name == config.default_name():
        changed = [in_name(name, now) for name, (_, now) in changes(dataclasses.asdict(before), config).items()]
        config = dataclasses.replace(config, experiment_name=folder_name([Path(sys.argv[0]).stem, *changed]))

    def work() -> None:
        from main import start
        from runtime import ranks

        folders = []
        for part, (current, trainer_class) in runs_of(parts, config, before).items():
            ranks.print_once(f'\n{part}: {current.run_dir}')
            start(current, trainer_class)
            folders.append(str(current.run_dir))
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
                raise SettingError(
                    f'{name}={getattr(config, name)!r}: run {part!r} of this file has its own {name}. '
                    f'Leave out --{name}, or change the file.'
                )
        settings = {name: value(config) if callable(value) else value for name, value in settings.items()}
        runs[part] = dataclasses.replace(config, **settings), trainer_class
    return runs


def show(folders: Sequence[str], names: Sequence[str], numbers: Sequence[str]) -> None:
    """Print the numbers of these runs, called `names`, and write their page next to them."""
    runs = [page.read(folder) for folder in folders]
    last = [{name: value for line in run.lines for name, value in line.items()} for run in runs]
    shown = [name for name in dict.fromkeys(n for f in last for n in f) if any(fnmatch(name, p) for p in numbers)]
    rows = [[name.removeprefix('final/'), *[f.get(name) for f in last]] for name in shown]
    print(f'\n{page.aligned([["", *names], *rows])}', flush=True)
    path = Path(f'{folders[0].removesuffix(names[0])}compared.html')
    write_page(path, runs, names_of(folders), names)
    print(f'\n  page        {path}', flush=True)


def write_page(path: Path, runs: Sequence, names: Sequence[str], labels: Sequence[str]) -> None:
    """`names`: of the folders; `labels`: of the runs, in legends."""
    plots = [over(runs, labels, title, names) for title, names in page.CURVES.items()]
    sections = {
        'Settings that differ': page.table([['run', *names], *differences(runs)], ['', *labels]),
        'Numbers at the end': page.table(numbers(runs), ['', *labels]),
        'Curves': page.row(plots),
        'Newest samples': ''.join(newest(run, label) for run, label in zip(runs, labels, strict=True)),
    }
    files.write_text(path, page.page(f'{len(runs)} runs', sections))


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


def numbers(runs: Sequence) -> list[list]:
    """The step, held-out losses and final metrics of each run; of evaluations, the last of each kind."""
    found = [{'step': run.step} | run.final() for run in runs]
    for run, values in zip(runs, found, strict=True):
        for line in run.evaluations:
            kind = ' '.join(str(line.get(k)) for k in ('detector', 'weights', 'solver', 'nfe', 'guidance_scale', 'num'))
            values |= {f'{k} ({kind})': line[k] for k in ('frechet', 'kid', 'label_agreement') if k in line}
    names = list(dict.fromkeys(name for values in found for name in values))
    return [[name, *[values.get(name) for values in found]] for name in names]


def newest(run: Any, label: str) -> str:
    """The samples of a run's last pictures, of the weights that it is judged by if there are such, in one row."""
    last = [path for paths in run.pictures()[-1:] for path in paths]
    judged = [path for path in last if not path.stem.endswith('_raw')] or last
    return page.images({path: f'{label}: {path.stem}' for path in judged})


def over(runs: Sequence, labels: Sequence[str], title: str, patterns: Sequence[str]) -> str:
    """One plot of a curve of all runs: of the curves that a report shows together, the first that a run has."""
    curves, metric = {}, ''
    for run, label in zip(runs, labels, strict=True):
        for name in run.names(patterns)[:1]:
            curves[label], metric = run.curve(name), name
    return page.plot(curves, f'{title}: {metric}') if curves and 'by time' not in title else ''


if __name__ == '__main__':
    main()
