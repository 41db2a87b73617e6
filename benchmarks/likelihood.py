"""Measures cost and error of log_likelihood for its solvers, each against a converged run with the same probes.

    python benchmarks/likelihood.py --checkpoint ckpts/NAME/last.pt      a run of digits with --dequantize

The converged run is dopri5 with tolerance 1e-7. All solvers use the same 8 held-out images, dequantized, and one fixed
probe, so differences between them are their own errors. The standard error of a single probe is estimated from 8
probes. Prints a table in markdown, with the speed relative to dopri5 with tolerance 1e-5, and writes likelihood.json.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from interleaved import in_turn, ratio, write  # noqa: E402

from data_utils import get_dataset  # noqa: E402
from evaluation.likelihood import LogLikelihood, dequantize, log_likelihood  # noqa: E402
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
    parser.add_argument('--rounds', type=int, default=3, help='times that each solver is timed')
    arguments = parser.parse_args()
    network, process, config = load_for_sampling(arguments.checkpoint)
    torch.manual_seed(0)
    data = get_dataset(config)
    _, (images, label) = data.load(config)
    x0, label = dequantize(images[:8].float(), data.max_value + 1), label[:8]
    dim = x0[0].numel()

    def run(**settings: Any) -> LogLikelihood:
        torch.manual_seed(1)
        return log_likelihood(network, process, x0, label, model_type=config.model_type, **settings)

    noise = run(num_probes=8).standard_error.mean().item() * 8**0.5
    runs = {name: partial(run, **settings) for name, settings in RUNS.items()}
    times, results = in_turn(runs, arguments.rounds, warm_up=1), {name: once() for name, once in runs.items()}
    converged = run(tolerance=1e-7).log_prob
    lines = []
    print(f'standard error of one probe: {noise / dim:.3g} nats per dimension\n')
    print('| solver | evaluations | mean error (nats per dimension) | largest | times as fast |\n|---|---|---|---|---|')
    for name, result in results.items():
        error, faster = (result.log_prob - converged).abs() / dim, ratio(times, of=name, to='dopri5, 1e-5')
        found = dict(nfe=result.nfe, mean=error.mean().item(), largest=error.max().item(), faster=faster)
        lines.append(dict(solver=name) | found)
        print(f'| {name} | {result.nfe} | {error.mean():.2g} | {error.max():.2g} | {faster:.1f} |')
    write('likelihood', dict(one_probe=noise / dim, solvers=lines))


if __name__ == '__main__':
    main()
