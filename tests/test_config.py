"""The list of settings: agreed names, helps, readers, presets and DEBUG."""

import ast
import dataclasses
import re

import pytest

from augmentations import AUGMENTATIONS, LABELS
from config import DEBUG, PRESETS, Config, SettingError, choose, parse_config
from sampling import SETTINGS
from tests.helpers import ROOT

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
WINGS = (
    'networks solvers data_loading training evaluation reports scripts runtime'.split()
)  # settings/ only checks them

# names that examples, tests and users' experiments rely on
AGREED = """preset dataset experiment_name ckpt_dir data_dir seed debug overfit init_from final_eval wandb
    wandb_project wandb_entity network process_name beta_min beta_max sigma_min sigma_max t_min t_max model_type
    target_type time_sampler stratified label_dropout global_batch_size batch_shards accumulation_steps
    num_training_steps base_lr min_lr warmup_steps lr_schedule_type weight_decay grad_clip_norm ema_decays log_every
    save_every keep_every sample_every eval_every solver num_sample_steps time_grid sde_noise guidance_scale precision
    compile""".split()


def test_every_agreed_setting_exists():
    assert set(AGREED) <= set(FIELDS)


def test_every_setting_has_a_help_of_one_line():
    """Its help is a comment on the same line, or a docstring below if the line would be too long."""
    text = (ROOT / 'config.py').read_text()
    found = re.findall(r'^    (\w+): [^#\n]+(?:  # |\n    """)(.{6,}?\.)(?:""")?$', text, re.MULTILINE)
    assert [name for name, _ in found] == list(FIELDS)


def test_every_setting_is_read_outside_config():
    """Reads look like config.NAME or c.NAME; augmentations.py and sampling.py read some by getattr."""
    read = set()
    for path in [*ROOT.glob('*.py'), *(path for path in ROOT.glob('*/*.py') if path.parent.name in WINGS)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, 'id', '')
                if owner in ('config', 'c'):
                    read.add(node.attr)
    read |= {'experiment_name', 'ckpt_dir'} if 'run_dir' in read else set()
    read |= set(SETTINGS)
    assert set(FIELDS) - read == {'debug', 'preset', 'settings'} | (AUGMENTATIONS.keys() - LABELS)


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


def test_choose():
    assert choose('solver', 'b', {'a': 1, 'b': 2}) == 2
    with pytest.raises(SettingError, match=r"solver='eulr'.*euler, heun.*'euler'"):
        choose('solver', 'eulr', {'euler': 1, 'heun': 2})
