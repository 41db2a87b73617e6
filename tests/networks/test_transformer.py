"""The DiT against independent formulas: attention in complex numbers, positions, sizes of the papers, derivatives."""

import math

import pytest
import torch

import utils
from config import Config, SettingError
from networks import get_network
from networks.transformer import DIT_SIZES, Attention, DiT, SwiGLU, angles, rms_norm, turn

F64 = torch.float64
CPU = torch.device('cpu')


def build(shape=(1, 8, 8), num_classes=10, randomise=True, **settings):
    torch.manual_seed(0)
    net = DiT(shape, num_classes, **(dict(depth=2, width=32, heads=2) | settings))
    if randomise:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def batch(shape=(1, 8, 8), n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=generator), torch.linspace(50, 950, n), torch.arange(n)


@pytest.mark.parametrize(('size', 'millions'), [('S', 33), ('B', 130), ('L', 458), ('XL', 675)])
def test_sizes_have_the_parameters_of_the_paper(size, millions):
    """Peebles and Xie 2023, table 4, for patches of 2 of latents (4, 32, 32) and 1000 classes."""
    with torch.device('meta'):
        net = DiT((4, 32, 32), 1000, *DIT_SIZES[size])
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize('patch', [1, 2, 3, 4])
@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 17, 23), (2, 1, 5)])
def test_any_image_and_patch(shape, patch):
    """The output is 0 at first; then every pixel counts; padding repeats the last pixels."""
    xt, time, label = batch(shape)
    assert torch.equal(build(shape, randomise=False, patch=patch)(xt, time, label), torch.zeros_like(xt))
    net = build(shape, patch=patch)
    out = net(xt, time, label)
    assert out.shape == xt.shape and (out != 0).all()
    rows, columns = (torch.arange(-(-side // patch) * patch).clamp(max=side - 1) for side in shape[1:])
    padded = net(xt[:, :, rows][:, :, :, columns], time, label)
    torch.testing.assert_close(out, padded[:, :, : shape[1], : shape[2]])


def test_a_patch_comes_back_where_it_was():
    """In a network without blocks, a patch of the output depends only on the same patch of the input."""
    net = build((2, 6, 8), depth=1)
    net.blocks[0].modulation.weight.data.zero_()
    net.blocks[0].modulation.bias.data.zero_()
    xt, time, label = batch((2, 6, 8), 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, time, label), xt)[
        0, :, :, :, 0
    ]  # (2, 6, 8, 2, 6, 8)
    moved = jacobian.abs().sum((0, 3)) > 0  # (6, 8, 6, 8)
    patch = torch.arange(6)[:, None] // 2 * 4 + torch.arange(8) // 2
    assert torch.equal(moved, patch[:, :, None, None] == patch)


def test_attention_against_complex_numbers():
    torch.manual_seed(0)
    attention = Attention(width=16, heads=2).double()
    attention.q_scale.data.uniform_(0.5, 2)
    x, angle = torch.randn(2, 6, 16, dtype=F64), angles((2, 3), 4, CPU)
    q, k, v = (y.reshape(2, 6, 2, 8).transpose(1, 2) for y in attention.qkv(x).split(16, 2))  # (B, heads, N, 8)
    q = q / q.square().mean(-1, keepdim=True).add(1e-6).sqrt() * attention.q_scale
    k = k / k.square().mean(-1, keepdim=True).add(1e-6).sqrt() * attention.k_scale
    q, k = (torch.complex(y[..., :4], y[..., 4:]) * torch.exp(1j * angle.double()) for y in (q, k))
    weights = ((q[..., :, None, :] * k[..., None, :, :].conj()).real.sum(-1) / math.sqrt(8)).softmax(-1)
    expected = attention.out((weights @ v).transpose(1, 2).reshape(2, 6, 16))
    torch.testing.assert_close(attention(x, angle), expected, rtol=1e-5, atol=1e-6)


def test_products_of_rotated_vectors_depend_only_on_the_distance_of_places():
    q, k = torch.randn(2, 1, 8, dtype=F64)
    angle = angles((5, 7), 4, CPU).double()  # indices (row, column)
    products = (turn(q, angle) @ turn(k, angle).T).reshape(5, 7, 5, 7)
    torch.testing.assert_close(products[:4, :6, :4, :6], products[1:, 1:, 1:, 1:])
    assert (products[0, 0, 0, 1] - products[0, 0, 1, 0]).abs() > 1e-3  # rows and columns are different directions
    torch.testing.assert_close(turn(q, angle).norm(dim=1), q.norm().expand(35))


def test_angles_by_hand():
    frequencies = torch.tensor([1, 10_000**-0.5, 1e-4])
    expected = torch.cat([3 * frequencies, 5 * frequencies])
    torch.testing.assert_close(angles((4, 6), 6, CPU)[3 * 6 + 5], expected)
    torch.testing.assert_close(angles((6,), 3, CPU), torch.arange(6.0)[:, None] * frequencies)
    expected = torch.cat([1 * frequencies, 3 * frequencies, 5 * frequencies[[0, 2]]])  # 8 dimensions: 3, 3 and 2
    torch.testing.assert_close(angles((2, 4, 6), 8, CPU)[1 * 24 + 3 * 6 + 5], expected)


def test_rms_norm_and_swiglu_by_hand():
    x = torch.randn(3, 12, dtype=F64)
    torch.testing.assert_close(rms_norm(x), x / x.square().mean(1, keepdim=True).add(1e-6).sqrt())
    mlp = SwiGLU(12, 0.0).double()
    u, v = mlp.gate_and_value(x)[:, :32], mlp.gate_and_value(x)[:, 32:]
    torch.testing.assert_close(mlp(x), mlp.out(u / (1 + (-u).exp()) * v))
    assert sum(p.numel() for p in SwiGLU(384, 0.0).parameters()) == pytest.approx(8 * 384**2, rel=0.01)


def test_the_network_distinguishes_places():
    """With the same patch everywhere, only the sinusoids of the places make outputs differ."""
    net = build()
    out = net(torch.ones(1, 1, 8, 8), torch.tensor([500.0]), torch.tensor([1])).unfold(2, 2, 2).unfold(3, 2, 2)
    patches = out.reshape(16, 4)
    assert torch.cdist(patches, patches).fill_diagonal_(1).min() > 1e-4


def test_it_takes_images_of_other_sizes_than_it_was_built_for():
    assert build((1, 8, 8))(*batch((1, 12, 20))).shape == (3, 1, 12, 20)


def test_large_patches_go_through_a_bottleneck():
    def first(shape, patch):
        return [tuple(p.shape) for p in build(shape, patch=patch).patchify.parameters()]

    assert first((3, 32, 32), 16) == [(128, 3, 16, 16), (32, 128, 1, 1), (32,)]
    assert first((2, 32, 32), 8) == [(32, 2, 8, 8), (32,)]  # 128 values


def test_forward_mode_equals_reverse_mode():
    """Along a direction of xt and time, w (J v) = (w J) v; a loss may contain it, as for flow maps."""
    net, (xt, time, label) = build(), batch()
    xt.requires_grad_(), time.requires_grad_()
    along = torch.randn_like(xt), torch.ones_like(time)
    out, tangent = utils.jvp(lambda x, t: net(x, t, label), (xt.detach(), time.detach()), along)
    plain, weight = net(xt, time, label), torch.randn_like(xt)
    torch.testing.assert_close(out, plain)
    back = torch.autograd.grad((weight * plain).sum(), (xt, time))
    expected = sum((g * v).sum() for g, v in zip(back, along, strict=True))
    torch.testing.assert_close((weight * tangent).sum(), expected, rtol=1e-4, atol=1e-4)
    tangent.square().mean().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name != 'head.bias')


@pytest.mark.parametrize(
    ('settings', 'shape', 'said'),
    [
        (
            dict(dit_width=36, dit_heads=2),
            (1, 8, 8),
            'dit_width=36, dit_heads=2: the width must be a multiple of 4 x heads.*--dit_heads 1, 3, 9',
        ),
        (dict(dit_depth=1), (2,), r'a DiT is for images \(C, H, W\).*\(2,\).*--network mlp'),
        (dict(dit_size='M'), (1, 8, 8), "dit_size='M'.*Choose one of: S, B, L, XL"),
    ],
)
def test_impossible_settings_are_setting_errors(settings, shape, said):
    with pytest.raises(SettingError, match=said):
        get_network(Config(network='dit', **settings), shape, 10)


def test_settings_that_are_0_follow_the_size():
    net = get_network(Config(network='dit', dit_size='B', dit_depth=1), (1, 8, 8), 10).net
    assert (len(net.blocks), net.head.in_features, net.blocks[0].attention.heads) == (1, 768, 12)
    net = get_network(Config(network='dit', dit_depth=2, dit_width=40, dit_heads=5, dit_patch=4), (1, 8, 8), 10).net
    assert (len(net.blocks), net.head.in_features, net.blocks[0].attention.heads, net.patch) == (2, 40, 5, 4)
