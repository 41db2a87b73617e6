"""Settings that a resumed run may change, differences of two configs, and default names of runs."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from config import PRESETS, Config, parse_config
from settings.choices import known_choices
from settings.same_run import FREE_ON_RESUME, differences, folder_name, older_folder_name
from tests.helpers import ROOT, as_flags

# settings of different experiments
OVERRIDES = [
    dict(base_lr=1e-4),
    dict(base_lr=1e-5),
    dict(seed=1),
    dict(t_min=0.01),
    dict(time_mean=-1.5),
    dict(time_mean=1.5),
    dict(stratified=False),
    dict(dequantize=True),
    dict(channel_mults=(1, 2, 3)),
    dict(channel_mults=(12, 3)),
    dict(attention_resolutions=(4,)),
    dict(model_type='x0', target_type='score'),
    dict(num_training_steps=2000),
    dict(init_from='ckpts/a/last.pt'),
    dict(init_from='ckpts/' + 200 * 'a' + 'b/last.pt'),
    dict(init_from='ckpts/' + 200 * 'a' + 'c/last.pt'),
]
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


@dataclass(frozen=True)
class Mine(Config):
    base_lr: float = 0.25
    """Another default."""
    num_pairs: int = 4
    """A setting of an experiment."""


def test_no_differences_after_json():
    for settings in [{}, *OVERRIDES]:
        made = Config(**settings)
        assert differences(json.loads(json.dumps(dataclasses.asdict(made))), made) == []


@pytest.mark.parametrize('settings', OVERRIDES, ids=lambda settings: '-'.join(settings))
def test_differences_name_the_setting_and_both_values(settings):
    lines = differences(dataclasses.asdict(Config()), Config(**settings))
    assert lines == [f'{name}: {FIELDS[name].default} -> {settings[name]}' for name in FIELDS if name in settings]


def test_free_settings_are_not_reported():
    assert set(FIELDS) >= FREE_ON_RESUME
    saved = dataclasses.asdict(Config())
    for name in FREE_ON_RESUME:
        saved[name] = 'something else'
    assert differences(saved, Config()) == []


def test_a_run_may_be_resumed_with_more_or_less_memory():
    saved = dataclasses.asdict(Config())
    assert differences(saved, Config(checkpointing=True, accumulation_steps=4, compile='on')) == []


@pytest.mark.parametrize('schedule', known_choices('lr_schedule_type'))
def test_a_run_may_be_prolonged_if_its_schedule_never_looks_at_the_end(schedule):
    free = schedule in ('constant', 'inverse_sqrt')
    saved = dataclasses.asdict(Config(lr_schedule_type=schedule))
    longer = Config(lr_schedule_type=schedule, num_training_steps=9000)
    assert differences(saved, longer) == ([] if free else ['num_training_steps: 500 -> 9000'])
    assert (longer.experiment_name == Config(lr_schedule_type=schedule).experiment_name) is free


def test_a_setting_that_is_newer_than_a_run_counts_as_its_default():
    saved = dataclasses.asdict(Config(base_lr=0.25))
    assert differences(saved, Mine()) == []
    assert differences(saved, Mine(num_pairs=5)) == ['num_pairs: 4 -> 5']
    listed = dataclasses.make_dataclass(
        'Listed', [('sides', list, dataclasses.field(default_factory=lambda: [1, 2]))], bases=(Mine,), frozen=True
    )
    assert differences(saved, listed()) == [] and listed().baseline()['sides'] == [1, 2]
    assert differences(saved, listed(sides=[3])) == ['sides: [1, 2] -> [3]']


def test_a_setting_that_the_class_no_longer_has_is_shown():
    saved = dataclasses.asdict(Mine())
    assert differences(saved, Config(base_lr=0.25)) == ['num_pairs: 4 -> absent']
    saved['num_pairs'] = 'absent'  # whatever its value was
    assert differences(saved, Config(base_lr=0.25)) == ['num_pairs: absent -> absent']


@pytest.mark.parametrize('preset', [name for name in PRESETS if PRESETS[name].get('optimizer') == 'adamw'])
def test_a_run_from_before_muon_is_the_same_experiment(preset):
    """Its config.json has no `optimizer`, which was AdamW, and a bool instead of a word for `compile`."""
    config = Config(preset=preset, **PRESETS[preset])
    saved = json.loads(json.dumps(dataclasses.asdict(config))) | dict(compile=True)
    assert saved.pop('optimizer') == 'adamw'
    assert differences(saved, config) == []
    assert differences(saved, dataclasses.replace(config, optimizer='muon')) == ['optimizer: adamw -> muon']
    assert differences(dataclasses.asdict(Config()) | dict(image_size=64), Config()) == []  # one number in old runs


# ---------------------------------------------------------------- names of runs


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


def test_a_long_name_has_the_important_settings_first_whole_words_and_a_hash():
    names = [parse_config([*LONG, '--base_lr', lr]).experiment_name for lr in ('0.002', '0.003')]
    assert re.fullmatch('npz_base_lr=0p002_channels=16_channel_mults=1-2-2_[0-9a-f]{8}', names[0]), names[0]
    assert names[1].startswith('npz_base_lr=0p003_') and names[0][-8:] != names[1][-8:]
    assert len(parse_config([*LONG, '--preset', 'small_images']).experiment_name) <= 60


def test_paths_leave_room_in_a_long_name_for_what_differs():
    paths = ['--data_dir', '/scratch/of/mine/data', '--data_path', '/scratch/photographs_of_the_north']
    name = parse_config([*LONG, *paths, '--base_lr', '0.002']).experiment_name
    assert re.fullmatch('npz_data_path=photogra\\+e_north_base_lr=0p002_[0-9a-f]{8}', name), name
    moved = parse_config([*LONG, *paths, '--data_dir', '/elsewhere/data', '--base_lr', '0.002']).experiment_name
    assert moved[:-8] == name[:-8] and moved != name
    name = parse_config([*LONG, *paths[:2], '--init_from', 'ckpts/first_run/last.pt']).experiment_name
    assert name.startswith('npz_init_from=first_run_channels=16_')


def test_a_name_of_any_length_is_short_and_its_own():
    """Long values that differ in the middle, many settings, and names that a file system takes for one."""
    middles = [folder_name(['a', 'init_from=' + 100 * 'x' + middle + 100 * 'x']) for middle in 'bc']
    many = [folder_name([f'setting{i}={i}' for i in range(90)] + [f'last={last}']) for last in 'bc']
    for one, other in (middles, many):
        assert one != other and len(one) <= 60 and len(other) <= 60
    assert folder_name(['a' * 70 + '.']) != folder_name(['a' * 70 + '-'])
    for n in range(60):
        assert len(folder_name(['a' * n, *(f'setting{i}={"b" * (i % 5)}' for i in range(20))])) <= 60
    assert folder_name(['a' * 60]) == 'a' * 60 and len(folder_name(['a' * 61])) == 60


def test_every_experiment_has_its_own_safe_name():
    names = [parse_config(as_flags(settings)).experiment_name for settings in [{}, *OVERRIDES]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch('[A-Za-z0-9_+=-]{1,60}', name) for name in names)
    for name, settings in zip(names[1:], OVERRIDES, strict=True):
        assert all(setting in name for setting in settings) or re.search('_[0-9a-f]{8}$', name)
        Config(experiment_name=name)  # may be passed as a flag too


def test_older_names_are_as_they_were():
    assert older_folder_name(['a', 'b=0.5']) == 'a_b=0-5' and older_folder_name(['a' * 70, 'b']) == 'a' * 70 + '_b'
    parts = ['small_images', 'data_path=my-data', 'image_size=16', 'channels=8', 'attention_resolutions=8']
    parts += ['global_batch_size=16', 'num_training_steps=20', 'warmup_steps=5']
    assert older_folder_name(parts) == (
        'small+ages_data_path=my-data_image_size=16_channels=8_atten+ions=8_globa+size=16_num_t+teps=20_'
        'warmu+teps=5_c490d1ea'
    )


def test_a_name_is_the_same_in_every_process():
    settings = OVERRIDES[-1]  # with a hash in it
    command = [sys.executable, '-c', f'import config; print(config.Config(**{settings!r}).experiment_name)']
    shown = subprocess.run(
        command, cwd=ROOT, env=os.environ | {'PYTHONHASHSEED': '77'}, capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == Config(**settings).experiment_name
