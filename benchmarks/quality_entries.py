"""The networks that quality.py compares: ours and three other repos', with their calls and optimizers."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from networks.transformer import DiT
from unet import UNet

FOLDER = os.environ.get('QUALITY_DATA', '')  # a folder of images; '': Fashion-MNIST
SHAPE = (3, 32, 32) if FOLDER else (1, 28, 28)


def torchcfm(num_classes: int) -> nn.Module:
    from torchcfm.models.unet import UNetModel

    settings: Any = dict(num_res_blocks=1, channel_mult=(1, 2, 2), attention_resolutions='4')
    settings |= dict(num_classes=num_classes, class_cond=True) if num_classes else {}
    return UNetModel(SHAPE, num_channels=32, **settings)


def diffusers(num_classes: int) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SHAPE[-1], in_channels=SHAPE[0], out_channels=SHAPE[0], layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64, 64), num_class_embeds=num_classes or None,
        down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'),
    )  # fmt: skip


def lucidrains(num_classes: int) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(24, dim_mults=(1, 2, 4), channels=SHAPE[0])


def ours(num_classes: int) -> nn.Module:
    return UNet(SHAPE, num_classes, 32, (1, 2, 2), 1, attention_resolutions=(SHAPE[-1] // 4,))


def our_dit(num_classes: int) -> nn.Module:
    return DiT(SHAPE, num_classes, depth=4, width=128, heads=4)


class Entry(NamedTuple):
    """A network, a function that calls it with xt, time in [0, 1] and label, and its optimizer."""

    make: Callable[[int], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    optimizer: str = 'adamw'
    lr: float = 1e-3
    classes: bool = False


def call_ours(net: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return net(x, 1000 * t, y)


def call_torchcfm(net: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return net(t, x, y)


def call_diffusers(net: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return net(x, 1000 * t, y).sample


def call_lucidrains(net: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return net(x, 1000 * t)


MUON: dict[str, Any] = dict(optimizer='muon', lr=4e-3)
ENTRIES = {
    'ours': Entry(ours, call_ours),
    'torchcfm': Entry(torchcfm, call_torchcfm),
    'ours, Muon': Entry(ours, call_ours, **MUON),
    'diffusers': Entry(diffusers, call_diffusers),
    'lucidrains': Entry(lucidrains, call_lucidrains),
    'our DiT': Entry(our_dit, call_ours),
    'our DiT, Muon': Entry(our_dit, call_ours, **MUON),
    'torchcfm, our Muon': Entry(torchcfm, call_torchcfm, **MUON),
    'torchcfm, lr 2e-4 as in its example': Entry(torchcfm, call_torchcfm, lr=2e-4),
    'diffusers, lr 1e-4 as in its example': Entry(diffusers, call_diffusers, lr=1e-4),
    'lucidrains, lr 8e-5 as in its README': Entry(lucidrains, call_lucidrains, lr=8e-5),
    'ours, classes': Entry(ours, call_ours, classes=True),
    'ours, classes, Muon': Entry(ours, call_ours, classes=True, **MUON),
    'torchcfm, classes': Entry(torchcfm, call_torchcfm, classes=True),
    'diffusers, classes': Entry(diffusers, call_diffusers, classes=True),
}
