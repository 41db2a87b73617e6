"""Choices, read from the source files, and the settings that each choice reads."""

import ast
import dataclasses
import inspect
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch

import main
from config import PRESETS, Config, SettingError, parse_config
from optimizers import OPTIMIZERS
from settings.choices import READS, TABLES, is_extended, keys_in, known_choices
from settings.flags import refuse
from tests.helpers import ROOT

FIELDS = {field.name for field in dataclasses.fields(Config)}


def refused(*argv: str) -> str:
    """The message, or '' if these flags are right."""
    try:
        refuse(parse_config(argv), argv, PRESETS)
    except SettingError as error:
        return str(error)
    return ''


# ---------------------------------------------------------------- the table of readers against the sources

WINGS = [ROOT, *(ROOT / name for name in 'data_loading networks solvers training evaluation reports'.split())]
TREES = {
    path.relative_to(ROOT).with_suffix('').as_posix(): ast.parse(path.read_text())
    for w in WINGS
    for path in w.glob('*.py')
}
FUNCTIONS = {n.name: n for tree in TREES.values() for n in tree.body if isinstance(n, ast.FunctionDef)}


def entries(setting: str) -> dict[str, ast.AST]:
    """Choice -> the expression in its table."""
    module, table = TABLES[setting]
    body = TREES[module.replace('.', '/')].body
    value = next(n.value for n in body if isinstance(n, ast.AnnAssign) and getattr(n.target, 'id', '') == table)
    assert isinstance(value, ast.Dict)
    found = dict[str, ast.AST]()
    for key, node in zip(value.keys, value.values, strict=True):
        names = [ast.literal_eval(key)] if key else keys_in('data_loading.toy2d', 'TOY2D')
        found |= dict.fromkeys(names, node)
    return found


def reads_in(node: ast.AST) -> set[ast.Attribute]:
    """All config.NAME of settings."""
    found = {n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in FIELDS}
    return {n for n in found if getattr(n.value, 'id', getattr(n.value, 'attr', '')) == 'config'}


def reads_of(node: ast.AST, seen: frozenset[str] = frozenset()) -> set[ast.Attribute]:
    """The same for an entry: its expression, the functions that it names, and functions to which they pass config."""
    if isinstance(node, ast.FunctionDef):
        calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and 'config' in map(ast.unparse, n.args)]
        names = {getattr(call.func, 'attr', getattr(call.func, 'id', '')) for call in calls}
    else:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    inner = [reads_of(FUNCTIONS[name], seen | {name}) for name in names & FUNCTIONS.keys() - seen]
    return reads_in(node).union(*inner)


@pytest.mark.parametrize('setting', [setting for setting in READS if setting in TABLES and setting != 'optimizer'])
def test_the_table_of_readers_matches_the_sources(setting):
    """Each built-in choice reads what the table says. The table has all settings that only some choices read."""
    nodes = {choice: reads_of(node) for choice, node in entries(setting).items()}
    in_sources = {choice: {n.attr for n in found} for choice, found in nodes.items()}
    in_table = {choice: set(names.split()) & FIELDS for choice, names in READS[setting].items()}
    assert in_table.keys() == in_sources.keys()
    owned = set(chain(*in_table.values()))
    assert {choice: names & owned for choice, names in in_sources.items()} == in_table
    elsewhere = {n.attr for tree in TREES.values() for n in reads_in(tree) - set(chain(*nodes.values()))}
    of_some = set.union(*in_sources.values()) - set.intersection(*in_sources.values())
    assert of_some - owned - elsewhere == set()


def test_optimizers_read_what_the_table_says():
    """By their signatures. Those that have no betas keep their own eps."""
    settings = dict(weight_decay='weight_decay', betas='adam_betas', momentum='adam_betas', eps='adam_eps')
    for name, optimizer in OPTIMIZERS.items():
        taken = {settings[n] for n in inspect.signature(optimizer).parameters if n in settings}
        taken -= set() if 'betas' in inspect.signature(optimizer).parameters else {'adam_eps'}
        assert taken == set(READS['optimizer'][name].split()), name
    torchs = {name.lower() for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    assert torchs - set(OPTIMIZERS) == {'optimizer', 'lbfgs', 'rprop', 'sparseadam'}


@pytest.mark.parametrize('setting', TABLES)
def test_choices_in_the_files_match_the_tables(setting):
    built_in = keys_in(*TABLES[setting])
    assert built_in == list(main.choices()[setting])[: len(built_in)] and len(built_in) > 1
    assert not is_extended(TABLES[setting][1])


def test_each_table_from_which_a_setting_chooses_is_known():
    nodes = [n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    calls = [n.args for n in nodes if getattr(n.func, 'id', '') == 'choose']
    named = [(name, table) for name, _, table in calls if isinstance(name, ast.Constant)]
    tables = {name.value: table.id for name, table in named if isinstance(table, ast.Name)}
    assert {name: table for name, (_, table) in TABLES.items()} == {n: tables[n] for n in tables if n in FIELDS}


def test_a_table_that_cannot_be_read_refuses_nothing(monkeypatch):
    for module in ('solvers.table', 'gone'):
        monkeypatch.setitem(TABLES, 'solver', (module, 'NO_TABLE'))
        assert known_choices('solver') == [] and refused('--solver', 'mine') == ''


# ---------------------------------------------------------------- what is refused


FOLDER = 'image_folder (--preset small_images)'


@pytest.mark.parametrize(
    'flags, what, remedy',
    [
        ('--data_path x', "data_path='x': dataset='digits'", f'dataset {FOLDER} or arrays or hub'),
        ('--image_size 8 --no_cache', "image_size=(8,), cache=False: dataset='digits'", f'dataset {FOLDER} or hub'),
        ('--dataset arrays --data_path x --columns a', "columns=('a',): dataset='arrays'", 'dataset hub'),
        ('--columns a --dataset arrays --no_cache', "columns=('a',), cache=False: dataset='arrays'", 'dataset hub'),
        ('--dit_depth 3', "dit_depth=3: network='unet'", 'network dit'),
        ('--padding circular --network dit', "padding='circular': network='dit'", 'network unet'),
        ('--preset toy2d --attention_resolutions', "attention_resolutions=(): network='mlp'", 'network unet'),
        ('--beta_max 3 --process_name cosine', "beta_max=3.0: process_name='cosine'", 'process_name linear_vp'),
        ('--time_std 2 --time_sampler uniform', "time_std=2.0: time_sampler='uniform'",
         'time_sampler logit_normal or log_normal'),
        ('--min_lr 1e-5 --lr_schedule_type constant', "min_lr=1e-05: lr_schedule_type='constant'",
         'lr_schedule_type cosine or inverse_sqrt or linear or wsd'),
        ('--max_translation 2', 'max_translation=2: translate_prob=0.0', 'translate_prob above 0'),
    ],
)  # fmt: skip
def test_a_flag_that_nothing_reads_is_refused_with_advice(flags, what, remedy):
    them = 'it' if what.count('=') == 2 else 'them'
    assert refused(*flags.split()) == f'{what} does not read {them}. Pass --{remedy}.'


def test_one_line_names_all_that_are_not_read():
    text = refused(*'--no_cache --sigma_min 0.1 --dit_depth 3 --channels 8 --network mlp'.split())
    assert text == (
        f"cache=False: dataset='digits' does not read it. Pass --dataset {FOLDER} or hub. "
        "dit_depth=3: network='mlp' does not read it. Pass --network dit. "
        "sigma_min=0.1: process_name='rf' does not read it. Pass --process_name ve."
    )


@pytest.mark.parametrize(
    'flags',
    [
        '--preset small_images --data_path x --image_size 32 --skip_unreadable',
        '--dataset of_mine --data_path x --image_size 32 --columns a',  # a choice that is not built in reads everything
        '--sde_noise sigma --sde_noise_scale 0.5 --sde_last_step ode --solver euler',  # an SDE is drawn too
        '--network mlp --channels 8 --num_res_blocks 2 --dropout 0.1',
        '--guidance_interval 0.2 0.8',  # generate.py --guidance_scale reads it
        '--translate_prob 0.5 --max_translation 2',
    ],
)
def test_a_flag_that_something_may_read_is_not_refused(flags, monkeypatch):
    monkeypatch.setattr('settings.choices.known_choices', lambda setting: [])
    assert refused(*flags.split()) == ''


def test_presets_and_settings_that_are_not_on_the_command_line_are_free():
    assert all(refused('--preset', preset) == '' for preset in PRESETS)
    assert refused('--preset', 'small_images', '--network', 'mlp') == ''  # the preset's attention_resolutions
    assert parse_config(['--dit_depth', '3']).dit_depth == 3


def test_an_experiment_with_classes_of_its_own_is_free():
    class Mine(Config):
        pass

    argv = ['--dit_depth', '3']
    for classes in ((Mine,), (Config, object)):
        assert main.flags(argv, *classes).dit_depth == 3
    with pytest.raises(SystemExit) as stop:
        main.flags(argv)
    assert stop.value.code == 2


def test_main_refuses_both_within_a_second(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ImportError("torch was imported")')
    for flags, text in (('--solver eulr', "Did you mean 'euler'?"), ('--data_path x', 'does not read it')):
        seconds = []
        for _ in range(3):
            start = time.monotonic()
            command = [sys.executable, 'main.py', *flags.split()]
            done = subprocess.run(command, cwd=ROOT, env={'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True)
            seconds.append(time.monotonic() - start)
            assert done.returncode == 2 and text in done.stderr and done.stderr.count('\n') == 1
        assert min(seconds) < 1


@pytest.mark.parametrize(
    'line', ["SOLVERS['mine'] = euler", 'SOLVERS.update(mine=euler)', 'SOLVERS |= dict(mine=euler)']
)
def test_a_choice_that_another_file_adds_is_not_refused(line, monkeypatch, tmp_path):
    (tmp_path / 'mine.py').write_text(f'from solvers import SOLVERS\n{line}\n')
    with monkeypatch.context() as patch:
        patch.setattr('settings.choices.ROOT', tmp_path)
        assert is_extended('SOLVERS') and not is_extended('NETWORKS')
    monkeypatch.setattr('settings.choices.is_extended', lambda table: table == 'SOLVERS')
    assert refused('--solver', 'mine') == '' and 'is not a choice' in refused('--network', 'mine')
