"""Runs that differ only in their seed: means, standard deviations, and which differences exceed these."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from config import Config
from reports.page import PLACES, Run
from reports.parts import blocks
from runtime.ranks import print_once

Group = Sequence[Run]  # runs that differ only in their seed


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ only in their seed. Two runs with the same seed are never in one group."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {
            # a setting may hold the folder of another run of the same seed
            name: value if name.startswith('data') else re.sub(r'(_seed=\d+)+', '', str(value))
            for name, value in run.config.items()
            if name not in (*PLACES, 'seed')
        }
        start = (run.starts[-1:] or [{}])[0]
        key = json.dumps([settings, start.get('trainer'), start.get('script')], sort_keys=True, default=str)
        while seed_of(run) in map(seed_of, groups.get(key, [])):
            key += ' again'
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def seed_of(run: Run) -> Any:
    return run.config.get('seed', Config.seed)


def cells(rows: Sequence[Sequence[Any]], sizes: Sequence[int]) -> list[list[Any]]:
    """Rows for a table, from rows of [name, values of each group's seeds]: several seeds become a mean and standard
    deviation. `sizes`: the number of runs in each group."""
    counts = [['seeds', *sizes]] if max(sizes, default=1) > 1 else []
    return counts + [[name, *map(cell, groups, sizes)] for name, *groups in rows]


def cell(values: Sequence[Any], size: int) -> Any:
    """`mean_and_spread`, and how many of the `size` runs have this number if some do not."""
    text = mean_and_spread(values)
    return f'{text} ({len(values)} of {size})' if 0 < len(values) < size else text


def mean_and_spread(values: Sequence[Any]) -> Any:
    """Mean and standard deviation as a cell; the value itself if all are equal. Values may be text: a record stores nan
    and inf as strings."""
    finite = [float(value) for value in values if math.isfinite(float(value))]
    if len(finite) < len(values):
        return f'{values[0]}' if len(values) == 1 else f'not finite in {len(values) - len(finite)} of {len(values)}'
    if len(set(finite)) < 2:
        return values[0] if values else None
    return f'{statistics.fmean(finite):.4g} ± {statistics.stdev(finite):.2g}'


def change(first: Sequence[Any], values: Sequence[Any]) -> str | None:
    """The mean of `values` minus the mean of `first`; 'none' if it does not exceed the combined standard deviation over
    seeds. None if one of them has a single seed, or a value that is not finite."""
    if min(len(first), len(values)) < 2 or not all(math.isfinite(float(value)) for value in [*first, *values]):
        return None
    difference = statistics.fmean(values) - statistics.fmean(first)
    spread = math.hypot(statistics.stdev(first), statistics.stdev(values))
    return 'none' if abs(difference) <= spread else f'{difference:+.3g}'


def compares(name: str) -> bool:
    """Whether this number says how good a run is, unlike its step, floors and standard deviations."""
    return name != 'step' and not name.endswith('_std') and '/real_' not in name


def changes_of(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows of [name, `change` of each group but the first], for names that have a change."""
    found = [[name, *[change(first, values) for values in others]] for name, first, *others in rows if compares(name)]
    return [row for row in found if any(cell is not None for cell in row[1:])]


def text_of_changes(rows: Sequence[Sequence[Any]], labels: Sequence[str]) -> str:
    """The table of `changes_of`, or a note that single seeds cannot show differences. Warns if seeds of a run are at
    different steps."""
    for groups in [row[1:] for row in rows if row[0] == 'step']:
        for label, steps in zip(labels, groups, strict=True):
            if len(set(steps)) > 1:
                print_once(
                    f'warning: the seeds of {label} are at steps {min(steps)} to {max(steps)}: train them to the end'
                )
    if len(labels) < 2:
        return ''
    changes = changes_of(rows)
    if not changes:
        return (
            f'\nAny difference may be chance: {labels[0]} or every other run has only one seed. '
            'Train with --seed 1 and --seed 2 too: examples and sweep.py do that with --seeds 3.'
        )
    head = f'\ndifference from {labels[0]} (none: within the standard deviations over the seeds)\n'
    return head + blocks([['', *labels[1:]], *changes])
