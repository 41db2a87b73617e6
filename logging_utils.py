"""The record of a run: metrics.jsonl and PNGs on disk always, the same on wandb when there is an account.

`Record` is what a trainer writes to; its means are in runtime/means.py. wandb is imported here only, when it is used.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import utils
from config import Config, SettingError
from runtime import files, ranks, stopping
from runtime.alive import Progress
from runtime.errors import SaveError, Stopped
from runtime.means import RunningMeans
from runtime.ranks import print_once

WANDB_INIT_TIMEOUT = 30  # seconds for which an unreachable server may hold up the start
WANDB_FINISH_TIMEOUT = 10  # and the end
WANDB_PATIENCE = 15  # and any call, if wandb's own process hangs. Longer than the one above, which wandb itself keeps


class Record:
    """Means, speed, pictures and the progress of a run. Rank 0 writes them.
    All ranks call `open`, `summary`, `line`, `apart` and `state_dict` together. `log`, `losses`, `step` and `clear`
    send nothing. `picture`, `curve` and `histogram` do nothing on ranks but 0.
    """

    def __init__(
        self, config: Config, device: torch.device, waited: Callable[[], float] = lambda: 0.0,
        seconds_at_end: Callable[[float], float] = lambda images_per_second: 0.0,
    ):  # fmt: skip
        """`waited()`: the seconds for which training has waited for data so far; `seconds_at_end`: see Progress."""
        self.config, self.device, self.waited = config, device, waited
        self.begin_progress = partial(Progress, config.num_training_steps, seconds_at_end, config.final_eval)
        self.path = config.run_dir / 'metrics.jsonl'
        self.means = self.log_to = RunningMeans(device)  # those since the last `clear`; where `log` adds, see `apart`
        self.wandb: Any = None  # the wandb run, on rank 0 while it is open
        self.wandb_id: str | None = None
        self.progress: Progress | None = None  # while the record is open
        self.last_line: tuple[int, int, dict[str, float]] = (-1, 0, {})  # its step, place in the file, and values
        self.restart(0)

    @contextlib.contextmanager
    def open(self, step: int, start: dict[str, Any] | None = None) -> Iterator[None]:
        """Keep a record within the block. Lines of metrics.jsonl from `step` on, where the run resumes, are dropped.

        `start`: this start's entry of run.json. Raises SettingError for a broken line, or if wandb='online' cannot be.
        """

        def begin() -> str | None:
            self._cut_back(step)
            self.last_line = (-1, 0, {})
            self.wandb = start_wandb(self.config, self.config.run_dir, self.wandb_id, start)
            return self.wandb_id if self.wandb is None else self.wandb.id

        try:
            self.wandb_id = ranks.on_main(begin)
            self.restart(step)
            self.progress = self.begin_progress(step)
            yield
        finally:
            if self.progress is not None:
                self.progress.bar.close()
            self.progress = None
            self._on_wandb(None)
            self.wandb = None

    def _cut_back(self, step: int) -> None:
        """Drop the lines from `step` on, and a last line that a kill left half written."""
        kept = []
        for number, line in enumerate(self.path.read_text().splitlines() if self.path.exists() else [], 1):
            try:
                if line.endswith('}') and json.loads(line)['train/step'] < step:
                    kept.append(line + '\n')
            except (ValueError, KeyError):
                text = f'{self.path}: line {number} is not a line of a record ({line[:80]!r}). Fix or remove it.'
                raise SettingError(text) from None
        files.write_text(self.path, ''.join(kept), durable=True)

    def log(self, name: str, value: Tensor | float) -> None:
        """The mean over elements, ranks and steps goes into the next line, or to the innermost `apart`. Ignored while
        the record is not open: an experiment that is built has no step. A `step_N_` in front of the name is dropped."""
        if self.progress is not None or self.log_to is not self.means:
            total, count = (value.float().sum(), value.numel()) if isinstance(value, Tensor) else (value, 1)
            self.log_to.add(utils.without_step(name), total, count)

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
    def apart(self) -> Iterator[dict[str, float]]:
        """Yields a dict that at the end holds the means of what was logged within, apart from the means of training."""
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

    def restart(self, step: int) -> None:  # measures speed from this step and this moment on
        self.restarted, self.waited_before = (time.monotonic(), step), self.waited()

    def speed(self, step: int) -> float:  # images per second
        return (step - self.restarted[1]) * self.config.global_batch_size / (time.monotonic() - self.restarted[0])

    def summary(self, step: int) -> dict[str, float]:
        """The means since the last `clear`, memory in GB, speed, and the share of time spent waiting for data. Shows
        progress."""
        values = self.means.means() | {'train/memory_gb': utils.peak_memory_gb(self.device)}
        if step > self.restarted[1]:  # else a resumed run writes the line of its checkpoint again
            values['train/images_per_second'] = speed = self.speed(step)
            values['train/waiting'] = (self.waited() - self.waited_before) / (time.monotonic() - self.restarted[0])
            if self.progress is not None:
                self.progress.show(step, values.get('train/loss', math.nan), speed)
        return values

    @contextlib.contextmanager
    def line(self, step: int) -> Iterator[dict[str, float]]:
        """Yields a dict, which becomes a line of the record at the end, also at a stop or an error of the only process:
        with several, an error may be one rank's. Raises SaveError on every rank if rank 0 cannot write. If anything was
        due, speed is measured from the end on."""
        values: dict[str, float] = {}
        try:
            yield values
        except Exception as error:
            if isinstance(error, Stopped) or ranks.world_size() == 1:
                self.write(step, values)
            raise
        self.write(step, values)
        c, last = self.config, step >= self.config.num_training_steps
        periods = (c.log_every, c.eval_every, c.eval_metrics_every, c.sample_every, c.save_every)
        if last or step == self.restarted[1] or any(every > 0 and step % every == 0 for every in periods):
            self.restart(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """The line of this step, in place of one with less. All ranks together; SaveError on all for a full disk."""
        if values:
            first = {'train/step': step, 'train/images': step * self.config.global_batch_size}
            ranks.on_main(lambda: self._append(step, first | values))

    def _append(self, step: int, values: dict[str, float]) -> None:
        finite = {k: v if abs(v) < math.inf else str(v) for k, v in values.items()}  # JSON has no NaN
        with self._disk(), open(self.path, 'ab') as file:
            last, place, before = self.last_line
            if last == step:
                file.truncate(place)
            self.last_line = (step, place if last == step else file.tell(), values)
            file.write(f'{json.dumps(finite)}\n'.encode())
            file.flush()
            os.fsync(file.fileno())  # it survives a power cut
        more = {k: v for k, v in values.items() if last != step or k == 'train/step' or k not in before}
        self._on_wandb(lambda _: more)

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
            image, panel = Image.fromarray(picture.permute(1, 2, 0).numpy()), name.removeprefix(f'step_{step:07d}_')
            with self._disk(), files.whole(self.path.parent / folder / f'{name}.png') as temporary:
                image.save(temporary, 'PNG')
            self._on_wandb(lambda wandb: {'train/step': step, f'samples/{panel}': wandb.Image(image, caption=name)})

    def curve(self, name: str, points: Sequence[tuple[float, float]], x: str, y: str) -> None:
        """A line plot on wandb, of values that metrics.jsonl holds when they are reached."""
        rows = [list(point) for point in points]
        self._on_wandb(lambda wandb: {name: wandb.plot.line(wandb.Table(columns=[x, y], data=rows), x, y, title=name)})

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """A histogram on wandb, of all elements of a tensor."""
        drawn = lambda wandb: wandb.Histogram(values.detach().float().cpu().numpy())  # noqa: E731  # CPU-GPU sync
        self._on_wandb(lambda wandb: {'train/step': step, utils.without_step(name): drawn(wandb)})

    def _on_wandb(self, values: Callable[[Any], dict[str, Any]] | None) -> None:
        """Log `values(wandb)`, None: finish. A failure ends wandb, not training, which waits for it once at most."""
        if self.wandb is None:
            return
        import wandb

        try:
            with stopping.time_limit(WANDB_PATIENCE):
                self.wandb.finish() if values is None else self.wandb.log(values(wandb))
        except Exception as error:
            self.wandb, problem = None, 'failed' if values else 'did not accept the rest of the record'
            print_once(
                f'wandb {problem} ({type(error).__name__}: {error}). The whole record is in {self.path}, and '
                f'`wandb sync` can send {self.path.parent / "wandb"} later.'
            )


# ---------------------------------------------------------------- wandb


def start_wandb(config: Config, run_dir: Path, run_id: str | None, start: dict[str, Any] | None = None) -> Any:
    """A wandb run, or None; prints which. Raises SettingError if wandb='online' cannot be.

    auto: online if a key is found (WANDB_MODE, if set, decides instead), offline if the server does not answer, else
    disabled. `start`, the entry of this start in run.json, becomes part of wandb's config.
    """
    mode = config.wandb
    if mode == 'auto' and os.environ.get('WANDB_MODE'):
        mode = {'dryrun': 'offline', 'run': 'online'}.get(os.environ['WANDB_MODE'], os.environ['WANDB_MODE'])
        print_once(f'wandb: {mode}, as WANDB_MODE says')
    if mode == 'disabled' or (mode != 'offline' and not has_wandb_key(mode)):
        return None
    import wandb

    settings = wandb.Settings(silent=True, init_timeout=WANDB_INIT_TIMEOUT)
    settings.finish_timeout, settings.finish_timeout_raises = WANDB_FINISH_TIMEOUT, True
    given: dict[str, Any] = dict(project=config.wandb_project, entity=config.wandb_entity or None, id=run_id)
    given |= dict(name=config.experiment_name, dir=run_dir, settings=settings)
    given |= dict(config=vars(config) | ({} if start is None else dict(start=start)), allow_val_change=True)
    try:
        resume = 'allow' if run_id and mode != 'offline' else None
        run = wandb.init(mode='offline' if mode == 'offline' else 'online', resume=resume, **given)
    except Exception as error:  # not all of wandb's errors derive from wandb.errors.Error
        if mode == 'online':
            raise SettingError(f"wandb='online': {error}. Use --wandb offline, and `wandb sync` later.") from error
        print_once(f'wandb: logged in, but the server does not answer ({type(error).__name__}); recording offline.')
        run = wandb.init(mode='offline', **given)
    run.define_metric('*', step_metric='train/step')
    print_once(f'wandb: {f"offline, `wandb sync` the folder {run_dir}/wandb later" if run.offline else run.url}')
    return run


def has_wandb_key(mode: str) -> bool:
    """Whether an account is logged in. If not, prints that for mode='auto', and else raises SettingError."""
    import wandb

    error: Exception | None = None
    try:
        if wandb.login(prompt=False, verify=False):
            return True
    except Exception as caught:  # no home folder, say
        error = caught
    if mode != 'auto' or isinstance(error, wandb.Error):
        why = f'{error} Correct or unset WANDB_API_KEY' if error else 'no account. Run `wandb login`'
        raise SettingError(f'wandb={mode!r}: {why}, or use --wandb offline or disabled.') from error
    why = f'cannot start here ({error})' if error else 'not logged in'
    print_once(f'wandb: {why}, so the record is kept on disk only{"" if error else " (`wandb login` to change that)"}.')
    return False


def log_table(config: Config, run_dir: Path, run_id: str, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add a table to the wandb run of this id, offline in another folder in `run_dir`. A failure is printed."""
    columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
    try:
        import wandb

        run = start_wandb(config, run_dir, run_id)
        if run is not None:
            run.log({name: wandb.Table(columns=columns, data=[[row.get(key) for key in columns] for row in rows])})
            run.finish()
    except Exception as error:
        print_once(f'wandb failed ({type(error).__name__}: {error}); the table is on disk')
