"""Settings: precedence, help, the rules and their messages, names of runs, what may change on resume."""

import ast
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from config import DEBUG, PRESETS, Config, SettingError, choose, parse_config
from settings.names import folder_name
from settings.rules import RULES, RULES_OF_SEVERAL
from settings.same_run import FREE_ON_RESUME, differences
from tests.helpers import ROOT, as_flags

FIELDS = {field.name: field for field in dataclasses.fields(Config)}

# The names that examples, tests and users' experiments rely on.
AGREED = """preset dataset experiment_name ckpt_dir data_dir seed debug overfit init_from final_eval wandb
    wandb_project wandb_entity network process_name beta_min beta_max sigma_min sigma_max t_min t_max model_type
    target_type time_sampler stratified label_dropout global_batch_size batch_shards accumulation_steps
    num_training_steps base_lr min_lr warmup_steps lr_schedule_type weight_decay grad_clip_norm ema_decays log_every
    save_every keep_every sample_every eval_every solver num_sample_steps time_grid sde_noise guidance_scale precision
    compile""".split()


# ---------------------------------------------------------------- the list of settings


def test_every_agreed_setting_exists():
    assert set(AGREED) <= set(FIELDS)


def test_every_setting_has_a_docstring_of_one_line():
    tree = ast.parse((ROOT / 'config.py').read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == 'Config').body
    documented = {
        node.target.id: following.value.value
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    assert documented.keys() == FIELDS.keys()
    assert all(len(text) > 5 and '\n' not in text and text.endswith('.') for text in documented.values())


def test_every_setting_is_read_outside_config():
    read = set()
    for path in [*ROOT.glob('*.py'), *ROOT.glob('runtime/*.py')]:
        if path.name in ('config.py', 'rules.py', 'flags.py', 'names.py', 'same_run.py'):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, 'id', '')
                if owner in ('config', 'c'):
                    read.add(node.attr)
    read |= {'experiment_name', 'ckpt_dir'} if 'run_dir' in read else set()
    by_parse_config = {'debug', 'preset'}
    by_augmentations = {'flip_prob', 'rotate_prob', 'translate_prob'}  # by getattr, for each key of its table
    assert set(FIELDS) - read == by_parse_config | by_augmentations


@pytest.mark.parametrize('group', [*PRESETS.values(), DEBUG], ids=[*PRESETS, 'DEBUG'])
def test_presets_and_debug_are_valid_and_change_something(group):
    assert set(group) <= set(FIELDS)
    Config(**group)
    for name, value in group.items():
        assert type(value) is type(FIELDS[name].default), name
    assert not group or any(value != FIELDS[name].default for name, value in group.items())


@pytest.mark.parametrize('preset', PRESETS)
def test_debug_goes_with_every_preset(preset):
    made = parse_config(['--preset', preset, '--debug'])
    assert made.overfit and made.debug and made.dataset == PRESETS[preset].get('dataset', 'digits')
    assert PRESETS['digits'] == {}  # so that editing a default has an effect


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().base_lr = 1.0


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


def test_choose():
    assert choose('solver', 'b', {'a': 1, 'b': 2}) == 2
    with pytest.raises(SettingError, match=r"solver='eulr'.*euler, heun.*'euler'"):
        choose('solver', 'eulr', {'euler': 1, 'heun': 2})


# ---------------------------------------------------------------- the rules

BROKEN = [  # (settings, those that the message must show)
    (dict(preset='none'), 'preset'),
    (dict(precision='float16'), 'precision'),
    (dict(compile='yes'), 'compile'),
    (dict(wandb='yes'), 'wandb'),
    (dict(base_lr=math.nan), 'base_lr'),
    (dict(time_mean=math.inf), 'time_mean'),
    (dict(ema_decays=(0.9, math.nan)), 'ema_decays'),
    *(({name: 0}, name) for name in 'global_batch_size batch_shards accumulation_steps num_training_steps'.split()),
    *(({name: 0}, name) for name in 'num_sample_steps max_bad_steps keep_last'.split()),
    *(({name: 0}, name) for name in 'channels num_res_blocks'.split()),
    (dict(columns=('a', 'b', 'c')), 'columns'),
    *((dict(image_size=value), 'image_size') for value in ((), (0,), (8, 8, 8))),
    *(
        ({name: -1}, name)
        for name in 'seed held_out log_every save_every keep_every sample_every eval_every eval_metrics_every'.split()
    ),
    *(({name: -1}, name) for name in 'warmup_steps num_workers max_translation sample_nfe'.split()),
    *(
        ({name: value}, name)
        for name in 'flip_prob rotate_prob translate_prob label_dropout guidance_rescale'.split()
        for value in (-0.1, 1.1)
    ),
    *(({name: 0.0}, name) for name in 'base_lr time_std sigma_data sigma_min adam_eps'.split()),
    *(({name: -0.1}, name) for name in 'weight_decay grad_clip_norm min_lr sde_noise_scale'.split()),
    *(({name: -0.1}, name) for name in 'guidance_scale beta_min'.split()),
    (dict(channels=7), 'channels'),
    *(({name: -1}, name) for name in 'dit_depth dit_width dit_heads'.split()),
    (dict(dit_patch=0), 'dit_patch'),
    (dict(dropout=1.0), 'dropout'),
    (dict(dropout=-0.1), 'dropout'),
    (dict(channel_mults=()), 'channel_mults'),
    (dict(channel_mults=(1, 0)), 'channel_mults'),
    (dict(adam_betas=(0.9,)), 'adam_betas'),
    (dict(adam_betas=(0.9, 1.0)), 'adam_betas'),
    (dict(ema_decays=(1.0,)), 'ema_decays'),
    (dict(ema_decays=(0.0,)), 'ema_decays'),
    (dict(ema_decays=(0.9, 0.9)), 'ema_decays'),
    (dict(min_lr=0.1, base_lr=0.01), 'min_lr base_lr'),
    (dict(warmup_steps=50, num_training_steps=50), 'warmup_steps num_training_steps'),
    (dict(t_min=-0.1), 't_min t_max'),
    (dict(t_max=1.1), 't_min t_max'),
    (dict(t_min=0.5, t_max=0.5), 't_min t_max'),
    (dict(beta_min=2.0, beta_max=1.0), 'beta_min beta_max'),
    (dict(beta_min=0.0, beta_max=0.0), 'beta_min beta_max'),
    (dict(sigma_min=1.0, sigma_max=1.0), 'sigma_min sigma_max'),
    (dict(global_batch_size=100, batch_shards=8), 'global_batch_size batch_shards'),
    (dict(batch_shards=8, accumulation_steps=3), 'batch_shards accumulation_steps'),
    *((dict(guidance_interval=value), 'guidance_interval') for value in ((0.6, 0.3), (-0.1, 0.5), (0.5, 1.1))),
    (dict(dit_size='B', dit_depth=2, dit_width=32, dit_heads=2), 'dit_size dit_depth dit_width dit_heads'),
    (dict(antithetic=True), 'stratified antithetic'),
    (dict(antithetic=True, stratified=False, global_batch_size=24), 'antithetic global_batch_size batch_shards'),
    (dict(guidance_scale=2.0, label_dropout=0.0), 'guidance_scale label_dropout'),
    (dict(guidance_scale=0.0, label_dropout=1.0), 'guidance_scale label_dropout'),
    *(
        (dict(experiment_name=name), 'experiment_name')
        for name in ('a/b', '..', '.', '../x', 'a.b', '/x', '-rf', 'a b', 'a\n', '~', 'a\\b')
    ),
]


@pytest.mark.parametrize('settings, names', BROKEN, ids=str)
def test_a_broken_rule_shows_the_settings_and_their_values(settings, names):
    with pytest.raises(ValueError) as caught:
        Config(**settings)
    assert isinstance(caught.value, SettingError)
    for name in names.split():
        assert f'{name}={settings.get(name, FIELDS[name].default)!r}' in str(caught.value)


def test_the_table_above_breaks_every_rule():
    """Each rule is the first that some case of BROKEN breaks; so a new rule needs a new case."""
    messages = []
    for settings, _ in BROKEN:
        with pytest.raises(SettingError) as caught:
            Config(**settings)
        messages.append(str(caught.value))
    for names, _, rule in RULES:
        for name in names.split():
            assert any(text.startswith(f'{name}=') and text.endswith(f': {rule}.') for text in messages), (name, rule)
    for names, _, _ in RULES_OF_SEVERAL:
        shown = ', '.join(f'{name}=[^:]*' for name in names.split())
        assert any(re.match(f'{shown}: ', text) for text in messages), names


@pytest.mark.parametrize(
    'settings, name, nearest',
    [
        (dict(global_batch_size=100, batch_shards=8), 'global_batch_size', [96, 104]),
        (dict(global_batch_size=4, batch_shards=8), 'global_batch_size', [8]),
        (dict(antithetic=True, stratified=False, global_batch_size=24), 'global_batch_size', [16, 32]),
        (dict(antithetic=True, stratified=False, global_batch_size=20), 'global_batch_size', [16, 32]),
        (dict(batch_shards=8, accumulation_steps=3), 'accumulation_steps', [2, 4]),
        (dict(batch_shards=8, accumulation_steps=9), 'accumulation_steps', [8]),
    ],
    ids=str,
)
def test_a_broken_rule_of_the_batch_offers_the_nearest_values_that_work(settings, name, nearest):
    with pytest.raises(SettingError) as caught:
        Config(**settings)
    assert str(caught.value).endswith(f'use --{name} {" or ".join(map(str, nearest))}.')
    for value in nearest:
        Config(**settings | {name: value})
    for value in range(1, 150):  # none that works is nearer
        try:
            Config(**settings | {name: value})
        except SettingError:
            continue
        assert not min(nearest) < value < max(nearest)
        assert abs(value - settings[name]) >= min(abs(n - settings[name]) for n in nearest)


@pytest.mark.parametrize(
    'field', [field for field in FIELDS.values() if isinstance(field.default, float)], ids=lambda field: field.name
)
def test_no_setting_may_be_nan(field):
    with pytest.raises(SettingError, match=f'{field.name}=nan'):
        Config(**{field.name: math.nan})


@pytest.mark.parametrize(
    'settings',
    [
        dict(t_min=0.0, t_max=1.0),
        dict(warmup_steps=0),
        dict(ema_decays=()),
        dict(guidance_scale=3.0, label_dropout=0.1),
        dict(experiment_name='a_b-c+d=1'),
        dict(label_dropout=1.0),
        dict(label_dropout=0.0),
        dict(min_lr=0.001),
        dict(seed=2**40),
        dict(num_training_steps=1, warmup_steps=0),
    ],
    ids=str,
)
def test_values_at_the_edge_are_accepted(settings):
    assert {name: getattr(Config(**settings), name) for name in settings} == settings


# ---------------------------------------------------------------- names of runs

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


# ---------------------------------------------------------------- what may change on resume


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


@pytest.mark.parametrize('schedule, free', [('constant', True), ('inverse_sqrt', True), ('cosine', False)])
def test_a_run_may_be_prolonged_if_its_schedule_never_looks_at_the_end(schedule, free):
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


@pytest.mark.parametrize('preset', [name for name in PRESETS if name != 'digits'])
def test_a_run_from_before_there_was_muon_is_no_other_experiment(preset):
    """Its config.json has no `optimizer`, which was AdamW, and a bool in place of a word for `compile`."""
    config = Config(preset=preset, **PRESETS[preset])
    saved = json.loads(json.dumps(dataclasses.asdict(config))) | dict(compile=True)
    assert saved.pop('optimizer') == 'adamw'
    assert differences(saved, config) == []
    assert differences(saved, dataclasses.replace(config, optimizer='muon')) == ['optimizer: adamw -> muon']
