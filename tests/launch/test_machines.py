"""Which of several machines this one is, from environment variables. test_rows.py tests how machines meet."""

import os
import socket
import subprocess
import sys

import pytest

from launch import launcher, machines
from launch.machines import Place, whole_number
from launch.start import start
from runtime import errors, stopping
from runtime.errors import SettingError
from tests.helpers import ROOT

STEP = dict(
    SLURM_JOB_ID='41',
    SLURM_STEP_ID='0',
    SLURM_STEP_NODELIST='a[003-005,7],b1',
    SLURM_STEP_NUM_NODES='5',
    SLURM_STEP_TASKS_PER_NODE='1(x3),1,1',
    SLURM_NODEID='4',
)


# ---------------------------------------------------------------- which machine this is


@pytest.mark.parametrize(
    'env, place',
    [
        ({}, Place()),
        ({'NNODES': '1', 'NODE_RANK': '7'}, Place()),
        ({'NODE_RANK': '1', 'MASTER_ADDR': 'h1'}, Place()),  # left over from other programs
        ({'NNODES': '2', 'NODE_RANK': '1', 'MASTER_ADDR': 'h1'}, Place(2, 1, 'h1', 29500)),
        ({'NNODES': '3', 'NODE_RANK': '0', 'MASTER_ADDR': 'h1', 'MASTER_PORT': '81'} | STEP, Place(3, 0, 'h1', 81)),
        (STEP, Place(5, 4, 'a003', 20000 + 41 * 7)),
        (STEP | {'MASTER_PORT': '5000', 'SLURM_NODEID': '2'}, Place(5, 2, 'a003', 5000)),
        (dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='h1', MASTER_PORT=''), Place(2, 1, 'h1', 29500)),  # set but empty
        ({'SLURM_JOB_ID': '41', 'SLURM_NNODES': '1', 'SLURM_NODEID': '0'}, Place()),  # a batch script, without srun
    ],
)
def test_the_place_of_a_machine(env, place):
    assert machines.place(env) == place
    assert machines.several(env) == (place.machines > 1)


def test_a_wrong_flag_waits_for_the_meeting_of_several_machines(monkeypatch):
    """A launcher that ends before it meets the others would leave them waiting for it."""
    monkeypatch.setattr(sys, 'argv', [])
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    monkeypatch.setattr(sys, 'stderr', sys.stderr)
    monkeypatch.setattr(launcher, 'launch', lambda argv, module: argv)
    monkeypatch.delenv('SLURM_STEP_NUM_NODES', raising=False)
    monkeypatch.setenv('NNODES', '2')
    assert start('main.py', '--base_lr', 'x') == ['main.py', '--base_lr', 'x']
    monkeypatch.setenv('NNODES', '1')
    with pytest.raises(SystemExit) as error:
        start('main.py', '--base_lr', 'x')
    assert error.value.code == errors.EXIT_BAD_SETTING


def test_two_steps_that_share_a_node_meet_at_two_ports():
    def port(job, step):
        return machines.place(STEP | dict(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))).port

    ports = {port(job, step) for job in range(1000, 1100) for step in range(7)}
    assert len(ports) == 700 and min(ports) >= 20000 and max(ports) < 30000
    assert not {port(1000, step) for step in range(50)} & {port(1001, step) for step in range(50)}  # two jobs differ


@pytest.mark.parametrize(
    'env, words',
    [
        ({'NNODES': '2'}, ('NNODES=2', 'NODE_RANK', 'from 0 to 1', 'MASTER_ADDR')),
        ({'NNODES': '2', 'NODE_RANK': '1'}, ('NNODES=2', 'MASTER_ADDR')),
        ({'NNODES': '2', 'MASTER_ADDR': 'h1'}, ('NNODES=2', 'NODE_RANK')),
        ({'NNODES': 'two'}, ("NNODES='two'", 'whole number')),
        ({'NNODES': '2', 'NODE_RANK': '2', 'MASTER_ADDR': 'h1'}, ("NODE_RANK='2'", 'at most 1')),
        ({'NNODES': '2', 'NODE_RANK': '0', 'MASTER_ADDR': 'h1', 'MASTER_PORT': '65536'}, ("MASTER_PORT='65536'",)),
        ({'NNODES': '2', 'NODE_RANK': '0', 'MASTER_ADDR': 'h1', 'MASTER_PORT': '0'}, ("MASTER_PORT='0'", 'least 1')),
    ],
)
def test_variables_that_make_no_sense_are_named(env, words):
    with pytest.raises(SettingError) as error:
        machines.place(env)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('counts', ['2', '2(x2)', '1(x2),2', '12'])
def test_several_tasks_of_a_node_are_refused(counts):
    """Each would start processes for all GPUs of its node."""
    with pytest.raises(SettingError, match=r'srun started run\.sh several times on one node\. Use --ntasks-per-node=1'):
        machines.place(STEP | {'SLURM_STEP_TASKS_PER_NODE': counts})


@pytest.mark.parametrize(
    ('env', 'warning'),
    [
        (
            {'SLURM_JOB_ID': '1', 'SLURM_NNODES': '2'},
            'though SLURM_NNODES=2; `srun sh run.sh` takes',
        ),
        ({'WORLD_SIZE': '4', 'RANK': '0'}, 'this run sees 1 machine, though WORLD_SIZE=4; set NNODES for several'),
        ({'WORLD_SIZE': '1', 'SLURM_NNODES': '1'}, ''),
        ({'WORLD_SIZE': '4', 'NNODES': '4'}, ''),
        ({'WORLD_SIZE': '4', 'TORCHRUN_ARGS': '--nnodes 4'}, ''),
        (STEP | {'SLURM_NNODES': '8'}, ''),
    ],
)
def test_a_run_of_one_machine_warns_if_several_may_be_meant(env, warning, capsys):
    machines.warn_if_single(env)
    err = capsys.readouterr().err
    assert warning in err and bool(err) == bool(warning)


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('n1', 'n1'),
        ('n1,n2', 'n1'),
        ('node[1-2]', 'node1'),
        ('a[003-005,7],b', 'a003'),
        ('r[1-2]n[04,06-9]-ib', 'r1n04-ib'),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert machines.place(STEP | {'SLURM_STEP_NODELIST': nodes}).first == first


def test_a_name_that_is_unknown_or_this_machine_itself_is_an_error(monkeypatch):
    with pytest.raises(SettingError, match=r"MASTER_ADDR='no\.such\.host\.invalid'.*does not know that name.*ip addr"):
        machines.address_of('no.such.host.invalid')
    monkeypatch.setattr(socket, 'gethostbyname', lambda host: '127.0.1.1')
    with pytest.raises(SettingError, match=r"MASTER_ADDR='h1'.*means the machine itself \(127\.0\.1\.1"):
        machines.address_of('h1')
    assert machines.address_of('127.0.1.1') == '127.0.1.1'  # the user wrote this address


def test_localhost_is_accepted_and_a_name_for_it_is_not(monkeypatch):
    monkeypatch.setattr(socket, 'gethostbyname', lambda host: '127.0.0.1')
    assert machines.address_of('localhost') == '127.0.0.1'
    with pytest.raises(SettingError, match='means the machine itself'):
        machines.address_of('h1')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='uses an ioctl of Linux')
def test_the_interface_of_an_address_is_used_unless_the_user_chose_one(monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'ib0')
    monkeypatch.delenv('NCCL_SOCKET_IFNAME', raising=False)
    real = socket.if_nameindex()
    monkeypatch.setattr(socket, 'if_nameindex', lambda: [(99, 'nosuch0'), *real])  # like an interface without address
    machines.use_interface('203.0.113.7')
    assert 'NCCL_SOCKET_IFNAME' not in os.environ
    machines.use_interface('127.0.0.1')
    assert os.environ['GLOO_SOCKET_IFNAME'] == 'ib0' and os.environ['NCCL_SOCKET_IFNAME'] == '=lo'


def test_a_machine_that_cannot_reach_itself_is_refused(monkeypatch):
    """torchrun would wait for eleven minutes without a message."""
    machines.check_loopback()

    def refused(*_, **__):
        raise OSError(101, 'Network is unreachable')

    monkeypatch.setattr(socket, 'create_connection', refused)
    with pytest.raises(SettingError, match=r'cannot reach itself at 127\.0\.0\.1'):
        machines.check_loopback()


def test_no_answer_and_a_refused_connection_are_explained_differently():
    assert machines.explain(TimeoutError()).startswith('no answer: ')
    assert machines.explain(ConnectionRefusedError()).startswith('nothing listens there: ')


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv('NPROC', '5')
    with pytest.raises(SettingError, match=r"NPROC='5'.*at most 4"):
        whole_number('NPROC', 4, 1, 4)


def test_restarts_and_torchrun_args_of_several_machines_exclude_each_other(monkeypatch, capsys):
    monkeypatch.setattr(os, 'setsid', lambda: None)
    monkeypatch.setenv('TORCHRUN_ARGS', '--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h1:29500')
    monkeypatch.setenv('MAX_RESTARTS', '2')
    assert launcher.launch(['main.py']) == errors.EXIT_BAD_SETTING
    err = capsys.readouterr().err
    assert 'MAX_RESTARTS=2' in err and 'NNODES' in err and '--max-restarts' in err


@pytest.mark.slow
def test_a_machine_on_which_only_the_flags_are_wrong_is_named(tmp_path):
    """Its code may be older. Machine 0 prints no error then, so the launcher there must learn the cause."""
    env = os.environ | dict(RANK='2', LOCAL_RANK='0', RUN_REPORTS=str(tmp_path))
    command = [sys.executable, 'main.py', '--no_such_flag', '3']
    assert subprocess.run(command, env=env, cwd=ROOT, capture_output=True).returncode == 2
    ((_, text),) = stopping.causes({}, tmp_path)
    assert text.startswith('rank 2') and 'no_such_flag' in text
