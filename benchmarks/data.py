"""Measure data loading in images per second: decoded in every epoch, cached, streamed from a file, resident.

    python benchmarks/data.py [--most 1000000]

JPEG files of smooth noise, 128 x 128 pixels, stand in for photographs; training sees them at 32 x 32. The larger sets
are random bytes of 3 x 32 x 32 in one file, as prepare.py writes it. All variants are timed in turn, in one process,
in batches of 128. Rates are medians over rounds; ratios are medians of the ratios within a round.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config
from data_loading import packed
from data_utils import setup_data_train_and_test
from runtime import ranks

REPEATS, SECONDS, FILES = 5, 1.0, 2000


def photographs(folder: Path, n: int) -> None:
    """Write n JPEG files into two folders."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f'{i % 2}' / f'{i:06d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((128, 128), Image.Resampling.BICUBIC).save(path, quality=90)


def rate(batches: Iterator) -> float:
    """Images per second of an endless loader, measured for SECONDS."""
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        images += len(next(batches)[0])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return images / (time.perf_counter() - began)


def opened(config: Config, resident: bool = True) -> Iterator:
    """Batches of the training part, after a warm-up; `resident` False: as if the data did not fit on the device."""
    with resident_if(resident):
        loader, sampler, _ = setup_data_train_and_test(config, ranks.setup())
    sampler.set_step(0)
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    return batches


def resident_if(resident: bool):
    """A context in which, unless `resident`, all data count as too large for the device."""
    from data_loading import loader

    return mock.patch.object(loader, 'fits', loader.fits if resident else lambda *_: False)


def compared(loaders: dict[str, Iterator]) -> dict[str, float]:
    """Name -> images/s, timed in turn; 'ratio': the last over the first."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(REPEATS):
        for name, batches in loaders.items():
            rates[name].append(rate(batches))
    names = list(loaders)
    ratio = median(b / a for a, b in zip(rates[names[0]], rates[names[-1]], strict=True))
    return {name: median(values) for name, values in rates.items()} | {'ratio': ratio}


def timed(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--most', type=int, default=1_000_000)
    most = parser.parse_args().most
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = Config(batch_shards=1, data_dir=str(folder / 'data'), image_size=(32,), wandb='disabled')
        photographs(folder / 'photographs', FILES)
        files = replace(base, dataset='image_folder', data_path=str(folder / 'photographs'))
        seconds = timed(lambda: setup_data_train_and_test(files, ranks.setup()))
        loaders = {'decoded in every epoch': opened(replace(files, cache=False)), 'from the cache': opened(files)}
        results.append(dict(images=FILES, build=FILES / seconds) | compared(loaders))
        n = 1000
        while n <= most:
            path = folder / f'{n}.pt'
            x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
            packed.write(path, x, torch.zeros(n, dtype=torch.int64), held_out=n // 10)
            del x
            config = replace(base, dataset='arrays', data_path=str(path))
            loaders = {'streamed': opened(config, resident=False), 'on the device': opened(config)}
            results.append(dict(images=n) | compared(loaders))
            del loaders
            path.unlink()
            n *= 10
    first = results[0]
    print(
        f'\n{FILES} JPEG files: the cache is built at {first["build"]:.0f} images/s; decoding in every epoch reaches '
        f'{first["decoded in every epoch"]:.0f} images/s, the cache {first["from the cache"]:.0f}, '
        f'ratio {first["ratio"]:.0f}\n\n'
        f'| images | streamed (images/s) | on the device (images/s) | ratio |\n|---|---|---|---|'
    )
    for line in results[1:]:
        print(f'| {line["images"]:,} | {line["streamed"]:,.0f} | {line["on the device"]:,.0f} | {line["ratio"]:.1f} |')
    Path(__file__).with_name('data.json').write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
