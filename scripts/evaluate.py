"""Numbers for a trained run: distances of its samples from the data, held-out losses, bits per dimension.

    sh run.sh evaluate.py --run ckpts/NAME --num 10000 --detector inception
    sh run.sh evaluate.py --run ckpts/NAME --weights ema raw --guidance_scale 1 2 --nfe 10 20 50

Every combination of the values given is evaluated. Each result is a line of evaluation.jsonl in the run's folder, with
all that made it; the same line is not computed again.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import SettingError
from runtime import command

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.detectors import Detector
    from trainer import BaseDiffusionTrainer


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained run."""

    run: str
    """Folder of the run, or one of its .pt files."""
    num: int = 1000
    """Samples for each combination; published FIDs use 50000."""
    detector: str = ''
    """Key of DETECTORS: inception (FID), dinov2, classifier or pixels; empty: classifier for images with classes."""
    detector_weights: str = ''
    """File of the detector's weights; empty: its own download. For inception and dinov2."""
    weights: tuple[str, ...] = ('ema',)
    """ema (the run's first moving average), others by name (ema_0.999), raw, or posthoc_0.1 (docs/numbers.md)."""
    solver: tuple[str, ...] = ()
    """Keys of SOLVERS in solvers.py; empty: that of the run."""
    nfe: tuple[int, ...] = ()
    """Network evaluations for each sample; empty: as in the run."""
    guidance_scale: tuple[float, ...] = ()
    """Strengths of guidance; empty: that of the run."""
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
    command.run(lambda: print_all(evaluate(options)))


def evaluate(options: Evaluate) -> list[dict[str, Any]]:
    """The lines of all combinations, on every rank. Raises SettingError."""
    from config import choose
    from evaluation.detectors import DETECTORS, features_of_data, usual
    from logging_utils import log_table
    from main import load_run
    from reports import page
    from runtime import ranks, stopping
    from solvers import SOLVERS
    from training import calling

    choose('detector', options.detector or 'pixels', DETECTORS)
    if options.num < 10:
        raise SettingError(f'num={options.num}: at least 10 samples are needed to compare.')
    if not options.weights:
        raise SettingError('weights: name at least one set, such as --weights ema.')
    for solver in options.solver:
        choose('solver', solver, SOLVERS)
    folder = Path(options.run).parent if options.run.endswith('.pt') else Path(options.run)
    record = folder / 'evaluation.jsonl'
    lines: list[dict[str, Any]] = []
    detector = reference = config = wandb_id = None
    new = False
    stopping.catch_stop_signals()
    for weights in options.weights:
        trainer = load_run(options.run, weights, **calling.settings_for(options.num))
        if detector is None:
            config, wandb_id = trainer.config, trainer.wandb_id
            options = dataclasses.replace(options, detector=options.detector or usual(trainer))
            detector = DETECTORS[options.detector](trainer, options.detector_weights)
            ranks.print_once(f'judged by {detector.about}')
            few = min(trainer.train_loader.size, trainer.test_loader.size)
            if few < 10:
                raise SettingError(f'{few} training or held-out images are too few: 10 of each are needed to compare.')
        losses = None
        for solver, nfe, scale in itertools.product(options.solver or (None,), options.nfe or (None,),
                                                    options.guidance_scale or (None,)):  # fmt: skip
            given = {'solver': solver, 'sample_nfe': nfe, 'guidance_scale': scale}
            sample_with(trainer, {name: value for name, value in given.items() if value is not None})
            made_by = description(options, trainer, weights, detector)
            known = ranks.on_main(lambda made_by=made_by: find(record, made_by))
            if known is None:
                reference = reference or features_of_data(trainer, detector)
                losses = losses or held_out_losses(trainer, options)
                known = made_by | judge(options, trainer, detector, reference) | losses
                ranks.on_main(lambda line=known: append(record, line))
                new = True
            lines.append(known)
    ranks.on_main(lambda: page.update(folder))
    if new and config is not None and wandb_id is not None:
        rows = [{name: str(x) if isinstance(x, list) else x for name, x in line.items()} for line in lines]
        ranks.on_main(functools.partial(log_table, config, folder, wandb_id, 'evaluation', rows))
    ranks.print_once(f'all evaluations, with plots: {folder}/report.html')
    return lines


def sample_with(trainer: 'BaseDiffusionTrainer', settings: dict[str, Any]) -> None:
    """Let the trainer sample with these settings in place of its own. Raises SettingError."""
    from sampling import get_sample_fn

    trainer.config = dataclasses.replace(trainer.config, **settings)
    trainer.sample_fn = get_sample_fn(trainer.config, trainer.process, trainer.data.num_classes, trainer.null_cond)


def description(
    options: Evaluate, trainer: 'BaseDiffusionTrainer', weights: str, detector: 'Detector'
) -> dict[str, Any]:
    """All that a result depends on."""
    from evaluation.detectors import digest_of
    from training import run_record

    c = trainer.config
    return dict(
        step=trainer.step, weights=weights, weights_digest=digest_of(trainer.network),
        solver=c.solver, num_sample_steps=c.num_sample_steps, nfe=c.sample_nfe,
        time_grid=c.time_grid, guidance_scale=c.guidance_scale, guidance_interval=list(c.guidance_interval),
        guidance_rescale=c.guidance_rescale, num=options.num, seed=options.seed, bits=options.bits,
        detector=options.detector, detector_digest=detector.digest, data=trainer.train_loader.fingerprint,
        train_images=trainer.train_loader.size, held_out_images=trainer.test_loader.size,
        commit=run_record.git_state()['commit'],
    )  # fmt: skip


def find(record: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The line of the record that was made by the same, if there is one."""
    lines = record.read_text().splitlines() if record.exists() else []
    same = (
        line for line in map(json.loads, lines) if all(line.get(k) == v for k, v in made_by.items() if k != 'commit')
    )
    return next(same, None)


def append(record: Path, line: dict[str, Any]) -> None:
    with open(record, 'a') as file:
        file.write(json.dumps(line) + '\n')


def judge(
    options: Evaluate, trainer: 'BaseDiffusionTrainer', detector: 'Detector', reference: tuple['Tensor', 'Tensor']
) -> dict[str, float]:
    """Distances of new samples, and of as many training images, drawn at random, as a floor (`real_...`)."""
    import torch
    from tqdm import tqdm

    from evaluation.distances import compare
    from runtime import ranks, stopping
    from scripts.generate import Generate, inputs_of
    from utils import NoiseOfEach

    drawing = Generate(run=options.run, out='', num=options.num, seed=options.seed)
    model_fn, features, right = trainer.get_model_fn(trainer.network), [], []
    predict = detector.predict
    began = time.monotonic()
    mine = ranks.my_items(options.num)
    batches = [mine[i : i + options.batch_size] for i in range(0, len(mine), options.batch_size)]
    for indices in tqdm(batches, unit='batch', disable=None if ranks.is_main() else True, leave=False):
        stopping.raise_if_stopped()
        inputs = inputs_of(trainer, indices, [], drawing)
        with torch.no_grad(), stopping.asking_nobody(), NoiseOfEach(options.seed, 'draw', indices):
            x = trainer.decode(trainer.draw(model_fn, inputs, trainer.config.solver))
        with torch.no_grad():
            features.append(detector.features(x).cpu())
            if predict is not None and inputs.label is not None:
                right.append((predict(x) == inputs.label).float().cpu())
    rate = options.num / (time.monotonic() - began)
    mine_done = ranks.gather_items(torch.cat(features), options.num)
    values: dict[str, float] = {}
    if right and trainer.config.label_dropout < 1:
        values['label_agreement'] = float(ranks.gather_items(torch.cat(right), options.num).mean())
    if options.num <= mine_done.shape[1]:
        ranks.print_once(
            f'warning: {options.num} samples for {mine_done.shape[1]} features: frechet is far from its value for many '
            'samples, so look at real_frechet beside it, or draw more'
        )
    computed = ranks.on_each(lambda: compare(mine_done, *reference) if ranks.is_main() else {}, patient=True)
    return values | ranks.on_main(lambda: computed) | dict(images_per_second=rate)


def held_out_losses(trainer: 'BaseDiffusionTrainer', options: Evaluate) -> dict[str, float]:
    """The held-out loss of the run and the reference loss, by time, of these weights; and bits per dimension."""
    from evaluation import judge

    values = {'eval/loss': judge.held_out_loss(trainer, trainer.network)}
    judge.find_reference(trainer)
    if trainer.has_reference:
        values |= judge.reference(trainer, trainer.network)
    return values | (bits(trainer, options.bits) if options.bits else {})


def bits(trainer: 'BaseDiffusionTrainer', n: int, batch_size: int = 32) -> dict[str, float]:
    """Bits per dimension of n held-out images, dequantized, and the standard error of this mean.

    Without guidance. Raises SettingError where no density is defined: floats, x1 that is data.
    """
    import torch

    import utils
    from evaluation.likelihood import bits_per_dim, dequantize, log_likelihood
    from runtime import ranks

    c, spec, loader = trainer.config, trainer.data, trainer.test_loader
    if spec.scale != 'image' or not trainer.independent or utils.overridden(trainer, 'encode'):
        raise SettingError('bits: needs images, the usual encode, and noise as x1.')
    if not c.dequantize:
        ranks.print_once('warning: the run was trained without --dequantize, so that its density is one of grey levels '
                         'and bits per dimension may be any number')  # fmt: skip
    n = min(n, loader.size)
    levels, shape = spec.max_value + 1, spec.shape or ()
    found: dict[int, Any] = {}
    blocks = list(enumerate(torch.arange(n).split(batch_size)))  # the same on any number of processes
    for number, rows in blocks[ranks.rank() :: ranks.world_size()]:
        x, label, *_ = loader.take(rows)
        with utils.NoiseOfEach(0, 'bits', rows.tolist()):
            x = dequantize((x * spec.max_value).round(), levels)
        utils.seed_everything(0, 'probes', number)
        log_prob = log_likelihood(
            trainer.get_model_fn(trainer.network),
            trainer.process,
            x,
            label if spec.num_classes else None,
            model_type=c.model_type,
            t_min=c.t_min,
            t_max=c.t_max,
        ).log_prob
        found[number] = bits_per_dim(log_prob, shape, levels).tolist()
    together = {number: values for part in ranks.all_gather_objects(found) for number, values in part.items()}
    each = torch.tensor([value for number in sorted(together) for value in together[number]])
    return {'bits_per_dim': float(each.mean()), 'bits_per_dim_error': float(each.std() / n**0.5), 'bits_images': n}


def print_all(lines: list[dict[str, Any]]) -> None:
    from runtime.ranks import print_once

    print_once(table(lines))


def table(lines: list[dict[str, Any]]) -> str:
    """The main numbers, a row for each combination."""
    from reports.page import COLUMNS, cell_of, text_of

    columns = [name for name in COLUMNS if any(name in line for line in lines)]
    rows = [columns] + [[text_of(cell_of(line, name)) for name in columns] for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == '__main__':
    main()
