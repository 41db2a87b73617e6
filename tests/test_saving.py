"""Checkpoints: atomic writes, errors that name a damaged file, and refusal of weights that do not fit."""

import dataclasses
import errno
import random

import pytest
import torch
from torch import nn

import saving
from config import Config, SettingError
from networks import NETWORKS, TIME_INPUTS, get_network
from prediction import ROWS
from processes import PROCESSES
from sampling import sample

SHAPE, CLASSES = (1, 8, 8), 10


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint of a network, an optimizer with state and plain values: (path, network, optimizer)."""
    torch.manual_seed(0)
    network = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    path = tmp_path / 'a.pt'
    saving.write(
        path,
        network=network.state_dict(),
        optimizer=optimizer.state_dict(),
        step=7,
        shape=SHAPE,
        wandb_id=None,
        ema={0.9: [1.5, 'text']},
    )
    return path, network, optimizer


# ---------------------------------------------------------------- save and load


def test_round_trip(saved):
    path, network, optimizer = saved
    state = saving.load(path)
    assert {name: state[name] for name in ('step', 'shape', 'wandb_id', 'ema')} == dict(
        step=7, shape=SHAPE, wandb_id=None, ema={0.9: [1.5, 'text']}
    )
    other = nn.Linear(4, 3)
    other.load_state_dict(state['network'])
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), network.parameters(), strict=True))
    fresh = torch.optim.AdamW(other.parameters())
    fresh.load_state_dict(state['optimizer'])
    for p, q in zip(other.parameters(), network.parameters(), strict=True):
        assert fresh.state[p].keys() == optimizer.state[q].keys() and len(fresh.state[p]) > 0
        assert all(torch.equal(fresh.state[p][name], value) for name, value in optimizer.state[q].items())


def test_it_loads_with_weights_only_and_refuses_code(saved, tmp_path):
    assert torch.load(saved[0], weights_only=True)['step'] == 7
    saving.write(tmp_path / 'code.pt', step=print)
    with pytest.raises(SettingError, match='code'):
        saving.load(tmp_path / 'code.pt')


def flip(raw: bytes, i: int) -> bytes:
    return raw[:i] + bytes([raw[i] ^ 0x41]) + raw[i + 1 :]


def test_a_flipped_bit_in_a_tensor_is_noticed(saved):
    path, network, _ = saved
    raw = path.read_bytes()
    at = raw.index(network.weight.detach().numpy().tobytes())
    path.write_bytes(flip(raw, at + 17))
    assert not torch.equal(
        torch.load(path, weights_only=True)['network']['weight'], network.weight
    )  # torch does not notice
    with pytest.raises(SettingError, match=f'{path}.*damaged'):
        saving.load(path)


def test_a_flipped_bit_of_any_byte_is_noticed_or_harmless(tmp_path):
    path = tmp_path / 'a.pt'
    weight = torch.arange(6.0)
    saving.write(path, step=7, weight=weight)
    raw = path.read_bytes()
    rng = random.Random(0)
    for i in range(len(raw)):
        bit = rng.randrange(8)
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1 :])
        try:
            state = saving.load(path)
        except saving.DamagedCheckpoint:
            continue
        assert state['step'] == 7 and torch.equal(state['weight'], weight), (i, bit)


def test_a_flipped_bit_that_makes_a_folder_of_a_tensor_is_noticed(tmp_path):
    """It has no checksum, and torch returns whatever is in memory."""
    path = tmp_path / 'a.pt'
    saving.write(path, weight=torch.arange(6.0))
    raw = path.read_bytes()
    at = raw.rindex(b'archive/data/0') - 8  # the attributes, in the directory at the end of the file
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
    assert 'weight' in torch.load(path, weights_only=True)
    with pytest.raises(saving.DamagedCheckpoint, match='bad checksum or entry of archive/data/0'):
        saving.load(path)


@pytest.mark.parametrize('part', [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_cut_file_is_an_error_that_names_it(saved, part):
    path = saved[0]
    raw = path.read_bytes()
    path.write_bytes(raw[: int(part * len(raw))])
    with pytest.raises(SettingError, match=str(path)):
        saving.load(path)


@pytest.mark.parametrize(
    'content',
    [b'', b'\0' * 5000, b'not a checkpoint\n', bytes(range(256)) * 20, b'PK\x03\x04' + b'x' * 100],
    ids=range(5),
)
def test_garbage_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / 'x.pt').write_bytes(content)
    with pytest.raises(SettingError, match=str(tmp_path / 'x.pt')):
        saving.load(tmp_path / 'x.pt')


@pytest.mark.parametrize('name', ['absent.pt', 'absent/last.pt', ''])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(SettingError, match=str(tmp_path / name)):
        saving.load(tmp_path / name)


@pytest.mark.parametrize('content', [{'weights': torch.ones(2)}, torch.ones(2)], ids=['names', 'tensor'])
def test_a_torch_file_of_another_program_is_an_error_that_names_it(tmp_path, content):
    torch.save(content, tmp_path / 'other.pt')
    with pytest.raises(SettingError, match=r'other\.pt'):
        saving.load_for_sampling(tmp_path / 'other.pt')


# ---------------------------------------------------------------- networks


def test_weights_of_another_network_name_the_setting(tiny_config):
    small, wide = tiny_config(channels=8), tiny_config(channels=16, num_res_blocks=2, base_lr=0.5)
    weights = get_network(small, SHAPE, CLASSES).state_dict()
    with pytest.raises(SettingError, match=r'last\.pt.*channels: 8 -> 16') as caught:
        saving.load_weights(
            get_network(wide, SHAPE, CLASSES), weights, dataclasses.asdict(small), wide, 'ckpts/x/last.pt'
        )
    assert 'base_lr' not in str(caught.value)


def refused_weights(saved_config, config, saved_network, network):
    with pytest.raises(SettingError) as caught:
        saved = dataclasses.asdict(saved_config)
        saving.load_weights(network, saved_network.state_dict(), saved, config, 'ckpts/x/last.pt')
    return str(caught.value)


@pytest.mark.parametrize('network', ['unet', 'mlp', 'dit'])
def test_another_number_of_classes_is_named_and_no_setting_is_blamed(tiny_config, network):
    config, other = tiny_config(network=network), tiny_config(network=network, dataset='mnist')
    text = refused_weights(config, other, get_network(config, SHAPE, CLASSES), get_network(other, SHAPE, 0))
    assert 'the class embedding has 11 rows in the checkpoint, 1 now' in text and 'classes' in text.split('. ')[-1]
    assert 'dataset' not in text and '->' not in text


def test_another_shape_or_other_conditions_are_named(tiny_config):
    config = tiny_config()
    plain, colour, told = (
        get_network(config, *rest) for rest in ((SHAPE, CLASSES), ((3, 8, 8), CLASSES), (SHAPE, CLASSES, {'ink': ()}))
    )
    text = refused_weights(config, config, plain, colour)
    assert 'net.stem.weight has shape (8, 1, 3, 3) in the checkpoint, (8, 3, 3, 3) now' in text
    assert 'net.conditions.mlps.mlp_ink.0.weight is missing in the checkpoint' in refused_weights(
        config, config, plain, told
    )
    assert 'net.conditions.mlps.mlp_ink.0.weight is missing now' in refused_weights(config, config, told, plain)


@dataclasses.dataclass(frozen=True)
class DeepConfig(Config):
    depth: int = 4


class Deep(nn.Sequential):
    def forward(self, xt, time, label):
        return super().forward(xt.flatten(1)).reshape(xt.shape)


def deep(config, shape, num_classes):
    return Deep(*(nn.Linear(64, 64) for _ in range(config.depth)))


def test_own_settings_of_a_network_are_named(tiny_config, monkeypatch):
    monkeypatch.setitem(NETWORKS, 'deep', deep)
    four, five = (DeepConfig(**vars(tiny_config(network='deep')) | dict(depth=depth)) for depth in (4, 5))
    text = refused_weights(four, five, get_network(four, SHAPE, 0), get_network(five, SHAPE, 0))
    assert 'depth: 4 -> 5 (checkpoint -> now); net.4.weight is missing in the checkpoint' in text


def test_weights_that_fit_are_copied(tiny_config):
    config = tiny_config()
    torch.manual_seed(1)
    network, other = get_network(config, SHAPE, CLASSES), get_network(config, SHAPE, CLASSES)
    assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    saving.load_weights(other, network.state_dict(), dataclasses.asdict(config), config, 'x.pt')
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )


def checkpoint_of(path, config, network, ema=(), **more):
    """Save a checkpoint as a run does; `ema`: the networks of moving averages, by decay."""
    averages = {decay: net.state_dict() for decay, net in dict(ema).items()}
    saved = dict(
        shape=SHAPE, num_classes=CLASSES, network=network.state_dict(), ema=dict(num_updates=1, networks=averages)
    )
    saving.write(path, config=dataclasses.asdict(config), **saved, **more)
    return path


def test_load_for_sampling_gives_the_averaged_weights(tiny_config, tmp_path):
    config = tiny_config(dropout=0.3)
    raw, first, second = (get_network(config, SHAPE, CLASSES) for _ in range(3))
    for network in (raw, first, second):
        for p in network.parameters():
            nn.init.normal_(p, std=0.1)
    path = checkpoint_of(tmp_path / 'a.pt', config, raw, ema={0.9: first, 0.5: second})
    network, process, its_config = saving.load_for_sampling(path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    assert its_config == config
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    x1, label = torch.randn(4, *SHAPE), torch.tensor([0, 3, 9, CLASSES])
    images = [sample(network, process, x1, label, model_type=its_config.model_type, num_steps=2) for _ in range(2)]
    assert images[0].shape == (4, *SHAPE) and images[0].isfinite().all()
    assert torch.equal(*images)  # no dropout


@pytest.mark.parametrize('shape', [(6,), [6]], ids=['tuple', 'list'])
def test_load_for_sampling_gives_a_network_its_conditions(tiny_config, tmp_path, shape):
    config, cond = tiny_config(), {'ink': (), 'text': shape}
    network = get_network(config, SHAPE, CLASSES, cond)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    loaded, _, _ = saving.load_for_sampling(checkpoint_of(tmp_path / 'a.pt', config, network, cond=cond))
    inputs, values = (torch.randn(2, *SHAPE), torch.rand(2)), dict(ink=torch.rand(2), text=torch.randn(2, 6))
    assert torch.equal(loaded(*inputs, **values), network.eval()(*inputs, **values))
    assert not torch.equal(loaded(*inputs, **values), loaded(*inputs))


@pytest.mark.parametrize(
    ('setting', 'table'),
    [('network', NETWORKS), ('process_name', PROCESSES), ('time_input', TIME_INPUTS), ('model_type', ROWS)],
)
@pytest.mark.parametrize(
    ('more', 'file'),
    [
        (dict(code={'e9.py': 'source', 'base.py:Base': 'source'}), r'e9\.py'),
        (
            dict(code={'trainer.py:ExampleDiffusionTrainer': 'source'}),
            'the script of the run',
        ),  # started without a script
        ({}, 'the script of the run'),
    ],
    ids=['script', 'classes', 'old'],
)
def test_an_entry_registered_by_the_script_names_the_file_to_import(
    tiny_config, tmp_path, monkeypatch, setting, table, more, file
):
    path = checkpoint_of(tmp_path / 'a.pt', tiny_config(**{setting: 'mine'}), nn.Linear(1, 1), **more)
    with pytest.raises(
        SettingError,
        match=f"a.pt.*{setting}='mine' is registered by {file}: import that file first.*{next(iter(table))}",
    ):
        saving.load_for_sampling(path)


def test_a_network_with_settings_of_its_own_asks_for_its_config_class(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, 'deep', deep)
    config = DeepConfig(**vars(tiny_config(network='deep')) | dict(depth=2))
    network = get_network(config, SHAPE, CLASSES)
    path = checkpoint_of(tmp_path / 'a.pt', config, network, code={'e9.py': 'source'})
    with pytest.raises(SettingError, match=r"'depth', which Config does not have.*config_class.*e9\.py"):
        saving.load_for_sampling(path)
    loaded, _, its_config = saving.load_for_sampling(path, config_class=DeepConfig)
    assert its_config == config and torch.equal(loaded.net[1].weight, network.net[1].weight)


def test_an_attribute_error_of_a_network_is_not_taken_for_a_setting(tiny_config, tmp_path, monkeypatch):
    def broken(config, shape, num_classes):
        return shape.channels

    monkeypatch.setitem(NETWORKS, 'broken', broken)
    path = checkpoint_of(tmp_path / 'a.pt', tiny_config(network='broken'), nn.Linear(1, 1))
    with pytest.raises(AttributeError, match='channels'):
        saving.load_for_sampling(path)


def test_without_averages_the_raw_weights_are_the_best():
    weights = {'w': torch.ones(1)}
    assert saving.best_weights(dict(network=weights, ema=dict(networks={}))) is weights
    assert saving.best_weights(dict(network=weights, ema=dict(networks={0.9: 'first', 0.5: 'second'}))) == 'first'


def test_the_config_of_a_checkpoint_leaves_out_what_a_subclass_added(tiny_config):
    config = tiny_config(channel_mults=(1, 3))
    assert saving.config_of(dict(config=dataclasses.asdict(config) | dict(num_pairs=4))) == config
    assert isinstance(saving.config_of(dict(config=dataclasses.asdict(config))), Config)


def test_a_setting_of_an_older_version_is_read_as_it_is_now(tmp_path):
    saving.write(tmp_path / 'x.pt', config=dict(image_size=32, compile=True, seed=3))
    now = dict(optimizer='adamw', image_size=(32,), compile='on', seed=3)
    assert saving.load(tmp_path / 'x.pt') == dict(config=now)


@pytest.mark.parametrize(
    ('number', 'damaged'), [(errno.EINVAL, True), (errno.EIO, True), (errno.EACCES, False), (errno.ESTALE, False)]
)
def test_a_file_on_a_bad_disk_is_damaged_and_one_out_of_reach_is_not(tmp_path, monkeypatch, number, damaged):
    saving.write(tmp_path / 'a.pt', step=1)
    monkeypatch.setattr(saving, 'check_archive', lambda path: (_ for _ in ()).throw(OSError(number, 'refused')))
    with pytest.raises(SettingError, match='is damaged' if damaged else 'cannot be read') as caught:
        saving.load(tmp_path / 'a.pt')
    assert isinstance(caught.value, saving.DamagedCheckpoint) is damaged
