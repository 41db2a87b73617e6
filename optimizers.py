"""Muon, AdamW and torch's optimizers, learning-rate schedules that are pure functions of the step, and clipping."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, choose

copy_, mul_, add_ = torch._foreach_copy_, torch._foreach_mul_, torch._foreach_add_  # pyright: ignore
FUSED_DEVICES = ('cuda', 'cpu', 'mps', 'xpu')  # devices for which torch has a fused AdamW


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter 2019), without the wrappers around its methods. These import torch._dynamo,
    which takes two of the six seconds that a run needs to start, and only help to torch.compile the optimizer."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the groups of parameters with `orthogonal=True`, AdamW for all others.

    The momentum of a weight, flattened to a matrix (outputs, inputs), is replaced by the nearest orthogonal matrix: all
    its singular values become about 1. An update of shape (a, b) is scaled by 0.2 sqrt(max(a, b)), to the size of
    AdamW's, so that both have one learning rate and weight decay (Liu et al. 2025, eq. 4).
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group['params'] if group['orthogonal'] else ():
                if p.grad is not None:
                    by_shape.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for shape, weights in by_shape.items():
                self.move(weights, shape, group)
                for p in weights:
                    p.grad = None  # so that AdamW skips them
        super().step()

    def move(self, weights: list[Tensor], shape: tuple[int, ...], group: dict) -> None:
        """One step of weights that all flatten to matrices of this shape."""
        bad = getattr(self, 'found_inf', None)  # set by step_if: a bad step changes nothing, without a CPU-GPU sync
        ok: Tensor | float = 1.0 if bad is None else 1.0 - bad
        gradients = torch.stack([p.grad.reshape(shape) for p in weights if p.grad is not None])
        if bad is not None:
            gradients = torch.where(bad > 0, 0.0, gradients)
        for p in weights:
            if 'momentum' not in self.state[p]:  # AdamW expects a 'step' in every state it loads
                self.state[p] |= dict(momentum=p.new_zeros(shape), step=torch.zeros(()))
        momenta = [self.state[p]['momentum'] for p in weights]
        new = torch.stack(momenta).lerp(gradients, (1 - self.momentum) * ok)  # pyright: ignore[reportArgumentType]
        copy_(momenta, new.unbind())
        size = 0.2 * max(shape) ** 0.5
        updates = orthogonal(gradients.lerp(new, self.momentum)) * (-size * group['lr'] * ok)  # Nesterov momentum
        mul_(weights, 1 - group['lr'] * group['weight_decay'] * ok)
        add_(weights, [update.view_as(p) for p, update in zip(weights, updates.unbind(), strict=True)])


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V' for each matrix U S V' of (n, a, b): its singular values lie between about 0.7 and 1.2, except where
    they were many times smaller than the largest.

    Each step applies the odd polynomial p(S) = 3.4445 S - 4.775 S^3 + 2.0315 S^5 to the singular values, by matrix
    products (Jordan et al. 2024). On a GPU, bfloat16 is precise enough; complex matrices keep their type.
    """
    x = matrices.bfloat16() if matrices.is_cuda and not matrices.is_complex() else matrices
    x = x.mH if x.shape[-2] > x.shape[-1] else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    for _ in range(steps):
        xx = x @ x.mH
        polynomial = torch.baddbmm(xx, xx, xx, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mH if matrices.shape[-2] > matrices.shape[-1] else x).to(matrices.dtype)


# name -> (groups of parameters, lr, and what it has of betas, eps, momentum, fused) -> optimizer. Three of torch's are
# left out: LBFGS computes the loss several times in a step, SparseAdam needs sparse gradients, and Rprop reads the
# learning rate in its first step only.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    'adamw': AdamW,
    'muon': Muon,
    'adadelta': torch.optim.Adadelta,
    'adafactor': torch.optim.Adafactor,
    'adagrad': torch.optim.Adagrad,
    'adam': torch.optim.Adam,
    'adamax': torch.optim.Adamax,
    'asgd': torch.optim.ASGD,
    'nadam': torch.optim.NAdam,
    'radam': torch.optim.RAdam,
    'rmsprop': torch.optim.RMSprop,
    'sgd': torch.optim.SGD,
}


def get_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer `config.optimizer` for `network`, Adam's kin fused on devices that have it. Raises SettingError.

    It gets the arguments that it knows. `momentum` (SGD, RMSprop) is the first of adam_betas; `eps` is given to those
    that have betas, and weight decay is decoupled where torch has it. Weights of two or more dimensions are decayed;
    biases and norm gains are not. Muon makes the updates of the same weights orthogonal, except embedding tables, whose
    rows are looked up one by one: they are treated like biases.
    """
    optimizer = choose('optimizer', config.optimizer, OPTIMIZERS)
    tables = {id(m.weight) for m in network.modules() if optimizer is Muon and isinstance(m, nn.Embedding)}
    groups: list[dict] = [
        dict(params=[], weight_decay=config.weight_decay, orthogonal=optimizer is Muon),
        dict(params=[], weight_decay=0.0, orthogonal=False),
    ]
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in parameters:
        groups[p.ndim < 2 or id(p) in tables]['params'].append(p)  # True: the second group, without decay
    fused = all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in parameters)
    given: dict[str, Any] = dict(betas=config.adam_betas, momentum=config.adam_betas[0], decoupled_weight_decay=True)
    known = inspect.signature(optimizer).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if 'betas' in known or takes_all:
        given |= dict(eps=config.adam_eps, fused=fused)
    if takes_all:  # a class of your own: what Adam has
        given = {name: given[name] for name in ('betas', 'eps', 'fused')}
    return optimizer(groups, lr=config.base_lr, **{name: x for name, x in given.items() if takes_all or name in known})


def falling(config: Config, step: int, shape: Callable[[float], float]) -> float:
    """From base_lr to min_lr, by a `shape` that goes from 1 to 0 as its argument goes from 0 to 1."""
    progress = min(1.0, (step - config.warmup_steps) / (config.num_training_steps - config.warmup_steps))
    return config.min_lr + (config.base_lr - config.min_lr) * shape(progress)


def inverse_sqrt(config: Config, step: int) -> float:
    since = max(config.warmup_steps, 1)
    return max(config.min_lr, config.base_lr * math.sqrt(since / max(step + 1, since)))


# name -> (config, step) -> learning rate of that step once the warm-up is over
LR_SCHEDULES: dict[str, Callable[[Config, int], float]] = {
    'constant': lambda config, step: config.base_lr,
    'cosine': lambda config, step: falling(config, step, lambda x: (1 + math.cos(math.pi * x)) / 2),
    'inverse_sqrt': inverse_sqrt,
    'linear': lambda config, step: falling(config, step, lambda x: 1 - x),
    # warm-up, stable, decay: constant, then linear over the last fifth of the steps after the warm-up (Hu et al. 2024)
    'wsd': lambda config, step: falling(config, step, lambda x: min(1.0, 5 * (1 - x))),
}


def get_lr(config: Config, step: int) -> float:
    """Learning rate of `step`, from 0: linear to base_lr over warmup_steps, then the schedule. Raises SettingError."""
    after_warmup = choose('lr_schedule_type', config.lr_schedule_type, LR_SCHEDULES)
    if step < config.warmup_steps:
        return config.base_lr * (step + 1) / config.warmup_steps
    return after_warmup(config, step)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], config: Config, step: int) -> float:
    """Set the learning rates of step `step`, before it is taken; returns `get_lr`.

    A group that was built with another learning rate than base_lr follows the same curve, scaled to its own rate. That
    rate is kept as `initial_lr` in the group, and so in checkpoints.
    """
    lr = get_lr(config, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * (group.setdefault('initial_lr', group['lr']) / config.base_lr)
    return lr


def step_if(ok: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if ok, a 0-dimensional bool tensor, else nothing: weights, moments and their step counts stay.

    On a GPU, fused Adam and Muon skip by the flag that torch.amp.GradScaler uses, without a CPU-GPU sync. Others ignore
    the flag (RMSprop, torch's Muon), refuse it (all with foreach), or use uninitialised momentum if their first step
    was skipped (fused SGD).
    """
    knows_flag = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, AdamW, Muon)
    if ok.device.type != 'cpu' and knows_flag and all(group.get('fused') for group in optimizer.param_groups):
        optimizer.found_inf = (~ok).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        delattr(optimizer, 'found_inf')  # else the next plain step() would obey it too
    elif ok:  # CPU-GPU sync
        optimizer.step()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a joint norm of at most max_norm, unless that is 0. Returns the norm before, a
    0-dimensional tensor."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def trained_parameters(
    modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, list[nn.Parameter]]:
    """The parameters of each optimizer. Sets frozen modules to eval mode: no dropout, no batch statistics.

    Raises ValueError for a parameter that two optimizers or none update, or that is in no module, where it would not be
    saved and averaged over the processes.
    """
    for module in modules.values():
        if not any(p.requires_grad for p in module.parameters()):
            module.eval()
    moved = {name: [p for g in optimizer.param_groups for p in g['params']] for name, optimizer in optimizers.items()}
    owner: dict[int, str] = {}
    known = {id(p) for module in modules.values() for p in module.parameters()}
    for name, parameters in moved.items():
        for p in parameters:
            shape = tuple(p.shape)
            if id(p) not in known:
                raise ValueError(
                    f'optimizers[{name!r}] updates a parameter of shape {shape} that is in no module. Put its module '
                    'into self.modules (for a single parameter: torch.nn.ParameterList([p])).'
                )
            if owner.setdefault(id(p), name) != name:
                raise ValueError(f'optimizers {owner[id(p)]!r} and {name!r} update the same parameter of shape {shape}')
    for name, module in modules.items():
        left = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in owner]
        if left:
            raise ValueError(
                f'modules[{name!r}]: no optimizer updates {", ".join(left[:3])}. Put one into self.optimizers, or call '
                'requires_grad_(False) on the module.'
            )
    return moved
