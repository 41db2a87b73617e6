"""Training. An experiment subclasses ExampleDiffusionTrainer (at the end: read it first) and overrides what differs:

prepare_batch_fn   a batch of the data set becomes x0, x1, t, label: all randomness of a training step
loss_fn            the loss of each image, a pure function of the prepared batch and the networks

The other methods of the first section have defaults: what is noised, what sampling starts from, how samples are judged.
Below them is the training loop. Data x0 is at t = 0, the base x1 at t = 1, and xt = alpha(t) x0 + sigma(t) x1.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, nn

import data_utils
import utils
from augmentations import get_augmenter
from config import Config
from ema import EMA
from evaluation import judge, pixel_metrics
from logging_utils import Logger, Progress, RunningMeans, Speedometer
from optimizers import clip_gradients, get_optimizer, set_lr, step_if
from prediction import check_time_range, get_model_convert_fn, get_target_fn
from processes import get_process
from reports import pictures
from runtime import errors, ranks, stopping
from runtime.ranks import print_once
from sampling import ModelFn, get_sample_fn
from time_samplers import get_time_sampler
from training import batches, calling, checkpoints
from training.advice import get_loss_weight
from training.bad_steps import BadSteps
from training.batches import ProcessedBatch, SampleInputs
from training.parallel import Parallel


class BaseDiffusionTrainer(metaclass=utils.BeginsWhenBuilt):
    """All but the two functions of an experiment. `main.build` builds it, in a notebook too."""

    # Are x0 and x1 independent? False refuses SDE solvers, whose score would be wrong. Where no subclass sets it, it is
    # False if `couple` is overridden, if the data are pairs (x0, x1), and if x1 plainly goes with x0.
    independent = True
    has_reference = True  # can the network be asked as a denoiser of noise? False leaves out eval/reference
    # The value for 'not given' of conditions that label_dropout and guidance drop together with the label.
    null_cond: Mapping[str, Tensor | float] = {}

    # ---------------------------------------------------------------- the experiment: override these

    def encode(self, x: Tensor) -> Tensor:
        """From what the data set yields ([0, 1] for images) to x0, which is noised. Float data are x0 as they are."""
        return 2 * x - 1 if self.data.scale == 'image' else x

    def decode(self, x0: Tensor) -> Tensor:
        """The inverse of `encode`, for pictures, metrics and files; images are clamped to [0, 1]."""
        return ((x0 + 1) / 2).clamp(0, 1) if self.data.scale == 'image' else x0

    def prepare_batch_fn(self, batch: tuple[Tensor, ...], is_train: bool) -> ProcessedBatch:
        """From (x, label), or (x, label, x1) if the data are pairs, each (n, ...): augmentation, times, conditions.

        Use torch's random functions freely: their generators were seeded from (seed, step, shard).
        """
        raise NotImplementedError

    def couple(self, x0: Tensor, x1: Tensor, label: Tensor | None) -> Tensor:
        """Reorder or redraw the base samples x1 of the whole global batch; the same on any number of processes."""
        return x1

    def loss_fn(self, batch: ProcessedBatch, model_fn: ModelFn) -> Tensor:
        """The loss of each image, (B,), a pure function of its inputs and of `self.modules`.

        `model_fn(xt, t, label, **cond)` is the network.
        """
        raise NotImplementedError

    def sample_inputs(self, n: int) -> SampleInputs:
        """What n samples start from, the same every time: noise and the classes in turn, or else held-out data."""
        return batches.sample_inputs(self, n)

    def draw(self, model_fn: ModelFn, inputs: SampleInputs, solver: str, **settings: object) -> Tensor:
        """x0 (n, ...) by the solver of that name, with the config's settings of sampling.sample, or others by name."""
        pictures.refuse_score(self, solver)
        start = dict(x1=inputs.x1, label=inputs.label, cond=inputs.cond, solver=solver)
        return self.sample_fn(model_fn, **start | settings, callback=lambda *_: stopping.raise_if_stopped())

    def samplers(self) -> dict[str, Callable[[ModelFn, SampleInputs], Tensor]]:
        """Name -> way of sampling, for grids and final metrics: the config's solver, and one of the other kind."""
        return {name: partial(self.draw, solver=name) for name in pictures.solvers(self)}

    def sample_metrics(self, x: Tensor, inputs: SampleInputs) -> dict[str, float]:
        """Numbers for decoded samples, on rank 0, logged as final/<sampler>/...; for grey symbols, metrics.py's."""
        if not self.data.pixel_metrics:
            return {}
        (train, label, *_), (held_out, *_) = self.train_loader.everything(), self.test_loader.everything()
        asked = inputs.label if self.config.label_dropout < 1 else None
        return pixel_metrics.pixel_metrics(x, asked, train, label, held_out)

    def show(self, name: str, x: Tensor, beside: list[Tensor]) -> None:
        """On rank 0: images as a grid, points as a scatter plot, with those of `beside` on the left; else nothing."""
        pictures.show(self, name, x, beside)

    def state(self) -> dict:
        """What a checkpoint holds beside modules and optimizers: tensors, numbers, strings, lists and dicts of them."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take back what `state` gave."""

    # to use in them

    uniforms = batches.uniforms  # (n) -> (n,) numbers in [0, 1] for the time sampler

    def log(self, name: str, value: Tensor | float) -> None:
        """The mean over elements, ranks and steps goes into the record's next line; while evaluating, as eval/name."""
        self.means.add(name, *((value.float().sum(), value.numel()) if isinstance(value, Tensor) else (value, 1)))

    def get_model_fn(self, module: nn.Module, train: bool = False) -> ModelFn:
        """`module` as a function of (xt, t, label, **cond), which hides train/eval mode and autocast in each call."""
        return calling.as_model_fn(module, train, self.device, self.autocast_dtype, self.call_network)

    # ---------------------------------------------------------------- construction

    def __init__(
        self,
        config: Config,
        device: torch.device,
        network: nn.Module | Callable[[ProcessedBatch], nn.Module],
        train_loader: data_utils.Loader,
        train_sampler: data_utils.StreamSampler,
        test_loader: data_utils.Loader,
    ):
        """`network` is a module, or builds one for a prepared batch. After this, a subclass may add to `self.modules`,
        `self.optimizers` and `self.emas`; `begin` is called when all constructors are through."""
        self.config, self.device, self.data = config, device, train_loader.spec
        self.train_loader, self.train_sampler, self.test_loader = train_loader, train_sampler, test_loader
        self.process = get_process(config)
        check_time_range(config, self.process)
        self.model_convert_fn, self.target_fn = get_model_convert_fn(config.model_type), get_target_fn()
        self.time_sampler, self.loss_weight = get_time_sampler(config), get_loss_weight(config)
        self.augmenter = get_augmenter(config, vars(self.data), train_loader.has_pairs)
        self.autocast_dtype = calling.autocast_dtype(config.precision, device)
        self.call_network = calling.get_call(config, device)

        self.build_network = network if not isinstance(network, nn.Module) else lambda example: network
        self.modules: dict[str, nn.Module] = {}  # saved, restored and averaged over the ranks
        self.optimizers: dict[str, torch.optim.Optimizer] = {}  # stepped in turn, each with parameters of its own
        self.emas: dict[str, EMA] = {}  # moving averages of modules, by the name of the module
        self.step, self.finished, self.wandb_id = 0, False, None
        self.start: dict | None = None  # the entry of this start in run.json
        self.means = RunningMeans(device)  # since the last line of the record
        self.drawing, self.bad_steps = pictures.Drawing(), BadSteps(config, device)
        self.shard_position: tuple[int, int] = (0, 1)  # which shard of how many is being prepared
        self.loss_needs_gradients = False  # found out by evaluation.rehearse
        utils.seed_everything(config.seed, 'modules')  # for those that a subclass adds

    @cached_property
    def example(self) -> ProcessedBatch:
        """A prepared batch of the first images: the shapes of x0 and of the conditions are read off it."""
        return batches.example(self)

    @property
    def shape(self) -> tuple[int, ...]:  # of one x0
        return tuple(self.example.x0.shape[1:])

    @property
    def network(self) -> nn.Module:
        """The raw network: the one that is trained, saved and averaged."""
        if 'network' not in self.modules:
            self.modules['network'] = calling.on_device(self.build_network(self.example), self.device)
        return self.modules['network']

    @property
    def ema(self) -> EMA:
        return self.emas['network']

    def begin(self) -> None:
        """Resume from the run's last whole checkpoint, if there is one. Raises SettingError."""
        self.couples = utils.overridden(self, 'couple')
        self.independent = batches.is_independent(self)
        pictures.refuse_score(self, self.config.solver)
        self.sample_fn = get_sample_fn(self.config, self.process, self.data.num_classes, self.null_cond)
        self.optimizers = {'network': get_optimizer(self.config, self.network)} | self.optimizers
        self.emas = {'network': EMA(self.network, self.config.ema_decays)} | self.emas
        self.parameters = utils.moved_parameters(self.modules, self.optimizers)
        utils.quiet_frozen(self.modules)
        checkpoints.restore(self)
        self.parallel = Parallel(self, self.get_model_fn(self.network, train=True))

    # ---------------------------------------------------------------- training

    def train_loop(self) -> None:
        """Train from `self.step` to the end. Saves, then raises Stopped or SaveError; NonFiniteLoss without saving."""
        self.logger = Logger(self.config, self.config.run_dir, self.step, self.wandb_id, self.start)
        self.wandb_id = self.logger.wandb_id
        self.progress, self.speed = Progress(self.step, self.config.num_training_steps), Speedometer(self.step)
        self.test_loader.start_workers()
        stopping.catch_stop_signals()
        try:
            with contextlib.suppress(errors.Stopped):
                self.train_steps()
                self.finished = True
            self.save(wait=True)
            if not self.finished:
                print_once(f'stopped at step {self.step}, state saved: the same command goes on from there')
                raise errors.Stopped
        finally:
            checkpoints.close(self)

    def train_steps(self) -> None:
        """The steps from `self.step` to the end, each followed by what is due at it."""
        c = self.config
        judge.rehearse(self)
        judge.report(self)  # what was due at the step of the checkpoint; at step 0 the data
        self.speed.restart(self.step)
        shards = self.shards()
        while self.step < c.num_training_steps:
            self.train_step(shards)
            self.progress.advance()
            if self.due(c.save_every) or self.due(c.keep_every):
                self.save()
            judge.report(self)
            stopping.poll_stop()

    def train_step(self, shards: Iterator[ProcessedBatch]) -> None:
        """One optimizer step on a global batch, of which this process computes its shards. A bad step is skipped."""
        c = self.config
        if self.due(c.log_every):
            self.means.clear()
        lr = set_lr(self.optimizers.values(), c, self.step)
        for micro_step in range(c.accumulation_steps):
            batch = utils.concat(list(itertools.islice(shards, self.shards_per_micro_step())))
            utils.seed_everything(c.seed, 'forward', self.step, ranks.rank(), micro_step)  # for dropout
            with self.parallel.sync(micro_step == c.accumulation_steps - 1):
                losses = self.parallel(batch)  # (B,)
                (self.bad_steps.poison(losses) / c.accumulation_steps).backward()
            self.means.add_finite('train/loss', losses)
            self.means.add_by_time('train/loss_t', losses, batch.t)
            if batch.augmentation_label is not None:
                self.log('train/augmented', batch.augmentation_label)
        norms = {name: clip_gradients(moved, c.grad_clip_norm) for name, moved in self.parameters.items()}
        ok = self.bad_steps.check(sum(norms.values(), torch.zeros(())), self.step)
        for optimizer in self.optimizers.values():
            step_if(ok, optimizer)
            optimizer.zero_grad()
        for name, ema in self.emas.items():
            ema.update(self.modules[name])  # in a skipped step, with weights that stood still

        self.step += 1
        for name, norm in norms.items():
            self.means.add_finite('train/grad_norm' if name == 'network' else f'train/grad_norm_{name}', norm)
        self.log('train/lr', lr)

    shards, draw_shard = batches.shards, batches.draw_shard  # prepared parts of the global batches: see batches.py

    def shards_per_micro_step(self) -> int:
        """How many of this process's shards go through the network together."""
        return len(self.train_sampler.my_shards) // self.config.accumulation_steps

    def due(self, every: int) -> bool:
        """Whether this step is a multiple of `every` (0: never), or the last."""
        return self.step == self.config.num_training_steps or (every > 0 and self.step > 0 and self.step % every == 0)

    def weights(self) -> dict[str, nn.Module]:
        """The networks to evaluate, by name; the first moving average, if any, is the one to judge a run by."""
        return {f'ema_{decay:g}': net for decay, net in self.ema.networks.items()} | {'raw': self.network}

    def save(self, wait: bool = False) -> None:
        """Write last.pt, and step_N.pt at every keep_every-th step: in the background unless `wait`."""
        checkpoints.save(self, wait)


class ExampleDiffusionTrainer(BaseDiffusionTrainer):
    """Diffusion, flow matching or a stochastic interpolant, by the settings. Copy it, or override one of the two."""

    def prepare_batch_fn(self, batch: tuple[Tensor, ...], is_train: bool) -> ProcessedBatch:
        x_original, label, *pair = batch
        x, augmented = self.augmenter(x_original) if is_train else (x_original, None)
        if self.config.dequantize:
            x = (self.data.max_value * x + torch.rand_like(x)) / (self.data.max_value + 1)
        x0 = self.encode(x)
        x1 = self.encode(pair[0]) if pair else self.process.sample_base(x0)
        t = self.time_sampler(self.uniforms(len(x0)))
        return ProcessedBatch(x_original, x0, x1, t, label, augmented)

    def loss_fn(self, batch: ProcessedBatch, model_fn: ModelFn) -> Tensor:
        coefs = self.process(batch.t)
        xt = self.process.compute_xt(batch.x0, batch.x1, coefs)
        model_out = model_fn(xt, batch.t, batch.label, **batch.cond)  # whatever the network approximates
        model_obj = self.model_convert_fn(model_out, batch.t, xt, coefs)  # that, as every prediction type
        model_pred = getattr(model_obj, self.config.target_type)  # the one the loss compares
        target_obj = self.target_fn(batch.t, xt, batch.x0, batch.x1, coefs)  # every possible target
        target = getattr(target_obj, self.config.target_type)
        sq_err = utils.image_square_error(model_pred, target)  # (B,)
        return self.loss_weight(coefs) * sq_err
