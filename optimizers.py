"""AdamW, learning-rate schedules that are pure functions of the step, and gradient clipping."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from config import Config, choose

FUSED_DEVICES = ('cuda', 'cpu', 'mps', 'xpu')  # those for which torch has a fused AdamW


def get_optimizer(config: Config, network: nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), in one fused kernel on devices that have it.

    Only weights of two or more dimensions are decayed, so no bias and no norm gain.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=config.weight_decay),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
    ]
    fused = all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in parameters)
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.adam_betas, eps=config.adam_eps, fused=fused)


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


def set_lr(optimizers: Iterable[torch.optim.Optimizer], config: Config, step: int) -> float:
    """Set the learning rates of step `step`, before it is taken; returns `get_lr`.

    A group of parameters that was built with another learning rate than base_lr follows the same curve, scaled to its
    own: its first value is kept in the group, and so in checkpoints, as `initial_lr`.
    """
    lr = get_lr(config, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * (group.setdefault('initial_lr', group['lr']) / config.base_lr)
    return lr


def step_if(ok: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if ok, a 0-dimensional bool tensor, else nothing: weights, moments and their step counts stay.

    Fused Adam decides on the device, by the flag with which torch.amp.GradScaler skips a step; any other optimizer
    waits for the device. Many of those ignore the flag (RMSprop, Muon) or refuse it (all with foreach), and fused SGD
    with momentum, told to skip its first step, goes on from momentum that was never initialised.
    """
    fused = all(group.get('fused') for group in optimizer.param_groups)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and fused:
        optimizer.found_inf = (~ok).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        # it would decide on the next plain step() too
        del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    elif ok:  # CPU-GPU sync
        optimizer.step()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a joint norm of at most max_norm, unless that is 0.

    Returns the norm before, a 0-dimensional tensor. Collect the parameters once: a walk over a network's modules in
    every step costs more than the clipping of a small one.
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
