"""Every setting of an experiment: defaults, presets and command-line flags.

The defaults are the `digits` run: edit them here, or pass a flag (`sh run.sh --base_lr 3e-4`).
Later wins: field default < PRESETS[preset] < --settings < network of the checkpoint in --init_from < DEBUG < flags.
A setting that names a choice (`process_name`, `solver`, ...) is a key of the table that its comment names.
The comment or the one-line docstring after a setting is its text in --help. This file imports no torch, so `--help` is
quick. settings/rules.py has the rules for the values; docs/log.md has the other defaults that were tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import SettingError, choose
from settings import rules, same_run
from settings.rules import only as only  # experiments import it from here

__all__ = ['DEBUG', 'PRESETS', 'Config', 'SettingError', 'choose', 'parse_config']


@dataclass(frozen=True)
class Config:
    # ---------------------------------------------------------------- the run
    preset: str = 'digits'  # Named group of settings, a key of PRESETS in config.py.
    settings: str = ''
    """Start with the settings of another run: its folder, or a JSON file of settings; they override the preset."""
    experiment_name: str = ''
    """Folder of the run inside ckpt_dir; empty: preset (or data set) and the settings that differ from the preset."""
    ckpt_dir: str = 'ckpts'  # Folder of all runs.
    seed: int = 0  # Everything random is a function of (seed, step).
    debug: bool = False  # Apply DEBUG of config.py: overfit one batch, log and sample often.
    overfit: bool = False  # Train on the first global batch of images again and again.
    init_from: str = ''
    """Checkpoint that gives this new run its first weights (EMA, else raw) and its network settings; empty: none."""
    same_code: bool = False  # Resume a run although the code of its experiment has changed since.
    check: bool = False
    """Do not train: try everything in a temporary folder, and print how much time, memory and disk the run needs."""
    final_eval: bool = True  # At the end, draw 1000 samples and compare them with the data.
    final_pictures: bool = True  # Draw the sample grids of the last step.
    raw_pictures: bool = False  # Draw sample grids of the raw weights too, not only of their moving averages.

    # ---------------------------------------------------------------- data
    dataset: str = 'digits'  # Key of DATASETS in data_utils.py.
    data_dir: str = 'data'
    """Folder for downloaded data sets and for the cache of decoded images."""
    data_path: str = ''
    """Your data. image_folder: a folder of images, or with train/ and val/; arrays: a file; hub: a name or folder."""
    array_layout: str = ''
    """arrays: layout of one item: channels_first, channels_last or no_channels; empty: guessed from the shape."""
    value_range: tuple[float, ...] = ()
    """arrays: the values of black and white; floats are then read as images. Empty: see docs/data.md."""
    held_out: int = 0  # Number of held-out images; 0: the data set's own part, else a tenth, at most 1000.
    image_size: tuple[int, ...] = (64,)
    """image_folder, hub: height and width in pixels to which images are resized and cropped; one number for both."""
    fit: str = 'crop'
    """image_folder, hub: crop keeps the middle, pad keeps all and fills the rest with background, stretch distorts."""
    background: str = 'white'  # image_folder, hub: colour behind transparent parts, a name or #rrggbb.
    columns: tuple[str, ...] = ()
    """hub: image column and, optionally, class column; empty: found if there is only one of each."""
    skip_unreadable: bool = False
    """image_folder, hub: leave out files that cannot be read, instead of refusing to train."""
    cache: bool = True  # image_folder, hub: decode once into data_dir/cache; off: decode again in every epoch.
    num_workers: int = 4  # Loader processes per training process, for data sets too large to live on the device.
    flip_prob: float = 0.0  # Probability that an image is flipped left to right.
    rotate_prob: float = 0.0  # Probability that an image is rotated by 90, 180 or 270 degrees.
    translate_prob: float = 0.0  # Probability that an image is shifted by up to max_translation pixels.
    crop_prob: float = 0.0  # Probability that an image is cropped to 0.8 or more of its sides, and resized.
    geometric_prob: float = 0.0  # EDM's labelled augmentation: probability of each of its parts.
    max_translation: int = 1  # Largest shift along each axis, in pixels.
    dequantize: bool = False  # Add uniform noise of one grey level to the images (needed for densities).

    # ---------------------------------------------------------------- process: xt = alpha(t) x0 + sigma(t) x1
    process_name: str = 'rf'  # Key of PROCESSES in processes.py.
    beta_min: float = 0.1  # linear_vp: noise rate at t = 0.
    beta_max: float = 20.0  # linear_vp: noise rate at t = 1.
    sigma_min: float = 0.01  # ve: noise standard deviation at t = 0.
    sigma_max: float = 80.0  # ve: noise standard deviation at t = 1.
    t_min: float = 0.001  # Smallest time in training and sampling (0 is the data).
    t_max: float = 0.999  # Largest time in training and sampling (1 is the noise).

    # ---------------------------------------------------------------- output and loss
    model_type: str = 'velocity'
    """What the network outputs: x0, x1 (noise), score, velocity, v or F (EDM's preconditioned output)."""
    target_type: str = 'velocity'  # What the squared error compares: x0, x1, score, velocity, v or F.
    loss_weight: str = 'none'  # Factor on the squared error by noise level, a key of LOSS_WEIGHTS in prediction.py.
    time_sampler: str = 'logit_normal'  # Density of training times, a key of TIME_SAMPLERS in time_samplers.py.
    time_mean: float = 0.0  # logit_normal: mean of logit(t); log_normal: mean of log(sigma / alpha), -1.2 in EDM.
    time_std: float = 1.0
    """logit_normal: standard deviation of logit(t); log_normal: of log(sigma / alpha), 1.2 in EDM."""
    stratified: bool = True
    """Spread the times of a global batch evenly (less variance), instead of drawing them independently."""
    antithetic: bool = False  # Draw the times of a global batch in mirrored pairs, u and 1 - u; needs --no_stratified.
    label_dropout: float = 0.0
    """Probability that a label becomes the null class in training: 0 conditional only, 1 unconditional."""

    # ---------------------------------------------------------------- network
    network: str = 'unet'  # Key of NETWORKS in networks/table.py.
    channels: int = 24  # Channels of the UNet's first level.
    channel_mults: tuple[int, ...] = (1, 2)
    """Channels of each level, in units of `channels`; each level halves the resolution."""
    num_res_blocks: int = 1  # Residual blocks per level.
    attention_resolutions: tuple[int, ...] = ()
    """Levels with self-attention, by their longest side in pixels; the middle always has it."""
    padding: str = 'zeros'  # What the UNet's convolutions see outside the data: zeros, or circular for periodic data.
    dit_size: str = 'S'
    """Depth, width and heads as in the DiT paper, a key of DIT_SIZES in networks/transformer.py (S, B, L, XL)."""
    dit_depth: int = 0  # Transformer blocks; 0: as dit_size says.
    dit_width: int = 0  # Channels of a token; 0: as dit_size says.
    dit_heads: int = 0  # Attention heads; 0: as dit_size says.
    dit_patch: int = 2  # Side of a patch in pixels; each patch is a token. Data are padded to whole patches.
    dropout: float = 0.0  # Dropout probability inside residual blocks.
    checkpointing: bool = False
    """Compute each block again in the backward pass: less memory, slower. No effect in utils.jvp and torch.func."""
    time_input: str = 't'  # The form in which the network gets the time: t or log_snr.
    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1]; scales the network's input, F, weight edm and grid logistic."""

    # ---------------------------------------------------------------- batches and steps
    global_batch_size: int = 128  # Images per optimizer step, over all processes and accumulation steps.
    batch_shards: int = 8  # Equal parts in which a global batch is drawn; a multiple of processes x accumulation_steps.
    accumulation_steps: int = 1  # Backward passes per optimizer step: more needs less memory.
    num_training_steps: int = 500  # Optimizer steps.
    max_bad_steps: int = 10
    """Stop after this many skipped steps in a row; a step is skipped if its loss or gradient is not finite."""

    # ---------------------------------------------------------------- optimizer
    optimizer: str = 'muon'
    """Key of OPTIMIZERS in optimizers.py: muon; adamw, with more steps and a base_lr of 1e-3; sgd and others."""
    base_lr: float = 4e-3  # Learning rate after the warm-up.
    min_lr: float = 0.0  # Lower bound of the learning rate after the warm-up.
    warmup_steps: int = 30  # Steps of linear warm-up from 0 to base_lr.
    lr_schedule_type: str = 'cosine'  # After the warm-up: a key of LR_SCHEDULES in optimizers.py.
    weight_decay: float = 0.01  # Decay of weights with two or more dimensions.
    adam_betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the gradient's first and second moment; optimizers with a momentum take the first."""
    adam_eps: float = 1e-8  # Epsilon of Adam and its kin.
    grad_clip_norm: float = 1.0  # Gradient norm above which the gradient is scaled down; 0: never.
    ema_decays: tuple[float, ...] = (0.98,)
    """Decay per step of each moving average of the weights (power: its width); the run is judged by the first."""
    ema_type: str = 'exponential'
    """exponential, or power: averages as long as a fraction (the width, such as 0.05) of the training so far."""

    # ---------------------------------------------------------------- record (0: never, except at the end)
    log_every: int = 25  # Steps between lines of the record.
    save_every: int = 100  # Steps between writes of last.pt.
    keep_last: int = 2  # Newest saves to keep: last.pt, the one before it (last-1.pt), and so on.
    keep_every: int = 500  # Steps between checkpoints that are kept as step_N.pt.
    sample_every: int = 250  # Steps between sample grids.
    eval_every: int = 50  # Steps between held-out losses.
    eval_metrics_every: int = 0  # Steps between comparisons of 1000 samples with the data, as at the end.
    wandb: str = 'auto'  # auto (online when logged in, else disabled), online, offline or disabled.
    wandb_project: str = ''  # wandb project; empty: WANDB_PROJECT, else diffusion.
    wandb_entity: str = ''  # wandb user or team; empty: WANDB_ENTITY, else your default.

    # ---------------------------------------------------------------- sampling
    solver: str = 'adams'  # Solver of the grids and the final evaluation, a key of SOLVERS in solvers/table.py.
    num_sample_steps: int = 20  # Solver steps from t_max to t_min.
    sample_nfe: int = 0  # Network evaluations allowed per sample; they set the number of steps. 0: num_sample_steps.
    time_grid: str = 'logistic'
    """Spacing of solver steps, a key of TIME_GRIDS in solvers/table.py; on ve, use uniform for euler and heun."""
    sde_noise: str = 'natural'
    """Noise level of stochastic solvers, a key of SDE_NOISES in solvers/table.py; constant is lowered near the data."""
    sde_noise_scale: float = 1.0  # Factor on the variance of the noise of stochastic solvers; 0 gives the ODE.
    sde_last_step: str = 'mean'
    """Last step of stochastic solvers, a key of LAST_STEPS in solvers/table.py: the posterior mean, or the ode."""
    guidance_scale: float = 1.0  # Classifier-free guidance: 1 none, above 1 stronger.
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times t between which samples are guided; outside, only the plain network is evaluated."""
    guidance_rescale: float = 0.0
    """Share of the contrast added by guidance that is removed again: 0 none, 1 all."""

    # ---------------------------------------------------------------- speed
    precision: str = 'auto'
    """float32 (IEEE), tf32 (TensorFloat-32 on a GPU), bfloat16 in the network; auto: bfloat16 if the GPU has it."""
    compile: str = 'auto'
    """torch.compile of networks: on, off, auto (on a GPU, in runs of 5000 steps or more) or graphs (CUDA graphs)."""

    def __post_init__(self) -> None:
        """Raises SettingError (a ValueError) for an impossible value or combination of values."""
        rules.validate(self, PRESETS)
        if not self.experiment_name:
            object.__setattr__(self, 'experiment_name', self.default_name())

    def baseline(self) -> dict[str, Any]:
        """All settings as they would be with this preset and `debug`, and no other flag."""
        return same_run.class_defaults(self) | PRESETS[self.preset] | (DEBUG if self.debug else {})

    def default_name(self, *more: str) -> str:
        """The name of a run without --experiment_name: the preset, the settings that differ, and `more`."""
        return same_run.folder_name([*same_run.name_parts(self, PRESETS), *more])

    def older_name(self, *more: str) -> str:
        """`default_name` in the form of older versions."""
        return same_run.older_folder_name([*same_run.name_parts(self, PRESETS), *more])

    @property
    def run_dir(self) -> Path:
        """Where the run's record, pictures and checkpoints are."""
        return Path(self.ckpt_dir, self.experiment_name)


# A longer recipe than `digits`, with better samples: AdamW, uniform times, a longer average.
LONG_RUN = dict(optimizer='adamw', base_lr=1e-3, warmup_steps=100, ema_decays=(0.999,), time_sampler='uniform') | dict(
    channels=32, attention_resolutions=(4,), num_training_steps=1500,
    log_every=50, save_every=250, keep_every=1500, sample_every=500, eval_every=250,
)  # fmt: skip
# Images of about 32 x 32 in ten to twenty minutes of a CPU core: the recipe of `digits` for a larger network.
SMALL_IMAGES = dict(
    channels=32, channel_mults=(1, 2, 2), global_batch_size=64, ema_decays=(0.99,), label_dropout=0.1
) | dict(num_training_steps=1000, log_every=50, save_every=250, keep_every=1000, sample_every=500, eval_every=250)
# For GPUs: a warm-up of 10 million images, averages with a half-life of half a million images.
FOR_GPUS = dict(optimizer='adamw', weight_decay=0.0, lr_schedule_type='constant', time_sampler='logit_normal') | dict(
    channels=128, channel_mults=(1, 2, 2, 2), attention_resolutions=(16,), label_dropout=0.1, log_every=100,
    num_training_steps=200_000, save_every=2000, keep_every=50_000, sample_every=10_000, eval_every=10_000,
)  # fmt: skip
# Settings that each preset changes. All share one flat list of settings, so a preset is a diff from the digits run.
PRESETS: dict[str, dict[str, Any]] = {
    'digits': {},
    'digits_long': LONG_RUN,
    'digits_dit': LONG_RUN | dict(network='dit', dit_depth=4, dit_width=96, dit_heads=4, base_lr=2e-3),
    'toy2d': LONG_RUN
    | dict(dataset='moons', network='mlp', channels=16, global_batch_size=512, num_training_steps=2000),
    'mnist': LONG_RUN
    | dict(dataset='mnist', label_dropout=0.1, translate_prob=0.5)
    | dict(channel_mults=(1, 2, 2), num_res_blocks=2, attention_resolutions=(7,))
    | dict(num_training_steps=20_000, save_every=1000, keep_every=10_000, sample_every=2000, eval_every=2000),
    'fashion_mnist': SMALL_IMAGES | dict(dataset='fashion_mnist', held_out=1000, attention_resolutions=(7,)),
    'small_images': SMALL_IMAGES
    | dict(dataset='image_folder', image_size=(32,), attention_resolutions=(8,), dropout=0.1)
    | dict(flip_prob=0.5, translate_prob=0.5, max_translation=2),
    # Batch, rate, warm-up, averages, dropout and augmentation of EDM (Karras et al. 2022, table 7).
    'cifar10': FOR_GPUS
    | dict(dataset='cifar10', num_res_blocks=2, dropout=0.13, geometric_prob=0.12, adam_betas=(0.9, 0.999))
    | dict(global_batch_size=512, base_lr=1e-3, warmup_steps=20_000, ema_decays=(0.9993, 0.9999)),
    # EDM's for 64 x 64 pictures of faces, with its network.
    'images64': FOR_GPUS
    | dict(dataset='image_folder', image_size=(64,), num_res_blocks=4, dropout=0.05, geometric_prob=0.15)
    | dict(global_batch_size=256, base_lr=2e-4, adam_betas=(0.9, 0.999), warmup_steps=40_000)
    | dict(ema_decays=(0.99965, 0.9999)),
    # A transformer on patches of pixels: JiT-B/16 (Li and He 2025), with a rate of 5e-5 for 256 images.
    'images256': FOR_GPUS
    | dict(dataset='image_folder', image_size=(256,), network='dit', dit_size='B', dit_patch=16, flip_prob=0.5)
    | dict(model_type='x0', time_mean=0.8, time_std=0.8, t_min=0.02, t_max=0.98, adam_betas=(0.9, 0.95))
    | dict(global_batch_size=256, base_lr=5e-5, warmup_steps=5000, ema_decays=(0.9999, 0.9996)),
}

# Settings that --debug changes: does the model memorise one batch, and do the samples show it?
DEBUG: dict[str, Any] = (
    dict(overfit=True, final_eval=False, global_batch_size=32, num_training_steps=600, warmup_steps=20)
    | dict(log_every=20, save_every=200, keep_every=0, sample_every=200, eval_every=200)
)  # fmt: skip


def parse_config(
    argv: Sequence[str] | None = None,
    config_class: type[Config] = Config,
    settings_in: Callable[[str], dict[str, Any]] | None = None,
) -> Config:
    """The settings for the flags `argv` (default: `sys.argv[1:]`).

    `settings_in(path)` returns the settings in the checkpoint of --init_from, which override the preset. Raises
    SettingError for a wrong value; a wrong flag or type prints a message and exits with 2.
    """
    from settings import flags

    return flags.parse(argv, config_class, PRESETS, DEBUG, settings_in)
