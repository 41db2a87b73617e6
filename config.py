"""Every setting of an experiment: defaults, presets and command-line flags.

The defaults are the `digits` run: edit them here, or pass a flag (`sh run.sh --base_lr 3e-4`).
Later wins: field default < PRESETS[preset] < DEBUG (with --debug) < command line.
A setting that names a choice (`process_name`, `solver`, ...) is looked up in the table at the end of its file.

This file imports neither torch nor any other file of the project, so `--help` is quick.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import io
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar('T')


class SettingError(ValueError):
    """A setting that cannot work. Its text holds the setting, the value and the remedy; `main` shows it without a traceback."""


def choose(setting: str, value: str, table: Mapping[str, T]) -> T:
    """`table[value]`, or a SettingError that lists the choices and suggests the nearest."""
    if value in table:
        return table[value]
    near = difflib.get_close_matches(str(value), table, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise SettingError(f'{setting}={value!r} is not a choice of --{setting}. Choose one of: {", ".join(table)}.{hint}')


@dataclass(frozen=True)
class Config:
    # ---------------------------------------------------------------- the run
    preset: str = 'digits'
    """Named group of settings, a key of PRESETS in config.py: digits, mnist or cifar10."""
    experiment_name: str = ''
    """Folder of the run inside ckpt_dir; empty: the preset and the settings that differ from it."""
    ckpt_dir: str = 'ckpts'
    """Folder of all runs."""
    seed: int = 0
    """Everything random is a function of (seed, step)."""
    debug: bool = False
    """Apply DEBUG of config.py: overfit one batch, log and sample often."""
    overfit: bool = False
    """Train on the first global batch of images again and again."""
    init_from: str = ''
    """Checkpoint whose EMA weights (raw ones if it has none) start this new run; empty: random weights."""
    check: bool = False
    """Do not train: try everything in a temporary folder, and say what the run will take in time, memory and disk."""
    final_eval: bool = True
    """At the end, draw 1000 samples and compare them with the data (data sets of small grey images only)."""

    # ---------------------------------------------------------------- data
    dataset: str = 'digits'
    """Key of DATASETS in data_utils.py."""
    data_dir: str = 'data'
    """Folder that data sets are downloaded to and read from."""
    image_size: int = 64
    """Side in pixels to which dataset image_folder is resized and cropped (other data sets: their own size)."""
    num_workers: int = 4
    """Loader processes per training process, for data sets too large to live on the device."""
    flip_prob: float = 0.0
    """Probability that an image is flipped left to right."""
    rotate_prob: float = 0.0
    """Probability that an image is turned by 90, 180 or 270 degrees."""
    translate_prob: float = 0.0
    """Probability that an image is shifted by up to max_translation pixels."""
    max_translation: int = 1
    """Largest shift along each axis, in pixels."""
    dequantize: bool = False
    """Add uniform noise of one grey level to the images (needed for densities)."""

    # ---------------------------------------------------------------- process: xt = alpha(t) x0 + sigma(t) x1
    process_name: str = 'rf'
    """Key of PROCESSES in processes.py."""
    beta_min: float = 0.1
    """linear_vp: noise rate at t = 0."""
    beta_max: float = 20.0
    """linear_vp: noise rate at t = 1."""
    sigma_min: float = 0.01
    """ve: noise standard deviation at t = 0."""
    sigma_max: float = 80.0
    """ve: noise standard deviation at t = 1."""
    t_min: float = 0.001
    """Smallest time in training and sampling (0 is the data)."""
    t_max: float = 0.999
    """Largest time in training and sampling (1 is the noise)."""

    # ---------------------------------------------------------------- output and loss
    model_type: str = 'velocity'
    """What the network outputs: x0, x1 (noise), score, velocity, v or F (EDM's preconditioned output)."""
    target_type: str = 'velocity'
    """What the squared error compares: x0, x1, score, velocity, v or F."""
    loss_weight: str = 'none'
    """Factor on the squared error by noise level, a key of LOSS_WEIGHTS in loss_weights.py."""
    time_sampler: str = 'uniform'
    """Density of training times, a key of TIME_SAMPLERS in time_samplers.py."""
    time_mean: float = 0.0
    """logit_normal: mean of logit(t); log_normal: mean of log(sigma / alpha), -1.2 in EDM."""
    time_std: float = 1.0
    """logit_normal: standard deviation of logit(t); log_normal: of log(sigma / alpha), 1.2 in EDM."""
    stratified: bool = True
    """Spread the times of a global batch evenly (less variance), instead of drawing them independently."""
    antithetic: bool = False
    """Draw the times of a global batch in mirrored pairs, u and 1 - u; needs --no_stratified."""
    label_dropout: float = 0.0
    """Probability that a label becomes the null class in training: 0 conditional only, 1 unconditional."""

    # ---------------------------------------------------------------- network
    network: str = 'unet'
    """Key of NETWORKS in networks.py."""
    channels: int = 32
    """Channels of the UNet's first level."""
    channel_mults: tuple[int, ...] = (1, 2)
    """Channels of each level, in units of `channels`; each level halves the resolution."""
    num_res_blocks: int = 1
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = (4,)
    """Levels, by their longer side in pixels, that have self-attention."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks."""
    time_input: str = 't'
    """What the network is told of the time: t or log_snr."""
    sigma_data: float = 0.5
    """Assumed standard deviation of the data in [-1, 1]: the network's input is scaled to unit variance with it; output F, weight edm and grid logistic use it too."""

    # ---------------------------------------------------------------- batches and steps
    global_batch_size: int = 128
    """Images per optimizer step, over all processes and accumulation steps."""
    batch_shards: int = 8
    """Parts in which a global batch is drawn; a multiple of processes x accumulation_steps."""
    accumulation_steps: int = 1
    """Backward passes per optimizer step: more needs less memory."""
    num_training_steps: int = 1500
    """Optimizer steps."""
    max_bad_steps: int = 10
    """Steps in a row, each skipped, with a loss or gradient that is not finite, after which the run stops."""

    # ---------------------------------------------------------------- optimizer
    base_lr: float = 1e-3
    """Learning rate after the warm-up."""
    min_lr: float = 0.0
    """Learning rate below which no schedule goes after the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to base_lr."""
    lr_schedule_type: str = 'cosine'
    """After the warm-up: a key of LR_SCHEDULES in optimizers.py."""
    weight_decay: float = 0.01
    """AdamW's decay of weights with two or more dimensions."""
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the gradient's first and second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down; 0: never."""
    ema_decays: tuple[float, ...] = (0.999,)
    """Decay per step of each moving average of the weights; the first is the one that is evaluated."""

    # ---------------------------------------------------------------- record (0: never, except at the end)
    log_every: int = 50
    """Steps between lines of the record."""
    save_every: int = 250
    """Steps between writes of last.pt."""
    keep_last: int = 2
    """Saves that are kept: last.pt, the one before it (last-1.pt), and so on."""
    keep_every: int = 1500
    """Steps between checkpoints that are kept as step_N.pt."""
    sample_every: int = 500
    """Steps between sample grids."""
    eval_every: int = 250
    """Steps between held-out losses."""
    wandb: str = 'auto'
    """auto (online when logged in, else disabled), online, offline or disabled."""
    wandb_project: str = 'diffusion'
    """wandb project."""
    wandb_entity: str = ''
    """wandb user or team; empty: your default."""

    # ---------------------------------------------------------------- sampling
    solver: str = 'adams'
    """Solver of the grids and the final evaluation, a key of SOLVERS in solvers.py."""
    num_sample_steps: int = 20
    """Solver steps from t_max to t_min."""
    sample_nfe: int = 0
    """Network evaluations per sample, as many steps as these pay for; 0: num_sample_steps counts."""
    time_grid: str = 'logistic'
    """Spacing of the solver's steps, a key of TIME_GRIDS in sampling.py; solvers that step in t (euler, heun, ...) want uniform on ve."""
    sde_noise: str = 'natural'
    """Noise level of stochastic solvers, a key of SDE_NOISES in solvers.py; constant is lowered near the data to what steps can bear."""
    sde_noise_scale: float = 1.0
    """Factor on the variance of the noise of stochastic solvers; 0 gives the ODE."""
    sde_last_step: str = 'mean'
    """Last step of stochastic solvers, a key of LAST_STEPS in solvers.py: the posterior mean, or the ode."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 none, above 1 stronger."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times t between which there is guidance; outside, the plain network is evaluated alone."""
    guidance_rescale: float = 0.0
    """How much of the contrast that guidance adds to an image is taken back: 0 none, 1 all."""

    # ---------------------------------------------------------------- speed
    precision: str = 'auto'
    """Of the network's arithmetic: float32, bfloat16, or auto (bfloat16 on a GPU that has it)."""
    compile: bool = False
    """torch.compile the network: faster on a GPU after minutes of compiling, not worth it on a CPU."""

    def __post_init__(self) -> None:
        """Raises SettingError (a ValueError) for values that cannot be right, alone or together."""
        check(self)
        if not self.experiment_name:
            object.__setattr__(self, 'experiment_name', default_experiment_name(self))

    @property
    def run_dir(self) -> Path:
        """Where the run's record, pictures and checkpoints are."""
        return Path(self.ckpt_dir, self.experiment_name)


# What each preset changes. They share one flat list of settings, so a preset reads as a diff from the digits run.
PRESETS: dict[str, dict[str, Any]] = {
    'digits': {},
    'mnist': dict(
        dataset='mnist',
        label_dropout=0.1,
        channel_mults=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(7,),
        translate_prob=0.5,
        num_training_steps=20_000,
        save_every=1000,
        keep_every=10_000,
        sample_every=2000,
        eval_every=2000,
    ),
    'cifar10': dict(
        dataset='cifar10',
        label_dropout=0.1,
        flip_prob=0.5,
        channels=128,
        channel_mults=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        dropout=0.1,
        num_training_steps=200_000,
        base_lr=2e-4,
        warmup_steps=5000,
        lr_schedule_type='constant',
        weight_decay=0.0,
        adam_betas=(0.9, 0.999),
        ema_decays=(0.9999, 0.999),
        log_every=100,
        save_every=2000,
        keep_every=50_000,
        sample_every=10_000,
        eval_every=10_000,
    ),
}

# What --debug changes: does the model learn one batch by heart, and do the samples show it?
DEBUG: dict[str, Any] = dict(
    overfit=True,
    final_eval=False,
    global_batch_size=32,
    num_training_steps=600,
    warmup_steps=20,
    log_every=20,
    save_every=200,
    keep_every=0,
    sample_every=200,
    eval_every=200,
)

# Settings that do not change what a run has learned so far: a run may be resumed with other values of these,
# and they do not show in its default name. num_training_steps joins them under a schedule that never looks at it.
FREE_ON_RESUME = frozenset(
    'preset experiment_name ckpt_dir data_dir debug check final_eval num_workers accumulation_steps max_bad_steps log_every save_every keep_last keep_every '
    'sample_every eval_every wandb wandb_project wandb_entity solver num_sample_steps sample_nfe time_grid sde_noise sde_noise_scale '
    'sde_last_step guidance_scale guidance_interval guidance_rescale compile'.split()
)
SCHEDULES_WITHOUT_END = ('constant', 'inverse_sqrt')
PRECISIONS = ('auto', 'float32', 'bfloat16')
WANDB_MODES = ('auto', 'online', 'offline', 'disabled')


def check(config: Config) -> None:
    """Raise SettingError for the first value that breaks a rule."""
    c = config
    choose('preset', c.preset, PRESETS)
    choose('precision', c.precision, dict.fromkeys(PRECISIONS))
    choose('wandb', c.wandb, dict.fromkeys(WANDB_MODES))

    def require(ok: bool, names: str, rule: str) -> None:
        if not ok:
            given = ', '.join(f'{name}={getattr(c, name)!r}' for name in names.split())
            raise SettingError(f'{given}: {rule}.')

    def each(names: str) -> list[tuple[str, Any]]:
        return [(name, getattr(c, name)) for name in names.split()]

    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        require(finite, field.name, 'must be a finite number')
    for name, value in each(
        'global_batch_size batch_shards accumulation_steps num_training_steps max_bad_steps keep_last num_sample_steps channels num_res_blocks image_size'
    ):
        require(value >= 1, name, 'must be at least 1')
    for name, value in each(
        'seed log_every save_every keep_every sample_every eval_every warmup_steps num_workers max_translation sample_nfe'
    ):
        require(value >= 0, name, 'must be 0 or more')
    for name, value in each('flip_prob rotate_prob translate_prob label_dropout guidance_rescale'):
        require(0 <= value <= 1, name, 'must lie between 0 and 1')
    for name, value in each('base_lr time_std sigma_data sigma_min adam_eps'):
        require(value > 0, name, 'must be positive')
    for name, value in each('weight_decay grad_clip_norm min_lr sde_noise_scale guidance_scale beta_min'):
        require(value >= 0, name, 'must not be negative')
    require(0 <= c.dropout < 1, 'dropout', 'must be at least 0 and below 1')
    require(c.channels % 2 == 0, 'channels', 'must be even: half of them are cosines of the time')
    require(
        len(c.channel_mults) > 0 and min(c.channel_mults) >= 1,
        'channel_mults',
        'needs one or more positive whole numbers',
    )
    require(
        len(c.adam_betas) == 2 and all(0 <= b < 1 for b in c.adam_betas),
        'adam_betas',
        'must be two numbers, at least 0 and below 1',
    )
    require(all(0 < d < 1 for d in c.ema_decays), 'ema_decays', 'must lie between 0 and 1')
    require(len(set(c.ema_decays)) == len(c.ema_decays), 'ema_decays', 'holds the same decay twice')
    require(c.min_lr <= c.base_lr, 'min_lr base_lr', 'min_lr must not be above base_lr')
    require(
        c.warmup_steps < c.num_training_steps,
        'warmup_steps num_training_steps',
        'the warm-up must be shorter than the training: lower --warmup_steps',
    )
    require(0 <= c.t_min < c.t_max <= 1, 't_min t_max', 'times need 0 <= t_min < t_max <= 1')
    require(
        c.beta_max >= c.beta_min and c.beta_max > 0,
        'beta_min beta_max',
        'beta_max must be positive and not below beta_min',
    )
    require(c.sigma_max > c.sigma_min, 'sigma_min sigma_max', 'sigma_max must be above sigma_min')
    require(
        c.global_batch_size % c.batch_shards == 0,
        'global_batch_size batch_shards',
        'the batch must be divisible by its shards',
    )
    require(
        c.batch_shards % c.accumulation_steps == 0,
        'batch_shards accumulation_steps',
        'the shards must be divisible by accumulation_steps (times the number of processes)',
    )
    require(
        0 <= c.guidance_interval[0] <= c.guidance_interval[1] <= 1,
        'guidance_interval',
        'must be two times, 0 <= from <= to <= 1',
    )
    require(
        not c.antithetic or c.global_batch_size // c.batch_shards % 2 == 0,
        'antithetic global_batch_size batch_shards',
        'mirrored pairs need an even number of images in a shard',
    )
    require(
        not (c.stratified and c.antithetic),
        'stratified antithetic',
        'times are drawn in one way or the other: add --no_stratified',
    )
    require(
        c.guidance_scale == 1 or 0 < c.label_dropout < 1,
        'guidance_scale label_dropout',
        'guidance needs a trained null class: train with --label_dropout 0.1, or use --guidance_scale 1',
    )
    require(
        c.experiment_name == '' or re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_+=-]*', c.experiment_name) is not None,
        'experiment_name',
        'must be a plain folder name: letters, digits and _ - + = only, no slash and no dots',
    )


def baseline(config: Config) -> dict[str, Any]:
    """The values `config` would have with its preset and `debug` alone."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return defaults | PRESETS[config.preset] | (DEBUG if config.debug else {})


def counts_on_resume(name: str, config: Config) -> bool:
    """Whether another value of setting `name` would make this another experiment."""
    if name == 'num_training_steps':
        return config.lr_schedule_type not in SCHEDULES_WITHOUT_END
    return name not in FREE_ON_RESUME


def default_experiment_name(config: Config) -> str:
    """The preset and the overridden settings, as a folder name: `digits_base_lr=0p0001`."""
    parts = [config.preset] + (['debug'] if config.debug else [])
    for name, usual in baseline(config).items():
        value = getattr(config, name)
        if value != usual and counts_on_resume(name, config):
            text = '-'.join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts.append(f'{name}={text}')
    folder = re.sub(r'[^A-Za-z0-9_+=-]', '-', '_'.join(parts).replace('.', 'p'))
    if len(folder) > 120:
        folder = folder[:100] + '_' + hashlib.sha256('_'.join(parts).encode()).hexdigest()[:8]
    return folder


def differences(saved: Mapping[str, Any], config: Config, only: Collection[str] | None = None) -> list[str]:
    """Lines 'name: saved -> now' for settings (of `only`, if given) whose values make this another experiment.

    `saved` is `dataclasses.asdict` of the other run's config, perhaps after a trip through JSON (tuples are lists then).
    """
    now = dataclasses.asdict(config)
    names = [n for n in {**now, **saved} if (counts_on_resume(n, config) if only is None else n in only)]

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return [
        f'{n}: {saved.get(n, "absent")} -> {now.get(n, "absent")}'
        for n in names
        if plain(saved.get(n, 'absent')) != plain(now.get(n, 'absent'))
    ]


def parse_config(argv: Sequence[str] | None = None, config_class: type[Config] = Config) -> Config:
    """Flags to settings. `argv` defaults to `sys.argv[1:]`.

    Raises SettingError for values that cannot be right; a wrong flag or type prints its message and exits with 2.
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('--preset', default=config_class.preset)
    first.add_argument('--debug', action='store_true', default=config_class.debug)
    first.add_argument('--no_debug', '--no-debug', dest='debug', action='store_false')
    known, _ = first.parse_known_args(argv)

    values = dict(preset=known.preset, debug=known.debug) | choose('preset', known.preset, PRESETS)
    defaults = config_class(**(values | (DEBUG if known.debug else {})))
    object.__setattr__(defaults, 'experiment_name', config_class.experiment_name)  # to be derived from the flags too
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                config_class, args=argv, default=defaults, use_underscores=True, description=__doc__.split('\n\n')[0]
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, SettingError):
            cause = cause.__context__
        if cause is not None:  # tyro would show it in a box, cut into short lines: let it through as it is
            raise cause from None
        sys.stderr.write(shown.getvalue())
        raise
