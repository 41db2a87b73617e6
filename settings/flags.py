"""The command line: from flags to settings, with a helpful message for each flag that is wrong.

Later wins: field default < preset < --settings FILE < settings of the network in --init_from < debug < command line.
"""

import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from runtime.errors import SettingError, choose
from runtime.files import from_caller
from settings import choices
from settings.same_run import class_defaults, migrated

C = TypeVar('C')
# the examples use =, so that a search for `--name ` finds its help first
ABOUT = """Train on digits, or as the settings say. Later wins: default, preset, settings of another run, debug, flags.

  sh run.sh --preset=small_images --data_path=DIR     your images
  sh run.sh --dataset=spirals --network=mlp           other data, another network
  sh run.sh --settings=ckpts/NAME --seed=1            like another run, with another seed

With --preset NAME, this page shows the defaults of the preset. docs/settings.md explains the settings.
"""
# Settings that name a run or say what to do with it, not how it trains. --settings ignores them.
OF_ONE_RUN = 'experiment_name ckpt_dir check debug same_code settings'.split()
PATHS = 'ckpt_dir data_dir data_path init_from settings out teacher'.split()  # teacher: in examples/distill.py
TRUTH = dict(true=True, false=False)
# flags of other repos -> what to use here
HINTS = {
    'epochs num_epochs max_epochs': '--num_training_steps (steps, not epochs: epochs x images / global_batch_size)',
    'resume resume_from': 'the same command again, which resumes; --init_from starts a new run from the weights of one',
    'gpu gpus gpu_ids device devices': 'CUDA_VISIBLE_DEVICES=0 NPROC=1 sh run.sh ... for one GPU; the default is all',
    'batch_size train_batch_size': '--global_batch_size (images per step, over all processes)',
    'learning_rate lr': '--base_lr',
    'num_steps steps max_steps': '--num_training_steps (training), or --num_sample_steps (sampling)',
    'cfg cfg_scale guidance': '--guidance_scale, in a run that is trained with --label_dropout 0.1',
    'fp16 bf16 amp mixed_precision': '--precision bfloat16, which is the default on a GPU that has it',
    'diffusion_steps timesteps noise_schedule': '--process_name: time is continuous; --num_sample_steps in sampling',
    'num_channels channel_mult': '--channels and --channel_mults, such as --channels 64 --channel_mults 1 2 4',
    'class_cond': '--label_dropout 1 for no classes; by default, the classes of the data are used if there are any',
    'microbatch gradient_accumulation_steps': '--accumulation_steps, which divides --global_batch_size',
    'save_interval log_interval': '--save_every, --log_every',
    'ema_rate ema_decay': '--ema_decays',
    'nproc nproc_per_node num_gpus': 'NPROC=2 sh run.sh ...',
    'cpu': 'CUDA_VISIBLE_DEVICES= sh run.sh ...',
    'wandb_mode no_wandb': '--wandb online, offline or disabled',
    'version': 'git describe --always; run.json of a run has its commit and the versions of its packages',
    'data_root data': '--data_path (your own images or arrays), or --data_dir (where downloads are)',
    'out output output_dir outdir': '--ckpt_dir and --experiment_name: a run is in ckpt_dir/experiment_name',
}


def parse(
    argv: Sequence[str] | None,
    config_class: type[C],
    presets: Mapping[str, Mapping[str, Any]],
    debug: Mapping[str, Any],
    settings_in: Callable[[str], dict[str, Any]] | None = None,
) -> C:
    """A `config_class` from `argv` (default: `sys.argv[1:]`).

    `settings_in(path)` returns the settings in the checkpoint of --init_from, which override the preset. Raises
    SettingError for a wrong value; a wrong flag or type prints a message and exits with 2.
    """
    import tyro

    fields: Any = config_class
    argv, flags = read(argv, config_class, presets)
    given = {name: value[0] for name, value in flags.items() if isinstance(value, list) and value}
    path = given.get('settings', fields.settings)
    saved = read_settings(path, config_class) if path else {}
    preset, is_debug = given.get('preset', saved.get('preset', fields.preset)), flags.get('debug', fields.debug)
    values = {**choose('preset', preset, presets), **saved, 'preset': preset, 'debug': is_debug}
    init_from = given.get('init_from', values.get('init_from', fields.init_from))
    if settings_in is not None and init_from:
        values |= settings_in(init_from)
    defaults = config_class(**{**values, **(debug if is_debug else {})})
    # the name was derived without the flags; clear it, so that it is derived with them
    object.__setattr__(defaults, 'experiment_name', fields.experiment_name)
    if {'-h', '--help'} & {*argv}:
        shown = choices.flags_class(config_class, defaults, presets)
        tyro.cli(shown, args=argv, use_underscores=True, description=ABOUT, config=(tyro.conf.OmitArgPrefixes,))
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(config_class, args=argv, default=defaults, use_underscores=True, description='')
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, SettingError):
            cause = cause.__context__
        if cause is not None:  # tyro would print it in a box, cut into short lines
            raise cause from None
        sys.stderr.write(shown.getvalue())
        raise


def read_settings(file: str, config_class: type) -> dict[str, Any]:
    """The settings in a JSON file, or in the config.json of a run's folder, without those in OF_ONE_RUN.

    Raises SettingError for a file that cannot be read, a setting that `config_class` lacks, a value of another type.
    """
    path = Path(file).expanduser()
    path = path / 'config.json' if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(found, dict):
            raise ValueError('not an object of settings')
    except (OSError, ValueError) as error:
        why = f'{path} cannot be read ({error}). Pass the folder of a run, or a file such as its config.json'
        raise SettingError(f'settings={file!r}: {why}.') from error
    known = class_defaults(config_class)
    if 'experiment_name' in found:  # saved by a run; newer settings get their class defaults
        found = known | migrated(found)
    if unknown := [name for name in found if name not in known]:
        why = f'{config_class.__name__} has no {", ".join(unknown)}'
        raise SettingError(f'settings={file!r}: {why}. Start the script that defines them, or remove them from a copy.')
    return {name: of_type(known[name], value, f'settings={file!r}: {name}') for name, value in found.items()
            if name not in OF_ONE_RUN}  # fmt: skip


def of_type(default: Any, value: Any, where: str) -> Any:
    """A value from JSON, where tuples are lists, as a setting with this default. Raises SettingError."""
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(of_type(default[0], x, where) if default else x for x in value)
    value = float(value) if isinstance(default, float) and type(value) is int else value
    if isinstance(default, bool | int | float | str | tuple) and type(value) is not type(default):
        raise SettingError(f'{where}={value!r} is of another type than its default, {default!r}.')
    return value


def refuse(config: Any, argv: Sequence[str] | None, presets: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise SettingError if the flags `argv` of this config name an unknown choice, or settings that nothing reads."""
    _, given = read(argv, type(config), presets)
    for setting in [name for name in given if name in choices.TABLES]:
        known, value = choices.known_choices(setting), getattr(config, setting)
        if known and value not in known and not choices.is_extended(choices.TABLES[setting][1]):
            choose(setting, value, dict.fromkeys(known))
    texts = []
    for setting, reads in choices.READS.items():
        unread = [name for name in given if choices.unread_by(config, name) == setting]
        is_common = any({*unread} <= {*names.split()} for names in reads.values())
        for names in filter(None, [unread] if is_common else [[name] for name in unread]):
            values = ', '.join(f'{name}={getattr(config, name)!r}' for name in names)
            readers = [choice for choice, own in reads.items() if {*names} <= {*own.split()}]
            # reversed, so that the first preset of a data set is named
            made_for = {v.get(setting): f' (--preset {p})' for p, v in [*presets.items()][::-1] if setting == 'dataset'}
            remedy = ' or '.join(f'{choice}{made_for.get(choice, "")}' for choice in readers)
            what = f'{setting}={getattr(config, setting)!r} does not read {"it" if len(names) == 1 else "them"}'
            texts.append(f'{values}: {what}. Pass --{setting} {remedy}.')
    if texts:
        raise SettingError(' '.join(texts))


# ---------------------------------------------------------------- words of the command line


def read(argv: Sequence[str] | None, config_class: type, presets: Mapping[str, Any]) -> tuple[list[str], dict]:
    """Read `argv`, default sys.argv[1:]: (words for tyro, setting -> True or False, or a list of its first word).

    Raises SettingError for a flag in HINTS, a bare word, and several numbers in one word such as '(48,20)'.
    """
    if argv is None and 'kernel' in Path(sys.argv[0]).name:
        raise SettingError(
            "a notebook has no flags: pass them, as main(['--seed', '1']) or parse_config(['--seed', '1'])."
        )
    types, groups = get_type_hints(config_class), [('', list[str](), False)]
    for word in sys.argv[1:] if argv is None else argv:
        if re.match(r'-(?![\d.]|inf|nan|$)', word):
            flag, has_value, value = word.partition('=')
            groups.append((flag, [value] if has_value else [], bool(has_value)))
        else:
            groups[-1][1].append(word)
    words, given = [], dict[str, Any]()
    for flag, values, is_joined in groups:
        name = flag.lstrip('-').replace('-', '_')
        is_known = name in types or types.get(name.removeprefix('no_')) is bool
        if is_known and not flag.startswith('--'):
            raise SettingError(f'{flag}: settings have two dashes. Write --{name}.')
        for names, use in HINTS.items():
            if name in names.split() and not is_known:
                raise SettingError(f'{flag} is not a setting here. Use {use}.')
        kind = types.get(name, bool if is_known or not flag else str)
        if flag and kind is bool and values and values[0].lower() in TRUTH:
            name = name if TRUTH[values.pop(0).lower()] else f'no_{name}'
            flag, is_joined = f'--{name}', False
        values = [normalized(name, kind, value) for value in values]
        if (flag == '' or is_known) and get_origin(kind) is None:
            for word in values[kind is not bool :]:
                refuse_stray_word(word, flag, presets)
        words += [f'{flag}={values[0]}', *values[1:]] if is_joined else [*([flag] if flag else []), *values]
        if is_known:
            given[name if name in types else name.removeprefix('no_')] = name in types if kind is bool else values[:1]
    return words, given


def normalized(name: str, kind: Any, value: str) -> str:
    """The value of a flag in the form that settings have: 1e3 as 1000, a path relative to the project's folder."""
    if kind is int and re.fullmatch(r'[+-]?\d+(\.\d*)?e\+?\d{1,2}', value.lower()) and float(value).is_integer():
        return str(int(float(value)))
    if get_origin(kind) is tuple and str not in get_args(kind) and re.search(r'[\s,()[\]]', value):
        apart = ' '.join(re.sub(r'[,()[\]]', ' ', value).split())
        raise SettingError(f'{name}={value!r}: separate the numbers by spaces. Write --{name} {apart}.')
    path = from_caller(value, name) if name in PATHS else value
    path += '/last.pt' if name == 'init_from' and Path(path).is_dir() else ''  # the folder of a run
    return path


def refuse_stray_word(word: str, flag: str, presets: Mapping[str, Any]) -> None:
    """Raise SettingError for a word that belongs to no flag, and suggest the flag that it may be meant for."""
    near = difflib.get_close_matches(word, presets, n=1)
    remedy = 'Settings are written --name value, and a value with spaces in quotes; --help lists them'
    if near:
        remedy = f'{"It is a preset." if word in presets else "Is it a preset?"} Write --preset {near[0]}'
    elif '=' in word:
        remedy = f'Write --{word}'
    elif Path(from_caller(word)).exists():
        remedy = f'Is it your data? Write --preset small_images --data_path {word}'
    after = f' after {flag}' if flag else ''
    raise SettingError(f'{word!r}{after} belongs to no flag. {remedy}.')
