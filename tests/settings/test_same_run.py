"""What a resumed run may change, and how two configs differ."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from config import PRESETS, Config
from settings.same_run import FREE_ON_RESUME, differences
from tests.settings import OVERRIDES

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
