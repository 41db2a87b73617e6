"""The trainer. Read ExampleDiffusionTrainer first, at the end: its two functions are the experiment.

prepare_batch_fn   a batch of data becomes x0, x1, t and a label; draw random numbers here, not in loss_fn
loss_fn            the loss of each image: the network's prediction at xt, compared with the target

Data x0 is at t = 0, the base sample x1 at t = 1, and xt = alpha(t) x0 + sigma(t) x1.
An experiment subclasses one of the two classes and overrides methods of the first section.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

import utils
from augmentations import get_augmenter
from config import Config
from data_loading.loader import Loader, StreamSampler
from ema import EMA
from evaluation.judge import Judge
from logging_utils import Record
from optimizers import clip_gradients, get_optimizer, set_lr, step_if, trained_parameters
from prediction import check_time_range, get_loss_weight, get_model_convert_fn, get_target_fn
from processes import get_process
from reports.pictures import Gallery
from runtime import alive, ranks, stopping
from runtime.errors import Stopped
from sampling import ModelFn
from time_samplers import get_time_sampler
from training.bad_steps import BadSteps
from training.batches import Batches
from training.calling import Caller, ParallelLoss, on_device
from training.checkpoints import Checkpoints
from training.drawing import Drawing
from training.experiment import OldNames, ProcessedBatch, SampleInputs
from training.independence import independence
from training.run_record import identity_of, write_start


class BaseDiffusionTrainer(OldNames):
    """The training loop, and a default for everything that an experiment may override except its two functions."""

    independent: bool | None = None  # is x1 drawn from the base, without x0? None: find out from images. False: no SDE
    has_reference: bool = True  # False, for a network that does not remove noise, leaves out eval/reference
    null_cond: Mapping[str, Tensor | float] = {}  # condition -> its value for 'not given', for dropout and guidance
    couple: Callable[..., Tensor] | None = None  # or a method (x0, x1, label) -> x1 for the whole global batch

    # ---------------------------------------------------------------- the experiment: override these

    def prepare_batch_fn(self, batch: tuple[Tensor, ...], is_train: bool) -> ProcessedBatch:
        """A batch from (x, label), or from (x, label, x1) if the data are pairs. torch is seeded from (seed, step)."""
        raise NotImplementedError

    def loss_fn(self, batch: ProcessedBatch, model_fn: ModelFn) -> Tensor:
        """Losses (B,), a pure function of batch and `self.modules`; `model_fn(xt, t, label, **cond)` is the network."""
        raise NotImplementedError

    def setup_networks(self) -> None:
        """Fill `modules`, `optimizers` and `emas`. To add a network, override this: build what `encode` or
        `prepare_batch_fn` use before super(), and copies of the network after it."""
        self.optimizers.setdefault('network', get_optimizer(self.config, self.network))
        self.emas.setdefault('network', EMA(self.network, self.config.ema_decays, self.config.ema_type))
        utils.seed_everything(self.config.seed, 'modules', 'after the network')  # for modules that a subclass adds

    def encode(self, x: Tensor) -> Tensor:  # from data as loaded, images in [0, 1], to x0, to which noise is added
        return 2 * x - 1 if self.data.scale == 'image' else x

    def decode(self, x0: Tensor) -> Tensor:  # the inverse, for pictures, metrics and files
        return ((x0 + 1) / 2).clamp(0, 1) if self.data.scale == 'image' else x0

    def sample_inputs(self, n: int) -> SampleInputs:
        """Inputs of n samples, the same every time: noise and classes (batches.as_in_data), or held-out data."""
        return self.batches.sample_inputs(n)

    def draw(self, model_fn: ModelFn, inputs: SampleInputs, solver: str, **settings: object) -> Tensor:
        """x0 (n, ...) drawn by this solver; `settings`, keywords of sampling.sample, override the config."""
        return self.drawing.draw(model_fn, inputs, solver, **settings)

    def samplers(self) -> dict[str, Callable[[ModelFn, SampleInputs], Tensor]]:
        """Name -> sampler, for pictures and final numbers: the solver of the config, and one of the other kind."""
        return {name: partial(self.draw, solver=name) for name in self.drawing.default_solvers()}

    def sample_metrics(self, x: Tensor, inputs: SampleInputs) -> dict[str, float]:
        """Numbers for decoded samples (n, ...), recorded as final/<sampler>/<name>. An override runs on rank 0."""
        return self.judge.distances(x, inputs)

    def show(self, name: str, x: Tensor, inputs: SampleInputs) -> None:
        """On rank 0, draw a picture of decoded samples, with their inputs on its left."""
        self.gallery.show(name, x, inputs)

    def after_sampling(self, name: str, x: Tensor, inputs: SampleInputs) -> None:
        """On rank 0, after `show`: pictures, numbers and histograms of your own."""

    def state(self) -> dict:
        """State to save in a checkpoint, besides networks: tensors, numbers, strings, lists and dicts of them."""
        return {}

    def load_state(self, state: dict) -> None:
        """Restore what `state` returned; its tensors are on the CPU."""

    # helpers for these methods
    # fmt: off
    def uniforms(self, n: int) -> Tensor: return self.batches.uniforms(n)  # (n,) in [0, 1], for the time sampler
    def log(self, name: str, value: Tensor | float) -> None: self.record.log(name, value)  # its mean is recorded
    def picture(self, name: str, image: Tensor) -> None: self.record.picture(name, image, self.step)  # (3, H, W) uint8
    def histogram(self, name: str, values: Tensor) -> None: self.record.histogram(name, values, self.step)
    def get_model_fn(self, module: nn.Module, train: bool = False) -> ModelFn: return self.caller(module, train)
    # fmt: on

    def overrides(self, name: str) -> bool:  # whether the experiment defines a method or attribute `name`
        return name in vars(self) or getattr(type(self), name) is not getattr(ExampleDiffusionTrainer, name)

    # ---------------------------------------------------------------- construction

    def __init__(
        self, config: Config, device: torch.device, network: nn.Module | Callable[[ProcessedBatch], nn.Module],
        train_loader: Loader, train_sampler: StreamSampler, test_loader: Loader,
    ):  # fmt: skip
        self.config, self.device, self.data = config, device, train_loader.spec
        self.train_loader, self.train_sampler, self.test_loader = train_loader, train_sampler, test_loader
        self.process = get_process(config)
        check_time_range(config, self.process)
        self.time_sampler, self.loss_weight = get_time_sampler(config), get_loss_weight(config)
        self.model_convert_fn, self.target_fn = get_model_convert_fn(config.model_type), get_target_fn()
        self.augmenter = get_augmenter(config, vars(self.data), train_loader.has_pairs)

        self.build_network = network if not isinstance(network, nn.Module) else lambda example: network
        self.modules: dict[str, nn.Module] = {}  # saved, restored and averaged over the ranks
        self.optimizers: dict[str, torch.optim.Optimizer] = {}  # stepped in turn, each with parameters of its own
        self.emas: dict[str, EMA] = {}  # moving averages of modules, by the name of the module
        self.parameters: dict[str, list[nn.Parameter]] = {}  # the parameters of each optimizer, by its name
        self.step, self.losses, self.independent = 0, ParallelLoss.before_begin, self.independent
        self.caller, self.batches = Caller(config, device), Batches(self, train_loader, train_sampler, test_loader)
        self.bad_steps, self.drawing = BadSteps(config, device), Drawing(self, self.batches)
        self.record = Record(config, device, lambda: train_loader.waited, self.drawing.seconds_at_end)
        self.judge = Judge(self, self.batches, self.record, self.drawing)
        self.gallery = Gallery(self, self.batches, self.record, self.drawing)
        held = dict(modules=self.modules, optimizers=self.optimizers, emas=self.emas, experiment=self)
        held |= dict(bad_steps=self.bad_steps, record=self.record, about=self.gallery.about)
        identity = identity_of(type(self), BaseDiffusionTrainer, train_loader.fingerprint)
        self.checkpoints = Checkpoints(config, identity, held)
        utils.seed_everything(config.seed, 'modules')  # for modules that a subclass adds

    def begin(self, read_from: str | None = None) -> None:
        """After all constructors: build the networks, then restore the run's last checkpoint, or read `read_from`."""
        self.setup_networks()
        self.independent = independence(self, self.batches, is_new=read_from is None)
        self.drawing.check()
        self.parameters |= trained_parameters(self.modules, self.optimizers)
        self.step = self.checkpoints.restore(read_from)
        model_fn = self.get_model_fn(self.network, train=True)
        example = self.batches.tiny_batch if self.train_loader.facts else self.batches.tiny_batch()  # data may be gone
        self.losses = ParallelLoss(self.modules, lambda batch: self.loss_fn(batch, model_fn), example)

    example = property(lambda self: self.batches.example)  # a prepared batch of the first images
    shape = property(lambda self: tuple(self.batches.shape_example.x0.shape[1:]))  # shape of one x0
    ema = property(lambda self: self.emas['network'])

    @property
    def network(self) -> nn.Module:  # the raw network, which is trained; built on first use
        if 'network' not in self.modules:
            self.modules['network'] = on_device(self.build_network(self.batches.shape_example), self.device)
        return self.modules['network']

    def weights(self) -> dict[str, nn.Module]:
        """The networks to evaluate, by name; a run is judged by its first moving average, if it has any."""
        return {f'ema_{d:g}': x for d, x in self.ema.networks.items()} | {'raw': self.checkpoints.raw or self.network}

    # ---------------------------------------------------------------- the loop

    def train_loop(self) -> None:
        """Train to the end. Saves, then raises Stopped or SaveError; NonFiniteLoss without saving."""
        self.checkpoints.refuse_if_read_only()
        c, finished, start = self.config, False, write_start(self.config, type(self), self.device, self.step)
        with self.record.open(self.step, start), self.checkpoints, self.batches, alive.print_while('training'):
            stopping.catch_stop_signals()
            with suppress(Stopped):
                self.judge.rehearse()  # broken code fails now, not hours later
                self.gallery.rehearse(self.step)
                self.checkpoints.check()
                self.report()  # a resumed run repeats what was due at its checkpoint's step
                steps = self.batches.steps(self.step)
                while self.step < c.num_training_steps:
                    self.train_step(next(steps))
                    if self.due(c.save_every) or self.due(c.keep_every):
                        self.checkpoints.save(self.step)
                    self.report()
                    stopping.poll_stop()
                finished = True
            self.checkpoints.save(self.step, wait=True, finished=finished)
        if not finished:
            ranks.print_once(f'stopped at step {self.step}, state saved: the same command resumes the run')
            raise Stopped

    def train_step(self, micro_batches: Iterable[ProcessedBatch]) -> None:
        """One optimizer step on a global batch; `micro_batches` are this process's part of it. Skips a bad step."""
        c, lr = self.config, set_lr(self.optimizers.values(), self.config, self.step)
        if self.due(c.log_every):
            self.record.clear()  # these means are already written
        for i, batch in enumerate(micro_batches):
            utils.seed_everything(c.seed, 'forward', self.step, ranks.rank(), i)  # for dropout
            losses = self.losses(batch, average=i == c.accumulation_steps - 1)  # (B,)
            (self.bad_steps.poison(losses) / c.accumulation_steps).backward()  # a bad loss makes all gradients NaN
            self.record.losses(losses, batch.t, batch.augmentation_label)
        norms = {name: clip_gradients(moved, c.grad_clip_norm) for name, moved in self.parameters.items()}
        ok = self.bad_steps.check(sum(norms.values(), torch.zeros(())), self.step)
        for optimizer in self.optimizers.values():
            step_if(ok, optimizer)
            optimizer.zero_grad()
        for name, ema in self.emas.items():
            ema.update(self.modules[name])  # also after a skipped step, with unchanged weights
        self.step += 1
        self.record.step(lr, norms)

    def report(self) -> None:
        """Record what is due at this step: means, held-out losses, pictures, numbers for samples."""
        c, last = self.config, self.step >= self.config.num_training_steps
        with self.record.line(self.step) as line:  # written at the end, also after a stop signal
            if self.due(c.log_every):
                line |= {'train/bad_steps': self.bad_steps.report(self.record.alert)}
                line |= self.record.summary(self.step)
            if self.due(c.eval_every):
                line |= self.judge.held_out_losses(self.step)
            if self.due(c.sample_every) and (c.final_pictures or not last):
                line |= self.gallery.draw(self.step)
            if c.final_eval if last else self.due(c.eval_metrics_every):
                self.gallery.update_page(self.step, line)  # first, because the numbers may take minutes
                line |= self.judge.samples(self.step)
        if self.due(c.sample_every):
            self.gallery.update_page()

    def due(self, every: int) -> bool:  # whether this step is a multiple of `every` (0: never), or the last
        return self.step >= self.config.num_training_steps or (every > 0 and self.step > 0 and self.step % every == 0)


class ExampleDiffusionTrainer(BaseDiffusionTrainer):
    """Diffusion, flow matching or a stochastic interpolant, as set. Copy it, or override one of its two functions."""

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
        model_obj = self.model_convert_fn(model_out, batch.t, xt, coefs)  # the same, as every prediction type
        model_pred = getattr(model_obj, self.config.target_type)  # the one the loss compares
        target_obj = self.target_fn(batch.t, xt, batch.x0, batch.x1, coefs)  # every possible target
        target = getattr(target_obj, self.config.target_type)
        sq_err = utils.image_square_error(model_pred, target)  # (B,)
        return self.loss_weight(coefs) * sq_err
