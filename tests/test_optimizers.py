import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from config import Config, SettingError
from networks import NETWORKS, get_network
from optimizers import (
    LR_SCHEDULES,
    Muon,
    clip_gradients,
    get_lr,
    get_optimizer,
    orthogonal,
    set_lr,
    step_if,
    trained_parameters,
)
from optimizers import OPTIMIZERS as BY_NAME

each_schedule = pytest.mark.parametrize('schedule', LR_SCHEDULES)


@pytest.mark.parametrize('network', NETWORKS)
def test_only_matrices_and_kernels_are_decayed(network):
    config = Config(
        optimizer='adamw', network=network, channels=8, dit_depth=1, dit_width=32, dit_heads=1, weight_decay=0.3
    )
    net = get_network(config, (1, 8, 8), 10)
    groups = get_optimizer(config, net).param_groups
    decay_of = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert sum(len(group['params']) for group in groups) == len(decay_of) == len(list(net.parameters()))
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if name == 'bias' or 'Norm' in type(module).__name__:
                assert decay_of[id(p)] == 0
            elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                assert decay_of[id(p)] == 0.3


@pytest.mark.parametrize('name', BY_NAME)
def test_each_optimizer_gets_what_it_knows_and_learns(name):
    """A least-squares problem. Momentum is the first of adam_betas; optimizers without betas keep their epsilon."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 2), torch.randn(64, 4)
    y = x @ torch.randn(4, 2)
    config = Config(optimizer=name, base_lr=0.05, adam_betas=(0.7, 0.8), adam_eps=1e-5, weight_decay=0.25)
    optimizer = get_optimizer(config, net)
    weights, biases = optimizer.param_groups
    expected = dict(betas=(0.7, 0.8), momentum=0.7, lr=0.05, decoupled_weight_decay=True)
    expected |= dict(eps=1e-5) if 'betas' in weights else {}
    for setting in expected.keys() & weights.keys():
        assert weights[setting] == biases[setting] == expected[setting]
    assert 'betas' in weights or weights.get('eps') != 1e-5
    assert (weights['weight_decay'], biases['weight_decay']) == (0.25, 0.0)
    losses = []
    for _ in range(30):
        losses.append((net(x) - y).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        step_if(torch.tensor(True), optimizer)
    assert losses[-1] < (0.995 if name in ('adadelta', 'adafactor', 'adagrad', 'asgd') else 0.9) * losses[0]


def test_a_class_of_your_own_is_an_optimizer():
    """With Adam's arguments by name, with any, or with none of them."""

    class Named(torch.optim.SGD):
        def __init__(self, params, lr, betas, eps, fused):
            super().__init__(params, lr)
            self.given = dict(betas=betas, eps=eps, fused=fused)

    class All(torch.optim.SGD):
        def __init__(self, params, lr, **given):
            super().__init__(params, lr)
            self.given = given

    adams = dict(betas=(0.9, 0.99), eps=0.25, fused=True)
    for kind, expected in ((Named, adams), (All, adams), (torch.optim.SGD, None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BY_NAME, 'mine', kind)
            optimizer = get_optimizer(Config(optimizer='mine', adam_eps=0.25), nn.Linear(2, 2))
        assert getattr(optimizer, 'given', None) == expected
        assert optimizer.param_groups[0]['lr'] == Config().base_lr


def test_a_function_of_your_own_is_an_optimizer(monkeypatch):
    monkeypatch.setitem(BY_NAME, 'mine', lambda params, lr, betas, eps=0.5: torch.optim.Adam(params, lr, betas, eps))
    (group, _) = get_optimizer(Config(optimizer='mine', adam_eps=0.25), nn.Linear(2, 2)).param_groups
    assert (group['eps'], group['betas'], group['lr']) == (0.25, (0.9, 0.99), Config().base_lr)


def test_frozen_parameters_are_left_out():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    groups = get_optimizer(Config(), net).param_groups
    assert [p is net.weight for group in groups for p in group['params']] == [True]


def test_adamw_by_hand():
    """Two steps of algorithm 2 of Loshchilov and Hutter 2019, with the decay multiplied by the learning rate."""
    torch.manual_seed(0)
    lr, decay, (beta1, beta2), eps = 0.01, 0.3, (0.8, 0.95), 1e-3
    net = nn.Linear(3, 2).double()
    optimizer = get_optimizer(
        Config(optimizer='adamw', base_lr=lr, weight_decay=decay, adam_betas=(beta1, beta2), adam_eps=eps), net
    )
    gradients = torch.randn(2, 2, 4, dtype=torch.float64)
    theta = np.concatenate([net.weight.detach().numpy(), net.bias.detach().numpy()[:, None]], 1)
    decays = np.array([[decay] * 3 + [0.0]])
    m = v = np.zeros_like(theta)
    for step, g in enumerate(gradients.numpy(), 1):
        net.weight.grad, net.bias.grad = torch.tensor(g[:, :3]), torch.tensor(g[:, 3])
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        update = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + eps)
        theta = theta - lr * (update + decays * theta)
    np.testing.assert_allclose(net.weight.detach(), theta[:, :3], rtol=1e-10)
    np.testing.assert_allclose(net.bias.detach(), theta[:, 3], rtol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float64, torch.complex128])
@pytest.mark.parametrize('shape', [(4, 4), (3, 20), (20, 3), (1, 7)])
def test_orthogonal_changes_only_the_singular_values(shape, dtype):
    """They become five steps of the polynomial, here from a singular value decomposition in float64."""
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for matrix, result in zip(matrices, orthogonal(matrices), strict=True):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(result, u * s.to(dtype) @ v)
        assert s.min() > 0.6 and s.max() < 1.3


def test_muon_by_hand():
    """Two steps: a convolution kernel moves as a matrix, its bias and an embedding table as by AdamW."""
    torch.manual_seed(0)
    net = nn.ModuleDict(dict(conv=nn.Conv2d(3, 4, 2), table=nn.Embedding(5, 6))).double()
    settings = dict(base_lr=0.01, weight_decay=0.3)
    w, m = net['conv'].weight.detach().flatten(1).clone(), 0.0
    others = [net['conv'].bias.detach().clone(), net['table'].weight.detach().clone()]
    optimizer = get_optimizer(Config(optimizer='muon', **settings), net)
    adamw = torch.optim.AdamW(others, lr=0.01, betas=Config.adam_betas, eps=Config.adam_eps, weight_decay=0.0)
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        g = net['conv'].weight.grad.flatten(1).clone()
        for p, q in zip((net['conv'].bias, net['table'].weight), others, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
        m = 0.95 * m + 0.05 * g
        update = orthogonal((0.05 * g + 0.95 * m)[None])[0] * 0.2 * 12**0.5
        w = w - 0.01 * (update + 0.3 * w)
    torch.testing.assert_close(net['conv'].weight.flatten(1), w)
    torch.testing.assert_close([net['conv'].bias.detach(), net['table'].weight.detach()], others)


def test_muon_resumes_from_its_checkpoint():
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return net, get_optimizer(Config(optimizer='muon'), net)

    def steps(net, optimizer, first, last):
        for i in range(first, last):
            torch.manual_seed(i)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    whole, half, resumed = build(), build(), build()
    steps(*whole, 0, 6)
    steps(*half, 0, 3)
    for new, old in zip(resumed, half, strict=True):
        new.load_state_dict(old.state_dict())
    steps(*resumed, 3, 6)
    assert all(p.equal(q) for p, q in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))


def test_a_step_does_not_import_the_compiler():
    """Importing torch._dynamo would take a third of a run's time to start."""
    code = (
        'import sys, torch, optimizers, config\n'
        'net = torch.nn.Linear(2, 2)\n'
        'optimizer = optimizers.get_optimizer(config.Config(), net)\n'
        'net(torch.ones(2)).sum().backward(); optimizer.step(); optimizer.zero_grad()\n'
        'optimizer.load_state_dict(optimizer.state_dict()); optimizers.clip_gradients(list(net.parameters()), 1.0)\n'
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def rates(config, end=3000):
    return [get_lr(config, step) for step in range(end)]


@each_schedule
def test_warmup_is_linear(schedule):
    config = Config(lr_schedule_type=schedule, warmup_steps=40, num_training_steps=1000, base_lr=0.4)
    np.testing.assert_allclose(rates(config, 40), np.arange(1, 41) * 0.01)
    assert get_lr(config, 40) == pytest.approx(0.4, rel=0.05)


@each_schedule
@pytest.mark.parametrize('warmup_steps', [0, 1, 100])
@pytest.mark.parametrize('min_lr', [0.0, 0.1, 0.4])
def test_after_the_warmup_it_never_rises_nor_goes_below_the_floor(schedule, warmup_steps, min_lr):
    """This also holds after the end of training."""
    after = rates(
        Config(
            lr_schedule_type=schedule, warmup_steps=warmup_steps, num_training_steps=1000, base_lr=0.4, min_lr=min_lr
        )
    )[warmup_steps:]
    assert all(type(lr) is float for lr in after)
    assert (np.diff(after) <= 0).all()
    assert min(after) >= min_lr and max(after) <= 0.4


@each_schedule
def test_schedule_is_a_pure_function_of_the_step(schedule):
    config = Config(lr_schedule_type=schedule)
    forwards = [get_lr(config, step) for step in range(0, 2000, 50)]
    assert forwards == [get_lr(config, step) for step in reversed(range(0, 2000, 50))][::-1]


def test_closed_forms():
    settings = dict(warmup_steps=100, num_training_steps=1100, base_lr=0.4, min_lr=0.1)
    cosine = Config(lr_schedule_type='cosine', **settings)
    for step, lr in ((100, 0.4), (350, 0.25 + 0.15 * math.sqrt(0.5)), (600, 0.25), (1100, 0.1), (5000, 0.1)):
        assert get_lr(cosine, step) == pytest.approx(lr)
    inverse_sqrt = Config(lr_schedule_type='inverse_sqrt', **settings)
    for step, lr in ((100, 0.4 * math.sqrt(100 / 101)), (399, 0.2), (899, 0.4 / 3), (100_000, 0.1)):
        assert get_lr(inverse_sqrt, step) == pytest.approx(lr)
    assert get_lr(Config(lr_schedule_type='constant', **settings), 10**6) == 0.4
    linear, stable = (Config(lr_schedule_type=name, **settings) for name in ('linear', 'wsd'))
    for step, lr in ((100, 0.4), (350, 0.325), (600, 0.25), (1100, 0.1), (5000, 0.1)):
        assert get_lr(linear, step) == pytest.approx(lr)
    for step, lr in ((100, 0.4), (900, 0.4), (950, 0.325), (1000, 0.25), (1100, 0.1), (5000, 0.1)):
        assert get_lr(stable, step) == pytest.approx(lr)


@pytest.mark.parametrize('schedule', LR_SCHEDULES)
def test_without_a_warmup_the_first_step_has_the_whole_rate(schedule):
    config = Config(lr_schedule_type=schedule, warmup_steps=0, base_lr=0.4)
    assert get_lr(config, 0) == 0.4
    assert schedule != 'inverse_sqrt' or get_lr(config, 15) == pytest.approx(0.1)  # after 16 steps, 1 / sqrt(16)


def test_unknown_schedule_lists_the_choices():
    with pytest.raises(SettingError, match='constant, cosine, inverse_sqrt'):
        get_lr(Config(lr_schedule_type='straight'), 0)


def test_set_lr_reaches_every_group():
    net = nn.Linear(2, 2)
    config = Config(optimizer='adamw', weight_decay=0.0, base_lr=0.25, warmup_steps=2)
    optimizer = get_optimizer(config, net)
    assert set_lr([optimizer], config, 0) == 0.125
    before = net.weight.detach().clone(), net.bias.detach().clone()
    net.weight.grad, net.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()  # Adam's first step is lr times the gradient's sign
    torch.testing.assert_close(before[0] - net.weight, torch.full((2, 2), 0.125))
    torch.testing.assert_close(before[1] - net.bias, torch.full((2,), 0.125))


def test_set_lr_scales_groups_that_have_a_rate_of_their_own():
    """Two optimizers, and a group of its own rate in one of them, before and after a checkpoint."""
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    config = Config(base_lr=3e-4, warmup_steps=7, num_training_steps=100)

    def build():
        adam = torch.optim.AdamW([dict(params=[a]), dict(params=[b], lr=3e-3)], lr=config.base_lr)
        return adam, torch.optim.SGD([c], lr=0.5)

    optimizers = build()
    for step in (0, 3, 50, 99):
        if step == 50:
            saved = [optimizer.state_dict() for optimizer in optimizers]
            optimizers = build()
            for optimizer, state in zip(optimizers, saved, strict=True):
                optimizer.load_state_dict(state)
        lr = set_lr(optimizers, config, step)
        assert lr == get_lr(config, step)
        rates = [group['lr'] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates[0] == lr  # to the last bit
        assert rates[1:] == pytest.approx([10 * lr, 0.5 * lr / 3e-4])


# ---------------------------------------------------------------- bad steps

OPTIMIZERS = {
    'AdamW fused': lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    'AdamW foreach': lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    'AdamW': lambda p: torch.optim.AdamW(p, lr=0.1),
    'Adam fused amsgrad': lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True),
    'Adagrad fused': lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    'SGD': lambda p: torch.optim.SGD(p, lr=0.1),
    'SGD momentum': lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    'SGD momentum fused': lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    'RMSprop': lambda p: torch.optim.RMSprop(p, lr=0.1),
    'half fused': lambda p: torch.optim.AdamW([dict(params=p[:1], fused=True), dict(params=p[1:], fused=False)]),
}
OPTIMIZERS['our Muon'] = lambda p: Muon([dict(params=p[:1], orthogonal=True), dict(params=p[1:], orthogonal=False)])
if hasattr(torch.optim, 'Muon'):
    OPTIMIZERS['Muon'] = lambda p: torch.optim.Muon(p, lr=0.1)


@pytest.mark.parametrize('bad', [(0,), (2,), (0, 1, 3)])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_bad_step_changes_nothing(name, bad):
    """Good and bad steps together give, bit for bit, the weights of plain `step()` with only the good ones."""

    def parameters():
        g = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(4, 4, generator=g)) for _ in range(2)]

    ours, plain = parameters(), parameters()
    optimizer, reference = OPTIMIZERS[name](ours), OPTIMIZERS[name](plain)
    gradients = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for i, pair in enumerate(gradients):
        for p, q, gradient in zip(ours, plain, pair, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        before = [p.detach().clone() for p in ours]
        if i in bad:
            ours[i % 2].grad[0, 0] = torch.nan
        step_if(torch.tensor(i not in bad), optimizer)
        if i not in bad:
            reference.step()
        for p, q, old in zip(ours, plain, before, strict=True):
            assert p.isfinite().all() and torch.equal(p, q) and torch.equal(p, old) == (i in bad)


@pytest.mark.parametrize('bad', [(0,), (2,), (0, 1, 3)])
def test_muon_skips_a_step_that_the_flag_forbids(bad):
    """The flag of step_if on a GPU, here set by hand: bad steps leave the weights as only the good ones made them."""

    def build():
        torch.manual_seed(0)
        net = nn.Linear(3, 4)
        return list(net.parameters()), get_optimizer(Config(optimizer='muon', base_lr=0.1, weight_decay=0.3), net)

    (ours, optimizer), (plain, reference) = build(), build()
    for i in range(5):
        torch.manual_seed(i)
        for p, q in zip(ours, plain, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        if i in bad:
            ours[0].grad[0, 0] = ours[1].grad[0] = torch.nan
        optimizer.found_inf = torch.tensor(float(i in bad))
        optimizer.step()
        if i not in bad:
            reference.step()
        for p, q, old in zip(ours, plain, before, strict=True):
            torch.testing.assert_close(p, q)
            assert torch.equal(p, old) == (i in bad)


def test_muon_leaves_a_weight_without_a_gradient():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = get_optimizer(Config(optimizer='muon', weight_decay=0.3), net)
    before = [p.detach().clone() for p in net.parameters()]
    for p in (*net[0].parameters(), *net[2].parameters()):
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
    assert moved == [True, True, False, False, True, True]


def test_a_gradient_of_zeros_leaves_muon_finite():
    net = nn.Linear(3, 4)
    optimizer = get_optimizer(Config(optimizer='muon', base_lr=0.1, weight_decay=0.5), net)
    before = net.weight.detach().clone()
    net.weight.grad, net.bias.grad = torch.zeros(4, 3), torch.zeros(4)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before * 0.95)


def test_half_fused_waits_and_no_flag_is_left():
    with FakeTensorMode(), torch.device('cuda'):
        net = nn.Linear(2, 2)
        ok = torch.ones((), dtype=torch.bool)
        net.weight.grad, net.bias.grad = torch.ones(2, 2), torch.ones(2)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        step_if(ok, optimizer)
        assert not hasattr(optimizer, 'found_inf')
        half = torch.optim.AdamW([dict(params=[net.weight], fused=True), dict(params=[net.bias], fused=False)])
        with pytest.raises(DataDependentOutputException):
            step_if(ok, half)


def test_a_plain_step_after_a_skipped_one_is_taken():
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([p], lr=0.5, weight_decay=0.0, fused=True)
    p.grad = torch.ones(1)
    step_if(torch.tensor(False), optimizer)
    assert p.item() == 0
    optimizer.step()
    assert p.item() == pytest.approx(-0.5)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adam'])
def test_our_optimizers_decide_without_a_sync(name):
    """Runs on pretended GPU tensors, whose numbers cannot be read."""
    with FakeTensorMode(), torch.device('cuda'):
        net = nn.Linear(2, 2)
        optimizer = get_optimizer(Config(optimizer=name), net)
        net.weight.grad, net.bias.grad = torch.ones(2, 2), torch.ones(2)
        step_if(torch.ones((), dtype=torch.bool), optimizer)
        with pytest.raises(DataDependentOutputException):
            step_if(torch.ones((), dtype=torch.bool), torch.optim.SGD(net.parameters()))


def test_fused_only_where_there_is_a_kernel():
    assert get_optimizer(Config(), nn.Linear(2, 2)).defaults['fused']
    assert not get_optimizer(Config(), nn.Linear(2, 2, device='meta')).defaults['fused']
    net = nn.Linear(2, 2, dtype=torch.complex64)
    assert not get_optimizer(Config(), net).defaults['fused']


@pytest.mark.parametrize(('max_norm', 'after'), [(1.0, 1.0), (4.0, 4.0), (5.5, 5.0), (0.0, 5.0)])
def test_clipping_returns_the_norm_before(max_norm, after):
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, 1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([[0.0], [-4.0]])
    norm = clip_gradients([a, b], max_norm)
    assert norm.ndim == 0 and norm.item() == pytest.approx(5)
    assert a.grad.item() == pytest.approx(3 * after / 5, rel=1e-5)
    assert b.grad.flatten().tolist() == pytest.approx([0, -4 * after / 5], rel=1e-5)


# ---------------------------------------------------------------- who moves what


def sgd(*parameters):
    return torch.optim.SGD(list(parameters), lr=0.1)


def test_each_optimizer_has_its_parameters_and_frozen_modules_are_in_eval_mode():
    a, b, teacher = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    teacher.requires_grad_(False)
    b.bias.requires_grad_(False)
    modules = dict(a=a, b=b, teacher=teacher, nothing=nn.Dropout())
    moved = trained_parameters(modules, dict(one=sgd(a.weight, b.weight), two=sgd(a.bias)))
    assert {name: [id(p) for p in parameters] for name, parameters in moved.items()} == {
        'one': [id(a.weight), id(b.weight)],
        'two': [id(a.bias)],
    }
    assert [module.training for module in modules.values()] == [True, True, False, False]


def test_a_parameter_of_two_optimizers_or_of_none_or_of_no_module_is_refused():
    a, b = nn.Linear(2, 2), nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"'one' and 'two' update the same parameter of shape \(2, 2\)"):
        trained_parameters(dict(a=a), dict(one=sgd(*a.parameters()), two=sgd(a.weight)))
    with pytest.raises(ValueError, match=r"modules\['b'\]: no optimizer updates weight, bias.*requires_grad_\(False\)"):
        trained_parameters(dict(a=a, b=b), dict(one=sgd(*a.parameters())))
    with pytest.raises(
        ValueError, match=r"optimizers\['one'\] updates a parameter of shape \(3, 2\) that is in no module"
    ):
        trained_parameters(dict(a=a), dict(one=sgd(*a.parameters(), b.weight)))
