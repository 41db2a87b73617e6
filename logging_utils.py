"""The record of a run: metrics.jsonl and PNGs on disk always, the same on wandb when there is an account.

Only rank 0 keeps a record; on the other ranks every method does nothing.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import Config, SettingError
from runtime import ranks
from runtime.errors import SaveError
from runtime.ranks import print_once

WANDB_INIT_TIMEOUT = 30  # seconds that an unreachable server may hold up the start
WANDB_FINISH_TIMEOUT = 10  # and the end
wandb_hangs = False  # its threads and exit handlers would keep this process for ever
WANDB_QUEUE = 1000  # lines and pictures that may wait for it


def start_wandb(config: Config, run_dir: Path, run_id: str | None, start: dict[str, Any] | None = None) -> Any:
    """A wandb run, or None if there is none; says which. Raises SettingError if wandb='online' cannot be.

    auto: online if a key is found (WANDB_MODE, if set, decides instead), offline if the server does not answer, else
    disabled. `start`, the entry of this start in run.json, becomes part of wandb's config.
    """
    mode = config.wandb
    if mode == 'auto' and os.environ.get('WANDB_MODE'):
        mode = {'dryrun': 'offline', 'run': 'online'}.get(os.environ['WANDB_MODE'], os.environ['WANDB_MODE'])
        print_once(f'wandb: {mode}, as WANDB_MODE says')
    if mode == 'disabled':
        return None
    import wandb

    try:
        has_key = mode == 'offline' or wandb.login(prompt=False, verify=False)
    except Exception as error:  # wandb.Error; without a home folder or an entry in /etc/passwd any
        if mode == 'auto' and not isinstance(error, wandb.Error):
            print_once(f'wandb cannot start here ({error}), so the record is kept on disk only.')
            return None
        raise SettingError(
            f'wandb={mode!r}: {error} Correct or unset WANDB_API_KEY, or use --wandb offline or disabled.'
        ) from error
    if not has_key and mode == 'auto':
        print_once('wandb: not logged in, so the record is kept on disk only (`wandb login` to change that).')
        return None
    if not has_key:
        raise SettingError(
            "wandb='online': no account is logged in. Run `wandb login`, or use --wandb offline or --wandb disabled."
        )

    def init(as_mode: Literal['online', 'offline']) -> Any:
        return wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity or None,
            name=config.experiment_name,
            dir=run_dir,
            id=run_id,
            resume='allow' if run_id and as_mode == 'online' else None,
            mode=as_mode,
            config=vars(config) | ({} if start is None else dict(start=start)),
            allow_val_change=True,
            settings=wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT, silent=True),
        )

    try:
        run = init('offline' if mode == 'offline' else 'online')
    except Exception as error:  # not all of wandb's errors derive from wandb.errors.Error
        if mode == 'online':
            raise SettingError(f"wandb='online': {error}. Use --wandb offline, and `wandb sync` later.") from error
        print_once(f'wandb: logged in, but the server does not answer ({type(error).__name__}); recording offline.')
        run = init('offline')
    run.define_metric('*', step_metric='train/step')
    offline = run.settings.mode == 'offline' or run.offline
    print_once(f'wandb: {f"offline, `wandb sync` the folder {run_dir}/wandb later" if offline else run.url}')
    return run


def log_table(config: Config, run_dir: Path, run_id: str, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add a table to the wandb run of this id, of which `run_dir` holds the record; what fails is said. Offline it is
    another folder of the same run, and `wandb sync` sends both."""
    columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
    try:
        import wandb

        run = start_wandb(config, run_dir, run_id)
        if run is not None:
            run.log({name: wandb.Table(columns=columns, data=[[row.get(key) for key in columns] for row in rows])})
            run.finish()
    except Exception as error:
        print_once(f'wandb failed ({type(error).__name__}: {error}); the table is on disk')


def write_through(file: IO[str], text: str) -> None:
    """Write `text` so that it survives a power cut."""
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


class Logger:
    """Writes `run_dir`/metrics.jsonl, pictures, and the same to wandb. `wandb_id` is to be kept in the checkpoint."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        step: int = 0,
        wandb_id: str | None = None,
        start: dict[str, Any] | None = None,
    ):
        """Cuts an existing record back to the steps before `step`, where the run goes on.

        `start`: what run_record.write_start returned, for wandb. Raises SettingError, see start_wandb.
        """
        self.active, self.run_dir, self.run = ranks.is_main(), run_dir, None

        def open_record() -> None:
            self._cut_back(step)
            self.run = start_wandb(config, run_dir, wandb_id, start)

        ranks.on_main(open_record)
        self.wandb_id = self.run.id if self.run is not None else wandb_id
        self.for_wandb: queue.Queue[Callable[[Any], None] | None] = queue.Queue(WANDB_QUEUE)
        self.sender = threading.Thread(target=self._send_to_wandb, args=(self.run,), daemon=True)
        if self.run is not None:
            self.sender.start()

    @property
    def path(self) -> Path:
        return self.run_dir / 'metrics.jsonl'

    def _cut_back(self, step: int) -> None:
        """Drop the lines from `step` on, and a last line that a kill left half written."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        whole = [(number, line) for number, line in enumerate(lines, 1) if line.endswith('}')]
        kept = [line + '\n' for number, line in whole if self._step_of(line, number) < step]
        temporary = self.path.with_suffix('.tmp')
        with open(temporary, 'w') as file:
            write_through(file, ''.join(kept))
        os.replace(temporary, self.path)

    def _step_of(self, line: str, number: int) -> int:
        try:
            return json.loads(line)['train/step']
        except (ValueError, KeyError):
            text = f'{self.path}: line {number} is no line of a record ({line[:80]!r}). Mend or remove it.'
            raise SettingError(text) from None

    def log(self, values: dict[str, float], step: int) -> None:
        """One line of the record. A value that is not finite is written as a string, which JSON can hold."""
        if not self.active:
            return
        values = {'train/step': step, **values}
        finite = {k: v if abs(v) < float('inf') else str(v) for k, v in values.items()}
        with self._disk(), open(self.path, 'a') as file:
            write_through(file, json.dumps(finite) + '\n')
        self._on_wandb(lambda run: run.log(values))

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(
                f'{self.run_dir}: the record cannot be written ({error}). Make room there, and the same command goes '
                'on from the last checkpoint.'
            ) from error

    def log_picture(self, name: str, picture: Tensor, step: int, folder: str = 'samples') -> None:
        """Write picture (3, H, W) uint8 to folder/name.png; wandb has one panel for each name without `step_...`."""
        if not self.active:
            return
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        path = self.run_dir / folder / f'{name}.png'
        with self._disk():
            path.parent.mkdir(exist_ok=True)
            image.save(path)

        def show(run: Any) -> None:
            import wandb

            panel = name.removeprefix(f'step_{step:07d}_')
            run.log({'train/step': step, f'samples/{panel}': wandb.Image(image, caption=name)})

        self._on_wandb(show)

    def log_curve(self, name: str, points: Sequence[tuple[float, float]], x: str, y: str) -> None:
        """A line plot on wandb, of what metrics.jsonl holds as it happens."""

        def show(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=[x, y], data=[list(point) for point in points])
            run.log({name: wandb.plot.line(table, x, y, title=name)})

        self._on_wandb(show)

    def _on_wandb(self, do: Callable[[Any], None]) -> None:
        """Have `do(run)` done in another thread: training neither waits for wandb nor ends with it."""
        if self.run is not None:
            try:
                self.for_wandb.put_nowait(do)
            except queue.Full:
                self._leave_wandb('it takes nothing any more')

    def _send_to_wandb(self, run: Any) -> None:
        while (do := self.for_wandb.get()) is not None:
            try:
                do(run)
            except Exception as error:
                return self._leave_wandb(f'{type(error).__name__}: {error}')
        return None

    def _leave_wandb(self, why: str) -> None:
        self.run = None
        print_once(f'wandb failed ({why}). Training goes on; the whole record is in {self.path}.')

    def close(self) -> None:
        """End the wandb run, which sends what is left. A server that does not answer is not waited for."""
        self._on_wandb(lambda run: run.finish())
        with contextlib.suppress(queue.Full):
            self.for_wandb.put_nowait(None)
        if self.sender.is_alive():
            self.sender.join(WANDB_FINISH_TIMEOUT)
        if self.sender.is_alive():
            global wandb_hangs
            wandb_hangs = True
            print_once(
                f'wandb: the rest of the record is not taken; the whole of it is in {self.path}, '
                f'and `wandb sync` can send {self.run_dir / "wandb"} later'
            )


Number = Tensor | float


class RunningMeans:
    """Means of named values since the last `clear`.

    Values are kept as they come, and summed when the means are asked for or MOST are waiting: a training step pays no
    kernel and no CPU-GPU sync for them. On the CPU the sums do not depend on when that happens, to the last bit.
    """

    MOST = 1000  # calls whose values wait

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}  # name -> [sum, count], float64
        self.waiting: dict[tuple[str, int, bool], list[tuple[Number | None, ...]]] = {}
        self.calls = 0

    def add(self, name: str, total: Number, count: Number) -> None:
        """Add `total`, the sum of `count` values: tensors of one element, or numbers."""
        self._keep((name, 0, False), total, count, None)

    def add_finite(self, name: str, values: Tensor) -> None:
        """Add those of `values` that are finite: a bad step must not hide the others."""
        self._keep((name, 0, True), values, None, None)

    def add_by_time(self, name: str, values: Tensor, t: Tensor, bins: int = 10) -> None:
        """Add values (B,), those that are finite, to the mean of their interval of t (B,): `name`_0.0_0.1 and so on."""
        self._keep((name, bins, True), values, None, t)

    def _keep(self, key: tuple[str, int, bool], *given: Number | None) -> None:
        own = tuple(x.detach().to(self.device) if isinstance(x, Tensor) else x for x in given)
        self.waiting.setdefault(key, []).append(own)
        self.calls += 1
        if self.calls >= self.MOST:
            self._fold()

    def _column(self, values: tuple[Number | None, ...]) -> Tensor | None:
        """All elements of the values, one after the other, on the device; None if they are."""
        if values[0] is None:
            return None
        if not any(isinstance(value, Tensor) for value in values):
            return torch.tensor(values, dtype=torch.float64).to(self.device, non_blocking=True)
        double = partial(torch.tensor, dtype=torch.float64, device=self.device)
        return torch.cat([x.reshape(-1) if isinstance(x, Tensor) else double([x]) for x in values])

    def _fold(self) -> None:
        """Add to the sums what waits, in the order in which it came."""
        for (name, bins, only_finite), calls in self.waiting.items():
            totals, counts, t = map(self._column, zip(*calls, strict=True))
            assert totals is not None
            if only_finite:
                counts = totals.isfinite()
                totals = totals.where(counts, 0)
            assert counts is not None
            place = torch.zeros_like(totals, dtype=torch.int64) if t is None else (t * bins).long().clamp(0, bins - 1)
            names = [f'{name}_{i / bins:.1f}_{(i + 1) / bins:.1f}' for i in range(bins)] or [name]
            nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
            table = torch.stack([self.sums.get(key, nothing) for key in names])  # (bins or 1, 2)
            for column, new in enumerate((totals, counts)):
                table[:, column].index_add_(0, place, new.double())
            self.sums |= zip(names, table, strict=True)
        self.waiting, self.calls = {}, 0

    def clear(self) -> None:
        self.sums, self.waiting, self.calls = {}, {}, 0

    def over_ranks(self) -> dict[str, Tensor]:
        """The sums of all ranks together, on the CPU. Ranks may have logged different names."""
        self._fold()
        names = sorted({name for on_rank in ranks.all_gather_objects(list(self.sums)) for name in on_rank})
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
        table = torch.stack([self.sums.get(name, nothing) for name in names])
        return dict(zip(names, ranks.all_reduce(table).cpu(), strict=True))  # CPU-GPU sync

    def means(self) -> dict[str, float]:
        """By name, to seven digits: what is left is the order of summation. A name with no count is left out."""
        pairs = {name: pair.tolist() for name, pair in self.over_ranks().items()}
        return {name: float(f'{total / count:.7g}') for name, (total, count) in pairs.items() if count > 0}

    def load(self, sums: dict[str, Tensor]) -> None:
        """Go on from `over_ranks` of a checkpoint."""
        self.clear()
        self.sums = {name: pair.to(self.device) for name, pair in sums.items()} if ranks.is_main() else {}


class Speedometer:
    """Images per second since the last `restart`."""

    def __init__(self, step: int = 0):
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure from this step and this moment on."""
        self.began, self.first = time.monotonic(), step

    def images_per_second(self, step: int, batch: int) -> float | None:
        """The speed of the steps up to `step`, of `batch` images each; None if there was none since the restart."""
        steps = step - self.first
        return steps * batch / self.seconds() if steps > 0 else None

    def seconds(self) -> float:
        """Since the last restart."""
        return time.monotonic() - self.began


class Progress:
    """Rank 0's tqdm bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, step: int, total: int, seconds_between_lines: float = 5.0):
        self.total, self.every = total, seconds_between_lines
        self.last, self.start = -float('inf'), (time.monotonic(), step)
        on_terminal = ranks.is_main() and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=step, unit='step', dynamic_ncols=True) if on_terminal else None

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, loss: float, images_per_second: float, after: float | None = None) -> None:
        """The time left is that of the steps, with what is drawn and evaluated between them, and `after`, the seconds
        of what follows the last step; None: they are not known yet."""
        speed = f'{images_per_second:.0f} images/s'
        if self.bar is not None:
            self.bar.set_postfix_str(f'loss {loss:.4f}, {speed}')
        elif time.monotonic() - self.last >= self.every or step == self.total:
            began, first = self.start
            self.last = time.monotonic()
            seconds = (self.last - began) / max(step - first, 1) * (self.total - step) + (after or 0)
            left = 'min of training left, then samples' if after is None else 'min left'
            print_once(f'step {step}/{self.total}  loss {loss:.4f}  {speed}  {seconds / 60:.1f} {left}')

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
