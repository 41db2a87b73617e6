"""The launcher and whole runs, with real processes: run.sh, torchrun, gloo, signals."""

import json
import signal
import subprocess

import pytest
import torch

import saving
from tests.helpers import ROOT, TINY, as_flags, launch_env, losses, processes_with, wait_until


def test_two_processes_give_the_loss_curve_of_one(run_sh, tmp_path):
    """The images, noise, times and augmentation are the same; only the order of summation differs."""
    settings = dict(log_every=1, translate_prob=0.5, num_training_steps=20, save_every=0)
    for name, nproc in (('one', 1), ('two', 2)):
        result = run_sh(nproc=nproc, experiment_name=name, **settings)
        assert result.returncode == 0, result.stderr
        assert f'on {nproc} x cpu' in result.stdout
    one, two = losses(tmp_path / 'ckpts/one'), losses(tmp_path / 'ckpts/two')
    assert len(one) == 20 and one == pytest.approx(two, rel=1e-5)
    weights = [saving.load(tmp_path / 'ckpts' / name / 'last.pt')['network'] for name in ('one', 'two')]
    for name, w in weights[0].items():
        assert torch.allclose(w, weights[1][name], atol=1e-4), name


def test_a_wrong_flag_gives_one_message(run_sh):
    result = run_sh(nproc=2, base_l=3)
    assert result.returncode == 2
    assert result.stderr.count('Perhaps you meant') == 1 and '--base_lr' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(solver='hein'), ('solver', 'hein', 'heun', 'euler_maruyama')),
        (dict(batch_shards=1), ('batch_shards=1', '2 processes', '--batch_shards')),
        (dict(ckpt_dir='/dev/null/ckpts'), ('ckpt_dir', '/dev/null/ckpts', '--ckpt_dir')),
        pytest.param(
            dict(data_dir='/dev/null/data'), ('data_dir', '/dev/null/data', '--data_dir'), marks=pytest.mark.slow
        ),
    ],
)
def test_bad_settings_are_named_once_on_two_processes(run_sh, settings, words):
    result = run_sh(nproc=2, **settings)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count('SettingError') == 1 and 'Traceback' not in result.stderr
    for word in words:
        assert word in result.stderr, word


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused(run_sh):
    assert run_sh().returncode == 0
    result = run_sh(base_lr=0.5)
    assert result.returncode == 2 and 'base_lr: 0.001 -> 0.5' in result.stderr


def test_stop_reaches_the_trainer_past_its_loaders(run_sh, tmp_path):
    """SIGTERM reaches all processes, also the loader processes: the run still saves."""
    from PIL import Image

    folder = tmp_path / 'data/image_folder/all'
    folder.mkdir(parents=True)
    for i in range(40):
        Image.new('RGB', (12, 10), (i, 2 * i, 3 * i)).save(folder / f'{i}.png')
    settings = dict(dataset='image_folder', image_size=8, cache=False, num_workers=2, data_dir=str(tmp_path / 'data'))
    flags = as_flags(
        TINY
        | settings
        | dict(ckpt_dir=str(tmp_path / 'ckpts'), experiment_name='run', save_every=0, log_every=1, eval_every=0)
        | dict(num_training_steps=100000)
    )
    run = subprocess.Popen(
        ['sh', 'run.sh', *flags], cwd=ROOT, env=launch_env(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    record = tmp_path / 'ckpts/run/metrics.jsonl'
    started = wait_until(lambda: record.exists() and record.read_text().count('\n') >= 3, 60)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=40)
    assert started and run.returncode == 75, err
    assert 'state saved' in out and saving.load(tmp_path / 'ckpts/run/last.pt')['step'] >= 3
    assert not processes_with(str(tmp_path))


SCRIPT = """
import os
import signal
import torch
from dataclasses import dataclass
from config import Config
from main import main
from trainer import ExampleDiffusionTrainer

def full_disk(*args, **kwargs):
    raise OSError(28, 'No space left on device')

@dataclass(frozen=True)
class MyConfig(Config):
    loss_factor: float = 2.0
    fail_on: int = -1
    fail_in: str = ''

class MyTrainer(ExampleDiffusionTrainer):
    def loss_fn(self, batch, model_fn):
        if self.step == 5 and int(os.environ['RANK']) == self.config.fail_on and self.config.fail_in == 'nan':
            return float('nan') * super().loss_fn(batch, model_fn)
        if self.step == 3 and self.config.fail_in == 'save':
            torch.save = full_disk
            os.kill(os.getppid(), signal.SIGTERM)
        return super().loss_fn(batch, model_fn) * self.config.loss_factor

if __name__ == '__main__':
    main(trainer_class=MyTrainer, config_class=MyConfig)
"""


@pytest.fixture
def script(tmp_path):
    """An experiment in its own folder."""
    path = tmp_path / 'experiments' / 'mine.py'
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return str(path)


def test_experiment_in_a_subfolder(run_sh, script, tmp_path):
    plain = run_sh(experiment_name='plain', num_training_steps=3)
    result = run_sh(script, experiment_name='mine', num_training_steps=3, loss_factor=4.0, cwd='/')
    assert plain.returncode == 0 and result.returncode == 0, result.stderr
    assert losses(tmp_path / 'ckpts/mine')[0] == pytest.approx(4 * losses(tmp_path / 'ckpts/plain')[0], rel=0.05)
    assert json.loads((tmp_path / 'ckpts/mine/config.json').read_text())['loss_factor'] == 4.0


def test_too_many_nans_on_one_rank_end_all_and_keep_the_last_checkpoint(run_sh, script, tmp_path):
    result = run_sh(script, nproc=2, fail_on=1, fail_in='nan', max_bad_steps=1)
    assert (
        result.returncode == 3
        and result.stderr.count('steps in a row, from step 5 on') == 1
        and 'Traceback' not in result.stderr
    )
    assert saving.load(tmp_path / 'ckpts/run/last.pt')['step'] == 4


@pytest.mark.slow
def test_a_stop_that_could_not_save_does_not_print_that_it_did(run_sh, script):
    result = run_sh(script, fail_in='save', num_training_steps=100000, save_every=0)
    assert result.returncode == 1 and 'No space left' in result.stderr and 'state saved' not in result.stdout


@pytest.mark.slow
def test_more_processes_than_held_out_batches(run_sh):
    """A rank without a held-out batch takes part in everything else."""
    result = run_sh(nproc=2, global_batch_size=1024, batch_shards=2, num_training_steps=3)
    assert result.returncode == 0, result.stderr


def test_help_needs_no_launcher(run_sh):
    result = subprocess.run(
        ['sh', 'run.sh', '--help'], cwd=ROOT, env=launch_env(2), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and result.stdout.count('usage:') == 1 and '--num_training_steps INT' in result.stdout


@pytest.mark.slow
def test_debug_shows_the_batch_it_overfits(run_sh, tmp_path):
    """With all settings of --debug: samples are close to the images of the one batch, and far from other digits."""
    flags = dict(ckpt_dir=str(tmp_path / 'ckpts'), experiment_name='debug', wandb='disabled', sample_every=0)
    run = subprocess.run(
        ['sh', 'run.sh', '--debug', *as_flags(flags)],
        cwd=ROOT,
        env=launch_env(1),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    from config import DEBUG, Config
    from data_utils import StreamSampler, load_digits
    from sampling import sample

    network, process, config = saving.load_for_sampling(tmp_path / 'ckpts/debug/last.pt')
    (images, labels), _ = load_digits(Config())
    batch = torch.tensor(
        [
            next_
            for indices, _ in zip(StreamSampler(1500, config), range(config.batch_shards), strict=False)
            for next_ in indices
        ]
    )
    assert len(batch) == DEBUG['global_batch_size']
    torch.manual_seed(0)
    samples = sample(network, process, torch.randn(40, 1, 8, 8), labels[batch].repeat(2)[:40], num_steps=20)
    digits = 2 * images.float() / 16 - 1
    to_batch = torch.cdist(samples.flatten(1), digits[batch].flatten(1)).min(1).values
    others = torch.ones(1500, dtype=torch.bool)
    others[batch] = False
    to_others = torch.cdist(samples.flatten(1), digits[others].flatten(1)).min(1).values
    assert (to_batch < to_others).float().mean() > 0.9 and to_batch.mean() < 0.5 * to_others.mean()
