"""Measures how long a save stalls training: a save in the background, and a save that waits for the disk.

    python benchmarks/saves.py

Networks of growing width are saved. Both kinds of saves are timed in turn, in one process, with real checkpoints on the
disk of the temporary folder (weights, one moving average, two moments of AdamW). The share is the stall over the time
between two saves: save_every steps of the digits preset with a UNet of that width.
"""

import functools
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from interleaved import seconds_of

from config import Config
from main import build

REPEATS = 7


def measure(channels: int, folder: str) -> None:
    config = Config(
        channels=channels, ckpt_dir=folder, experiment_name=f'channels{channels}', wandb='disabled', keep_every=0
    )
    trainer = build(config)
    steps = trainer.batches.steps(0)
    save = functools.partial(trainer.checkpoints.save, 0)
    trainer.train_step(next(steps))
    first = seconds_of(save)  # allocates the copy
    trainer.checkpoints.wait()
    stall, write, blocking, undisturbed, during_write = [], [], [], [], []
    for _ in range(REPEATS if channels < 256 else 3):
        undisturbed.append(seconds_of(lambda: trainer.train_step(next(steps))))
        stall.append(seconds_of(save))
        # the background write runs during this step, or during its first part
        during_write.append(seconds_of(lambda: trainer.train_step(next(steps))))
        write.append(seconds_of(trainer.checkpoints.wait))
        blocking.append(seconds_of(lambda: save(wait=True)))
    megabytes = (config.run_dir / 'last.pt').stat().st_size / 1e6
    waits, blocks, step = median(stall), median(blocking), median(undisturbed)
    share = waits / (config.save_every * step)
    parameters = sum(p.numel() for p in trainer.network.parameters())
    print(
        f'| {channels} | {parameters / 1e6:.1f} M | {megabytes:.0f} | {1000 * waits:.1f} | {1000 * first:.0f} '
        f'| {1000 * blocks:.0f} | {blocks / waits:.0f} | {1000 * step:.0f} | {median(during_write) / step:.2f} '
        f'| {share:.4%} |',
        flush=True,
    )


def main() -> None:
    print(
        '| channels | parameters | MB | stall (ms) | first stall (ms) | waiting for the disk (ms) | ratio '
        '| step (ms) | step during a write | share of training |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for channels in (32, 64, 128, 256):
            measure(channels, folder)


if __name__ == '__main__':
    main()
