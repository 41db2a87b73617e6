"""Train: flags and config.py to settings, settings to devices, data, network and trainer.

Run by `sh run.sh [--flags]`. An experiment is one file that subclasses the trainer and calls `main(trainer_class=Mine)`.
"""

import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from config import Config, SettingError, choose, default_experiment_name, parse_config


def main(argv: Sequence[str] | None = None, trainer_class: type | None = None, config_class: type[Config] = Config) -> None:
    """Train as the flags say. `trainer_class` None means ExampleDiffusionTrainer.

    What the user can mend is said once, without a traceback; exit codes are those of distributed.py.
    """
    first = os.environ.get('RANK', '0') == '0'
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):  # one message, not one per process
            config = parse_config(argv, config_class)
    except (SettingError, SystemExit) as error:
        if not first:
            time.sleep(5)  # the first process must have said it before torchrun ends all for the first that leaves
        if isinstance(error, SystemExit):
            raise
        leave(error, 2)  # EXIT_BAD_SETTING

    if trainer_class is not None and config.experiment_name == default_experiment_name(config):
        # another trainer is another experiment: it must not go on with, or end as, a run of the example trainer
        config = dataclasses.replace(config, experiment_name=f'{config.experiment_name}_{trainer_class.__name__}')

    import distributed  # imports torch, which --help need not wait for
    from trainer import NonFiniteLoss

    distributed.catch_stop_signals()
    error, code = None, 0
    try:
        train(config, trainer_class)
    except SettingError as bad:
        error, code = bad, distributed.EXIT_BAD_SETTING
    except NonFiniteLoss as diverged:
        error, code = diverged, distributed.EXIT_NOT_FINITE
    except distributed.Stopped:
        code = distributed.EXIT_STOPPED
    distributed.set_outcome(code)
    distributed.close()  # not after other exceptions: ranks that wait for this one would block it before its traceback is shown
    if code:
        leave(error, code)


def train(config: Config, trainer_class: type | None) -> None:
    """Build everything and train."""
    import data_utils
    import distributed
    import networks
    import utils
    from logging_utils import say
    from trainer import ExampleDiffusionTrainer

    for setting, table in choices().items():  # before anything is downloaded or built
        choose(setting, getattr(config, setting), table)
    device = distributed.setup()
    distributed.set_outcome(1)  # from here on, what a signal leaves behind must be said
    train_loader, train_sampler, test_loader = data_utils.setup_data_train_and_test(config, device)
    data = data_utils.get_dataset(config)
    utils.seed_everything(config.seed, 'network')
    network = networks.get_network(config, data.shape, data.num_classes)
    trainer = (trainer_class or ExampleDiffusionTrainer)(config, device, network, train_loader, train_sampler, test_loader)
    if trainer.finished:
        say(f'{config.run_dir} is finished: {trainer.step} steps. Change a setting or --experiment_name for another run.')
    else:
        say(
            f'training {config.dataset} on {distributed.world_size()} x {device.type}: {sum(p.numel() for p in network.parameters()):,} parameters, '
            f'{config.num_training_steps} steps of {config.global_batch_size} images'
        )
        trainer.train_loop()
    say(f'  pictures    {config.run_dir}/samples\n  checkpoint  {config.run_dir}/last.pt\n  log         {config.run_dir}/metrics.jsonl')
    if config.preset != 'cifar10':
        say('  next        sh run.sh --preset cifar10   (32x32 colour images, on a GPU)')


def choices() -> dict[str, Mapping[str, object]]:
    """Setting -> the table whose keys are its choices."""
    from data_utils import DATASETS
    from loss_weights import LOSS_WEIGHTS
    from networks import NETWORKS, TIME_INPUTS
    from optimizers import LR_SCHEDULES
    from prediction import ROWS
    from processes import PROCESSES
    from sampling import TIME_GRIDS
    from solvers import LAST_STEPS, SDE_NOISES, SOLVERS
    from time_samplers import TIME_SAMPLERS

    return dict(
        dataset=DATASETS,
        network=NETWORKS,
        time_input=TIME_INPUTS,
        process_name=PROCESSES,
        model_type=ROWS,
        target_type=ROWS,
        loss_weight=LOSS_WEIGHTS,
        time_sampler=TIME_SAMPLERS,
        lr_schedule_type=LR_SCHEDULES,
        solver=SOLVERS,
        time_grid=TIME_GRIDS,
        sde_noise=SDE_NOISES,
        sde_last_step=LAST_STEPS,
    )


def leave(message: Exception | None, code: int) -> NoReturn:
    """Exit with `code`; the first process says why."""
    if message is not None and os.environ.get('RANK', '0') == '0':
        print(f'{type(message).__name__}: {message}', file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == '__main__':
    main()
