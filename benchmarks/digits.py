"""Compare training time and samples on digits: our digits preset and torchcfm's class-conditional UNet and loop.

    python benchmarks/digits.py [--seeds 5] [--peer_seeds 5]

The two train alternately, seed by seed, on the same 1500 images. Ours is the unchanged preset, with the trainer's own
steps. torchcfm's is the loop of its conditional MNIST example (I-CFM with sigma 0, Adam at 1e-3, 32 channels, 1 block,
batches of 128), 1500 steps, and 50 Euler steps to sample. 1000 samples of each are compared with the data
(evaluation/distances.py). Seconds are training time only. Needs torchcfm (benchmarks/requirements.txt) and an otherwise
idle machine.
"""

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaved import write

from config import Config
from evaluation.detectors import support_vectors
from evaluation.distances import compare
from main import build

PEER_STEPS, BATCH, SAMPLES = 1500, 128, 1000
BARS = dict(label_agreement=0.985, frechet=0.25, nearest_neighbour_ratio=0.9)


def ours(seed: int, folder: str) -> tuple[float, dict[str, float]]:
    trainer = build(Config(seed=seed, ckpt_dir=folder, experiment_name=f'seed{seed}', wandb='disabled'))
    steps, began = trainer.batches.steps(0), time.perf_counter()
    for _ in range(trainer.config.num_training_steps):
        trainer.train_step(next(steps))
    seconds = time.perf_counter() - began
    sampler, network = next(iter(trainer.samplers().values())), next(iter(trainer.weights().values()))
    inputs = trainer.sample_inputs(SAMPLES)
    return seconds, trainer.sample_metrics(trainer.drawing.samples(sampler, network, inputs), inputs)


def torchcfm(seed: int, folder: str) -> tuple[float, dict[str, float]]:
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel

    data = build(Config(ckpt_dir=folder, experiment_name='data', wandb='disabled'))
    (images, labels, *_), (held_out, *_) = data.train_loader.everything(), data.test_loader.everything()
    torch.manual_seed(seed)
    shape = dict(num_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions='4')
    network = UNetModel((1, 8, 8), **shape, num_classes=10, class_cond=True)
    matcher, optimizer = ConditionalFlowMatcher(sigma=0.0), torch.optim.Adam(network.parameters(), 1e-3)
    began, x1 = time.perf_counter(), 2 * images - 1
    for _ in range(PEER_STEPS):
        chosen = torch.randint(len(x1), (BATCH,))
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn(BATCH, 1, 8, 8), x1[chosen])
        loss = (network(t, xt, labels[chosen]) - ut).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    x, label = torch.randn(SAMPLES, 1, 8, 8), torch.arange(SAMPLES) % 10
    network.eval()
    with torch.no_grad():
        for i in range(50):
            x = x + network(torch.full((SAMPLES,), i / 50), x, label) / 50
    x = decoded(x)
    agreement = float((support_vectors(images, labels)(x) == label).float().mean())
    return seconds, compare(*(2 * y.flatten(1) - 1 for y in (x, images, held_out))) | dict(label_agreement=agreement)


def decoded(x: Tensor) -> Tensor:
    return ((x + 1) / 2).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--peer_seeds', type=int, default=5)
    args = parser.parse_args()
    if args.peer_seeds:
        importlib.import_module('torchcfm')  # if it is missing, fail now and not after minutes of training
    rows = []
    methods: list[tuple[str, Callable, int]] = [('ours', ours, args.seeds), ('torchcfm', torchcfm, args.peer_seeds)]
    print(f'| seed | which | seconds | {" | ".join(BARS)} |\n|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name, train, seeds in methods:
                if seed < seeds:
                    seconds, metrics = train(seed, folder)
                    row = dict(seed=seed, which=name, seconds=seconds) | {key: metrics[key] for key in BARS}
                    rows.append(row)
                    print(f'| {" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())} |')
    for name, _, _ in methods:
        own_rows = [row for row in rows if row['which'] == name]
        if own_rows:
            passed = sum(
                row['label_agreement'] >= BARS['label_agreement']
                and row['frechet'] <= BARS['frechet']
                and row['nearest_neighbour_ratio'] >= BARS['nearest_neighbour_ratio']
                for row in own_rows
            )
            seconds = median(row['seconds'] for row in own_rows)
            print(f'{name}: median {seconds:.1f} s; {passed} of {len(own_rows)} runs reach all thresholds')
    write('digits', rows)


if __name__ == '__main__':
    main()
