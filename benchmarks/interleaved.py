"""Times of several ways of doing the same, taken in turn, so that a busy machine slows all of them alike."""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


def seconds_of(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Name -> seconds of each call, `rounds` of them. Every second round goes through the ways backwards (A B B A)."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(-warm_up, rounds):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            seconds = seconds_of(ways[name])
            if i >= 0:
                times[name].append(seconds)
    return times


def ratio(times: Mapping[str, list[float]], of: str, to: str) -> float:
    """How often as fast `of` is as `to`: the median of the ratios of neighbours in time."""
    return median(b / a for a, b in zip(times[of], times[to], strict=True))


def write(name: str, rows: Any) -> None:
    """benchmarks/`name`.json: the rows, and what they were measured with."""
    describe = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=HERE).stdout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{platform.machine()} CPU'
    about = dict(commit=commit.strip(), torch=torch.__version__, device=device, threads=torch.get_num_threads())
    (HERE / f'{name}.json').write_text(json.dumps(dict(about, rows=rows), indent=1) + '\n')
