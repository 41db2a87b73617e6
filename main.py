"""The training program: from flags to settings, and from settings to device, data, network and trainer.

Run by `sh run.sh [--flags]`. An experiment is one file: a subclass of the trainer, and `main(trainer_class=Mine)`.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import PRESETS, Config, SettingError, choose, parse_config
from runtime import alive, command
from runtime.importing import import_class, import_file, refuse_foreign, refuse_hidden, refuse_to_train
from settings.choices import TABLES
from settings.flags import refuse
from settings.same_run import FREE_ON_RESUME, SCHEDULES_WITHOUT_END

if TYPE_CHECKING:
    from trainer import BaseDiffusionTrainer


def main(
    argv: Sequence[str] | None = None, trainer_class: type | None = None, config_class: type[Config] = Config
) -> None:
    """Train as the flags say. `trainer_class` None means ExampleDiffusionTrainer.

    An error that the user can fix is printed once, without a traceback; runtime/errors.py has the exit codes.
    """
    refuse_to_train()
    command.parsed(refuse_hidden)
    config = flags(argv, config_class, trainer_class)

    def work() -> None:
        import trainer  # noqa: F401  # imports all code of a run, which `refuse_unlike` compares between ranks
        from training import run_folder, run_record

        run_record.refuse_unlike(config)
        start(run_folder.settle_name(config, trainer_class), trainer_class)

    command.run(work)


def flags(
    argv: Sequence[str] | None = None, config_class: type[Config] = Config, trainer_class: type | None = None
) -> Config:
    """Settings from command-line flags. A wrong flag ends the program with a message. So does a flag that nothing
    reads, unless the experiment has its own trainer or config class, which may read it."""

    def parse() -> Config:
        # imported late, because saving imports torch, which takes seconds that `--help` need not wait
        config = parse_config(argv, config_class, lambda path: import_module('saving').network_settings(path))
        if trainer_class is None and config_class is Config:
            refuse(config, argv, PRESETS)
        return config

    return command.parsed(parse)


def start(config: Config, trainer_class: type | None) -> None:
    """Train, or rehearse with `check`. A run that is refused leaves no new folder behind."""
    from runtime.ranks import print_once
    from trainer import ExampleDiffusionTrainer
    from training import run_folder
    from training.unused import unused

    for warning in unused(trainer_class, ExampleDiffusionTrainer):
        print_once(f'warning: {warning}')
    try:
        if config.check:
            from reports.dry_run import dry_run

            dry_run(config, lambda rehearsal: build(rehearsal, trainer_class))
        else:
            train(config, trainer_class)
    except SettingError:
        run_folder.discard_new(config)
        raise


@alive.print_while('loading the data and the network')
def build(
    config: Config,
    trainer_class: type | None = None,
    read_from: Path | None = None,
    saved: Mapping[str, Any] | None = None,
) -> 'BaseDiffusionTrainer':
    """The trainer with its device, data and network, at the step of the run's last checkpoint. With `read_from`, a
    checkpoint whose content is `saved`, it is read-only and loads the data when something needs them. Raises
    SettingError."""
    import utils
    from data_utils import setup_data_later, setup_data_train_and_test
    from networks import get_network
    from runtime import ranks
    from trainer import ExampleDiffusionTrainer, ProcessedBatch
    from training.calling import set_precision

    for setting, table in choices().items():  # before anything is downloaded or built
        choose(setting, getattr(config, setting), table)
    device = ranks.setup()
    set_precision(config.precision)
    loaders = setup_data_train_and_test(config, device) if saved is None else setup_data_later(config, device, saved)
    train_loader, train_sampler, test_loader = loaders

    def network(example: ProcessedBatch):
        utils.seed_everything(config.seed, 'network')
        cond = {name: tuple(value.shape[1:]) for name, value in example.cond.items()}
        return get_network(config, tuple(example.x0.shape[1:]), train_loader.spec.num_classes, cond)

    trainer_class = trainer_class or ExampleDiffusionTrainer
    trainer = trainer_class(config, device, network, train_loader, train_sampler, test_loader)
    trainer.begin(None if read_from is None else str(read_from))
    return trainer


def load_run(run_dir: str | Path, weights: str = 'ema', trust: bool = False, **settings: Any) -> 'BaseDiffusionTrainer':
    """The trainer of a run at its last checkpoint, ready for `draw`, `loss_fn` and `train_step`; nothing is written.

    `run_dir`: the run's folder, or one of its .pt files for an earlier step. `weights` that `network` gets: ema (the
    first moving average), another by name (ema_0.99), one whose length is chosen now (posthoc_0.1,
    training/posthoc.py), or raw, which you need to replay a step. `trust`: import the run's script even from outside
    the project and your working folder. `settings`, such as solver='heun', override the run's, except those that
    shaped what it learned. data_path and data_dir say where the data are now; they are loaded when something reads
    them. Raises SettingError if the run, its script or the weights are missing, the script is not trusted or imports
    modules by their old names, or a setting cannot be changed.
    """
    import saving
    from training import run_record
    from training.posthoc import POSTHOC, posthoc_weights

    path = Path(run_dir).expanduser()
    checkpoint = path if path.suffix == '.pt' else path / 'last.pt'
    folder = checkpoint.parent
    start = run_record.read_start(folder)
    if not trust:
        refuse_foreign((start.get('script'), start['trainer']['file'], start['config']['file']), folder)
    if start.get('script'):
        import_file(start['script'])
    trainer_class, config_class = (import_class(**start[name]) for name in ('trainer', 'config'))
    saved = saving.load_checkpoint(checkpoint)
    config = saving.config_of(saved, config_class)
    unknown = [name for name in settings if name not in vars(config)]
    if unknown:
        raise SettingError(f'{", ".join(unknown)}: no such setting. Those of sampling are in config.py, as solver is.')
    fixed = [name for name in settings if name not in FREE_ON_RESUME]
    if fixed:
        raise SettingError(f'{", ".join(fixed)}: {path} was trained with it. Change only settings of sampling.')
    if 'num_sample_steps' in settings:
        settings.setdefault('sample_nfe', 0)  # the run's own would override the steps
    config = dataclasses.replace(config, ckpt_dir=str(folder.parent), experiment_name=folder.name, **settings)
    trainer = build(config, trainer_class, checkpoint, saved)
    if weights.startswith(POSTHOC):
        found = posthoc_weights(checkpoint, weights, trainer.network)
        trainer.checkpoints.raw = copy.deepcopy(trainer.network)
        trainer.network.load_state_dict(found)
        return trainer
    networks = trainer.weights()
    name = next(iter(networks)) if weights == 'ema' else weights
    if name not in networks:
        raise SettingError(f'weights={weights!r}: {path} has {", ".join(networks)}. Choose one of these, or ema.')
    if name != 'raw':
        trainer.checkpoints.raw = copy.deepcopy(trainer.network)  # for `weights`
        trainer.network.load_state_dict(networks[name].state_dict())
    return trainer


def train(config: Config, trainer_class: type | None) -> None:
    """Build everything and train."""
    from runtime import ranks

    trainer = build(config, trainer_class)
    if trainer.checkpoints.finished:
        longer = 'A higher --num_training_steps trains it longer. ' * (config.lr_schedule_type in SCHEDULES_WITHOUT_END)
        new = f'Another --experiment_name starts a run, with --init_from {config.run_dir}/last.pt from these weights.'
        ranks.print_once(f'{config.run_dir} is finished: {trainer.step} steps. {longer}{new}')
    else:
        parameters = f'{sum(p.numel() for p in trainer.network.parameters()):,} parameters'
        steps = f'{config.num_training_steps} steps of {config.global_batch_size} images'
        where = f'{ranks.world_size()} x {trainer.device.type}'
        ranks.print_once(f'training {config.dataset} on {where}: {parameters}, {steps}')
        trainer.train_loop()
    files = dict(report='report.html', pictures='samples', checkpoint='last.pt', log='metrics.jsonl')
    is_here = os.environ.get('RUN_CALLER', os.getcwd()) == os.getcwd()  # else the user stands in another folder
    folder = config.run_dir if is_here else config.run_dir.absolute()
    paths = {name: path for name, file in files.items() if (path := folder / file).exists()}
    ranks.print_once('\n'.join(f'  {name:10}  {path}' for name, path in paths.items()))


def choices() -> dict[str, Mapping[str, object]]:
    """Setting -> the table whose keys are its choices."""
    return {setting: getattr(import_module(module), table) for setting, (module, table) in TABLES.items()}


if __name__ == '__main__':
    main()
