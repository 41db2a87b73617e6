"""The machines of a run, and which of them this one is.

    NNODES=2 NODE_RANK=1 MASTER_ADDR=host [MASTER_PORT=29500] sh run.sh       on each of two machines
    srun sh run.sh                                                            in a step of any number of nodes

Otherwise the run is on this machine only.
"""

import fcntl
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import SettingError

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


@dataclass(frozen=True)
class Place:
    """This machine's place among the machines of the run."""

    machines: int = 1
    rank: int = 0  # this machine's number
    first: str = ''  # name or address of machine 0
    port: int = 29500  # port of machine 0 where the launchers meet


def whole_number(
    name: str, default: int, least: int = 0, most: int | None = None, env: Mapping[str, str] = os.environ
) -> int:
    """The value of environment variable `name`, or `default`. Raises SettingError if it is out of range."""
    value = env.get(name) or str(default)
    if not value.isdigit() or int(value) < least or (most is not None and int(value) > most):
        limit = f' and at most {most}' if most is not None else ''
        raise SettingError(f'{name}={value!r}: must be a whole number, at least {least}{limit}.')
    return int(value)


def several(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment variables mean several machines. `place` checks them, this does not."""
    return (env.get('NNODES') or env.get('SLURM_STEP_NUM_NODES', '1')) != '1'


def warn_if_single(env: Mapping[str, str] = os.environ) -> None:
    """Print that the run uses only this machine if the cluster's variables suggest several."""
    if not {'NNODES', 'SLURM_STEP_ID', 'TORCHRUN_ARGS'} & env.keys():
        for name, how in (('SLURM_NNODES', '`srun sh run.sh` takes all'), ('WORLD_SIZE', 'set NNODES for several')):
            if env.get(name, '1') != '1':
                say(f'this run sees 1 machine, though {name}={env[name]}; {how} (docs/cluster.md)')


def place(env: Mapping[str, str] = os.environ) -> Place:
    """The Place that the environment variables give this process. Raises SettingError for invalid ones."""
    if not env.get('NNODES') and {'SLURM_STEP_ID', 'SLURM_STEP_NODELIST'} <= env.keys():
        if set(re.sub(r'\(x\d+\)', '', env['SLURM_STEP_TASKS_PER_NODE']).split(',')) != {'1'}:  # as 2(x3),1
            text = 'srun started run.sh several times on one node'
            raise SettingError(f'{text}. Use --ntasks-per-node=1 --gpus-per-node=N.')
        job = int(env['SLURM_JOB_ID']) * 7 + int(env['SLURM_STEP_ID']) % 7  # two jobs that share a node need two ports
        env = {
            'MASTER_PORT': str(20000 + job % 10000),
            **env,
            'NNODES': env['SLURM_STEP_NUM_NODES'],
            'NODE_RANK': env['SLURM_NODEID'],
            'MASTER_ADDR': re.sub(r'\[(\w+)[^]]*\]', r'\1', env['SLURM_STEP_NODELIST']).split(',')[0],  # as a[003-5],b
        }
    machines = whole_number('NNODES', 1, 1, env=env)
    if machines == 1:
        return Place()
    if not env.get('NODE_RANK') or not env.get('MASTER_ADDR'):
        raise SettingError(
            f'NNODES={machines}: each machine needs NODE_RANK, its number from 0 to {machines - 1}, and MASTER_ADDR, '
            'the name or address of machine 0 as the others know it.'
        )
    rank = whole_number('NODE_RANK', 0, 0, machines - 1, env)
    return Place(machines, rank, env['MASTER_ADDR'], whole_number('MASTER_PORT', 29500, 1, 65535, env))


def address_of(host: str) -> str:
    """The address of machine 0, seen from another one. Raises SettingError if it is unknown or means this machine."""
    remedy = 'Pass the IP address of machine 0: `ip addr` there shows it.'
    try:
        address = socket.gethostbyname(host)  # IPv4
    except OSError as error:
        why = f'this machine does not know that name ({error.strerror})'
        raise SettingError(f'MASTER_ADDR={host!r}: {why}. {remedy}') from None
    if address.startswith('127.') and host not in (address, 'localhost'):
        why = f'on this machine, {socket.gethostname()}, that name means the machine itself ({address} in /etc/hosts)'
        raise SettingError(f'MASTER_ADDR={host!r}: {why}. {remedy}')
    return address


def use_interface(address: str) -> None:
    """Have gloo and NCCL use our interface with this IPv4 address, unless the user chose one. Linux only."""
    if not sys.platform.startswith('linux'):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack('256s', name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                os.environ.setdefault('GLOO_SOCKET_IFNAME', name)
                os.environ.setdefault('NCCL_SOCKET_IFNAME', f'={name}')  # exactly this one: eth1 would also mean eth10


def check_loopback() -> None:
    """Raise SettingError if this machine cannot reach itself: torchrun's processes would wait for minutes."""
    try:
        with socket.create_server(('127.0.0.1', 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        text = f'this machine cannot reach itself at 127.0.0.1 ({error.strerror}). Run: ip link set lo up'
        raise SettingError(text) from None


def explain(error: OSError) -> str:
    """The most likely cause of a failed connection."""
    if isinstance(error, ConnectionRefusedError):
        return 'nothing listens there: it is not started yet, has another MASTER_PORT, or is not machine 0'
    if isinstance(error, TimeoutError):
        return 'no answer: the machine is off, or a firewall blocks the port'
    return str(error)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('', 0))
        return probe.getsockname()[1]


def say(text: str) -> None:
    print(f'run.sh: {text}', file=sys.stderr, flush=True)
