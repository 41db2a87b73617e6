"""Metrics of a trained run: distances of its samples from the data, held-out losses, bits per dimension.

    sh run.sh evaluate.py --run ckpts/NAME --num 10000 --detector inception
    sh run.sh evaluate.py --run ckpts/NAME --weights ema raw --guidance_scale 1 2 --nfe 10 20 50

Evaluates every combination of the given values. Each result is a line of evaluation.jsonl in the run's folder, with
everything that it depends on; a result that is already there is not computed again.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import SettingError, choose
from reports import page
from runtime import alive, command, files

METRICS_VERSION = 3  # increase it when samples or metrics are computed differently: then old results are not reused

if TYPE_CHECKING:  # so that `--help` need not wait for torch
    from evaluation.detectors import Detector
    from scripts.samples import Samples


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained run."""

    run: str
    """Folder of the run, or one of its .pt files."""
    num: int = 1000
    """Samples for each combination; published FIDs use 50000."""
    detector: str = ''
    """Key of DETECTORS: inception (FID), dinov2, classifier or pixels; empty: the detector that the run used."""
    detector_weights: str = ''
    """File of the detector's weights, for inception and dinov2; empty: download them."""
    weights: tuple[str, ...] = ('ema',)
    """ema (the run's first moving average), others by name (ema_0.999), raw, or posthoc_0.1 (docs/numbers.md)."""
    solver: tuple[str, ...] = ()
    """Keys of SOLVERS in solvers/table.py; empty: the solver of the run."""
    nfe: tuple[int, ...] = ()
    """Network evaluations (NFE) per sample; empty: the number in the run."""
    time_grid: str | None = None
    """Key of TIME_GRIDS in solvers/table.py; default: the time grid of the run."""
    guidance_scale: tuple[float, ...] = ()
    """Scales of classifier-free guidance; empty: the scale in the run."""
    bits: int = 0
    """Number of held-out images for bits per dimension, with the standard error; 0: not computed."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 64
    """Samples that each process draws at once."""
    data_path: str | None = None
    """New path of the data, if they were moved (set data_dir too if needed)."""
    data_dir: str | None = None
    """Folder of downloaded data and caches; default: the run's own."""
    trust: bool = False
    """Run the code that the run names, even if it is outside the project and the folder you are in."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, evaluate and print the results."""
    options = command.options(Evaluate, argv, __doc__, 'run', 'detector_weights', 'data_path', 'data_dir')

    def work() -> None:
        from runtime.ranks import print_once

        print_once(page.blocks(page.evaluations(evaluate(options))))

    command.run(work)


@alive.print_while('evaluating')
def evaluate(options: Evaluate) -> list[dict[str, Any]]:
    """The lines of all combinations, on every rank. Raises SettingError."""
    from evaluation.detectors import DETECTORS
    from solvers import SOLVERS, TIME_GRIDS

    if options.time_grid:
        choose('time_grid', options.time_grid, TIME_GRIDS)
    if options.detector:
        choose('detector', options.detector, DETECTORS)
    if options.num < 10:
        raise SettingError(f'num={options.num}: at least 10 samples are needed to compare.')
    if not options.weights:
        raise SettingError('weights: name at least one set, such as --weights ema.')
    for solver in options.solver:
        choose('solver', solver, SOLVERS)
    return Evaluation(options).run()


class Evaluation:
    """The requested metrics of a run, which is opened read-only for each combination of weights and settings."""

    def __init__(self, options: Evaluate):
        self.options = options
        self.folder = Path(options.run).parent if options.run.endswith('.pt') else Path(options.run)
        self.record = self.folder / 'evaluation.jsonl'
        self.detector: Detector | None = None
        self.losses: dict[str, dict[str, float]] = {}  # name of the weights -> losses: the sampler does not matter
        self.has_new_results = False

    def run(self) -> list[dict[str, Any]]:
        from runtime import ranks, stopping
        from runtime.wandb_run import log_table
        from scripts.samples import Samples

        o, lines = self.options, []
        samples: Any = None
        stopping.catch_stop_signals()
        shared: dict[str, Any] = {name: getattr(o, name) for name in ('time_grid', 'data_path', 'data_dir', 'trust')}
        choices = o.weights, o.solver or (None,), o.nfe or (None,), o.guidance_scale or (None,)
        for weights, solver, nfe, scale in itertools.product(*choices):
            varied: dict[str, Any] = dict(solver=solver, sample_nfe=nfe, guidance_scale=scale)
            samples = Samples(o.run, weights, o.num, o.seed, to_judge=True, **shared | varied)
            lines.append(self.line_of(samples, weights))
        ranks.on_main(lambda: page.update(self.folder))
        config, wandb_id = samples.run.config, samples.run.record.wandb_id
        if self.has_new_results and wandb_id is not None:
            rows = [{name: str(x) if isinstance(x, list) else x for name, x in line.items()} for line in lines]
            ranks.on_main(lambda: log_table(config, self.folder, wandb_id, 'evaluation', rows))
        ranks.print_once(f'all evaluations, with plots: {self.folder}/report.html')
        return lines

    def line_of(self, samples: 'Samples', weights: str) -> dict[str, Any]:
        """The result for these weights and settings: read from the record, or computed and added to it."""
        from evaluation.detectors import digest_of, get_detector
        from runtime import ranks
        from training import run_record

        o, run, c, detector = self.options, samples.run, samples.run.config, self.detector
        if detector is None:
            few = min(run.train_loader.size, run.test_loader.size)
            if few < 10:  # checked before a detector is trained or a sample drawn
                raise SettingError(f'{few} training or held-out items are too few: 10 of each are needed to compare.')
            detector = self.detector = get_detector(run.judge.data, o.detector, o.detector_weights)
            ranks.print_once(f'judged by {detector.about}')
        made_by = dict(  # everything that a result depends on
            measures=METRICS_VERSION, step=run.step, weights=weights, weights_digest=digest_of(run.network),
            solver=c.solver, num_sample_steps=c.num_sample_steps, nfe=c.sample_nfe, time_grid=c.time_grid,
            guidance_scale=c.guidance_scale, guidance_interval=list(c.guidance_interval),
            guidance_rescale=c.guidance_rescale, num=o.num, seed=o.seed, bits=o.bits, detector=detector.name,
            detector_digest=detector.digest, data=run.train_loader.fingerprint, train_images=run.train_loader.size,
            held_out_images=run.test_loader.size, commit=run_record.git_state()['commit'],
        )  # fmt: skip
        line = ranks.on_main(lambda: find_line(self.record, made_by))
        if line is None:
            numbers = samples.numbers(detector, o.batch_size)
            if weights not in self.losses:
                self.losses[weights] = samples.losses(o.bits)
            line = made_by | numbers | self.losses[weights]
            ranks.on_main(lambda: append_line(self.record, line))
            self.has_new_results = True
        return line


def find_line(record: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The line of the record with the same `made_by`, except for the commit, or None."""
    wanted = {name: value for name, value in made_by.items() if name != 'commit'}
    return next((line for line in page.lines_in(record) if wanted.items() <= line.items()), None)


def append_line(record: Path, line: dict[str, Any]) -> None:
    """Add a line to the record, atomically."""
    files.write_text(record, ''.join(json.dumps(x) + '\n' for x in [*page.lines_in(record), line]))


if __name__ == '__main__':
    main()
