"""The first Python program of run.sh: checks the script and the flags of main.py before torch is imported.

python -m launch.start [--direct | --flags] SCRIPT [FLAGS]

--direct: without torchrun, as one process; --flags: only check the flags
"""

import os
import sys
from pathlib import Path
from typing import Any, cast

from launch import machines
from runtime.errors import EXIT_BAD_SETTING, SettingError
from runtime.importing import old_imports, refuse_hidden

# Python looks for packages in the folder of the script first, and these folders would hide some: scripts/evaluate.py
# hides an installed `evaluate`, tests/training hides training/. So their scripts are started as modules.
RUN_AS_MODULES = ('scripts', 'tests')


def start(script: str, *flags: str, is_direct: bool = False) -> int:
    """Launch `script`; returns an exit code. A wrong flag of main.py ends the program with a message.

    `is_direct`: replace this process by one that runs the script.
    """
    module = module_of(script)
    wrong = old_imports(Path(script), has_neighbours=module is None)
    try:
        refuse_hidden([str(Path(script).resolve().parent)] if module is None else [])
    except SettingError as error:
        wrong.append(f'SettingError: {error}')
    if wrong:  # else nothing at all is printed: the output may be a file on a full disk
        print(*wrong, sep='\n', file=sys.stderr, flush=True)
        return EXIT_BAD_SETTING
    if is_direct:
        if not machines.several():  # left by a cluster or an earlier program: torch would wait for other processes
            for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
                os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, *(['-m', module] if module else [script]), *flags])
    machines.warn_if_single()
    check_flags(script, *flags)
    level = os.environ.get('TORCH_CPP_LOG_LEVEL')  # read when torch is imported
    os.environ['TORCH_CPP_LOG_LEVEL'] = level or 'FATAL'  # this process would print two pages for a lost connection
    from launch.launcher import launch
    from runtime import command

    os.environ['TORCH_CPP_LOG_LEVEL'] = level or 'ERROR'  # for workers, whose warnings are only about host names
    sys.stdout, sys.stderr = cast(Any, command.SafeStream(sys.stdout)), cast(Any, command.SafeStream(sys.stderr))
    return launch([script, *flags], module)


def check_flags(script: str, *flags: str) -> None:
    """End the program with a message if a flag of main.py is wrong. The workers parse the flags again."""
    if script == 'main.py' and not machines.several():  # else the other machines would wait for this one
        import main

        sys.argv = [script, *flags]  # argparse shows this name in its message
        main.flags(flags)


def module_of(script: str) -> str | None:
    """'scripts.generate' for scripts/generate.py, a path relative to the project; None if it runs as a file."""
    folder, _, name = script.removesuffix('.py').rpartition('/')
    return f'{folder}.{name}' if folder in RUN_AS_MODULES else None


if __name__ == '__main__':
    words = sys.argv[1:]
    if words[0] == '--flags':
        if not [word for word in words if word.startswith(('--init_from', '--init-from'))]:  # reading it needs torch
            check_flags(*words[1:])
        sys.exit()
    direct = words[0] == '--direct'
    code = start(*words[direct:], is_direct=direct)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without torch's destructors, which take a third of a second
