"""Helpers of several tests: tiny settings, real runs of run.sh, and comparisons of what runs leave."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    channels=8,
    num_res_blocks=1,
    attention_resolutions=(),
    global_batch_size=32,
    num_training_steps=12,
    optimizer='adamw',
    base_lr=1e-3,
    warmup_steps=2,
    ema_decays=(0.999,),
    time_sampler='uniform',
    log_every=3,
    save_every=4,
    keep_every=0,
    sample_every=0,
    eval_every=6,
    num_sample_steps=2,
    final_eval=False,
    wandb='disabled',
)
# names in the record whose values change when a run is repeated
LEVELS = ('train/floor', 'eval/reference_floor', 'eval/reference_gaussian')
NOT_REPEATED = ('train/images_per_second', 'train/memory_gb', 'train/waiting')


def slow_but(quick, names) -> list:
    """Parameters for each of `names`, marked as slow unless they are in `quick`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow, id=str(name)) for name in names]


def as_flags(settings: dict) -> list[str]:
    """Settings as command-line flags."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no_{name}')
        else:
            flags += [f'--{name}', *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


def launch_env(nproc: int) -> dict[str, str]:
    """The environment for run.sh: these tests' own python, one thread for each process, no GPU."""
    hidden = {'CUDA_VISIBLE_DEVICES': ''}
    return os.environ | {'VIRTUAL_ENV': sys.prefix, 'NPROC': str(nproc), 'OMP_NUM_THREADS': '1'} | hidden


def start_run_sh(*script: str, nproc: int = 1, env: dict | None = None, **settings) -> subprocess.Popen:
    """`sh run.sh` with TINY and these settings, in its own session: a signal reaches only this run, as from Slurm."""
    command = ['sh', 'run.sh', *script, *as_flags(TINY | settings)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=launch_env(nproc) | (env or {}),
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def run_ranks(script, folder, local_ranks):
    """Run a script in several processes with these LOCAL_RANKs; returns the JSON that each wrote into `folder`."""
    (folder / 'script.py').write_text(f'{script}\nfrom runtime import ranks\n\nranks.close()\n')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    shared = os.environ | dict(
        WORLD_SIZE=str(len(local_ranks)),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
    )
    processes = [
        subprocess.Popen(
            [sys.executable, folder / 'script.py', folder],
            env=shared | dict(RANK=str(rank), LOCAL_RANK=str(local_rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, local_rank in enumerate(local_ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {0}, errors
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(len(local_ranks))]


def columns_in(text: str) -> dict[str, list[str]]:
    """Head -> the cells below it, of all tables that reports.parts.blocks made in a text; no cell may be empty."""
    columns = {}
    for block in text.split('\n\n'):
        rows = [re.split(' {2,}', line.strip()) for line in block.strip('\n').splitlines()]
        head, *rest = [row for row in rows if len(row) > 1] or [[]]
        for row in [row for row in rest if len(row) in (len(head), len(head) + 1)]:
            for name, cell in zip(head[-len(row) + 1 :], row[1:], strict=True):
                columns.setdefault(name, []).append(cell)
    return columns


def record_of(folder: Path, levels: bool = False) -> list[dict]:
    """The complete lines of a run's record, without values that differ in each repetition, and without the floors,
    which runs in this process leave out."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines() if line.endswith('}')]
    left_out = NOT_REPEATED if levels else (*NOT_REPEATED, *LEVELS)
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in lines]


def losses(folder: Path) -> list[float]:
    return [line['train/loss'] for line in record_of(folder)]


def processes_with(text: str) -> list[int]:
    """Living processes, other than this one, whose command line holds `text`."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir('/proc'))):
        try:
            line = Path(f'/proc/{pid}/cmdline').read_bytes()
        except OSError:
            continue
        if text.encode() in line and pid != os.getpid():
            found.append(pid)
    return found


def kill_all(text: str) -> None:
    """SIGKILL to all `processes_with(text)`."""
    for pid in processes_with(text):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def assert_same(a, b) -> None:
    """Assert that two nests of dicts, lists and tensors are the same bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.equal(b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_runs(a: Path, b: Path) -> None:
    """Assert that two runs have the same weights, averages, optimizer state and record, bit for bit."""
    import saving

    one, other = saving.load(a / 'last.pt'), saving.load(b / 'last.pt')
    for name in ('network', 'ema', 'optimizer', 'step', 'finished', 'bad_steps', 'record'):
        assert_same(one[name], other[name])
    assert record_of(a) == record_of(b)


class Interrupted(Exception):
    pass


def cut_off(trainer, step, how):
    """Train for `step` steps, then get killed at once, or get a request to stop."""
    from runtime import stopping

    train_step = trainer.train_step

    def step_and_end(micro_batches):
        train_step(micro_batches)
        if trainer.step == step and how == 'killed':
            raise Interrupted
        if trainer.step == step:
            stopping.ask_to_stop()

    trainer.train_step = step_and_end
    trainer.train_loop()
