"""Fields of an experiment's own config class: values that can be saved with the run, and restoring them."""

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import saving
from config import Config, SettingError, parse_config
from settings.same_run import changes


class Kind(enum.Enum):
    A = 'a'


class Name(enum.StrEnum):
    A = 'a'


@dataclass(frozen=True)
class Inner:
    pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))


@dataclass(frozen=True)
class Huber:
    width: float = 0.1
    inner: Inner = Inner()


@dataclass(frozen=True)
class Mine(Config):
    huber: Huber = Huber()
    other: Huber | None = None
    names: dict[str, list[int]] = field(default_factory=lambda: {'a': [1]})


@pytest.mark.parametrize(
    ('kind', 'value', 'what'),
    [
        (Path, Path('x'), 'PosixPath'),
        (Kind, Kind.A, 'Kind'),
        (Name, Name.A, 'Name'),
        (frozenset, frozenset(), 'frozenset'),
        (tuple, (1, (torch.float32,)), 'dtype'),
        (dict, {1: 2}, 'keys'),
    ],
)
def test_values_that_files_cannot_hold_are_refused_when_the_config_is_read(kind, value, what):
    made: Any = dataclasses.make_dataclass(
        'Own', [('mine', kind, field(default_factory=lambda: value))], bases=(Config,), frozen=True
    )
    with pytest.raises(SettingError, match=rf'^mine=.*: config\.json and checkpoints cannot .*{what}.*Make it a str'):
        parse_config([], made)


def test_a_dataclass_in_a_config_comes_back_from_a_checkpoint_and_from_json(tmp_path):
    config = Mine(huber=Huber(0.3, Inner(((5, 6),))), other=Huber(0.4))
    saved = dataclasses.asdict(config)
    saving.write(tmp_path / 'x.pt', config=saved | dict(older=1))
    assert saving.config_of(torch.load(tmp_path / 'x.pt', weights_only=True), Mine) == config
    assert saving.config_of(dict(config=saved)) == Config(experiment_name=config.experiment_name)
    for from_json in (saved, json.loads(json.dumps(saved))):
        assert not changes(from_json, config)
        assert set(changes(from_json, dataclasses.replace(config, other=None))) == {'other'}
    assert not changes(dataclasses.asdict(Config()), Mine())  # a run from before these fields


class Bare(Config):
    base_lr: float = 1e-2


@dataclass(frozen=True)
class Untyped(Config):
    base_lr = 1e-2


class Twice(Untyped):
    depth = 2


@dataclass(frozen=True)
class Whole(Config):
    depth: int = 2
    SIZES = (1, 2)

    def twice(self):
        return 2 * self.depth

    three = property(lambda self: 3 * self.depth)


@pytest.mark.parametrize('kind, name', [(Bare, 'base_lr'), (Untyped, 'base_lr'), (Twice, 'depth')])
def test_a_value_that_dataclass_does_not_take_as_a_setting_is_refused(kind, name):
    """Otherwise it would be ignored, and the run would train with the default of Config."""
    with pytest.raises(SettingError, match=rf'{kind.__name__}\.{name} is not a setting: .*@dataclass\(frozen=True\)'):
        parse_config([], kind)
    assert parse_config(['--depth', '3'], Whole).three == 9
