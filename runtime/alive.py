"""Signs of life: how far training is, and a line where a program would be silent for long. A bar on a terminal."""

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

EVERY = 30.0  # seconds without a line after which one is printed
LEAST_SECONDS, MOST_SECONDS = 5, 25  # between lines of training, however often there is something to show


@dataclass(eq=False)
class Doing:
    """Something that takes long: what it is, and how much of it is done, if that is known."""

    what: str
    share: float | None = None


_doing: list[Doing] = []  # under way, each within the one before it
_spoke = time.monotonic()  # when a line was printed last, or a bar moved
_printing = threading.RLock()
# A process that is forked while another thread prints would wait for that thread's locks for ever.
os.register_at_fork(before=_printing.acquire, after_in_parent=_printing.release, after_in_child=_printing.release)


def is_rank_0() -> bool:
    return os.environ.get('RANK', '0') == '0'


def spoke() -> None:
    global _spoke
    _spoke = time.monotonic()


def say(text: str) -> None:
    """Print a line, above the bars."""
    with _printing:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    spoke()


@contextlib.contextmanager
def still(what: str) -> Iterator[Doing]:
    """Rank 0 prints `... still WHAT` within the block whenever nothing was printed for EVERY seconds. Set `share` of
    what this yields, 0 to 1, to have it printed too. Of blocks in blocks the inner one is printed."""
    doing, ended = Doing(what), threading.Event()

    def watch() -> None:
        while not ended.wait(max(0.01, _spoke + EVERY - time.monotonic())):
            if time.monotonic() - _spoke >= EVERY and _doing:
                now = _doing[-1]
                say(f'... still {now.what}{"" if now.share is None else f", {now.share:.0%}"}')

    _doing.append(doing)
    spoke()
    if len(_doing) == 1 and is_rank_0():
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield doing
    finally:
        ended.set()
        _doing.remove(doing)


class Bar(tqdm):
    """A bar that counts as a line where it is shown."""

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if shown:
            spoke()
        return shown


def each(items: Iterable[T], what: str, total: int, unit: str = 'item') -> Iterator[T]:
    """The items, with a bar on a terminal and `still` elsewhere; rank 0 only."""
    no_bar = None if is_rank_0() else True  # None: a bar on a terminal only
    with still(what) as doing, Bar(total=total, desc=what, leave=False, unit=unit, disable=no_bar) as bar:
        for i, item in enumerate(items):
            doing.share = i / max(total, 1)
            yield item
            bar.update()


def duration(seconds: float) -> str:
    """`3.4 s`, `12 s`, `5 min` or `3.2 hours`."""
    if seconds < 90:
        return f'{seconds:{".0f" if seconds >= 10 else ".2g"}} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} hours'


class Progress:
    """Steps, loss, speed and the time left of training, and apart from it the time that the end will take."""

    def __init__(self, total: int, seconds_at_end: Callable[[float], float], has_numbers: bool, step: int):
        """From `step` to `total` steps. `seconds_at_end(images per second)`: of what follows the last step, samples
        and, if `has_numbers`, numbers for them."""
        self.total, self.first, self.step = total, step, step
        self.seconds_at_end, self.has_numbers = seconds_at_end, has_numbers
        self.began, self.shown = time.monotonic(), -math.inf
        no_bar = None if is_rank_0() else True  # None: a bar on a terminal only
        self.bar = Bar(total=total, initial=step, unit='step', dynamic_ncols=True, disable=no_bar)

    def advance(self) -> bool:
        """After a step. Whether nothing was shown for long."""
        self.bar.update()
        self.step += 1
        return self.bar.disable and time.monotonic() - max(self.shown, self.began) >= MOST_SECONDS

    def show(self, step: int, loss: float, images_per_second: float) -> None:
        """On the bar, or as a line. The time left includes what is drawn and evaluated between steps."""
        now = time.monotonic()
        if self.bar.disable and now - self.shown < LEAST_SECONDS and step < self.total:
            return
        left = duration((now - self.began) / max(step - self.first, 1) * (self.total - step)) + ' left'
        left = left if step < self.total else 'trained'
        if seconds := self.seconds_at_end(images_per_second):
            hint = ' (--no_final_eval leaves the numbers out)' * (self.shown < 0)
            left += f', then about {duration(seconds)} of samples{f" and numbers{hint}" if self.has_numbers else ""}'
        shown, speed = f'{loss:.3g}' if 0 < abs(loss) < 1e-3 else f'{loss:.4f}', f'{images_per_second:.0f} images/s'
        if not self.bar.disable:
            self.bar.set_postfix_str(f'loss {shown}, {speed}, {left}')
        elif is_rank_0():
            say(f'step {step}/{self.total}  loss {shown}  {speed}  {left}')
        self.shown = now
