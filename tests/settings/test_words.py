"""The words of the command line: what other repos write, true and false, 1e3, paths from the caller's folder."""

import dataclasses
import json
import os
import subprocess
from dataclasses import dataclass

import pytest

from config import PRESETS, Config, SettingError, parse_config
from runtime.files import from_caller
from settings.words import HINTS, read
from tests.helpers import ROOT


@dataclass(frozen=True)
class Epochs(Config):
    epochs: int = 3


@pytest.mark.parametrize(
    'flag, setting',
    [
        ('--epochs', 'num_training_steps'), ('--resume', 'the same command'), ('--gpu', 'CUDA_VISIBLE_DEVICES'),
        ('--device=cuda:1', 'NPROC'), ('--batch-size', 'global_batch_size'), ('--learning_rate', 'base_lr'),
        ('--num_steps', 'num_sample_steps'), ('--cfg', 'guidance_scale'), ('--fp16', 'precision'),
        ('--version', 'run.json'), ('--data_root', 'data_path'), ('--out', 'experiment_name'),
    ],
)  # fmt: skip
def test_flags_of_other_repos_are_answered(flag, setting):
    with pytest.raises(SettingError, match=rf'^{flag.split("=")[0]} is not a setting here. Use .*{setting}'):
        parse_config([flag, '3'])


def test_a_setting_of_ones_own_may_have_such_a_name():
    assert parse_config(['--epochs', '1e1'], Epochs).epochs == 10
    known = {name for names in HINTS for name in names.split()}
    assert not known & {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    'argv, text',
    [
        (['-preset', 'digits'], '-preset: settings have two dashes. Write --preset.'),
        (['small_images'], "'small_images' belongs to no flag. It is a preset. Write --preset small_images."),
        (['--seed', '3', 'small_image'], "'small_image' after --seed .* Is it a preset. Write --preset small_images."),
        (['--debug', 'seed=3'], "'seed=3' after --debug .*Write --seed=3."),
        (['docs'], r"'docs' .*Write --preset small_images --data_path docs\."),
        (['--experiment_name', 'my', 'run'], "'run' after --experiment_name .*a value with spaces in quotes"),
        (['--image_size', '(48,20)'], r"^image_size='\(48,20\)': .* Write --image_size 48 20.$"),
        (['--image_size', '48 20'], 'Write --image_size 48 20.$'),
        (['--adam_betas=[0.9,0.99]'], 'Write --adam_betas 0.9 0.99.$'),
        (['--image_size', '3', '32', '32'], r'image_size=\(3, 32, 32\): must be height and width, or one number'),
    ],
)
def test_what_is_not_understood_is_answered_by_a_line(argv, text):
    with pytest.raises(SettingError, match=text) as caught:
        parse_config(argv)
    assert '\n' not in str(caught.value)


def test_numbers_and_switches_as_others_write_them():
    made = parse_config('--num_training_steps 1e3 --seed=2E0 --debug true --final_eval=False --stratified TRUE'.split())
    assert (made.num_training_steps, made.seed, made.debug) == (1000, 2, True)
    assert (made.final_eval, made.stratified) == (False, True)
    assert parse_config(['--time-mean', '-1.2', '--time_mean=-3', '--columns', 'a,b', 'c']).columns == ('a,b', 'c')
    for wrong in ('1.5', '1e-3', '1.5e0', 'many'):
        with pytest.raises(SystemExit):
            parse_config(['--seed', wrong])


# ---------------------------------------------------------------- paths


def test_a_path_is_the_callers_else_the_projects(tmp_path, monkeypatch):
    (tmp_path / 'ours').mkdir()
    assert from_caller('ours') == 'ours'  # without run.sh
    monkeypatch.setenv('RUN_CALLER', str(tmp_path))
    assert from_caller('ours') == from_caller('x/../ours') == f'{tmp_path}/ours'
    assert from_caller('docs') == 'docs' and from_caller('docs', is_output=True) == f'{tmp_path}/docs'
    assert from_caller('nowhere') == f'{tmp_path}/nowhere'
    assert [from_caller(path) for path in ('', '/a', '~/a')] == ['', '/a', '~/a']
    monkeypatch.setenv('RUN_CALLER', str(ROOT / 'docs'))
    assert from_caller('../tests') == 'tests' and from_caller('data.md') == 'docs/data.md'
    monkeypatch.setenv('RUN_CALLER', str(ROOT))
    assert from_caller('x/') == 'x/'


def test_flags_are_seen_from_the_callers_folder_and_defaults_from_the_project(tmp_path, monkeypatch):
    (tmp_path / 'pictures').mkdir()
    monkeypatch.setenv('RUN_CALLER', str(tmp_path))
    flags = '--dataset hub --data_path pictures --ckpt_dir=mine --experiment_name pictures'.split()
    made = parse_config(flags)
    assert (made.data_path, made.ckpt_dir) == (f'{tmp_path}/pictures', f'{tmp_path}/mine')
    assert (made.experiment_name, made.data_dir) == ('pictures', 'data')
    assert parse_config(['--init_from', 'README.md']).init_from == 'README.md'
    assert parse_config(['--dataset', 'hub', '--data_path', 'nobody/nothing']).data_path == 'nobody/nothing'
    assert read(flags, Config, PRESETS)[0] == [
        *['--dataset', 'hub', '--data_path', f'{tmp_path}/pictures', f'--ckpt_dir={tmp_path}/mine'],
        *['--experiment_name', 'pictures'],
    ]


@pytest.mark.slow
def test_run_sh_from_another_folder(tmp_path, run_sh):
    """The run is where the caller is, generate.py finds it there, and writes there."""
    assert run_sh(ckpt_dir=str(tmp_path / 'ck'), experiment_name='a').returncode == 0
    command = ['sh', str(ROOT / 'run.sh'), 'generate.py', '--run', 'ck/a', '--num', '2', '--out', 'drawn_here']
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {'NPROC': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'drawn_here/grid.png').exists() and not (ROOT / 'drawn_here').exists()
    assert json.loads((tmp_path / 'ck/a/run.json').read_text())
