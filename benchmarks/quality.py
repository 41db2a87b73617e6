"""How good networks of several repos are after equal time: Fashion-MNIST, 28 x 28, without classes.

    python benchmarks/quality.py [--seconds 240]

Networks of the shapes of networks.py, each of 1.1 to 1.4 million parameters, in one and the same loop: rectified flow
with velocity output, batches of 64, AdamW at 1e-3 with 30 steps of warm-up, moving average of 0.99. They take turns of
one step, the one that has used the least time first, so that a busy machine slows all of them alike, until each has had
its seconds. Judged by the loss on 1000 held-out images (the same noise and times for all) and by 256 samples, 10
evaluations of adams, compared with the training images (evaluation/distances.py). Needs the packages of
benchmarks/requirements.txt, and Fashion-MNIST.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaved import write

from config import PRESETS, Config
from evaluation.distances import Moments, frechet
from main import build
from optimizers import AdamW
from processes import RectifiedFlow
from sampling import sample
from unet import UNet

SHAPE, BATCH, SAMPLES = (1, 28, 28), 64, 256


def torchcfm() -> nn.Module:
    from torchcfm.models.unet import UNetModel

    settings = dict(num_res_blocks=1, channel_mult=(1, 2, 2), attention_resolutions='4')
    return UNetModel(SHAPE, num_channels=32, **settings)


def diffusers() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64, 64),
        down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'),
    )  # fmt: skip


def lucidrains() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(24, dim_mults=(1, 2, 4), channels=1)


def ours() -> nn.Module:
    return UNet(SHAPE, 0, 32, (1, 2, 2), 1, attention_resolutions=(7,))


# name -> (network, how it is called with xt and time in [0, 1])
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    'ours': (ours, lambda net, x, t: net(x, t)),
    'torchcfm': (torchcfm, lambda net, x, t: net(t, x)),
    'diffusers': (diffusers, lambda net, x, t: net(x, 1000 * t).sample),
    'lucidrains': (lucidrains, lambda net, x, t: net(x, 1000 * t)),
}


def train_step(one: SimpleNamespace, x0: Tensor, rng: torch.Generator) -> None:
    began = time.perf_counter()
    x1, t = torch.randn(x0.shape, generator=rng), torch.rand(len(x0), generator=rng)
    for group in one.optimizer.param_groups:
        group['lr'] = 1e-3 * min(1, (one.steps + 1) / 30)
    loss(one.call, one.network.train(), x0, x1, t).backward()
    nn.utils.clip_grad_norm_(one.network.parameters(), 1.0)
    one.optimizer.step()
    one.optimizer.zero_grad()
    with torch.no_grad():
        for average, weight in zip(one.average.parameters(), one.network.parameters(), strict=True):
            average.lerp_(weight, 1 - min(0.99, (1 + one.steps) / (10 + one.steps)))
    one.steps += 1
    one.seconds += time.perf_counter() - began


def loss(call: Callable, network: nn.Module, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    w = t[:, None, None, None]
    return (call(network, (1 - w) * x0 + w * x1, t) - (x1 - x0)).square().mean()


@torch.no_grad()
def judged(one: SimpleNamespace, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Its average's held-out loss and the distance of its samples; images are in [0, 1]."""
    rng = torch.Generator().manual_seed(0)
    x1, u = torch.randn(held_out.shape, generator=rng), torch.rand(len(held_out), generator=rng)
    t = 0.001 + 0.998 * (torch.arange(len(held_out)) + u) / len(held_out)
    network = one.average.eval()
    parts = zip((2 * held_out - 1).split(100), x1.split(100), t.split(100), strict=True)
    held_out_loss = torch.stack([loss(one.call, network, *part) for part in parts]).mean().item()
    noise = torch.randn(SAMPLES, *SHAPE, generator=rng)
    x = torch.cat(
        [
            sample(lambda x, t, label: one.call(network, x, t), RectifiedFlow(), z, num_steps=10)
            for z in noise.split(100)
        ]
    )
    images = 2 * train[:10_000].flatten(1) - 1
    real = images[torch.randint(len(images), (len(x),), generator=torch.Generator().manual_seed(0))]
    distances = [frechet(Moments(y.cpu()), Moments(images)) for y in (x.clamp(-1, 1).flatten(1), real)]
    return dict(loss=held_out_loss, frechet=distances[0], real=distances[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--seconds', type=float, default=240)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = PRESETS['fashion_mnist'] | dict(ckpt_dir=folder, wandb='disabled')
        data = build(Config(**settings, experiment_name='data'))
    (train, *_), (held_out, *_) = data.train_loader.everything(), data.test_loader.everything()
    runs: dict[str, SimpleNamespace] = {}
    for name, (make, call) in NETWORKS.items():
        torch.manual_seed(0)
        try:
            network = make()
        except ImportError as error:
            print(f'{name}: left out: {error}', flush=True)
            continue
        optimizer = AdamW(network.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
        average = copy.deepcopy(network).requires_grad_(False)
        rngs = [torch.Generator().manual_seed(i) for i in (1, 2)]  # of batches, and of noise and times
        runs[name] = SimpleNamespace(
            network=network, average=average, call=call, optimizer=optimizer, rngs=rngs, steps=0, seconds=0.0
        )
    while (one := min(runs.values(), key=lambda run: run.seconds)).seconds < seconds:
        index = torch.randint(len(train), (BATCH,), generator=one.rngs[0])
        train_step(one, 2 * train[index] - 1, one.rngs[1])
    rows = []
    print(
        '| network | parameters, millions | steps | held-out loss | Frechet distance in pixels |\n|---|---|---|---|---|'
    )
    for name, one in runs.items():
        row = dict(name=name, millions=sum(p.numel() for p in one.network.parameters()) / 1e6, steps=one.steps)
        rows.append(row | judged(one, train, held_out))
        print('| {name} | {millions:.2f} | {steps} | {loss:.4f} | {frechet:.2f} |'.format(**rows[-1]), flush=True)
    print(f'of as many real images: {rows[0]["real"]:.2f}')
    write('quality', dict(seconds=seconds, networks=rows))


if __name__ == '__main__':
    main()
