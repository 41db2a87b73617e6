"""The examples: each is short, trains, samples and resumes; and its formulas hold where the answer is known."""

import functools
import importlib.util
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import main
from config import PRESETS, Config, SettingError
from data_utils import DATASETS
from evaluation import judge, reference
from prediction import Prediction, get_model_convert_fn, optimal_denoiser
from processes import check_process, get_process
from reports import pictures
from sampling import sample
from tests.helpers import ROOT, TINY, as_flags, launch_env, record_of, slow_but
from tests.valued_cuda import CUDA, valued_cuda  # noqa: F401

FILES = sorted(path for path in (ROOT / 'examples').glob('*.py'))
POINTS = {name: PRESETS['toy2d'][name] for name in ('dataset', 'network', 'global_batch_size')}
DIT = dict(network='dit', dit_patch=8, dit_width=32, dit_heads=4, dit_depth=1)
EXAMPLES = {  # file -> class, settings
    'interpolant': ('Interpolant', POINTS | dict(dataset='moons_to_gaussians', network='two_outputs')),
    'image_to_image': ('FromDegraded', dict(label_dropout=1.0, degradation='small')),
    'ot_coupling': ('Coupled', POINTS | dict(dataset='gaussians_to_moons')),
    'flow_map': ('FlowMap', POINTS | dict(time_input='slow', rule='lagrangian')),
    'flow_map_table': (
        'Table',
        POINTS | dict(dataset='checkerboard', network='layers', time_input='same', t_min=0.0, t_max=1.0),
    ),
    'few_step_likelihood': ('JointMap', POINTS | dict(time_input='slow', network='three', label_dropout=1.0)),
    'stochastic_flow_map': ('MetaFlowMap', POINTS | dict(dataset='eight_gaussians', label_dropout=1.0, solver='map')),
    'consistency': ('Consistency', POINTS | dict(time_input='slow')),
    'drifting': ('Drifting', POINTS | dict(batch_shards=2)),
    'guidance': ('Plain', dict(label_dropout=0.2)),
    'edm': ('Edm', None),
    'x_prediction': ('Mine', DIT | dict(model_type='x0')),
    'condition': ('Conditioned', dict(label_dropout=0.2)),
    'masked': ('Masked', {}),
    'bridge': ('Bridge', POINTS | dict(dataset='moons_and_gaussians')),
    'contrastive': ('Contrastive', {}),
    'dispersive': ('Dispersive', {}),
    'forecast': ('Forecast', POINTS | dict(dataset='ring', solver='learned')),
    'multimarginal': ('Multimarginal', POINTS | dict(dataset='random_pairs', network='each_snapshot')),
    'nets': ('Nets', POINTS | dict(dataset='none', num_sample_steps=8)),
    'inverse': ('Inverse', POINTS | dict(dataset='eight_gaussians', label_dropout=1.0)),
    'field': ('Field', dict(dataset='random_fields')),
    'own_dataset': (None, {}),
    'own_process': (None, {}),
    'own_network': (None, dict(mixer_width=16, mixer_depth=1)),
    'own_solver': (None, {}),
}
OTHERS = {'reflow', 'distill', 'flow_map_distill', 'latent'}  # these need a finished run or downloaded data


@pytest.fixture
def load(monkeypatch):
    """`load(name)`: the module of an example."""

    def module_of(name):
        monkeypatch.delitem(sys.modules, 'examples.flow_map', raising=False)  # imported again, it fills the tables
        spec = importlib.util.spec_from_file_location(name, ROOT / f'examples/{name}.py')
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, 'SAMPLES', 500, raising=False)
        return module

    return module_of


@pytest.fixture
def build(load, tmp_path, build_trainer, monkeypatch):
    """`build(name, class_name=None, **settings) -> (trainer, module)` of an example, tiny."""
    monkeypatch.setattr(judge, 'NUM_JUDGED', 64)
    monkeypatch.setattr(pictures, 'POINTS_SHOWN', 50)

    def build(name, class_name=None, **settings):
        module = load(name)
        default, own = EXAMPLES.get(name, (None, POINTS))
        own = module.EDM if own is None else own
        chosen = TINY | dict(
            sample_every=12,
            ema_decays=(0.9,),
            global_batch_size=64,
            ckpt_dir=str(tmp_path / 'ckpts'),
            experiment_name='run',
        )
        config_class = getattr(module, 'Settings', Config)
        if hasattr(module, 'STATES'):
            monkeypatch.setattr(module, 'STATES', 2)
        trainer_class = getattr(module, class_name or default or '', None)
        return build_trainer(config_class(**chosen | own | settings), trainer_class), module

    return build


def batch_of(trainer, n=64):
    return trainer.prepare_batch_fn(trainer.train_loader.take(range(n)), is_train=True)


# ---------------------------------------------------------------- all of them


def test_all_examples_are_tested():
    assert {path.stem for path in FILES} == set(EXAMPLES) | OTHERS


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_it_is_short_says_how_to_run_it_and_is_in_the_table(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    docstring = text.split('"""')[1]
    assert f'sh run.sh examples/{path.name}' in docstring
    assert path.stem.startswith('own_') or re.search(r'\b(19|20)\d\d\b', docstring), 'no paper'
    table = (ROOT / 'examples/README.md').read_text()
    row = next(line for line in table.splitlines() if f'`{path.name}`' in line)
    assert f'| {len(text.splitlines())} |' in row


@pytest.mark.parametrize('name', slow_but(['interpolant', 'condition', 'field', 'nets', 'own_network'], EXAMPLES))
def test_it_trains_evaluates_draws_and_resumes(build, name):
    trainer, _ = build(name)
    trainer.train_loop()
    lines = record_of(trainer.config.run_dir)
    assert all(np.isfinite(value) for line in lines for value in line.values())
    drawn = {path.name for path in (trainer.config.run_dir / 'samples').glob('step_0000012_*.png')}
    weights = next(iter(trainer.weights()))
    assert drawn == {f'step_0000012_{sampler}_{weights}.png' for sampler in trainer.samplers()}
    if trainer.judge.can_judge:
        numbers = trainer.judge.judge_sampler(next(iter(trainer.samplers())), 64, 12)
        assert numbers and all(np.isfinite(value) for value in numbers.values())
    again, _ = build(name)
    assert again.checkpoints.finished and again.step == 12
    for key, module in trainer.modules.items():
        for mine, theirs in zip(module.state_dict().values(), again.modules[key].state_dict().values(), strict=True):
            assert mine.equal(theirs)


DIFFERENTIATE = set(  # no derivatives of valued_cuda
    'flow_map flow_map_table few_step_likelihood stochastic_flow_map edm own_process inverse nets'.split()
)


@pytest.mark.parametrize('name', slow_but(['condition'], [name for name in EXAMPLES if name not in DIFFERENTIATE]))
def test_its_hooks_run_on_a_gpu(build, name, request, monkeypatch):
    """Everything without a backward pass, on tensors that claim to be on a GPU: mixed devices are errors."""
    request.getfixturevalue('valued_cuda')
    monkeypatch.setattr(reference, 'MOST_DRAWS', 1024)
    trainer, _ = build(name, precision='float32', compile='off')
    assert trainer.device == CUDA
    trainer.step = 12  # late enough that a bridge draws its pairs
    with torch.no_grad():
        batch = next(next(trainer.batches.steps(3)))
        losses = trainer.loss_fn(batch, trainer.get_model_fn(trainer.network, train=True))
    assert losses.device == CUDA and np.isfinite(losses.tolist()).all()
    trainer.judge.rehearse()
    trainer.gallery.rehearse(0)
    values = trainer.judge.held_out_losses(12) | trainer.gallery.draw(12)
    if trainer.judge.can_judge:
        values |= trainer.judge.samples(12)
    assert values and np.isfinite(list(values.values())).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['reflow', 'distill', 'bridge'])
def test_as_a_command_on_two_processes(tmp_path, name):
    """Trains all runs of the file and prints their table; the same command again finds them finished."""
    own = {'reflow': POINTS, 'distill': POINTS}.get(name) or EXAMPLES[name][1]
    settings = TINY | dict(ckpt_dir=str(tmp_path), experiment_name='it', global_batch_size=64, final_eval=True) | own
    if name == 'bridge':  # its runs set their own data set
        settings |= dict(preset='toy2d', dataset='moons')
    command = ['sh', 'run.sh', f'examples/{name}.py', *as_flags(settings)]
    for _ in range(2 if name == 'bridge' else 1):
        done = subprocess.run(command, cwd=ROOT, env=launch_env(2), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        parts = re.findall(r'^(\w+): \S+it_\1$', done.stdout, re.MULTILINE)
        rows = [line.split() for line in done.stdout.splitlines()]
        assert len(parts) > 1 and all(any(row[:1] == [part] and row[1:] for row in rows) for part in parts)
    assert done.stdout.count('is finished') == (len(parts) if name == 'bridge' else 0)
    assert (tmp_path / 'it_compared.html').exists()


# ---------------------------------------------------------------- formulas


def test_interpolant_has_both_distributions_at_any_noise(load):
    """Between Gaussians, v and eta are known: samples have the standard deviation of the other end."""
    module, (a, b) = load('interpolant'), (0.3, 0.8)
    this = object.__new__(module.Interpolant)
    this.config = Config()

    def model_fn(x, t):
        x, t = x[:, 0], t[:, None]
        var = ((1 - t) * a) ** 2 + (t * b) ** 2 + this.gamma(t) ** 2
        return torch.stack([(t * b**2 - (1 - t) * a**2) / var * x, this.gamma(t) / var * x], 1)

    torch.manual_seed(0)
    for start, before, after in ((1, b, a), (0, a, b)):
        x = torch.randn(20_000, 2, dtype=torch.float64)
        for noise in (0.0, 0.5, 2.0):
            inputs = type('Inputs', (), dict(x1=before * x, truth=before * x))
            out = this.draw(model_fn, inputs, '', start, noise)
            assert out.std() == pytest.approx(after, rel=0.03), (start, noise)


def squared(x, y):
    return (x[:, None] - y).square().sum(2)


def test_couplings(build):
    """Optimal pairs: swapping two partners never improves them. The nearest of four is never farther than chance."""
    trainer, module = build('ot_coupling')
    torch.manual_seed(0)
    x0, x1 = torch.randn(60, 2), torch.randn(60, 2)
    paired = trainer.couple(x0, x1, None)
    assert {tuple(row) for row in paired.tolist()} == {tuple(row) for row in x1.tolist()}
    cost = squared(x0, paired)
    own = cost.diagonal()
    assert (cost + cost.T >= own[:, None] + own - 1e-5).all() and own.sum() < 0.5 * (x0 - x1).square().sum()
    cost = squared(x0, x1)
    partner = module.COUPLINGS['immiscible'](cost)
    rank = cost.argsort(1).argsort(1)[torch.arange(60), partner]
    assert 3 < rank.float().mean() < 20  # the nearest of four of 60 by chance has rank 11 on average
    other, _ = build('ot_coupling', coupling='optimal', experiment_name='other')
    with pytest.raises(SettingError, match=r"coupling='optimal'.*sinkhorn"):
        other.couple(x0, x1, None)


def test_a_plan_of_sinkhorn_has_the_marginals_and_the_exact_assignment_as_its_limit(load):
    module = load('ot_coupling')
    torch.manual_seed(0)
    cost = squared(torch.randn(12, 2), torch.randn(12, 2)).double()
    plan = module.sinkhorn(cost, reg=0.5, rounds=200)
    torch.testing.assert_close(plan.sum(0), torch.ones(12).double())
    torch.testing.assert_close(plan.sum(1), torch.ones(12).double())
    # the form of the optimal plan: exp((f_i + g_j - cost_ij) / reg), so that these second differences vanish
    left = plan.log() + cost / 0.5
    torch.testing.assert_close(left - left[:1] - left[:, :1] + left[0, 0], torch.zeros(12, 12).double())
    sharp = module.sinkhorn(cost, reg=0.005, rounds=5000)
    assert sharp.argmax(1).equal(module.COUPLINGS['ot'](cost)) and sharp.max(1).values.min() > 0.99


def pairs_of(build, n=512, **settings):
    """x0 (n, 2), moons, and its partners x1 (n, 2); the same draws each time."""
    trainer, _ = build(
        'ot_coupling', experiment_name='_'.join(map(str, settings.values())).replace('.', 'p'), **settings
    )
    (x0, _, x1), _ = DATASETS['gaussians_to_moons'].load(Config())
    torch.manual_seed(0)
    return x0[:n], trainer.couple(x0[:n], x1[:n], None)


def test_the_weight_of_a_condition_leads_from_optimal_pairs_to_pairs_by_chance(build):
    x0, plain = pairs_of(build, ratio=1.0)
    _, c2ot = pairs_of(build, ratio=0.05)
    _, exact = pairs_of(build, ratio=0.0)
    _, chance = pairs_of(build, coupling='chance')
    assert exact.equal(chance)  # each x1 keeps the condition of its pair by chance
    _, best = pairs_of(build, coupling='ot')
    assert plain.equal(best)  # w = 0
    cost = [(x0 - x1).square().sum(1).mean() for x1 in (plain, c2ot, chance)]
    assert cost[0] < cost[1] < 0.9 * cost[2]

    def skew(x1):  # largest mean of x1 in eight groups of the condition; 0 for the prior
        groups = x1[x0[:, 0].argsort()].reshape(8, -1, 2).mean(1) - x1.mean(0)
        return groups.norm(dim=1).max()

    assert skew(c2ot) < 0.5 * skew(plain) and skew(chance) < 0.3 * skew(plain), (skew(c2ot), skew(plain), skew(chance))


@pytest.mark.parametrize('rule', ['lagrangian', 'eulerian', 'semigroup', 'uniform'])
def test_the_exact_flow_map_has_no_loss(build, rule):
    """For Gaussian data of standard deviation 0.5: X(x, t, s) = x std(s) / std(t)."""
    trainer, module = build('flow_map', rule=rule)
    torch.manual_seed(0)
    t, x = torch.rand(64) * 0.9 + 0.1, torch.randn(64, 2)
    s = torch.where(torch.arange(64) % 2 == 0, t, t * torch.rand(64))

    def std(t):
        return (((1 - t) * 0.5) ** 2 + t**2).sqrt()[:, None]

    def velocity(x, t):  # d/dt X
        return x * ((t - 0.25 * (1 - t)) / std(t)[:, 0] ** 2)[:, None]

    def exact(x, t, label=None, s=None):
        gap = (s - t)[:, None]
        average = x * (std(s) / std(t) - 1) / torch.where(gap == 0, 1, gap)
        return torch.where(gap == 0, velocity(x, t), average)

    v = velocity(x, t)
    batch = module.dataclasses.replace(
        batch_of(trainer), x0=x - t[:, None] * v, x1=x + (1 - t)[:, None] * v, t=t, cond={'s': s}
    )
    assert trainer.loss_fn(batch, exact).max() < 1e-6
    assert trainer.loss_fn(batch, lambda *a, **k: 1.1 * exact(*a, **k)).mean() > 1e-4


@pytest.mark.parametrize(
    ('rule', 'error'),
    [
        ('lagrangian', lambda w, t, v, a: w * t - w * t / 2),
        ('eulerian', lambda w, t, v, a: w * t - (v - t / 2 * w)),
        ('semigroup', lambda w, t, v, a: w * t - (w * t + w * 0.75 * t) / 2),
        ('uniform', lambda w, t, v, a: w * t - (a * w * t + (1 - a) * w * (t - a * t / 2))),
    ],
)
def test_the_target_of_a_flow_map_is_held_fixed(build, rule, error):
    """By hand, for u(x, t, s) = w t and s = t / 2."""
    trainer, module = build('flow_map', rule=rule)
    batch, w = batch_of(trainer), torch.tensor(0.7, requires_grad=True)
    batch = module.dataclasses.replace(batch, cond={'s': batch.t / 2})
    loss = trainer.loss_fn(batch, lambda x, t, label=None, s=None: (w * t)[:, None] * torch.ones_like(x)).mean()
    (slope,) = torch.autograd.grad(loss, w)
    t, v, a = batch.t[:, None], batch.x1 - batch.x0, batch.share[:, None]
    assert rule != 'uniform' or ((a >= 0) & (a < 1)).all()
    torch.testing.assert_close(loss, error(w, t, v, a).expand_as(v).square().mean())
    torch.testing.assert_close(slope, (2 * error(w, t, v, a).expand_as(v) * t).mean())


def test_the_posterior_of_a_stochastic_flow_map_is_exact(load):
    """Its mean is the best prediction of x0 (from many data), and (sample, xt) has the distribution of (x0, xt)."""
    module = load('stochastic_flow_map')
    torch.manual_seed(0)
    data = module.posterior(torch.zeros(100_000, 2), 1)
    for t in (0.05, 0.2, 0.6):
        xt, coefs = (1 - t) * data + t * torch.randn_like(data), get_process(Config())(torch.full((5,), t))
        samples = module.posterior(xt[:5].repeat_interleave(20_000, 0), t).view(5, -1, 2)
        torch.testing.assert_close(samples.mean(1), optimal_denoiser(data)(xt[:5], coefs, None), atol=0.015, rtol=0)
        x = module.posterior(xt, t)
        for a, b in ((data * xt, x * xt), (data.square(), x.square()), (data - xt / (1 - t), x - xt / (1 - t))):
            assert b.square().mean() == pytest.approx(float(a.square().mean()), rel=0.02)


def test_the_exact_stochastic_flow_map_has_no_loss_and_draws_the_posterior(build):
    """For data N(0, 0.25), x0 given xt is N(g xt, var), and the flow to it is known, for each xt."""
    trainer, module = build('stochastic_flow_map')

    def mean(at, state):
        return (0.25 * (1 - at) / (0.25 * (1 - at) ** 2 + at**2))[:, None] * state

    def std(at, r):
        return ((1 - r) ** 2 * 0.25 * at**2 / (0.25 * (1 - at) ** 2 + at**2) + r**2).sqrt()[:, None]

    def position(z, r, s, at, state):
        m = mean(at, state)
        return (1 - s)[:, None] * m + (z - (1 - r)[:, None] * m) * std(at, s) / std(at, r)

    def exact(z, r, label=None, s=None, at=None, state=None):
        z, r, s, at, state = (x.double() for x in (z, r, s, at, state))
        end = torch.where(s == r, r + 1e-4, s)  # where s = r, a small step
        return ((position(z, r, end, at, state) - z) / (end - r)[:, None]).float()

    batch = batch_of(trainer)
    r, z, given = batch.t, batch.x1, batch.cond
    v = exact(z, r, **given | {'s': r})
    batch = module.dataclasses.replace(batch, x0=z - r[:, None] * v, x1=z + (1 - r)[:, None] * v)
    assert (given['s'] == r).any() and (given['s'] < r).any()
    assert trainer.loss_fn(batch, exact).max() < 1e-4
    assert trainer.loss_fn(batch, lambda *a, **k: 1.1 * exact(*a, **k)).mean() > 1e-2
    state, at = torch.tensor([[0.5, -1.0]]).expand(20_000, 2), torch.tensor([0.4])
    for x in trainer.methods(exact, 0.4, state).values():
        torch.testing.assert_close(x.mean(0), mean(at, state[:1])[0], atol=0.01, rtol=0)
        torch.testing.assert_close(x.std(0), std(at, 0 * at).expand(1, 2)[0], atol=0.01, rtol=0)


def exact_consistency(x, t, label=None):
    """For data N(0, 0.25), f(x, t) = 0.5 x / std(t): u = (x - f) / t."""
    t = t[:, None]
    return (x - 0.5 * x / (((1 - t) * 0.5) ** 2 + t**2).sqrt()) / t


@pytest.mark.parametrize('flow', ['', 'a folder'])
def test_the_exact_consistency_function_has_no_loss(build, flow):
    """Training gets x0 and x1 at the ends of the straight line that has the velocity of the flow at xt."""
    trainer, module = build('consistency')

    def velocity(x, t, label=None):
        t = t[:, None]
        return x * (t - 0.25 * (1 - t)) / (((1 - t) * 0.5) ** 2 + t**2)

    trainer.ema.networks[0.9].forward = exact_consistency
    trainer.modules['flow'] = torch.nn.Module()
    trainer.modules['flow'].forward = velocity
    trainer.config = module.dataclasses.replace(trainer.config, flow=flow)
    batch = batch_of(trainer)
    t, x, v = batch.t[:, None], batch.x1, velocity(batch.x1, batch.t)
    if not flow:
        batch = module.dataclasses.replace(batch, x0=x - t * v, x1=x + (1 - t) * v)
    losses = []
    for trainer.step in (0, 5, 11):  # k = 1, 4, 8
        batch = module.dataclasses.replace(batch, share=batch_of(trainer).share)
        losses.append(float(trainer.loss_fn(batch, exact_consistency).mean()))
    assert losses[0] > 10 * losses[1] > 100 * losses[2] and losses[2] < 1e-4
    assert trainer.loss_fn(batch, lambda *a: 1.1 * exact_consistency(*a)).mean() > 10 * losses[2]
    inputs = trainer.sample_inputs(20_000)
    for sampler in trainer.samplers().values():
        assert sampler(exact_consistency, inputs).std() == pytest.approx(0.5, rel=0.02)
    calls, t_max = [], trainer.config.t_max
    for nfe, times in {0: [t_max], 1: [t_max], 2: [t_max, 1 / 2], 4: [t_max, 3 / 4, 1 / 2, 1 / 4]}.items():
        trainer.config = module.dataclasses.replace(trainer.config, sample_nfe=nfe)  # generate.py --nfe
        calls.clear()
        x = trainer.draw(lambda x, t, c: (calls.append(float(t[0])), exact_consistency(x, t))[1], inputs, 'adams')
        assert calls == pytest.approx(times) and x.std() == pytest.approx(0.5, rel=0.02)


def test_the_target_of_consistency_is_the_last_average_held_fixed(build):
    """By hand, for u = w t, and an average whose u is 0: f - f_average = xt - xr - w t^2."""
    trainer, _ = build('consistency', ema_decays=(0.9, 0.5))
    batch, w = batch_of(trainer), torch.tensor(0.7, requires_grad=True)
    trainer.ema.networks[0.5].forward = lambda x, t, label: 0 * x
    loss = trainer.loss_fn(batch, lambda x, t, label: (w * t)[:, None] * torch.ones_like(x)).mean()
    (slope,) = torch.autograd.grad(loss, w)
    t = batch.t[:, None]
    error, weight = t / 2 * (batch.x1 - batch.x0) - w * t**2, t * t / 2  # r = t / 2
    torch.testing.assert_close(loss, (error.square() / weight).mean())
    torch.testing.assert_close(slope, (-2 * error * t**2 / weight).mean())


def test_the_drift_between_gaussians_is_the_integral(load):
    """On a line, against a sum over a fine grid; and its mean is 0 between samples of one distribution."""
    module, grid, tau = load('drifting'), torch.linspace(-6, 6, 20_001, dtype=torch.float64), 0.3
    x = torch.tensor([[-1.5], [0.0], [0.4], [2.0]], dtype=torch.float64)
    quantiles = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)[:, None]
    for mean, std in ((0.5, 1.0), (-0.2, 0.5)):
        weight = (-((grid - mean) ** 2) / (2 * std**2) - (x - grid).abs() / tau).exp()  # (4, grid)
        integral = (weight * (grid - x)).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        shift = module.mean_shift(x, mean + std * quantiles, torch.zeros(4, 20_000, dtype=torch.bool), tau)
        torch.testing.assert_close(shift, integral, atol=2e-3, rtol=0)
    torch.manual_seed(0)
    point, label = torch.tensor([[0.3, -0.5]]), torch.zeros(40, dtype=torch.long)
    for moved in (0.0, 0.5):  # the first sample is the same in all draws
        draws = [(torch.cat([point, torch.randn(39, 2)]), moved + torch.randn(40, 2), label) for _ in range(400)]
        v = torch.stack([module.drift(*draw)[0] for draw in draws])
        in_errors = v.mean(0) / (v.std(0) / 400**0.5)
        assert in_errors.abs().max() < 4 if moved == 0 else in_errors.min() > 6


def test_the_drift_is_of_one_class_and_does_not_depend_on_the_order(load):
    module = load('drifting')
    torch.manual_seed(0)
    x, data, label = torch.randn(30, 2), torch.randn(30, 2), torch.arange(30) % 3
    v, order = module.drift(x, data, label), torch.randperm(30)
    torch.testing.assert_close(module.drift(x[order], data[order], label[order]), v[order])
    first, same = label == 0, label[:, None] == label
    units = [
        torch.cdist(x, data)[pairs].mean() for pairs in (same, same & first)
    ]  # the unit is the mean of all classes
    module.TAUS = [tau * float(units[0] / units[1]) for tau in module.TAUS]
    torch.testing.assert_close(module.drift(x[first], data[first], label[first]), v[first], atol=1e-5, rtol=1e-4)
    single = module.drift(x[:1], data[:1], label[:1])  # no other sample: all the way to the data
    torch.testing.assert_close(single, 3 * (data - x)[:1])


def test_drifting_moves_samples_by_the_drift_within_each_shard(build):
    trainer, module = build('drifting', global_batch_size=64)
    batch, w = batch_of(trainer), torch.zeros(64, 2, requires_grad=True)
    losses = trainer.loss_fn(batch, lambda x1, t, label: w)  # the samples are x1 - w
    v = torch.cat([module.drift(batch.x1[i], batch.x0[i], batch.label[i]) for i in (slice(32), slice(32, 64))])
    torch.testing.assert_close(losses, v.square().mean(1))
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), w)[0], v)


def test_model_guidance_converges_to_guided_predictions(build):
    """v without label + W (v - v without label) has zero loss if v is the target."""
    trainer, module = build('guidance', 'ModelGuidance')
    batch = batch_of(trainer)
    without = 0.3 * torch.ones_like(batch.x0)
    target = batch.x1 - batch.x0

    def model_fn(xt, t, label):
        return without if (label == 10).all() else without + module.W * (target - without)

    assert trainer.loss_fn(batch, model_fn).max() < 1e-9
    dropped = module.utils.rows(batch, slice(None))
    dropped.label = torch.full_like(batch.label, 10)
    expected = (without - target).square().flatten(1).mean(1)
    torch.testing.assert_close(trainer.loss_fn(dropped, model_fn), expected)  # without label: the plain loss


def test_early_weights_are_from_a_quarter_of_the_training(build):
    trainer, _ = build('guidance', keep_every=3)
    trainer.train_loop()
    stored = torch.load(trainer.config.run_dir / 'step_0000003.pt', weights_only=True)['network']
    for name, value in trainer.modules['early'].state_dict().items():
        assert value.equal(stored[name])


def test_edm_is_table_1(build):
    trainer, _ = build('edm', eval_every=12)
    trainer.train_loop()
    assert 0 < record_of(trainer.config.run_dir)[-1]['eval/difference_from_table_1'] < 1e-4
    ends = torch.tensor([trainer.config.t_min, 1.0])
    torch.testing.assert_close(trainer.process.sigma(ends), torch.tensor([0.002, 80.0]))


def test_ink_and_slant(load):
    measured = load('condition').measured
    upright, leaning = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    for i in range(8):
        upright[0, 0, i, 3] = 1
        leaning[0, 0, i, 7 - i] = 1  # to the right at the top
    (ink, slant), (same, more) = measured(upright)[0].tolist(), measured(leaning)[0].tolist()
    assert ink == pytest.approx(same) and ink == pytest.approx((1 / 8 - 0.306) / 0.034, rel=1e-4)
    assert (more - slant) * 0.121 == pytest.approx(1, rel=1e-4)  # a column for each row
    (x, _), _ = DATASETS['digits'].load(Config())
    numbers = measured(x.float() / 16)
    assert numbers.mean(0).abs().max() < 0.05 and (numbers.std(0) - 1).abs().max() < 0.05
    assert measured(torch.zeros(1, 1, 8, 8)).isfinite().all()


def test_masked_diffusion_counts_bits_and_shows_every_pixel(build):
    trainer, _ = build('masked')
    assert trainer.decode(trainer.encode(batch_of(trainer).x_original)).equal(batch_of(trainer).x_original)
    bits = torch.cat([trainer.loss_fn(batch_of(trainer), lambda x, t, label: torch.zeros_like(x)) for _ in range(40)])
    assert bits.mean() == pytest.approx(math.log2(17), rel=0.03)  # for a network that knows nothing
    inputs = trainer.sample_inputs(4)
    assert (inputs.x1[:, 17] == 1).all() and inputs.x1.sum() == 4 * 64
    seen = []

    def model_fn(x, t, label):
        seen.append(float(x[:, 17].mean()))
        return torch.where(torch.arange(18)[:, None, None] == 5, 50.0, 0.0).expand_as(x)

    x = trainer.draw(model_fn, inputs, '', 8)
    assert (x.argmax(1) == 5).all() and (x.sum(1) == 1).all()
    assert seen == pytest.approx([1 - i / 8 for i in range(8)], abs=0.12)


def test_a_bridge_arrives_where_the_network_points(build):
    trainer, module = build('bridge')
    end = torch.randn(50, 2)

    def pointing(end):
        return lambda x, t, way: (end - x) / torch.where(way == 1, 1 - t, t).sqrt()[:, None]

    for way in (0, 1):
        x = trainer.travel(pointing(end), torch.randn(50, 2), torch.full((50,), way))
        torch.testing.assert_close(x, end)
    seen = []  # from 0 to 0, the variance is S^2 t (1 - t), as in a Brownian bridge
    start = torch.zeros(20_000, 2)
    noted = pointing(start)
    trainer.travel(lambda x, t, way: (seen.append((float(t[0]), x)), noted(x, t, way))[1], start, torch.ones(20_000))
    for t, x in seen[4::5]:
        assert x.var() == pytest.approx(module.S**2 * t * (1 - t), rel=0.05)


def test_the_cost_of_a_bridge_is_measured_from_its_start(build):
    trainer, _ = build('bridge')
    inputs = trainer.sample_inputs(20)
    way = (inputs.x1 - inputs.truth).square().sum(1).mean().item()
    for x, down, up in ((inputs.x1, 0, way), (inputs.truth, way, 0)):
        found = trainer.sample_metrics(x, inputs)
        assert (found['cost_down'], found['cost_up']) == (pytest.approx(down), pytest.approx(up))
        assert 0 < found['least'] < way


def test_the_loss_of_a_bridge_by_hand(build):
    trainer, module = build('bridge')
    torch.manual_seed(0)
    batch = batch_of(trainer)
    t, up = batch.t[:, None], batch.label[:, None] == 1
    assert (batch.noise / (module.S * (t * (1 - t)).sqrt())).std() == pytest.approx(1, abs=0.2)
    xt = (1 - t) * batch.x0 + t * batch.x1 + batch.noise
    exact = torch.where(up, (batch.x1 - xt) / (1 - t).sqrt(), (batch.x0 - xt) / t.sqrt())
    found = trainer.loss_fn(batch, lambda x, time, way: (torch.testing.assert_close(x, xt), exact + 0.5)[1])
    torch.testing.assert_close(found, torch.full((64,), 0.25), rtol=1e-3, atol=1e-4)


def test_a_bridge_pairs_a_true_end_with_a_sampled_end(build):
    trainer, _ = build('bridge')
    data = trainer.train_loader.take(range(64))
    trainer.step = 12
    trainer.network.register_forward_pre_hook(lambda *_: pytest.fail('pairs must come from the moving average'))
    batch = trainer.prepare_batch_fn(data, is_train=True)
    up = batch.label == 1
    true_x1 = {tuple(row) for row in data[2].tolist()}
    assert all(tuple(row) in true_x1 for row in batch.x1[up].tolist()) and batch.x0[~up].equal(data[0][~up])
    assert not any(tuple(row) in true_x1 for row in batch.x1[~up].tolist())
    held_out = trainer.prepare_batch_fn(data, is_train=False)
    assert held_out.x0.equal(data[0]) and held_out.x1.equal(data[2])  # the pairs of the data, in order


def test_contrastive_and_dispersive_losses_by_hand(build):
    trainer, _ = build('contrastive')
    batch = batch_of(trainer, 4)
    u = batch.x1 - batch.x0
    away = (u - u[[3, 0, 1, 2]]).square().flatten(1).mean(1)
    torch.testing.assert_close(trainer.loss_fn(batch, lambda *_: u), -0.05 * away)
    spread, _ = build('dispersive', experiment_name='spread')
    loss = spread.loss_fn(batch, spread.get_model_fn(spread.network))
    z = spread.features.flatten(1)
    pairs = torch.stack([(-(a - b).square().mean() / 0.5).exp() for a in z for b in z])
    plain = super(type(spread), spread).loss_fn(batch, spread.get_model_fn(spread.network))
    torch.testing.assert_close(loss - plain, (0.5 * pairs.mean().log()).expand(4))


def test_the_posterior_is_exact(load):
    """Against the points of eight Gaussians whose noisy first coordinate came out near y."""
    module = load('inverse')
    x, _ = DATASETS['eight_gaussians'].load(Config())[0]
    torch.manual_seed(0)
    x = x.repeat(40, 1)
    near = x[(x[:, 0] + module.NOISE * torch.randn(len(x)) - module.Y).abs() < 0.01]
    exact = module.posterior(len(near), 0)
    assert len(near) > 3000
    torch.testing.assert_close(exact.mean(0), near.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(exact.std(0), near.std(0), atol=0.01, rtol=0)
    assert abs((exact[:, 0] > 0.6).float().mean() - (near[:, 0] > 0.6).float().mean()) < 0.03


def test_mmps_is_exact_for_one_gaussian(build):
    """The denoiser of N(0, 0.3^2): after moving, the first coordinate is the posterior mean given xt and y."""
    trainer, module = build('inverse')
    std, given = 0.3, {}
    trainer.draw = lambda moved, inputs, solver, nfe: moved(given['x'], given['t'])

    def model_fn(x, t, label=None):
        t = t[:, None]
        var = ((1 - t) * std) ** 2 + t**2
        x0 = (1 - t) * std**2 / var * x
        return (x - x0) / t

    given |= dict(x=torch.randn(5, 2), t=torch.full((5,), 0.4))
    velocity = trainer.guided(model_fn, None, 'mmps')
    x0 = given['x'] - 0.4 * velocity
    precision = 1 / std**2 + 0.6**2 / 0.4**2  # precision of x0 given xt; y adds 1 / NOISE^2
    expected = (0.6 / 0.4**2 * given['x'][:, 0] + module.Y / module.NOISE**2) / (precision + 1 / module.NOISE**2)
    torch.testing.assert_close(x0[:, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x0[:, 1], 0.6 / 0.4**2 * given['x'][:, 1] / precision)


def test_forecasts_have_the_exact_law_at_any_noise(build):
    """With the exact drift of the linear system. Its ODE keeps a point a point, whose CRPS is sqrt(2) times as high."""
    trainer, module = build('forecast', num_sample_steps=100)
    ring, rfft, irfft = module.ring, torch.fft.rfft, torch.fft.irfft

    def exact(x, t, label=None, now=None):
        (mean, std), t = ring.law(now, 1), float(t[0])
        variance = ((1 - t) ** 2 * std) ** 2 + module.S**2 * t**2 * (1 - t)
        apart = rfft(x - (1 - t) ** 2 * mean - t * now) / variance.clamp(min=1e-9)
        x0, w = rfft(mean) + (1 - t) ** 2 * std**2 * apart, module.S * t * (1 - t) * apart
        return now + irfft(module.S * w - 2 * (1 - t) * x0, n=ring.POINTS)

    torch.manual_seed(0)
    module.LEADS = 2
    states = ring.draw(torch.zeros(25, 1, ring.POINTS), 1000)
    inputs = type('Inputs', (), dict(cond={'now': states.repeat(20, 1, 1)}))
    for name in module.NOISES:
        found = trainer.sample_metrics(trainer.draw(exact, inputs, name), inputs)
        for lead in (1, 2):
            score = found[f'crps_{lead}'] / found[f'exact_crps_{lead}']
            assert score == pytest.approx(2**0.5 if name == 'ode' else 1, rel=0.04), (name, lead)
            assert found[f'spread_skill_{lead}'] == pytest.approx(float(name != 'ode'), abs=0.06), (name, lead)
            assert (found[f'spectrum_error_{lead}'] < 0.12) == (name != 'ode'), (name, lead)
    with pytest.raises(SettingError, match="solver='heun' is not a choice of --solver"):
        trainer.draw(exact, inputs, 'heun')


def test_the_pictures_of_forecasts_show_the_present_state(build):
    trainer, _ = build('forecast')
    shown = []
    trainer.gallery.show = lambda name, x, inputs: shown.append(inputs)
    inputs = trainer.sample_inputs(30)
    trainer.show('samples', None, inputs)
    held_out = trainer.test_loader.everything()
    assert shown[0].given[0][:25].equal(held_out[2][:25]) and shown[0].truth[:25].equal(held_out[0][:25])


@pytest.mark.parametrize(
    ('name', 'class_name', 'per_step'),
    [('forecast', 'FromNoise', 4), ('forecast', 'Forecast', 4), ('multimarginal', None, 1)],
)
def test_samples_cost_no_more_evaluations_than_allowed(build, name, class_name, per_step):
    """--sample_nfe was ignored by some; a forecast draws four states in a row."""
    trainer, _ = build(name, class_name, sample_nfe=3, num_sample_steps=100)
    model_fn, calls = trainer.get_model_fn(trainer.network), []
    counted = lambda *args, **cond: (calls.append(1), model_fn(*args, **cond))[1]  # noqa: E731
    for sampler in trainer.samplers().values():
        calls.clear()
        sampler(counted, trainer.sample_inputs(2))
        assert len(calls) == 3 * per_step


def test_walkers_take_no_more_steps_than_allowed(build, monkeypatch):
    trainer, module = build('nets', sample_nfe=3, num_sample_steps=100)
    times, inputs = [], trainer.sample_inputs(4)  # which walk, too
    fake = lambda energy, drift, x, t, noise: (times.append(len(t)), (None, torch.zeros(len(x))))[1]  # noqa: E731
    monkeypatch.setattr(module, 'walk', fake)
    trainer.sample_metrics(None, inputs)
    assert set(times) == {4}


def test_snapshots_are_shown_next_to_the_law_where_their_path_ends(build):
    trainer, _ = build('multimarginal')
    shown = []
    trainer.gallery.show = lambda name, x, inputs: shown.append(inputs.truth)
    for name in ('step_0000001_curved_half_raw', 'step_0000001_edges_0_raw'):
        trainer.show(name, torch.zeros(64, 2), trainer.sample_inputs(64))
    half, end = shown
    assert half[:, 1].abs().mean() > 0.5 > 0.2 > half[:, 0].abs().mean()  # above and below the origin
    assert end[:, 0].abs().mean() > 0.5 > 0.2 > end[:, 1].abs().mean()  # left and right of it


def test_the_loss_of_a_forecast_by_hand(build):
    """The network gets the interpolant, whose noise has the variance S^2 t^2 (1 - t), and its slope is the target."""
    trainer, module = build('forecast')
    batch = batch_of(trainer)
    t, now, w = batch.t[:, None, None], batch.cond['now'], (1 - batch.t).sqrt()[:, None, None] * batch.x1

    def at(t):
        return (1 - t) ** 2 * batch.x0 + t * now + module.S * t * w

    slope = (at(t + 1e-3) - at(t - 1e-3)) / 2e-3
    found = trainer.loss_fn(batch, lambda x, time, now: (torch.testing.assert_close(x, at(t)), slope + 0.5)[1])
    torch.testing.assert_close(found, torch.full((64,), 0.25), rtol=2e-2, atol=0)
    assert not now.equal(batch.x0) and batch.x1.std() == pytest.approx(1, abs=0.1)


def test_snapshots_are_moved_through_the_law_of_their_weighted_sums(build):
    """For independent Gaussians x_k ~ N(m_k, s_k^2 I), g_k is linear: samples have the mean and variance of x(a)."""
    trainer, module = build('multimarginal', dataset='random_pairs', network='each_snapshot', num_sample_steps=100)
    mean, std = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]]), torch.tensor([0.3, 0.5, 0.2, 0.4])

    def model_fn(x, t, a):  # (n, 4, 2)
        gain = a * std**2 / (a**2 * std**2).sum(1, keepdim=True)
        return mean + gain[:, :, None] * (x - (a @ mean)[:, None])

    torch.manual_seed(0)
    inputs = type('Inputs', (), dict(x1=mean[3] + std[3] * torch.randn(4000, 2)))
    for path, stop in (('edges', 0.5), ('curved', 0.5), ('edges', 0.0), ('direct', 0.0), ('curved', 1 / 3)):
        x, a = trainer.draw(model_fn, inputs, '', path, stop), module.PATHS[path](stop)
        torch.testing.assert_close(x.mean(0), a @ mean, atol=0.03, rtol=0, msg=f'{path} {stop}')
        assert float((x - x.mean(0)).std()) == pytest.approx(float((a * std).norm()), rel=0.05), (path, stop)


def test_curved_paths_are_parabolas_through_the_snapshots(build):
    """Exact where a point moves along a parabola; all paths end at vertices and their weights sum to 1."""
    _, module = build('multimarginal', dataset='random_pairs', network='each_snapshot')
    times = torch.arange(4) / 3
    for t in (1 / 3, 0.4, 0.5, 0.61, 2 / 3):
        a = module.PATHS['curved'](t)
        assert (a @ torch.stack([times, times**2], 1)).tolist() == pytest.approx([t, t * t], abs=1e-6)
    for path in module.PATHS.values():
        for t in (0.0, 0.2, 0.5, 0.9, 1.0):
            assert float(path(t).sum()) == pytest.approx(1)
        assert path(0.0).tolist() == [1, 0, 0, 0] and path(1.0).tolist() == [0, 0, 0, 1]


def test_the_weights_and_the_loss_of_snapshots_by_hand(build):
    trainer, _ = build('multimarginal', dataset='random_pairs', network='each_snapshot')
    batch = batch_of(trainer)
    a, x = batch.cond['a'], batch.x_original
    assert (a.sum(1) - 1).abs().max() < 1e-5 and -0.075 <= float(a.min()) < 0 and 1 < float(a.max()) <= 1.225
    assert batch.x0.equal(x[:, 0]) and batch.x1.equal(x[:, 3])
    sums = sum(a[:, k : k + 1] * x[:, k] for k in range(4))
    check = lambda xa, t, a: (torch.testing.assert_close(xa, sums[:, None].expand(-1, 4, -1)), x + 0.5)[1]  # noqa: E731
    torch.testing.assert_close(trainer.loss_fn(batch, check), torch.full((64,), 0.25))


def test_the_exact_velocity_of_random_fields_reaches_the_least_loss_and_the_floors(build):
    """E[x1 - x0 | xt] of a Gaussian field is linear in each mode; its samples have the exact spectrum and seam."""
    trainer, module = build('field')
    t = (torch.arange(4000, dtype=torch.float64)[:, None, None] + 0.5) / 4000 * 0.998 + 0.001
    assert module.least() == pytest.approx(float((module.P / ((1 - t) ** 2 * module.P + t**2)).mean()), rel=1e-5)
    assert module.least(0, 1 - 1e-7) == pytest.approx(float(module.P.sqrt().mean()) * math.pi / 2, rel=1e-4)

    def exact(xt, t, label=None):
        t = t.view(-1, 1, 1, 1)
        gain = (t - (1 - t) * module.P) / ((1 - t) ** 2 * module.P + t**2)
        return torch.fft.ifft2(gain * torch.fft.fft2(xt)).real

    trainer.get_model_fn = lambda network, train=False: exact
    assert trainer.judge.reference_loss(trainer.network)['eval/reference'] == pytest.approx(module.least(), rel=0.01)
    inputs = trainer.sample_inputs(1000)
    numbers = trainer.sample_metrics(trainer.draw(exact, inputs, 'adams', num_steps=40), inputs)
    assert numbers['spectrum_error'] < 0.05 and numbers['real_spectrum_error'] < 0.05
    assert numbers['seam'] == pytest.approx(1, abs=0.03) and numbers['real_seam'] == pytest.approx(1, abs=0.03)
    white = 0.5 * torch.randn(1000, 1, module.N, module.N)  # flat: too little at 0, too much at high wave numbers
    found = module.errors(white)
    rings = (module.k.round() == r for r in range(12))
    by_hand = torch.stack([0.25 / module.P[ring].mean() - 1 for ring in rings]).square().mean().sqrt()
    assert found['spectrum_error'] == pytest.approx(float(by_hand), rel=0.05)


@pytest.mark.parametrize('padding', ['circular', 'zeros'])
def test_circular_convolutions_do_not_see_the_border(build, padding):
    """A field shifted by a whole number of pixels of the coarsest level gives the same output, shifted."""
    trainer, module = build('field', padding=padding)
    for p in trainer.network.parameters():  # the last layer starts at 0
        torch.nn.init.normal_(p, std=0.1)
    x, model_fn = module.draw(3, 1), trainer.get_model_fn(trainer.network)
    with torch.no_grad():
        out, shifted = (model_fn(part, torch.full((3,), 0.5)) for part in (x, x.roll((2, 4), (2, 3))))
    difference = (out.roll((2, 4), (2, 3)) - shifted).abs().max() / out.std()
    assert difference < 1e-3 if padding == 'circular' else difference > 0.1


def test_the_exact_drift_of_nets_has_no_loss(build, monkeypatch):
    """One mode instead of 40: exp(-U) is a Gaussian at all times, so that b and F are known."""
    trainer, module = build('nets')
    mean, std = torch.tensor([[0.3, -0.2]]), 0.5
    monkeypatch.setattr(module, 'MEANS', mean)
    monkeypatch.setattr(module, 'STD', std)

    def gaussian(t):  # the sum of two quadratic functions: its mean (n, 2), variance (n, 1), and F (n,)
        w = (torch.expm1(4 * (1 - t)) / math.expm1(4))[:, None]
        var = 1 / (w / std**2 + 1 - w)
        centre = var * w * mean / std**2
        z = var[:, 0].log() + w[:, 0] * math.log(math.tau) - (w * mean**2 / std**2 - centre**2 / var).sum(1) / 2
        return centre, var, -z

    def rates(t):
        return torch.func.jvp(gaussian, (t.clone(),), (torch.ones(len(t)),))[1]

    def exact(x, t):  # dx/dt = d centre/dt + (x - centre) d log std/dt
        centre, var, _ = gaussian(t)
        d_centre, d_var, _ = rates(t)
        return d_centre + (x - centre) * d_var / (2 * var)

    torch.manual_seed(0)
    batch = batch_of(trainer)
    batch.x0, batch.t = torch.randn(64, 2), torch.rand(64)
    trainer.modules['dF'].forward = lambda t: -rates(t[:, 0])[2][:, None]  # dF/ds = -dF/dt
    assert trainer.loss_fn(batch, exact).max() < 1e-6
    assert trainer.loss_fn(batch, lambda x, t: 1.1 * exact(x, t)).mean() > 1e-3
    trainer.modules['dF'].forward = lambda t: 0 * t
    rest = trainer.loss_fn(batch, exact)
    torch.testing.assert_close(rest, rates(batch.t)[2].square(), rtol=1e-3, atol=1e-4)
    # walkers with this drift have nearly equal weights; their mean is right for any drift
    x1, times, exact_log_z = torch.randn(1000, 2), torch.linspace(1, 0, 201), math.log(math.tau * std**2)
    a = trainer.walk(exact, x1, times)[1]
    assert module.effective_sample_size(a) > 0.8 and abs(module.log_mean_weight(a) - exact_log_z) < 0.05
    numbers = trainer.sample_metrics(x1, module.ProcessedBatch(x1, x1, x1, x1[:, 0], None))
    assert numbers['real_log_z'] == pytest.approx(exact_log_z)
    assert all(abs(numbers[f'log_z_ais_{e:g}'] - exact_log_z) < 0.2 for e in module.NOISES)


def test_own_solver_has_order_2(load):
    load('own_solver')
    process = get_process(Config())

    def model_fn(x, t, label=None):  # dx/dt = x cos(3 t)
        return x * torch.cos(3 * t)[:, None]

    exact = math.exp((math.sin(0.3) - math.sin(2.7)) / 3)
    errors = []
    for n in (160, 320):
        x = sample(
            model_fn,
            process,
            torch.ones(1, 1, dtype=torch.float64),
            solver='two_step',
            num_steps=n,
            t_min=0.1,
            t_max=0.9,
            time_grid='uniform',
        )
        errors.append(abs(x.item() / 0.9 - exact))
    assert 3.3 < errors[0] / errors[1] < 4.7


def test_own_process_is_a_process(load):
    module = load('own_process')
    process = get_process(module.Settings())
    check_process(process, 0.001, 0.999)
    t = torch.rand(9, dtype=torch.float64)
    coefs = process(t)
    torch.testing.assert_close(coefs.alpha**2 + coefs.sigma**2, torch.ones_like(t))
    assert process.power == 1.5


@pytest.mark.parametrize('name', ['guidance', 'bridge'])
def test_a_resumed_run_equals_an_uninterrupted_one(build, tmp_path, name):
    """Bridge draws its batches from the moving average; guidance stores the weights of the fourth step."""
    settings = dict(num_training_steps=16, keep_every=8, sample_every=0, final_pictures=False)
    whole, _ = build(name, **settings)
    whole.train_loop()
    (tmp_path / 'ckpts/part').mkdir()
    shutil.copy(whole.config.run_dir / 'step_0000008.pt', tmp_path / 'ckpts/part/last.pt')
    part, _ = build(name, **settings, experiment_name='part')
    assert part.step == 8
    part.train_loop()
    for key, module in whole.modules.items():
        for mine, theirs in zip(module.state_dict().values(), part.modules[key].state_dict().values(), strict=True):
            assert mine.equal(theirs)


def test_errors_that_examples_report(build):
    """If the samples are the truth, the error is 0; otherwise it equals the error by hand."""
    trainer, _ = build('image_to_image')
    inputs = trainer.sample_inputs(30)
    truth = trainer.decode(inputs.truth)
    assert trainer.sample_metrics(truth, inputs)['rmse'] == 0
    assert trainer.sample_metrics(truth - 0.25, inputs)['rmse'] == pytest.approx(0.25)
    conditioned, module = build('condition', experiment_name='conditioned')
    inputs = conditioned.sample_inputs(30)
    x = torch.rand(30, 1, 8, 8)
    numbers = conditioned.sample_metrics(x, inputs)
    by_hand = (module.measured(x)[:, 0] - inputs.cond['measured'][:, 0]).square().mean().sqrt()
    assert numbers['ink_error'] == pytest.approx(by_hand.item())
    bridge, _ = build('bridge', experiment_name='bridge')
    inputs = bridge.sample_inputs(40)
    numbers = bridge.sample_metrics(inputs.truth + 0.1, inputs)
    assert numbers['cost_up'] == pytest.approx(0.02, rel=1e-4) and numbers['least'] <= numbers['cost_down'] + 0.1
    assert numbers['wasserstein_x0'] < numbers['wasserstein_x1']


def test_three_of_four_items_of_a_flow_map_train_the_velocity(build):
    trainer, _ = build('flow_map')
    torch.manual_seed(0)
    batch = batch_of(trainer, 1000)
    s, t = batch.cond['s'], batch.t
    assert (s <= t).all() and 0.7 < (s == t).float().mean() < 0.8


def test_the_network_of_a_flow_map_gets_the_end_of_a_step(build):
    """With its own solver; other solvers follow the velocity, s = t."""
    trainer, _ = build('flow_map')
    inputs, seen = trainer.sample_inputs(3), []
    assert inputs.cond == {}
    trainer.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((float(args[1][0]), float(kwargs['s'][0]))), with_kwargs=True
    )
    model_fn = trainer.get_model_fn(trainer.network)
    trainer.draw(model_fn, inputs, 'flow_map', nfe=2, time_grid='uniform')
    assert seen == [(pytest.approx(0.999), pytest.approx(0.5)), (pytest.approx(0.5), pytest.approx(0.001))]
    seen.clear()
    trainer.draw(model_fn, inputs, 'heun', nfe=4)
    assert len(seen) == 4 and all(t == s for t, s in seen)
    other, _ = build('flow_map', rule='semi', experiment_name='other')
    with pytest.raises(SettingError, match=r"rule='semi'.*lagrangian"):
        other.loss_fn(batch_of(trainer), model_fn)


def test_all_kinds_of_guidance_cost_about_the_same(build):
    trainer, _ = build('guidance')
    inputs, calls = trainer.sample_inputs(4), []
    for module in (trainer.network, trainer.modules['early']):
        module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0]) // 4))
    costs = {}
    for name, sampler in trainer.samplers().items():
        calls.clear()
        sampler(trainer.get_model_fn(trainer.network), inputs)
        costs[name] = sum(calls)
    assert costs.pop('interval') in (19, 20, 21) and set(costs.values()) == {20}, costs


@pytest.mark.slow
def test_a_student_moves_towards_the_teacher(build, monkeypatch):
    """If both flows agree, the student gets no gradient, and only the fake flow learns from its own error."""
    teacher, _ = build('distill', 'Flow', experiment_name='teacher')
    teacher.train_loop()
    monkeypatch.setattr(main, 'load_run', lambda folder: teacher)
    student, _ = build('distill', 'Student', experiment_name='student')
    batch = batch_of(student)
    loss = student.loss_fn(batch, student.get_model_fn(student.network, train=True))
    loss.mean().backward()
    assert all(p.grad is None or not p.grad.any() for p in student.network.parameters())  # fake equals teacher
    assert any(p.grad is not None and p.grad.any() for p in student.modules['fake'].parameters())
    assert all(p.grad is None for p in student.modules['teacher'].parameters())
    with torch.no_grad():
        for p in student.modules['fake'].parameters():
            p.add_(0.1)
    student.loss_fn(batch, student.get_model_fn(student.network, train=True)).mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in student.network.parameters())


def test_the_losses_of_a_student_by_hand(build, monkeypatch):
    teacher, _ = build('distill', 'Flow', experiment_name='teacher')
    monkeypatch.setattr(main, 'load_run', lambda folder: teacher)
    student, _ = build('distill', 'Student', experiment_name='student')
    student.get_model_fn = lambda module, train=False: (
        lambda xt, t, label: xt - (0.2 if module is student.modules['teacher'] else 0.7)
    )
    batch, shift = batch_of(student), torch.full((64, 2), 0.1, requires_grad=True)
    loss = student.loss_fn(batch, lambda xt, t, label: xt - shift)
    t, t_max = batch.t[:, None], student.config.t_max
    x = batch.x1 - t_max * (batch.x1 - shift)
    xt = ((1 - t) * x + t * batch.x1.roll(1, 0)).detach()
    real, fake = (xt - t * (xt - size) for size in (0.2, 0.7))
    direction = (fake - real) / (x - real).abs().mean(1, keepdim=True).clamp(min=1e-3)
    expected = direction.square().mean(1) + (fake - x).square().mean(1) / batch.t.clamp(min=0.1) ** 2
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss.sum(), shift)
    torch.testing.assert_close(slope, (t_max * direction).detach())  # from one term only, towards the teacher


@pytest.mark.slow
def test_reflow_trains_on_samples_of_the_first_run(build, monkeypatch):
    first, _ = build('reflow', 'Flow', experiment_name='first', model_type='v')
    first.train_loop()
    monkeypatch.setattr(main, 'load_run', lambda folder: first)
    second, _ = build('reflow', 'Second', experiment_name='second', model_type='v')
    batch = batch_of(second)
    network = second.modules['first']
    expected = sample(lambda *a: network(*a), second.process, batch.x1, batch.label, model_type='v', num_steps=20)
    torch.testing.assert_close(batch.x0, expected)
    assert not second.independent and all(not p.requires_grad for p in network.parameters())


def test_reflow_finds_straight_lines_straight(load):
    module = load('reflow')
    this = object.__new__(module.Flow)
    this.weights, this.process = lambda: {'raw': None}, get_process(Config())
    this.model_convert_fn = get_model_convert_fn('velocity')
    inputs = type('Inputs', (), dict(x1=torch.randn(10, 2), label=None))
    this.get_model_fn = lambda module: lambda x, t, label: torch.ones_like(x)
    assert this.straightness(inputs, 20) == pytest.approx(0, abs=1e-9)
    this.get_model_fn = lambda module: lambda x, t, label: t[:, None].expand_as(x)  # x1 - x0 = 1/2 and v = t
    assert this.straightness(inputs, 200) == pytest.approx(1 / 12, rel=0.01)
    this.get_model_fn = lambda module: lambda x, t, label: t[:, None].square().expand_as(x)
    assert this.straightness(inputs, 2) == pytest.approx((0.75**2 - 0.25**2) ** 2 / 4)  # in the middle of each step
    this.model_convert_fn = get_model_convert_fn('v')  # an output of another type gives the same
    this.get_model_fn = lambda module: lambda x, t, label: as_output(x, t, torch.ones_like(x), 'v')
    assert this.straightness(inputs, 20) == pytest.approx(0, abs=1e-9)


def as_output(xt, t, velocity, model_type):
    """The output of a network of type `model_type` that predicts this velocity."""
    return getattr(Prediction(xt, get_process(Config())(t), velocity=velocity), model_type)


def losses_of(build, name, class_name, model_type, target_type='velocity', known=lambda xt, t: 0.3 * xt):
    """The losses of a network that predicts the velocity `known`, as an output of type `model_type`."""
    trainer, _ = build(name, class_name, model_type=model_type, target_type=target_type, label_dropout=0.1)
    torch.manual_seed(0)
    batch = batch_of(trainer)

    def model_fn(xt, t, label=None, **cond):
        shift = 0 if label is None else 0.01 * label.view(-1, 1, 1, 1)
        return as_output(xt, t, known(xt, t) + shift, model_type)

    return trainer.loss_fn(batch, model_fn)


@pytest.mark.parametrize(('name', 'class_name'), [('contrastive', 'Contrastive'), ('guidance', 'ModelGuidance')])
@pytest.mark.parametrize('model_type', ['x0', 'v', 'F'])
def test_every_output_has_the_same_loss(build, name, class_name, model_type):
    """Once, any output was taken for a velocity, and agreement fell from 0.8 to 0.09."""
    expected = losses_of(build, name, class_name, 'velocity')
    torch.testing.assert_close(losses_of(build, name, class_name, model_type), expected, rtol=1e-3, atol=1e-3)


def test_the_contrastive_loss_leads_away_from_the_others(build):
    """By hand."""
    trainer, _ = build('contrastive')
    batch = batch_of(trainer)
    found = trainer.loss_fn(batch, lambda xt, t, label: 0.3 * xt)
    t = batch.t.view(-1, 1, 1, 1)
    v, u = 0.3 * ((1 - t) * batch.x0 + t * batch.x1), batch.x1 - batch.x0
    other = torch.cat([u[-1:], u[:-1]])
    expected = ((v - u) ** 2).flatten(1).mean(1) - 0.05 * ((v - other) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(found, expected)


def test_the_target_of_model_guidance_is_guided_towards_the_label(build):
    trainer, module = build('guidance', 'ModelGuidance', label_dropout=0.1)
    batch = batch_of(trainer)
    found = trainer.loss_fn(batch, lambda xt, t, label: 0 * xt + (0.5 if (label == 10).all() else 2.0))
    target = batch.x1 - batch.x0 + (1 - 1 / module.W) * (2.0 - 0.5)
    torch.testing.assert_close(found, ((2.0 - target) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize(
    ('name', 'class_name', 'settings'),
    [
        ('flow_map', 'FlowMap', dict(model_type='F')),
        ('flow_map', 'Plain', dict(process_name='cosine')),
        ('interpolant', 'Plain', dict(process_name='cosine')),
        ('bridge', 'Plain', dict(target_type='x0')),
        ('reflow', 'Flow', dict(process_name='cosine')),
        ('field', 'Field', dict(dataset='digits')),
        ('field', 'Field', dict(crop_prob=0.5)),
        ('field', 'Field', dict(geometric_prob=0.1)),
    ],
)
def test_formulas_of_a_velocity_refuse_other_settings_before_the_first_step(build, name, class_name, settings):
    ((setting, value),) = settings.items()
    trainer, _ = build(name, class_name, **settings)
    with pytest.raises(SettingError, match=f'{setting}={value!r}: the formulas of this experiment hold only for'):
        trainer.judge.rehearse()


@pytest.mark.parametrize(('name', 'class_name', 'warns'), [('drifting', None, True), ('flow_map', 'Plain', False)])
def test_warns_of_guidance_that_no_sampler_has(build, capsys, name, class_name, warns):
    trainer, _ = build(name, class_name, guidance_scale=2.0, label_dropout=0.1)
    trainer.gallery.rehearse(1)
    assert ('warning: guidance_scale=2: no sampler takes steps' in capsys.readouterr().out) == warns


@pytest.mark.slow
def test_latents_are_scaled_and_come_back(load, tmp_path, build_trainer, monkeypatch):
    module = load('latent')
    monkeypatch.setattr(module, 'autoencoder', functools.partial(module.autoencoder, width=8))
    pairs = [(torch.randint(256, (n, 1, 12, 12), dtype=torch.uint8), torch.arange(n) % 10) for n in (300, 50)]
    DATASETS['fashion_mnist'] = module.DataSpec(lambda config: tuple(pairs), num_classes=10)
    config = Config(data_dir=str(tmp_path))
    stored = module.stored(config)
    z, _ = stored['parts'][0]
    assert z.shape == (300, 4, 3, 3) and z.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(z.std((0, 2, 3)), torch.full((4,), 0.5), rtol=1e-3, atol=0)
    before = (tmp_path / 'latents_of_fashion_mnist_seed_0.pt').stat().st_mtime_ns
    assert module.stored(config)['net']['mean'].equal(stored['net']['mean'])  # loaded, not computed again
    assert (tmp_path / 'latents_of_fashion_mnist_seed_0.pt').stat().st_mtime_ns == before
    x, _ = module.pictures(config)[0]
    assert x.max() == 1 and x.shape == (300, 1, 12, 12)

    settings = TINY | dict(dataset='latents', data_dir=str(tmp_path), ckpt_dir=str(tmp_path))
    trainer = build_trainer(Config(**settings), module.Latents)
    net = trainer.modules['autoencoder']
    back = net['decode'](net['encode'](x[:5])).clamp(0, 1)
    torch.testing.assert_close(trainer.decode(z[:5]), back, rtol=1e-4, atol=1e-4)
    assert 'frechet' in trainer.sample_metrics(x[:40], trainer.sample_inputs(40))
