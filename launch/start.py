"""The first Python program of run.sh: looks at the script and at the flags of main.py before torch is imported.

python -m launch.start [--direct | --flags] SCRIPT [FLAGS]

--direct: without torchrun, as one process; --flags: only look at the flags
"""

import os
import sys
from pathlib import Path
from typing import Any, cast

from launch import machines
from runtime.errors import EXIT_BAD_SETTING, SettingError
from runtime.importing import old_imports, refuse_hidden

# Python looks for packages in the folder of the script first. These folders would hide some: scripts/evaluate.py hides
# an installed `evaluate`, tests/training hides training/. So their scripts are started as modules.
RUN_AS_MODULES = ('scripts', 'tests')


def start(script: str, *flags: str, is_direct: bool = False) -> int:
    """Launch `script`; returns an exit code. A wrong flag of main.py ends the program with its message.

    `is_direct`: this process is replaced by one that runs the script.
    """
    module = module_of(script)
    wrong = old_imports(Path(script), has_neighbours=module is None)
    try:
        refuse_hidden([str(Path(script).resolve().parent)] if module is None else [])
    except SettingError as error:
        wrong.append(f'SettingError: {error}')
    if wrong:  # else nothing at all is written: the output may be a file on a full disk
        print(*wrong, sep='\n', file=sys.stderr, flush=True)
        return EXIT_BAD_SETTING
    if is_direct:
        if not machines.several():  # a cluster has set these, or an earlier program: torch would wait for others
            for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
                os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, *(['-m', module] if module else [script]), *flags])
    machines.warn_if_alone()
    look_at(script, *flags)
    level = os.environ.get('TORCH_CPP_LOG_LEVEL')  # read when torch is imported
    os.environ['TORCH_CPP_LOG_LEVEL'] = level or 'FATAL'  # a lost connection would be two pages here
    from launch.launcher import launch
    from runtime import command

    os.environ['TORCH_CPP_LOG_LEVEL'] = level or 'ERROR'  # of workers; warnings are about names of hosts
    sys.stdout, sys.stderr = cast(Any, command.Output(sys.stdout)), cast(Any, command.Output(sys.stderr))
    return launch([script, *flags], module)


def look_at(script: str, *flags: str) -> None:
    """A wrong flag of main.py ends the program with its message; the workers parse them again."""
    if script == 'main.py' and not machines.several():  # else the other machines would wait for this one
        import main

        sys.argv = [script, *flags]  # its message shows this name
        main.flags(flags)


def module_of(script: str) -> str | None:
    """'scripts.generate' for scripts/generate.py, a path from the project's folder; None if it runs as a file."""
    folder, _, name = script.removesuffix('.py').rpartition('/')
    return f'{folder}.{name}' if folder in RUN_AS_MODULES else None


if __name__ == '__main__':
    words = sys.argv[1:]
    if words[0] == '--flags':
        if not [word for word in words if word.startswith(('--init_from', '--init-from'))]:  # that one needs torch
            look_at(*words[1:])
        sys.exit()
    direct = words[0] == '--direct'
    code = start(*words[direct:], is_direct=direct)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without torch's destructors, which take a third of a second
