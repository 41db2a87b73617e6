"""Evaluates a run: held-out losses, the reference loss, comparable between runs, and numbers for samples.

Nothing here changes the training: a run that is killed here repeats the evaluation when it resumes.
"""

import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import utils
from config import SettingError
from logging_utils import Record, RunningMeans
from runtime import ranks
from runtime.errors import RankFailed
from runtime.ranks import print_once
from sampling import ModelFn
from training import advice
from training.batches import Batches
from training.calling import in_eval_mode
from training.drawing import Drawing, no_memory, not_finite
from training.experiment import Experiment, ProcessedBatch, SampleInputs

if TYPE_CHECKING:  # imported where they are used, so that the program starts sooner
    from evaluation.detectors import Detector, JudgedData
    from evaluation.distances import SampleFeatures
    from evaluation.reference import Reference

NUM_JUDGED = 1000  # samples that are compared with the data
MOST_COMPARED, MOST_NEIGHBOURS = 200_000, 5000  # training items in comparisons, and in distances between pairs
MOST_READ = 20_000  # training items in comparisons, if the data are not in memory
AT_ONCE = 256  # samples in a detector's batch
Losses = Callable[[ProcessedBatch, Tensor, ModelFn], tuple[Tensor, Tensor]]  # -> losses (B,), times (B,)


class Judge:
    """Judges the networks of an experiment. Remembers facts about the loss and the data."""

    def __init__(self, experiment: Experiment, batches: Batches, record: Record, drawing: Drawing):
        self.experiment, self.config = experiment, experiment.config
        self.batches, self.record, self.drawing = batches, record, drawing

    @in_eval_mode
    def rehearse(self) -> None:
        """Before training: warn of suspicious settings and data, and try the losses, so that they fail now or never."""
        c, e, example, size = self.config, self.experiment, self.batches.example, self.batches.train_loader.size
        with torch.no_grad():
            round_trip = advice.round_trip_warning(x := example.x_original[:8], e.decode(e.encode(x)))
        of_values = advice.scale_warning(example.x0, c.sigma_data), advice.condition_warning(example.cond), round_trip
        of_settings = advice.settings_warnings(c, e.process, example.x0.shape[2:], e.data.num_classes, size)
        for warning in filter(None, of_values + of_settings):
            print_once(f'warning: {warning}')
        _ = self.loss_needs_gradients, self.has_reference
        with self.record.logging_apart():  # samplers() may draw samples, to drop equal samplers
            num_samples = len(self.experiment.samplers()) * NUM_JUDGED
            self.drawing.samples_at_end['judge'] = c.final_eval * self.can_judge * num_samples

    @cached_property
    def reference(self) -> 'Reference':
        from evaluation.reference import Reference

        return Reference(self.experiment, self.batches)

    @cached_property
    @in_eval_mode
    def loss_needs_gradients(self) -> bool:
        """Whether the loss itself takes gradients (score matching, Jacobians), so that no_grad would break it."""
        example, model_fn = self.batches.example, self.experiment.get_model_fn(self.judged_weights()[1])
        with self.record.logging_apart():
            try:
                with torch.no_grad():
                    self.experiment.loss_fn(example, model_fn)
                return False
            except RuntimeError as error:
                if utils.is_out_of_memory(error):
                    raise
                self.experiment.loss_fn(example, model_fn)  # a broken loss raises here, too
                return True

    @cached_property
    @in_eval_mode
    def has_reference(self) -> bool:
        """Whether the network can be evaluated as a denoiser of noise, unless the experiment rules it out."""
        if not self.experiment.has_reference:
            return False
        if not self.drawing.has_score:
            print_once('eval/reference is left out: it is a denoising loss, and x1 is not independent N(0, I) noise')
            return False
        example, model_fn = self.batches.example, self.experiment.get_model_fn(self.judged_weights()[1])
        index = torch.arange(len(example.t), device=self.experiment.device)
        try:
            with self.record.logging_apart(), torch.no_grad():
                ranks.on_each(lambda: self.reference.errors(example, index, model_fn))
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            # A custom loss_fn may train a network that does not take the arguments of a denoiser.
            if utils.is_out_of_memory(error) or not self.experiment.overrides('loss_fn'):
                raise
            print_once(f'eval/reference is left out: this network cannot be evaluated as a denoiser ({error})')
            return False
        return True

    def judged_weights(self) -> tuple[str, nn.Module]:
        """Name and network of the weights by which the run is judged: the first of `weights()`."""
        return next(iter(self.experiment.weights().items()))

    # ---------------------------------------------------------------- held-out losses

    def held_out_losses(self, step: int) -> dict[str, float]:
        """`eval/loss` and the values that loss_fn logs, for all weights, with the same noise and times every time;
        `eval/reference` for the judged weights; the first time also the baselines."""
        values: dict[str, float] = {}
        for name, module in self.experiment.weights().items():
            suffix = '' if name == 'raw' else f'_{name}'
            with self.record.logging_apart() as logged:
                values[f'eval/loss{suffix}'] = self.held_out_loss(module)
            values |= {f'eval/{key.removeprefix("train/")}{suffix}': value for key, value in logged.items()}
        if self.has_reference:
            values |= self.reference_loss(self.judged_weights()[1])
        is_first = step == min(self.config.eval_every or math.inf, self.config.num_training_steps)
        return values | (self.reference.baselines() if is_first and self.has_reference else {})

    def held_out_loss(self, module: nn.Module, rounds: int | None = None) -> float:
        """Mean of `loss_fn` over all held-out images, or over the first `rounds`, to seven digits."""
        own = lambda batch, _, model_fn: (self.experiment.loss_fn(batch, model_fn), batch.t)  # noqa: E731
        return self.held_out_means(module, own, rounds).means()['loss']

    def reference_loss(self, module: nn.Module, rounds: int | None = None) -> dict[str, float]:
        """`eval/reference` (see Reference), and by time."""
        with self.record.logging_apart():  # values that prepare_batch_fn logs are in eval/... already
            means = self.held_out_means(module, self.reference.errors, rounds).means()
        return {name.replace('loss', 'eval/reference', 1): value for name, value in means.items()}

    @in_eval_mode
    def held_out_means(self, module: nn.Module, losses_of: Losses, rounds: int | None = None) -> RunningMeans:
        """Means of losses over held-out images, also by time; the processes share the work."""
        means, model_fn = RunningMeans(self.experiment.device), self.experiment.get_model_fn(module)
        needs_gradients = self.loss_needs_gradients  # computed before the generators are seeded: it draws numbers
        for batch, index in self.batches.held_out(rounds):
            utils.seed_everything(self.config.seed, 'evaluate', int(index[0]))
            with torch.set_grad_enabled(needs_gradients), ranks.as_one_process():  # loss_fn may draw samples
                losses, t = losses_of(batch, index, model_fn)
            means.add('loss', utils.double(losses.detach()).sum(), torch.tensor(len(losses)).to(losses))
            means.add_by_time('loss_t', losses.detach(), t)
        return means

    def bits_per_dim(self, module: nn.Module, n: int, at_once: int = 32) -> dict[str, float]:
        """Mean bits per dimension of n dequantized held-out images, and its standard error; without guidance.

        Raises SettingError where no density is defined: for floats, and if x1 is data.
        """
        experiment, loader, spec = self.experiment, self.batches.test_loader, self.experiment.data
        if spec.scale != 'image' or spec.value_range or not self.drawing.has_score or experiment.overrides('encode'):
            raise SettingError('bits: needs uint8 images, the default encode, independent N(0, I) as x1; omit --bits.')
        if not self.config.dequantize:
            print_once('warning: the run was trained without --dequantize, so its density concentrates on grey levels '
                       'and bits per dimension may be any number')  # fmt: skip
        n = min(n, loader.size)
        blocks, bits = torch.arange(n).split(at_once), torch.zeros(n)  # the same blocks on any number of processes
        for number in range(ranks.rank(), len(blocks), ranks.world_size()):
            bits[blocks[number]] = self.bits_of_block(module, blocks[number], number).cpu()
        ranks.all_reduce(bits)
        return {'bits_per_dim': float(bits.mean()), 'bits_per_dim_error': float(bits.std() / n**0.5), 'bits_images': n}

    @in_eval_mode
    def bits_of_block(self, module: nn.Module, rows: Tensor, number: int) -> Tensor:
        """Bits per dimension (n,) of the held-out images with indices `rows` (n,): block `number`."""
        from evaluation.likelihood import bits_per_dim, dequantize, log_likelihood

        c, e, levels = self.config, self.experiment, self.experiment.data.max_value + 1
        loaded = self.batches.test_loader.take(rows)
        utils.seed_everything(0, 'conditions', number)
        given = self.batches.prepared(loaded)  # class and conditions as in training
        with utils.NoiseOfEach(0, 'bits', rows.tolist()):
            x = dequantize((loaded[0] * e.data.max_value).round(), levels)
        if given.x0.shape != x.shape or (given.x0 - x).abs().max() > 2.01 / levels:
            raise SettingError('bits: needs the image as x0, but prepare_batch_fn changes it. Omit --bits.')
        utils.seed_everything(0, 'probes', number)
        settings: dict[str, Any] = dict(cond=given.cond, model_type=c.model_type, t_min=c.t_min, t_max=c.t_max)
        likelihood = log_likelihood(e.get_model_fn(module), e.process, x, given.label, **settings)
        return bits_per_dim(likelihood.log_prob, e.data.shape or (), levels)

    # ---------------------------------------------------------------- numbers for samples

    def samples(self, step: int, num_samples: int | None = None) -> dict[str, float]:
        """Numbers for samples of the judged weights, also printed: final/<sampler>/... for every sampler at the end,
        eval/<sampler>/... for the first sampler during training."""
        c, names, values = self.config, list(self.experiment.samplers()), {}
        last = step >= c.num_training_steps
        if not self.can_judge:
            if last:
                why = 'it has too few items, or is neither images nor short vectors'
                print_once(f'no final numbers for {c.dataset}: {why}. Override sample_metrics, or pass --no_final_eval')
            return values
        with self.record.logging_apart() as logged:
            for name in names if last else names[:1]:
                found = self.judge_sampler(name, num_samples or NUM_JUDGED, step)
                on_curve = name == names[0] and (c.eval_metrics_every > 0 or not last)  # also its last point
                for prefix in ['final'] * last + ['eval'] * on_curve:
                    values |= {f'{prefix}/{name}/{key}': value for key, value in found.items()}
        return values | logged

    @in_eval_mode
    def judge_sampler(self, name: str, num_samples: int, step: int) -> dict[str, float]:
        """Numbers for samples of the judged weights by the sampler `name`, on every rank."""
        from evaluation.distances import describe_numbers

        weights, module = self.judged_weights()
        with self.batches.as_in_data():
            inputs = self.drawing.inputs(num_samples)
        print_once(f'drawing {num_samples} samples: {weights} weights, {name} ...')
        try:
            x = self.drawing.samples(self.experiment.samplers()[name], module, inputs)
        except RankFailed:
            print_once(no_memory(step, name, 'its metrics are'))
            return {}
        if not_finite(x):
            print_once('  no numbers are computed for these samples')
            return {}
        print_once(describe_numbers(numbers := self.numbers(x, inputs)))
        return {key: float(value) for key, value in numbers.items()}

    @in_eval_mode
    def numbers(self, x: Tensor, inputs: SampleInputs) -> dict[str, float]:
        """`sample_metrics` of decoded samples (n, ...), on every rank. What it draws does not depend on the ranks."""
        utils.seed_everything(self.config.seed, 'sample_metrics')
        compute = partial(self.experiment.sample_metrics, x, inputs)  # processes share the work of the default
        return ranks.on_main_as_one_process(compute) if self.experiment.overrides('sample_metrics') else compute()

    def distances(self, x: Tensor, inputs: SampleInputs) -> dict[str, float]:
        """Distances of decoded samples (n, ...) from the training data, by the default detector."""
        from evaluation.distances import SampleFeatures

        sampled, my_rows = SampleFeatures(self.detector, self.data), torch.tensor(ranks.my_items(len(x)))
        classes = self.experiment.data.known_classes(inputs.label, self.config.label_dropout)
        for rows in my_rows.split(AT_ONCE):
            wanted = None if classes is None else classes[rows.to(classes.device)]
            sampled.add(x[rows].to(self.experiment.device), wanted)
        most = MOST_COMPARED if self.batches.train_loader.resident is not None else MOST_READ
        return self.compare_with_data(sampled, len(x), most, MOST_NEIGHBOURS)

    @in_eval_mode
    def compare_with_data(
        self, sampled: 'SampleFeatures', n: int, most: int | None = None, pairs: int | None = None
    ) -> dict[str, float]:
        """Distances of n samples, dealt out by ranks.my_items, from `most` training images (`pairs` images in distances
        between pairs), on every rank; also the label agreements, if all labels are classes. {} for other data."""
        from evaluation.detectors import agreement, features_of_data, rows_of
        from evaluation.distances import compare, frequencies_caution

        def joined(parts: list[Tensor]) -> Tensor | None:
            some_lack = ranks.any_rank(len(parts) < len(sampled.features))
            return None if some_lack else ranks.gather_items(torch.cat(parts), n)

        if sampled.mismatch:
            print_once(f'  no distances from the data: {sampled.mismatch}')
            return {}
        features, wanted, recognised = map(joined, (sampled.features, sampled.classes, sampled.recognised))
        assert features is not None
        loader, detector = self.batches.train_loader, sampled.detector
        classes = None if loader.labels is None else loader.labels[rows_of(loader, most)]
        data = features_of_data(detector, self.data, most)
        if (most or loader.size) < loader.size:
            print_once(f'  the samples are compared with {most:,} of {loader.size:,} training items')
        for caution in frequencies_caution(wanted, loader.labels, self.experiment.data.num_classes):
            print_once(f'  caution: {caution}')
        values, is_standard = agreement(recognised, detector, self.data), detector.digest != 'values'
        return values | ranks.on_main_patiently(lambda: compare(features, *data, pairs, classes, wanted, is_standard))

    @cached_property
    def data(self) -> 'JudgedData':
        from evaluation.detectors import JudgedData

        e, b, cache = self.experiment, self.batches, Path(self.config.data_dir, 'cache')
        as_decoded = lambda x: e.decode(e.encode(x))  # noqa: E731
        return JudgedData(b.train_loader, b.test_loader, as_decoded, self.config.dataset, cache, e.device)

    @cached_property
    def detector(self) -> 'Detector':
        """The default detector, made when samples are first judged."""
        from evaluation.detectors import get_detector

        detector = get_detector(self.data)
        print_once(f'  judged by {detector.about}')
        return detector

    @cached_property
    def can_judge(self) -> bool:
        """Whether the experiment has its own metrics, or the data are enough images or short vectors."""
        if self.experiment.overrides('sample_metrics'):
            return True
        from evaluation.detectors import MOST_PIXELS

        x = self.experiment.decode(self.batches.example.x0[:1])
        few = x.is_floating_point() and x.numel() <= MOST_PIXELS
        sizes = self.batches.train_loader.size, self.batches.test_loader.size
        return (few or (x.ndim == 4 and x.shape[1] in (1, 3, 4))) and min(sizes) >= 10
