"""The record of a run: metrics.jsonl and PNGs, always on disk, and on wandb too if you have an account.

A trainer writes to a `Record`; its means are in runtime/means.py, and its copy on wandb in runtime/wandb_run.py.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import utils
from config import Config, SettingError
from runtime import files, ranks
from runtime.alive import Progress
from runtime.errors import SaveError, Stopped
from runtime.means import RunningMeans
from runtime.wandb_run import WandbRun, start_wandb

OWN_NAMES = re.compile(  # what a run records itself; names that `log` gets are recorded as eval/... for held-out data
    r'(train/|eval/)?(loss(_t_.*|_ema_.*)?|reference(_t_.*|_floor|_gaussian)?)|'
    r'train/(step|images|lr|grad_norm|augmented|bad_steps|images_per_second|memory_gb|waiting|floor(_.*)?)'
)


class Record:
    """Means, speed, pictures and the progress of a run. Rank 0 writes them.
    All ranks call `open`, `summary`, `line`, `logging_apart` and `state_dict` together. `log`, `losses`, `step` and
    `clear` do not communicate. `picture` and `histogram` act on rank 0 only.
    """

    def __init__(
        self, config: Config, device: torch.device, waited: Callable[[], float] = lambda: 0.0,
        seconds_at_end: Callable[[float], float] = lambda images_per_second: 0.0,
    ):  # fmt: skip
        """`waited()`: seconds that training has waited for data so far; `seconds_at_end`: see Progress."""
        self.config, self.device, self.waited = config, device, waited
        self.begin_progress = partial(Progress, config.num_training_steps, seconds_at_end, config.final_eval)
        self.path = config.run_dir / 'metrics.jsonl'
        self.means = self.log_to = RunningMeans(device)  # since `clear`; `log` adds to `log_to`, see `logging_apart`
        self.wandb = WandbRun()  # does nothing, except on rank 0 while the record is open
        self.wandb_id: str | None = None
        self.progress: Progress | None = None  # while the record is open
        self.last_line: tuple[int, int, dict[str, float]] = (-1, 0, {})  # its step, offset in the file, and values
        self.histograms: dict[str, Tensor] = {}  # since the last line
        self.restart(0)

    @contextlib.contextmanager
    def open(self, step: int, start: dict[str, Any] | None = None) -> Iterator[None]:
        """Keep the record open in this block. Drops the lines of metrics.jsonl from `step` on, where the run resumes.

        `start`: the entry of this start in run.json. Raises SettingError for a broken line, or if wandb='online' fails.
        """

        def begin() -> str | None:
            kept = self._cut_back(step)
            self.last_line = (-1, 0, {})
            self.wandb = start_wandb(self.config, self.config.run_dir, self.wandb_id, start) or WandbRun()
            self.wandb.catch_up(kept)
            return self.wandb.id or self.wandb_id

        failed = False
        try:
            self.wandb_id = ranks.on_main(begin)
            self.restart(step)
            self.progress = self.begin_progress(step)
            yield
        except Exception as error:
            failed = not isinstance(error, Stopped)
            if failed:  # a lost loader process or rank, a full disk, a loss that is not finite
                self.alert('the run failed', f'{type(error).__name__}: {error}')
            raise
        finally:
            if self.progress is not None:
                self.progress.bar.close()
            self.progress = None
            self.wandb.finish(failed)

    def _cut_back(self, step: int) -> list[str]:
        """Drop the lines from `step` on, and a last line that a kill left half written. Returns the lines kept."""
        kept = []
        for number, line in enumerate(self.path.read_text().splitlines() if self.path.exists() else [], 1):
            try:
                if line.endswith('}') and json.loads(line)['train/step'] < step:
                    kept.append(line + '\n')
            except (ValueError, KeyError):
                text = f'{self.path}: line {number} is not a line of a record ({line[:80]!r}). Fix or remove it.'
                raise SettingError(text) from None
        files.write_text(self.path, ''.join(kept), durable=True)
        return kept

    def log(self, name: str, value: Tensor | float) -> None:
        """Add to a mean over elements, ranks and steps, for the next line or the innermost `logging_apart`. A `step_N_`
        in front of the name is left out. While the record is not open there is no step, and nothing is added. Raises
        SettingError for a name that the run itself records."""
        name = utils.without_step(name)
        if OWN_NAMES.fullmatch(name):
            raise SettingError(f'log({name!r}): the run records this itself. Choose another name: {name}_of_mine')
        if self.progress is not None or self.log_to is not self.means:
            total, count = (value.float().sum(), value.numel()) if isinstance(value, Tensor) else (value, 1)
            self.log_to.add(name, total, count)

    def losses(self, losses: Tensor, t: Tensor, augmented: Tensor | None = None) -> None:
        """Losses (B,) of a micro-batch at times t (B,); `augmented` (B,): was anything done to this image?"""
        self.means.add_finite('train/loss', losses)
        self.means.add_by_time('train/loss_t', losses, t)
        if augmented is not None:
            self.means.add('train/augmented', augmented.float().sum(), augmented.numel())

    def step(self, lr: float, norms: Mapping[str, Tensor]) -> None:
        """After an optimizer step: its learning rate, and the gradient norm of each network before clipping."""
        for name, norm in norms.items():
            self.means.add_finite('train/grad_norm' if name == 'network' else f'train/grad_norm_{name}', norm)
        self.means.put('train/lr', lr)
        if self.progress is not None and self.progress.advance():
            step = self.progress.step
            self.progress.show(step, self.means.here('train/loss'), self.speed(step))

    def clear(self) -> None:  # forgets the running means
        self.means.clear()

    @contextlib.contextmanager
    def logging_apart(self) -> Iterator[dict[str, float]]:
        """Yields a dict, which gets the means of values logged in this block. Training's means do not."""
        logged: dict[str, float] = {}
        before, self.log_to = self.log_to, RunningMeans(self.device)
        try:
            yield logged
            logged |= self.log_to.means()
        finally:
            self.log_to = before

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> [sum, count] over all ranks, on the CPU."""
        return self.means.over_ranks()

    def load_state_dict(self, sums: dict[str, Tensor]) -> None:
        self.means.load(sums)

    def restart(self, step: int) -> None:  # measures speed from now on
        self.restarted, self.waited_before = (time.monotonic(), step), self.waited()

    def speed(self, step: int) -> float:  # images per second
        return (step - self.restarted[1]) * self.config.global_batch_size / (time.monotonic() - self.restarted[0])

    def summary(self, step: int) -> dict[str, float]:
        """The means since the last `clear`, memory in GB, speed, and the share of time spent waiting for data. Prints
        the progress."""
        values = self.means.means() | {'train/memory_gb': utils.peak_memory_gb(self.device)}
        if step > self.restarted[1]:  # else a resumed run rewrites the line of its checkpoint
            values['train/images_per_second'] = speed = self.speed(step)
            values['train/waiting'] = (self.waited() - self.waited_before) / (time.monotonic() - self.restarted[0])
            if self.progress is not None:
                self.progress.show(step, values.get('train/loss', math.nan), speed)
        return values

    @contextlib.contextmanager
    def line(self, step: int) -> Iterator[dict[str, float]]:
        """Yields a dict, which is written as a line of the record at the end, also after a stop. After an error only
        a run of one process writes it: with several, writing needs all ranks, and one may have failed. Raises
        SaveError on every rank if rank 0 cannot write. If anything was due, speed is measured from here on."""
        values: dict[str, float] = {}
        try:
            yield values
        except Exception as error:
            if isinstance(error, Stopped) or ranks.world_size() == 1:
                self.write(step, values)
            raise
        self.write(step, values)
        # saving, drawing and evaluating do not count in the speed: measure it from here on if one of them is due
        c, last = self.config, step >= self.config.num_training_steps
        periods = (c.log_every, c.eval_every, c.eval_metrics_every, c.sample_every, c.save_every)
        if last or step == self.restarted[1] or any(every > 0 and step % every == 0 for every in periods):
            self.restart(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the line of this step, or add to it. All ranks call this; a full disk raises SaveError on all."""
        if values:
            first = {'train/step': step, 'train/images': step * self.config.global_batch_size}
            ranks.on_main(lambda: self._append(step, first | values))

    def _append(self, step: int, values: dict[str, float]) -> None:
        last, offset, before = self.last_line
        values = (before if last == step else {}) | values | self._percentiles()
        finite = {k: v if abs(v) < math.inf else str(v) for k, v in values.items()}  # JSON has no NaN
        with self._disk(), open(self.path, 'ab') as file:
            if last == step:
                file.truncate(offset)
            self.last_line = (step, offset if last == step else file.tell(), values)
            file.write(f'{json.dumps(finite)}\n'.encode())
            file.flush()
            os.fsync(file.fileno())  # the line survives a power cut
        new = {k: v for k, v in values.items() if last != step or k not in before}
        self.wandb.line(step, new)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            fix = 'Make room there' if self.path.parent.is_dir() else 'The folder is gone: put it back'
            text = f'{self.path.parent}: the record cannot be written ({files.cause_of(error)}). {fix}, and the same '
            raise SaveError(f'{text}command resumes from the last checkpoint.') from error

    def picture(self, name: str, picture: Tensor, step: int, folder: str = 'samples') -> None:
        """Write picture (3, H, W) uint8 to folder/name.png; wandb has one panel for each name without `step_...`."""
        if self.progress is not None and ranks.is_main():
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            self._save(image, f'{folder}/{name}.png')
            self.wandb.picture(step, name, image)

    def _save(self, image: Image.Image, name: str) -> None:
        with self._disk(), files.atomic_write(self.path.parent / name) as temporary:
            image.save(temporary, 'PNG')

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Log a histogram of all elements of a tensor to wandb. The next line of the record has three percentiles of
        the newest histogram of each name, and draws it as samples/histogram_<name>.png."""
        if self.progress is not None and ranks.is_main():
            name = utils.without_step(name)
            self.histograms[name] = values.detach()
            drawn = lambda wandb: wandb.Histogram(values.detach().float().cpu().numpy())  # noqa: E731  # CPU-GPU sync
            self.wandb.log(step, lambda wandb: {name: drawn(wandb)})

    def _percentiles(self) -> dict[str, float]:
        """Percentiles of the histograms since the last line, `NAME_p50` and so on. Draws them."""
        found: dict[str, float] = {}
        for name, values in self.histograms.items():
            finite = values.flatten()[:: 1 + values.numel() // 1_000_000].float().cpu()  # quantile has a limit on them
            if len(finite := finite[finite.isfinite()]):
                found |= {f'{name}_p{p:02}': float(f'{finite.quantile(p / 100):.7g}') for p in (5, 50, 95)}
                self._save(bars(finite), f'samples/histogram_{name.replace("/", "_")}.png')
        self.histograms = {}
        return found

    def alert(self, kind: str, text: str) -> None:
        """Alert the user by wandb now; at most one alert an hour of each kind, from rank 0."""
        self.wandb.alert(kind, text)


def bars(values: Tensor) -> Image.Image:
    """A histogram of values (n,), with their range written above."""
    counts = values.histc(64)
    dark = torch.arange(100, 0, -1)[:, None] <= (100 * counts / counts.max()).round()  # (100, 64)
    image = Image.new('L', (320, 116), 255)
    image.paste(Image.fromarray((255 - 160 * dark).byte().repeat_interleave(5, 1).numpy()), (0, 16))
    ImageDraw.Draw(image).text((2, 2), f'{values.min():.4g} to {values.max():.4g}, {len(values)} values', 0)
    return image
