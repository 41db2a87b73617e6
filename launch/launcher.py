"""The launcher that run.sh calls, through launch/start.py: torchrun, with one process per GPU or one on a CPU machine.

NPROC: processes on this machine.
MAX_RESTARTS: how often a run that fails is started again, to go on from its last checkpoint.
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: several machines (launch/machines.py); under Slurm they are derived.
NODE_WAIT: seconds for which machines wait for one that is late (600).
TORCHRUN_ARGS: flags of torchrun, in place of those that this file would give it.
"""

import json
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch import machines
from launch.machines import Place, whole_number
from launch.meeting import Alone, Meeting, Refused, say
from runtime import errors, stopping
from settings.same_run import MAY_DIFFER

# Exit codes of workers that have said why they end.
EXPLAINED_CODES = (errors.EXIT_BAD_SETTING, errors.EXIT_NOT_FINITE, errors.EXIT_STOPPED)
STORE_WAIT = 120  # seconds in which torchrun's store on machine 0 must be reached; the launchers have met by then


@dataclass(frozen=True)
class End:
    """How the workers of this machine have ended."""

    code: int
    text: str = ''  # why
    order: tuple[int, float] = (9, 0.0)  # of several failures the least is the cause
    already_printed: bool = False  # by rank 0, which is on this machine


def launch(argv: list[str], module: str | None = None) -> int:
    """torchrun `argv` (a script and its flags), as often as MAX_RESTARTS allows, and return an exit code.

    `module`: the script is started as this module.
    """
    if sys.platform == 'win32':
        print('Windows is not supported: use Linux, macOS or WSL (the Windows Subsystem for Linux).', file=sys.stderr)
        return 1
    if os.getpgrp() != os.getpid():
        os.setsid()  # Ctrl-C reaches run.sh alone, which forwards it once
    stopping.end_with_parent()
    try:
        here = machines.place()
        nproc = processes(here, torch.cuda.device_count())
        restarts = whole_number(os.environ, 'MAX_RESTARTS', 0)
        wait = whole_number(os.environ, 'NODE_WAIT', 600, 1)
        flags = shlex.split(os.environ.get('TORCHRUN_ARGS', ''))
        if restarts and any('nnodes' in flag for flag in flags):
            raise ValueError(
                f'MAX_RESTARTS={restarts}: launchers that meet by TORCHRUN_ARGS cannot agree when to start again. Use '
                "NNODES, NODE_RANK and MASTER_ADDR in its place, or torchrun's own --max-restarts in it."
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return errors.EXIT_BAD_SETTING
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // nproc)))  # torchrun would set 1
    # waiting threads spin so long otherwise that two programs on the same cores stall each other
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    os.environ['RUN_PARENT'] = str(os.getpid())
    if 'MASTER_PORT' in os.environ:  # torchrun gives the workers another
        os.environ['RUN_PORT'] = os.environ['MASTER_PORT']
    logging.disable(logging.CRITICAL)  # torchrun would report each worker's end once more; what matters is said below
    patch_signal_handler()

    def start() -> int:
        with tempfile.TemporaryDirectory(prefix='reports') as reports:
            os.environ['RUN_REPORTS'] = reports
            if '--check' in argv:
                os.environ['TMPDIR'] = reports  # torch and others leave caches there
            arguments = [
                f'--nproc-per-node={nproc}',
                f'--log-dir={reports}',
                '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1',
                *(['--module'] if module else []),
                '--',  # torchrun would take a flag of ours for one of its own that begins alike
                module or argv[0],
                *argv[1:],
            ]
            if here.machines == 1 or flags:
                return repeat(restarts, lambda: alone([*(flags or ['--standalone']), *arguments], Path(reports)))
            about = dict(command=shlex.join([Path(argv[0]).name, *without(argv[1:], MAY_DIFFER)]))
            about |= dict(NNODES=str(here.machines), MAX_RESTARTS=str(restarts))
            return repeat(restarts, lambda: together(here, about, wait, arguments, Path(reports)))

    return machines.in_one_task(here, start)


def without(flags: Sequence[str], names: Sequence[str]) -> list[str]:
    """The flags and their values, but for those of these settings."""
    kept, skipping = [], False
    for word in flags:
        if word.startswith('--'):
            skipping = word.removeprefix('--').partition('=')[0].replace('-', '_') in names
        if not skipping:
            kept.append(word)
    return kept


def processes(here: Place, gpus: int) -> int:
    """How many to start on this machine. Raises ValueError."""
    if here.tasks > 1 and gpus not in (0, here.tasks) and not os.environ.get('NPROC'):
        raise ValueError(
            f'srun started {here.tasks} tasks on this node, and the first of them sees {gpus} GPU(s). One task starts '
            'a process for each GPU of its node: use --ntasks-per-node=1 and --gpus-per-node, not --gpus-per-task.'
        )
    return whole_number(os.environ, 'NPROC', here.tasks if here.tasks > 1 else max(1, gpus), 1, gpus or None)


def repeat(restarts: int, attempt: Callable[[], int]) -> int:
    """The exit code of the last of `restarts` + 1 attempts, or of the first that did not fail."""
    code = 1
    for restart in range(restarts + 1):
        if restart:
            text = f'starting again from the last checkpoint ({restart} of {restarts} restarts)'
            print(text, file=sys.stderr, flush=True)
        try:
            code = attempt()
        except Alone as error:
            print(error, file=sys.stderr, flush=True)
            if not restart:  # nothing has run that could go on
                break
        if code in (0, *EXPLAINED_CODES):
            break
    return code


stops: list[int] = []  # stop signals that came when no workers ran: between two attempts, or after the last


def note_stop(signum: int, frame: Any) -> None:
    stops.append(signum)


def on_stop(handler: Any) -> None:
    for name in stopping.STOP_SIGNALS:
        signal.signal(name, handler)


def alone(arguments: list[str], reports: Path) -> int:
    """The exit code of torchrun with these arguments. Prints the cause, last."""
    end = run_workers(arguments, reports)
    on_stop(note_stop)
    if end.text and not end.already_printed:
        print(end.text, file=sys.stderr, flush=True)
    return end.code


def together(here: Place, about: dict[str, str], wait: int, arguments: list[str], reports: Path) -> int:
    """`alone`, at the same time on all machines of `here`: the exit code that they agree on. Prints the cause, last.

    Raises Alone if not all of them came.
    """
    from torch.distributed.elastic.multiprocessing import SignalException, api

    on_stop(api._terminate_process_handler)  # as torchrun does once it has workers
    meeting, end = None, None
    try:
        meeting = Meeting(here, about, reports, wait)
        if stops:
            meeting.tell(errors.EXIT_STOPPED, 20)
            end = End(errors.EXIT_STOPPED)
        elif meeting.gather():
            where = 'this one prints' if here.rank == 0 else 'machine 0 prints'
            say(f'machine {here.rank}: all {here.machines} machines are here; {where} what the run says')
            machines.use_interface(meeting.my_address)
            first = meeting.address or meeting.my_address
            flags = [f'--nnodes={here.machines}', f'--node-rank={here.rank}']
            flags += [f'--master-addr={first}', f'--master-port={meeting.table.port}']
            flags += [f'--rdzv-conf=timeout={STORE_WAIT}']
            end = run_workers([*flags, *arguments], reports)
        else:
            end = End(errors.EXIT_STOPPED)  # as another machine was asked to
        code, cause, text = meeting.settle(end.code, end.text, end.order)
    except Refused as error:
        code, cause, text = errors.EXIT_BAD_SETTING, -1, str(error)
    except SignalException:  # before there were workers, or after
        code, cause, text = errors.EXIT_STOPPED, -1, ''
        if meeting is not None and end is None:
            meeting.tell(code)
        elif meeting is not None:  # it was waiting for the others' ends
            code, cause, text = meeting.known()
    finally:
        on_stop(note_stop)  # it is decided: srun may end all tasks once the first has left with this code
        if meeting is not None:
            meeting.close()
    if code == 0 and end is not None and end.text:
        print(end.text, file=sys.stderr, flush=True)
    known = end is not None and (end.already_printed or not end.text)
    if text and not (known and cause == here.rank) and not (end and end.code == code == errors.EXIT_STOPPED):
        print(text, file=sys.stderr, flush=True)
    return code


def outcome_of_stop(reports: Path) -> End:
    """How the workers ended after they were asked to stop; says what kept them from saving."""
    outcome = int((reports / 'outcome').read_text())
    if outcome == 1 and any(reports.glob('failed_*')):
        order, text = min(causes({}, reports))
        return End(1, text, order)
    if outcome == 1:
        text = 'it did not stop in the time that torchrun gives, and was cut off'
        return End(errors.EXIT_STOPPED, text + ': the same command goes on from the last save')
    return End(outcome)


def patch_signal_handler() -> None:
    """Let torchrun obey the first stop signal only: at a second one it would leave workers behind that still save.

    Raises RuntimeError if this torch has no handler of the name that is replaced here.
    """
    from torch.distributed.elastic.multiprocessing import SignalException, api

    if not hasattr(api, '_terminate_process_handler'):
        raise RuntimeError(
            f'torch {torch.__version__} has no _terminate_process_handler in torch.distributed.elastic.multiprocessing.'
            'api, which launch/launcher.py replaces so that a second Ctrl-C cannot interrupt a save. '
            'Install the torch of requirements.txt, or fix patch_signal_handler there.'
        )

    def stop_once(signum: int, frame: Any) -> None:
        for name in stopping.STOP_SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        raise SignalException(f'got signal {signum}', signal.Signals(signum))

    api._terminate_process_handler = stop_once


def run_workers(arguments: list[str], reports: Path) -> End:
    """torchrun with these arguments, to the end of its workers, also to that which a signal asks for."""
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for old in (*reports.glob('failed_*'), reports / 'give_up'):
        old.unlink(missing_ok=True)
    (reports / 'outcome').write_text(str(errors.EXIT_STOPPED))  # until a worker begins there is nothing to lose
    try:
        on_stop(api._terminate_process_handler)  # torchrun does it once it has workers
        if stops:
            return End(errors.EXIT_STOPPED)
        torchrun(arguments)
    except SignalException:
        return outcome_of_stop(reports)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        order, text = min(causes(codes, reports))
        said = [code for code in codes.values() if code in EXPLAINED_CODES]
        if said:
            told = any(reports.glob('failed_*'))
            return End(said[0], text if told else '', order, already_printed=(reports / 'failed_0').exists())
        outcome = (reports / 'outcome').read_text()
        if any(-code in stopping.STOP_SIGNALS for code in codes.values()) and outcome == str(errors.EXIT_STOPPED):
            # one was asked to stop before there was anything to save, and the other ranks failed because it was gone
            return End(errors.EXIT_STOPPED)
        return End(1, text, order)
    except Exception as error:  # of torchrun itself, which did not reach its store on machine 0, say
        if isinstance(error.__context__, SignalException):  # an error of torchrun's own while it obeyed a stop signal
            return outcome_of_stop(reports)
        return End(1, f'torchrun failed: {type(error).__name__}: {error}')
    if (reports / 'outcome').read_text() == str(errors.EXIT_STOPPED):  # as it was before: no worker told of an end
        script = next((word for word in arguments if word.endswith('.py')), 'the script')
        return End(0, f'{script} ended without a run: it has to call main(), see the first example of README.md')
    return End(0)


def causes(codes: dict[int, int], reports: Path) -> list[tuple[tuple[int, float], str]]:
    """Why workers failed, each with its order: the least is the cause, the others follow from it.

    That a worker was killed comes first, then the errors that were reported, by their time, and last those of ranks
    that heard of another's failure or lost the connection to it. `codes`: rank -> exit code.
    """
    found = []
    for rank, code in codes.items():
        if code == -signal.SIGKILL:
            found.append(((0, 0.0), f'rank {rank} was killed by signal 9 (SIGKILL); is there enough memory?'))
        how = (
            f'signal {-code} ({signal.Signals(-code).name})' if code < 0 else f'exit code {code}; its message is above'
        )
        found.append(((3, 0.0), f'rank {rank} failed first ({how}).'))
    for failure in [json.loads(path.read_text()) for path in reports.glob('failed_*')]:
        follows = failure['follows'] or 'gloo/transport' in failure['text']
        found.append(((1 + follows, failure['time']), f'rank {failure["rank"]} failed first: {failure["text"]}'))
    return found
