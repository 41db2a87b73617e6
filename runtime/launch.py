"""The launcher that run.sh calls: torchrun, with one process per GPU or one on a CPU machine.

    python -m runtime.launch script.py [flags]

NPROC: processes on this machine.
MAX_RESTARTS: how often a run that fails is started again, to go on from its last checkpoint.
TORCHRUN_ARGS: torchrun's flags instead of --standalone, for several machines.
"""

import json
import logging
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from runtime import stopping

# Exit codes of workers that have said why they end.
SAID = (stopping.EXIT_BAD_SETTING, stopping.EXIT_NOT_FINITE, stopping.EXIT_STOPPED)


def launch(argv: list[str]) -> int:
    """torchrun `argv` (a script and its flags), as often as MAX_RESTARTS allows, and return an exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException

    if sys.platform == 'win32':
        print('Windows is not supported: use Linux, macOS or WSL (the Windows Subsystem for Linux).', file=sys.stderr)
        return 1
    if os.getpgrp() != os.getpid():
        os.setsid()  # Ctrl-C reaches run.sh alone, which forwards it once
    stopping.end_with_parent()
    gpus = torch.cuda.device_count()
    try:
        nproc = whole_number('NPROC', max(1, gpus), 1, gpus or None)
        restarts = whole_number('MAX_RESTARTS', 0, 0, None)
    except ValueError as error:
        print(error, file=sys.stderr)
        return stopping.EXIT_BAD_SETTING
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // nproc)))  # torchrun would set 1
    # waiting threads spin so long otherwise that two programs on the same cores stall each other
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    os.environ['RUN_PARENT'] = str(os.getpid())
    logging.disable(logging.CRITICAL)  # torchrun would report each worker's end once more; what matters is said below
    patch_signal_handler()
    flags = shlex.split(os.environ.get('TORCHRUN_ARGS', '--standalone'))
    with tempfile.TemporaryDirectory(prefix='reports') as reports:
        os.environ['RUN_REPORTS'] = reports
        if '--check' in argv:
            os.environ['TMPDIR'] = reports  # torch and others leave caches there
        arguments = [
            f'--log-dir={reports}',
            *flags,
            f'--nproc-per-node={nproc}',
            '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1',
            '--',  # torchrun would take a flag of ours for one of its own that begins alike
            *argv,
        ]
        try:
            for restart in range(restarts + 1):
                code = run_workers(arguments, Path(reports))
                if code in (0, *SAID) or restart == restarts:
                    return code
                text = f'starting again from the last checkpoint ({restart + 1} of {restarts} restarts)'
                print(text, file=sys.stderr, flush=True)
        except SignalException:
            return outcome_of_stop(Path(reports))
    raise AssertionError('the last restart returns')


def outcome_of_stop(reports: Path) -> int:
    """The exit code of a run that was asked to stop; says what kept it from saving."""
    outcome = int((reports / 'outcome').read_text())
    if outcome == 1 and any(reports.glob('failed_*')):
        print(first_cause({}, reports), file=sys.stderr, flush=True)
    elif outcome == 1:
        text = 'it did not stop in the time that torchrun gives, and was cut off'
        text += ': the same command goes on from the last save'
        print(text, file=sys.stderr, flush=True)
        return stopping.EXIT_STOPPED
    return outcome


def whole_number(name: str, usual: int, least: int, most: int | None) -> int:
    """Environment variable `name`. Raises ValueError."""
    value = os.environ.get(name) or str(usual)
    if not value.isdigit() or int(value) < least or (most is not None and int(value) > most):
        limit = f' and no more than the {most} GPUs' if most is not None else ''
        raise ValueError(f'{name}={value!r}: must be a whole number, at least {least}{limit}.')
    return int(value)


def patch_signal_handler() -> None:
    """Let torchrun obey the first stop signal only: at a second one it would leave workers behind that still save.

    Raises RuntimeError if this torch has no handler of the name that is replaced here.
    """
    from torch.distributed.elastic.multiprocessing import SignalException, api

    if not hasattr(api, '_terminate_process_handler'):
        raise RuntimeError(
            f'torch {torch.__version__} has no _terminate_process_handler in torch.distributed.elastic.multiprocessing.'
            'api, which runtime/launch.py replaces so that a second Ctrl-C cannot interrupt a save. '
            'Install the torch of requirements.txt, or mend patch_signal_handler there.'
        )

    def stop_once(signum: int, frame: Any) -> None:
        for name in stopping.STOP_SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        raise SignalException(f'got signal {signum}', signal.Signals(signum))

    api._terminate_process_handler = stop_once


def run_workers(arguments: list[str], reports: Path) -> int:
    """torchrun with these arguments; the exit code. Prints the first cause, last. Raises SignalException."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for old in reports.glob('failed_*'):
        old.unlink()
    (reports / 'outcome').write_text(str(stopping.EXIT_STOPPED))  # until a worker begins there is nothing to lose
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        said = [code for code in codes.values() if code in SAID]
        if said:
            if any(reports.glob('failed_*')) and not (reports / 'failed_0').exists():  # rank 0 would have shown it
                print(first_cause(codes, reports), file=sys.stderr, flush=True)
            return said[0]
        outcome = (reports / 'outcome').read_text()
        if any(-code in stopping.STOP_SIGNALS for code in codes.values()) and outcome == str(stopping.EXIT_STOPPED):
            # one was asked to stop before there was anything to save, and the other ranks failed because it was gone
            return stopping.EXIT_STOPPED
        print(first_cause(codes, reports), file=sys.stderr, flush=True)
        return 1
    if (reports / 'outcome').read_text() == str(stopping.EXIT_STOPPED):  # as it was before: no worker told of an end
        script = next((word for word in arguments if word.endswith('.py')), 'the script')
        print(
            f'{script} ended without a run: it has to call main(), see the first example of README.md', file=sys.stderr
        )
    return 0


def first_cause(codes: dict[int, int], reports: Path) -> str:
    """Why the run failed: a worker was killed, or else the first error reported. `codes`: rank -> exit code."""
    for rank, code in codes.items():
        if code == -signal.SIGKILL:
            return f'rank {rank} was killed by signal 9 (SIGKILL); is there enough memory?'
    failures = [json.loads(path.read_text()) for path in reports.glob('failed_*')]
    if failures:
        told = 'runtime.stopping.RankFailed'  # by a rank that only heard of the failure of another
        first = min(failures, key=lambda failure: (failure['text'].startswith(told), failure['time']))
        return f'rank {first["rank"]} failed first: {first["text"]}'
    rank, code = next(iter(codes.items()))
    how = f'signal {-code} ({signal.Signals(-code).name})' if code < 0 else f'exit code {code}; its message is above'
    return f'rank {rank} failed first ({how}).'


if __name__ == '__main__':
    sys.exit(launch(sys.argv[1:]))
