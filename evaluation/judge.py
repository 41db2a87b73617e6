"""How a run is judged: held-out losses, the loss that all runs of a data set share, numbers for final samples.

Everything here only reads: a run that is killed in it does it again when it is resumed.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

import utils
from data_loading.loader import HeldOutSampler
from evaluation import pixel_metrics
from evaluation.detectors import DETECTORS, MOST_PIXELS, features_of_data, usual
from evaluation.distances import compare
from evaluation.reference import levels, reference_errors
from logging_utils import RunningMeans
from optimizers import lr_warning
from reports import page as run_report
from reports import pictures
from runtime import errors, ranks, stopping
from runtime.ranks import print_once
from sampling import ModelFn
from training import batches, checkpoints
from training.advice import pair_warning
from training.batches import ProcessedBatch, SampleInputs

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer

T = TypeVar('T')
NUM_JUDGED = 1000  # samples that are compared with the data
MOST_COMPARED = 20_000  # training images that they are compared with
Losses = Callable[[ProcessedBatch, Tensor, ModelFn], tuple[Tensor, Tensor]]  # -> losses (B,), times (B,)

# ---------------------------------------------------------------- what is due at a step


def report(trainer: 'BaseDiffusionTrainer') -> None:
    """The line of the record, with held-out losses and final metrics, and the pictures that are due at this step."""
    c, last = trainer.config, trainer.step == trainer.config.num_training_steps
    values: dict[str, float] = {}
    if trainer.step == 0:
        with collected(trainer):
            pictures.show_data_and_schedule(trainer)
    try:
        if trainer.due(c.log_every):
            trainer.bad_steps.raise_if_too_many()
            values |= summary(trainer)
        if trainer.due(c.eval_every):
            values |= evaluate(trainer)
        with collected(trainer) as logged:  # by an experiment, while it samples
            if trainer.due(c.sample_every) and (c.final_pictures or not last):
                pictures.sample_grids(trainer)
                pictures.show_paths(trainer)
            if last and c.final_eval:
                values |= final_metrics(trainer)
                if c.eval_metrics_every:  # the last point of their curve
                    name = f'final/{next(iter(trainer.samplers()))}/'
                    values |= {k.replace('final', 'eval', 1): v for k, v in values.items() if k.startswith(name)}
            elif trainer.due(c.eval_metrics_every) and not last and is_judged(trainer):
                name = next(iter(trainer.samplers()))
                values |= {f'eval/{name}/{key}': value for key, value in judged(trainer, name, NUM_JUDGED).items()}
        values |= logged
    finally:  # when asked to stop: what was computed before it
        if values:
            values = {'train/images': trainer.step * c.global_batch_size} | values
            ranks.on_main(lambda: trainer.logger.log(values, trainer.step))  # a full disk is an error on every rank
    if trainer.due(c.sample_every):
        ranks.on_main(lambda: run_report.update(c.run_dir))
    if any(map(trainer.due, (c.log_every, c.eval_every, c.eval_metrics_every, c.sample_every, c.save_every))):
        trainer.speed.restart(trainer.step)
        trainer.train_loader.waited = 0.0


def summary(trainer: 'BaseDiffusionTrainer') -> dict[str, float]:
    """The means since the last line of the record, speed and memory."""
    batch = trainer.config.global_batch_size
    values = trainer.means.means()
    values['train/memory_gb'] = utils.peak_memory_gb(trainer.device)
    values['train/bad_steps'] = trainer.bad_steps.report()
    speed = trainer.speed.images_per_second(trainer.step, batch)
    if speed is not None:  # not in a line that a resumed run writes again
        values['train/images_per_second'] = speed
        values['train/waiting'] = trainer.train_loader.waited / trainer.speed.seconds()
        trainer.progress.show(trainer.step, values.get('train/loss', math.nan), speed, seconds_at_end(trainer))
    return values


@contextlib.contextmanager
def collected(trainer: 'BaseDiffusionTrainer') -> Iterator[dict[str, float]]:
    """What the experiment logs meanwhile: apart from the means of training, and in the dict when this is over."""
    training, trainer.means = trainer.means, RunningMeans(trainer.device)
    logged: dict[str, float] = {}
    try:
        yield logged
        logged |= trainer.means.means()
    finally:
        trainer.means = training


# ---------------------------------------------------------------- held-out losses


def evaluate(trainer: 'BaseDiffusionTrainer') -> dict[str, float]:
    """`eval/loss` of the raw and the averaged weights, with the same noise and times every time, what loss_fn logs, and
    `eval/reference` of the weights by which the run is judged."""
    values: dict[str, float] = {}
    for name, module in trainer.weights().items():
        suffix = '' if name == 'raw' else f'_{name}'
        with collected(trainer) as logged:
            values[f'eval/loss{suffix}'] = held_out_loss(trainer, module)
        values |= {f'eval/{key.removeprefix("train/")}{suffix}': value for key, value in logged.items()}
    if trainer.has_reference:
        values |= reference(trainer, next(iter(trainer.weights().values())))
    first = trainer.step == min(trainer.config.eval_every or math.inf, trainer.config.num_training_steps)
    return values | (levels(trainer) if first else {})


def held_out_loss(trainer: 'BaseDiffusionTrainer', module: nn.Module, rounds: int | None = None) -> float:
    """Mean of `loss_fn` over all held-out images, or those of the first `rounds`, to seven digits."""
    means = held_out_means(trainer, module, lambda batch, _, fn: (trainer.loss_fn(batch, fn), batch.t), rounds)
    return means.means()['loss']


def reference(trainer: 'BaseDiffusionTrainer', module: nn.Module, rounds: int | None = None) -> dict[str, float]:
    """`eval/reference`, and by time: the one loss that is the same in all runs of a data set whose x1 is noise.

    It does not depend on a run's process, output, loss and times: the mean square error of the velocity x1 - x0 of the
    straight line xt = (1 - t) x0 + t x1, at uniform times, without a weight. A network of another process is asked at
    the time of equal log-SNR.
    """
    with collected(trainer):  # what prepare_batch_fn logs is in eval/... already
        means = held_out_means(trainer, module, functools.partial(reference_errors, trainer), rounds).means()
    return {name.replace('loss', 'eval/reference', 1): value for name, value in means.items()}


def held_out_means(
    trainer: 'BaseDiffusionTrainer', module: nn.Module, losses_of: Losses, rounds: int | None = None
) -> RunningMeans:
    """Means of losses over held-out images, by time too; the processes share the work."""
    means, model_fn = RunningMeans(trainer.device), trainer.get_model_fn(module)
    for batch, index in held_out(trainer, rounds):
        utils.seed_everything(trainer.config.seed, 'evaluate', int(index[0]))
        losses, t = without_gradients(trainer, lambda batch=batch, index=index: losses_of(batch, index, model_fn))
        means.add('loss', losses.detach().double().sum(), torch.tensor(len(losses)).to(losses))
        means.add_by_time('loss_t', losses.detach(), t)
    return means


def without_gradients(trainer: 'BaseDiffusionTrainer', compute: Callable[[], T]) -> T:
    """`compute()` under no_grad, unless the loss itself differentiates (score matching, Jacobians)."""
    if not trainer.loss_needs_gradients:
        try:
            with torch.no_grad():
                return compute()
        except RuntimeError as error:
            if 'does not require grad' not in str(error):
                raise
            trainer.loss_needs_gradients = True
    return compute()


def held_out(trainer: 'BaseDiffusionTrainer', rounds: int | None) -> Iterator[tuple[ProcessedBatch, Tensor]]:
    """(prepared batch, numbers (B,) of its images in the held-out part), as many at once as in training."""
    pieces, loaded = trainer.test_loader.batch_sampler, iter(trainer.test_loader)
    at_once = trainer.shards_per_micro_step()
    assert isinstance(pieces, HeldOutSampler)
    pieces.all_shards = trainer.couples
    for number in range(min(rounds or pieces.rounds, pieces.rounds)):
        stopping.raise_if_stopped()
        numbers = pieces.numbers(number)
        drawn = [trainer.draw_shard(next(loaded), piece, 'evaluate') for piece in numbers]
        if trainer.couples:
            own = trainer.train_sampler.my_shards
            mine = [i for i, piece in enumerate(numbers) if piece % trainer.config.batch_shards in own]
            drawn = batches.couple_shards(trainer, drawn, mine, f'evaluate {number}')
            numbers = [numbers[i] for i in mine]
        for i in range(0, len(drawn), at_once):  # in the last round some processes have none
            together = list(zip(numbers[i : i + at_once], drawn[i : i + at_once], strict=True))
            index = [torch.arange(len(part.t)) + pieces.first_index(piece) for piece, part in together]
            yield utils.concat([part for _, part in together]), torch.cat(index).to(trainer.device)


# ---------------------------------------------------------------- at the start and at the end


def rehearse(trainer: 'BaseDiffusionTrainer') -> None:
    """Before training: say what looks wrong, and try sampling and evaluation, so that they fail now or never."""
    c = trainer.config
    for warning in (batches.warning_of_scale(trainer), pair_warning(c, trainer.process), lr_warning(c)):
        if warning:
            print_once(f'warning: {warning}')
    checkpoints.check_state(trainer)
    example, model_fn = trainer.example, trainer.get_model_fn(trainer.network)
    with collected(trainer):
        pictures.first_drawing(trainer)
        without_gradients(trainer, lambda: trainer.loss_fn(example, model_fn))
    find_reference(trainer)
    trainer.drawing.at_end = drawn_at_end(trainer)


def find_reference(trainer: 'BaseDiffusionTrainer') -> None:
    """Set `trainer.has_reference` to whether the network can be asked as a denoiser, if no subclass says that not."""
    if not trainer.has_reference:
        return
    example, model_fn = trainer.example, trainer.get_model_fn(trainer.network)
    try:
        with torch.no_grad():
            reference_errors(trainer, example, torch.arange(len(example.t)), model_fn)
    except Exception as error:
        trainer.has_reference = False
        print_once(f'eval/reference is left out: this network cannot be asked as a denoiser ({error})')


def final_metrics(trainer: 'BaseDiffusionTrainer', num_samples: int | None = None) -> dict[str, float]:
    """final/<sampler>/...: numbers for the judged weights' samples by every sampler, printed too."""
    values: dict[str, float] = {}
    if not is_judged(trainer):
        print_once(f'final_eval: nothing here can judge samples of {trainer.config.dataset!r}: override sample_metrics')
        return values
    for name in trainer.samplers():
        values |= {
            f'final/{name}/{key}': value for key, value in judged(trainer, name, num_samples or NUM_JUDGED).items()
        }
    return values


def is_judged(trainer: 'BaseDiffusionTrainer') -> bool:
    """Whether samples can be compared with the data: images or few numbers, and enough of them; or as an experiment
    says."""
    if trainer.data.pixel_metrics or utils.overridden(trainer, 'sample_metrics'):
        return True
    x = trainer.decode(trainer.example.x0[:1])
    few = x.is_floating_point() and x.numel() <= MOST_PIXELS
    return (pictures.kind(x) == 'images' or few) and min(trainer.train_loader.size, trainer.test_loader.size) >= 10


def judged(trainer: 'BaseDiffusionTrainer', sampler: str, num_samples: int) -> dict[str, float]:
    """Numbers for samples of the judged weights by the sampler of this name, printed too, on every rank."""
    weights, module = next(iter(trainer.weights().items()))
    inputs = trainer.sample_inputs(num_samples)
    print_once(f'drawing {num_samples} samples: {weights} weights, {sampler} ...')
    try:
        x = pictures.generate(trainer, trainer.samplers()[sampler], module, inputs)
    except errors.RankFailed:
        print_once(pictures.no_memory(trainer, sampler, 'its metrics are'))
        return {}
    numbers = numbers_for(trainer, x, inputs)
    print_once(pixel_metrics.describe(numbers))
    return {name: float(value) for name, value in numbers.items()}


def numbers_for(trainer: 'BaseDiffusionTrainer', x: Tensor, inputs: SampleInputs) -> dict[str, float]:
    """What decoded samples (n, ...) are judged by, on every rank."""
    if trainer.data.pixel_metrics or utils.overridden(trainer, 'sample_metrics'):
        return ranks.on_main(functools.partial(trainer.sample_metrics, x, inputs))
    return distances_of(trainer, x, inputs.label)


def distances_of(trainer: 'BaseDiffusionTrainer', x: Tensor, label: Tensor | None) -> dict[str, float]:
    """Distances of decoded samples (n, ...) from the training data, by a classifier of these, or by their values where
    there are no images or no classes. For numbers to publish there is evaluate.py."""
    detector = DETECTORS[usual(trainer)](trainer, '')
    print_once(f'  judged by {detector.about}')
    reference = features_of_data(trainer, detector, most=MOST_COMPARED)
    values, asked = {}, pictures.classes_of(trainer, label)
    with torch.no_grad():
        features = torch.cat([detector.features(part.to(trainer.device)).cpu() for part in x.split(256)])
        if detector.predict is not None and asked is not None:
            seen = torch.cat([detector.predict(part.to(trainer.device)) for part in x.split(256)])
            values['label_agreement'] = float((seen == asked).float().mean())
    return values | ranks.on_main(lambda: compare(features, *reference, most=5000))


def drawn_at_end(trainer: 'BaseDiffusionTrainer') -> int:
    """How many samples are drawn after the last step, for pictures and numbers."""
    c, samplers = trainer.config, len(trainer.samplers())
    n = c.final_pictures * samplers * len(trainer.weights()) * pictures.num_shown(trainer)
    return n + c.final_eval * is_judged(trainer) * samplers * NUM_JUDGED


def seconds_at_end(trainer: 'BaseDiffusionTrainer') -> float | None:
    """What drawing these samples will take, without judging them; None before the first were drawn."""
    if trainer.drawing.at_end and not trainer.drawing.seconds:
        return None
    return trainer.drawing.at_end * trainer.drawing.seconds
