"""Several machines without any: who is who by environment variables, and launchers that meet on this one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch import launcher, machines, meeting
from launch.machines import Place
from launch.meeting import Alone, Meeting, Refused, Row, Table, verdict
from launch.start import start
from runtime import errors, stopping
from tests.helpers import ROOT, wait_until

STEP = dict(
    SLURM_JOB_ID='41',
    SLURM_STEP_ID='0',
    SLURM_STEP_NODELIST='a[003-005,7],b1',
    SLURM_STEP_NUM_NODES='5',
    SLURM_STEP_TASKS_PER_NODE='2(x3),1,4',
    SLURM_NODEID='4',
    SLURM_LOCALID='3',
)


# ---------------------------------------------------------------- who is who


@pytest.mark.parametrize(
    'env, place',
    [
        ({}, Place()),
        ({'NNODES': '1', 'NODE_RANK': '7'}, Place()),
        ({'NODE_RANK': '1', 'MASTER_ADDR': 'h1'}, Place()),  # left by other programs
        ({'NNODES': '2', 'NODE_RANK': '1', 'MASTER_ADDR': 'h1'}, Place(2, 1, 'h1', 29500)),
        ({'NNODES': '3', 'NODE_RANK': '0', 'MASTER_ADDR': 'h1', 'MASTER_PORT': '81'} | STEP, Place(3, 0, 'h1', 81)),
        (STEP, Place(5, 4, 'a003', 20000 + 41 * 7, tasks=4, task=3)),
        (STEP | {'MASTER_PORT': '5000', 'SLURM_NODEID': '2'}, Place(5, 2, 'a003', 5000, tasks=2, task=3)),
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
    ports = {
        machines.place(STEP | dict(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))).port
        for job in range(1000, 1100)
        for step in range(7)
    }
    assert len(ports) == 700 and min(ports) >= 20000 and max(ports) < 30000


@pytest.mark.parametrize(
    'env, words',
    [
        ({'NNODES': '2'}, ('NNODES=2', 'NODE_RANK', 'from 0 to 1', 'MASTER_ADDR')),
        ({'NNODES': 'two'}, ("NNODES='two'", 'whole number')),
        ({'NNODES': '2', 'NODE_RANK': '2', 'MASTER_ADDR': 'h1'}, ("NODE_RANK='2'", 'at most 1')),
        ({'NNODES': '2', 'NODE_RANK': '0', 'MASTER_ADDR': 'h1', 'MASTER_PORT': '70000'}, ("MASTER_PORT='70000'",)),
    ],
)
def test_variables_that_make_no_sense_are_named(env, words):
    with pytest.raises(ValueError) as error:
        machines.place(env)
    assert all(word in str(error.value) for word in words)


def test_a_job_of_two_nodes_that_uses_one_says_so(capsys):
    assert machines.place({'SLURM_JOB_ID': '1', 'SLURM_NNODES': '2'}) == Place()
    assert 'this job has 2 nodes' in capsys.readouterr().err


@pytest.mark.parametrize(
    'nodes, first',
    [
        ('n1', 'n1'),
        ('n1,n2', 'n1'),
        ('node[1-2]', 'node1'),
        ('a[003-005,7],b', 'a003'),
        ('r[1-2]n[04,06-9]-ib', 'r1n04-ib'),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert machines.first_host(nodes) == first


def test_a_name_that_is_unknown_or_this_machine_itself_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"MASTER_ADDR='no\.such\.host\.invalid'.*does not know that name.*ip addr"):
        machines.address_of('no.such.host.invalid')
    monkeypatch.setattr(socket, 'gethostbyname', lambda host: '127.0.1.1')
    with pytest.raises(ValueError, match=r"MASTER_ADDR='h1'.*means the machine itself \(127\.0\.1\.1"):
        machines.address_of('h1')
    assert machines.address_of('127.0.1.1') == '127.0.1.1'  # what was asked for


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='by an ioctl of Linux')
def test_the_interface_of_an_address_is_used_unless_the_user_chose_one(monkeypatch):
    assert machines.interface_with('127.0.0.1') == 'lo' and machines.interface_with('203.0.113.7') is None
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'ib0')
    monkeypatch.delenv('NCCL_SOCKET_IFNAME', raising=False)
    machines.use_interface('127.0.0.1')
    assert os.environ['GLOO_SOCKET_IFNAME'] == 'ib0' and os.environ['NCCL_SOCKET_IFNAME'] == '=lo'


@pytest.mark.parametrize(
    'tasks, gpus, nproc, number',
    [(1, 0, '', 1), (1, 4, '', 4), (4, 0, '', 4), (4, 4, '', 4), (4, 8, '2', 2), (4, 1, '', None), (2, 8, '', None)],
)
def test_processes_are_one_for_each_gpu_or_task(monkeypatch, tasks, gpus, nproc, number):
    """Tasks that do not see all GPUs of their node are refused: all but one GPU would be idle."""
    monkeypatch.setenv('NPROC', nproc)
    if number:
        assert launcher.processes(Place(tasks=tasks), gpus) == number
    else:
        with pytest.raises(ValueError, match=f'{tasks} tasks.*sees {gpus} GPU.*--ntasks-per-node=1'):
            launcher.processes(Place(tasks=tasks), gpus)


def test_restarts_and_torchrun_args_of_several_machines_exclude_each_other(monkeypatch, capsys):
    monkeypatch.setattr(os, 'setsid', lambda: None)
    monkeypatch.setenv('TORCHRUN_ARGS', '--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h1:29500')
    monkeypatch.setenv('MAX_RESTARTS', '2')
    assert launcher.launch(['main.py']) == errors.EXIT_BAD_SETTING
    said = capsys.readouterr().err
    assert 'MAX_RESTARTS=2' in said and 'NNODES' in said and '--max-restarts' in said


# ---------------------------------------------------------------- several tasks of a step on one node


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='Slurm, and its sockets without a file')
@pytest.mark.parametrize('how, code', [('return 75', 75), ('os.kill(os.getpid(), 9)', 1)])
def test_tasks_wait_for_the_first_and_end_with_its_code(how, code):
    """Also those that come late, are asked to stop meanwhile, or see it killed."""
    program = f"""
import os, sys, time
from launch.machines import Place, in_one_task
def launch():
    time.sleep(1.5)
    {how}
sys.exit(in_one_task(Place(tasks=3, task=int(sys.argv[1])), launch))
"""
    env = os.environ | dict(SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_ID=how[:2], PYTHONPATH=str(ROOT))
    tasks = {}
    for task in (1, 0, 2):
        tasks[task] = subprocess.Popen([sys.executable, '-c', program, str(task)], env=env)
        time.sleep(0.4)
    [tasks[1].send_signal(signum) for signum in stopping.STOP_SIGNALS]
    ends = {task: process.wait(timeout=30) for task, process in tasks.items()}
    assert (ends[1], ends[2]) == (code, code) and ends[0] == (75 if code == 75 else -9)


def test_a_machine_whose_flags_alone_are_wrong_says_which(tmp_path):
    """Its code is older, say. Machine 0 has nothing to say of it, so its launcher must hear why."""
    env = os.environ | dict(RANK='2', LOCAL_RANK='0', RUN_REPORTS=str(tmp_path))
    command = [sys.executable, 'main.py', '--no_such_flag', '3']
    assert subprocess.run(command, env=env, cwd=ROOT, capture_output=True).returncode == 2
    ((_, text),) = launcher.causes({}, tmp_path)
    assert text.startswith('rank 2') and 'no_such_flag' in text


# ---------------------------------------------------------------- how it ends is one rule


def row(code=None, text='', order=(9, 0.0), gone='', host='h'):
    return Row(host, code, text, order, gone)


@pytest.mark.parametrize(
    'rows, end',
    [
        ([row(0), row(0)], (0, 0, '')),
        ([row(1, 'b', (1, 5.0)), row(1, 'a', (1, 4.0))], (1, 1, 'machine 1 (h): a')),  # the first error
        ([row(1, 'lost it', (2, 3.0)), row(1, 'killed', (0, 0.0))], (1, 1, 'machine 1 (h): killed')),
        ([row(1, 'lost it', (2, 3.0)), row(gone='left')], (1, 1, 'machine 1 (h) left')),
        ([row(1, 'lost it', (2, 3.0)), row(2, 'base_lr')], (2, 1, 'machine 1 (h): base_lr')),
        ([row(75), row(gone='left')], (75, 0, 'machine 0 (h): it was asked to stop')),
        ([row(3), row(75)], (3, 0, 'machine 0 (h): the loss is not finite')),
        ([row(3), row(2, 'base_lr')], (2, 1, 'machine 1 (h): base_lr')),
    ],
)
def test_what_all_agree_on(rows, end):
    assert verdict(rows) == end


def test_a_lost_connection_is_no_cause(tmp_path):
    """Clocks of two machines differ: what follows from another failure is told by its text, not by its time."""
    texts = ['RuntimeError: [/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer', 'KeyError: broken']
    for rank, text in enumerate(texts):
        (tmp_path / f'failed_{rank}').write_text(json.dumps(dict(time=1.0 + rank, rank=rank, text=text, follows=False)))
    assert min(launcher.causes({0: 1}, tmp_path))[1] == 'rank 1 failed first: KeyError: broken'
    assert [order for order, _ in sorted(launcher.causes({0: 1}, tmp_path))] == [(1, 2.0), (2, 1.0), (3, 0.0)]


# ---------------------------------------------------------------- launchers that meet


@pytest.fixture
def meet(tmp_path, monkeypatch):
    """`meet(rank, machines=2, about={}, wait=20)`: a Meeting at a free port of this machine."""
    monkeypatch.setattr(meeting, 'SAY_FIRST', 1)
    port, made = meeting.free_port(), []

    def start(rank, machines=2, about=None, wait=20, first='127.0.0.1', **changed):
        (tmp_path / str(rank)).mkdir(exist_ok=True)
        place = Place(machines, rank, first, changed.get('port', port))
        made.append(Meeting(place, {'command': 'main.py'} | (about or {}), tmp_path / str(rank), wait))
        return made[-1]

    start.port = port
    yield start
    for each in made:
        each.close()


def both(*calls):
    """The results of functions that are called at the same time, or what they raise."""
    results = [None] * len(calls)

    def call(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    return results


def test_three_meet_in_any_order_and_end_alike(meet, capsys):
    late, second = meet(2, 3), meet(1, 3)
    time.sleep(0.3)
    assert 'nothing listens there' in late.trouble
    first = meet(0, 3)
    assert both(first.gather, second.gather, late.gather) == [True, True, True]
    assert first.table.port == second.table.port == late.table.port > 0
    assert (first.my_address, second.address, second.my_address) == ('127.0.0.1',) * 3
    ends = both(
        lambda: first.settle(1, 'lost it', (2, 1.0)),
        lambda: second.settle(1, 'KeyError', (1, 2.0)),
        lambda: late.settle(0),
    )
    assert {end[:2] for end in ends} == {(1, 1)} and all(end[2].endswith(': KeyError') for end in ends)


def test_who_is_missing_is_said_until_the_time_is_over(meet, capsys):
    first, second = meet(0, 3, wait=3), meet(1, 3, wait=3)
    assert all(isinstance(result, Alone) for result in both(first.gather, second.gather))
    said = capsys.readouterr().err
    assert re.search(rf'waiting for machine 2 of 3 to come to port {meet.port} of machine 0; it ends after 3 s', said)
    with pytest.raises(Alone, match=r'machine 0 at 127\.0\.0\.1:\d+ did not come in 1 s: nothing listens there'):
        meet(1, wait=1, port=meeting.free_port()).gather()


@pytest.mark.parametrize(
    'changed, words',
    [
        (dict(about={'command': 'main.py --base_lr 1'}), ("command: 'main.py'", "'main.py --base_lr 1' on 1")),
        (dict(about={'MAX_RESTARTS': '3'}), ("MAX_RESTARTS: None on machine 0", "'3' on 1")),
        (dict(machines=5, rank=4, about={'NNODES': '5'}), ("'5' on 4",)),
    ],
)  # fmt: skip
def test_machines_that_were_not_started_alike_are_refused_on_all(meet, changed, words):
    first, other = meet(0), meet(**dict(rank=1) | changed)
    errors = both(first.gather, other.gather)
    assert [type(error) for error in errors] == [Refused, Refused]
    assert str(errors[0]) == str(errors[1]) and all(word in str(errors[0]) for word in words)


def test_a_number_given_twice_and_a_port_in_use_are_refused(meet, monkeypatch):
    first, _ = meet(0, 3), meet(1, 3)
    assert wait_until(lambda: first.table.rows[1] is not None, 10)
    monkeypatch.setattr(socket, 'gethostname', lambda: 'another')
    meet(1, 3)
    with pytest.raises(Refused, match=r'NODE_RANK=1 was given on both .* and another'):
        first.gather()
    with pytest.raises(Refused, match=rf'MASTER_PORT={meet.port}: .* another run may use it'):
        meet(0)


def test_a_machine_may_leave_and_come_again_before_the_start(meet):
    first, second = meet(0, 3), meet(1, 3)
    assert wait_until(lambda: first.table.rows[1] is not None, 10)
    second.close()
    assert wait_until(lambda: first.table.rows[1] is None, 10)
    second, third = meet(1, 3), meet(2, 3)
    assert both(first.gather, second.gather, third.gather) == [True] * 3
    assert both(*(lambda each=each: each.settle(0) for each in (first, second, third))) == [(0, 0, '')] * 3


def test_another_start_in_mid_run_is_refused_and_the_run_goes_on(meet, monkeypatch):
    """A second run on the same hosts that was left the usual MASTER_PORT, and one from a host of another name."""
    first, second = meet(0), meet(1)
    assert both(first.gather, second.gather) == [True, True]
    with pytest.raises(Refused, match=r"(?s)'other\.py' on 1 .*A run has begun there.*another MASTER_PORT"):
        meet(1, about={'command': 'other.py'}).gather()
    monkeypatch.setattr(socket, 'gethostname', lambda: 'another')
    with pytest.raises(Refused, match=r'NODE_RANK=1 was given on both .* and another'):
        meet(1).gather()
    assert both(lambda: first.settle(0), lambda: second.settle(0)) == [(0, 0, '')] * 2


def test_a_launcher_whose_thread_has_failed_does_not_wait(meet, monkeypatch):
    monkeypatch.setattr(threading, 'excepthook', lambda failure: None)
    monkeypatch.setattr(Meeting, 'react', lambda self: 1 / 0)
    with pytest.raises(RuntimeError, match='its error is above'):
        meet(0).gather()


def test_strangers_at_the_port_disturb_nobody(meet):
    first = meet(0)
    strangers = [socket.create_connection(('127.0.0.1', meet.port)) for _ in range(5)]
    strangers[2].sendall(b'[' * 60000 + b'\n')
    strangers[3].sendall(b'{"rank": 1, "about": 7, "hello": true, "row": {"host": "h", "order": [9, 0]}}\n')
    strangers[0].sendall(b'GET / HTTP/1.0\r\n\r\n')
    strangers[1].sendall(b'{"rank": 1, "row": 7}\n{"rank": "x"}\n')
    second = meet(1)
    assert both(first.gather, second.gather) == [True, True]
    [stranger.close() for stranger in strangers]
    assert both(lambda: first.settle(0), lambda: second.settle(0)) == [(0, 0, '')] * 2


def test_one_that_is_asked_to_stop_before_the_start_stops_all(meet):
    first, second = meet(0, 3), meet(1, 3)
    assert wait_until(lambda: first.table.rows[1] is not None, 10)
    second.tell(75)
    second.close()
    assert first.gather() is False
    assert first.settle(75) == (75, 0, f'machine 0 ({socket.gethostname()}): it was asked to stop')


@pytest.mark.parametrize('silent', [0, 1])
def test_a_machine_that_falls_silent_is_missed_by_the_other_which_ends_its_workers(meet, monkeypatch, silent):
    pair = meet(0), meet(1)
    assert both(pair[0].gather, pair[1].gather) == [True, True]
    monkeypatch.setattr(meeting, 'SILENCE', 2)
    send, mute = meeting.Wire.send, pair[silent].thread
    monkeypatch.setattr(
        meeting.Wire,
        'send',
        lambda wire, *message: None if threading.current_thread() is mute else send(wire, *message),
    )
    other = pair[1 - silent]
    assert not wait_until((other.reports / 'give_up').exists, 1)
    assert wait_until((other.reports / 'give_up').exists, 5)
    code, cause, text = other.settle(1, 'gave up')
    assert (code, cause) == (1, silent) and 'has not been heard for 2 s' in text


def test_a_machine_that_is_started_again_in_mid_run_ends_the_first_run(meet):
    """As when it was switched off, and came back before it was missed."""
    first, second = meet(0), meet(1)
    assert both(first.gather, second.gather) == [True, True]
    again = meet(1)
    assert wait_until((first.reports / 'give_up').exists, 5)
    assert first.settle(1)[:2] == (1, 1)
    anew = meet(0)
    assert both(anew.gather, again.gather) == [True, True]


def test_workers_get_time_to_end_by_themselves(meet, monkeypatch):
    """After a failure elsewhere they are ended in PATIENCE seconds, and in LEAVING more this process, come what may."""
    first, second = meet(0), meet(1)
    assert both(first.gather, second.gather) == [True, True]
    monkeypatch.setattr(meeting, 'PATIENCE', 1.0)
    monkeypatch.setattr(meeting, 'LEAVING', 1.0)
    ended = []
    monkeypatch.setattr(meeting.os, '_exit', ended.append)
    threading.Thread(target=lambda: second.settle(1, 'KeyError', (1, 2.0)), daemon=True).start()
    assert not wait_until((first.reports / 'give_up').exists, 0.5)
    assert wait_until((first.reports / 'give_up').exists, 5)
    assert not wait_until(lambda: ended, 0.5)
    assert wait_until(lambda: ended, 5) and ended[0] == 1


# ---------------------------------------------------------------- the launcher around it


@pytest.fixture
def torchrun(monkeypatch, tmp_path):
    """`torchrun(do)` puts `do(arguments)` in place of torchrun; then `torchrun.launch(...)` is `together` on machine 0,
    with a Meeting of machine 1 beside it, whose workers end after `seconds`: the code, and the verdict of machine 1."""
    from torch.distributed import run

    def instead(do):
        monkeypatch.setattr(run, 'main', do)

    def launch_both(meet, seconds=0):
        place, ends = Place(2, 0, '127.0.0.1', meet.port), []

        def second():
            there = meet(1)
            there.gather()
            time.sleep(seconds)
            ends.append(there.settle(0))

        beside = threading.Thread(target=second)
        beside.start()
        code = launcher.together(place, {'command': 'main.py'}, 20, ['main.py'], tmp_path)
        beside.join(20)
        return code, *ends

    before = {name: signal.getsignal(name) for name in stopping.STOP_SIGNALS}
    monkeypatch.setattr(launcher, 'stops', [])
    monkeypatch.setattr(machines, 'use_interface', lambda address: None)
    instead.launch = launch_both
    yield instead
    [signal.signal(name, handler) for name, handler in before.items()]


def test_an_error_of_torchrun_itself_is_the_cause_on_all_machines(meet, torchrun, capsys):
    """Its store that cannot be reached, say; a ValueError is not taken for a wrong setting."""
    from torch.distributed.run import config_from_args, parse_args

    def fails(arguments):
        settings = config_from_args(parse_args(arguments))[0]
        assert int(settings.rdzv_configs['timeout']) == launcher.STORE_WAIT and settings.rdzv_configs['rank'] == 0
        raise ValueError('no such store')

    torchrun(fails)
    said = f'machine 0 ({socket.gethostname()}): torchrun failed: ValueError: no such store'
    assert torchrun.launch(meet) == (1, (1, 0, said))


def test_a_script_that_runs_nothing_says_so_on_several_machines(meet, torchrun, capsys):
    torchrun(lambda arguments: None)
    assert torchrun.launch(meet) == (0, (0, 0, ''))
    assert 'main.py ended without a run: it has to call main()' in capsys.readouterr().err


def test_a_stop_while_a_refused_launcher_leaves_changes_nothing(meet, torchrun, tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise Refused('not alike')

    close = Meeting.close
    monkeypatch.setattr(Meeting, 'gather', refuse)
    monkeypatch.setattr(Meeting, 'close', lambda self: (os.kill(os.getpid(), signal.SIGTERM), close(self)))
    assert launcher.together(Place(2, 0, '', meet.port), {}, 20, ['main.py'], tmp_path) == errors.EXIT_BAD_SETTING
    assert capsys.readouterr().err == 'not alike\n'


def test_a_stop_between_two_attempts_is_obeyed(meet, torchrun, tmp_path, capsys):
    began = []

    def fails(arguments):
        began.append(1)
        raise RuntimeError

    def attempt():
        code = launcher.alone(['--standalone', 'main.py'], tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        return code

    torchrun(fails)
    assert launcher.repeat(3, attempt) == errors.EXIT_STOPPED and began == [1]
    heard = (75, 0, f'machine 0 ({socket.gethostname()}): it was asked to stop')
    assert torchrun.launch(meet) == (75, heard) and began == [1]  # on several machines the others hear of it
    assert 'starting again' in capsys.readouterr().err


def test_a_stop_that_comes_with_the_last_machine_starts_no_workers(meet):
    """Machine 0 was asked to stop while it waited, so that machine 1 hears of the stop and of the start together."""
    first = meet(0)
    stopper = threading.Thread(target=first.tell, args=(errors.EXIT_STOPPED, 20))
    stopper.start()
    time.sleep(0.3)
    assert not meet(1).gather()
    stopper.join(10)
    assert not stopper.is_alive()


def test_a_failure_stays_one_when_a_stop_comes_while_it_waits_for_the_others(meet, torchrun, tmp_path, capsys):
    """So that Slurm does not queue again what fails each time."""

    def fails(arguments):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise ValueError('each time')

    torchrun(fails)
    code, (other, cause, text) = torchrun.launch(meet, seconds=3)
    assert (code, other, cause) == (1, 1, 0) and text.endswith('each time')


def test_a_number_that_no_machine_has_is_a_strangers(meet):
    first = meet(0)
    with socket.create_connection(('127.0.0.1', first.place.port)) as stranger:
        row = dict(host='x', code=None, text='', order=[9, 0.0], gone='')
        message = dict(rank=7, row=row, about=first.about, hello=True)
        stranger.sendall(json.dumps(message).encode() + b'\n')
        time.sleep(0.5)
    other = meet(1)
    assert both(first.gather, other.gather) == [True, True]


@pytest.mark.parametrize('code, end', [(0, None), (1, 'give_up'), (2, signal.SIGTERM), (75, signal.SIGTERM)])
def test_workers_here_are_ended_in_the_way_of_those_elsewhere(meet, monkeypatch, code, end):
    """Asked to stop, so that they save, where another machine was; given up where one failed; else left alone."""
    first, second = meet(0), meet(1)
    assert both(first.gather, second.gather) == [True, True]
    asked = []
    monkeypatch.setattr(meeting, 'PATIENCE', 0.3)
    monkeypatch.setattr(meeting.os, 'kill', lambda pid, signum: asked.append(signum))
    threading.Thread(target=lambda: second.settle(code), daemon=True).start()
    wait_until(lambda: asked or (first.reports / 'give_up').exists(), 2)
    assert (asked, (first.reports / 'give_up').exists()) == ([end] * (end == signal.SIGTERM), end == 'give_up')
    first.settle(code)


def test_localhost_is_what_was_asked_for_and_a_name_of_it_is_not(monkeypatch):
    monkeypatch.setattr(socket, 'gethostbyname', lambda host: '127.0.0.1')
    assert machines.address_of('localhost') == '127.0.0.1'
    with pytest.raises(ValueError, match='means the machine itself'):
        machines.address_of('h1')


def test_a_machine_that_comes_again_is_not_lost_with_its_old_connection(meet):
    first, old = meet(0, 3), meet(1, 3)
    assert wait_until(lambda: first.table.rows[1] is not None, 10)
    again = meet(1, 3)
    assert wait_until(lambda: 'was reached' in again.trouble, 10)
    time.sleep(0.5)
    old.close()
    time.sleep(0.5)
    third = meet(2, 3, wait=5)
    assert both(first.gather, again.gather, third.gather) == [True] * 3


def test_ones_own_end_counts_where_machine_0_is_gone(meet):
    first, second = meet(0), meet(1)
    assert both(first.gather, second.gather) == [True, True]
    first.close()
    assert wait_until(lambda: second.lost, 10)
    assert second.settle(75)[:2] == (75, 1)


@pytest.mark.parametrize('code', launcher.EXPLAINED_CODES)
def test_an_end_that_was_said_is_not_repeated(code):
    began = []
    assert launcher.repeat(3, lambda: began.append(1) or code) == code and began == [1]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv('NPROC', '5')
    with pytest.raises(ValueError, match=r"NPROC='5'.*at most 4"):
        launcher.processes(Place(), 4)


def test_a_stranger_in_the_place_of_machine_0_is_told_apart(meet):
    with socket.create_server(('127.0.0.1', meet.port)) as stranger:
        late = meet(1)
        with stranger.accept()[0] as connection:
            connection.sendall(b'HTTP/1.0 400 Bad Request\r\n\r\n')
            assert wait_until(lambda: 'no run of this program' in late.trouble, 5)


def test_machines_that_do_not_come_are_waited_for_once_and_again_after_a_failure():
    ends = iter([Alone('1'), 0])

    def attempt():
        end = next(ends)
        if isinstance(end, Exception):
            raise end
        return end

    assert launcher.repeat(3, attempt) == 1
    ends = iter([1, Alone('2'), 0])
    assert launcher.repeat(3, attempt) == 0


def test_a_worker_ends_when_its_launcher_says_so(tmp_path):
    program = (
        'import time; from runtime import stopping; stopping.end_with_parent(); print(1, flush=True); time.sleep(60)'
    )
    env = os.environ | dict(RUN_PARENT=str(os.getpid()), RUN_REPORTS=str(tmp_path), PYTHONPATH=str(ROOT))
    worker = subprocess.Popen([sys.executable, '-c', program], env=env, stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b'1\n'
    assert worker.poll() is None
    (tmp_path / 'give_up').touch()
    assert worker.wait(timeout=10) == 1


def test_the_table_is_settled_when_all_have_ended_or_are_gone():
    assert not Table([row(0), None]).settled and not Table([row(0), row()]).settled
    assert Table([row(0), row(gone='left')]).settled
