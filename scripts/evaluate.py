"""Numbers for a trained run: distances of its samples from the data, held-out losses, bits per dimension.

    sh run.sh evaluate.py --run ckpts/NAME --num 10000 --detector inception
    sh run.sh evaluate.py --run ckpts/NAME --weights ema raw --guidance_scale 1 2 --nfe 10 20 50

Every combination of the values given is evaluated. Each result is a line of evaluation.jsonl in the run's folder, with
all that made it; the same line is not computed again.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import SettingError, choose
from runtime import command
from scripts.generate import draw_alone, inputs_of


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained run."""

    run: str
    """Folder of the run, or one of its .pt files."""
    num: int = 1000
    """Samples for each combination; published FIDs use 50000."""
    detector: str = ''
    """Key of DETECTORS: inception (FID), dinov2, classifier or pixels; empty: the one that the run used."""
    detector_weights: str = ''
    """File of the detector's weights; empty: its own download. For inception and dinov2."""
    weights: tuple[str, ...] = ('ema',)
    """ema (the run's first moving average), others by name (ema_0.999), raw, or posthoc_0.1 (docs/numbers.md)."""
    solver: tuple[str, ...] = ()
    """Keys of SOLVERS in solvers/table.py; empty: the solver of the run."""
    nfe: tuple[int, ...] = ()
    """Network evaluations for each sample; empty: as in the run."""
    guidance_scale: tuple[float, ...] = ()
    """Strengths of guidance; empty: the strength in the run."""
    bits: int = 0
    """Bits per dimension of this many held-out images, with the standard error; 0: not computed."""
    seed: int = 0
    """Another seed gives other samples."""
    batch_size: int = 64
    """Samples that each process draws at once."""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the flags say."""
    import tyro

    options = command.parsed(lambda: tyro.cli(Evaluate, args=argv, use_underscores=True, description=__doc__))

    def work() -> None:
        from runtime.ranks import print_once

        print_once(table(evaluate(options)))

    command.run(work)


def evaluate(options: Evaluate) -> list[dict[str, Any]]:
    """The lines of all combinations, on every rank. Raises SettingError."""
    from evaluation.detectors import DETECTORS
    from solvers import SOLVERS

    choose('detector', options.detector or 'pixels', DETECTORS)
    if options.num < 10:
        raise SettingError(f'num={options.num}: at least 10 samples are needed to compare.')
    if not options.weights:
        raise SettingError('weights: name at least one set, such as --weights ema.')
    for solver in options.solver:
        choose('solver', solver, SOLVERS)
    return Evaluation(options).run()


class Evaluation:
    """The requested numbers of a run, which is opened to read for each combination of weights and settings."""

    def __init__(self, options: Evaluate):
        self.options = options
        self.folder = Path(options.run).parent if options.run.endswith('.pt') else Path(options.run)
        self.record = self.folder / 'evaluation.jsonl'
        self.detector: Any = None
        self.losses: dict[str, dict[str, float]] = {}  # by weights
        self.has_new = False

    def run(self) -> list[dict[str, Any]]:
        from logging_utils import log_table
        from main import load_run
        from reports import page
        from runtime import ranks, stopping
        from training import calling

        o, lines = self.options, []
        stopping.catch_stop_signals()
        trained: Any = None
        sampling = itertools.product(o.solver or (None,), o.nfe or (None,), o.guidance_scale or (None,))
        for weights, (solver, nfe, scale) in itertools.product(o.weights, sampling):
            given = dict(solver=solver, sample_nfe=nfe, guidance_scale=scale) | calling.settings_for(o.num)
            trained = load_run(o.run, weights, **{name: value for name, value in given.items() if value is not None})
            self.detector = self.detector or self.get_detector(trained)
            lines.append(self.line_of(trained, weights))
        ranks.on_main(lambda: page.update(self.folder))
        wandb_id = trained.record.wandb_id
        if self.has_new and wandb_id is not None:
            rows = [{name: str(x) if isinstance(x, list) else x for name, x in line.items()} for line in lines]
            ranks.on_main(lambda: log_table(trained.config, self.folder, wandb_id, 'evaluation', rows))
        ranks.print_once(f'all evaluations, with plots: {self.folder}/report.html')
        return lines

    def get_detector(self, trained: Any) -> Any:
        """Raises SettingError if there are too few data."""
        from evaluation.detectors import DETECTORS, default_detector
        from runtime import ranks

        name = self.options.detector or default_detector(trained.judge.data)
        self.options = dataclasses.replace(self.options, detector=name)
        detector = DETECTORS[name](trained.judge.data, self.options.detector_weights)
        ranks.print_once(f'judged by {detector.about}')
        few = min(trained.train_loader.size, trained.test_loader.size)
        if few < 10:
            raise SettingError(f'{few} training or held-out images are too few: 10 of each are needed to compare.')
        return detector

    def line_of(self, trained: Any, weights: str) -> dict[str, Any]:
        """The numbers of these weights with these settings: read from the record, or computed and added to it."""
        from runtime import ranks

        made_by = self.made_by(trained, weights)
        line = ranks.on_main(lambda: find(self.record, made_by))
        if line is None:
            numbers = self.numbers(trained)
            if weights not in self.losses:
                self.losses[weights] = self.losses_of(trained)
            line = made_by | numbers | self.losses[weights]
            ranks.on_main(lambda: append(self.record, line))
            self.has_new = True
        return line

    def made_by(self, trained: Any, weights: str) -> dict[str, Any]:
        """Everything that a result depends on."""
        from evaluation.detectors import digest_of
        from training import run_record

        c = trained.config
        return dict(
            step=trained.step, weights=weights, weights_digest=digest_of(trained.network),
            solver=c.solver, num_sample_steps=c.num_sample_steps, nfe=c.sample_nfe,
            time_grid=c.time_grid, guidance_scale=c.guidance_scale, guidance_interval=list(c.guidance_interval),
            guidance_rescale=c.guidance_rescale, num=self.options.num, seed=self.options.seed, bits=self.options.bits,
            detector=self.options.detector, detector_digest=self.detector.digest, data=trained.train_loader.fingerprint,
            train_images=trained.train_loader.size, held_out_images=trained.test_loader.size,
            commit=run_record.git_state()['commit'],
        )  # fmt: skip

    def numbers(self, trained: Any) -> dict[str, float]:
        """Distances of new samples from the data, with as many training images, drawn at random, as a floor
        (`real_...`); and an experiment's own `sample_metrics`."""
        import torch

        from evaluation.judge import Looked
        from runtime import ranks

        own = trained.overrides('sample_metrics')
        looked, kept, began, n = Looked(self.detector), [], time.monotonic(), self.options.num
        for x, inputs in self.samples(trained):
            looked.add(x, trained.data.known_classes(inputs.label, trained.config.label_dropout))
            kept += [x.cpu()] if own else []
        rate = n / (time.monotonic() - began)
        values = trained.judge.compared(looked, n, self.detector)
        width = looked.features[0].shape[1]
        if n <= width:
            ranks.print_once(
                f'warning: {n} samples for {width} features: frechet is far from its value for many samples, so '
                'compare it with real_frechet, or draw more'
            )
        if own:
            x = ranks.gather_items(torch.cat(kept), n).to(trained.device)
            # a number of the chosen detector goes before one of the same name
            values = trained.judge.numbers(x, inputs_of(trained, range(n), self.options.seed, n)) | values
        return values | dict(images_per_second=rate)

    def samples(self, trained: Any) -> Iterator[tuple[Any, Any]]:
        """Decoded samples and what they started from, in batches: this process's share."""
        from tqdm import tqdm

        from runtime import ranks, stopping

        o, model_fn = self.options, trained.get_model_fn(trained.network)
        mine = ranks.my_items(o.num)
        batches = [mine[i : i + o.batch_size] for i in range(0, len(mine), o.batch_size)]
        for indices in tqdm(batches, unit='batch', disable=None if ranks.is_main() else True, leave=False):
            stopping.raise_if_stopped()
            inputs = inputs_of(trained, indices, o.seed, o.num)
            yield draw_alone(trained, model_fn, inputs, indices, o.seed, trained.config.solver), inputs

    def losses_of(self, trained: Any) -> dict[str, float]:
        """The held-out loss of the run and the reference loss, by time, of these weights; and bits per dimension."""
        values = {'eval/loss': trained.judge.held_out_loss(trained.network)}
        if trained.judge.has_reference:
            values |= trained.judge.reference_loss(trained.network)
        return values | (bits(trained, self.options.bits) if self.options.bits else {})


def bits(experiment: Any, n: int, batch_size: int = 32) -> dict[str, float]:
    """Bits per dimension of n held-out images, dequantized, and the standard error of this mean.

    Without guidance. Raises SettingError where no density is defined: floats, x1 that is data.
    """
    import torch

    from runtime import ranks

    c, spec, loader = experiment.config, experiment.data, experiment.test_loader
    if spec.scale != 'image' or not experiment.independent or experiment.overrides('encode'):
        raise SettingError('bits: needs images, the default encode, and noise as x1.')
    if not c.dequantize:
        ranks.print_once('warning: the run was trained without --dequantize, so its density is one of grey levels and '
                         'bits per dimension may be any number')  # fmt: skip
    n = min(n, loader.size)
    blocks = list(enumerate(torch.arange(n).split(batch_size)))  # the same on any number of processes
    mine = blocks[ranks.rank() :: ranks.world_size()]
    found = [(number, bits_of(experiment, rows, number)) for number, rows in mine]
    together = sorted(itertools.chain(*ranks.all_gather_objects(found)))
    each = torch.tensor([value for _, values in together for value in values])
    return {'bits_per_dim': float(each.mean()), 'bits_per_dim_error': float(each.std() / n**0.5), 'bits_images': n}


def bits_of(experiment: Any, rows: Any, number: int) -> list[float]:
    """Bits per dimension of the held-out images with these indices, which are block `number`."""
    import utils
    from evaluation.likelihood import bits_per_dim, dequantize, log_likelihood

    c, spec = experiment.config, experiment.data
    levels = spec.max_value + 1
    x, label, *_ = experiment.test_loader.take(rows)
    with utils.NoiseOfEach(0, 'bits', rows.tolist()):
        x = dequantize((x * spec.max_value).round(), levels)
    utils.seed_everything(0, 'probes', number)
    model_fn, label = experiment.get_model_fn(experiment.network), label if spec.num_classes else None
    settings: dict[str, Any] = dict(model_type=c.model_type, t_min=c.t_min, t_max=c.t_max)
    found = log_likelihood(model_fn, experiment.process, x, label, **settings)
    return bits_per_dim(found.log_prob, spec.shape or (), levels).tolist()


def find(record: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The line of the record with the same `made_by`, if there is one."""
    from reports.page import lines_in

    lines = lines_in(record)
    wanted = {name: value for name, value in made_by.items() if name != 'commit'}
    return next((line for line in lines if wanted.items() <= line.items()), None)


def append(record: Path, line: dict[str, Any]) -> None:
    """Add a line to the record, in one piece."""
    from reports.page import lines_in
    from runtime import files

    with files.whole(record) as temporary:
        temporary.write_text(''.join(json.dumps(x) + '\n' for x in [*lines_in(record), line]))


def table(lines: list[dict[str, Any]]) -> str:
    """The main numbers, a row for each combination."""
    from reports.page import COLUMNS, cell_of, text_of

    columns = [name for name in COLUMNS if any(name in line for line in lines)]
    rows = [columns] + [[text_of(cell_of(line, name)) for name in columns] for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == '__main__':
    main()
