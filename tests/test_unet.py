import math

import pytest
import torch

from unet import Attention, ResBlock, UNet, group_norm, sinusoid

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 17, 23), (3, 32, 32), (2, 1, 5)]
each_shape = pytest.mark.parametrize('shape', SHAPES)


def build(shape=(1, 8, 8), num_classes=10, randomise=True, **settings):
    """A small UNet; `randomise` fills the weights that start at zero too."""
    torch.manual_seed(0)
    net = UNet(
        shape,
        num_classes,
        **(dict(channels=8, channel_mults=(1, 2, 2), num_res_blocks=1, attention_resolutions=()) | settings),
    )
    if randomise:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return net


def batch(shape=(1, 8, 8), n=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=generator), torch.linspace(50, 950, n), torch.arange(n)


@each_shape
def test_output_has_the_input_shape_and_is_zero_at_first(shape):
    xt, time, label = batch(shape)
    assert torch.equal(build(shape, randomise=False)(xt, time, label), torch.zeros_like(xt))
    out = build(shape)(xt, time, label)
    assert out.shape == xt.shape and (out.flatten(1) != 0).any(1).all()


@each_shape
def test_odd_sides_repeat_the_last_pixels(shape):
    """As if the image had been padded to multiples of 4 on the right and below, and the output cut."""
    net, (xt, time, label) = build(shape).eval(), batch(shape)
    h, w = shape[1:]
    rows, columns = (torch.arange(-(-side // 4) * 4).clamp(max=side - 1) for side in (h, w))
    padded = net(xt[:, :, rows][:, :, :, columns], time, label)
    torch.testing.assert_close(net(xt, time, label), padded[:, :, :h, :w], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('attention_resolutions', [(), (4,), (8, 2)])
def test_gradients_reach_every_parameter(attention_resolutions):
    """No parameter is unused, so DDP need not search for one. Once the layers at zero have moved, no gradient is 0."""
    net = build(randomise=False, attention_resolutions=attention_resolutions)
    xt, time, label = batch()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (net(xt, time, label) - torch.randn_like(xt)).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []


def test_images_of_a_batch_do_not_mix():
    net = build((3, 17, 23), attention_resolutions=(12,)).eval()
    xt, time, label = batch((3, 17, 23))
    one_by_one = torch.cat([net(xt[i : i + 1], time[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(net(xt, time, label), one_by_one, rtol=1e-4, atol=1e-5)


def test_time_and_label_matter():
    net = build()
    xt, time, label = batch()
    out = net(xt, time, label)
    for other in (net(xt, time + 200, label), net(xt, time, label + 1)):
        assert ((out - other).flatten(1).norm(dim=1) > 0.01 * out.flatten(1).norm(dim=1)).all()


def test_no_label_is_the_null_class():
    net = build(num_classes=10)
    xt, time, label = batch()
    assert torch.equal(net(xt, time), net(xt, time, torch.full((4,), 10)))
    assert not torch.allclose(net(xt, time), net(xt, time, label))


def test_data_without_classes_have_only_the_null_class():
    net = build(num_classes=0)
    xt, time, _ = batch()
    assert torch.equal(net(xt, time), net(xt, time, torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ('shape', 'sides'), [((1, 28, 28), '28, 14, 7'), ((3, 17, 23), '23, 12, 6'), ((3, 32, 16), '32, 16, 8')]
)
def test_attention_at_no_level_is_an_error_that_names_the_levels(shape, sides):
    with pytest.raises(ValueError, match=sides):
        build(shape, attention_resolutions=(5,))
    build(shape, attention_resolutions=tuple(map(int, sides.split(', '))))


def test_attention_is_at_the_requested_levels():
    def sides(net):
        seen = []
        for module in net.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
        net(*batch((1, 28, 28)))
        return set(seen)

    assert sides(build((1, 28, 28), attention_resolutions=(14,))) == {7, 14}  # the middle, at 7, always has it
    assert sides(build((1, 28, 28), attention_resolutions=(7, 28))) == {7, 28}
    assert sides(build((1, 28, 28))) == {7}


def test_dropout_acts_only_in_training():
    net = build(dropout=0.5)
    assert not torch.equal(net(*batch()), net(*batch()))
    net.eval()
    assert torch.equal(net(*batch()), net(*batch()))


@pytest.mark.parametrize('channels', [8, 96, 128, 100])
def test_attention_against_a_plain_softmax(channels):
    torch.manual_seed(0)
    attention = Attention(channels)
    torch.nn.init.normal_(attention.out.weight, std=0.1)
    x = torch.randn(2, channels, 3, 5)
    d = channels // attention.heads
    assert d * attention.heads == channels and d <= 64
    normed = attention.norm(x).flatten(2)
    q, k, v = (attention.qkv.weight @ normed + attention.qkv.bias[:, None]).chunk(3, 1)  # (B, C, HW)
    y = torch.empty_like(q)
    for head in range(attention.heads):
        part = slice(head * d, (head + 1) * d)
        weights = torch.softmax(q[:, part].transpose(1, 2) @ k[:, part] / math.sqrt(d), dim=2)
        y[:, part] = v[:, part] @ weights.transpose(1, 2)
    y = attention.out.weight @ y + attention.out.bias[:, None]
    torch.testing.assert_close(attention(x), x + y.reshape(x.shape), rtol=1e-4, atol=1e-5)
    channels_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(attention(channels_last), attention(x))


def test_blocks_start_as_the_identity():
    torch.manual_seed(0)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    assert torch.equal(ResBlock(8, 8, 32, 0.0)(x, emb), x)
    assert torch.equal(Attention(8)(x), x)


@pytest.mark.parametrize('channels', [1, 6, 8, 30, 32, 100, 128, 256, 384])
def test_group_norm_groups(channels):
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0 and norm.num_groups <= 32
    assert norm.num_groups == 1 or channels // norm.num_groups >= 4
    x = norm(torch.randn(2, channels, 16, 16)).reshape(2, norm.num_groups, -1)
    torch.testing.assert_close(x.var(2, correction=0), torch.ones(2, norm.num_groups), rtol=1e-3, atol=1e-3)


def test_sinusoid_by_hand():
    out = sinusoid(torch.tensor([0.0, 3.0, 700.0]), 8)
    for row, time in zip(out.tolist(), (0.0, 3.0, 700.0), strict=True):
        angles = [time / 10_000 ** (k / 4) for k in range(4)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-4)
