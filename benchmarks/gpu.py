"""Measure the speed of a GPU in training and sampling, in less than nine minutes; without a GPU, run toy sizes.

    sh benchmarks/gpu.sh [--out gpu.json] [--seconds 520] [--parts ceilings unet ...]

The parts below (PARTS) run in order of importance until the time is up. Each has a time budget, and the others run even
if one fails. Results are written to a JSON file after every part, and shown as a table at the end. Images are smooth
noise in memory, with the number and size of CIFAR-10's. Variants are timed alternately (A B A B): a rate is the median
over rounds, a ratio the median of the ratios within a round. FLOPs are those in matrix products and convolutions of one
step, counted by torch.
"""

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_sides import BATCH, DEVICE, DIT, GPU, SIZE, UNET, Run, bare_steps, in_turn, ratio, seconds, torchcfm_loop

from training import calling

ROOT = Path(__file__).resolve().parent.parent
# name -> settings, and whether convolution weights are channels-last
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    'float32': (dict(precision='float32'), False),
    'tf32': (dict(precision='tf32'), False),
    'bfloat16': (dict(precision='bfloat16'), False),
    '+ channels_last': (dict(precision='bfloat16'), True),
    '+ compile': (dict(precision='bfloat16', compile='on'), True),
    '+ CUDA graphs': (dict(precision='bfloat16', compile='graphs'), True),
}

results: dict[str, Any] = {}


# ---------------------------------------------------------------- the parts: folder -> results


def ceilings(folder: str) -> dict[str, Any]:
    """GB/s (read plus write) of a copy on the device; TFLOP/s of a product of random square matrices."""
    a = torch.randn(SIZE * SIZE * (8 if GPU else 1), device=DEVICE)
    b = torch.empty_like(a)
    found = {'copy GB/s': 2 * a.numel() * 4 / median(seconds(lambda: b.copy_(a)) for _ in range(10)) / 1e9}
    for precision in ('float32', 'tf32', 'bfloat16'):
        calling.set_precision(precision)
        dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
        x, y = (torch.randn(SIZE, SIZE, device=DEVICE, dtype=dtype) for _ in range(2))
        x @ y
        times = [seconds(lambda x=x, y=y: [x @ y for _ in range(5)]) / 5 for _ in range(10)]
        found[f'{precision} TFLOP/s'] = 2 * SIZE**3 / median(times) / 1e12
    return found


def correct(folder: str) -> dict[str, Any]:
    """Check that the loss falls, that a resumed run matches an uninterrupted one, and that CPU and GPU, and compiled
    and plain networks agree."""
    small = dict(channels=32, channel_mults=(1, 2), num_res_blocks=1, base_lr=1e-3, warmup_steps=5) | UNET
    run = Run(folder, precision='bfloat16', **small)
    run.steps(10)
    first = run.loss()
    run.steps(100 if GPU else 20)
    run.loss()
    run.steps(10)
    found: dict[str, Any] = {'loss, first and last': [first, run.loss()]}

    for optimizer in ('muon', 'adamw'):
        settings = small | dict(precision='float32', optimizer=optimizer)
        whole, half = (Run(folder, experiment_name=f'{optimizer}_{name}', **settings) for name in ('whole', 'cut'))
        whole.steps(12)
        half.steps(6)
        half.trainer.checkpoints.save(half.trainer.step, wait=True)
        resumed = Run(folder, experiment_name=f'{optimizer}_cut', **settings)  # the same name: it resumes half
        assert resumed.trainer.step == 6
        resumed.steps(6)
        pairs = zip(whole.trainer.network.parameters(), resumed.trainer.network.parameters(), strict=True)
        found[f'resumed, {optimizer}: largest difference of a weight'] = max(
            float((a - b).detach().abs().max()) for a, b in pairs
        )

    trainer = whole.trainer
    batch = next(next(whole.micro_batches))
    network = trainer.network.eval()

    def output(compile: str, device: torch.device) -> Tensor:
        xt, t, label = (x.to(device) for x in (batch.x0, batch.t, batch.label))
        config = dataclasses.replace(trainer.config, compile=compile, precision='float32')
        return calling.Caller(config, device)(network.to(device))(xt, t, label).detach()

    with torch.no_grad():
        calling.set_precision('float32')
        plain = output('off', DEVICE)
        for chosen in ('on', 'graphs'):
            difference = max(float((output(chosen, DEVICE) - plain).abs().max()) for _ in range(3))
            found[f'compile {chosen}: largest difference'] = difference / float(plain.abs().max())
        on_cpu = output('off', torch.device('cpu')).to(DEVICE)
        found['CPU: largest difference'] = float((on_cpu - plain).abs().max() / plain.abs().max())
    return found


def speeds(folder: str, network: str) -> dict[str, Any]:
    """Images/s, share of the bfloat16 ceiling and memory of all variants; then images/s of larger batches."""
    settings = DIT if network == 'dit' else {}
    ceiling = results.get('ceilings', {}).get('bfloat16 TFLOP/s')
    runs, memory, compiling_took, failed = {}, {}, {}, {}
    for name, (chosen, channels_last) in VARIANTS.items():
        try:
            runs[name] = run = Run(folder, channels_last, **chosen, **settings)
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if GPU else 0
            compiling_took[name] = seconds(lambda r=run: r.steps(1))
            run.steps(2)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e9 if GPU else None
        except Exception as error:  # measure the other variants all the same
            runs.pop(name, None)
            failed[name] = f'{type(error).__name__}: {str(error)[:500]}'
    if 'tf32' not in runs:
        raise RuntimeError(f'eager tf32 failed, and all variants are compared with it: {failed}')
    with FlopCounterMode(display=False) as counter:
        runs['tf32'].step()
    per_image = counter.get_total_flops() / BATCH
    rates = in_turn({name: run.steps for name, run in runs.items()}, dict.fromkeys(runs, BATCH))
    found: dict[str, Any] = {'TFLOP per image': per_image / 1e12, 'batch': BATCH, 'failed': failed}
    for name, rounds in rates.items():
        rate = median(rounds)
        found[name] = {
            'images/s': rate,
            'over eager tf32': ratio(rounds, rates['tf32']),
            'share of bfloat16 ceiling': rate * per_image / 1e12 / ceiling if ceiling else None,
            'GB besides the weights': memory[name],
            'first step, s': compiling_took[name],
        }
    found['best'] = max(rates, key=lambda name: median(rates[name]))
    runs.clear()
    for factor in (2, 4):
        bigger = Run(folder, VARIANTS['+ channels_last'][1], **VARIANTS['+ channels_last'][0],
                     **settings | dict(global_batch_size=factor * BATCH))  # fmt: skip
        rate = in_turn({'bigger': bigger.steps}, {'bigger': factor * BATCH})['bigger']
        found[f'batch {factor * BATCH}, + channels_last'] = {'images/s': median(rate)}
        del bigger
    return found


def loops(folder: str) -> dict[str, Any]:
    """Compare our loop with a bare loop on the same network, and with torchcfm's loop and network, if installed."""
    found: dict[str, Any] = {}
    for name in ('+ channels_last', '+ compile'):
        chosen, channels_last = VARIANTS[name]
        ours = Run(folder, channels_last, **chosen)
        sides = {'ours': ours.steps, 'bare': bare_steps(Run(folder, channels_last, **chosen))}
        rates = in_turn(sides, dict.fromkeys(sides, BATCH))
        found[f'ours over a bare loop, {name}'] = ratio(rates['ours'], rates['bare'])
    try:
        torchcfm_steps = torchcfm_loop()
    except ImportError as error:
        return found | {'torchcfm': f'not installed ({error})'}
    ours = Run(folder, **VARIANTS['+ compile'][0])
    rates = in_turn({'ours': ours.steps, 'torchcfm': torchcfm_steps}, dict(ours=BATCH, torchcfm=BATCH))
    return found | {'torchcfm images/s': median(rates['torchcfm']), 'ours, + compile, over torchcfm':
                    ratio(rates['ours'], rates['torchcfm'])}  # fmt: skip


def sampling(folder: str) -> dict[str, Any]:
    """Samples/s of the averaged weights with the default solver and steps, plain and compiled, in one large batch."""
    runs = {name: Run(folder, **VARIANTS[name][0]) for name in ('+ channels_last', '+ compile')}
    n = 512 if GPU else 16
    inputs = runs['+ channels_last'].trainer.sample_inputs(n)

    def drawer(run: Run) -> Callable[[int], Any]:
        trainer = run.trainer
        (sampler, *_), (average, *_) = trainer.samplers().values(), trainer.weights().values()
        return lambda times: [trainer.drawing.samples(sampler, average, inputs) for _ in range(times)]

    rates = in_turn({name: drawer(run) for name, run in runs.items()}, dict.fromkeys(runs, n))
    found: dict[str, Any] = {f'samples/s, {name}': median(rate) for name, rate in rates.items()}
    config = runs['+ compile'].trainer.config
    return found | {'solver': f'{config.solver}, {config.num_sample_steps} steps'}


PARTS: dict[str, tuple[Callable[[str], dict[str, Any]], int]] = {  # name -> (part, time budget in seconds)
    'ceilings': (ceilings, 30),
    'correct': (correct, 120),
    'unet': (lambda folder: speeds(folder, 'unet'), 240),
    'dit': (lambda folder: speeds(folder, 'dit'), 180),
    'loops': (loops, 90),
    'sampling': (sampling, 90),
}


# ---------------------------------------------------------------- running all parts


def about() -> dict[str, Any]:
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if GPU else 'CPU: toy sizes, so the numbers mean nothing'
    return dict(device=device, torch=torch.__version__, python=sys.version.split()[0], commit=commit.stdout.strip())


def show(name: str, value: Any, depth: int = 0) -> None:
    """Print results as lines, with nested dicts indented."""
    if isinstance(value, dict):
        print(f'{"  " * depth}{name}')
        for key, inner in value.items():
            show(key, inner, depth + 1)
    else:
        print(f'{"  " * depth}{name:<45} {f"{value:.4g}" if isinstance(value, float) else value}')


class OutOfTime(BaseException):  # not an Exception: the `except` around a variant must not catch it
    """A part exceeded its time budget."""


def out_of_time(*args: Any) -> None:
    raise OutOfTime


def run_parts(names: list[str], out: Path, limit: float) -> None:
    began = time.monotonic()
    results['about'] = about()
    signal.signal(signal.SIGALRM, out_of_time)
    for name in names:
        part, budget = PARTS[name]
        left = limit - (time.monotonic() - began)
        if left < 10:
            results[name] = {'left out': 'the time was up'}
            continue
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, min(budget, left), 2)  # every 2 s again, in case a library swallows it
        try:
            with tempfile.TemporaryDirectory() as folder:
                results[name] = part(folder)
        except (Exception, OutOfTime) as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            traceback.print_exc()
            results[name] = {'failed': f'{type(error).__name__}: {str(error)[:1000]}'}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        results[name]['seconds'] = time.monotonic() - start
        if GPU:
            torch.cuda.empty_cache()
        out.write_text(json.dumps(results, indent=1))
        print(f'-- {name}: {results[name]["seconds"]:.0f} s', flush=True)
    out.write_text(json.dumps(results, indent=1))
    for name, value in results.items():
        show(name, value)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='gpu.json')
    parser.add_argument('--seconds', type=float, default=520)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    if not GPU:  # skip torch's code generator, which takes minutes on a CPU; the stages before it still run
        plain_compile = torch.compile
        torch.compile = lambda fn, mode=None: plain_compile(fn, backend='aot_eager')  # pyright: ignore
    run_parts(options.parts, Path(options.out), options.seconds)
