"""Train a run for every combination of a grid of settings, one after the other, and compare all on one page.

    sh run.sh sweep.py --base_lr 4e-3 2e-3 --time_sampler uniform logit_normal --seeds 3 -- --preset digits

Flags after -- go to every run. With --seeds 3 every combination is trained with three seeds, and the page shows their
mean and spread. The same command resumes: runs that are finished are skipped. In a Slurm array, task i trains only the
i-th run (SLURM_ARRAY_TASK_ID, from 0).
"""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from config import PRESETS, Config, SettingError, parse_config
from runtime import command, errors
from runtime.files import ROOT
from settings.flags import read, refuse
from settings.same_run import folder_name, in_name, name_parts


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the grid, train all combinations and compare them."""
    words = sys.argv[1:] if argv is None else list(argv)
    runs = command.parsed(lambda: combinations(words))
    command.run(lambda: sweep(runs))


def combinations(words: Sequence[str]) -> list[list[str]]:
    """The flags of every run. Raises SettingError for an empty or malformed grid, and for an unknown flag."""
    if not words or words[0] in ('-h', '--help'):
        print(__doc__)
        sys.exit(0)
    from scripts.compare import take_seeds

    end = [*words, '--'].index('--')
    seeds, own = take_seeds(words[:end])
    grid: dict[str, list[str]] = {}
    name = ''
    for word in own:
        if word.startswith('--'):
            name, _, value = word.partition('=')
            grid[name] = [value] if value else []
        elif name:
            grid[name].append(word)
        else:
            text = f'{word!r} comes before a flag. Write --setting VALUE VALUE ..., and -- before the rest.'
            raise SettingError(text)
    empty = [name for name, values in grid.items() if not values]
    if empty or not (grid or seeds > 1):
        raise SettingError(f'{empty[0] if empty else "The grid"} has no values. Write --setting VALUE VALUE ...')
    if seeds > 1:
        if '--seed' in grid:
            raise SettingError('--seed and --seeds are both given. Leave one of them out.')
        first = parse_config(words[end + 1 :]).seed
        grid['--seed'] = [str(first + i) for i in range(seeds)]
    chosen = itertools.product(*grid.values())
    rows = [[*words[end + 1 :], *itertools.chain(*zip(grid, values, strict=True))] for values in chosen]
    runs = [read(row, Config, PRESETS)[0] for row in rows]  # paths relative to the project's folder
    configs = [parse_config(flags) for flags in runs]
    for config, flags in zip(configs, runs, strict=True):
        refuse(config, flags, PRESETS)
    names = [config.experiment_name for config in configs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        text = f'Two runs would both be called {twice[0]!r}. Leave --experiment_name out, and give no value twice.'
        raise SettingError(text)
    return runs


def sweep(runs: list[list[str]]) -> None:
    """Train the runs and write the page. Raises SettingError, or errors.Stopped if a run received a stop signal."""
    from scripts import compare
    from training.run_folder import settle_name

    only = os.environ.get('SLURM_ARRAY_TASK_ID')
    if only is not None and int(only) >= len(runs):
        last = len(runs) - 1
        raise SettingError(f'SLURM_ARRAY_TASK_ID={only}: there are runs 0 to {last}. Submit with --array=0-{last}.')
    chosen, failed = range(len(runs)) if only is None else [int(only)], []
    for i in chosen:
        flags = ' '.join(runs[i])
        print(f'run {i + 1} of {len(runs)}: {flags}', flush=True)
        code = run_one(runs[i])
        if code == errors.EXIT_STOPPED:
            raise errors.Stopped
        failed += [flags] if code else []
    configs = [settle_name(parse_config(flags)) for flags in runs]
    trained = [config.run_dir for config in configs if (config.run_dir / 'metrics.jsonl').exists()]
    if only is None and len(trained) > 1:
        compare.compare(compare.Compare(tuple(map(str, trained)), str(trained[0].parent / page_name(configs))))
    if failed:
        raise SettingError(f'{len(failed)} of {len(chosen)} runs failed, see above: {"; ".join(failed)}')


def page_name(configs: Sequence[Config]) -> str:
    """Name of the page: the swept settings with their values, then the shared ones, as in `sweep_seed=0-1_digits`."""
    values = {name: tuple(dict.fromkeys(getattr(c, name) for c in configs)) for name in vars(configs[0])}
    by_preset = {name for name in values if all(getattr(c, name) == c.baseline()[name] for c in configs)} - {'preset'}
    swept = {name: v for name, v in values.items() if len(v) > 1 and name not in by_preset | {'experiment_name'}}
    known = {*swept, *(values['preset'] if 'preset' in swept else ())}
    shared = [part for part in name_parts(configs[0], PRESETS) if part.split('=')[0] not in known]
    return folder_name(['sweep', *map(in_name, swept, swept.values()), *shared]) + '.html'


def run_one(flags: list[str]) -> int:
    """Train one run and return its exit code. Stop signals to this program are passed on to the run."""
    from runtime import stopping

    run = subprocess.Popen(['sh', str(ROOT / 'run.sh'), *flags])
    pass_on = lambda signum, frame: run.send_signal(signum)  # noqa: E731
    previous = {name: signal.signal(name, pass_on) for name in stopping.STOP_SIGNALS}
    try:
        return run.wait()
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


if __name__ == '__main__':
    main()
