"""Progress on the console: bars on a terminal, else lines of training and a line when a program is silent for long."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

T = TypeVar('T')

MAX_SILENCE = 30.0  # seconds without output after which `print_while` prints a line
MIN_INTERVAL, MAX_INTERVAL = 5, 25  # seconds between lines of training, whatever log_every is


@dataclass(eq=False)
class Task:
    """A slow operation: its name, and the fraction that is done, if known."""

    what: str
    share: float | None = None


_tasks: list[Task] = []  # in progress, the innermost last
_last_output = time.monotonic()  # when a line was last printed, or a bar moved
_print_lock = threading.RLock()
# A child forked while another thread prints would inherit that thread's locks, and wait for them forever.
os.register_at_fork(before=_print_lock.acquire, after_in_parent=_print_lock.release, after_in_child=_print_lock.release)


def is_rank_0() -> bool:
    return os.environ.get('RANK', '0') == '0'


def note_output() -> None:
    global _last_output
    _last_output = time.monotonic()


def say(text: str) -> None:
    """Print a line, above the bars."""
    with _print_lock:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    note_output()


@contextlib.contextmanager
def print_while(what: str) -> Iterator[Task]:
    """Inside the block, rank 0 prints `... still WHAT` whenever nothing was printed for MAX_SILENCE seconds. To print a
    percentage too, set `share` (0 to 1) of the yielded task. In nested blocks the innermost task is printed."""
    task, ended = Task(what), threading.Event()

    def watch() -> None:
        while not ended.wait(max(0.01, _last_output + MAX_SILENCE - time.monotonic())):
            if time.monotonic() - _last_output >= MAX_SILENCE and _tasks:
                now = _tasks[-1]
                say(f'... still {now.what}{"" if now.share is None else f", {now.share:.0%}"}')

    _tasks.append(task)
    note_output()
    if len(_tasks) == 1 and is_rank_0():  # the outermost block's thread watches the nested ones too
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield task
    finally:
        ended.set()
        _tasks.remove(task)


def with_progress(items: Iterable[T], what: str, total: int, unit: str = 'item') -> Iterator[T]:
    """Iterate over `items` with a bar on a terminal, else with `print_while`; only rank 0 shows anything."""
    no_bar = None if is_rank_0() else True  # None: a bar on a terminal only
    with print_while(what) as task, tqdm(total=total, desc=what, leave=False, unit=unit, disable=no_bar) as bar:
        for i, item in enumerate(items):
            task.share = i / max(total, 1)
            yield item
            if bar.update():  # drawn again
                note_output()


def duration(seconds: float) -> str:
    """`3.4 s`, `12 s`, `5 min` or `3.2 hours`."""
    if seconds < 90:
        return f'{seconds:{".0f" if seconds >= 10 else ".2g"}} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} hours'


class Progress:
    """Step, loss, speed, the time left in training and, separately, the time that the end of the run will take."""

    def __init__(self, total: int, seconds_at_end: Callable[[float], float], has_numbers: bool, step: int):
        """From `step` to `total` steps. `seconds_at_end(images per second)`: the time for samples after the last step;
        with `has_numbers`, their metrics follow, whose time is not known."""
        self.total, self.first, self.step = total, step, step
        self.seconds_at_end, self.has_numbers = seconds_at_end, has_numbers
        self.began, self.last_shown = time.monotonic(), -math.inf
        no_bar = None if is_rank_0() else True  # None: a bar on a terminal only
        self.bar = tqdm(total=total, initial=step, unit='step', dynamic_ncols=True, disable=no_bar)

    def advance(self) -> bool:
        """Count a step; True if a line is due because none was printed for MAX_INTERVAL seconds."""
        if self.bar.update():  # drawn again
            note_output()
        self.step += 1
        return self.bar.disable and time.monotonic() - max(self.last_shown, self.began) >= MAX_INTERVAL

    def show(self, step: int, loss: float, images_per_second: float) -> None:
        """Update the bar, or print a line. The time left includes sampling and evaluation between steps."""
        now = time.monotonic()
        if self.bar.disable and now - self.last_shown < MIN_INTERVAL and step < self.total:
            return
        left = duration((now - self.began) / max(step - self.first, 1) * (self.total - step)) + ' left'
        left = left if step < self.total else 'trained'
        if seconds := self.seconds_at_end(images_per_second):
            hint = ' (--no_final_eval leaves them out)' * (self.last_shown < 0)  # in the first line only
            left += f', then about {duration(seconds)} of samples{f", then numbers{hint}" if self.has_numbers else ""}'
        number, speed = f'{loss:.3g}' if 0 < abs(loss) < 1e-3 else f'{loss:.4f}', f'{images_per_second:.0f} images/s'
        if not self.bar.disable:
            self.bar.set_postfix_str(f'loss {number}, {speed}, {left}')
        elif is_rank_0():
            say(f'step {step}/{self.total}  loss {number}  {speed}  {left}')
        self.last_shown = now
