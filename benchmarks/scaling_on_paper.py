"""Estimates how well training would scale to many GPUs, by a formula: no GPU and no network was measured.

    python benchmarks/scaling_on_paper.py [--tflops 200] [--gpu gpu.json] [--inside 300] [--between 45] ...

With N GPUs and the same batch on each, a step takes

    T(N) = C + max(L, R(N) - B)        efficiency = C / T(N)

C   computing: FLOPs of a step, counted by torch, over the rate of a GPU
B   the backward pass, two thirds of C, during which gradients are averaged as they come
R   averaging M bytes, the gradients in float32: 2 (N - 1)/N M/W + 2 (N - 1) l by a ring, 2 M/W + 2 log2(N) l by a tree,
    whichever is less (Patarasuk and Yuan 2009; Sanders et al. 2009), with bandwidth W and latency l
L   the same for the last bucket of 25 MB, which is complete only after the backward pass: it never hides

W is the bandwidth of the links inside a machine for up to 8 GPUs, and for more the network's bandwidth per GPU. --gpu
takes the rate from the results of benchmarks/gpu.py; without it the rate is an assumption, like W and l.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import PRESETS, Config
from networks import get_network

BUCKET = 25 * 2**20
NETWORKS = {  # name -> settings, shape of an image
    'unet': (PRESETS['cifar10'], (3, 32, 32)),
    'dit': (dict(network='dit', dit_size='L', dit_depth=26), (4, 32, 32)),
}


def cost_of(name: str) -> tuple[int, float]:
    """Parameters of a network, and FLOPs per image in training. Uses tensors without values: nothing is computed."""
    settings, shape = NETWORKS[name]
    with torch.device('meta'):
        network = get_network(Config(**settings), shape, 10)
        inputs = torch.zeros(2, *shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            network(*inputs).sum().backward()
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2


def reduce_seconds(size: float, n: int, bandwidth: float, latency: float) -> float:
    """R: the lesser of ring and tree."""
    if n == 1:
        return 0.0
    ring = 2 * (n - 1) / n * size / bandwidth + 2 * (n - 1) * latency
    tree = 2 * size / bandwidth + 2 * math.log2(n) * latency
    return min(ring, tree)


def efficiency(n: int, compute: float, size: float, bandwidth: float, latency: float) -> float:
    """C / T(n). `compute` in seconds, `size` in bytes, `bandwidth` in bytes per second, `latency` in seconds."""
    whole, last = (reduce_seconds(s, n, bandwidth, latency) for s in (size, min(size, BUCKET)))
    return compute / (compute + max(last, whole - 2 / 3 * compute))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tflops', type=float, default=200.0, help='rate of a GPU in training')
    parser.add_argument('--gpu', default='', help='results of benchmarks/gpu.py')
    parser.add_argument('--inside', type=float, default=300.0, help='GB/s between the GPUs of a machine')
    parser.add_argument('--between', type=float, default=45.0, help='GB/s of the network for each GPU')
    parser.add_argument('--latency', type=float, default=10.0, help='microseconds per message')
    parser.add_argument('--batch', type=int, nargs='+', default=[16, 128], help='images per GPU in a step')
    options = parser.parse_args()
    print('| network | parameters | GFLOP per image | batch | step, ms | gradients, MB | 8 GPUs | 64 GPUs | 512 GPUs |')
    print('|---|---|---|---|---|---|---|---|---|')
    for name in NETWORKS:
        parameters, flops = cost_of(name)
        rate = options.tflops * 1e12
        if options.gpu:
            measured = json.loads(Path(options.gpu).read_text())[name]
            rate = measured[measured['best']]['images/s'] * measured['TFLOP per image'] * 1e12
        for batch in options.batch:
            compute, size = batch * flops / rate, 4.0 * parameters
            row = [
                efficiency(n, compute, size, 1e9 * (options.inside if n <= 8 else options.between),
                           1e-6 * options.latency)
                for n in (8, 64, 512)
            ]  # fmt: skip
            print(
                f'| {name} | {parameters / 1e6:.0f}M | {flops / 1e9:.0f} | {batch} | {1e3 * compute:.1f} '
                f'| {size / 1e6:.0f} | {" | ".join(f"{value:.0%}" for value in row)} |'
            )


if __name__ == '__main__':
    main()
