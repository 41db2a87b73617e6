"""Cost and error of log_likelihood by its solvers, each against a converged run with the same probes.

    python benchmarks/likelihood.py --checkpoint ckpts/digits_long/last.pt

The converged run takes 60 steps of RK4. All solvers see the same 8 samples of the network and one fixed probe, so their
differences are the solvers' own errors; the standard error of a single probe is estimated from 8 probes. Prints a table
in markdown, with the speed relative to dopri5 of 1e-5 (in turns, the median of the ratios).
Writes likelihood.json beside.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from likelihood import log_likelihood  # noqa: E402
from sampling import get_sample_fn  # noqa: E402
from saving import load_for_sampling  # noqa: E402

RUNS = {
    'dopri5, 1e-5': dict(solver='dopri5'),
    'dopri5, 1e-3': dict(solver='dopri5', tolerance=1e-3),
    'rk4, 12 steps': dict(solver='rk4', num_steps=12),
    'dopri5, 1e-2': dict(solver='dopri5', tolerance=1e-2),
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

    converged, _ = run(solver='rk4', num_steps=60)
    noise = run(tolerance=1e-3, num_probes=8)[0].standard_error.mean().item() * 8**0.5
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
    report = dict(one_probe=noise / dim, solvers=lines)
    Path(__file__).with_suffix('.json').write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
