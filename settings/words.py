"""The words of the command line, as tyro is to see them: true and false, 1e3, paths; and what is said to flags of other
repos, bare words and single dashes."""

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from runtime.errors import SettingError
from runtime.files import from_caller

PATHS = 'ckpt_dir data_dir data_path init_from settings out teacher'.split()  # teacher: of examples/distill.py
TRUTH = dict(true=True, false=False)
# flags of other repos -> what to use here
HINTS = {
    'epochs num_epochs max_epochs': '--num_training_steps (steps, not epochs: epochs x images / global_batch_size)',
    'resume resume_from': 'the same command again: it resumes; --init_from starts another run from the weights of one',
    'gpu gpus gpu_ids device devices': 'CUDA_VISIBLE_DEVICES=0 NPROC=1 sh run.sh ... for one GPU; all are used without',
    'batch_size train_batch_size': '--global_batch_size (images per step, over all processes)',
    'learning_rate lr': '--base_lr',
    'num_steps steps max_steps': '--num_training_steps (training), or --num_sample_steps (sampling)',
    'cfg cfg_scale guidance': '--guidance_scale, in a run that is trained with --label_dropout 0.1',
    'fp16 bf16 amp mixed_precision': '--precision bfloat16, which is the default on a GPU that has it',
    'version': 'git describe --always; run.json of a run has its commit and the versions of its packages',
    'data_root data': '--data_path (images or arrays of yours), or --data_dir (where downloads are)',
    'out output output_dir outdir': '--ckpt_dir and --experiment_name: a run is in ckpt_dir/experiment_name',
}


def read(argv: Sequence[str] | None, config_class: type, presets: Mapping[str, Any]) -> tuple[list[str], dict]:
    """(the words of `argv`, default sys.argv[1:], for tyro; setting -> True or False, or a list of its first word).

    Raises SettingError for a flag in HINTS, a bare word, and numbers in one word such as '(48,20)'.
    """
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
        for others, use in HINTS.items():
            if name in others.split() and not is_known:
                raise SettingError(f'{flag} is not a setting here. Use {use}.')
        kind = types.get(name, bool if is_known or not flag else str)
        if flag and kind is bool and values and values[0].lower() in TRUTH:
            name = name if TRUTH[values.pop(0).lower()] else f'no_{name}'
            flag, is_joined = f'--{name}', False
        values = [taken(name, kind, value) for value in values]
        if (flag == '' or is_known) and get_origin(kind) is None:
            for word in values[kind is not bool :]:
                refuse_bare(word, flag, presets)
        words += [f'{flag}={values[0]}', *values[1:]] if is_joined else [*([flag] if flag else []), *values]
        if is_known:
            given[name if name in types else name.removeprefix('no_')] = name in types if kind is bool else values[:1]
    return words, given


def taken(name: str, kind: Any, value: str) -> str:
    """The value of a flag: a whole number such as 1e3 as 1000, a path as seen from the project's folder."""
    if kind is int and re.fullmatch(r'[+-]?\d+(\.\d*)?e\+?\d{1,2}', value.lower()) and float(value).is_integer():
        return str(int(float(value)))
    if get_origin(kind) is tuple and str not in get_args(kind) and re.search(r'[\s,()[\]]', value):
        apart = ' '.join(re.sub(r'[,()[\]]', ' ', value).split())
        raise SettingError(f'{name}={value!r}: numbers are words of their own. Write --{name} {apart}.')
    path = from_caller(value, is_output=name == 'out') if name in PATHS else value
    return value if name == 'data_path' and not Path(path).exists() else path  # it may be a name, of the hub


def refuse_bare(word: str, flag: str, presets: Mapping[str, Any]) -> None:
    """Raise SettingError for a word that belongs to no flag, with the one that it may be meant for."""
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
