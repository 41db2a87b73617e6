"""Fixtures shared by the tests. Real data, small networks: a run of TINY takes a second or two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    channels=8,
    num_res_blocks=1,
    attention_resolutions=(),
    global_batch_size=32,
    num_training_steps=12,
    warmup_steps=2,
    log_every=3,
    save_every=4,
    keep_every=0,
    sample_every=0,
    eval_every=6,
    num_sample_steps=2,
    final_eval=False,
    wandb='disabled',
)

torch.set_num_threads(1)


def as_flags(settings: dict) -> list[str]:
    """Settings as command-line flags."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no_{name}')
        else:
            flags += [f'--{name}', *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


@pytest.fixture
def tiny_config(tmp_path):
    """`tiny_config(**settings)`: a Config of a run that takes seconds, in a temporary folder."""
    from config import Config

    return lambda **settings: Config(**(TINY | dict(ckpt_dir=str(tmp_path / 'ckpts'), data_dir=str(tmp_path / 'data')) | settings))


@pytest.fixture
def build_trainer():
    """`build_trainer(config, trainer_class=ExampleDiffusionTrainer)`: what main builds, on the CPU, in this process."""
    import data_utils
    import networks
    import trainer
    import utils

    def build(config, trainer_class=trainer.ExampleDiffusionTrainer):
        device = torch.device('cpu')
        loaders = data_utils.setup_data_train_and_test(config, device)
        data = data_utils.get_dataset(config)
        utils.seed_everything(config.seed, 'network')
        return trainer_class(config, device, networks.get_network(config, data.shape, data.num_classes), *loaders)

    return build


@pytest.fixture
def run_sh(tmp_path):
    """`run_sh(script, nproc=1, timeout=120, env={}, **settings)`: a real `sh run.sh` with TINY and these settings."""

    def run(*script, nproc=1, timeout=120, env=None, cwd=ROOT, **settings):
        settings = TINY | dict(ckpt_dir=str(tmp_path / 'ckpts'), experiment_name='run') | settings
        return subprocess.run(
            ['sh', str(ROOT / 'run.sh'), *script, *as_flags(settings)],
            cwd=cwd,
            env=launch_env(nproc) | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def launch_env(nproc: int) -> dict[str, str]:
    """The environment for run.sh: these tests' own python, one thread for each process."""
    prefix = str(Path(sys.prefix))
    return os.environ | {'VIRTUAL_ENV': prefix, 'NPROC': str(nproc), 'OMP_NUM_THREADS': '1'}
