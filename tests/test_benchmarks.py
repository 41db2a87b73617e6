"""The tables that scripts of benchmarks/ print from files of runs."""

import json

from benchmarks.cifar10 import PUBLISHED, table


def test_the_table_of_cifar10(tmp_path):
    """A run with two stages, and one number of the second; another run without results."""
    run = tmp_path / 'cifar10_conditional'
    run.mkdir()
    (run / 'config.json').write_text(json.dumps(dict(global_batch_size=500)))
    rates = [{'train/step': n, 'train/images_per_second': rate} for n, rate in ((1, 10), (2, 1000), (3, 1000))]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in rates))
    results = [(20_000, n, 'inception', 10 / n) for n in (4, 6, 8, 10, 20, 35)]
    results += [(50_000, 35, 'inception', 0.25), (50_000, 4, 'pixels', 7.0)]
    names = 'step', 'nfe', 'detector', 'frechet'
    lines = [json.dumps(dict(zip(names, values, strict=True))) + '\n' for values in results]
    (run / 'evaluation.jsonl').write_text(''.join(lines))
    (tmp_path / 'cifar10_unconditional').mkdir()
    found = list(table(tmp_path))
    assert found[2:] == [
        '| cifar10_conditional | 10 | 2.8 | 2.50 | 1.67 | 1.25 | 1.00 | 0.50 | 0.29 |',
        '| cifar10_conditional | 25 | 6.9 |  |  |  |  |  | 0.25 |',
    ]
    assert found[0].count('|') == found[2].count('|') and '1.97 (35)' in PUBLISHED
