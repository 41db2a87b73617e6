"""Measures the cost of the training loop on top of the network: images/s of `train_step` over images/s of a bare loop.

    python benchmarks/loop.py

The bare loop has the same network, precision, compiling and optimizer, and its data as tensors in memory. It does only
what every training needs: noise, times, forward, squared error, backward, clipping, a step, and moving averages by one
foreach call. Both train in turn, some steps each, in one process.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaved import in_turn, ratio, write

from config import PRESETS, Config, SettingError
from main import build
from optimizers import get_optimizer
from training.calling import Caller

ROUNDS = 15
# name -> (settings, steps before the other loop's turn)
CASES: dict[str, tuple[dict, int]] = {
    'digits, UNet': (PRESETS['digits'], 4),
    'digits_long, UNet by AdamW': (PRESETS['digits_long'], 4),
    'digits, DiT': (PRESETS['digits_dit'], 4),
    'fashion_mnist, UNet': (PRESETS['fashion_mnist'], 1),
    'points in the plane, MLP': (PRESETS['toy2d'], 50),
}


def bare_step(c: Config, caller: Caller, network: nn.Module, data: Tensor, labels: Tensor) -> Callable[[], None]:
    """A step of the bare loop, on a copy of the network. `data` is x0 of all images (N, ...), on its device."""
    network, average = copy.deepcopy(network), copy.deepcopy(network)
    parameters, averaged = list(network.parameters()), list(average.requires_grad_(False).parameters())
    optimizer, model_fn = get_optimizer(c, network), caller(network, train=True)

    def step() -> None:
        index = torch.randint(len(data), (c.global_batch_size,), device=data.device)
        x0, label = data[index], labels[index]
        x1, t = torch.randn_like(x0), torch.rand(len(x0), device=x0.device)
        w = t.reshape(-1, *[1] * (x0.ndim - 1))
        (model_fn((1 - w) * x0 + w * x1, t, label) - (x1 - x0)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - c.ema_decays[0])  # pyright: ignore[reportPrivateImportUsage]

    return step


def repeat(step: Callable[[], object], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def main() -> None:
    rows = []
    print('| case | bare loop, ms/step | ours, ms/step | images/s, ours / bare |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, (settings, steps)) in enumerate(CASES.items()):
            try:
                trainer = build(Config(**settings, ckpt_dir=folder, wandb='disabled', experiment_name=f'loop{i}'))
            except SettingError as error:  # the data are missing
                print(f'| {name} | left out: {str(error).splitlines()[0]} |', flush=True)
                continue
            images, labels = (part.to(trainer.device) for part in trainer.train_loader.everything()[:2])
            bare = bare_step(trainer.config, trainer.caller, trainer.network, trainer.encode(images), labels)
            micro_batches = trainer.batches.steps(0)
            loops = {'bare': bare, 'ours': lambda t=trainer, m=micro_batches: t.train_step(next(m))}
            times = in_turn({which: repeat(step, steps) for which, step in loops.items()}, ROUNDS)
            bare, ours = (1000 * median(times[which]) / steps for which in ('bare', 'ours'))
            rows.append(dict(case=name, bare_ms=bare, ours_ms=ours, ratio=ratio(times, of='ours', to='bare')))
            print(f'| {name} | {bare:.2f} | {ours:.2f} | {rows[-1]["ratio"]:.3f} |', flush=True)
    write('loop', rows)


if __name__ == '__main__':
    main()
