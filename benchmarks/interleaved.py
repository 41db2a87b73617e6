"""Times several functions in turn, so that a busy machine slows all of them alike."""

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


def in_turn(functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Name -> seconds of each of `rounds` calls. Every second round calls the functions in reverse order (A B B A)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-warm_up, rounds):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            seconds = seconds_of(functions[name])
            if i >= 0:
                times[name].append(seconds)
    return times


def ratio(times: Mapping[str, list[float]], of: str, to: str) -> float:
    """The speed of `of` divided by the speed of `to`: the median over rounds, so that each ratio is of close times."""
    return median(b / a for a, b in zip(times[of], times[to], strict=True))


def write(name: str, rows: Any) -> None:
    """Write benchmarks/`name`.json: the rows, and the commit, torch and device they were measured with."""
    describe = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=HERE).stdout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{platform.machine()} CPU'
    about = dict(commit=commit.strip(), torch=torch.__version__, device=device, threads=torch.get_num_threads())
    (HERE / f'{name}.json').write_text(json.dumps(dict(about, rows=rows), indent=1) + '\n')
