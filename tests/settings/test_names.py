"""Default names of runs."""

import dataclasses
import os
import re
import subprocess
import sys

from config import Config, parse_config
from settings.names import folder_name
from settings.same_run import differences
from tests.helpers import ROOT, as_flags
from tests.settings import OVERRIDES


def test_default_name():
    assert parse_config([]).experiment_name == 'digits'
    assert parse_config(['--preset', 'mnist']).experiment_name == 'mnist'
    assert parse_config(['--debug']).experiment_name == 'digits_debug'
    assert (
        parse_config(
            ['--log_every', '7', '--save_every', '9', '--wandb', 'disabled', '--accumulation_steps', '2']
        ).experiment_name
        == 'digits'
    )
    assert parse_config(['--channels', '64', '--seed', '5']).experiment_name == 'digits_seed=5_channels=64'
    assert parse_config(['--experiment_name', 'mine', '--seed', '5']).experiment_name == 'mine'


def test_a_name_begins_with_the_data_set_that_is_trained_on():
    def name(*argv, config_class=Config):
        return parse_config(argv, config_class).experiment_name

    assert name('--dataset', 'image_folder', '--image_size', '32') == 'image_folder_image_size=32'
    assert name('--preset', 'mnist', '--dataset', 'image_folder') == 'image_folder_preset=mnist'
    assert name('--dataset', 'my.data', '--debug') == 'my-data_debug'
    assert (
        name(
            config_class=dataclasses.make_dataclass(
                'Points', [('dataset', str, 'points')], bases=(Config,), frozen=True
            )
        )
        == 'points'
    )
    # these have the data set of a preset, but not its other settings
    assert name('--dataset', 'mnist') != name('--preset', 'mnist')
    assert name('--preset', 'mnist', '--dataset', 'digits') != name()


def test_another_data_dir_is_another_run_by_name_but_no_other_experiment():
    here, there = parse_config(['--data_dir', '/scratch/mine']), parse_config([])
    assert here.experiment_name == 'digits_data_dir=-scratch-mine'
    assert differences(dataclasses.asdict(there), here) == []


LONG = """--dataset npz --channels 16 --channel_mults 1 2 2 --attention_resolutions 7 --global_batch_size 32
    --num_training_steps 60 --warmup_steps 10 --weight_decay 0.0""".split()


def test_a_long_name_still_shows_every_setting_and_what_differs():
    names = [parse_config([*LONG, '--base_lr', lr]).experiment_name for lr in ('0.002', '0.003')]
    for name, lr in zip(names, ('0p002', '0p003'), strict=True):
        assert 100 < len(name) <= 120 and f'base_lr={lr}' in name and re.search('_[0-9a-f]{8}$', name)
        assert name.startswith('npz_channels=16_') and name.count('=') == 8
        Config(experiment_name=name)
    assert names[0][:-9].replace('0p002', '0p003') == names[1][:-9] and names[0][-8:] != names[1][-8:]


def test_a_name_of_any_length_is_short_and_its_own():
    """Long values that differ in the middle, many settings, and what is one name to a file system."""
    middles = [folder_name(['a', 'init_from=' + 100 * 'x' + middle + 100 * 'x']) for middle in 'bc']
    many = [folder_name([f'setting{i}={i}' for i in range(90)] + [f'last={last}']) for last in 'bc']
    for one, other in (middles, many):
        assert one != other and len(one) <= 120 and len(other) <= 120
    assert folder_name(['a' * 120]) == 'a' * 120 and len(folder_name(['a' * 121])) <= 120


def test_every_experiment_has_its_own_safe_name():
    names = [parse_config(as_flags(settings)).experiment_name for settings in [{}, *OVERRIDES]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch('[A-Za-z0-9_+=-]{1,120}', name) for name in names)
    for name, settings in zip(names[1:], OVERRIDES, strict=True):
        assert all(setting in name for setting in settings)
        Config(experiment_name=name)  # may be given as a flag as well


def test_a_name_is_the_same_in_every_process():
    settings = OVERRIDES[-1]  # with a hash in it
    command = [sys.executable, '-c', f'import config; print(config.Config(**{settings!r}).experiment_name)']
    shown = subprocess.run(
        command, cwd=ROOT, env=os.environ | {'PYTHONHASHSEED': '77'}, capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == Config(**settings).experiment_name
