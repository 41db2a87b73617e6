"""What run.sh starts. It reads the flags of main.py before torch is imported, so that a wrong one is said at once."""

import os
import sys
from typing import Any, cast

from launch import machines


def start(script: str, *flags: str) -> int:
    """Launch `script`; an exit code. A wrong flag of main.py ends the program with its message."""
    if script == 'main.py' and not machines.several():  # the others would wait for one that ends before it meets them
        import main

        sys.argv = [script, *flags]  # whose name the message shows
        main.flags(flags)  # the workers read them again
    from launch.launcher import launch
    from runtime import command

    sys.stdout, sys.stderr = cast(Any, command.Output(sys.stdout)), cast(Any, command.Output(sys.stderr))
    return launch([script, *flags])


if __name__ == '__main__':
    code = start(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the destructors of torch, which take a third of a second
