"""DistributedDataParallel around the loss. Inside it the networks are plain modules, so that forward-mode derivatives,
several calls and a second network work on any number of processes as on one."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import ranks


class Loss(nn.Module):
    """A loss as a module: `forward(batch)` is `loss_fn(batch)`, which uses `modules`."""

    def __init__(self, modules: dict[str, nn.Module], loss_fn: Callable[[Any], Tensor]):
        super().__init__()
        self.trained, self.loss_fn = nn.ModuleDict(modules), loss_fn

    def forward(self, batch: Any) -> Tensor:
        losses = self.loss_fn(batch)
        if losses.shape != batch.t.shape:
            shapes = f'shape {tuple(batch.t.shape)}, not {tuple(losses.shape)}'
            raise ValueError(f'loss_fn must return one loss per image, {shapes}')
        return losses


class ParallelLoss:
    """`losses(batch)` is the loss of each image, (B,), whose backward pass averages gradients over the processes.

    `modules`: all that `loss_fn` uses. `example`: a batch like those of training.
    """

    def __init__(self, modules: dict[str, nn.Module], loss_fn: Callable[[Any], Tensor], example: Any):
        self.losses: Loss | DistributedDataParallel = Loss(modules, loss_fn)
        if ranks.world_size() > 1:
            device = example.x0.device
            # one of several modules need not take part in every step; a part of one module may not be used at all
            unused = len(modules) > 1 or has_unused(modules, loss_fn(example))
            self.losses = DistributedDataParallel(
                self.losses,
                # the local rank: the global one does not exist as a device on the second node
                device_ids=[device.index] if device.type == 'cuda' else None,
                gradient_as_bucket_view=True,
                find_unused_parameters=unused,
            )

    @staticmethod
    def before_begin(batch: Any, average: bool = True) -> Tensor:
        """Stands in for the loss until the networks are there."""
        raise RuntimeError('this trainer has no networks yet: call begin(), as main.build does')

    def __call__(self, batch: Any, average: bool = True) -> Tensor:
        """(B,). `average`: whether the backward pass averages the gradients, or leaves that to a later one."""
        with contextlib.nullcontext() if average or isinstance(self.losses, Loss) else self.losses.no_sync():
            return self.losses(batch)


def has_unused(modules: dict[str, nn.Module], losses: Tensor) -> bool:
    """Whether losses (B,) leave out parameters that are to be trained, such as those of a second output of the network:
    DistributedDataParallel would wait for their gradients."""
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    return any(g is None for g in torch.autograd.grad(losses.mean(), parameters, allow_unused=True))
