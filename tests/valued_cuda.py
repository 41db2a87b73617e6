"""A pretended GPU that holds values: tensors that say they are on cuda:0 and compute on the CPU.

Mixing devices is an error where CUDA makes it one. So evaluation, sampling, pictures and numbers can be run on a
machine without a GPU, and give what they give on the CPU. The backward pass is not among what can be run.
"""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device('cuda', 0)
BETWEEN_DEVICES = ('_to_copy', 'copy_', '_foreach_copy_', 'set_')  # may mix tensors of both devices
TAKE_INDICES = ('index', 'index_put', 'index_put_', '_unsafe_index', '_index_put_impl_')  # also takes CPU tensors
ANSWERS = dict(
    is_available=True,
    device_count=1,
    current_device=0,
    is_bf16_supported=False,
    is_current_stream_capturing=False,
    mem_get_info=(10**10, 10**10),
    max_memory_allocated=10**9,
    synchronize=None,
    empty_cache=None,
    manual_seed_all=None,
    _lazy_init=None,
)


class OnCuda(torch.Tensor):
    """A tensor that claims to be on cuda:0; its real values are in `values`."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False) -> 'OnCuda':
        values = values.values if isinstance(values, OnCuda) else values.detach()
        shape = dict(strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), device=CUDA, requires_grad=requires_grad, **shape
        )
        tensor.values = values
        return tensor

    def tolist(self) -> Any:
        return self.values.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == 'cuda'


def refuse_two_devices(name: str, args: Any, there: list[OnCuda], here: list[torch.Tensor]) -> None:
    """Raise RuntimeError where CUDA would: only 0-dimensional tensors and indices may be on the CPU."""
    here = [x for x in here if x.ndim > 0]
    if name in TAKE_INDICES and isinstance(args[0], OnCuda):
        here = [x for x in here if x.dtype not in (torch.int64, torch.bool, torch.uint8)]
    if here or (name in (*TAKE_INDICES, 'gather', 'index_select') and not isinstance(args[0], OnCuda)):
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (there, here)]
        raise RuntimeError(
            f'Expected all tensors to be on the same device: {name} of {shapes[0]} on cuda and of {shapes[1]} on cpu'
        )


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation on at least one tensor on cuda:0."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnCuda)]
    if there and name not in BETWEEN_DEVICES:
        refuse_two_devices(name, args, there, [x for x in tensors if not isinstance(x, OnCuda)])
    if name == '_local_scalar_dense':
        return args[0].values.item()
    goes_there = is_cuda(kwargs['device']) if kwargs.get('device') is not None else bool(there)
    if name in ('copy_', '_foreach_copy_'):
        goes_there = isinstance(tree_leaves(args[0])[0], OnCuda)
    here: dict[str, Any] = dict(device=torch.device('cpu'), pin_memory=False, non_blocking=False)
    kwargs = {k: here[k] if k in here and value is not None else value for k, value in kwargs.items()}
    found = func(*tree_map_only(OnCuda, lambda x: x.values, args), **tree_map_only(OnCuda, lambda x: x.values, kwargs))
    if not goes_there:
        return found
    known = {id(x.values): x for x in there}  # a tensor that is changed in place stays the same tensor
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnCuda(x), found)


class ValuedCuda(TorchDispatchMode):
    """Sends operations on cuda:0 to `computed`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == '_pin_memory':
            return args[0].clone()
        if name == 'is_pinned':
            return False
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, OnCuda) or (isinstance(x, torch.device) and x.type == 'cuda') for x in leaves):
            return computed(func, args, kwargs)
        return func(*args, **kwargs)


@pytest.fixture
def valued_cuda(monkeypatch):
    """Tensors that this test makes are on the pretended GPU."""
    from runtime import ranks

    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._ensureCUDADeviceGuardSet()
    for name, answer in ANSWERS.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    tensor = torch.tensor

    def on_device(data, *args, device=None, **kwargs):  # it looks for a real device before any mode can answer
        made = tensor(data, *args, **kwargs)
        return OnCuda(made) if is_cuda(device) else made

    monkeypatch.setattr(torch, 'tensor', on_device)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self, *args: self.clone())
    monkeypatch.setattr(ranks, 'setup', lambda: CUDA)
    with ValuedCuda(), sdpa_kernel(SDPBackend.MATH):
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
