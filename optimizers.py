"""AdamW, learning-rate schedules that are pure functions of the step, and gradient clipping."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from config import Config, choose


def get_optimizer(config: Config, network: nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); only weights of two or more dimensions are decayed, so no bias and no norm gain."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=config.weight_decay),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.adam_betas, eps=config.adam_eps, fused=True)


def cosine(config: Config, step: int) -> float:
    progress = (step - config.warmup_steps) / (config.num_training_steps - config.warmup_steps)
    return config.min_lr + (config.base_lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def inverse_sqrt(config: Config, step: int) -> float:
    since = max(config.warmup_steps, 1)
    return max(config.min_lr, config.base_lr * math.sqrt(since / max(step + 1, since)))


# name -> (config, step) -> learning rate of that step once the warm-up is over; never rising.
LR_SCHEDULES: dict[str, Callable[[Config, int], float]] = {
    'constant': lambda config, step: config.base_lr,
    'cosine': cosine,
    'inverse_sqrt': inverse_sqrt,
}


def get_lr(config: Config, step: int) -> float:
    """Learning rate of step `step`, from 0: linear to base_lr over warmup_steps, then the schedule.

    Raises SettingError for an unknown `lr_schedule_type`.
    """
    after_warmup = choose('lr_schedule_type', config.lr_schedule_type, LR_SCHEDULES)
    if step < config.warmup_steps:
        return config.base_lr * (step + 1) / config.warmup_steps
    return after_warmup(config, step)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """To be called before `optimizer.step()`."""
    for group in optimizer.param_groups:
        group['lr'] = lr


def step_if(ok: Tensor, optimizer: torch.optim.AdamW) -> None:
    """`optimizer.step()` if ok, a 0-dimensional bool tensor, else nothing: weights, moments and their step counts stay.

    Decided on the device, without a CPU-GPU sync, in the way of torch.amp.GradScaler: fused AdamW reads `found_inf`.
    """
    optimizer.found_inf = (~ok).float()
    optimizer.step()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """The norm of all gradients before clipping, a 0-dimensional tensor; scales them down to max_norm unless that is 0."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
