"""A run's copy on wandb: lines, pictures, alerts. wandb is only imported here, and only when it is used.

A row of wandb is a training step. A failure ends the copy, not training, which waits for wandb once at most.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import utils
from runtime import files, stopping
from runtime.errors import SettingError
from runtime.ranks import print_once

INIT_TIMEOUT = 30  # seconds that an unreachable server may delay the start
FINISH_TIMEOUT = 10  # seconds that it may delay the end; wandb itself enforces both
CALL_TIMEOUT = 15  # seconds that any call may take if wandb's own process hangs; longer than FINISH_TIMEOUT
ALERT_EVERY = 3600  # seconds between two alerts of the same kind
TIME_BIN = re.compile(r'(.+)_t_([\d.]+)_([\d.]+)')  # a metric's name: the mean over an interval of times


class WandbRun:
    """The wandb run of a record, or a stand-in without one. Steps that an earlier start has sent are not sent again."""

    def __init__(self, run: Any = None, folder: Path = Path(), sent: int | None = None):
        """`sent`: the last step that wandb has; None, after a kill: unknown, so the server (if any) decides."""
        self.run: Any = run
        self.folder, self.id = folder, run and run.id
        self.row = run.starting_step if run else 0  # wandb drops rows below the last one that it has
        self.sent = self.row - 1 if sent is None else sent
        self.first = self.sent + 1
        self.is_sure = sent is not None or not (run and run.offline)  # whether `sent` is known
        self.curves: dict[str, dict[float, float]] = {}  # name -> middle of each interval of times -> newest value
        self.alerted: dict[str, float] = {}  # kind of alert -> time of the last one
        if run:
            self.write_state(None)

    def write_state(self, sent: int | None) -> None:
        """Write down the last step that was sent, for the next start; None: unknown, as long as the run lasts."""
        files.write_text(self.folder / 'resume.json', json.dumps(dict(id=self.id, sent=sent)))

    def catch_up(self, lines: Iterable[str]) -> None:
        """Send the lines of metrics.jsonl that wandb lacks because it was off, or because a kill lost them."""
        for line in map(json.loads, lines if self.is_sure else ()):
            numbers = {name: float(value) for name, value in line.items()}
            self.log(line['train/step'], partial(lambda values, _: values, numbers), whole=True)

    def log(self, step: int, values: Callable[[Any], dict[str, Any]], whole: bool = False) -> None:
        """Add `values(wandb)` to the row of this step. wandb shows a `whole` row at once, others with the next row."""
        if self.run is None or step < self.first:
            return
        self.row, self.sent = max(self.row, step), step
        self._call(lambda wandb: self.run.log({'train/step': step} | values(wandb), step=self.row, commit=whole))
        self.row += whole  # a committed row accepts no more values: later ones go into the next row

    def line(self, step: int, values: dict[str, float]) -> None:
        """Send a line of the record and, if it has held-out losses, a plot of all losses by time."""
        for name, value in values.items():
            if match := TIME_BIN.fullmatch(name):
                self.curves.setdefault(match[1], {})[round((float(match[2]) + float(match[3])) / 2, 4)] = value
        is_due = self.curves and any(name.startswith('eval/loss') for name in values)
        self.log(step, lambda wandb: values | ({'loss_by_time': self.by_time(wandb, step)} if is_due else {}), True)

    def by_time(self, wandb: Any, step: int) -> Any:
        xs, ys = zip(*((list(curve), list(curve.values())) for curve in self.curves.values()), strict=True)
        return wandb.plot.line_series(xs, ys, list(self.curves), f'loss by time, step {step}', 't')

    def picture(self, step: int, name: str, image: Any) -> None:
        """Send a picture; names that differ only in the step share a panel, with a slider over steps."""
        panel = utils.without_step(name)
        text = utils.caption(f'{panel}_step_{step}')
        self.log(step, lambda wandb: {f'samples/{panel}': wandb.Image(image, caption=text)})

    def alert(self, kind: str, text: str) -> None:
        """Send an alert, at most one of each kind per hour."""
        now = time.monotonic()
        if now - self.alerted.get(kind, -math.inf) > ALERT_EVERY:
            self.alerted[kind] = now
            self._call(lambda _: self.run.alert(kind, text, 'WARN', wait_duration=ALERT_EVERY))

    def finish(self, failed: bool = False) -> None:
        def end(_: Any) -> None:
            self.run.finish(exit_code=int(failed))
            self.write_state(self.sent)

        self._call(end, 'did not accept the rest of the record')
        self.run = None

    def _call(self, call: Callable[[Any], Any], problem: str = 'failed') -> None:
        if self.run is None:
            return
        import wandb

        try:
            with stopping.time_limit(CALL_TIMEOUT):
                call(wandb)
        except Exception as error:
            self.run = None
            print_once(
                f'wandb {problem} ({type(error).__name__}: {error}). The whole record is in {self.folder.parent}, and '
                f'`wandb sync` can send {self.folder} later.'
            )


def group_of(config: Any) -> str:
    """The name of a run without its seed: runs that differ only in their seed form a group."""
    name = config.experiment_name
    if name == config.default_name():  # a long name ends in a hash that depends on the seed, so make it without one
        name = type(config)(**vars(config) | dict(seed=config.baseline()['seed'], experiment_name='')).experiment_name
    return re.sub(r'[_-]?seed[=_-]?\d+', '', name) or name


def start_wandb(config: Any, run_dir: Path, run_id: str | None, start: dict[str, Any] | None = None) -> WandbRun | None:
    """A wandb run, or None if disabled; prints the mode. Raises SettingError if a setting or a variable is wrong, or if
    wandb='online' is impossible.

    auto: online if there is a key, offline if the server does not answer, else disabled; WANDB_MODE, if set, wins.
    `start`, the entry of this start in run.json, becomes part of wandb's config.
    """
    mode, variable = config.wandb, os.environ.get('WANDB_MODE')
    if mode == 'auto' and variable:
        mode = {'dryrun': 'offline', 'run': 'online'}.get(variable, variable)
        if mode not in ('online', 'offline', 'disabled'):
            raise SettingError(f'WANDB_MODE={variable!r}: it must be online, offline or disabled. Correct or unset it.')
        print_once(f'wandb: {mode}, from WANDB_MODE')
    if mode == 'disabled' or not is_installed(mode) or (mode != 'offline' and not has_wandb_key(mode)):
        return None
    file = run_dir / 'wandb/resume.json'
    state = json.loads(file.read_text()) if file.exists() else {}
    arguments = init_arguments(config, run_dir, run_id or state.get('id'), start)
    run = init_wandb(mode, arguments)
    run.define_metric('*', step_metric='train/step')
    for names in ('train/loss_t_*', 'train/floor_t_*', 'eval/reference_t_*'):  # `by_time` shows them in one plot
        run.define_metric(names, step_metric='train/step', hidden=True)
    print_once(f'wandb: {f"offline. Send it later: wandb sync {run_dir}/wandb" if run.offline else run.url}')
    state = state if arguments['id'] else dict(id=run.id, sent=-1)
    return WandbRun(run, run_dir / 'wandb', state['sent'] if state.get('id') == run.id else None)


def init_arguments(config: Any, run_dir: Path, run_id: str | None, start: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of wandb.init. A flag takes precedence over wandb's own variable, and that over the default."""
    import wandb

    unless_set = lambda variable, value: None if os.environ.get(variable) else value  # noqa: E731
    settings = wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT)
    settings.finish_timeout, settings.finish_timeout_raises = FINISH_TIMEOUT, True
    project = config.wandb_project or unless_set('WANDB_PROJECT', 'diffusion')
    arguments = dict(project=project, entity=config.wandb_entity or None, id=run_id, resume='allow' if run_id else None)
    arguments |= dict(name=unless_set('WANDB_NAME', config.experiment_name), dir=run_dir, settings=settings)
    arguments |= dict(group=unless_set('WANDB_RUN_GROUP', group_of(config)), allow_val_change=True)
    return arguments | dict(config=vars(config) | ({} if start is None else dict(start=start)))


def init_wandb(mode: str, arguments: dict[str, Any]) -> Any:
    """wandb.init, falling back to offline if mode='auto' and the server does not answer."""
    import wandb

    try:
        return wandb.init(mode='offline' if mode == 'offline' else 'online', **arguments)
    except Exception as error:  # not all of wandb's errors derive from wandb.errors.Error
        if mode != 'auto':
            other = 'offline, and `wandb sync` later' if mode == 'online' else 'disabled'
            why = ' '.join(str(error).split()).rstrip('.')
            raise SettingError(f'wandb={mode!r}: {why}. Correct it, or use --wandb {other}.') from error
        print_once(f'wandb: logged in, but the server does not answer ({type(error).__name__}); recording offline.')
    return init_wandb('offline', arguments)


def is_installed(mode: str) -> bool:
    """Try to import wandb. If it is missing, mode 'auto' prints a line; any other mode raises SettingError."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        if mode != 'auto':
            raise SettingError(f'wandb={mode!r}: {error}. Install wandb, or use --wandb disabled.') from error
        print_once(f'wandb: {error}, so the record is kept on disk only.')
        return False
    return True


def has_wandb_key(mode: str) -> bool:
    """Whether wandb can log in. If not, mode='auto' prints the reason and returns False; other modes raise
    SettingError."""
    import wandb

    error: Exception | None = None
    try:
        if wandb.login(prompt=False, verify=False):
            return True
    except Exception as caught:  # for example, a user without a home folder
        error = caught
    if mode != 'auto' or isinstance(error, wandb.Error):
        why = f'{error} Correct or unset WANDB_API_KEY' if error else 'no account. Run `wandb login`'
        raise SettingError(f'wandb={mode!r}: {why}, or use --wandb offline or disabled.') from error
    why = f'cannot start here ({error})' if error else 'not logged in'
    print_once(f'wandb: {why}, so the record is kept on disk only{"" if error else " (`wandb login` to change that)"}.')
    return False


def log_table(config: Any, run_dir: Path, run_id: str, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add a table to the wandb run of this id (offline: in a second folder in `run_dir`). A failure is only printed."""
    columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
    file = run_dir / 'wandb/resume.json'
    state = file.read_text() if file.exists() else ''
    try:
        import wandb

        run = start_wandb(config, run_dir, run_id)
        if run is not None:
            table = wandb.Table(columns=columns, data=[[row.get(key) for key in columns] for row in rows])
            run.run.log({name: table})
            run.finish()
            if state:  # restore it: this start sent no steps, and the run may still be training
                files.write_text(file, state)
    except Exception as error:
        print_once(f'wandb failed ({type(error).__name__}: {error}); the table is on disk')
