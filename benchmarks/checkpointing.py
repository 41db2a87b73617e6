"""Measures what --checkpointing saves and costs: bytes kept for the backward pass, and CPU time of a training step.

    OMP_NUM_THREADS=1 python benchmarks/checkpointing.py

Networks of the presets `fashion_mnist` and `cifar10` and DiT-S/2, on batches of 8. Steps with and without it are timed
in turn, in one process. The bytes are what autograd keeps between the forward and the backward pass, without
parameters.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import PRESETS, Config
from networks import get_network

ROUNDS, BATCH = 5, 8
CASES = {
    'fashion_mnist': (PRESETS['fashion_mnist'], (1, 28, 28)),
    'cifar10': (PRESETS['cifar10'], (3, 32, 32)),
    'DiT-S/2': (dict(network='dit', dit_size='S', dit_patch=2), (3, 32, 32)),
}


def loss_of(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return network(*inputs).square().mean()


def bytes_kept(step: Callable[[], torch.Tensor], network: nn.Module) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, without the parameters."""
    own, sizes = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = step()
    del loss
    return sum(sizes.values())


def main() -> None:
    print('| network | MB kept | with checkpointing | CPU time of a step |\n|---|---|---|---|')
    for name, (settings, shape) in CASES.items():
        torch.manual_seed(0)
        inputs = torch.randn(BATCH, *shape), torch.rand(BATCH), torch.randint(10, (BATCH,))
        steps, kept = {}, {}
        for on in (False, True):
            config = Config(**dict(settings) | dict(dataset='digits', wandb='disabled', checkpointing=on))
            network = get_network(config, shape, 10)
            steps[on] = partial(loss_of, network, inputs)
            kept[on] = bytes_kept(steps[on], network)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for i in range(-1, ROUNDS):
            for on in (False, True) if i % 2 else (True, False):
                began = time.process_time()
                steps[on]().backward()
                if i >= 0:
                    seconds[on].append(time.process_time() - began)
        ratio = median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
        print(f'| {name} | {kept[False] / 1e6:.0f} | {kept[True] / 1e6:.0f} | {ratio:.2f} times |', flush=True)


if __name__ == '__main__':
    main()
