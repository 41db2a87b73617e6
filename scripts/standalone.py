"""Draws samples of the network in this folder; needs only torch and safetensors.

    python sample.py --num 20 --labels 3,5 --guidance 2 --steps 20 --out samples

Writes samples.pt, a dict of x and label, and for images samples.png, by DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2,
with exact integrals). model.json has the network's arguments, and a row for each time: `time` and `c_in`, its inputs;
alpha and sigma of xt = alpha x0 + sigma noise, and l = log(alpha / sigma); p and q of x0 = p xt + q output.
"""

import argparse
import itertools
import json
import math
import zlib
from pathlib import Path
from struct import pack
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def load(device: str = 'cpu') -> tuple[nn.Module, SimpleNamespace]:
    """(network, model) of this folder; `model` has what model.json says."""
    folder = Path(__file__).resolve().parent
    model = SimpleNamespace(**json.loads((folder / 'model.json').read_text()))
    model.times = [SimpleNamespace(**row) for row in model.times]
    network = getattr(__import__(model.module), model.network)(**model.arguments)
    network.load_state_dict(load_file(folder / 'model.safetensors'))
    return network.to(device).eval().requires_grad_(False), model


def predict(network, model, x: Tensor, label: Tensor | None, at: SimpleNamespace, scale: float) -> Tensor:
    """x0 (B, ...) for xt (B, ...) at one of the times, with guidance of this scale (1: none)."""
    outputs = lambda label: network(at.c_in * x, x.new_full((len(x),), at.time), label)  # noqa: E731
    x0, (low, high) = at.p * x + at.q * outputs(label), model.guidance_interval
    if scale == 1 or label is None or not low <= at.t <= high:
        return x0
    guide = at.p * x + at.q * outputs(torch.full_like(label, model.arguments['num_classes']))  # it means 'no label'
    guided = guide + scale * (x0 - guide)
    if not model.guidance_rescale:
        return guided
    std, wide = (part.flatten(1).std(1, correction=0).reshape(-1, *[1] * (x.ndim - 1)) for part in (x0, guided))
    return guided * (1 + model.guidance_rescale * (torch.where(wide > 0, std / wide, 1) - 1))


@torch.no_grad()
def sample(network, model, x1: Tensor, label: Tensor | None = None, steps: int | None = None, scale=None) -> Tensor:
    """x0 (B, ...) from noise x1 (B, ...) and classes (B,); `steps` and guidance `scale` default to the run's."""
    scale, most = model.guidance_scale if scale is None else scale, len(model.times) - 1
    steps = model.steps if steps is None else steps
    if steps < 1 or most % steps:
        raise ValueError(f'steps={steps}: must divide {most}')
    if scale != 1 and (label is None or not model.has_null_class):
        raise ValueError(f'guidance={scale:g}: needs labels, and a network trained with label_dropout')
    x, past = model.times[0].sigma * x1, None
    for at, to in itertools.pairwise(model.times[:: most // steps]):
        x0, h = predict(network, model, x, label, at, scale), to.l - at.l
        if past is None and model.starts_late:  # the first time has some x0 in it
            x = x + at.alpha * x0
        mean = -math.expm1(-h) * x0
        if past is not None and h < math.inf:  # x0 is linear in l, through this prediction and the one before
            mean = mean + (h + math.expm1(-h)) / (at.l - past[0]) * (x0 - past[1])
        x, past = to.sigma / at.sigma * x + to.alpha * mean, (at.l, x0)
    return x


def png(x: Tensor) -> bytes:
    """A PNG of pixels (C, H, W) in [0, 1], where C is 1 or 3."""
    pixels = (x * 255).round().byte().permute(1, 2, 0).flatten(1)  # (H, W C)
    head = pack('>2I5B', x.shape[2], x.shape[1], 8, len(x) - 1, 0, 0, 0)
    data = zlib.compress(b''.join(b'\0' + bytes(row) for row in pixels.tolist()))
    parts = b'IHDR' + head, b'IDAT' + data, b'IEND'
    return b'\x89PNG\r\n\x1a\n' + b''.join(pack('>I', len(p) - 4) + p + pack('>I', zlib.crc32(p)) for p in parts)


def main() -> None:
    network, model = load()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(num=20, steps=model.steps, guidance=model.guidance_scale, seed=0, out='samples').items():
        parser.add_argument(f'--{name}', type=type(default), default=default)
    parser.add_argument('--labels', type=lambda text: list(map(int, text.split(','))), default=model.labels)
    o = parser.parse_args()
    if not set(o.labels) <= set(model.labels):
        parser.error(f'--labels: the classes are {model.labels}')
    x1 = torch.randn(o.num, *model.shape, generator=torch.Generator().manual_seed(o.seed))
    label = torch.tensor([o.labels[i % len(o.labels)] for i in range(o.num)]) if o.labels else None
    x = sample(network, model, x1, label, o.steps, o.guidance)
    x = ((x + 1) / 2).clamp(0, 1) if model.are_images else x
    torch.save(dict(x=x, label=label), f'{o.out}.pt')
    print(f'{o.num} samples are in {o.out}.pt')
    if model.are_images and len(model.shape) == 3 and model.shape[0] in (1, 3):
        Path(f'{o.out}.png').write_bytes(png(torch.cat(list(x), 2).repeat_interleave(4, 1).repeat_interleave(4, 2)))
        print(f'their picture is {o.out}.png')


if __name__ == '__main__':
    main()
