"""On which machines a run takes place, and which of them this one is.

    NNODES=2 NODE_RANK=1 MASTER_ADDR=host [MASTER_PORT=29500] sh run.sh       on each of two machines
    srun sh run.sh                                                            in a step of any number of nodes and tasks

Otherwise it is this machine alone.
"""

import fcntl
import ipaddress
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


@dataclass(frozen=True)
class Place:
    """This machine among those of the run."""

    machines: int = 1
    rank: int = 0  # of this machine
    first: str = ''  # name or address of machine 0
    port: int = 29500  # of machine 0, where the launchers meet
    tasks: int = 1  # of Slurm's step on this machine: one of them launches, the others wait for it
    task: int = 0  # which of them this is


def whole_number(env: Mapping[str, str], name: str, default: int, least: int = 0, most: int | None = None) -> int:
    """The value of environment variable `name`, or `default`. Raises ValueError if it is out of range."""
    value = env.get(name) or str(default)
    if not value.isdigit() or int(value) < least or (most is not None and int(value) > most):
        limit = f' and at most {most}' if most is not None else ''
        raise ValueError(f'{name}={value!r}: must be a whole number, at least {least}{limit}.')
    return int(value)


def place(env: Mapping[str, str] = os.environ) -> Place:
    """Where the environment variables put this process. Raises ValueError for what they cannot mean."""
    if 'NNODES' in env:
        return by_hand(env)
    if 'SLURM_STEP_ID' in env and 'SLURM_STEP_NODELIST' in env:
        return by_slurm(env)
    nodes = env.get('SLURM_NNODES', '1')
    if nodes != '1':
        text = f'this job has {nodes} nodes, and run.sh was started on one of them: `srun sh run.sh` takes all'
        print(f'run.sh: {text}', file=sys.stderr, flush=True)
    return Place()


def several(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment variables mean several machines. It does not judge them: `place` does."""
    return env.get('NNODES', env.get('SLURM_STEP_NUM_NODES', '1')) != '1'


def by_hand(env: Mapping[str, str]) -> Place:
    machines = whole_number(env, 'NNODES', 1, 1)
    if machines == 1:
        return Place()
    if not env.get('NODE_RANK') or not env.get('MASTER_ADDR'):
        raise ValueError(
            f'NNODES={machines}: each machine needs NODE_RANK, its number from 0 to {machines - 1}, and MASTER_ADDR, '
            'the name or address of machine 0 as the others know it.'
        )
    rank = whole_number(env, 'NODE_RANK', 0, 0, machines - 1)
    return Place(machines, rank, env['MASTER_ADDR'], whole_number(env, 'MASTER_PORT', 29500, 1, 65535))


def by_slurm(env: Mapping[str, str]) -> Place:
    """The Place of this Slurm task."""
    machines, rank = int(env['SLURM_STEP_NUM_NODES']), int(env['SLURM_NODEID'])
    job = int(env['SLURM_JOB_ID']) * 7 + int(env['SLURM_STEP_ID']) % 7  # two jobs that share a node need two ports
    return Place(
        machines,
        rank,
        first_host(env['SLURM_STEP_NODELIST']) if machines > 1 else '',
        whole_number(env, 'MASTER_PORT', 20000 + job % 10000, 1, 65535),
        tasks_per_node(env['SLURM_STEP_TASKS_PER_NODE'])[rank],
        int(env['SLURM_LOCALID']),
    )


def first_host(nodes: str) -> str:
    """The first of a list of hosts as Slurm writes it: a003 of 'a[003-005,7],b'."""
    return re.sub(r'\[(\w+)[^]]*\]', r'\1', nodes).split(',')[0]


def tasks_per_node(counts: str) -> list[int]:
    """Number of tasks on each node, as Slurm writes it: [2, 2, 1] of '2(x2),1'."""
    found = re.findall(r'(\d+)(?:\(x(\d+)\))?', counts)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def address_of(host: str) -> str:
    """The address of machine 0, seen from another machine. Raises ValueError if it has none, or this machine's own."""
    try:
        address = socket.gethostbyname(host)  # IPv4
    except OSError as error:
        raise ValueError(
            f'MASTER_ADDR={host!r}: this machine does not know that name ({error.strerror}). '
            'Pass the IP address of machine 0: `ip addr` there shows it.'
        ) from None
    if address.startswith('127.') and host not in (address, 'localhost'):
        raise ValueError(
            f'MASTER_ADDR={host!r}: on this machine, {socket.gethostname()}, that name means the machine itself '
            f'({address} in /etc/hosts). Pass the IP address of machine 0: `ip addr` there shows it.'
        )
    return address


def interface_with(address: str) -> str | None:
    """The network interface of this machine that has this IPv4 address; None if it cannot be told, as on macOS."""
    if not sys.platform.startswith('linux') or ipaddress.ip_address(address).version != 4:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack('256s', name.encode())
            try:
                answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def use_interface(address: str) -> None:
    """Have gloo and NCCL use the interface of this address of ours, unless the user chose one."""
    name = interface_with(address)
    if name is not None:
        os.environ.setdefault('GLOO_SOCKET_IFNAME', name)
        os.environ.setdefault('NCCL_SOCKET_IFNAME', f'={name}')  # exactly this one: eth1 would also mean eth10


def in_one_task(here: Place, launch: Callable[[], int]) -> int:
    """The exit code of `launch()`, which the first of Slurm's tasks on this machine calls; the others wait for it."""
    if here.tasks == 1:
        return launch()
    name = '\0run.sh {SLURM_JOB_ID}.{SLURM_STEP_ID}'.format(**os.environ)  # a Unix socket of Linux, without a file
    with socket.socket(socket.AF_UNIX) as meeting:
        if here.task > 0:
            return code_of_first_task(meeting, name)
        text = f'{here.tasks} tasks on {socket.gethostname()}: the first starts all processes, the others wait for it'
        print(f'run.sh: {text}', file=sys.stderr, flush=True)
        meeting.bind(name)
        meeting.listen(here.tasks)
        code = launch()
        meeting.settimeout(60)  # for tasks that have not got there yet
        try:
            for _ in range(here.tasks - 1):
                with meeting.accept()[0] as other:
                    other.sendall(str(code).encode())
        except OSError:
            pass  # a task that is gone
        return code


def code_of_first_task(meeting: socket.socket, name: str, seconds: int = 600) -> int:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # Slurm tells all tasks, and the first one obeys
    for _ in range(seconds):
        try:
            meeting.connect(name)
            return int(meeting.recv(10) or 1)  # nothing, if it was killed
        except ConnectionRefusedError:  # it has not got there yet
            time.sleep(1)
        except OSError:
            return 1
    print(f'run.sh: the first task on this machine has not started in {seconds} s', file=sys.stderr, flush=True)
    return 1
