"""The origin of a run: its trainer's class and code; in run.json the machine, versions and command of each start."""

import contextlib
import importlib.metadata
import inspect
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from config import PRESETS, Config, SettingError
from runtime import ranks
from runtime.errors import SaveError
from runtime.files import write_text
from runtime.importing import ROOT
from settings.same_run import MAY_DIFFER
from training.run_folder import Identity

LONGEST_DIFF = 200_000  # characters


# ---------------------------------------------------------------- the experiment's classes and code


def source_file(cls: type) -> Path | None:
    """The file that a class was read from; None for one that was typed into a notebook or made by `exec`."""
    try:
        return Path(inspect.getfile(cls)).resolve()
    except (OSError, TypeError):
        return None


def users_script() -> Path | None:
    """The script that this process runs, if that is an experiment: not main.py, `python -m ...`, or a notebook."""
    main = sys.modules['__main__']
    path = Path(getattr(main, '__file__', None) or '').resolve()
    is_script = getattr(main, '__spec__', None) is None and path.suffix == '.py' and path.is_file()
    return path if is_script and path != ROOT / 'main.py' else None


def identity_of(trainer_class: type, base_class: type, fingerprint: str) -> Identity:
    """The Identity of a run of this trainer on the data set with this fingerprint.

    Its code is the user's script and, from other files, every class from `trainer_class` up to `base_class`, which is
    excluded. A class without source, as in some notebooks, is left out.
    """
    script = users_script()
    code = {} if script is None else {script.name: script.read_text()}
    for cls in trainer_class.__mro__:
        file = source_file(cls)
        if cls not in base_class.__mro__ and (script is None or file != script):
            with contextlib.suppress(OSError, TypeError):
                code[name_of(cls)] = inspect.getsource(cls)
    return Identity(name_of(trainer_class), code, fingerprint)


def name_of(cls: type) -> str:
    """'mine.py:MyTrainer', or only the class if it has no file."""
    file = source_file(cls)
    return f'{file.name}:{cls.__qualname__}' if file else cls.__qualname__


def import_arguments(cls: type) -> dict[str, str | None]:
    """Arguments with which import_class finds a class again: its file, in the form of from_root, and its name."""
    return dict(file=from_root(source_file(cls)), name=cls.__qualname__)


def from_root(file: Path | None) -> str | None:
    """A path in the form that run.json has: relative to the project if it is inside."""
    return file and str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)


# ---------------------------------------------------------------- run.json


def output_of(*command: str) -> str | None:
    """The output of a command; None if it is not installed or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors='replace').strip()


def git_state() -> dict[str, str | None]:
    """Commit of the project's repository and the diff to it, cut to LONGEST_DIFF; None without a repository."""
    git = ('git', '-c', f'safe.directory={ROOT}', '--no-pager')  # another user may own it, as in a container
    if output_of(*git, 'ls-files', '--error-unmatch', 'config.py') is None:  # none, or only one around the project
        return dict(commit=None, diff=None)
    diff = output_of(*git, 'diff', '--no-ext-diff', '--no-color', 'HEAD', '--', '.')
    if diff is not None and len(diff) > LONGEST_DIFF:
        diff = f'{diff[:LONGEST_DIFF]}\n... and {len(diff) - LONGEST_DIFF} more characters'
    return dict(commit=output_of(*git, 'rev-parse', 'HEAD'), diff=diff)


def versions() -> dict[str, str | None]:
    """Versions of Python, packages, CUDA and driver; None for anything missing."""
    packages = {name: importlib.metadata.version(name) for name in ('torch', 'torchvision', 'numpy')}
    query = ('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    drivers = (output_of(*query) if torch.cuda.is_available() else None) or ''  # a line for each GPU
    driver = drivers.partition('\n')[0] or None
    return dict(python=platform.python_version(), **packages, cuda=torch.version.cuda, driver=driver)


def imported_files() -> list[Path]:
    """The files of the project that this process has imported, relative to ROOT, in order."""
    modules = [getattr(module, '__dict__', {}).get('__file__') for module in list(sys.modules.values())]
    files = {Path(file).resolve() for file in modules if isinstance(file, str) and file.endswith('.py')}
    environment = Path(sys.prefix).resolve()
    if environment.is_relative_to(ROOT):  # .venv
        files = {file for file in files if not file.is_relative_to(environment)}
    return sorted(file.relative_to(ROOT) for file in files if file.is_relative_to(ROOT))


def checksum(path: Path) -> str:
    return f'checksum {zlib.crc32(path.read_bytes()):08x}' if path.is_file() else 'no such file'


def facts_to_compare(config: Config, files: list[Path]) -> dict[str, Any]:
    """Name -> value of everything that must be the same in all processes; `files` are relative to ROOT."""
    code = {file: ROOT / file for file in files}
    if (script := users_script()) is not None:  # possibly outside of ROOT
        code[Path(script.name)] = script
    return {
        **{f'the code in {name}': checksum(path) for name, path in code.items()},
        **{f'version of {name}': importlib.metadata.version(name) for name in ('torch', 'numpy')},
        'version of python': platform.python_version(),
        **{f'setting {name}': value for name, value in vars(config).items() if name not in MAY_DIFFER},
    }


def refuse_unlike(config: Config) -> None:
    """Raise SettingError, on every rank, if ranks have other settings, code or versions than rank 0.

    That happens if machines have their own clones or environments and one was not updated. The code is all files of the
    project that rank 0 has imported; its other files may differ, and so may the location of the data.
    """
    if ranks.world_size() == 1:
        return
    host = socket.gethostname()
    main_host, files, first = ranks.on_main(lambda: (host, files := imported_files(), facts_to_compare(config, files)))

    def compare() -> None:
        here = facts_to_compare(config, files)
        differ = [name for name in first | here if first.get(name) != here.get(name)]
        lines = [f'  {name}: {first.get(name)} on {main_host}, {here.get(name)} on {host}' for name in differ]
        if lines and config.init_from and not Path(config.init_from).is_file():  # it holds the network's settings
            raise SettingError(f'init_from={config.init_from!r}: {host} has no such file. Copy it there.')
        if lines:
            more = [f'  ... and {len(lines) - 20} more'] if len(lines) > 20 else []
            raise SettingError(
                '\n'.join(['the processes of this run were not started alike:', *lines[:20], *more])
                + '\nUse the same command, code and packages on all machines.'
            )

    ranks.on_each(compare)


def command_line(config_class: type[Config] = Config) -> str:
    """The command that starts this again from the project's folder; a run.sh command if run.sh started it."""
    from settings.flags import read

    if 'RUN_REPORTS' not in os.environ:  # the launcher sets it
        return shlex.join(['python', *sys.argv])
    machines = ('NNODES', 'NODE_RANK', 'MASTER_ADDR') if 'NNODES' in os.environ else ()  # torchrun sets MASTER_ADDR too
    given = {name: os.environ[name] for name in ('NPROC', *machines, 'TORCHRUN_ARGS') if name in os.environ}
    if machines and 'RUN_PORT' in os.environ:
        given['MASTER_PORT'] = os.environ['RUN_PORT']
    script = [] if sys.argv[0] == 'main.py' else sys.argv[:1]
    variables = [f'{name}={shlex.quote(value)}' for name, value in given.items()]
    flags, _ = read(sys.argv[1:], config_class, PRESETS)  # paths as seen from the project's folder
    return ' '.join([*variables, shlex.join(['sh', 'run.sh', *script, *flags])])


def write_start(config: Config, trainer_class: type, device: torch.device, step: int = 0) -> dict[str, Any]:
    """Append an entry for this start to the run's run.json, and return it. All ranks must call this together.

    `step`: the step at which the run starts or resumes. Raises SaveError if the file cannot be written.
    """

    def write() -> dict[str, Any]:
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type} ({platform.machine()})'
        entry: dict[str, Any] = dict(time=time.strftime('%Y-%m-%dT%H:%M:%S%z'), step=step)
        entry |= dict(command=command_line(type(config)), argv=sys.argv, **git_state(), versions=versions())
        entry |= dict(host=socket.gethostname(), device=name, processes=ranks.world_size())
        entry |= dict(
            script=from_root(users_script()),
            trainer=import_arguments(trainer_class),
            config=import_arguments(type(config)),
        )
        path = config.run_dir / 'run.json'
        try:
            write_text(path, json.dumps([*read_starts(config.run_dir), entry], indent=2), durable=True)
        except OSError as error:
            raise SaveError(f'{path} cannot be written ({error}). Make room there, and run it again.') from error
        return entry

    return ranks.on_main(write)


def read_starts(run_dir: str | Path) -> list[dict[str, Any]]:
    """The entries of run.json, the first start first; none if there is no such file."""
    path = Path(run_dir, 'run.json')
    return json.loads(path.read_text()) if path.exists() else []


def read_start(run_dir: str | Path) -> dict[str, Any]:
    """The entry of the run's last start. Raises SettingError if there is none."""
    starts = read_starts(run_dir)
    if not starts:
        if not Path(run_dir).is_dir():
            raise SettingError(f'{run_dir} does not exist. Pass the folder of a run.')
        runs = sorted(path.parent for path in Path(run_dir).glob('*/run.json'))
        if runs:
            raise SettingError(f'{run_dir} is a folder of {len(runs)} runs. Pass one of them, such as {runs[0]}.')
        raise SettingError(
            f"{run_dir} has no run.json, which names the run's code. Copy the run.json of the run there, next to its "
            ".pt files; or pass the run's folder."
        )
    return starts[-1]
