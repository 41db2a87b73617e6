"""Train: flags and config.py to settings, settings to devices, data, network and trainer.

Run by `sh run.sh [--flags]`. An experiment is one file: a subclass of the trainer, and `main(trainer_class=Mine)`.
"""

import atexit
import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, SettingError, choose, parse_config

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer


def main(
    argv: Sequence[str] | None = None, trainer_class: type | None = None, config_class: type[Config] = Config
) -> None:
    """Train as the flags say. `trainer_class` None means ExampleDiffusionTrainer.

    What the user can mend is said once, without a traceback; exit codes are those of runtime/stopping.py.
    """
    importing = getattr(sys.modules.get('runtime.run_record'), 'importing', None)
    if importing:
        raise SettingError(f"{importing} trains when it is imported: put its main(...) under if __name__ == '__main__'")
    is_rank_0 = os.environ.get('RANK', '0') == '0'
    try:
        # one message, not one for each process
        with contextlib.nullcontext() if is_rank_0 else contextlib.redirect_stderr(io.StringIO()):
            config = parse_config(argv, config_class)
    except (SettingError, SystemExit) as error:
        if not is_rank_0:
            time.sleep(5)  # the first process must have said it before torchrun ends all for the first that leaves
        if isinstance(error, SystemExit):
            raise
        show(error)
        sys.exit(2)  # EXIT_BAD_SETTING

    exit_code = 1
    if 'RANK' in os.environ:
        # Leave out the C++ destructors of torch: one of them aborts now and then in a process that had a process group.
        # (Registered early, so run late: after what registers itself from here on.)
        atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(exit_code)))
    from runtime import ranks, run_folder, stopping  # they import torch, which --help need not wait for

    stopping.end_with_parent()
    stopping.die_of_stop_signals()
    import logging_utils
    from data_checks import DataError
    from runtime.bad_steps import NonFiniteLoss

    error = None
    try:
        ranks.setup()
        config = run_folder.settle_name(config, trainer_class)
        if config.check:
            from runtime.dry_run import dry_run

            dry_run(config, lambda rehearsal: build(rehearsal, trainer_class))
        else:
            train(config, trainer_class)
        exit_code = 0
    except SettingError as bad:
        run_folder.discard_new(config)
        error, exit_code = bad, stopping.EXIT_BAD_SETTING
    except NonFiniteLoss as diverged:
        error, exit_code = diverged, stopping.EXIT_NOT_FINITE
    except stopping.Stopped:
        exit_code = stopping.EXIT_STOPPED
    except stopping.SaveError as failed:
        error = failed
    except DataError as failed:  # a file, read by this rank alone: it leaves without waiting for the others
        if not stopping.report_failure(failed):
            show(failed)
        sys.exit(1)
    except Exception as failed:
        stopping.report_failure(failed)
        raise  # without leaving the group: ranks that wait for this one would block it before its traceback is shown
    stopping.set_outcome(exit_code)
    if error is not None and not (stopping.report_failure(error) and exit_code == 1):  # which the launcher shows last
        show(error)
    ranks.close(exit_code)
    if logging_utils.wandb_hangs:
        stopping.end_soon(exit_code)
    if exit_code:
        sys.exit(exit_code)


def build(config: Config, trainer_class: type | None = None) -> 'BaseDiffusionTrainer':
    """Device, data, network and the trainer, at the step of the run's last checkpoint. Raises SettingError."""
    import data_utils
    import networks
    import utils
    from batches import ProcessedBatch
    from runtime import ranks
    from trainer import ExampleDiffusionTrainer

    for setting, table in choices().items():  # before anything is downloaded or built
        choose(setting, getattr(config, setting), table)
    device = ranks.setup()
    networks.set_precision(config.precision)
    train_loader, train_sampler, test_loader = data_utils.setup_data_train_and_test(config, device)

    def network(example: ProcessedBatch):
        utils.seed_everything(config.seed, 'network')
        cond = {name: tuple(value.shape[1:]) for name, value in example.cond.items()}
        return networks.get_network(config, tuple(example.x0.shape[1:]), train_loader.spec.num_classes, cond)

    return (trainer_class or ExampleDiffusionTrainer)(config, device, network, train_loader, train_sampler, test_loader)


def load_run(run_dir: str | Path, weights: str = 'ema') -> 'BaseDiffusionTrainer':
    """The trainer of a finished or running run at its last checkpoint, read-only: nothing is locked or written.

    `run_dir` is the run's folder, or one of its .pt files for an earlier step.

    Its class, config class and table entries are those of the script that made it, which is imported. `network` has the
    first moving average of the weights, another by its name (`ema_0.99`), or the raw ones, which replaying a step
    needs. The trainer is ready for `draw`, `loss_fn` and `train_step`. Raises SettingError if the run, its script or
    the weights are not there.
    """
    import saving
    from runtime import resume, run_record

    path = Path(run_dir)
    checkpoint = path if path.suffix == '.pt' else path / 'last.pt'
    folder = checkpoint.parent
    start = run_record.read_start(folder)
    if start.get('script'):
        run_record.import_file(start['script'])
    trainer_class = run_record.import_class(**start['trainer'])
    config_class = run_record.import_class(**start['config'])
    config = saving.config_of(saving.load_checkpoint(checkpoint), config_class)
    config = dataclasses.replace(config, ckpt_dir=str(folder.parent), experiment_name=folder.name)
    with resume.reading(checkpoint):
        trainer = build(config, trainer_class)
    found = trainer.weights()
    name = next(iter(found)) if weights == 'ema' else weights
    if name not in found:
        raise SettingError(f'weights={weights!r}: {path} has {", ".join(found)}. Choose one of these, or ema.')
    trainer.network.load_state_dict(found[name].state_dict())
    return trainer


def train(config: Config, trainer_class: type | None) -> None:
    """Build everything and train."""
    from runtime import ranks, run_record
    from runtime.ranks import print_once

    trainer = build(config, trainer_class)
    if trainer.finished:
        print_once(
            f'{config.run_dir} is finished: {trainer.step} steps. '
            'Change a setting or --experiment_name for another run.'
        )
    else:
        parameters = sum(p.numel() for p in trainer.network.parameters())
        print_once(
            f'training {config.dataset} on {ranks.world_size()} x {trainer.device.type}: {parameters:,} parameters, '
            f'{config.num_training_steps} steps of {config.global_batch_size} images'
        )
        trainer.start = run_record.write_start(config, type(trainer), trainer.device, trainer.step)
        trainer.train_loop()
    print_once(
        f'  pictures    {config.run_dir}/samples\n  checkpoint  {config.run_dir}/last.pt\n'
        f'  log         {config.run_dir}/metrics.jsonl'
    )


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


def show(message: BaseException) -> None:
    """Say why it ends, on the first process."""
    if os.environ.get('RANK', '0') == '0':
        print(f'{type(message).__name__}: {message}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    main()
