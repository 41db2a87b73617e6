"""Runs that differ in their seed alone: their means, standard deviations, and which differences are more than these."""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from reports.page import PLACES, Run, aligned

Group = Sequence[Run]  # runs that differ in their seed alone


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs, those together that differ in their seed alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        named = f'_seed={run.config.get("seed")}'  # a setting may hold the folder of another run of the same seed
        settings = {name: value for name, value in run.config.items() if name not in (*PLACES, 'seed')}
        start = (run.starts[-1:] or [{}])[0]
        told = [settings, start.get('trainer'), start.get('script')]
        groups.setdefault(json.dumps(told, sort_keys=True, default=str).replace(named, ''), []).append(run)
    return list(groups.values())


def cells(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows of [name, values of the seeds of each group] for a table: the mean and standard deviation of several."""
    seeds = max((len(values) for _, *groups in rows for values in groups), default=1)
    counts = [['seeds', *[len(values) for values in rows[0][1:]]]] if seeds > 1 and rows else []
    return counts + [[name, *map(mean_and_spread, groups)] for name, *groups in rows]


def mean_and_spread(values: Sequence[float]) -> Any:
    """As a cell: the value itself if there is one."""
    if len(values) < 2:
        return values[0] if values else None
    return f'{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}'


def changes_of(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """For each name and group, how far the mean lies above that of the first group; 'none' if by no more than the
    standard deviations over the seeds of both together, and empty where one has a single seed."""

    def change(first: Sequence[float], values: Sequence[float]) -> Any:
        if min(len(first), len(values)) < 2:
            return None
        change = statistics.fmean(values) - statistics.fmean(first)
        spread = math.hypot(statistics.stdev(first), statistics.stdev(values))
        return 'none' if abs(change) <= spread else f'{change:+.3g}'

    found = [[name, *[change(first, values) for values in others]] for name, first, *others in rows if name != 'step']
    return [row for row in found if any(cell is not None for cell in row[1:])]


def text_of_changes(rows: Sequence[Sequence[Any]], labels: Sequence[str]) -> str:
    """The table of `changes_of`, or what one seed cannot show."""
    changes = changes_of(rows)
    if len(labels) < 2:
        return ''
    if not changes:
        return '\none seed each: how much of a difference is chance is not known. Train with --seeds 3.'
    return f'\ndifference from {labels[0]}; none: within the standard deviations over the seeds\n' + aligned(
        [['', *labels[1:]], *changes]
    )
