"""Measures how much of the averaging of gradients hides behind the backward pass: two traced CPU processes, by gloo.

    python benchmarks/overlap.py [--compile] [--trace FILE]

Each process trains a UNet with one thread. In the trace of one step, averaging is the time in which a bucket of
gradients is under way, and the backward pass is the time in which autograd works. The hidden share is the part of the
averaging that happens while autograd works. Training waits for the rest: at least for the last bucket, whose gradients
come last. Buckets of 25 MB, the default of torch and of this repo, are compared with smaller ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config
from main import build
from training import calling


class SmallBuckets(DistributedDataParallel):
    """DistributedDataParallel with buckets of 3 MB."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, bucket_cap_mb=3)


KINDS = {'25_MB': DistributedDataParallel, '3_MB': SmallBuckets}
Spans = list[tuple[float, float]]
STEPS, ROUNDS = 3, 9


def union(spans: Spans) -> Spans:
    """The union of the spans, as sorted spans that do not overlap."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def length(spans: Spans) -> float:
    return sum(end - begin for begin, end in union(spans))


def common(a: Spans, b: Spans) -> float:
    """The time that is in both."""
    return length(a) + length(b) - length([*a, *b])


def spans_of(trace: dict, words: str) -> Spans:
    """Spans, in microseconds, of the events whose names begin with `words`."""
    found = [event for event in trace['traceEvents'] if event.get('ph') == 'X' and event['name'].startswith(words)]
    return [(event['ts'], event['ts'] + event['dur']) for event in found]


def worker(compiled: bool, folder: str) -> None:
    """Time steps with both kinds of buckets in turn, then trace a step of each; rank 0 writes the results."""
    torch.set_num_threads(1)
    if compiled:  # skip the code generator, which takes minutes on a CPU: the graph is cut into buckets before it
        plain = torch.compile
        torch.compile = lambda fn, mode=None: plain(fn, backend='aot_eager')  # pyright: ignore
    settings = dict(channels=64, num_res_blocks=2, channel_mults=(1, 2, 2), attention_resolutions=())
    settings |= dict(compile='on' if compiled else 'off', ckpt_dir=folder, wandb='disabled', global_batch_size=64)
    steps = {}
    for name, calling.DistributedDataParallel in KINDS.items():  # pyright: ignore
        trainer = build(Config(**settings, experiment_name=name))
        batches = trainer.batches.steps(0)
        steps[name] = lambda t=trainer, s=batches: t.train_step(next(s))
        for _ in range(STEPS):  # DDP rearranges its buckets after the first
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    for name, step in steps.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            step()
        if os.environ['RANK'] == '0':
            seen.export_chrome_trace(os.path.join(folder, f'{name}.json'))
    if os.environ['RANK'] == '0':
        parameters = sum(p.numel() for p in trainer.network.parameters())
        Path(folder, 'about.json').write_text(json.dumps(dict(parameters=parameters, seconds=seconds)))
    torch.distributed.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--compile', action='store_true', help='compile the network')
    parser.add_argument('--trace', default='', help='keep the trace here, for chrome://tracing')
    parser.add_argument('--worker', default='', help='used by this program for its processes')
    options = parser.parse_args()
    if options.worker:
        worker(options.compile, options.worker)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__]
        flags = ['--worker', folder, *(['--compile'] if options.compile else [])]
        done = subprocess.run([*command, *flags], env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True)
        if done.returncode:
            sys.exit(done.stderr.decode()[-3000:])
        about = json.loads(Path(folder, 'about.json').read_text())
        traces = {name: Path(folder, f'{name}.json').read_text() for name in about['seconds']}
    if options.trace:
        Path(options.trace).write_text(traces['25_MB'])
    print(f'{about["parameters"] / 1e6:.1f}M parameters, {4 * about["parameters"] / 1e6:.0f} MB of gradients')
    print('| buckets | messages | backward, ms | averaging, ms | hidden | step, ms |\n|---|---|---|---|---|---|')
    for name, text in traces.items():
        trace = json.loads(text)
        averaging, backward = spans_of(trace, 'gloo:all_reduce'), spans_of(trace, 'autograd::engine::evaluate_function')
        hidden = common(averaging, backward) / length(averaging)
        print(
            f'| {name} | {len(averaging)} | {length(backward) / 1e3:.0f} | {length(averaging) / 1e3:.0f} '
            f'| {hidden:.0%} | {1e3 * median(about["seconds"][name]):.0f} |'
        )
    both = zip(*about['seconds'].values(), strict=True)
    print(f'time of a step with buckets of 25 MB over 3 MB: {median(a / b for a, b in both):.3f}')


if __name__ == '__main__':
    main()
