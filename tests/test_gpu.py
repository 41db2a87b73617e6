"""On a real GPU: training in all precisions and compiled, agreement with the CPU, saving and resuming, no CPU-GPU sync,
two ranks by NCCL.

All other tests run on the CPU, also on a machine with GPUs.
"""

import copy
import os

import pytest
import torch

import main
from tests.helpers import assert_same, losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
STEPS = dict(num_training_steps=20, base_lr=0.005, log_every=5, save_every=0, eval_every=10)


@pytest.fixture
def build(tiny_config):
    """`build(**settings)`: a trainer on the GPU, as main builds it."""
    return lambda **settings: main.build(tiny_config(**STEPS | settings))


@pytest.mark.parametrize(
    'settings',
    [
        dict(precision='float32'),
        dict(precision='bfloat16'),
        dict(precision='tf32'),
        dict(precision='bfloat16', compile='on'),
        dict(precision='bfloat16', compile='graphs', accumulation_steps=2),
        dict(precision='bfloat16', network='dit', dit_depth=2, dit_width=64, dit_heads=2, compile='on'),
        dict(precision='float32', attention_resolutions=(4,), accumulation_steps=2),
    ],
    ids=str,
)
def test_a_run_learns_evaluates_and_draws(build, settings):
    trainer = build(**settings)
    trainer.train_loop()
    assert trainer.step == 20 and trainer.checkpoints.finished
    assert all(p.device.type == 'cuda' and p.isfinite().all() for p in trainer.network.parameters())
    curve = losses(trainer.config.run_dir)
    assert len(curve) == 4 and curve[-1] < 0.9 * curve[0]
    assert any((trainer.config.run_dir / 'samples').glob('*0000020*.png'))


def test_float32_and_bfloat16_have_the_same_curve_but_for_rounding(build):
    curves = []
    for precision in ('float32', 'bfloat16'):
        trainer = build(precision=precision, experiment_name=precision)
        trainer.train_loop()
        curves.append(losses(trainer.config.run_dir))
    assert curves[0] != curves[1] and curves[0] == pytest.approx(curves[1], rel=0.02)


def test_a_resumed_run_continues_as_if_nothing_had_happened(build):
    whole = build(experiment_name='whole', precision='float32')
    whole.train_loop()
    first = build(precision='float32')
    steps = first.batches.steps(first.step)
    for _ in range(7):
        first.train_step(next(steps))
    first.checkpoints.save(first.step, wait=True)
    second = build(precision='float32')
    assert second.step == 7
    assert_same(second.network.state_dict(), first.network.state_dict())
    second.train_loop()
    for mine, other in zip(second.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)  # not bit for bit, because some sums in CUDA have no fixed order


@pytest.mark.parametrize('compile', ['on', 'graphs'])
@pytest.mark.parametrize('network', [dict(network='unet'), dict(network='dit', dit_depth=2, dit_width=64, dit_heads=2)])
def test_a_compiled_run_has_the_curve_and_the_samples_of_a_plain_one(build, network, compile):
    """Also if a second call comes while the first result is still in use, as in the memory of a solver."""
    curves, samples = [], []
    for chosen in ('off', compile):
        trainer = build(precision='float32', experiment_name=chosen, compile=chosen, **network)
        trainer.train_loop()
        curves.append(losses(trainer.config.run_dir))
        model_fn = trainer.get_model_fn(next(iter(trainer.weights().values())))
        samples.append(trainer.draw(model_fn, trainer.sample_inputs(20), 'adams'))
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)
    assert torch.allclose(*samples, atol=0.05)


@pytest.mark.parametrize('precision, most', [('float32', 1e-5), ('tf32', 5e-3)])
def test_gpu_and_cpu_agree(build, precision, most):
    """With the same weights and batch, the outputs differ only by rounding, which for float32 follows IEEE."""
    trainer = build(precision=precision)
    for p in trainer.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch = next(next(trainer.batches.steps(trainer.step)))
    with torch.no_grad():
        here = trainer.get_model_fn(trainer.network)(batch.x0, batch.t, batch.label)
        network = copy.deepcopy(trainer.network).cpu().eval()
        there = network(batch.x0.cpu(), batch.t.cpu(), batch.label.cpu())
    error = float((here.cpu() - there).norm() / there.norm())
    assert error < most and (precision == 'float32' or error > 1e-5), error


@pytest.mark.parametrize('time_sampler', ['uniform', 'logit_normal', 'log_normal'])
@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_a_step_waits_for_nothing(build, time_sampler, precision):
    trainer = build(time_sampler=time_sampler, precision=precision)
    steps = trainer.batches.steps(trainer.step)
    for _ in range(3):  # loads libraries and makes the optimizer's state
        trainer.train_step(next(steps))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        trainer.train_step(next(steps))
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_two_gpus_give_the_loss_curve_of_one(run_sh, tmp_path):
    """The same images, noise and times; gradients averaged by NCCL, agreement by gloo."""
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', '0,1')
    for name, nproc in (('one', 1), ('two', 2)):
        result = run_sh(
            nproc=nproc, env={'CUDA_VISIBLE_DEVICES': gpus}, experiment_name=name, precision='float32', **STEPS
        )
        assert result.returncode == 0 and f'on {nproc} x cuda' in result.stdout, result.stderr
    assert losses(tmp_path / 'ckpts/one') == pytest.approx(losses(tmp_path / 'ckpts/two'), rel=1e-3)
