"""The launcher: torchrun with one process per GPU, or one on a CPU machine, and the cause when workers fail.

NPROC: processes on this machine. TORCHRUN_ARGS: flags of torchrun, in place of the flags that this file would pass.
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
from launch.rows import PATIENCE, End, Incomplete, Meeting, run_outcome
from runtime import errors, stopping

EXPLAINED_CODES = (errors.EXIT_BAD_SETTING, errors.EXIT_NOT_FINITE, errors.EXIT_STOPPED)  # a worker printed the cause
STORE_WAIT = 120  # seconds to reach torchrun's store on machine 0; the launchers have met by then
SIGNAL_WAIT = 10  # seconds for Python to handle a stop signal; it cannot while torch waits in C++


def launch(argv: list[str], module: str | None = None) -> int:
    """Run torchrun on `argv` (a script and its flags), as `module` if that is given; returns an exit code."""
    if os.getpgrp() != os.getpid():
        os.setsid()  # so that Ctrl-C reaches only run.sh, which forwards it once
    stopping.end_with_parent()
    try:
        machines.check_loopback()
        here, gpus = machines.place(), torch.cuda.device_count()
        nproc = whole_number('NPROC', max(1, gpus), 1, gpus or None)
        wait, restarts = whole_number('NODE_WAIT', 600, 1), whole_number('MAX_RESTARTS', 0)
        given = shlex.split(os.environ.get('TORCHRUN_ARGS', ''))
        if restarts and any('nnodes' in flag for flag in given):
            why = 'launchers that meet by TORCHRUN_ARGS cannot agree when to restart'
            raise errors.SettingError(f'MAX_RESTARTS={restarts}: {why}. Use NNODES, or --max-restarts in it.')
    except errors.SettingError as error:
        print(error, file=sys.stderr)
        return errors.EXIT_BAD_SETTING
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // nproc)))  # torchrun would set 1
    # otherwise waiting threads spin so long that two programs on the same cores stall each other
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    os.environ['RUN_PARENT'] = str(os.getpid())
    if 'MASTER_PORT' in os.environ:  # torchrun sets another one for the workers
        os.environ['RUN_PORT'] = os.environ['MASTER_PORT']
    logging.disable(logging.CRITICAL)  # torchrun would report each worker's end again; the cause is printed below
    with tempfile.TemporaryDirectory(prefix='reports') as folder:
        os.environ['RUN_REPORTS'] = folder
        if '--check' in argv:
            os.environ['TMPDIR'] = folder  # torch and others leave caches there
        arguments = [f'--nproc-per-node={nproc}', f'--log-dir={folder}', *(['--module'] if module else [])]
        # after --: torchrun would take our flag for one of its own with the same beginning
        arguments += ['--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1', '--', module or argv[0], *argv[1:]]
        obey_once(Path(folder))
        code = 1
        standalone = ['--standalone', '--local-addr=127.0.0.1']  # this machine, whatever its name
        for restart in range(restarts + 1):
            if restart:
                say(f'starting again from the last checkpoint ({restart} of {restarts} restarts)')
            try:
                if here.machines > 1 and not given:
                    code, text = launch_on_all(here, wait, arguments, Path(folder))
                else:
                    end = run_workers([*(given or standalone), *arguments], Path(folder))
                    code, text = end.code or 0, end.text
                nothing_ran = False
            except Incomplete as error:
                code, text, nothing_ran = 1, str(error), not restart
            if text:  # the cause, without the prefix of `say`
                print(text, file=sys.stderr, flush=True)
            if code in (0, *EXPLAINED_CODES) or nothing_ran:
                break
        return code


def launch_on_all(here: Place, wait: int, arguments: list[str], report_dir: Path) -> tuple[int, str]:
    """Run torchrun with these arguments on all machines at the same time. Returns the exit code that they agree on, and
    the cause, if there is one to print. Raises Incomplete."""
    meeting, end, was_stopped = None, End(errors.EXIT_STOPPED), bool(stops)
    try:
        on_stop(api._terminate_process_handler)  # as torchrun does once it has workers
        meeting = Meeting(here, report_dir, wait)
        meetings[:] = [meeting]
        if not was_stopped and meeting.gather():
            say(f"machine {here.rank}: all {here.machines} machines are here; machine 0 prints the run's output")
            first = meeting.mine.first or meeting.rows[1].first
            machines.use_interface(meeting.my_address or first)
            flags = [f'--nnodes={here.machines}', f'--node-rank={here.rank}', f'--master-addr={first}']
            flags += [f'--master-port={meeting.rows[0].port}', f'--rdzv-conf=timeout={STORE_WAIT}']
            end = run_workers([*flags, *arguments], report_dir)
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
            meeting.announce_end(end, PATIENCE if was_stopped else 0)
        on_stop(note_stop)  # the code is decided: srun may end all tasks once the first has exited with it
        code, cause, text = run_outcome(meeting.judged())
        meeting.close()
    if code == end.code == errors.EXIT_STOPPED:
        return code, ''
    return code, end.text if code == 0 or cause == here.rank else text


stops: list[int] = []  # stop signals received so far
meetings: list[Meeting] = []  # the current meeting with the other machines, if there is one


def note_stop(signum: int, frame: Any) -> None:
    """The signal handler while there are no workers: between two starts, or after the last."""
    stops.append(signum)


def on_stop(handler: Any) -> None:
    for name in stopping.STOP_SIGNALS:
        signal.signal(name, handler)


def obey_once(report_dir: Path) -> None:
    """Let torchrun handle only the first stop signal: at a second one it would leave workers behind that still save.
    Also end this process if Python cannot handle the signal because torch waits in C++, for a store for example."""
    if not hasattr(api, '_terminate_process_handler'):
        raise RuntimeError(f'torch {torch.__version__} has no _terminate_process_handler: update launch/launcher.py')
    (report_dir / 'outcome').write_text(str(errors.EXIT_STOPPED))
    received, (signals, wakeup) = stops, socket.socketpair()

    def stop_once(signum: int, frame: Any) -> None:
        on_stop(signal.SIG_IGN)
        received.append(signum)  # not an Event: a second signal while it is being set would deadlock on its lock
        raise SignalException(f'got signal {signum}', signal.Signals(signum))

    def watch() -> None:
        signals.recv(1)
        time.sleep(SIGNAL_WAIT)
        if not received:
            code = int((report_dir / 'outcome').read_text())
            for meeting in meetings:  # so that the other machines learn the code
                meeting.mine = replace(meeting.mine, code=code)
                time.sleep(1)
            os._exit(code)

    api._terminate_process_handler = stop_once
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.detach())
    threading.Thread(target=watch, daemon=True).start()


def run_workers(arguments: list[str], report_dir: Path) -> End:
    """Run torchrun with these arguments until its workers have ended, also after a stop signal."""
    from torch.distributed.run import main as torchrun

    for old in (*report_dir.glob('failed_*'), report_dir / 'give_up'):
        old.unlink(missing_ok=True)
    (report_dir / 'outcome').write_text(str(errors.EXIT_STOPPED))  # until a worker begins there is nothing to save
    try:
        try:
            on_stop(api._terminate_process_handler)  # torchrun does it once it has workers
            if stops:
                return End(errors.EXIT_STOPPED)
            torchrun(arguments)
        finally:
            on_stop(note_stop)
    except SignalException:
        return outcome_of_stop(report_dir)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        order, text = min(stopping.causes(codes, report_dir))
        explained = [code for code in codes.values() if code in EXPLAINED_CODES]
        if explained:
            is_reported = any(report_dir.glob('failed_*'))  # else rank 0 has printed it
            return End(explained[0], text.partition(' failed first: ')[2] if is_reported else '', order)
        outcome = (report_dir / 'outcome').read_text()
        if any(-code in stopping.STOP_SIGNALS for code in codes.values()) and outcome == str(errors.EXIT_STOPPED):
            # one was asked to stop before there was anything to save, and the other ranks failed because it was gone
            return End(errors.EXIT_STOPPED)
        return End(1, text, (9, 0.0) if (report_dir / 'give_up').exists() else order)  # another machine is the cause
    except Exception as error:  # torchrun itself failed, for example to reach its store on machine 0
        if isinstance(error.__context__, SignalException):  # an error of torchrun's own while it obeyed a stop signal
            return outcome_of_stop(report_dir)
        return End(1, f'torchrun failed: {type(error).__name__}: {error}')
    if (report_dir / 'outcome').read_text() == str(errors.EXIT_STOPPED):  # unchanged: no worker wrote an outcome
        script = next((word for word in arguments if word.endswith('.py')), 'the script')
        return End(0, f'{script} ended without a run: it has to call main(), see the first example in README.md')
    return End(0)


def outcome_of_stop(report_dir: Path) -> End:
    """The End of workers that were asked to stop; its text explains why they could not save."""
    outcome = int((report_dir / 'outcome').read_text())
    if outcome == 1 and any(report_dir.glob('failed_*')):
        order, text = min(stopping.causes({}, report_dir))
        return End(1, text, order)
    if outcome == 1:
        text = 'it did not stop in the time that torchrun gives, and was cut off'
        return End(errors.EXIT_STOPPED, text + ': the same command resumes from the last save')
    return End(outcome)
