"""Compares our UNet with networks of other repos: images/s and memory of a training step, at equal parameter counts.

    python benchmarks/networks.py

Forward and backward pass of 32 images of 3 x 32 x 32, in float32. Each network of another repo is compared with ours
with the same channel multipliers and blocks per level, and the width that makes it equally large; the two are timed in
turn, in one process. Needs the packages of benchmarks/requirements.txt.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaved import in_turn, ratio, write

from unet import UNet

BATCH, ROUNDS = 32, 7
SHAPE = (3, 32, 32)
Call = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def torchcfm(width: int, mults: tuple[int, ...], blocks: int) -> nn.Module:
    from torchcfm.models.unet import UNetModel

    settings = dict(num_res_blocks=blocks, channel_mult=mults, attention_resolutions='8')
    return UNetModel(SHAPE, num_channels=width, num_classes=10, class_cond=True, **settings)


def lucidrains(width: int, mults: tuple[int, ...], blocks: int) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    assert blocks == 2  # the only number it has
    return Unet(width, dim_mults=mults, channels=3)


def diffusers(width: int, mults: tuple[int, ...], blocks: int) -> nn.Module:
    from diffusers import UNet2DModel

    n = len(mults) - 1
    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=blocks, norm_num_groups=8,
        block_out_channels=tuple(width * m for m in mults), num_class_embeds=10,
        down_block_types=('DownBlock2D',) * n + ('AttnDownBlock2D',),
        up_block_types=('AttnUpBlock2D',) + ('UpBlock2D',) * n,
    )  # fmt: skip


# name -> (network, how it is called with xt, time in [0, 1000] and label, width, channel multipliers, blocks per level)
PEERS: dict[str, tuple[Callable[..., nn.Module], Call, int, tuple[int, ...], int]] = {
    'torchcfm': (torchcfm, lambda net, x, t, y: net(t / 1000, x, y), 64, (1, 2, 2), 1),
    'torchcfm, 2 blocks': (torchcfm, lambda net, x, t, y: net(t / 1000, x, y), 64, (1, 2, 2), 2),
    'diffusers': (diffusers, lambda net, x, t, y: net(x, t, y).sample, 64, (1, 2, 2), 1),
    'lucidrains': (lucidrains, lambda net, x, t, y: net(x, t), 48, (1, 2, 4), 2),
}


def millions(net: nn.Module) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


def as_large_as(peer: nn.Module, mults: tuple[int, ...], blocks: int) -> nn.Module:
    """Our UNet with these multipliers and blocks, and the width that makes it as large as `peer`."""
    side = 32 // 2 ** (len(mults) - 1)
    build = lambda width: UNet(SHAPE, 10, width, mults, blocks, attention_resolutions=(side,))  # noqa: E731
    with torch.device('meta'):
        width = min(range(16, 128, 2), key=lambda width: abs(millions(build(width)) - millions(peer)))
    return build(width)


def gigabytes_kept(forward: Callable[[], object]) -> float:
    """GB of tensors that a forward pass keeps for the backward pass, weights included; each memory block once."""
    blocks: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        blocks[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(blocks.values()) / 1e9


def main() -> None:
    xt, t, label = torch.randn(BATCH, *SHAPE), 1000 * torch.rand(BATCH), torch.randint(10, (BATCH,))

    def stepper(net: nn.Module, call: Call) -> Callable[[], None]:
        def step() -> None:
            call(net, xt, t, label).square().mean().backward()
            net.zero_grad(set_to_none=True)

        return step

    rows = []
    print('| peer / ours | millions of parameters | images/s | GB kept for backward | images/s, ours over peer |')
    print('|---|---|---|---|---|')
    for name, (build, call, width, mults, blocks) in PEERS.items():
        try:
            peer = build(width, mults, blocks)
        except ImportError as error:
            print(f'| {name} | left out: {error} |', flush=True)
            continue
        own = as_large_as(peer, mults, blocks)
        call_own: Call = lambda net, x, t, y: net(x, t, y)  # noqa: E731
        steps = {'peer': stepper(peer, call), 'ours': stepper(own, call_own)}
        kept = [gigabytes_kept(lambda n=n, c=c: c(n, xt, t, label)) for n, c in ((peer, call), (own, call_own))]
        times = in_turn(steps, ROUNDS, warm_up=1)
        speed = {which: BATCH / median(all_) for which, all_ in times.items()}
        row = dict(peer=name, millions=[millions(peer), millions(own)], images_per_second=list(speed.values()))
        rows.append(row | dict(gigabytes=kept, ratio=ratio(times, of='ours', to='peer')))
        pairs = [' / '.join(f'{value:.3g}' for value in rows[-1][key]) for key in [*list(row)[1:], 'gigabytes']]
        print(f'| {name}, {mults} x {blocks} | {" | ".join(pairs)} | {rows[-1]["ratio"]:.2f} |', flush=True)
    write('networks', rows)


if __name__ == '__main__':
    main()
