"""Fixtures shared by the tests. Real data, small networks: a run of TINY takes a second or two."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
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

# names of the record that are not the same when a run is repeated
LEVELS = ('train/floor', 'eval/reference_floor', 'eval/reference_gaussian')
NOT_REPEATED = ('train/images_per_second', 'train/memory_gb', 'train/waiting')

torch.set_num_threads(1)
# a shell ignores for ever what was ignored when it began, as in a job behind &
signal.signal(signal.SIGINT, signal.default_int_handler)


def as_flags(settings: dict) -> list[str]:
    """Settings as command-line flags."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no_{name}')
        else:
            flags += [f'--{name}', *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """What a test builds in this process is on the CPU, also on a machine with GPUs, but for the tests of GPUs."""
    if request.module.__name__ not in ('test_gpu', 'test_fake_cuda'):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)


@pytest.fixture(autouse=True)
def without_reports(request, monkeypatch):
    """Runs in this process write no report.html, which takes as long as the whole tiny run, but in the tests of it."""
    if request.module.__name__ != 'test_report':
        monkeypatch.setattr('report.update', lambda folder: None)


@pytest.fixture(autouse=True, scope='session')
def without_levels():
    """Runs in this process do without the levels of losses, half a second each, but in the tests of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('reference.MOST_DRAWS', 0)
        yield


@pytest.fixture
def tiny_config(tmp_path):
    """`tiny_config(**settings)`: a Config of a run that takes seconds, in a temporary folder."""
    from config import Config

    return lambda **settings: Config(
        **(TINY | dict(ckpt_dir=str(tmp_path / 'ckpts'), data_dir=str(tmp_path / 'data')) | settings)
    )


@pytest.fixture
def build_trainer(monkeypatch):
    """`build_trainer(config, trainer_class=ExampleDiffusionTrainer)`: what main builds, on the CPU, in this process."""
    import main

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    return main.build


@pytest.fixture
def run_sh(tmp_path):
    """`run_sh(script, nproc=1, timeout=120, env={}, **settings)`: a real `sh run.sh` with TINY and these settings."""

    def run(*script, nproc=1, timeout=120, env=None, cwd=ROOT, **settings):
        settings = TINY | dict(ckpt_dir=str(tmp_path / 'ckpts'), experiment_name='run') | settings
        return subprocess.run(
            ['sh', str(ROOT / 'run.sh'), *script, *as_flags(settings)],
            cwd=cwd,
            env=launch_env(nproc) | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope='session')
def short_run(tmp_path_factory):
    """A finished run of 12 steps on digits, with a cache of its own."""
    folder = tmp_path_factory.mktemp('runs')
    settings = dict(experiment_name='run', ema_decays=(0.5, 0.9), attention_resolutions=(4,))
    settings |= dict(label_dropout=0.2, dequantize=True, ckpt_dir=folder, data_dir=folder / 'data')
    done = subprocess.run(
        ['sh', 'run.sh', *as_flags(TINY | settings)],
        cwd=ROOT,
        env=launch_env(1),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder / 'run'


def launch_env(nproc: int) -> dict[str, str]:
    """The environment for run.sh: these tests' own python, one thread for each process, no GPU."""
    hidden = {'CUDA_VISIBLE_DEVICES': ''}
    return os.environ | {'VIRTUAL_ENV': sys.prefix, 'NPROC': str(nproc), 'OMP_NUM_THREADS': '1'} | hidden


def start_run_sh(*script: str, nproc: int = 1, env: dict | None = None, **settings) -> subprocess.Popen:
    """`sh run.sh` with TINY and these settings, in a session of its own: a signal reaches it alone, as from Slurm."""
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


def record_of(folder: Path, levels: bool = False) -> list[dict]:
    """The whole lines of a run's record, without what differs from time to time, and without the levels of losses,
    which runs in this process do without."""
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
    """Bit for bit the same nest of dicts, lists and tensors."""
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
    """Two runs' folders: weights, averages, optimizer and record, bit for bit."""
    import saving

    one, other = saving.load(a / 'last.pt'), saving.load(b / 'last.pt')
    for name in ('network', 'ema', 'optimizer', 'step', 'finished', 'bad_steps', 'record'):
        assert_same(one[name], other[name])
    assert record_of(a) == record_of(b)
