"""DistributedDataParallel around the loss, and not around the network.

Inside it the networks are plain modules, so that forward-mode derivatives, several calls and a second network work on
any number of processes as on one.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import ranks


class Losses(nn.Module):
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


class Parallel:
    """`parallel(batch)` is the loss of each image, (B,), whose backward pass averages gradients over the processes.

    `trainer` is a BaseDiffusionTrainer, and `model_fn` its network as the loss calls it in training.
    """

    def __init__(self, trainer: Any, model_fn: Callable[..., Any]):
        losses = Losses(trainer.modules, lambda batch: trainer.loss_fn(batch, model_fn))
        self.losses: Losses | DistributedDataParallel = losses
        device = trainer.device
        if ranks.world_size() > 1:
            # one of several modules need not take part in every step; of one, a part may have no use at all
            unused = len(trainer.modules) > 1 or has_unused(trainer)
            self.losses = DistributedDataParallel(
                losses,
                # the local rank: the global one does not exist as a device on the second node
                device_ids=[device.index] if device.type == 'cuda' else None,
                gradient_as_bucket_view=True,
                find_unused_parameters=unused,
            )

    def __call__(self, batch: Any) -> Tensor:
        return self.losses(batch)

    def sync(self, now: bool) -> contextlib.AbstractContextManager:
        """Average gradients in this backward pass, or leave that to a later one."""
        if isinstance(self.losses, DistributedDataParallel) and not now:
            return self.losses.no_sync()
        return contextlib.nullcontext()


def has_unused(trainer: Any) -> bool:
    """Whether the loss of the example leaves out parameters that are to be trained, such as those of a second output of
    the network: DistributedDataParallel would wait for their gradients."""
    parameters = [p for module in trainer.modules.values() for p in module.parameters() if p.requires_grad]
    means, trainer.means = trainer.means, type(trainer.means)(trainer.device)  # what it logs is of no step
    losses = trainer.loss_fn(trainer.example, trainer.get_model_fn(trainer.network))
    trainer.means = means
    gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)
