"""sweep.py: trains a run for every combination of settings, and skips finished runs."""

import os
import signal
import subprocess

import pytest

from config import SettingError, parse_config
from runtime import files
from scripts.sweep import combinations, page_name, sweep
from tests.helpers import ROOT, TINY, as_flags, columns_in, launch_env, record_of, wait_until


def test_every_combination_once():
    runs = combinations(
        ['--base_lr', '1e-3', '3e-4', '--time_sampler=uniform', '--seed', '1', '2', '--', '--channels', '8']
    )
    assert runs[0] == ['--channels', '8', '--base_lr', '1e-3', '--time_sampler', 'uniform', '--seed', '1']
    assert [(run[3], run[7]) for run in runs] == [('1e-3', '1'), ('1e-3', '2'), ('3e-4', '1'), ('3e-4', '2')]


def test_the_page_is_named_after_what_is_swept():
    """With a fixed name, a second sweep would overwrite the page of the first."""
    name = lambda words: page_name([parse_config(flags) for flags in combinations(words.split())])  # noqa: E731
    assert name('--base_lr 1e-3 2e-3 --seed 1 2') == 'sweep_seed=1-2_base_lr=0p001-0p002_digits.html'
    assert name('--seeds 2 -- --preset mnist --channels 8') == 'sweep_seed=0-1_mnist_channels=8.html'
    assert name('--preset digits digits_long -- --seed 3') == 'sweep_preset=digits-digits_long_seed=3.html'
    assert name('--preset digits digits_long --channels 8') == 'sweep_preset=digits-digits_long_channels=8.html'
    assert name('--channels 8 16 -- --ema_decays 0.9') == 'sweep_channels=8-16_digits_ema_decays=0p9.html'


@pytest.mark.parametrize(
    ('words', 'text'),
    [
        (['1e-3'], "'1e-3' comes before a flag"),
        (['--base_lr', '--', '--seed', '1'], '--base_lr has no values'),
        (['--', '--seed', '1'], 'The grid has no values'),
        (['--seed', '1', '1'], 'Two runs would both be called'),
        (['--seed', '1', '2', '--', '--experiment_name', 'a'], "Two runs would both be called 'a'"),
        (['--base_lr', '1', '-1'], 'base_lr=-1.0'),
    ],
)
def test_a_malformed_grid_is_refused_before_the_first_run(words, text):
    with pytest.raises(SettingError, match=text):
        combinations(words)


@pytest.mark.slow
def test_stopped_resumed_and_compared(tmp_path):
    shared = as_flags(TINY | dict(ckpt_dir=tmp_path, num_training_steps=40, log_every=1))
    command = ['sh', 'run.sh', 'sweep.py', '--base_lr', '1e-3', '2e-3', '--', *shared]
    start = dict(cwd=ROOT, env=launch_env(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = subprocess.Popen(command, start_new_session=True, **start)
    assert wait_until(lambda: any(path.read_text().count('\n') > 3 for path in tmp_path.glob('*/metrics.jsonl')), 60)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 75 and 'run 1 of 2' in out and 'run 2' not in out, err
    done = subprocess.run(command, cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and 'resuming' in done.stdout and 'run 2 of 2' in done.stdout, done.stderr
    assert sorted(columns_in(done.stdout)['base_lr']) == ['0.001', '0.002']
    (page,) = tmp_path.glob('sweep_*.html')
    assert 'base_lr=0p001-0p002' in page.name and len(list(tmp_path.glob('*/last.pt'))) == 2
    again = subprocess.run(command, cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and again.stdout.count('is finished') == 2


@pytest.mark.slow
def test_one_task_of_an_array_trains_one_run_and_a_failed_run_is_named(tmp_path):
    shared = as_flags(TINY | dict(ckpt_dir=tmp_path))
    command = ['sh', 'run.sh', 'sweep.py', '--model_type', 'velocity', 'x1', '--t_max', '0.999', '1', '--', *shared]
    env = launch_env(1) | dict(SLURM_ARRAY_TASK_ID='0')
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob('*/metrics.jsonl')
    assert record_of(folder.parent)[-1]['train/step'] == 12
    env = launch_env(1) | dict(SLURM_ARRAY_TASK_ID='3')
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and '1 of 1 runs failed' in done.stderr and 't_max=1 touches' in done.stderr
    assert os.listdir(tmp_path) == [folder.parent.name]


def test_a_task_of_an_array_trains_its_own_run(monkeypatch, tmp_path):
    """It writes no page."""
    done = []
    monkeypatch.setattr('scripts.sweep.run_one', lambda flags: done.append(flags) or 0)
    monkeypatch.setattr('scripts.compare.compare', lambda options: pytest.fail('it compares runs of other tasks'))
    runs = combinations(['--seed', '1', '2', '3', '--', '--ckpt_dir', str(tmp_path)])
    for flags in runs:
        files.write_text(parse_config(flags).run_dir / 'metrics.jsonl', '')
    monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '1')
    sweep(runs)
    assert done == [runs[1]]
    monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '3')
    with pytest.raises(SettingError, match='there are runs 0 to 2'):
        sweep(runs)


def test_failed_runs_are_named_after_the_last_run(monkeypatch, tmp_path):
    monkeypatch.delenv('SLURM_ARRAY_TASK_ID', raising=False)
    codes = iter((0, 2, 0))
    monkeypatch.setattr('scripts.sweep.run_one', lambda flags: next(codes))
    with pytest.raises(SettingError, match=r'1 of 3 runs failed, see above: .*--seed 2'):
        sweep(combinations(['--seed', '1', '2', '3', '--', '--ckpt_dir', str(tmp_path)]))
    assert next(codes, None) is None
