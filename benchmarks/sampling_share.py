"""Measures the share of sampling that is spent outside of the network, and the cost of guidance.

    python benchmarks/sampling_share.py

A fresh UNet of the digits preset, 128 samples by 20 evaluations; all samplers in turn. The network is timed inside of
each call (on a GPU, waits for it count as its time). With guidance each evaluation is one call with twice the batch.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaved import in_turn, ratio, write

from config import Config
from main import build

SAMPLES, ROUNDS = 128, 9
SAMPLERS: dict[str, dict[str, Any]] = {
    'adams': dict(solver='adams'),
    'heun': dict(solver='heun', num_steps=10),
    'dpmpp_2m': dict(solver='dpmpp_2m', time_grid='log_snr'),
    'sde_dpmpp_2m': dict(solver='sde_dpmpp_2m'),
    'adams, guidance 2': dict(solver='adams', guidance_scale=2.0),
}


class Timed:
    """A model function that adds up its seconds and calls."""

    def __init__(self, model_fn: Callable):
        self.model_fn, self.seconds, self.calls = model_fn, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        out = self.model_fn(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        self.calls += 1
        return out


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Config(label_dropout=0.1, ckpt_dir=folder, experiment_name='sampling', wandb='disabled')
        trainer = build(config)
    inputs = trainer.sample_inputs(SAMPLES)
    networks = {name: Timed(trainer.get_model_fn(trainer.network)) for name in SAMPLERS}

    def draw(name: str, settings: dict[str, Any]) -> Callable[[], None]:
        def once() -> None:
            with torch.no_grad():
                trainer.draw(networks[name], inputs, **settings)

        return once

    draws = {name: draw(name, settings) for name, settings in SAMPLERS.items()}
    for once in draws.values():
        once()
    calls = {}
    for name, network in networks.items():
        calls[name] = network.calls
        network.seconds, network.calls = 0.0, 0
    times = in_turn(draws, ROUNDS, warm_up=0)
    rows = []
    print('| sampler | calls | ms | share outside of the network | times as long as adams |\n|---|---|---|---|---|')
    for name, network in networks.items():
        share = 1 - network.seconds / sum(times[name])
        relative = 1 / ratio(times, of=name, to='adams')
        rows.append(dict(way=name, calls=calls[name], ms=1000 * median(times[name]), outside=share, relative=relative))
        print(f'| {name} | {calls[name]} | {rows[-1]["ms"]:.0f} | {share:.1%} | {relative:.2f} |')
    write('sampling_share', rows)


if __name__ == '__main__':
    main()
