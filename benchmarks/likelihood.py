"""Cost and error of log_likelihood by its solvers, each against a converged run with the same probes.

    python benchmarks/likelihood.py --checkpoint ckpts/NAME/last.pt      of a run of digits with --dequantize

The converged run takes 400 steps of adams. All solvers see the same 8 samples of the network and one fixed probe, so
their differences are the solvers' own errors; the standard error of a single probe is estimated from 8 probes. Prints a
table in markdown, with the speed relative to dopri5 of 1e-5 (in turns, the median of the ratios).
Writes likelihood.json beside.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from interleaved import write  # noqa: E402

from likelihood import log_likelihood  # noqa: E402
from sampling import get_sample_fn  # noqa: E402
from saving import load_for_sampling  # noqa: E402

RUNS = {
    'dopri5, 1e-5': dict(solver='dopri5'),
    'dopri5, 1e-4': dict(tolerance=1e-4),
    'dopri5, 1e-3': dict(tolerance=1e-3),
    'adams, 32 steps': dict(),
    'adams, 64 steps': dict(num_steps=64),
    'rk4, 12 steps': dict(solver='rk4', num_steps=12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--checkpoint', required=True, help='a trained class-conditional run of digits')
    parser.add_argument('--rounds', type=int, default=3, help='how often each is timed')
    arguments = parser.parse_args()
    network, process, config = load_for_sampling(arguments.checkpoint)
    torch.manual_seed(0)
    label = torch.arange(8)
    x0 = get_sample_fn(config, process, null_label=10)(network, x1=torch.randn(8, 1, 8, 8), label=label)
    dim = x0[0].numel()

    def run(**settings):
        torch.manual_seed(1)
        start = time.perf_counter()
        return log_likelihood(network, process, x0, label, **settings), time.perf_counter() - start

    converged, _ = run(num_steps=400)
    noise = run(num_probes=8)[0].standard_error.mean().item() * 8**0.5
    rounds = [{name: run(**settings) for name, settings in RUNS.items()} for _ in range(arguments.rounds)]
    lines = []
    print(f'standard error of one probe: {noise / dim:.3g} nats a dimension\n')
    print('| solver | evaluations | mean error (nats a dimension) | largest | times as fast |\n|---|---|---|---|---|')
    for name in RUNS:
        result, _ = rounds[0][name]
        error = (result.log_prob - converged.log_prob).abs() / dim
        ratio = statistics.median(r['dopri5, 1e-5'][1] / r[name][1] for r in rounds)
        lines.append(
            dict(solver=name, nfe=result.nfe, mean=error.mean().item(), largest=error.max().item(), faster=ratio)
        )
        print(f'| {name} | {result.nfe} | {error.mean():.2g} | {error.max():.2g} | {ratio:.1f} |')
    write('likelihood', dict(one_probe=noise / dim, solvers=lines))


if __name__ == '__main__':
    main()
