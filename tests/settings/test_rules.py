"""The rules for values of settings, and their messages."""

import dataclasses
import math
import re

import pytest

from augmentations import AUGMENTATIONS
from config import Config, SettingError
from settings.rules import RULES, RULES_OF_SEVERAL

FIELDS = {field.name: field for field in dataclasses.fields(Config)}

BROKEN = [  # (settings, the settings that the message must show)
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
    (dict(array_layout='nhwc'), 'array_layout'),
    *((dict(value_range=value), 'value_range') for value in ((1.0,), (1.0, 0.0))),
    *((dict(image_size=value), 'image_size') for value in ((), (0,), (8, 8, 8))),
    *(
        ({name: -1}, name)
        for name in 'seed held_out log_every save_every keep_every sample_every eval_every eval_metrics_every'.split()
    ),
    *(({name: -1}, name) for name in 'warmup_steps num_workers max_translation sample_nfe'.split()),
    *(({name: value}, name) for name in ['label_dropout', 'guidance_rescale', *AUGMENTATIONS] for value in (-0.1, 1.1)),
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
    (dict(ema_type='power'), 'ema_type ema_decays'),
    *((dict(ema_type='power', ema_decays=(0.05, width)), 'ema_type ema_decays') for width in (0.009, 0.26)),
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
    """Each rule is the first that is broken in some case of BROKEN, so a new rule needs a new case."""
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
    for value in range(1, 150):  # no value that works is nearer
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
        dict(ema_type='power', ema_decays=(0.01, 0.25)),
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
