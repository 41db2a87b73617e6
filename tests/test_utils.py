"""Shapes, bundles of tensors, derivatives and seeds."""

import hashlib
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import utils
from unet import UNet
from utils import bcast_right, concat, frozen, image_square_error, is_transformed, jvp, rows, seed_everything


@pytest.mark.parametrize('ndim', [1, 2, 4])
def test_bcast_right_multiplies_each_image_by_its_own_number(ndim):
    v, x = torch.tensor([2.0, 3.0]), torch.ones(2, *[5] * (ndim - 1))
    product = bcast_right(v, ndim) * x
    assert product.shape == x.shape
    assert product[0].unique().item() == 2 and product[1].unique().item() == 3


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 64, 32)])
def test_image_square_error_is_a_mean_over_each_image(shape):
    a = torch.zeros(2, *shape)
    b = torch.stack([torch.full(shape, 2.0), torch.full(shape, -3.0)])
    assert image_square_error(a, b).tolist() == pytest.approx([4, 9])
    b[0, 0, 0, 0] = 0
    assert image_square_error(a, b)[0].item() == pytest.approx(4 * (1 - 1 / b[0].numel()))


@pytest.mark.parametrize('shape', [(), (7,), (2, 3, 4, 5)])
def test_image_square_error_of_any_rank(shape):
    """Here one number per image, points and videos."""
    a, b = torch.randn(2, 3, *shape)
    expected = [np.mean((x - y) ** 2) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert image_square_error(a, b).tolist() == pytest.approx(expected)


def test_image_square_error_does_not_pair_all_with_all():
    with pytest.raises(ValueError, match=r'\(4, 1\) and \(4,\)'):
        image_square_error(torch.zeros(4, 1), torch.zeros(4))


# ---------------------------------------------------------------- bundles


@dataclass
class Inputs:
    x1: Tensor
    label: Tensor | None
    cond: dict[str, Tensor]
    given: list[Tensor]


@dataclass
class Own(Inputs):
    """A dataclass that an experiment may add."""

    mask: Tensor = field(default_factory=lambda: torch.zeros(1))
    nested: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    pair: tuple[Tensor, Tensor] = ()
    inner: Inputs | None = None
    name: str = 'a name'
    scale: float = 2.0


def bundle(first, n, label=True):
    """n rows; row i of every tensor holds the number first + i."""
    number = torch.arange(first, first + n)
    image = number[:, None, None].float().expand(n, 2, 2)
    own = dict(mask=number > 3, nested={'a': {'b': number}}, pair=(number, image), name=f'from {first}')
    inner = Inputs(image, None, {'c': number}, [])
    label = number if label else None
    return Own(image, label, {'float': number.float(), 'image': image}, [image, image + 1], inner=inner, **own)


def assert_numbers(b, numbers):
    """Assert that the rows of every tensor of b are the rows of `bundle` with these numbers."""
    number = torch.tensor(numbers)
    image = number[:, None, None].float().expand(len(number), 2, 2)
    for x in (b.x1, b.cond['image'], b.given[0], b.given[1] - 1, b.pair[1], b.inner.x1):
        assert torch.equal(x, image)
    for x in (b.label, b.cond['float'], b.nested['a']['b'], b.pair[0], b.inner.cond['c']):
        assert torch.equal(x.long(), number)
    assert torch.equal(b.mask, number > 3)
    assert type(b) is Own and type(b.inner) is Inputs and b.inner.label is None and b.scale == 2.0


def test_rows_of_every_tensor():
    b = bundle(0, 6)
    assert_numbers(rows(b, slice(1, 3)), [1, 2])
    assert_numbers(rows(b, torch.tensor([5, 0, 0])), [5, 0, 0])
    assert_numbers(rows(b, torch.arange(6) > 3), [4, 5])
    assert rows(b, slice(1)).name == 'from 0'
    assert rows(bundle(0, 2, label=False), slice(1)).label is None
    assert_numbers(b, range(6))


def test_concat_joins_every_tensor():
    joined = concat([bundle(0, 2), bundle(2, 3), bundle(5, 1)])
    assert_numbers(joined, range(6))
    assert joined.name == 'from 0'
    assert concat([bundle(0, 2, label=False), bundle(2, 1, label=False)]).label is None
    assert_numbers(concat([bundle(1, 2)]), [1, 2])


@pytest.mark.parametrize(
    ('name', 'value'),
    [('label', None), ('cond', {}), ('given', [torch.zeros(1)]), ('nested', {'a': {'c': torch.zeros(1)}})],
)
def test_parts_that_differ_are_refused(name, value):
    """No part may lose a condition."""
    other = bundle(2, 1)
    setattr(other, name, value)
    for pair in ([bundle(0, 2), other], [other, bundle(0, 2)]):
        with pytest.raises(ValueError, match=f'Own.{name}'):
            concat(pair)


# ---------------------------------------------------------------- derivatives


def closed_form(x, t):
    return torch.sin(x) * t[:, None]


def test_jvp_against_a_closed_form():
    x, dx = torch.randn(2, 3, 4, dtype=torch.float64)
    t, dt = torch.randn(2, 3, dtype=torch.float64)
    x.requires_grad_()
    for tangents in ((dx, dt), (dx, None), (None, dt), (None, None)):
        out, tangent = jvp(closed_form, (x, t), tangents)
        dx_, dt_ = (torch.zeros(1) if d is None else d for d in tangents)
        torch.testing.assert_close(out, torch.sin(x) * t[:, None])
        along_x, along_t = torch.cos(x) * t[:, None] * dx_, torch.sin(x) * dt_[:, None]
        torch.testing.assert_close(tangent, along_x + along_t)
        if tangents == (dx, dt):  # itself differentiable
            (gradient,) = torch.autograd.grad(tangent.sum(), x)
            torch.testing.assert_close(gradient, -torch.sin(x) * t[:, None] * dx + torch.cos(x) * dt[:, None])


def test_jvp_takes_expanded_inputs_and_channels_last():
    """A solver passes the time like this: one number for the whole batch."""
    t = torch.tensor([0.5]).expand(4)
    out, tangent = jvp(torch.square, (t,), (torch.ones_like(t),))
    assert out.tolist() == [0.25] * 4 and tangent.tolist() == [1] * 4
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    out, tangent = jvp(torch.square, (x,), (torch.ones(2, 3, 4, 4),))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(tangent, 2 * x)


def random_unet():
    """A UNet with attention at both levels, and without zero weights."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), 10, channels=8, num_res_blocks=1, attention_resolutions=(4, 8))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn_like(p))
    return net


def test_jvp_of_attention_against_two_reverse_passes():
    """Value, derivative, and the gradient of both with respect to weights and input.

    The reference: J dx is the derivative of u -> u J, which is linear in u, in the direction dx.
    """
    net, x = random_unet(), torch.randn(2, 1, 8, 8, requires_grad=True)
    t, label = torch.tensor([3.0, 500.0]), torch.tensor([1, 10])
    tangents = torch.randn_like(x), torch.ones_like(t)

    def two_reverse_passes(fn, inputs, tangents):
        inputs = tuple(value.clone().requires_grad_() for value in inputs)
        out = fn(*inputs)
        u = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, inputs, u, create_graph=True)
        return out, torch.autograd.grad(pulled, u, tangents, create_graph=True)[0]

    def with_gradients(which):
        out, tangent = which(lambda x, t: net(x, t, label), (x, t), tangents)
        gradients = torch.autograd.grad(out.square().mean() + tangent.square().mean(), [x, *net.parameters()])
        return out, tangent, gradients

    ours = with_gradients(jvp)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = with_gradients(two_reverse_passes)
    assert ours[1].abs().mean() > 1e-2 and all(g.abs().max() > 0 for g in ours[2])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_jvp_within_jvp():
    """A differentiated function may use a process without closed derivatives."""
    x = torch.tensor([2.0])
    _, (first, second) = jvp(lambda x: torch.stack(jvp(lambda x: x**3, (x,), (torch.ones(1),))), (x,), (torch.ones(1),))
    assert first.item() == pytest.approx(12) and second.item() == pytest.approx(12)


def test_code_knows_that_it_is_transformed():
    """In forward mode, by jvp and by torch.func; not afterwards, also after an error."""
    told, one = [], torch.ones(1)

    def watched(x):
        told.append(is_transformed())
        return (x**2).sum()

    jvp(watched, (one,), (one,))
    torch.func.grad(watched)(one)
    torch.func.vjp(watched, one)
    watched(one.requires_grad_()).backward()
    assert told == [True, True, True, False]
    with pytest.raises(ZeroDivisionError):
        jvp(lambda x: 1 // 0, (one,), (one,))
    assert not is_transformed()


def test_jvp_needs_a_tangent_for_each_input():
    with pytest.raises(ValueError, match='not 1 for 2'):
        jvp(closed_form, (torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 3),))


def test_frozen_gives_gradients_only_to_inputs():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1))
    call, x = frozen(net), torch.randn(5, 3, requires_grad=True)
    out = call(x)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net[2].num_batches_tracked == 2  # its buffers are its own


def test_frozen_follows_the_weights_and_takes_keywords():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x, label=None, **cond):
            return self.w * x + label + cond['c']

    net = Net()
    call = frozen(net)
    assert call(torch.ones(1), label=10, c=100).item() == 111
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net.w.grad = torch.tensor([-4.0])
    optimizer.step()
    assert call(torch.ones(1), label=10, c=100).item() == 115


# ---------------------------------------------------------------- seeds


def draws(*key):
    seed_everything(*key)
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_seeds_repeat():
    assert draws(3, 'noise', 7) == draws(3, 'noise', 7)


@pytest.mark.parametrize(
    ('a', 'b'),
    [
        ((0,), (2**32,)),
        ((5, 1), (5 + 2**32, 1)),
        ((1, 2), (2, 1)),
        ((1, 2), (12,)),
        ((1, 0), (1,)),
        ((0, 1), (1, 0)),
        ((0, 'a'), (0, 'b')),
    ],
)
def test_seeds_of_different_keys_differ_in_every_generator(a, b):
    assert all(x != y for x, y in zip(draws(*a), draws(*b), strict=True))


def test_seeds_of_near_keys_give_independent_numbers():
    """They are as independent over (seed, step) as in one stream."""
    u = np.array([draws(seed, step) for seed in range(10) for step in range(100)])
    assert np.abs(u.mean(0) - 0.5).max() < 0.04 and np.abs(u.std(0) - 12**-0.5).max() < 0.02
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.1


@pytest.mark.parametrize('key', [(0,), (3, 'batch', 17, 5)])
def test_seeds_match_torch_manual_seed(key):
    """So a run's numbers do not depend on the way in which its generators are seeded."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), 'little')
    torch.manual_seed(seed)
    expected = torch.randn(8), torch.initial_seed()
    seed_everything(*key)
    assert torch.equal(torch.randn(8), expected[0]) and torch.initial_seed() == expected[1]


def test_seeding_leaves_nothing_to_do_for_devices_that_are_not_there(monkeypatch):
    """torch.manual_seed formats a stack trace for each of them, in case the device starts later."""
    seed_everything(0)
    monkeypatch.setattr('traceback.format_stack', lambda *args: pytest.fail('a stack trace was formatted'))
    seed_everything(0)


def test_accelerators_are_seeded(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda **kwargs: torch.device('cuda'))
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seen.append)
    utils._seed_accelerator.cache_clear()
    seed_everything(7)
    utils._seed_accelerator.cache_clear()
    assert seen == [torch.initial_seed()]


@pytest.mark.parametrize(
    ('name', 'without'),
    [
        ('step_0000100_adams_ema', 'adams_ema'), ('ink_step_0000100_adams', 'ink_adams'),
        ('my_step_3_x', 'my_step_3_x'), ('step_x', 'step_x'),
    ],
)  # fmt: skip
def test_only_the_step_of_a_picture_is_left_out_of_a_name(name, without):
    assert utils.without_step(name) == without


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('step_0001200_adams_ema_0.98', 'step 1,200, adams, averaged weights (EMA 0.98)'),
        ('ink_step_0000007_adams_raw', 'ink, step 7, adams, raw weights'),
        ('sde_dpmpp_2m_raw_mine_step_7', 'sde_dpmpp_2m, raw weights, mine, step 7'),
        ('adams_ema_1e-05_step_0', 'adams, averaged weights (EMA 1e-05), step 0'),
        ('path_step_7', 'path, step 7'), ('raw_ink', 'raw_ink'),
    ],
)  # fmt: skip
def test_captions_of_pictures(name, text):
    assert utils.caption(name) == text
