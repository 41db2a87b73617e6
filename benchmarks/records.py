"""Keeps the record of a run of a preset in docs/records/, as small text files.

    python benchmarks/records.py ckpts/digits ckpts/toy2d ...

docs/records/PRESET is the folder of the run, without pictures and weights: compare.py and the report read it as they
read any run. It keeps the losses, by time too, and the final numbers, to four digits.
"""

import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reports import page  # noqa: E402

KEPT = ('train/step', 'train/loss*', 'train/floor*', 'train/grad_norm', 'eval/*', 'final/*')
OF_A_START = ('step', 'command', 'commit', 'versions', 'device', 'processes', 'trainer')


def reduced(line: dict[str, Any]) -> dict[str, Any]:
    """The kept values of a line of metrics.jsonl, to four digits."""
    kept = {name: value for name, value in line.items() if any(fnmatch(name, pattern) for pattern in KEPT)}
    return {name: float(f'{value:.4g}') if isinstance(value, float) else value for name, value in kept.items()}


def keep(folder: Path, records: Path) -> Path:
    """Write the record of a finished run; returns its folder."""
    run = page.read(folder)
    changed = run.changed().keys() - {'preset', 'data_path'}
    plain = {'file': 'trainer.py', 'name': 'ExampleDiffusionTrainer'}
    is_other = any(start['diff'] or start.get('trainer') != plain for start in run.starts)
    if changed or is_other or run.step < run.config['num_training_steps']:
        raise SystemExit(f'{folder}: not a finished run of a preset by committed code; changed: {sorted(changed)}')
    target = records / run.config['preset']
    target.mkdir(parents=True, exist_ok=True)
    (target / 'config.json').write_text(json.dumps(run.config, indent=1) + '\n')
    starts = [{name: start[name] for name in OF_A_START} for start in run.starts]
    (target / 'run.json').write_text(json.dumps(starts, indent=1) + '\n')
    (target / 'metrics.jsonl').write_text(''.join(json.dumps(reduced(line)) + '\n' for line in run.lines))
    return target


if __name__ == '__main__':
    for folder in sys.argv[1:]:
        print(keep(Path(folder), ROOT / 'docs/records'))
