"""Flags: precedence, the text of --help, wrong flags, flags of other repos, 1e3, and the caller's paths."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from config import DEBUG, PRESETS, Config, SettingError, parse_config
from runtime.files import from_caller
from settings.choices import TABLES, known_choices
from settings.flags import HINTS, normalized, read
from settings.rules import CHOICES
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


def test_a_preset_does_not_change_other_settings():
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
    """Settings as they would be with edited defaults."""


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


# ---------------------------------------------------------------- --settings


def test_settings_come_from_another_run_between_preset_and_network(tmp_path):
    """All settings except those that identify a run come from it; a preset as a flag only names the new run."""
    other = Config(preset='mnist', experiment_name='other', ckpt_dir='x', debug=True, base_lr=0.5, image_size=(8, 9))
    (tmp_path / 'config.json').write_text(json.dumps(dataclasses.asdict(other)))
    for path in (tmp_path, tmp_path / 'config.json'):
        made = parse_config(['--settings', str(path), '--seed', '4'])
        own = dict(settings=str(path), seed=4, experiment_name=made.experiment_name, ckpt_dir='ckpts', debug=False)
        assert made == dataclasses.replace(other, **own) and made.experiment_name.startswith('digits_preset=mnist_')
    given = ['--settings', str(tmp_path)]
    assert parse_config([*given, '--debug']).global_batch_size == DEBUG['global_batch_size']
    assert parse_config([*given, '--base_lr', '0.1']).base_lr == 0.1
    network = lambda path: dict(channels=40, base_lr=0.2)  # noqa: E731
    assert parse_config([*given, '--init_from', 'a.pt'], settings_in=network).channels == 40
    assert parse_config([*given, '--preset', 'cifar10']).base_lr == 0.5


def test_a_file_may_hold_some_settings_only(tmp_path):
    """The preset gives the other settings. An older run that lacks a setting had its default."""
    (tmp_path / 'some.json').write_text('{"preset": "mnist", "channel_mults": [1, 3], "base_lr": 1}')
    made = parse_config(['--settings', str(tmp_path / 'some.json')])
    assert made.preset == 'mnist' and made.channel_mults == (1, 3) and repr(made.base_lr) == '1.0'
    assert made.label_dropout == PRESETS['mnist']['label_dropout'] and made.optimizer == 'adamw'
    (tmp_path / 'config.json').write_text('{"preset": "mnist", "experiment_name": "a", "base_lr": 1}')
    assert parse_config(['--settings', str(tmp_path)]).label_dropout == Config().label_dropout


@pytest.mark.parametrize(
    'text, message',
    [
        ('{', 'cannot be read .*Pass the folder of a run'),
        ('[1]', 'not an object of settings'),
        ('{"base_lrr": 1}', 'Config has no base_lrr. Start the script that defines them'),
        ('{"seed": "three"}', r"seed='three' is of another type than its default, 0\."),
        ('{"seed": true}', r'seed=True is of another type than its default, 0\.'),
        ('{"image_size": 32}', r'image_size=32 is of another type than its default, \(64,\)'),
        ('{"channel_mults": [1, "a"]}', "channel_mults='a' is of another type"),
        ('{"t_min": 2}', 't_min=2.0'),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(text, message, tmp_path):
    (tmp_path / 'some.json').write_text(text)
    with pytest.raises(SettingError, match=message):
        parse_config(['--settings', str(tmp_path / 'some.json')])
    with pytest.raises(SettingError, match=r'settings=.*nowhere.* cannot be read'):
        parse_config(['--settings', str(tmp_path / 'nowhere')])


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


def test_help_has_examples_groups_choices_and_what_a_subclass_adds(capsys):
    def page(config_class):
        with pytest.raises(SystemExit) as stop:
            parse_config(['--help'], config_class)
        assert stop.value.code == 0
        return ' '.join(re.sub('[│╭╮╰╯─]', ' ', capsys.readouterr().out).split())

    shown = page(Config)
    assert shown.index('sh run.sh --preset=small_images --data_path=DIR') < shown.index('--preset {digits,')
    groups = ['run', 'data', 'process', 'output and loss', 'network', 'batches and steps', 'optimizer', 'record']
    places = [shown.index(f' {name} options ') for name in [*groups, 'sampling', 'speed']]
    assert places == sorted(places)
    choices = {setting: known_choices(setting) for setting in (*TABLES, *CHOICES)} | dict(preset=list(PRESETS))
    for setting, names in choices.items():
        text = re.search(rf'--{setting} {{(.*?)}} ', shown)
        assert text and text[1].replace(' ', '').split(',') == [name for name in names if name], setting
    helps = dict(re.findall(r'--(\w+) (.*?)\(default: ', shown))
    readers = dict(image_size='dataset=digits', dit_patch='network=unet', sigma_max='process_name=rf', time_std='')
    for name, reader in readers.items():
        assert ('Not read' in helps[name]) == (f'Not read with {reader}. ' in helps[name]) == bool(reader), name
    own = page(Mine)
    assert re.search(r'Mine options [+-]* *--num_pairs INT A setting of an experiment. \(default: 4\)', own)
    assert re.search(r'--base_lr FLOAT Another default. \(default: 0.25\)', own)
    points = dataclasses.make_dataclass('Points', [('dataset', str, 'points')], bases=(Config,), frozen=True)
    assert re.search(r'--dataset {.*?} Key of DATASETS .*?\(default: points\)', page(points))


def test_help_is_quick_and_does_without_torch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ImportError("torch was imported")')
    assert shell('--seed', '1', PYTHONPATH=str(tmp_path)).returncode == 1  # the trap itself works
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


# ---------------------------------------------------------------- words as others write them


@dataclass(frozen=True)
class Epochs(Config):
    epochs: int = 3


@pytest.mark.parametrize(
    'flag, setting',
    [
        ('--epochs', 'num_training_steps'), ('--resume', 'the same command'), ('--gpu', 'CUDA_VISIBLE_DEVICES'),
        ('--device=cuda:1', 'NPROC'), ('--batch-size', 'global_batch_size'), ('--learning_rate', 'base_lr'),
        ('--num_steps', 'num_sample_steps'), ('--cfg', 'guidance_scale'), ('--fp16', 'precision'),
        ('--diffusion_steps', 'process_name'), ('--timesteps', 'process_name'), ('--num_channels', '--channels 64'),
        ('--class_cond', 'label_dropout 1'), ('--microbatch', 'accumulation_steps'), ('--ema_rate', 'ema_decays'),
        ('--save_interval', 'save_every'), ('--nproc', 'NPROC=2'), ('--wandb_mode', '--wandb online, offline'),
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
        (['--channel_mults', '1', '2,4'], 'separate the numbers by spaces. Write --channel_mults 2 4.$'),
        (['--adam_betas=[0.9,0.99]'], 'Write --adam_betas 0.9 0.99.$'),
        (['--image_size', '3', '32', '32'], r'image_size=\(3, 32, 32\): must be height and width, or one number'),
    ],
)
def test_flags_that_are_not_understood_get_a_message(argv, text):
    with pytest.raises(SettingError, match=text) as caught:
        parse_config(argv)
    assert '\n' not in str(caught.value)


def test_numbers_and_switches_as_others_write_them():
    made = parse_config(
        '--num_training_steps 1e3 --seed=2E+0 --debug true --final_eval=False --stratified TRUE'.split()
    )
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
    (tmp_path / 'link').symlink_to(tmp_path / 'ours')
    assert from_caller('link') == f'{tmp_path}/link'
    assert from_caller('docs') == 'docs' and from_caller('docs', 'out') == f'{tmp_path}/docs'
    assert from_caller('nowhere') == f'{tmp_path}/nowhere'
    assert from_caller('nobody/nothing', 'data_path') == 'nobody/nothing'  # the name of a data set on the hub
    assert from_caller('ours', 'data_path') == f'{tmp_path}/ours'
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
    assert parse_config(['--init_from', 'docs']).init_from == 'docs/last.pt'
    assert parse_config(['--init_from', 'pictures']).init_from == f'{tmp_path}/pictures/last.pt'
    assert parse_config(['--dataset', 'hub', '--data_path', 'nobody/nothing']).data_path == 'nobody/nothing'
    assert read(flags, Config, PRESETS)[0] == [
        *['--dataset', 'hub', '--data_path', f'{tmp_path}/pictures', f'--ckpt_dir={tmp_path}/mine'],
        *['--experiment_name', 'pictures'],
    ]
    assert (normalized('out', str, 'docs'), normalized('settings', str, 'docs')) == (f'{tmp_path}/docs', 'docs')


@pytest.mark.slow
def test_run_sh_from_another_folder(tmp_path, run_sh):
    """The run is in the caller's folder; generate.py finds it there and writes there."""
    assert run_sh(ckpt_dir=str(tmp_path / 'ck'), experiment_name='a').returncode == 0
    command = ['sh', str(ROOT / 'run.sh'), 'generate.py', '--run', 'ck/a', '--num', '2', '--out', 'drawn_here']
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {'NPROC': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'drawn_here/grid.png').exists() and not (ROOT / 'drawn_here').exists()
    assert json.loads((tmp_path / 'ck/a/run.json').read_text())


def test_a_notebook_gets_a_message_to_pass_flags(monkeypatch):
    monkeypatch.setattr('sys.argv', ['/x/ipykernel_launcher.py', '-f', '/x/kernel.json'])
    with pytest.raises(SettingError, match=r"a notebook has no flags: pass them, as main\(\['--seed'"):
        parse_config()
    assert parse_config([]).seed == 0
