"""The loops that benchmarks/gpu.py times: our trainer, a bare loop, torchcfm's loop. Without a GPU, sizes are toys."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loop import bare_step

import data_utils
import main
from config import PRESETS, Config
from training import calling

GPU = torch.cuda.is_available()
DEVICE = torch.device('cuda', 0) if GPU else torch.device('cpu')
SIZE = 8192 if GPU else 256  # rows and columns of the matrices that are multiplied
IMAGES, SIDE, BATCH = (50_000, 32, 128) if GPU else (256, 8, 16)
ROUND = 0.5 if GPU else 0.05  # seconds of training per loop and round
ROUNDS = 5 if GPU else 2
UNET = {} if GPU else dict(channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=())
DIT = dict(network='dit', dit_size='B') if GPU else dict(network='dit', dit_depth=1, dit_width=32, dit_heads=2)


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds(do: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    do()
    wait()
    return time.perf_counter() - began


def images(n: int) -> tuple[Tensor, Tensor]:
    """n smooth uint8 images in ten classes; each class has its own colour."""
    generator = torch.Generator().manual_seed(n)
    label = torch.arange(n) % 10
    small = torch.rand(n, 3, 4, 4, generator=generator) * 0.5 + torch.rand(10, 3, 1, 1, generator=generator)[label] / 2
    return (255 * nn.functional.interpolate(small, size=SIDE, mode='bilinear')).byte(), label


class Run:
    """A trainer with the cifar10 preset and the given settings, and methods that run its steps."""

    def __init__(self, folder: str, channels_last: bool = True, **settings: Any):
        defaults = PRESETS['cifar10'] | dict(global_batch_size=BATCH, wandb='disabled', compile='off', ckpt_dir=folder)
        defaults |= dict(num_training_steps=10**6, keep_every=0, geometric_prob=0.0, flip_prob=0.5) | UNET
        settings.setdefault('experiment_name', f'run{len(os.listdir(folder))}')
        load = lambda config: (images(IMAGES), images(max(64, IMAGES // 5)))  # noqa: E731
        spec = dataclasses.replace(data_utils.DATASETS['cifar10'], load=load, shape=(3, SIDE, SIDE))
        with mock.patch.dict(data_utils.DATASETS, cifar10=spec):
            self.trainer = main.build(Config(**(defaults | settings)))
        if not channels_last:
            for network in (self.trainer.network, *self.trainer.ema.networks.values()):
                network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self.micro_batches = self.trainer.batches.steps(self.trainer.step)
        self.batch = self.trainer.config.global_batch_size

    def step(self) -> None:
        self.trainer.train_step(next(self.micro_batches))

    def steps(self, n: int) -> None:
        calling.set_precision(self.trainer.config.precision)  # again: the flag is global, and other runs change it
        for _ in range(n):
            self.step()

    def loss(self) -> float:
        """The mean training loss since the last call."""
        loss = self.trainer.record.means.means()['train/loss']
        self.trainer.record.clear()
        return loss


def in_turn(sides: dict[str, Callable[[int], Any]], per_step: dict[str, int]) -> dict[str, list[float]]:
    """Name -> images/s in each round. `sides`: name -> a function that takes n steps when called with n."""
    n = {}
    for name, steps in sides.items():
        steps(3)
        n[name] = max(1, int(ROUND / (seconds(lambda s=steps: s(2)) / 2)))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, steps in sides.items():
            rates[name].append(n[name] * per_step[name] / seconds(lambda s=steps, k=n[name]: s(k)))
    return rates


def ratio(a: list[float], b: list[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))


def bare_steps(run: Run) -> Callable[[int], None]:
    """A function that takes n steps of the bare loop in loop.py, with the network of this run."""
    x = torch.rand(4 * BATCH, 3, SIDE, SIDE, device=DEVICE) * 2 - 1
    labels, trainer = torch.randint(0, 10, (len(x),), device=DEVICE), run.trainer
    step = bare_step(trainer.config, trainer.caller, trainer.network, x, labels)

    def steps(n: int) -> None:
        calling.set_precision(run.trainer.config.precision)
        for _ in range(n):
            step()

    return steps


def torchcfm_loop() -> Callable[[int], None]:
    """A function that takes n steps of torchcfm's CIFAR-10 example, with its network and images in memory: Adam,
    clipping, a moving average that is updated weight by weight, and TF32."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher  # pyright: ignore[reportMissingImports]
    from torchcfm.models.unet.unet import UNetModelWrapper  # pyright: ignore[reportMissingImports]

    shape = dict(dim=(3, SIDE, SIDE), num_res_blocks=2, num_channels=128 if GPU else 32, num_heads=4)
    shape |= dict(channel_mult=[1, 2, 2, 2] if GPU else [1, 2], num_head_channels=64, attention_resolutions='16')
    network, average = (UNetModelWrapper(**shape, dropout=0.1).to(DEVICE) for _ in range(2))
    optimizer, matcher = torch.optim.Adam(network.parameters(), lr=2e-4), ConditionalFlowMatcher(sigma=0.0)
    x = torch.rand(4 * BATCH, 3, SIDE, SIDE, device=DEVICE) * 2 - 1

    def steps(n: int) -> None:
        calling.set_precision('tf32')  # torch's default for convolutions; here for matrix products too
        for i in range(n):
            optimizer.zero_grad()
            x1 = x[i % 4 * BATCH : (i % 4 + 1) * BATCH]
            t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            (network(t, xt) - ut).square().mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for averaged, weight in zip(average.parameters(), network.parameters(), strict=True):
                    averaged.copy_(0.9999 * averaged + 0.0001 * weight)

    return steps
