"""The launcher: torchrun with one process per GPU, or one on a CPU machine, and the cause when workers fail.

NPROC: processes on this machine. TORCHRUN_ARGS: flags of torchrun, in place of those that this file would give it.
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NODE_WAIT: several machines (launch/machines.py, launch/rows.py).
"""

import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from launch import machines
from launch.machines import Place, say, whole_number
from launch.rows import PATIENCE, End, Incomplete, Meeting, verdict
from runtime import errors, stopping

EXPLAINED_CODES = (errors.EXIT_BAD_SETTING, errors.EXIT_NOT_FINITE, errors.EXIT_STOPPED)  # the worker has said why
STORE_WAIT = 120  # seconds in which torchrun's store on machine 0 must be reached; the launchers have met by then
DEAF = 10  # seconds for Python to obey a stop signal. Where torch waits in C++ it obeys none


def launch(argv: list[str], module: str | None = None) -> int:
    """torchrun `argv` (a script and its flags), started as `module` if that is given; returns an exit code."""
    if os.getpgrp() != os.getpid():
        os.setsid()  # Ctrl-C reaches run.sh alone, which forwards it once
    stopping.end_with_parent()
    try:
        machines.check_loopback()
        here, gpus = machines.place(), torch.cuda.device_count()
        nproc = whole_number('NPROC', max(1, gpus), 1, gpus or None)
        wait, restarts = whole_number('NODE_WAIT', 600, 1), whole_number('MAX_RESTARTS', 0)
        given = shlex.split(os.environ.get('TORCHRUN_ARGS', ''))
        if restarts and any('nnodes' in flag for flag in given):
            why = 'launchers that meet by TORCHRUN_ARGS cannot agree when to start again'
            raise errors.SettingError(f'MAX_RESTARTS={restarts}: {why}. Use NNODES, or --max-restarts in it.')
    except errors.SettingError as error:
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
    with tempfile.TemporaryDirectory(prefix='reports') as folder:
        os.environ['RUN_REPORTS'] = folder
        if '--check' in argv:
            os.environ['TMPDIR'] = folder  # torch and others leave caches there
        arguments = [f'--nproc-per-node={nproc}', f'--log-dir={folder}', *(['--module'] if module else [])]
        # after --: torchrun would take a flag of ours for one of its own that begins alike
        arguments += ['--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1', '--', module or argv[0], *argv[1:]]
        obey_once(Path(folder))
        code = 1
        standalone = ['--standalone', '--local-addr=127.0.0.1']  # this machine, whatever its name
        for restart in range(restarts + 1):
            if restart:
                say(f'starting again from the last checkpoint ({restart} of {restarts} restarts)')
            try:
                if here.machines > 1 and not given:
                    code, text = together(here, wait, arguments, Path(folder))
                else:
                    end = run_workers([*(given or standalone), *arguments], Path(folder))
                    code, text = end.code or 0, end.text
                nothing_ran = False
            except Incomplete as error:
                code, text, nothing_ran = 1, str(error), not restart
            if text:  # the cause, without what `say` puts in front
                print(text, file=sys.stderr, flush=True)
            if code in (0, *EXPLAINED_CODES) or nothing_ran:
                break
        return code


def together(here: Place, wait: int, arguments: list[str], reports: Path) -> tuple[int, str]:
    """torchrun with these arguments at the same time on all machines: the exit code that they agree on, and the cause,
    if there is one to tell. Raises Incomplete."""
    meeting, end, was_stopped = None, End(errors.EXIT_STOPPED), bool(stops)
    try:
        on_stop(api._terminate_process_handler)  # as torchrun does once it has workers
        meeting = Meeting(here, reports, wait)
        meetings[:] = [meeting]
        if not was_stopped and meeting.gather():
            say(f'machine {here.rank}: all {here.machines} machines are here; machine 0 prints what the run says')
            first = meeting.mine.first or meeting.rows[1].first
            machines.use_interface(meeting.my_address or first)
            flags = [f'--nnodes={here.machines}', f'--node-rank={here.rank}', f'--master-addr={first}']
            flags += [f'--master-port={meeting.rows[0].port}', f'--rdzv-conf=timeout={STORE_WAIT}']
            end = run_workers([*flags, *arguments], reports)
    except errors.SettingError as error:
        end = End(errors.EXIT_BAD_SETTING, str(error))
    except Incomplete:
        if meeting is not None:
            meeting.close()  # another start needs the port
        raise
    except SignalException:  # before there were workers
        pass
    code, cause, text = end.code or 0, here.rank, end.text
    if meeting is not None:
        with suppress(SignalException):
            on_stop(api._terminate_process_handler)
            meeting.settle(end, PATIENCE if was_stopped else 0)
        on_stop(note_stop)  # it is decided: srun may end all tasks once the first has left with this code
        code, cause, text = verdict(meeting.judged())
        meeting.close()
    if code == end.code == errors.EXIT_STOPPED:
        return code, ''
    return code, end.text if code == 0 or cause == here.rank else text


stops: list[int] = []  # the stop signals that came
meetings: list[Meeting] = []  # with the other machines, while there is one


def note_stop(signum: int, frame: Any) -> None:
    """Where there are no workers: between two starts, or after the last."""
    stops.append(signum)


def on_stop(handler: Any) -> None:
    for name in stopping.STOP_SIGNALS:
        signal.signal(name, handler)


def obey_once(reports: Path) -> None:
    """Let torchrun obey the first stop signal only: at a second one it would leave workers behind that still save. And
    end this process where Python does not get to obey it, because torch waits in C++: for a store, say."""
    if not hasattr(api, '_terminate_process_handler'):
        raise RuntimeError(f'torch {torch.__version__} has no _terminate_process_handler: update launch/launcher.py')
    (reports / 'outcome').write_text(str(errors.EXIT_STOPPED))
    came, (signals, wakeup) = stops, socket.socketpair()

    def stop_once(signum: int, frame: Any) -> None:
        on_stop(signal.SIG_IGN)
        came.append(signum)  # no Event: its lock would wait for itself if a second signal comes while it is set
        raise SignalException(f'got signal {signum}', signal.Signals(signum))

    def watch() -> None:
        signals.recv(1)
        time.sleep(DEAF)
        if not came:
            code = int((reports / 'outcome').read_text())
            for meeting in meetings:  # the others hear of it
                meeting.mine = replace(meeting.mine, code=code)
                time.sleep(1)
            os._exit(code)

    api._terminate_process_handler = stop_once
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.detach())
    threading.Thread(target=watch, daemon=True).start()


def run_workers(arguments: list[str], reports: Path) -> End:
    """torchrun with these arguments, to the end of its workers, also to that which a signal asks for."""
    from torch.distributed.run import main as torchrun

    for old in (*reports.glob('failed_*'), reports / 'give_up'):
        old.unlink(missing_ok=True)
    (reports / 'outcome').write_text(str(errors.EXIT_STOPPED))  # until a worker begins there is nothing to lose
    try:
        try:
            on_stop(api._terminate_process_handler)  # torchrun does it once it has workers
            if stops:
                return End(errors.EXIT_STOPPED)
            torchrun(arguments)
        finally:
            on_stop(note_stop)
    except SignalException:
        return outcome_of_stop(reports)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        order, text = min(stopping.causes(codes, reports))
        said = [code for code in codes.values() if code in EXPLAINED_CODES]
        if said:
            told = any(reports.glob('failed_*'))  # else rank 0 has printed it
            return End(said[0], text.partition(' failed first: ')[2] if told else '', order)
        outcome = (reports / 'outcome').read_text()
        if any(-code in stopping.STOP_SIGNALS for code in codes.values()) and outcome == str(errors.EXIT_STOPPED):
            # one was asked to stop before there was anything to save, and the other ranks failed because it was gone
            return End(errors.EXIT_STOPPED)
        return End(1, text, (9, 0.0) if (reports / 'give_up').exists() else order)  # as another machine has ended
    except Exception as error:  # of torchrun itself, which did not reach its store on machine 0, say
        if isinstance(error.__context__, SignalException):  # an error of torchrun's own while it obeyed a stop signal
            return outcome_of_stop(reports)
        return End(1, f'torchrun failed: {type(error).__name__}: {error}')
    if (reports / 'outcome').read_text() == str(errors.EXIT_STOPPED):  # as it was before: no worker told of an end
        script = next((word for word in arguments if word.endswith('.py')), 'the script')
        return End(0, f'{script} ended without a run: it has to call main(), see the first example of README.md')
    return End(0)


def outcome_of_stop(reports: Path) -> End:
    """How the workers ended after they were asked to stop; says what kept them from saving."""
    outcome = int((reports / 'outcome').read_text())
    if outcome == 1 and any(reports.glob('failed_*')):
        order, text = min(stopping.causes({}, reports))
        return End(1, text, order)
    if outcome == 1:
        text = 'it did not stop in the time that torchrun gives, and was cut off'
        return End(errors.EXIT_STOPPED, text + ': the same command goes on from the last save')
    return End(outcome)
