"""How far training is: a bar on a terminal, else a line now and then."""

import math
import sys
import time
from collections.abc import Callable

from runtime import alive, ranks

LEAST_SECONDS, MOST_SECONDS = 5, 25  # between lines, however often there is something to show


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
        no_terminal = not (ranks.is_main() and sys.stderr.isatty())
        self.bar = alive.Bar(total=total, initial=step, unit='step', dynamic_ncols=True, disable=no_terminal)

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
        if self.bar.disable:
            ranks.print_once(f'step {step}/{self.total}  loss {shown}  {speed}  {left}')
        else:
            self.bar.set_postfix_str(f'loss {shown}, {speed}, {left}')
        self.shown = now
