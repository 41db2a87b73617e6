"""The recipes that recipes.py measures: settings, and the few that need a class."""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config
from networks import NETWORKS
from networks.transformer import Attention, DiT, angles, turn
from optimizers import OPTIMIZERS
from trainer import ExampleDiffusionTrainer
from unet import sinusoid, zero_init

Settings = dict[str, Any]


class Entry(NamedTuple):
    """Settings that differ from the preset, the trainer, and whether it is run on digits, too."""

    settings: Settings
    trainer: type[ExampleDiffusionTrainer] = ExampleDiffusionTrainer
    digits: bool = True


# ---------------------------------------------------------------- learned uncertainty (docs/experiments.md)


class Uncertainty(nn.Module):
    """u(t), the log of the mean loss at time t (B,)."""

    def __init__(self):
        super().__init__()
        self.linear = zero_init(nn.Linear(64, 1))

    def forward(self, t: Tensor) -> Tensor:
        return self.linear(sinusoid(1000 * t, 64))[:, 0]


class LearnedUncertainty(ExampleDiffusionTrainer):
    """The loss divided by its learned size at each time (Karras et al. 2024, section 3.2 and appendix B.2)."""

    def setup_networks(self):
        super().setup_networks()
        self.modules['u'] = Uncertainty().to(self.device)
        self.optimizers['u'] = torch.optim.Adam(self.modules['u'].parameters(), 1e-2)

    def loss_fn(self, batch, model_fn):
        u = self.modules['u'](batch.t)
        return super().loss_fn(batch, model_fn) / u.exp() + (u if torch.is_grad_enabled() else 0)


# ---------------------------------------------------------------- SOAP


def soap(params: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2025) from the package heavyball."""
    import heavyball

    heavyball.utils.compile_mode = None
    return heavyball.SOAP([dict(group) for group in params], lr=lr, betas=betas, eps=eps, compile_step=False)


# ---------------------------------------------------------------- transformers


class Registers(DiT):
    """Four tokens more, which belong to no place (Darcet et al. 2024)."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        width = self.modulation.in_features
        self.registers = nn.Parameter(0.02 * torch.randn(1, 4, width))
        self.head = nn.Sequential(Drop(4), self.head)

    def run(self, block: nn.Module, x: Tensor, emb: Tensor, angle: Tensor) -> Tensor:
        if x.shape[1] == len(angle):
            x = torch.cat([x, self.registers.expand(len(x), -1, -1)], 1)
        return super().run(block, x, emb, F.pad(angle, (0, 0, 0, 4)))


class Drop(nn.Module):
    """Without the last n tokens of x (B, N, width)."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : -self.n]


class LearnedPositions(DiT):
    """Learned vectors in place of the sinusoids that are added to the tokens; rotations stay."""

    def __init__(self, shape: tuple[int, ...], *args: Any, **settings: Any):
        super().__init__(shape, *args, **settings)
        self.grid, width = [-(-side // self.patch) for side in shape[1:]], self.modulation.in_features
        self.positions = nn.Parameter(0.02 * torch.randn(torch.Size(self.grid).numel(), width))

    def run(self, block: nn.Module, x: Tensor, emb: Tensor, angle: Tensor) -> Tensor:
        if block is self.blocks[0]:
            place = angles(self.grid, x.shape[2] // 2, x.device)
            x = x - torch.cat([place.cos(), place.sin()], 1) + self.positions
        return super().run(block, x, emb, angle)


class PlainAttention(Attention):
    """Attention without the normalisation of queries and keys."""

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(turn(q, angle), turn(k, angle), v)
        return self.out(y.transpose(1, 2).reshape(b, n, width))


class WithoutQKNorm(DiT):
    """Plain attention in every block."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        for block in self.blocks:
            block.attention = PlainAttention(self.modulation.in_features, self.heads)


def dit(kind: type[DiT], config: Config, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return kind(shape, num_classes, config.dit_depth, config.dit_width, config.dit_heads, config.dit_patch)


def register() -> None:
    """Add the optimizer and the networks of this file to the tables of the repo."""
    OPTIMIZERS['soap'] = soap
    kinds = dict(registers=Registers, learned_positions=LearnedPositions, without_qk_norm=WithoutQKNorm)
    NETWORKS.update({name: partial(dit, kind) for name, kind in kinds.items()})


def transformer(network: str = 'dit', depth: int = 4, width: int = 128, patch: int = 2) -> Entry:
    sizes = dict(dit_depth=depth, dit_width=width, dit_heads=4, dit_patch=patch, attention_resolutions=())
    return Entry(dict(sizes, network=network), digits=False)


# ---------------------------------------------------------------- the tables, in the order of docs/recipes.md

RECIPES = {
    'the preset: Muon, cosine schedule, exponential average': Entry({}),
    "EDM's augmentation: `--geometric_prob 0.12`": Entry(dict(geometric_prob=0.12)),
    'crops: `--crop_prob 0.5`': Entry(dict(crop_prob=0.5)),
    'learned uncertainty': Entry({}, LearnedUncertainty),
    'power-function average: `--ema_type power --ema_decays 0.1`': Entry(dict(ema_type='power', ema_decays=(0.1,))),
    '`--lr_schedule_type linear`': Entry(dict(lr_schedule_type='linear')),
    '`--lr_schedule_type wsd`': Entry(dict(lr_schedule_type='wsd')),
    '`--optimizer adamw --base_lr 1e-3`': Entry(dict(optimizer='adamw', base_lr=1e-3)),
    'SOAP (heavyball), rate 3e-3': Entry(dict(optimizer='soap', base_lr=3e-3)),
    'no null class: `--label_dropout 0`': Entry(dict(label_dropout=0.0), digits=False),  # digits have none
}
TRANSFORMERS = {
    '4 blocks of width 128, patches of 2 x 2': transformer(),
    'four register tokens': transformer('registers'),
    'learned positions': transformer('learned_positions'),
    'queries and keys not normalised': transformer('without_qk_norm'),
    'patches of 4 x 4': transformer(patch=4),
    '8 blocks of width 96': transformer(depth=8, width=96),
    '2 blocks of width 192': transformer(depth=2, width=192),
}
