"""A sign of life where a program would be silent for long: a bar on a terminal, else a line every 30 s."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

T = TypeVar('T')

EVERY = 30.0  # seconds without a line after which one is printed


@dataclass(eq=False)
class Doing:
    """Something that takes long: what it is, and how much of it is done, if that is known."""

    what: str
    share: float | None = None


_doing: list[Doing] = []  # under way, each within the one before it
_spoke = time.monotonic()  # when a line was printed last
_printing = threading.Lock()
# A process that is forked while another thread prints would wait for that thread's locks for ever.
os.register_at_fork(before=_printing.acquire, after_in_parent=_printing.release, after_in_child=_printing.release)


def spoke() -> None:
    """A line was printed, or a bar moved."""
    global _spoke
    _spoke = time.monotonic()


@contextlib.contextmanager
def still(what: str) -> Iterator[Doing]:
    """Rank 0 prints `... still WHAT` within the block whenever nothing was printed for EVERY seconds. Set `share` of
    what this yields, 0 to 1, to have it printed too. Of blocks in blocks the inner one is printed."""
    doing, ended = Doing(what), threading.Event()

    def watch() -> None:
        while not ended.wait(max(0.01, _spoke + EVERY - time.monotonic())):
            if time.monotonic() - _spoke >= EVERY and _doing:
                now = _doing[-1]
                share = '' if now.share is None else f', {now.share:.0%}'
                with _printing:
                    tqdm.write(f'... still {now.what}{share}', file=sys.stdout)
                    sys.stdout.flush()
                spoke()

    _doing.append(doing)
    spoke()
    if len(_doing) == 1 and os.environ.get('RANK', '0') == '0':
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
    no_bar = None if os.environ.get('RANK', '0') == '0' else True  # None: where there is no terminal
    with still(what) as doing, Bar(total=total, desc=what, leave=False, unit=unit, disable=no_bar) as bar:
        for i, item in enumerate(items):
            doing.share = i / max(total, 1)
            yield item
            bar.update()
