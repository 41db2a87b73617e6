"""Compiled networks on the CPU: torch traces and differentiates them as for a GPU, and a counting backend stands in for
the code generator.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import types

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import saving
import utils
from config import Config, SettingError
from networks import table
from tests.helpers import losses, slow_but
from trainer import ExampleDiffusionTrainer
from training import calling, run_folder
from training.calling import has_unused

CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)
NETWORKS = dict(
    unet=dict(network='unet', attention_resolutions=(4,)),
    dit=dict(network='dit', dit_depth=1, dit_width=32, dit_heads=2),
    mlp=dict(network='mlp'),
)


@pytest.fixture
def graphs(monkeypatch):
    """The kinds of all graphs that torch.compile makes from now on. A graph break fails, because of `fullgraph`."""
    made = []

    def counted(kind):
        return lambda graph, inputs: (made.append(kind), make_boxed_func(graph.forward))[1]

    backend = aot_autograd(
        fw_compiler=counted('forward'), bw_compiler=counted('backward'), inference_compiler=counted('inference')
    )
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda fn, mode: compile(fn, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # Compiled raises it
        yield made
    torch._dynamo.reset()


@pytest.mark.parametrize('network', slow_but(['unet'], NETWORKS))
def test_a_network_is_one_graph_in_training_and_one_for_all_its_averages_and_all_batches(graphs, network):
    settings = dict(channels=8, num_res_blocks=1, dropout=0.1, compile='on') | NETWORKS[network]
    config = Config(**settings)
    net = table.get_network(config, (3, 8, 8), 10)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)  # the last layer is initialised to zero
    averages = [copy.deepcopy(net).eval().requires_grad_(False) for _ in range(3)]
    compiled, plain = (calling.Caller(dataclasses.replace(config, compile=on), CPU) for on in ('on', 'off'))

    def out(module, size, train, caller):
        torch.manual_seed(size)
        xt, t, label = torch.randn(size, 3, 8, 8), torch.rand(size), torch.randint(0, 11, (size,))
        if size == 17:
            xt = xt.contiguous(memory_format=torch.channels_last)  # as a sampler may pass it
        return caller(module, train)(xt, t, label)

    for _ in range(3):
        out(net, 32, True, compiled).square().mean().backward()
    assert graphs == ['forward', 'backward'] and all(p.grad is not None for p in net.parameters())
    graphs.clear()
    with torch.no_grad():
        for i, average in enumerate(averages):
            for p in average.parameters():
                p.mul_(1 + 0.1 * i)  # so that the averages differ
            for size in (32, 17, 64):
                torch.testing.assert_close(out(average, size, False, compiled), out(average, size, False, plain))
    assert graphs == ['inference']
    out(net, 32, True, compiled)
    assert graphs == ['inference']


@pytest.mark.parametrize('accumulation_steps', [1, 2])
def test_a_run_compiles_each_kind_of_call_once(graphs, tiny_config, build_trainer, accumulation_steps):
    """Training; held-out losses, whose last batch is smaller; pictures of all samplers and weights (first with 2
    samples), with guidance, which doubles the batch. Evaluation has two versions: raw weights require gradients, and
    averaged ones do not."""
    settings = dict(compile='on', network='mlp', ema_decays=(0.9, 0.99), sample_every=6, label_dropout=0.1)
    settings |= dict(guidance_scale=2.0, accumulation_steps=accumulation_steps)
    trainer = build_trainer(tiny_config(**settings))
    assert trainer.test_loader.size % trainer.config.global_batch_size
    trainer.train_loop()
    assert sorted(graphs) == ['backward', 'forward', 'inference', 'inference']


def test_a_compiled_run_learns_the_same(graphs, tiny_config, build_trainer):
    """Its checkpoint has the names of a plain run's, so that either can resume from the other's."""
    settings = dict(eval_every=0, network='mlp')
    runs = [tiny_config(experiment_name=f'compile{on}', compile=on, **settings) for on in ('off', 'on')]
    for config in runs:
        build_trainer(config).train_loop()
    assert graphs.count('forward') == 1
    plain, compiled = (losses(config.run_dir) for config in runs)
    assert plain == pytest.approx(compiled, rel=1e-5) and len(plain) == 4
    plain, compiled = (saving.load(run_folder.last_path(config))['network'] for config in runs)
    assert plain.keys() == compiled.keys()
    longer = dataclasses.replace(runs[1], compile='off', num_training_steps=12)
    assert build_trainer(longer).step == 12


@pytest.mark.parametrize(
    'compile, device, steps, compiled',
    [
        ('auto', GPU, 200_000, True),
        ('auto', GPU, 1500, False),
        ('auto', CPU, 200_000, False),
        ('on', CPU, 10, True),
        ('graphs', GPU, 10, True),
        ('off', GPU, 200_000, False),
    ],
)
def test_what_is_compiled(compile, device, steps, compiled):
    config = Config(compile=compile, num_training_steps=steps, warmup_steps=1)
    assert isinstance(calling.Caller(config, device).call, calling.Compiled) is compiled
    assert calling.settings_for(64) == {'compile': 'off'} and calling.settings_for(50_000) == {}


class Differentiates(ExampleDiffusionTrainer):
    """A loss with a derivative in forward mode, and one with a second derivative."""

    def loss_fn(self, batch, model_fn):
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        out, along_t = utils.jvp(lambda t: model_fn(xt, t, batch.label), (batch.t,), (torch.ones_like(batch.t),))
        x = batch.x0.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(model_fn(x, batch.t, batch.label).sum(), x, create_graph=True)
        errors = [utils.image_square_error(value, batch.x1) for value in (out, along_t, slope)]
        return errors[0] + errors[1] + errors[2] + utils.image_square_error(model_fn(xt, batch.t), batch.x0)


@pytest.mark.slow
def test_a_loss_that_differentiates_the_network_works_compiled(graphs, tiny_config, build_trainer):
    """Calls that are differentiated run uncompiled, the last call is compiled; the losses agree with a plain run's."""
    settings = dict(eval_every=0, network='mlp')
    runs = [tiny_config(experiment_name=f'compile{on}', compile=on, **settings) for on in ('off', 'on')]
    for config in runs:
        build_trainer(config, Differentiates).train_loop()
    assert graphs.count('forward') >= 1
    plain, compiled = (losses(config.run_dir) for config in runs)
    assert all(map(math.isfinite, plain)) and plain == pytest.approx(compiled, rel=1e-4)


def test_where_torch_cannot_compile_auto_warns_and_on_is_refused(monkeypatch, capsys):
    def failing(graph, inputs):
        raise RuntimeError('Failed to find C compiler')

    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda fn, mode: compile(fn, backend=failing))
    torch._dynamo.reset()
    net = table.get_network(Config(network='mlp', channels=8), (2,), 0)
    xt, t = torch.randn(4, 2), torch.rand(4)
    auto, on = (calling.Caller(Config(compile='on'), CPU) for _ in range(2))
    auto.call = calling.Compiled('on', optional=True)
    for _ in range(2):
        assert auto(net)(xt, t).equal(net(xt, t))
    out = capsys.readouterr().out
    assert out.count('warning: the network runs uncompiled') == 1 and 'Failed to find C compiler' in out
    with pytest.raises(SettingError, match=r"compile='on': torch.compile failed.*Pass --compile off"):
        on(net)(xt, t)


def test_the_output_of_cuda_graphs_is_not_overwritten_by_the_next_call(monkeypatch):
    """A replay writes into the previous one's memory. Here a fake replay does, and earlier results do not change."""
    memory = torch.zeros(3, 2)
    monkeypatch.setattr(torch, 'compile', lambda fn, mode: lambda module, xt, *others: memory.copy_(xt))
    call = calling.Compiled('graphs', optional=False)
    first, second = (call(torch.nn.Identity(), torch.full((3, 2), x), torch.zeros(3), None, {}) for x in (1.0, 2.0))
    assert first.eq(1).all() and second.eq(2).all()


@pytest.mark.parametrize('old, new', [(True, 'on'), (False, 'off'), ('graphs', 'graphs')])
def test_checkpoints_in_which_compile_was_on_or_off_are_read(tmp_path, old, new):
    saving.write(tmp_path / 'old.pt', config=dict(dataclasses.asdict(Config()), compile=old))
    assert saving.config_of(saving.load_checkpoint(tmp_path / 'old.pt')).compile == new


@pytest.mark.parametrize('precision, tf32', [('float32', False), ('tf32', True)])
def test_precision_of_products_is_the_same_in_matrices_and_convolutions(monkeypatch, precision, tf32):
    """Both sets of torch's flags agree, and reading the older one, as torch.compile does, raises no error."""
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    try:
        for other in ('tf32', 'float32', precision):
            calling.set_precision(other)
        for name in ('bfloat16', 'auto'):
            calling.set_precision(name)  # changes none of these flags
        assert backends.cuda.matmul.allow_tf32 is backends.cudnn.allow_tf32 is tf32 and backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == ('high' if tf32 else 'highest')
        newer = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
        assert all((backend.fp32_precision == 'tf32') is tf32 for backend in newer)
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = before


def test_parts_of_a_network_that_the_loss_leaves_out_are_found(tiny_config, build_trainer):
    """Otherwise two processes would wait for their gradients forever, or end with an error."""
    trainer = build_trainer(tiny_config())
    losses = lambda: trainer.loss_fn(trainer.example, trainer.get_model_fn(trainer.network))  # noqa: E731
    assert not has_unused(trainer.modules, losses())
    trainer.network.add_module('auxiliary', nn.Linear(3, 3))
    assert has_unused(trainer.modules, losses())
    trainer.network.auxiliary.requires_grad_(False)
    assert not has_unused(trainer.modules, losses())
    assert all(p.grad is None for p in trainer.network.parameters())


@pytest.mark.slow
def test_processes_send_gradients_and_the_stop_flag_only(run_sh, tmp_path):
    """Unless something is due: one bucket of gradients, averaged in the last of two backward passes, and the flag."""
    env = dict(QUIET=str(tmp_path / 'sent'))
    settings = dict(num_training_steps=12, log_every=5, save_every=0, eval_every=0, accumulation_steps=2)
    done = run_sh('tests/experiments/quiet.py', nproc=2, env=env, final_pictures=False, **settings)
    assert done.returncode == 0, done.stderr
    for rank, (step, due) in itertools.product(range(2), [(7, False), (9, True)]):
        sent = json.loads((tmp_path / f'sent_{rank}_{step}').read_text())
        assert (sent != ['c10d::allreduce_', 'c10d::allreduce_']) == due, sent


def test_a_network_that_was_evaluated_is_trained_in_train_mode_again():
    """For instance a network that a hook calls before loss_fn trains it."""
    net, x = table.get_network(Config(network='mlp', channels=8, dropout=0.5), (2,), 0), torch.randn(64, 2)
    caller, t = calling.Caller(Config(compile='off'), CPU), torch.rand(64)
    for train in (False, True, False, True):
        caller(net, train)(x, t)
        assert all(part.training == train for part in net.modules())


def test_gradients_are_averaged_only_in_the_last_backward_pass():
    class Parallel:
        averages = True

        @contextlib.contextmanager
        def no_sync(self):
            self.averages = False
            yield
            self.averages = True

        def __call__(self, batch):
            return self.averages

    loss = object.__new__(calling.ParallelLoss)
    loss.losses = Parallel()
    assert [loss(None, average=False), loss(None, average=True), loss(None)] == [False, True, True]


class Returns(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, xt, t, label):
        return self.out


@pytest.mark.parametrize('out', [{'sample': torch.ones(2)}, None, (torch.ones(2), None)])
def test_a_network_that_returns_no_tensor_is_an_error_with_the_type(out):
    model_fn = calling.Caller(Config(), CPU)(Returns(out))
    with pytest.raises(TypeError, match=rf'^Returns\.forward returned {type(out).__name__}: return a tensor'):
        model_fn(torch.ones(2), torch.ones(2))
    pair = calling.Caller(Config(), CPU)(Returns((torch.ones(2).double(), torch.ones(1))))
    assert [part.dtype for part in pair(torch.ones(2), torch.ones(2))] == [torch.float32] * 2


@pytest.mark.parametrize('given, found', [(None, 'NoneType'), (1.0, 'float'), (torch.ones(()), r'\(\)')])
def test_a_loss_that_is_not_one_for_each_image_is_named(given, found):
    batch = types.SimpleNamespace(t=torch.ones(2))
    with pytest.raises(ValueError, match=rf'one loss per image, shape \(2,\), not {found}'):
        calling.Loss({}, lambda batch: given)(batch)
