"""Flags: which value wins, the text of --help, and wrong flags."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from config import DEBUG, PRESETS, Config, SettingError, parse_config
from tests.helpers import ROOT, as_flags

FIELDS = {field.name: field for field in dataclasses.fields(Config)}


# ---------------------------------------------------------------- precedence


def test_later_wins():
    name = 'num_training_steps'  # in all four places, with different values
    values = [Config().num_training_steps, PRESETS['mnist'][name], DEBUG[name], 777]
    argvs = [
        [],
        ['--preset', 'mnist'],
        ['--preset', 'mnist', '--debug'],
        ['--preset', 'mnist', '--debug', f'--{name}', '777'],
    ]
    assert [getattr(parse_config(argv), name) for argv in argvs] == values
    assert len(set(values)) == 4


def test_a_flag_before_the_preset_wins_too():
    assert parse_config(['--base_lr', '0.5', '--preset', 'cifar10']).base_lr == 0.5
    assert parse_config(['--preset=cifar10']).base_lr == PRESETS['cifar10']['base_lr']


def test_a_preset_leaves_the_other_settings_alone():
    mnist, digits = dataclasses.asdict(parse_config(['--preset', 'mnist'])), dataclasses.asdict(parse_config([]))
    changed = {name for name in FIELDS if mnist[name] != digits[name]}
    assert changed == set(PRESETS['mnist']) | {'preset', 'experiment_name'}


def test_flags_of_every_type_arrive():
    settings = dict(
        seed=3,
        base_lr=1e-4,
        solver='euler',
        final_eval=False,
        dequantize=True,
        channel_mults=(1, 2, 4),
        attention_resolutions=(4,),
    )
    settings |= dict(adam_betas=(0.8, 0.9), ema_decays=(0.9, 0.99), experiment_name='here')
    made = parse_config(as_flags(settings))
    assert {name: getattr(made, name) for name in settings} == settings


@dataclass(frozen=True)
class Mine(Config):
    base_lr: float = 0.25
    """Another default."""
    num_pairs: int = 4
    """A setting of an experiment."""


@dataclass(frozen=True)
class AlwaysDebug(Config):
    debug: bool = True
    """As if the default had been edited."""


def test_a_subclass_adds_settings_and_changes_defaults():
    assert (parse_config([], Mine).num_pairs, parse_config([], Mine).base_lr) == (4, 0.25)
    made = parse_config(['--num_pairs', '7', '--preset', 'cifar10'], Mine)
    assert type(made) is Mine
    assert (made.num_pairs, made.base_lr) == (7, PRESETS['cifar10']['base_lr'])
    assert 'num_pairs=7' in made.experiment_name


def test_debug_by_default_and_its_opposite():
    assert parse_config([], AlwaysDebug).overfit
    assert not parse_config(['--no_debug'], AlwaysDebug).overfit
    assert not parse_config(['--debug', '--no_debug']).overfit


# ---------------------------------------------------------------- help and wrong flags


def shell(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """main.py with these arguments."""
    return subprocess.run(
        [sys.executable, ROOT / 'main.py', *arguments], env=os.environ | env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize('preset', ['digits', 'mnist'])
def test_help_shows_every_setting_with_its_current_default(preset):
    shown = shell('--help', '--preset', preset)
    assert shown.returncode == 0
    text = ' '.join(re.sub('[│╭╮╰╯─]', ' ', shown.stdout).split())
    for name, field in FIELDS.items():
        expected = PRESETS[preset].get(name, preset if name == 'preset' else field.default)
        expected = ' '.join(map(str, expected)) if isinstance(expected, tuple) else str(expected) or "''"
        found = re.search(rf'--{name}[ ,].*?\(default: (.*?)\)', text)
        assert found, name
        assert found[1] == expected, name


def test_help_is_quick_and_does_without_torch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ImportError("torch was imported")')
    assert shell('--seed', '1', PYTHONPATH=str(tmp_path)).returncode == 1  # the trap works
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert shell('--help', PYTHONPATH=str(tmp_path)).returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1


@pytest.mark.parametrize(
    'argv, named',
    [
        (['--bse_lr', '1e-4'], ['--bse_lr', '--base_lr']),
        (['--num_training_step', '10'], ['--num_training_steps']),
        (['--base_lr', 'fast'], ['--base_lr', 'fast']),
        (['--seed', '1.5'], ['--seed', '1.5']),
        (['--channel_mults', '1', 'two'], ['--channel_mults', 'two']),
    ],
)
def test_a_wrong_flag_or_type_exits_2_and_says_which(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(argv)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert all(text in shown for text in named)
    assert 'Traceback' not in shown


def test_an_unknown_preset_lists_the_presets():
    with pytest.raises(SettingError, match='mist') as caught:
        parse_config(['--preset', 'mist'])
    assert all(name in str(caught.value) for name in PRESETS)
    assert "Did you mean 'mnist'?" in str(caught.value)


def test_main_shows_a_bad_value_without_traceback():
    shown = shell('--t_min', '2')
    assert shown.returncode == 2
    assert 't_min=2.0' in shown.stderr
    assert shown.stderr.count('\n') == 1
