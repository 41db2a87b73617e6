"""Training. An experiment is a subclass of ExampleDiffusionTrainer that overrides what differs:

prepare_batch_fn   a batch of images becomes x0, x1, t, label: all randomness of a training step
loss_fn            the loss of each image, a pure function of the prepared batch and the network

BaseDiffusionTrainer owns the rest: devices, steps, moving averages, saving, resuming, the record, sampling.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data_utils
import metrics
import saving
import utils
from augmentations import get_augmenter
from config import Config
from ema import EMA
from logging_utils import Logger, Progress, RunningMeans
from loss_weights import get_loss_weight
from optimizers import clip_gradients, get_lr, get_optimizer, set_lr, step_if
from prediction import check_time_range, get_model_convert_fn, get_target_fn
from processes import get_process
from runtime import ranks, run_folder, stopping
from runtime.ranks import print_once
from sampling import ModelFn, get_sample_fn
from solvers import SOLVERS
from time_samplers import get_time_sampler


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was NaN or infinite in too many steps in a row."""


@dataclass
class ProcessedBatch:
    """A prepared batch: all randomness of a training step has been drawn when this exists."""

    x_original: Tensor  # (B, C, H, W) in [0, 1], as loaded
    x0: Tensor  # (B, C, H, W) centred, augmented and dequantized: what is noised
    x1: Tensor  # (B, C, H, W) base sample
    t: Tensor  # (B,)
    label: Tensor | None  # (B,) int64; num_classes means 'no label'
    augmentation_label: Tensor | None  # (B,) bool: was anything done to this image?

    @staticmethod
    def cat(parts: 'list[ProcessedBatch]') -> 'ProcessedBatch':
        """The parts, one after the other; a field that is None in the first part is None."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(parts[0])}
        return type(parts[0])(
            **{name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}
        )


class BaseDiffusionTrainer:
    """Everything that is not the experiment. `network` is the raw module: the one that is saved and averaged."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        network: nn.Module,
        train_loader: data_utils.Loader,
        train_sampler: data_utils.StreamSampler,
        test_loader: data_utils.Loader,
    ):
        """Resumes from the run's last whole checkpoint if there is one. Raises SettingError for settings that cannot work together."""
        self.config, self.device = config, device
        self.train_loader, self.train_sampler, self.test_loader = train_loader, train_sampler, test_loader
        self.data = data_utils.get_dataset(config)

        self.process = get_process(config)
        check_time_range(config, self.process)
        self.model_convert_fn, self.target_fn = get_model_convert_fn(config.model_type), get_target_fn()
        self.time_sampler, self.loss_weight = get_time_sampler(config), get_loss_weight(config)
        self.sample_fn = get_sample_fn(config, self.process, self.data.num_classes)
        properties = {name: value for name, value in vars(self.data).items() if name.endswith('_keeps_label')}
        self.augmenter = get_augmenter(config, properties)

        self.network = network.to(device, memory_format=torch.channels_last)
        self.optimizer = get_optimizer(config, self.network)
        self.ema = EMA(self.network, config.ema_decays)
        self.autocast_dtype = torch.bfloat16 if config.precision == 'bfloat16' else None
        if (
            config.precision == 'auto'
            and device.type == 'cuda'
            and torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            self.autocast_dtype = torch.bfloat16

        self.step, self.finished, self.wandb_id = 0, False, None
        self.means = RunningMeans(device)  # since the last line of the record
        self.bad_steps = torch.zeros(
            3, dtype=torch.int64, device=device
        )  # skipped: in a row until now, in all, and the last one's number
        self.bad_known = 0  # of these, how many have been reported
        self.writer = run_folder.Writer(config)
        self.stratum = (0, 1)  # which shard of how many is being prepared
        self.restore()

        self.parallel = self.network
        if ranks.world_size() > 1:
            ids = (
                [device.index] if device.type == 'cuda' else None
            )  # the local rank: node 2 has no device of its global one
            self.parallel = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
        self.forward = torch.compile(self.parallel) if config.compile else self.parallel

    # ---------------------------------------------------------------- the experiment

    def prepare_batch_fn(self, batch: tuple[Tensor, Tensor], is_train: bool) -> ProcessedBatch:
        """Override: from (x (n, C, H, W) in [0, 1], label (n,)) to a ProcessedBatch. Data, augmentation, coupling, times.

        Use torch's random functions freely: their generators were seeded from (seed, step, shard).
        """
        raise NotImplementedError

    def loss_fn(self, batch: ProcessedBatch, model_fn: ModelFn) -> Tensor:
        """Override: the loss of each image, (B,), a pure function of its inputs. `model_fn(xt, t, label)` is the network."""
        raise NotImplementedError

    def uniforms(self, n: int) -> Tensor:
        """(n,) numbers in [0, 1] for the time sampler: iid; if `stratified`, one in each of n x shards equal intervals; or in pairs u, 1 - u.

        A shard takes every `shards`-th interval, in random order.
        """
        u = torch.rand(n, device=self.device)
        if self.config.antithetic:
            return torch.cat([u[: (n + 1) // 2], 1 - u[: n // 2]])
        if not self.config.stratified:
            return u
        shard, shards = self.stratum
        return (shard + shards * torch.randperm(n, device=self.device) + u) / (shards * n)

    def log(self, name: str, value: Tensor | float) -> None:
        """From any override: the mean over elements, ranks and training steps since the last line of the record goes into the next."""
        value = (
            value.float().mean() if isinstance(value, Tensor) else torch.full((), value, device=self.device)
        )  # no CPU-GPU sync
        self.means.add(name, value, torch.ones((), device=self.device))

    # ---------------------------------------------------------------- training

    def train_loop(self) -> None:
        """Train from `self.step` to the end. Raises stopping.Stopped and SaveError after, NonFiniteLoss without a last save."""
        self.logger = Logger(self.config, self.config.run_dir, self.step, self.wandb_id)
        self.wandb_id = self.logger.wandb_id
        self.progress = Progress(self.step, self.config.num_training_steps)
        self.restart_clock()
        self.test_loader.start_workers()
        stopping.catch_stop_signals()
        try:
            try:
                self.train_steps()
                self.finished = True
            except stopping.Stopped:
                pass
            self.save(wait=True)
            if not self.finished:
                print_once(f'stopped at step {self.step}, state saved: the same command goes on from there')
                raise stopping.Stopped
        finally:
            self.writer.join()
            self.progress.close()
            self.logger.close()

    def train_steps(self) -> None:
        """The steps from `self.step` to the end, each followed by what is due at it."""
        if self.step == 0:
            self.show_data_and_schedule()
        else:
            self.housekeeping()  # what was due at the step of the checkpoint
        shards = self.shards()
        while self.step < self.config.num_training_steps:
            self.train_step(shards)
            self.progress.advance()
            if self.due('save_every') or self.due('keep_every'):
                self.save()
            self.housekeeping()
            stopping.raise_if_stopped()

    def train_step(self, shards: Iterator[ProcessedBatch]) -> None:
        """One optimizer step on a global batch, of which this process draws and computes its shards. A bad step is skipped."""
        c = self.config
        if self.due('log_every'):
            self.means.clear()
        lr = get_lr(c, self.step)
        set_lr(self.optimizer, lr)
        for micro_step in range(c.accumulation_steps):
            batch = ProcessedBatch.cat(list(itertools.islice(shards, self.shards_at_once())))
            utils.seed_everything(c.seed, 'forward', self.step, ranks.rank(), micro_step)  # for dropout
            with self.gradient_sync(micro_step == c.accumulation_steps - 1):
                losses = self.loss_fn(batch, self.get_model_fn(self.forward, train=True))  # (B,)
                if losses.shape != batch.t.shape:
                    raise ValueError(
                        f'loss_fn must return one loss per image, shape {tuple(batch.t.shape)}, not {tuple(losses.shape)}'
                    )
                # a loss that is not finite makes every gradient NaN, on all ranks once these are averaged
                poison = torch.where(losses.detach().isfinite().all(), 1.0, torch.nan)
                (poison * losses.mean() / c.accumulation_steps).backward()
            self.means.add_finite('train/loss', losses)
            self.means.add_by_time('train/loss_t', losses, batch.t)
            if batch.augmentation_label is not None:
                self.log('train/augmented', batch.augmentation_label)
        grad_norm = clip_gradients(self.network.parameters(), c.grad_clip_norm)  # the same on all ranks
        in_a_row, in_all, last = self.bad_steps
        ok = grad_norm.isfinite() & (in_a_row < c.max_bad_steps)  # after too many nothing moves until this is noticed
        step_if(ok, self.optimizer)
        self.optimizer.zero_grad()
        self.ema.update(self.network)  # in a skipped step, with weights that stood still
        self.bad_steps = torch.stack([torch.where(ok, 0, in_a_row + 1), in_all + ~ok, torch.where(ok, last, self.step)])

        self.step += 1
        self.means.add_finite('train/grad_norm', grad_norm)
        self.log('train/lr', lr)

    def shards(self) -> Iterator[ProcessedBatch]:
        """This process's shards of all training steps from `self.step` on, prepared."""
        self.train_sampler.set_step(self.step)
        batches = iter(self.train_loader)
        for step in itertools.count(self.step):
            for shard in self.train_sampler.my_shards:
                yield self.draw_shard(next(batches), shard, step)

    def shards_at_once(self) -> int:
        """How many of this process's shards go through the network together."""
        return len(self.train_sampler.my_shards) // self.config.accumulation_steps

    def draw_shard(self, batch: tuple[Tensor, Tensor], shard: int, step: int | str) -> ProcessedBatch:
        """Shard `shard` of a step's global batch, the same on any number of processes; step 'evaluate' is the held-out data."""
        self.stratum = (shard % self.config.batch_shards, self.config.batch_shards)
        utils.seed_everything(self.config.seed, 'batch', step, shard)
        return self.prepare_batch_fn(batch, is_train=step != 'evaluate')

    def gradient_sync(self, sync: bool) -> contextlib.AbstractContextManager:
        """Average gradients over processes in this backward pass, or leave that to a later one."""
        return contextlib.nullcontext() if sync or self.parallel is self.network else self.parallel.no_sync()

    def get_model_fn(self, module: nn.Module, train: bool = False) -> ModelFn:
        """`module` as a plain function of (xt, t, label) that hides train/eval mode and autocast."""
        module.train(train)

        def model_fn(xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                return module(xt, t, label).float()

        return model_fn

    # ---------------------------------------------------------------- what is due at a step

    def due(self, setting: str) -> bool:
        """Whether this step is a multiple of the setting, or the last."""
        every = getattr(self.config, setting)
        return self.step == self.config.num_training_steps or (every > 0 and self.step > 0 and self.step % every == 0)

    def housekeeping(self) -> None:
        """The line of the record, with held-out loss and final metrics, and the samples that are due at this step.

        It changes nothing that is saved: a run that was killed in it does it again when it is resumed.
        """
        values: dict[str, float] = {}
        try:
            if self.due('log_every'):
                self.raise_if_bad()
                values |= self.summary()
            if self.due('eval_every'):
                values |= self.evaluate()
            if self.step == self.config.num_training_steps and self.config.final_eval:
                values |= self.final_metrics()
        except stopping.Stopped:
            self.write_record(values)  # of what was computed before it
            raise
        self.write_record(values)
        if self.due('sample_every'):
            self.sample_grids()
        if any(map(self.due, ('log_every', 'eval_every', 'sample_every', 'save_every'))):
            self.restart_clock()

    def write_record(self, values: dict[str, float]) -> None:
        if values:
            ranks.on_main(lambda: self.logger.log(values, self.step))  # a full disk is an error on every rank

    def raise_if_bad(self) -> None:
        """Raise NonFiniteLoss, on every rank, if too many steps in a row were bad."""
        in_a_row, _, last = self.bad_steps.tolist()  # CPU-GPU sync
        if in_a_row >= self.config.max_bad_steps:
            raise NonFiniteLoss(
                f'the loss or its gradient was not finite in max_bad_steps={self.config.max_bad_steps} steps in a row, from step {last - in_a_row + 1} on. '
                f'They were skipped: the weights are finite, and those of the last checkpoint are in {self.config.run_dir}. '
                'README.md says how to replay a step (Reliability). Try a lower --base_lr, or --precision float32.'
            )

    def restart_clock(self) -> None:
        self.clock = (time.monotonic(), self.step)

    def summary(self) -> dict[str, float]:
        """The means since the last line of the record, speed and memory."""
        values = self.means.means()
        began, step = self.clock
        images = (self.step - step) * self.config.global_batch_size
        values |= {
            'train/images': self.step * self.config.global_batch_size,
            'train/memory_gb': utils.peak_memory_gb(self.device),
        }
        _, bad, last = self.bad_steps.tolist()
        values['train/bad_steps'] = bad
        if bad > self.bad_known:
            print_once(
                f'skipped {bad - self.bad_known} of the last steps, the latest of them step {last}: loss or gradient not finite'
            )
        self.bad_known = bad
        if images > 0:  # not in a line that a resumed run writes again
            values['train/images_per_second'] = images / (time.monotonic() - began)
            self.progress.show(self.step, values.get('train/loss', math.nan), values['train/images_per_second'])
        return values

    def evaluate(self) -> dict[str, float]:
        """Held-out loss of the raw and the averaged weights, with the same noise and times every time."""
        training_means, self.means = (
            self.means,
            RunningMeans(self.device),
        )  # what an override logs here is not of the training
        try:
            losses = {name: self.held_out_loss(module) for name, module in self.weights().items()}
        finally:
            self.means = training_means
        return {'eval/loss' if name == 'raw' else f'eval/loss_{name}': loss for name, loss in losses.items()}

    @torch.no_grad()
    def held_out_loss(self, module: nn.Module, rounds: int | None = None) -> float:
        """Mean loss over all held-out images (or the first `rounds` shards of each process), to seven digits; the processes share the work."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        pieces = iter(self.test_loader)
        at_once = self.shards_at_once()
        for first in range(0, min(rounds or math.inf, self.test_loader.rounds), at_once):
            stopping.raise_if_stopped()
            numbers = [i * ranks.world_size() + ranks.rank() for i in range(first, first + at_once)]
            drawn = [self.draw_shard(piece, n, 'evaluate') for n, piece in zip(numbers, pieces, strict=False)]
            if drawn:  # in the last round some processes have none
                losses = self.loss_fn(ProcessedBatch.cat(drawn), self.get_model_fn(module))
                total += torch.stack([losses.double().sum(), torch.tensor(len(losses)).to(total)])
        loss, count = ranks.all_reduce(total).tolist()
        return float(f'{loss / count:.7g}')

    def weights(self) -> dict[str, nn.Module]:
        """The networks that can be evaluated, by name; the first moving average, if any, is the one to judge a run by."""
        return {f'ema_{decay:g}': net for decay, net in self.ema.networks.items()} | {'raw': self.network}

    # ---------------------------------------------------------------- samples

    def generate(self, module: nn.Module, x1: Tensor, label: Tensor, solver: str) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] on every rank, from noise and labels that every rank has; the work is shared out."""
        c, model_fn = self.config, self.get_model_fn(module)

        def callback(step: int, t: float, x: Tensor) -> None:
            stopping.raise_if_stopped()

        mine = torch.tensor(ranks.my_items(len(x1)), device=self.device)
        images = []
        at_once = self.shards_at_once() * c.global_batch_size // c.batch_shards  # as many images as in training
        for i, part in enumerate(mine.split(at_once)):
            utils.seed_everything(c.seed, 'generate', ranks.rank(), i)  # for the SDE
            images.append(
                self.sample_fn(model_fn, x1=x1[part], label=label[part], solver=solver, callback=callback).clamp(-1, 1)
            )
        return ranks.gather_items(torch.cat(images), len(x1))

    def noise_and_labels(self, n: int) -> tuple[Tensor, Tensor]:
        """Base noise (n, C, H, W) and labels (n,) that go round the classes; the same every time."""
        utils.seed_everything(self.config.seed, 'noise_and_labels')
        x1 = self.process.sample_base(torch.zeros(n, *self.data.shape, device=self.device))
        return x1, torch.arange(n, device=self.device) % max(1, self.data.num_classes)

    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of a grid of samples: a class a column."""
        return 6, min(10, self.data.num_classes) if self.data.num_classes > 1 else 8

    def grid_solvers(self) -> tuple[str, str]:
        """The solver of the settings, and one of the other kind: ODE and SDE."""
        return self.config.solver, 'adams' if SOLVERS[self.config.solver].stochastic else 'sde_dpmpp_2m'

    def sample_grids(self) -> None:
        """Pictures of ODE and SDE samples of all weights: noise on the left, what became of it on the right."""
        rows, columns = self.grid_shape()
        x1, label = self.noise_and_labels(rows * columns)
        for solver in self.grid_solvers():
            for name, module in self.weights().items():
                images = self.generate(module, x1, label, solver)
                grids = [utils.image_grid(x, columns) for x in (x1 / 4 + 0.5, images / 2 + 0.5)]
                picture = f'step_{self.step:07d}_{solver}_{name}', torch.cat(grids, 2), self.step
                ranks.on_main(lambda picture=picture: self.logger.log_picture(*picture))

    def show_data_and_schedule(self) -> None:
        """A picture of the first batch, left, and what augmentation makes of it, right; the learning rate of every step."""
        if not ranks.is_main():
            return
        pieces = itertools.islice(self.train_loader, len(self.train_sampler.my_shards))
        x = torch.cat([x for x, _ in pieces])[:64]
        utils.seed_everything(self.config.seed, 'show_data')
        grids = [utils.image_grid(images, 8) for images in (x, self.augmenter(x)[0])]
        self.logger.log_picture('data_and_augmented', torch.cat(grids, 2), 0)
        total = self.config.num_training_steps
        curve = [(step, get_lr(self.config, step)) for step in range(0, total, max(1, total // 200))]
        self.logger.log_curve('lr_schedule', curve, 'step', 'lr')

    def final_metrics(self, num_samples: int = 1000) -> dict[str, float]:
        """Samples of the judged weights compared with the data by metrics.py, printed and returned as final/..."""
        c = self.config
        if not self.data.pixel_metrics:
            print_once(f'final_eval: pixels say little about images of {c.dataset!r}, so nothing is computed')
            return {}
        name, module = next(iter(self.weights().items()))
        print_once(
            f'drawing {num_samples} samples: {name} weights, {c.solver}, {f"{c.sample_nfe} evaluations" if c.sample_nfe else f"{c.num_sample_steps} steps"} ...'
        )
        x1, label = self.noise_and_labels(num_samples)
        images = self.generate(module, x1, label, c.solver)

        def compute() -> dict[str, float]:
            (train, train_label), (held_out, _) = (
                loader.everything() for loader in (self.train_loader, self.test_loader)
            )
            return metrics.pixel_metrics(images, label, 2 * train - 1, train_label, 2 * held_out - 1)

        values = ranks.on_main(compute)
        print_once(metrics.describe(values))
        return {f'final/{name}': value for name, value in values.items()}

    # ---------------------------------------------------------------- save and resume

    def save(self, wait: bool = False) -> None:
        """Write last.pt, and step_N.pt at every keep_every-th step: the state as it is now, in the background unless `wait`.

        Raises, on every rank, SaveError if this (with `wait`) or an earlier write failed, and NonFiniteLoss if the run has gone bad.
        """
        self.raise_if_bad()
        record = self.means.over_ranks()
        keep = self.config.keep_every > 0 and self.step > 0 and self.step % self.config.keep_every == 0

        def write() -> None:
            self.writer.write(
                keep_as=self.step if keep else None,
                shape=self.data.shape,
                num_classes=self.data.num_classes,
                step=self.step,
                finished=self.finished,
                wandb_id=self.wandb_id,
                bad_steps=self.bad_steps,
                network=self.network,
                ema=self.ema,
                optimizer=self.optimizer,
                record=record,
            )
            if wait:
                self.writer.wait()

        ranks.on_main(write)

    def restore(self) -> None:
        """Go on from the run's last whole checkpoint, or begin from the weights of init_from if that is set."""
        c = self.config
        checkpoint = run_folder.load_run(c)
        if checkpoint is not None:
            saving.load_weights(self.network, checkpoint['network'], checkpoint['config'], c, run_folder.last_path(c))
            self.ema.load_state_dict(checkpoint['ema'])
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            self.means.load(checkpoint['record'])
            self.step, self.wandb_id = checkpoint['step'], checkpoint['wandb_id']
            self.bad_steps = checkpoint.get('bad_steps', self.bad_steps).to(self.device)
            self.bad_known = int(self.bad_steps[1])
            self.finished = checkpoint['finished'] and self.step >= c.num_training_steps
            print_once(f'resuming {c.run_dir} at step {self.step}')
        elif c.init_from:
            other = saving.load_checkpoint(c.init_from)
            saving.load_weights(self.network, saving.best_weights(other), other['config'], c, c.init_from)
            self.ema.reset(self.network)
            print_once(f'starting from the weights of {c.init_from}')


class ExampleDiffusionTrainer(BaseDiffusionTrainer):
    """Diffusion, flow matching or a stochastic interpolant, as the settings say. Copy it, or override one of the two."""

    def prepare_batch_fn(self, batch: tuple[Tensor, Tensor], is_train: bool) -> ProcessedBatch:
        x_original, label = batch
        x, augmented = self.augmenter(x_original) if is_train else (x_original, None)
        if self.config.dequantize:
            x = (self.data.max_value * x + torch.rand_like(x)) / (self.data.max_value + 1)
        x0 = 2 * x - 1
        x1 = self.process.sample_base(x0)
        t = self.time_sampler(self.uniforms(len(x0)))
        if is_train:  # the null class is learned for guidance (Ho and Salimans 2022, algorithm 1)
            dropped = torch.rand(len(x0), device=x0.device) < self.config.label_dropout
            label = torch.where(dropped, self.data.num_classes, label)
        return ProcessedBatch(x_original, x0, x1, t, label, augmented)

    def loss_fn(self, batch: ProcessedBatch, model_fn: ModelFn) -> Tensor:
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        model_out = model_fn(xt, batch.t, batch.label)  # whatever the network approximates
        model_obj = self.model_convert_fn(model_out, batch.t, xt, coefs)  # that, as every prediction type
        model_pred = getattr(model_obj, self.config.target_type)  # the one the loss compares
        target_obj = self.target_fn(batch.t, xt, batch.x0, batch.x1, coefs)  # every possible target
        target = getattr(target_obj, self.config.target_type)
        sq_err = utils.image_square_error(model_pred, target)  # (B,)
        return self.loss_weight(coefs) * sq_err
