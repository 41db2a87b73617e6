"""UNet and DiT with 1 and 3 axes besides the channels, against themselves with 2 axes; circular padding."""

import itertools

import numpy as np
import pytest
import torch

import utils
from config import Config, SettingError
from networks import get_network, transformer
from networks.transformer import DiT
from tests.helpers import record_of
from training.advice import padding_warning
from unet import Attention, UNet

SIDES = [(12,), (8, 12), (4, 8, 12)]
each_number_of_axes = pytest.mark.parametrize('sides', SIDES, ids=['signals', 'images', 'volumes'])
each_network = pytest.mark.parametrize('network', ['unet', 'unet circular', 'dit'])


@pytest.fixture(autouse=True)
def double_precision():
    """Identities hold to 12 digits, so a wrong weight or place cannot hide in rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(network, shape, cond=None, **settings):
    """A small network without a weight that is 0."""
    torch.manual_seed(0)
    if network == 'dit':
        net = DiT(shape, 3, **(dict(depth=2, width=48, heads=2, cond=cond) | settings))
    else:
        padding = 'circular' if 'circular' in network else 'zeros'
        small = dict(
            channels=8, channel_mults=(1, 2, 2), num_res_blocks=1, attention_resolutions=(max(shape[1:], default=0),)
        )
        net = UNet(shape, 3, **(small | dict(cond=cond, padding=padding) | settings))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def batch(shape, n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=generator), torch.linspace(50, 950, n), torch.arange(n)


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- 1, 2 and 3 axes are one network


@torch.no_grad()
def give_weights(small, large, axis):
    """Let `large` compute along its axis `axis`, which `small` lacks, nothing: kernels are 0 but in their middle."""
    for p, q in zip(large.parameters(), small.parameters(), strict=True):
        if p.ndim > q.ndim:
            p.zero_().select(2 + axis, (p.shape[2 + axis] - 1) // 2).copy_(q)
        elif p.shape != q.shape:  # the head of a DiT: all values of a patch along this axis are equal
            patch, rest = (small.in_channels, *large.axes * [small.patch]), q.shape[1:]
            values = q.reshape(*patch[:-1], *rest).unsqueeze(1 + axis)
            p.copy_(values.expand(*patch, *rest).reshape(p.shape))
        else:
            p.copy_(q)


@each_network
@pytest.mark.parametrize(
    ('sides', 'axis'),
    [((12,), 0), ((12,), 1), ((6, 10), 0), ((6, 10), 1), ((6, 10), 2)],
    ids=['1 x L', 'L x 1', '1 x H x W', 'H x 1 x W', 'H x W x 1'],
)
def test_an_axis_of_one_place_changes_nothing(network, sides, axis, monkeypatch):
    """With kernels that do not reach along the added axis. Sides of 6 and 10 are padded to 8 and 12."""
    real = transformer.angles  # shares its dimensions among the axes, so the added axis must get none
    places = lambda sides, dim, device: real([n for n in sides if n > 1], dim, device)  # noqa: E731
    monkeypatch.setattr(transformer, 'angles', places)
    more = lambda sides: (*sides[:axis], 1, *sides[axis:])  # noqa: E731
    small = build(network, (2, *sides), dict(low=(1, *sides), ink=()))
    large = build(network, (2, *more(sides)), dict(low=(1, *more(sides)), ink=()))
    give_weights(small, large, axis)
    xt, time, label = batch((2, *sides))
    cond = dict(low=torch.randn(2, 1, *(n // 2 for n in sides)), ink=torch.rand(2))  # half as large: it is resized
    expected = small(xt, time, label, **cond)
    cond['low'] = cond['low'].unsqueeze(2 + axis)
    assert_equal(large(xt.unsqueeze(2 + axis), time, label, **cond).squeeze(2 + axis), expected)
    assert expected.std() > 0.1


@each_network
@pytest.mark.parametrize('sides', [(7,), (1,), (2,), (1, 6), (3, 2, 5), (1, 1, 9)], ids=str)
def test_sides_are_padded_at_their_end_and_cropped(network, sides):
    """By the last values, or periodically, as often as it takes."""
    net, (xt, time, label) = build(network, (2, *sides)), batch((2, *sides))
    larger = xt
    for axis, side in enumerate(sides, 2):
        places = torch.arange(-(-side // net.multiple) * net.multiple)
        larger = larger.index_select(axis, places % side if 'circular' in network else places.clamp(max=side - 1))
    out = net(xt, time, label)
    assert out.shape == xt.shape and out.count_nonzero() == out.numel()
    assert_equal(out, net(larger, time, label)[(..., *map(slice, sides))])


@each_number_of_axes
@pytest.mark.parametrize('patch', [1, 2, 4])
def test_a_patch_comes_back_where_it_was(sides, patch):
    """Without blocks, a patch of the output depends only on the same patch of the input."""
    net = build('dit', (2, *sides), patch=patch, depth=1)
    torch.nn.init.zeros_(net.blocks[0].modulation.weight)
    torch.nn.init.zeros_(net.blocks[0].modulation.bias)
    xt, time, label = batch((2, *sides), 1)
    before, patches = net(xt, time, label), [range(0, side, patch) for side in sides]
    for corner in list(itertools.product(*patches))[:: max(1, len(patches[-1]) // 2)]:
        inside = (..., *(slice(start, start + patch) for start in corner))
        changed = xt.clone()
        changed[inside] += 1
        moved = (net(changed, time, label) - before).abs()
        assert moved[inside].min() > 0
        moved[inside] = 0
        assert moved.max() == 0


@each_network
@each_number_of_axes
def test_forward_mode_equals_reverse_mode(network, sides):
    """Along a direction of xt and time, w (J v) = (w J) v."""
    net, (xt, time, label) = build(network, (2, *sides)), batch((2, *sides))
    xt.requires_grad_(), time.requires_grad_()
    along = torch.randn_like(xt), torch.ones_like(time)
    out, tangent = utils.jvp(lambda x, t: net(x, t, label), (xt.detach(), time.detach()), along)
    weight, plain = torch.randn_like(xt), net(xt, time, label)
    assert_equal(out, plain)
    back = torch.autograd.grad((weight * plain).sum(), (xt, time))
    # the time becomes float32 in its sinusoid
    expected = sum((g * v).sum() for g, v in zip(back, along, strict=True))
    torch.testing.assert_close((weight * tangent).sum(), expected, rtol=1e-5, atol=1e-5)


@each_network
@each_number_of_axes
def test_gradients_reach_every_parameter(network, sides):
    net, (xt, time, label) = build(network, (2, *sides)), batch((2, *sides))
    net(xt, time, label).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_network
@each_number_of_axes
def test_bfloat16_is_close(network, sides):
    torch.set_default_dtype(torch.float32)
    net, inputs = build(network, (2, *sides)), batch((2, *sides))
    exact = net(*inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert (net(*inputs) - exact).norm() < 0.05 * exact.norm()


# ---------------------------------------------------------------- periodic data


@each_number_of_axes
def test_with_circular_padding_a_shift_of_the_input_shifts_the_output(sides):
    """By multiples of 4, for two halvings; conditions that are channels are shifted too."""
    cond = dict(low=(1, *sides), ink=())
    xt, time, label = batch((2, *sides))
    low, ink = torch.randn(2, 1, *sides), torch.rand(2)
    net, zeros = (build(network, (2, *sides), cond) for network in ('unet circular', 'unet'))
    assert net.multiple == 4 and sum(isinstance(module, Attention) for module in net.modules()) > 1
    axes = tuple(range(2, 2 + len(sides)))
    for shifts in itertools.product(*(range(0, side, 4) for side in sides)):
        rolled = [x.roll(shifts, axes) for x in (xt, low)]
        expected = net(xt, time, label, low=low, ink=ink).roll(shifts, axes)
        assert_equal(net(rolled[0], time, label, low=rolled[1], ink=ink), expected)
        if any(shifts):
            edges = zeros(rolled[0], time, label, low=rolled[1], ink=ink)
            assert not torch.allclose(edges, zeros(xt, time, label, low=low, ink=ink).roll(shifts, axes), atol=1e-3)


@each_number_of_axes
def test_with_circular_padding_two_periods_give_two_periods(sides):
    """As on an infinite line: doubling each side changes no norm, no convolution, and no mean over equal keys."""
    net, (xt, time, label) = build('unet circular', (2, *sides)), batch((2, *sides))
    twice = (1, 1, *len(sides) * [2])
    assert_equal(net(xt.tile(twice), time, label), net(xt, time, label).tile(twice))


def test_padding_adds_no_weights_and_changes_no_name():
    zeros, circular = (build(network, (1, 8, 8)) for network in ('unet', 'unet circular'))
    assert [(name, p.shape) for name, p in zeros.named_parameters()] == [
        (name, p.shape) for name, p in circular.named_parameters()
    ]


@pytest.mark.parametrize(
    ('settings', 'sides', 'text'),
    [
        (dict(padding='circular', channel_mults=(1, 2, 2)), (8, 30), 'sides of 8x30 to multiples of 4'),
        (dict(padding='circular', channel_mults=(1, 2, 2)), (64,), None),
        (dict(padding='circular'), (5,), 'sides of 5 to multiples of 2'),
        (dict(), (5,), None),
    ],
)
def test_warns_of_periods_that_the_levels_do_not_divide(settings, sides, text):
    found = padding_warning(Config(**settings), sides)
    assert found is None if text is None else text in found


# ---------------------------------------------------------------- shapes that are refused, and conditions


@each_network
@pytest.mark.parametrize('shape', [(2,), (), (1, 2, 3, 4, 5)], ids=str)
def test_other_numbers_of_axes_are_refused(network, shape):
    name = 'DiT' if network == 'dit' else 'UNet'
    with pytest.raises(ValueError, match=rf'a {name} is for images \(C, H, W\), signals \(C, L\) and volumes .*mlp'):
        build(network, shape)


@each_network
@pytest.mark.parametrize(
    ('sides', 'given', 'wanted'),
    [
        ((12,), (4, 2, 8, 8), r'\(B, 2, L\)'),
        ((12,), (4, 3, 12), r'\(B, 2, L\)'),
        ((8, 12), (4, 2, 12), r'\(B, 2, H, W\)'),
        ((4, 8, 12), (4, 2, 8, 12), r'\(B, 2, D, H, W\)'),
    ],
)
def test_data_of_another_shape_are_refused(network, sides, given, wanted):
    with pytest.raises(ValueError, match=wanted):
        build(network, (2, *sides))(torch.zeros(given), torch.rand(4))


@each_network
@each_number_of_axes
@pytest.mark.parametrize('shape', [(3, 5), (3, 5, 6), (3, 5, 6, 7)], ids=str)
def test_only_conditions_with_the_axes_of_the_data_become_channels(network, sides, shape):
    if len(shape) == 1 + len(sides):
        net = build(network, (2, *sides), {'low': shape})
        xt, time, label = batch((2, *sides))
        out, low = net(xt, time, label), torch.randn(2, *shape)
        assert net.conditions.channels == 3 and not torch.allclose(net(xt, time, label, low=low), out)
        with pytest.raises(ValueError, match="condition 'low' has shape"):
            net(xt, time, label, low=low[:, :2])
    else:
        wanted = {1: 'L', 2: 'H, W', 3: 'D, H, W'}[len(sides)]
        with pytest.raises(
            ValueError, match=rf"'low' has shape .*vector or, as the data, \(C, {wanted}\) for channels"
        ):
            build(network, (2, *sides), {'low': shape})


# ---------------------------------------------------------------- from a file to samples


@pytest.mark.parametrize(
    ('shape', 'settings'),
    [
        ((2, 64), dict(padding='circular')),
        ((2, 64), dict(network='dit')),
        ((16, 16), dict(array_layout='no_channels', padding='circular')),
        ((1, 4, 6, 5), dict()),
        ((1, 4, 6, 5), dict(network='dit')),
    ],
    ids=str,
)
def test_arrays_of_signals_fields_and_volumes_train(tiny_config, build_trainer, tmp_path, shape, settings):
    torch.set_default_dtype(torch.float32)
    x = np.random.default_rng(0).normal(size=(80, *shape), scale=0.5).cumsum(-1).astype(np.float32)
    np.save(tmp_path / 'x.npy', x)
    size = dict(dit_depth=1, dit_width=32, dit_heads=2) if 'network' in settings else {}
    run = dict(dataset='arrays', data_path=str(tmp_path / 'x.npy'), num_training_steps=3, **size)
    trainer = build_trainer(tiny_config(**run, **settings))
    item = shape if len(shape) > 2 or 'array_layout' not in settings else (1, *shape)
    assert trainer.shape == item
    trainer.train_loop()
    assert np.isfinite(record_of(trainer.config.run_dir)[-1]['eval/reference'])
    samples = trainer.drawing.samples(trainer.samplers()['adams'], trainer.network, trainer.sample_inputs(3))
    assert samples.shape == (3, *item) and samples.isfinite().all()


@pytest.mark.parametrize('length', [64, 1000, 1024])
def test_the_default_network_takes_signals_of_any_length(length):
    torch.set_default_dtype(torch.float32)
    net = get_network(Config(), (2, length), 0)
    assert net(torch.randn(1, 2, length), torch.rand(1)).shape == (1, 2, length)
    with pytest.raises(SettingError, match=rf'data of {length} give levels of side \[{length}, {length // 2}\]'):
        get_network(Config(attention_resolutions=(4,)), (2, length), 0)
