import pytest
import torch

from config import PRESETS, Config, SettingError
from data_utils import DATASETS
from networks import NETWORKS, TIME_INPUTS, ScaledNetwork, get_network
from processes import PROCESSES, get_process
from unet import sinusoid
from utils import frozen, jvp

each_network = pytest.mark.parametrize('network', NETWORKS)
each_process = pytest.mark.parametrize('process_name', PROCESSES)
each_time_input = pytest.mark.parametrize('time_input', TIME_INPUTS)
SHAPE = (1, 8, 8)
RESAMPLING = torch.nn.Conv2d, torch.nn.Sequential  # between the levels of a UNet
SMALL = dict(channels=8, num_res_blocks=1, dit_depth=2, dit_width=32, dit_heads=2)


def build(randomise=True, cond=None, **settings):
    torch.manual_seed(0)
    net = get_network(Config(**(SMALL | settings)), SHAPE, 10, cond).eval()
    if randomise:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return net


def batch(n=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *SHAPE, generator=generator), torch.linspace(0.1, 0.9, n), torch.arange(n)


@each_network
def test_first_output_is_zero(network):
    xt, t, label = batch()
    assert torch.equal(build(network=network, randomise=False)(xt, t, label), torch.zeros_like(xt))


def gradients(net, differentiate):
    """Gradients of the mean square of the output, or of its derivative in t; and the bytes kept for them."""
    (xt, t, label), sizes = batch(), []
    torch.manual_seed(3)
    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        out = jvp(lambda t: net(xt, t, label), (t,), (torch.ones(4),))[1] if differentiate else net(xt, t, label)
        loss = out.square().mean()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None], sum(sizes)


@pytest.mark.parametrize('differentiate', [False, True])
@each_network
def test_checkpointing_changes_no_gradient_and_keeps_less(network, differentiate):
    """With dropout: the blocks see the same random numbers again. In forward mode it has no effect."""
    (plain, much), (again, little) = (
        gradients(build(network=network, dropout=0.5, checkpointing=on).train(), differentiate) for on in (False, True)
    )
    assert len(plain) == len(again) > 10 and all(map(torch.equal, plain, again))
    assert little == much if differentiate else little < 0.6 * much


@each_network
def test_checkpointing_inside_other_derivatives(network):
    """Gradients by the input through `frozen` weights, and by torch.func, equal those without checkpointing."""
    xt, t, label = batch()
    found = []
    for on in (False, True):
        net = build(network=network, checkpointing=on)
        x = xt.clone().requires_grad_()
        frozen(net)(x, t, label).square().mean().backward()
        found.append((x.grad, torch.func.grad(lambda x, net=net: net(x, t, label).square().mean())(xt)))
        assert net.net.checkpointing is on and all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(*found[0])


@each_network
def test_checkpointing_computes_every_block_again(network):
    net, counts = build(network=network, checkpointing=True).train(), {}

    def count(block, inputs):
        counts[block] = counts.get(block, 0) + 1

    lists = [m for m in net.modules() if isinstance(m, torch.nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks if not isinstance(block, RESAMPLING)]
    for block in blocks:
        block.register_forward_pre_hook(count)
    net(*batch()).square().mean().backward()
    assert blocks and counts == dict.fromkeys(blocks, 2)


def test_checkpointing_of_a_network_without_blocks_is_refused(monkeypatch):
    monkeypatch.setitem(NETWORKS, 'mine', lambda config, shape, num_classes: torch.nn.Identity())
    with pytest.raises(SettingError, match=r"checkpointing=True: network='mine' has no blocks. Use --no_checkpointing"):
        get_network(Config(network='mine', checkpointing=True), SHAPE, 10)


@each_network
def test_gradients_reach_every_parameter(network):
    net = build(network=network, randomise=False)
    xt, t, label = batch()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (net(xt, t, label) - torch.randn_like(xt)).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []


@each_network
@each_process
@each_time_input
def test_time_and_label_matter(network, process_name, time_input):
    net = build(network=network, process_name=process_name, time_input=time_input)
    xt, _, label = batch()
    at = {time: net(xt, torch.full((4,), time), label) for time in (0.4, 0.6)}
    other_label = net(xt, torch.full((4,), 0.4), label + 1)
    for other in (at[0.6], other_label):
        assert ((at[0.4] - other).flatten(1).norm(dim=1) > 0.01 * other.flatten(1).norm(dim=1)).all()


@each_network
def test_no_label_is_the_null_class(network):
    net = build(network=network)
    xt, t, label = batch()
    torch.testing.assert_close(net(xt, t), net(xt, t, torch.full((4,), 10)))
    assert not torch.allclose(net(xt, t), net(xt, t, label))


@each_network
def test_images_of_a_batch_do_not_mix(network):
    net = build(network=network)
    xt, t, label = batch()
    one_by_one = torch.cat([net(xt[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(net(xt, t, label), one_by_one, rtol=1e-4, atol=1e-5)


@each_network
def test_weights_are_a_function_of_the_seed(network):
    first, second = (list(build(network=network, randomise=False).parameters()) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---------------------------------------------------------------- conditions

COND = {'ink': (), 's': (), 'text': (6,), 'low': (2, 4, 4), 'type': (3,)}  # `type` is a method of every module


def conditions(n=4, **changes):
    generator = torch.Generator().manual_seed(2)
    values = {name: torch.rand(n, *shape, generator=generator) for name, shape in COND.items()}
    return {name: value for name, value in (values | changes).items() if value is not None}


@each_network
@pytest.mark.parametrize('name', COND)
def test_every_condition_matters_and_images_of_a_batch_do_not_mix(network, name):
    net = build(network=network, cond=COND)
    inputs, cond = batch(), conditions()
    out = net(*inputs, **cond)
    others = (net(*inputs, **conditions(**{name: cond[name].flip(0)})), net(*inputs, **conditions(**{name: None})))
    for other in others:
        assert ((out - other).flatten(1).norm(dim=1) > 1e-3 * out.flatten(1).norm(dim=1)).all()
    one_by_one = [net(*(x[i : i + 1] for x in inputs), **{n: v[i : i + 1] for n, v in cond.items()}) for i in range(4)]
    torch.testing.assert_close(out, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


@each_network
def test_gradients_reach_every_parameter_of_conditions(network):
    net = build(network=network, randomise=False, cond=COND)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (net(*batch(), **conditions()) - torch.randn(4, *SHAPE)).square().mean().backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_network
def test_numbers_and_vectors_start_neutral(network):
    """Their last layers are zero: the effect of a new condition is learned, and at first it disturbs nothing."""
    net = build(network=network, randomise=False, cond=COND)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if 'conditions' not in name:
                p.add_(0.05 * torch.randn_like(p))
    low = conditions()['low'] if network == 'unet' else None  # channels of an image go into the first convolution
    few = {} if low is None else {'low': low}
    assert torch.equal(net(*batch(), **conditions(low=low)), net(*batch(), **few))
    with torch.no_grad():
        for p in net.net.conditions.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert not torch.allclose(net(*batch(), **conditions(low=low)), net(*batch(), **few))


@each_network
def test_the_names_that_checkpoints_hold(network):
    """Parts that networks share keep their names; MLPs of conditions come first, or last in the residual MLP."""
    names = [name for name, _ in build(network=network, randomise=False, cond={'ink': ()}).named_parameters()]
    layers = '0.weight 0.bias 2.weight 2.bias'.split()
    assert {'net.class_embedding.weight', *(f'net.time_mlp.{layer}' for layer in layers)} <= set(names)
    own = [f'net.conditions.mlps.mlp_ink.{layer}' for layer in layers]
    assert own == (names[-4:] if network == 'mlp' else names[:4])


def test_conditions_without_any_are_the_same_network():
    """With the same seed, the weights of a run without conditions are as they were before conditions existed."""
    plain, told = build(cond={}), build(cond=None)
    assert plain.state_dict().keys() == told.state_dict().keys()
    assert all(map(torch.equal, plain.state_dict().values(), told.state_dict().values()))


@each_network
def test_a_condition_that_is_left_out_equals_none(network):
    net = build(network=network, cond=COND)
    assert torch.equal(net(*batch()), net(*batch(), **dict.fromkeys(COND)))


def test_an_absent_image_is_zeros():
    net = build(cond=COND)
    black = conditions(low=torch.zeros(4, 2, 8, 8))
    assert torch.equal(net(*batch(), **conditions(low=None)), net(*batch(), **black))


def test_images_are_resized_to_the_sides_of_xt():
    net = build(cond=COND)
    low = conditions()['low']
    large = torch.nn.functional.interpolate(low, size=(8, 8), mode='bilinear')
    assert torch.equal(net(*batch(), **conditions(low=low)), net(*batch(), **conditions(low=large)))


@each_network
def test_whole_numbers_are_numbers(network):
    net = build(network=network, cond=COND)
    whole = torch.tensor([0, 1, 2, 3])
    expected = net(*batch(), **conditions(ink=whole.float()))
    assert torch.equal(net(*batch(), **conditions(ink=whole)), expected)


@each_network
def test_the_network_distinguishes_close_numbers(network):
    """A number is multiplied by 1000, as the time is: slow waves could not distinguish 0.40 from 0.42."""
    net = build(network=network, cond=COND).net.conditions
    near = net.embed({'s': torch.tensor([0.40, 0.42])})
    assert (near[0] - near[1]).norm() > 0.1 * near[0].norm()


@each_network
def test_an_unknown_condition_is_an_error_that_lists_the_known(network):
    with pytest.raises(TypeError, match=r'condition colour.*ink, s, text, low, type'):
        build(network=network, cond=COND)(*batch(), **conditions(colour=torch.zeros(4)))
    with pytest.raises(TypeError, match=r'condition ink.*none'):
        build(network=network)(*batch(), ink=torch.zeros(4))


@each_network
@pytest.mark.parametrize(
    ('name', 'shape', 'wanted'),
    [
        ('ink', (4, 1), r'\(B\)'),
        ('text', (4, 5), r'\(B, 6\)'),
        ('low', (4, 3, 4, 4), r'\(B, 2, 4, 4\)'),
        ('low', (4, 2, 4), r'\(B, 2, 4, 4\)'),
    ],
)
def test_a_condition_of_another_shape_is_an_error_that_names_it(network, name, shape, wanted):
    with pytest.raises(ValueError, match=f"'{name}'.*{', '.join(map(str, shape))}.*{wanted}"):
        build(network=network, cond=COND)(*batch(), **conditions(**{name: torch.zeros(shape)}))


def test_what_a_unet_cannot_take_is_a_setting_error():
    with pytest.raises(SettingError, match=r"'pair' has shape \(2, 3\).*vector"):
        build(cond={'pair': (2, 3)})
    with pytest.raises(SettingError, match=r"network='unet'.*\(2,\).*--network mlp"):
        get_network(Config(), (2,), 0)
    with pytest.raises(ValueError, match=r'\(4, 2\).*\(B, 1, H, W\)'):
        build()(torch.zeros(4, 2), torch.rand(4))


@each_network
@pytest.mark.parametrize('name', ['xt', 't', 'time', 'label'])
def test_a_condition_with_the_name_of_an_argument_is_a_setting_error(network, name):
    with pytest.raises(SettingError, match=f"condition '{name}'.*another name"):
        build(network=network, cond={name: ()})


def test_a_builder_gets_conditions_only_if_there_are_any(monkeypatch):
    given = []
    monkeypatch.setitem(NETWORKS, 'three', lambda config, shape, num_classes: Record())
    monkeypatch.setitem(NETWORKS, 'four', lambda config, shape, num_classes, cond=None: given.append(cond) or Record())
    monkeypatch.setitem(NETWORKS, 'any', lambda config, shape, num_classes, **more: given.append(more) or Record())
    for name in ('three', 'four', 'any'):
        build(network=name)
    build(network='four', cond={'ink': ()})
    build(network='any', cond={'ink': ()})
    assert given == [None, {}, {'ink': ()}, {'cond': {'ink': ()}}]
    with pytest.raises(SettingError, match=r"network='three' takes no conditions.*ink.*cond=None"):
        build(network='three', cond={'ink': ()})


def test_the_scaling_hands_conditions_on_unchanged():
    record, ink = Record(), torch.rand(2)
    ScaledNetwork(record, get_process(Config()), 't')(torch.zeros(2, 3), torch.rand(2), None, ink=ink)
    assert record.cond.keys() == {'ink'} and record.cond['ink'] is ink


# ---------------------------------------------------------------- scaling


class Record(torch.nn.Module):
    def forward(self, x, time, label, **cond):
        self.x, self.time, self.label, self.cond = x, time, label, cond
        return x


@each_process
@pytest.mark.parametrize('sigma_data', [0.5, 2.0])
def test_input_has_unit_variance(process_name, sigma_data):
    torch.manual_seed(0)
    process, record = get_process(Config(process_name=process_name, sigma_data=sigma_data)), Record()
    t = torch.tensor([0.001, 0.2, 0.5, 0.8, 0.999])
    x0, x1 = sigma_data * torch.randn(5, 3, 100, 100), torch.randn(5, 3, 100, 100)
    label = torch.arange(5)
    ScaledNetwork(record, process, 't')(process.compute_xt(x0, x1, process(t)), t, label)
    torch.testing.assert_close(record.x.flatten(1).var(1), torch.ones(5), rtol=0.03, atol=0)
    assert record.label is label


@each_process
@each_time_input
def test_time_input_tells_times_apart(process_name, time_input):
    """It rises by hundreds over the range, and the sinusoids of 0.4 and 0.6 are far apart."""
    process = get_process(Config(process_name=process_name))
    t = torch.tensor([0.001, 0.2, 0.4, 0.6, 0.8, 0.999])
    time = TIME_INPUTS[time_input](t, process)
    assert (time.diff() > 0).all() and 100 < time[-1] - time[0] < 3000
    low, high = sinusoid(time[2:4], 32)
    assert (low - high).norm() > 0.3 * low.norm()


@each_time_input
def test_time_input_is_what_the_network_sees(time_input):
    process, record = get_process(Config()), Record()
    t = torch.tensor([0.25, 0.5])
    ScaledNetwork(record, process, time_input)(torch.zeros(2, 1, 1, 1), t)
    expected = {'t': [250.0, 500.0], 'log_snr': [-25 * 2 * torch.tensor(3.0).log().item(), 0.0]}
    if time_input in expected:
        assert record.time.tolist() == pytest.approx(expected[time_input], abs=1e-4)
    assert record.label is None


def test_log_snr_input_needs_finite_ends():
    for ends in (dict(t_min=0.0), dict(t_max=1.0), dict(t_max=1 - 1e-9)):  # 1 in float32, as the network sees it
        with pytest.raises(SettingError, match='time_input'):
            build(time_input='log_snr', **ends)
    build(time_input='log_snr', process_name='ve', t_min=0.0, t_max=1.0)


@pytest.mark.parametrize(('preset', 'low', 'high'), [('cifar10', 30e6, 40e6), ('digits', 0.3e6, 0.6e6)])
def test_number_of_parameters(preset, low, high):
    config = Config(**PRESETS[preset])
    spec = DATASETS[config.dataset]
    with torch.device('meta'):
        net = get_network(config, spec.shape, spec.num_classes)
    assert low < sum(p.numel() for p in net.parameters()) < high


@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_fits_its_data(preset):
    config = Config(**PRESETS[preset])
    spec = DATASETS[config.dataset]
    shape = spec.shape or (3, *2 * config.image_size)
    with torch.device('meta'):
        net = get_network(config, shape, spec.num_classes)
        out = net(torch.randn(2, *shape), torch.rand(2), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, *shape)


def test_attention_at_no_level_is_a_setting_error():
    with pytest.raises(SettingError, match=r'attention_resolutions=\(16,\).*8, 4.*--attention_resolutions'):
        build(attention_resolutions=(16,))


@pytest.mark.parametrize('setting', ['network', 'time_input'])
def test_unknown_choice_lists_the_choices(setting):
    table = {'network': NETWORKS, 'time_input': TIME_INPUTS}[setting]
    with pytest.raises(SettingError, match=f'Choose one of: {", ".join(table)}'):
        build(**{setting: 'nonsense'})
