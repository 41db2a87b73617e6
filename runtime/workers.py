"""Loader processes: how many there may be, which signals they ignore, and that they end with the training process."""

import multiprocessing
import os
import signal
import threading

from runtime import stopping


def ignore_signals_except_from_parent(worker: int) -> None:
    """In a loader process: ignore stop signals that are sent to all processes, for example by Slurm or Ctrl-C.

    They are meant for the training process, which still reads data and saves. A SIGTERM from the parent counts:
    multiprocessing sends it at exit and then waits for the process without a time limit.
    """
    for name in set(stopping.STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(name, signal.SIG_IGN)
    if hasattr(signal, 'sigtimedwait'):  # it tells who sent a signal; on macOS, which lacks it, any SIGTERM counts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process()  # getppid() is another number if it is gone already
        assert parent is not None
        threading.Thread(target=exit_with_parent, args=(parent.pid,), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """End this process when process `parent` sends it SIGTERM, or within a second of the parent's end."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 0.5)
        if received and received.si_pid == parent:
            break
    os._exit(0)


def cores_per_process() -> int:
    """CPU cores for each of this machine's training processes, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
