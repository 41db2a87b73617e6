"""A training step on pretended CUDA tensors: finds device errors, CPU-GPU syncs and copies on a machine without a GPU.

Tensors on the CPU are real, so that the trainer is built as always. Tensors on 'cuda' are FakeTensors with a shape,
a type and a device, but no values. They cannot test numbers, kernels and the backward pass (which is replaced).
"""

import dataclasses
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import utils
from tests.helpers import slow_but

# operations for whose result the CPU has to wait
SYNCS = {'_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero', 'masked_select', 'unique_dim', '_unique2'}


class PretendCuda(TorchDispatchMode):
    """Runs operations on 'cuda' with FakeTensors, all others for real; `watching`: syncs fail, copies are counted."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake
        self.watching, self.copies, self.pinned, self.precisions = False, Counter(), [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        if name == 'is_pinned':
            return any(args[0] is tensor for tensor in self.pinned)
        if name == '_pin_memory':
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        on_cuda = any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == 'cuda') for x in leaves)
        if not on_cuda:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self.watching:
            assert name not in SYNCS, f'CPU-GPU sync: {name} of a tensor on the GPU'
        out = func(
            *tree_map_only(torch.Tensor, self.to_fake, args), **tree_map_only(torch.Tensor, self.to_fake, kwargs)
        )
        if self.watching and name == 'convolution':
            self.precisions.add(out.dtype)
        if self.watching and name in ('_to_copy', 'copy_'):
            self.watch_copy(name, args, kwargs, out)
        return out

    def to_fake(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def watch_copy(self, name, args, kwargs, out):
        source, target = (args[1], args[0]) if name == 'copy_' else (args[0], out)
        if source.device == target.device:
            return
        assert target.device.type == 'cuda', f'CPU-GPU sync: {tuple(source.shape)} is copied from the GPU to the CPU'
        non_blocking = kwargs.get('non_blocking', name == 'copy_' and len(args) > 2 and args[2])
        pinned = any(source is tensor for tensor in self.pinned)
        assert pinned and non_blocking, f'CPU-GPU sync: {tuple(source.shape)} is copied to the GPU from pageable memory'
        self.copies[tuple(source.shape)] += 1


def leaves_of(loss):
    """The parameters that `loss` was computed from."""
    found, todo, seen = [], [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A PretendCuda on a machine that seems to have a GPU. `.trained`: the parameters of the last loss."""
    pretend = PretendCuda(FakeTensorMode(allow_non_fake_inputs=True))

    def backward(loss, *args, **kwargs):
        pretend.trained = leaves_of(loss)
        for parameter in pretend.trained:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a real parameter cannot become a pretended one
    answers = dict(
        mem_get_info=(10**10, 10**10),
        is_available=True,
        device_count=1,
        is_bf16_supported=True,
        is_current_stream_capturing=False,
    )
    try:
        with pretend.fake, pretend:  # first, because this looks for a GPU
            for name, answer in answers.items():
                monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
            yield pretend
    finally:
        utils._seed_accelerator.cache_clear()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


@pytest.fixture
def build(pretend_cuda, monkeypatch, tmp_path):
    """`build(**settings)`: the trainer of the cifar10 preset, with a smaller network, on the pretended GPU."""
    import data_utils
    import main
    from config import PRESETS, Config
    from runtime import ranks
    from training import independence

    images = torch.zeros(256, 3, 32, 32, dtype=torch.uint8), torch.zeros(256, dtype=torch.long)
    spec = dataclasses.replace(data_utils.DATASETS['cifar10'], load=lambda config: (images, images))
    monkeypatch.setitem(data_utils.DATASETS, 'cifar10', spec)
    monkeypatch.setattr(ranks, 'setup', lambda: torch.device('cuda', 0))
    monkeypatch.setattr(independence, 'signs_of_dependence', lambda *parts: None)  # read once, before the first step
    utils._seed_accelerator.cache_clear()
    small = dict(channels=8, num_res_blocks=1, global_batch_size=32, compile='off', wandb='disabled')
    small |= dict(ckpt_dir=str(tmp_path), data_dir=str(tmp_path))
    return lambda **settings: main.build(Config(**PRESETS['cifar10'] | small | settings))


def watched_step(pretend_cuda, trainer) -> None:
    """Two training steps: in the first the optimizer makes its state, and in the second a sync is an error."""
    steps = trainer.batches.steps(trainer.step)
    trainer.train_step(next(steps))
    pretend_cuda.watching = True
    trainer.train_step(next(steps))
    pretend_cuda.watching = False


@pytest.mark.parametrize(
    ('time_sampler', 'precision'), [('uniform', 'float32'), ('logit_normal', 'bfloat16'), ('log_normal', 'bfloat16')]
)
def test_a_step_on_the_gpu_waits_for_nothing(pretend_cuda, build, time_sampler, precision):
    """No CPU-GPU sync, and at most one copy, which moves the indices of the images."""
    watched_step(pretend_cuda, build(time_sampler=time_sampler, precision=precision))
    assert len(pretend_cuda.trained) > 50 and {p.device for p in pretend_cuda.trained} == {torch.device('cuda', 0)}
    assert pretend_cuda.precisions == {getattr(torch, precision)}
    assert sum(pretend_cuda.copies.values()) <= 1, pretend_cuda.copies


OTHER_SETTINGS = [
    dict(network='dit', dit_depth=2, dit_width=32, dit_heads=2),
    dict(network='mlp'),
    dict(optimizer='muon'),
    dict(accumulation_steps=2),
    dict(stratified=False, antithetic=True, ema_decays=()),
    dict(loss_weight='min_snr', target_type='x0', model_type='v', process_name='cosine', grad_clip_norm=0.0),
    dict(rotate_prob=0.5, translate_prob=0.5, dequantize=True),
]


@pytest.mark.parametrize('settings', slow_but(OTHER_SETTINGS[:2], OTHER_SETTINGS))
def test_a_step_of_other_settings_waits_for_nothing_either(pretend_cuda, build, settings):
    trainer = build(**settings)
    watched_step(pretend_cuda, trainer)
    assert trainer.step == 2 and {p.device for p in pretend_cuda.trained} == {torch.device('cuda', 0)}
    assert sum(pretend_cuda.copies.values()) <= 1, pretend_cuda.copies


@pytest.mark.parametrize('solver', ['adams', 'sde_dpmpp_2m'])
def test_drawing_samples_waits_for_nothing(pretend_cuda, build, solver):
    """From noise to the last step, with guidance, Python never waits for the GPU."""
    trainer = build(guidance_scale=2.0, num_sample_steps=4)
    inputs = trainer.sample_inputs(8)
    model_fn = trainer.get_model_fn(trainer.network)
    pretend_cuda.watching = True
    x0 = trainer.draw(model_fn, inputs, solver)
    pretend_cuda.watching = False
    assert x0.shape == (8, 3, 32, 32) and x0.device == torch.device('cuda', 0) and not pretend_cuda.copies


def test_only_weights_of_four_dimensions_are_in_channels_last_order(pretend_cuda, build):
    trainer = build()
    weights = [p for p in trainer.network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert len(weights) > 5 and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
