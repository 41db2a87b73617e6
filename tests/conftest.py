"""Fixtures shared by the tests. Real data, small networks: a run of TINY takes a second or two."""

import signal
import subprocess
import sys

import pytest
import torch

from main import choices
from tests.helpers import ROOT, TINY, as_flags, launch_env

torch.set_num_threads(1)
# a shell started with SIGINT ignored, as in a background job, could never catch it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Tests run on the CPU in this process, also on a machine with GPUs, except the tests of GPUs."""
    if request.module.__name__.rpartition('.')[2] not in ('test_gpu', 'test_fake_cuda'):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')  # hides Apple's GPU, too


@pytest.fixture(autouse=True)
def own_tables():
    """Every test starts with the tables of the project: rows that examples add, as they are imported, are removed."""
    tables = [(table, dict(table)) for table in choices().values()]
    yield
    for name in [name for name in sys.modules if name.partition('.')[0] == 'examples']:
        del sys.modules[name]  # imported again, it adds its rows again
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.fixture(autouse=True)
def without_reports(request, monkeypatch):
    """Runs in this process write no report.html, which takes as long as the whole tiny run, except in its own tests."""
    if request.module.__name__ != 'tests.reports.test_page':
        monkeypatch.setattr('reports.page.update', lambda folder: None)


@pytest.fixture(autouse=True, scope='session')
def without_levels():
    """Runs in this process compute no loss floors, which take half a second each, except in their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('evaluation.reference.MOST_DRAWS', 0)
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
