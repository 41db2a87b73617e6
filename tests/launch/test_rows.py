"""Launchers of several machines, all on this one: they meet in a real store of torch, and end together."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch import launcher, machines, rows
from launch.machines import Place, free_port
from launch.rows import End, Incomplete, Meeting, Row, run_outcome
from runtime import errors, stopping
from runtime.errors import SettingError
from tests.helpers import ROOT, wait_until

# ---------------------------------------------------------------- one rule for the end


def row(code=None, text='', order=(9, 0.0), gone='', host='h'):
    return Row(code, text, order, host=host, launcher='x', gone=gone)


@pytest.mark.parametrize(
    ('found', 'end'),
    [
        ([row(0), row(0)], (0, 0, '')),
        ([row(1, 'b', (1, 5.0)), row(1, 'a', (1, 4.0))], (1, 1, 'machine 1 (h): a')),  # the first error
        ([row(1, 'lost it', (2, 3.0)), row(1, 'killed', (0, 0.0))], (1, 1, 'machine 1 (h): killed')),
        ([row(1, 'lost it', (2, 3.0)), row(gone='left')], (1, 1, 'machine 1 (h) left')),
        ([row(1, 'KeyError', (1, 3.0)), row(gone='left')], (1, 0, 'machine 0 (h): KeyError')),  # not that it left
        ([row(1, 'lost it', (2, 3.0)), row(2, 'base_lr')], (2, 1, 'machine 1 (h): base_lr')),
        ([row(2), row(2, 'base_lr')], (2, 1, 'machine 1 (h): base_lr')),  # the row with a reason
        ([row(75), row(gone='left')], (75, 0, 'machine 0 (h): it was asked to stop')),
        ([row(3), row(75)], (3, 0, 'machine 0 (h): the loss is not finite')),
        ([row(3), row(2, 'base_lr')], (2, 1, 'machine 1 (h): base_lr')),
    ],
)
def test_all_machines_agree_on_the_verdict(found, end):
    assert run_outcome(found) == end


@pytest.mark.parametrize('text', ['RuntimeError: [/x/gloo/transport/tcp/pair.cc:547] closed', 'X: ncclRemoteError'])
def test_a_lost_connection_is_not_the_cause(tmp_path, text):
    """Clocks of two machines differ: a failure that follows from another is recognised by its text, not its time."""
    for rank, words in enumerate([text, 'KeyError: broken']):
        report = dict(time=1.0 + rank, rank=rank, text=words, follows=False)
        (tmp_path / f'failed_{rank}').write_text(json.dumps(report))
    assert min(stopping.causes({0: 1}, tmp_path))[1] == 'rank 1 failed first: KeyError: broken'
    assert [order for order, _ in sorted(stopping.causes({0: 1}, tmp_path))] == [(1, 2.0), (2, 1.0), (3, 0.0)]


# ---------------------------------------------------------------- launchers that meet


@pytest.fixture
def meet(tmp_path, monkeypatch):
    """`meet(rank, machines=2, wait=20)`: the Meeting of a machine, at a free port of this one."""
    monkeypatch.setattr(rows, 'SAY_FIRST', 1)
    port, made = free_port(), []

    def start(rank, machines=2, wait=20, port=port):
        (tmp_path / str(rank)).mkdir(exist_ok=True)
        made.append(Meeting(Place(machines, rank, '127.0.0.1', port), tmp_path / str(rank), wait))
        return made[-1]

    start.port = port
    yield start
    for each in reversed(made):
        each.lost = each.lost or 'the test is over'  # so that it does not wait
        each.close()


def all_at_once(*calls):
    """The results of functions that are called at the same time, or what they raise."""
    results = [None] * len(calls)

    def call(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    [thread.start() for thread in threads]
    [thread.join(40) for thread in threads]
    return results


def begun(*machines):
    assert all_at_once(*(each.gather for each in machines)) == [True] * len(machines)
    return machines


def leave_at_once(machine):
    """Close it without waiting for the others, which frees its port."""
    machine.lost = 'it does not wait'
    machine.close()


def is_here(first, rank):
    return wait_until(lambda: first.rows[rank].launcher, 10)


@pytest.mark.slow
def test_three_meet_in_any_order_and_end_with_one_cause(meet):
    late, second = meet(2, 3), meet(1, 3)
    assert wait_until(lambda: 'nothing listens there' in late.trouble, 5)
    first = meet(0, 3)
    began = time.monotonic()
    begun(first, second, late)
    assert time.monotonic() - began < 5
    assert first.rows[0].port == second.rows[0].port == late.rows[0].port > 0
    assert (first.rows[1].first, second.my_address) == ('127.0.0.1', '127.0.0.1')
    all_at_once(
        lambda: first.announce_end(End(1, 'lost it', (2, 1.0))),
        lambda: second.announce_end(End(1, 'KeyError', (1, 2.0))),
        lambda: late.announce_end(End(0)),
    )
    ends = [run_outcome(each.judged()) for each in (first, second, late)]
    assert {end[:2] for end in ends} == {(1, 1)} and all(end[2].endswith(': KeyError') for end in ends)


@pytest.mark.slow
def test_a_machine_that_comes_late_is_taken(meet, monkeypatch):
    monkeypatch.setattr(rows, 'SOON', 2)
    first, second = meet(0, 3), meet(1, 3)
    assert is_here(first, 1)
    time.sleep(4)
    begun(first, second, meet(2, 3))


@pytest.mark.slow
def test_missing_machines_are_named_until_the_time_is_over(meet, capsys):
    first, second = meet(0, 3, wait=3), meet(1, 3, wait=3)
    assert all(isinstance(result, Incomplete) for result in all_at_once(first.gather, second.gather))
    err = capsys.readouterr().err
    assert f'waiting for machine 2 of 3 to come to port {meet.port} of machine 0 (no word from it; ' in err
    assert err.count('waiting for') == 2  # once on each machine: the next line would come after SAY_EVERY
    with pytest.raises(Incomplete, match=r'waiting for machine 0 at 127\.0\.0\.1:\d+ after 1 s: nothing listens there'):
        meet(1, wait=1, port=free_port()).gather()


def test_all_missing_machines_are_named(meet):
    first = meet(0, 3)
    assert is_here(first, 0) and first.missing() == f'machine 1, 2 of 3 to come to port {meet.port} of machine 0'


def test_one_that_never_saw_machine_0_leaves_at_once(meet):
    single, began = meet(1), time.monotonic()
    single.announce_end(End(75))
    single.close()
    assert time.monotonic() - began < 2


def test_machines_that_were_not_started_alike_are_refused_on_all(meet, monkeypatch):
    first = meet(0)
    monkeypatch.setenv('MAX_RESTARTS', '3')
    refused = all_at_once(first.gather, meet(1).gather)
    assert [type(error) for error in refused] == [SettingError, SettingError] and str(refused[0]) == str(refused[1])
    assert re.search(r'NNODES=2 MAX_RESTARTS=0 on .*, NNODES=2 MAX_RESTARTS=3 on', str(refused[0]))


def test_another_number_of_machines_is_refused_on_all(meet):
    """Also if machine 0 has no row for the other machine."""
    refused = all_at_once(meet(0).gather, meet(4, 5).gather)
    assert all('NNODES=2 MAX_RESTARTS=0 on' in str(error) and 'NNODES=5' in str(error) for error in refused)


def test_machines_that_were_refused_never_begin(meet):
    """Not even if a correct machine replaces the wrong one before all have learned of it."""
    first = meet(0)
    first.server.set('refused', 'not alike')
    second = meet(1)
    assert is_here(first, 1) and not wait_until(lambda: first.port, 0.7)
    assert [str(error) for error in all_at_once(first.gather, second.gather)] == ['not alike', 'not alike']


def test_a_number_given_twice_and_a_port_in_use_are_refused(meet, monkeypatch):
    first, _ = meet(0, 3), meet(1, 3)
    assert is_here(first, 1)
    monkeypatch.setattr(socket, 'gethostname', lambda: 'another')
    with pytest.raises(
        SettingError, match=r'NODE_RANK=1 was given on both .* and another\. Number the machines from 0'
    ):
        meet(1, 3).gather()
    with pytest.raises(SettingError, match=rf'MASTER_PORT={meet.port}: .* another run may use it'):
        meet(0)


@pytest.mark.slow
def test_another_start_in_mid_run_is_refused_and_the_run_continues(meet):
    """A second run on the same hosts, also with the default MASTER_PORT."""
    first, second = begun(meet(0), meet(1))
    first.server.set('refused', 'other settings')  # a refusal of yet another run does not end this one
    third = meet(1)
    with pytest.raises(SettingError, match=r'For a second run on the same machines pass another MASTER_PORT'):
        third.gather()
    asked = time.monotonic()
    third.announce_end(End(2))
    assert time.monotonic() - asked < 1  # it does not wait
    all_at_once(lambda: first.announce_end(End(0)), lambda: second.announce_end(End(0)))
    assert run_outcome(first.judged()) == run_outcome(second.judged()) == (0, 0, '')


@pytest.mark.slow
def test_a_machine_may_vanish_and_come_again_before_the_start(meet, monkeypatch):
    monkeypatch.setattr(rows, 'SOON', 2)
    first, second = meet(0, 3), meet(1, 3)
    assert is_here(first, 1)
    second.over = True  # killed: its row stays
    assert wait_until(lambda: not first.rows[1].launcher, 10)
    begun(first, meet(1, 3), meet(2, 3))


@pytest.mark.slow
def test_a_machine_that_is_started_again_in_mid_run_waits_for_the_end_of_the_first_run(meet, monkeypatch):
    """As when it was switched off and came back before it was missed. Its old row is still in the store."""
    monkeypatch.setattr(rows, 'SILENCE', 4)
    monkeypatch.setattr(rows, 'SOON', 4)
    first, second = begun(meet(0), meet(1))
    second.over = True
    again = meet(1)
    assert wait_until(lambda: 'an earlier start of this machine' in again.trouble, 5)
    assert wait_until((first.report_dir / 'give_up').exists, 10)
    first.announce_end(End(1, 'gave up'))
    assert run_outcome(first.judged())[:2] == (1, 1)
    first.close()
    begun(meet(0), again)


def test_machine_0_may_vanish_before_the_start_and_is_waited_for(meet):
    first, second = meet(0, 3), meet(1, 3)
    assert is_here(second, 0)
    leave_at_once(first)
    assert wait_until(lambda: second.missing().startswith('machine 0 at '), 5)


def test_machine_0_that_is_started_again_in_mid_run_is_lost_to_the_others(meet):
    first, second = begun(meet(0), meet(1))
    leave_at_once(first)
    meet(0)
    assert wait_until(lambda: second.lost == 'left', 5)


def test_machine_0_that_has_not_written_its_row_yet_is_waited_for(meet):
    store = rows.TCPStore('127.0.0.1', meet.port, None, True, wait_for_workers=False)
    [store.set(f'row{rank}', '{}') for rank in range(2)]
    second = meet(1)
    assert wait_until(lambda: second.trouble == 'it is just starting', 5) and not second.refused


def test_strangers_at_the_port_disturb_nobody(meet):
    first = meet(0)
    strangers = [socket.create_connection(('127.0.0.1', meet.port)) for _ in range(5)]
    strangers[0].sendall(b'GET / HTTP/1.0\r\n\r\n')
    strangers[1].sendall(b'[' * 60000 + b'\n')
    strangers[2].sendall(os.urandom(3000))
    strangers[3].sendall(bytes(100))
    second = meet(1)
    begun(first, second)
    [stranger.close() for stranger in strangers]
    all_at_once(lambda: first.announce_end(End(0)), lambda: second.announce_end(End(0)))
    assert run_outcome(first.judged()) == run_outcome(second.judged()) == (0, 0, '')


@pytest.mark.slow
def test_another_program_in_the_place_of_machine_0_is_recognised(meet, capsys):
    """torch would wait forever for its answer."""
    with socket.create_server(('127.0.0.1', meet.port)):
        late = meet(1, wait=3)
        with pytest.raises(Incomplete, match=r'after 3 s: another program answers there'):
            late.gather()
    assert 'another program answers there); gives up after 3 s' in capsys.readouterr().err


def test_a_store_of_another_program_in_the_place_of_machine_0_is_tried_again_and_again(meet, monkeypatch):
    """It has no rows, and torch would wait five minutes for them."""
    monkeypatch.setattr(rows, 'STUCK', 1)
    _stranger = rows.TCPStore('127.0.0.1', meet.port, None, True, wait_for_workers=False)
    second = meet(1)
    called = second.called
    assert wait_until(lambda: second.called > called + 1, 5)
    assert second.trouble == 'another program answers there'


def test_one_that_is_asked_to_stop_before_the_start_stops_all(meet):
    first, second = meet(0, 3), meet(1, 3)
    assert is_here(first, 1) and is_here(second, 0)
    stop, gathered = all_at_once(
        lambda: second.announce_end(End(75)), lambda: (first.gather(), first.announce_end(End(75)))[0]
    )
    assert stop is None and gathered is False
    assert run_outcome(first.judged()) == (75, 0, f'machine 0 ({socket.gethostname()}): it was asked to stop')


def test_one_that_waits_for_all_others_leaves_at_once(meet):
    first, began = meet(0), time.monotonic()
    first.announce_end(End(75))
    assert time.monotonic() - began < 2


def test_one_that_stops_on_a_cut_network_before_the_start_does_not_wait_long(meet, monkeypatch):
    monkeypatch.setattr(rows, 'SILENCE', 5)
    monkeypatch.setattr(rows, 'SOON', 1)
    _, second = meet(0, 3), meet(1, 3)
    assert is_here(second, 0)
    second.over, began = True, time.monotonic()  # its rows no longer change, as if a call of the store was stuck
    second.announce_end(End(75))
    assert time.monotonic() - began < 3


@pytest.mark.slow
@pytest.mark.parametrize('silent', [0, 1])
def test_a_machine_that_falls_silent_is_missed_by_the_other_which_ends_its_workers(meet, monkeypatch, silent):
    pair = begun(meet(0), meet(1))
    monkeypatch.setattr(rows, 'SILENCE', 3)
    monkeypatch.setattr(rows, 'SOON', 3)
    pair[silent].over = True
    other = pair[1 - silent]
    assert not wait_until((other.report_dir / 'give_up').exists, 1.5)
    assert wait_until((other.report_dir / 'give_up').exists, 6)
    other.announce_end(End(1, 'gave up', (2, 1.0)))
    code, cause, text = run_outcome(other.judged())
    assert (code, cause) == (1, silent) and re.search(r'has been silent for \d+ s', text)


@pytest.mark.slow
def test_a_silent_machine_is_missed_sooner_where_workers_have_failed(meet, monkeypatch):
    """As after its launcher was killed together with its workers."""
    first, second = begun(meet(0), meet(1))
    monkeypatch.setattr(rows, 'SOON', 2)
    second.over, began = True, time.monotonic()
    first.announce_end(End(1, 'connection closed', (2, 1.0)))
    assert time.monotonic() - began < 5 and run_outcome(first.judged())[:2] == (1, 1)
    began = time.monotonic()
    first.close()
    assert time.monotonic() - began < 2  # no machine is left to read its last row


def test_a_silent_machine_is_missed_sooner_only_where_workers_have_failed(meet):
    """Workers that were asked to stop save, which may keep a machine busy."""
    first, second = begun(meet(0), meet(1))
    for each in (first, second):
        each.over = True
        each.thread.join()
    first.heard[1] -= rows.SOON + 2
    missed = {}
    for code in (None, 0, 75, 1):
        first.mine = rows.replace(first.mine, code=code)
        missed[code] = bool(first.judged()[1].gone)
    assert missed == {None: False, 0: False, 75: False, 1: True}


def test_machine_0_that_left_after_its_workers_had_ended_is_not_lost(meet):
    first, second = begun(meet(0), meet(1))
    first.mine = rows.replace(first.mine, code=0)
    assert wait_until(lambda: second.rows[0].code == 0, 3)
    leave_at_once(first)
    assert wait_until(lambda: second.lost, 5)
    second.announce_end(End(0))
    assert run_outcome(second.judged()) == (0, 0, '')


@pytest.mark.slow
def test_machine_0_which_has_the_store_leaves_last(meet):
    first, second = begun(meet(0), meet(1))
    all_at_once(lambda: first.announce_end(End(0)), lambda: second.announce_end(End(0)))
    leaving = threading.Thread(target=first.close)
    leaving.start()
    assert not wait_until(lambda: first.over, 1)
    second.close()
    assert wait_until(lambda: first.over, 2)
    leaving.join()


def test_a_network_that_is_cut_is_not_taken_for_a_machine_0_that_left(meet, monkeypatch):
    _, second = begun(meet(0), meet(1))

    def cut(*_):
        raise OSError(113, 'No route to host')

    monkeypatch.setattr(Meeting, 'exchange', cut)
    assert wait_until(lambda: 'No route' in second.trouble, 3) and not wait_until(lambda: second.lost, 0.2)


@pytest.mark.slow
def test_a_launcher_that_is_gone_is_missed_at_once_by_its_broken_connection(meet):
    first, second = begun(meet(0), meet(1))
    first.close()
    assert wait_until(lambda: second.lost, 5)
    second.announce_end(End(75))
    assert run_outcome(second.judged())[:2] == (75, 1)  # its own end counts


@pytest.mark.slow
def test_a_stuck_call_is_given_up_and_another_connection_tried(meet, monkeypatch):
    """As after a cut: packets of the old connection arrive again only after a time as long as the cut."""
    first, second = begun(meet(0), meet(1))
    monkeypatch.setattr(rows, 'STUCK', 1)
    stuck, exchange, seen, healed = second.thread, Meeting.exchange, first.rows[1].beat, threading.Event()
    block = lambda self, store, beat: (  # noqa: E731
        healed.wait(60) if threading.current_thread() is stuck else exchange(self, store, beat)
    )
    monkeypatch.setattr(Meeting, 'exchange', block)
    assert wait_until(lambda: second.thread is not stuck, 6)
    time.sleep(1)
    assert wait_until(lambda: first.rows[1].beat > seen, 5) and not first.judged()[1].gone
    healed.set()
    stuck.join(3)
    assert not stuck.is_alive()  # only one thread continues


@pytest.mark.slow
def test_workers_get_time_to_end_by_themselves(meet, monkeypatch, capsys):
    """After a failure elsewhere they are ended after PATIENCE seconds, and this process SOON seconds later anyway."""
    first, second = begun(meet(0), meet(1))
    monkeypatch.setattr(rows, 'PATIENCE', 1.5)
    monkeypatch.setattr(rows, 'SOON', 2.0)
    ended = []
    monkeypatch.setattr(rows.os, '_exit', ended.append)
    threading.Thread(target=lambda: second.announce_end(End(1, 'KeyError', (1, 2.0))), daemon=True).start()
    assert not wait_until((first.report_dir / 'give_up').exists, 1)
    assert wait_until((first.report_dir / 'give_up').exists, 5)
    assert not wait_until(lambda: ended, 1)
    assert wait_until(lambda: ended, 5) and ended[0] == 1
    assert f'run.sh: machine 1 ({socket.gethostname()}): KeyError\n' in capsys.readouterr().err
    first.announce_end(End(1))


@pytest.mark.parametrize(
    ('code', 'end'),
    [
        (1, 'give_up'),
        (75, signal.SIGTERM),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, None), (2, signal.SIGTERM)]),
    ],
)
def test_workers_here_end_in_the_same_way_as_elsewhere(meet, monkeypatch, code, end):
    """Asked to stop, so that they save, if another machine was; given up if one failed; else not ended."""
    first, second = begun(meet(0), meet(1))
    asked = []
    monkeypatch.setattr(rows, 'PATIENCE', 0.3)
    monkeypatch.setattr(rows.os, 'kill', lambda pid, signum: asked.append(signum))
    threading.Thread(target=lambda: second.announce_end(End(code)), daemon=True).start()
    wait_until(lambda: asked or (first.report_dir / 'give_up').exists(), 3)
    assert (asked, (first.report_dir / 'give_up').exists()) == ([end] * (end == signal.SIGTERM), end == 'give_up')
    first.announce_end(End(code))


@pytest.mark.slow
def test_workers_that_are_asked_to_stop_have_the_time_to_save(meet, monkeypatch):
    """Also if another machine failed. They get more time than workers that are given up."""
    first, second, third = begun(meet(0, 3), meet(1, 3), meet(2, 3))
    asked, ended = [], []
    monkeypatch.setattr(rows, 'PATIENCE', 1)
    monkeypatch.setattr(rows, 'LEAVING', 2)
    monkeypatch.setattr(rows.os, 'kill', lambda pid, signum: asked.append(signum))
    monkeypatch.setattr(rows.os, '_exit', ended.append)
    second.running = third.running = False  # as in announce_end
    second.mine, third.mine = rows.replace(second.mine, code=1), rows.replace(third.mine, code=75)
    assert wait_until(lambda: asked, 5) and not (first.report_dir / 'give_up').exists()
    monkeypatch.setattr(rows, 'SOON', 0.5)
    assert not wait_until(lambda: ended, 1.5)
    assert wait_until(lambda: ended, 3) and ended[0] == 75 and asked == [signal.SIGTERM]
    first.announce_end(End(75))


def test_nothing_is_ended_where_the_workers_have_ended(meet, monkeypatch):
    """The launcher stays until all have read its last row."""
    first, second = begun(meet(0), meet(1))
    monkeypatch.setattr(rows, 'PATIENCE', 0)
    all_at_once(lambda: first.announce_end(End(0)), lambda: second.announce_end(End(1)))
    assert not wait_until((first.report_dir / 'give_up').exists, 1)


# ---------------------------------------------------------------- the launcher around it


@pytest.fixture
def torchrun(monkeypatch, tmp_path):
    """`torchrun(do)` puts `do(arguments)` in place of torchrun. Then `torchrun.launch(meet, seconds)` calls
    `launch_on_all` on machine 0, and machine 1 comes `late` seconds later and its workers end after `seconds`. It
    returns the code of machine 0 and the outcome of machine 1."""
    from torch.distributed import run

    def instead(do):
        monkeypatch.setattr(run, 'main', do)

    def launch_both(meet, seconds=0, late=0):
        ends = []

        def second():
            time.sleep(late)
            there = meet(1)
            there.gather()
            time.sleep(seconds)
            there.announce_end(End(0))
            ends.append(run_outcome(there.judged()))
            there.close()

        other = threading.Thread(target=second)
        other.start()
        code, text = launcher.launch_on_all(Place(2, 0, '127.0.0.1', meet.port), 20, ['main.py'], tmp_path)
        print(text, file=sys.stderr)
        other.join(20)
        return code, *ends

    before = {name: signal.getsignal(name) for name in stopping.STOP_SIGNALS}
    monkeypatch.setattr(launcher.api, '_terminate_process_handler', launcher.api._terminate_process_handler)
    instead.interfaces = []
    monkeypatch.setattr(machines, 'use_interface', instead.interfaces.append)
    monkeypatch.setattr(launcher, 'stops', [])
    monkeypatch.setattr(launcher, 'meetings', [])
    launcher.obey_once(tmp_path)
    instead.launch = launch_both
    yield instead
    signal.set_wakeup_fd(-1)
    [signal.signal(name, handler) for name, handler in before.items()]


@pytest.fixture
def launch(torchrun, monkeypatch):
    """`launch(do, **variables)`: the exit code of the launcher, with `do(arguments)` in place of torchrun."""
    monkeypatch.setattr(os, 'setsid', lambda: None)
    for name in ('RUN_PARENT', 'RUN_REPORTS', 'RUN_PORT', 'OMP_NUM_THREADS', 'GOMP_SPINCOUNT'):
        monkeypatch.setenv(name, '')  # so that what the launcher sets does not stay
        monkeypatch.delenv(name)

    def launched(do, **variables):
        [monkeypatch.setenv(*pair) for pair in variables.items()]
        torchrun(do)
        return launcher.launch(['main.py'])

    yield launched
    logging.disable(logging.NOTSET)


def test_the_environment_of_workers(launch):
    found = {}
    note = lambda _: found.update(os.environ, logged=not logging.root.manager.disable)  # noqa: E731
    assert launch(note, NPROC='2', MASTER_PORT='29999') == 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    assert found['OMP_NUM_THREADS'] == str(max(1, cores // 2)) and found['GOMP_SPINCOUNT'] == '1000'
    assert found['RUN_PORT'] == '29999' and not found['logged']  # torchrun would report each end again


def test_flags_of_torchrun_from_the_user_take_the_place_of_ours(launch):
    began = []
    assert launch(began.append, TORCHRUN_ARGS='--nnodes 2 --rdzv-endpoint h1:29500') == 0
    assert began[0][:4] == ['--nnodes', '2', '--rdzv-endpoint', 'h1:29500'] and '--standalone' not in began[0]
    assert began[0][-2:] == ['--', 'main.py']  # else torchrun would take our flags for its own


def test_machines_that_never_met_do_not_start_again(launch, meet, capsys):
    place = dict(NNODES='2', NODE_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(meet.port))
    assert launch(None, **place, NODE_WAIT='1', MAX_RESTARTS='1') == 1
    err = capsys.readouterr().err
    assert err.count('to come to port') == 1 and 'after 1 s' in err and 'starting again' not in err


def test_a_machine_that_is_late_at_a_restart_is_waited_for_in_the_next(launch, monkeypatch):
    ends = [(1, 'failed'), Incomplete('late'), (0, '')]

    def met(*_):
        end = ends.pop(0)
        if isinstance(end, Incomplete):
            raise end
        return end

    monkeypatch.setattr(launcher, 'launch_on_all', met)
    assert launch(None, NNODES='2', NODE_RANK='0', MASTER_ADDR='h1', MAX_RESTARTS='2') == 0 and not ends


def test_a_start_finds_nothing_of_an_earlier_one(torchrun, tmp_path):
    """Nor are the signal handlers left: a stop between two starts is noted."""
    for name in ('failed_0', 'give_up', 'outcome'):
        (tmp_path / name).write_text('1')
    found = {}
    torchrun(lambda _: found.update({path.name: path.read_text() for path in tmp_path.iterdir()}))
    launcher.run_workers(['main.py'], tmp_path)
    assert found == {'outcome': '75'}
    os.kill(os.getpid(), signal.SIGTERM)
    assert launcher.stops == [signal.SIGTERM]


def failing(torchrun, folder, codes, give_up=False):
    """Workers that end with these codes; rank 0 reports a reason."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    def fails(_):
        (folder / 'failed_0').write_text(json.dumps(dict(time=5.0, rank=0, text='KeyError', follows=False)))
        if give_up:
            (folder / 'give_up').touch()
        failures = {rank: ProcessFailure(rank, 1, code, '') for rank, code in codes.items()}
        raise launcher.ChildFailedError('main.py', failures)

    torchrun(fails)
    return launcher.run_workers(['main.py'], folder)


def test_workers_that_were_given_up_are_never_the_cause(torchrun, tmp_path):
    text = 'rank 0 failed first: KeyError'
    assert failing(torchrun, tmp_path, {0: 1}) == End(1, text, (1, 5.0))
    assert failing(torchrun, tmp_path, {0: 1}, give_up=True) == End(1, text, (9, 0.0))


def test_a_worker_that_was_stopped_before_there_was_anything_to_save_stops_all(torchrun, tmp_path):
    assert failing(torchrun, tmp_path, {0: 1, 1: -signal.SIGTERM}) == End(75)
    assert failing(torchrun, tmp_path, {0: 1, 1: -signal.SIGKILL}).code == 1


def test_an_error_of_torchrun_while_it_stops_the_workers_is_a_stop(torchrun, tmp_path):
    def fails(_):
        (tmp_path / 'outcome').write_text('75')
        try:
            raise launcher.SignalException('got signal 15', signal.SIGTERM)
        finally:
            raise OSError('broken')

    torchrun(fails)
    assert launcher.run_workers(['main.py'], tmp_path) == End(75)


def test_workers_that_did_not_stop_in_time_were_cut_off(tmp_path):
    (tmp_path / 'outcome').write_text('1')
    end = launcher.outcome_of_stop(tmp_path)
    assert end.code == 75 and 'it did not stop in the time that torchrun gives, and was cut off' in end.text


def test_others_hear_of_a_launcher_that_ends_where_torch_waits_outside_of_python(meet, torchrun, monkeypatch):
    ended = []
    monkeypatch.setattr(launcher, 'SIGNAL_WAIT', 0.1)
    monkeypatch.setattr(launcher.os, '_exit', ended.append)
    first, second = meet(0), meet(1)
    assert is_here(second, 0)
    launcher.meetings.append(first)
    before = signal.signal(signal.SIGUSR2, lambda *_: None)  # wakes up `watch`, but `stop_once` does not handle it
    os.kill(os.getpid(), signal.SIGUSR2)
    assert wait_until(lambda: second.rows[0].code == 75, 3) and wait_until(lambda: ended == [75], 3)
    signal.signal(signal.SIGUSR2, before)


def test_a_stop_once_the_end_is_agreed_on_changes_nothing(meet, torchrun, monkeypatch):
    close = Meeting.close

    def stopped(self):
        if self.place.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Meeting, 'close', stopped)
    torchrun(lambda _: None)
    assert torchrun.launch(meet) == (0, (0, 0, '')) and launcher.stops == [signal.SIGTERM]


def test_an_error_of_torchrun_itself_is_the_cause_on_all_machines(meet, torchrun, capsys):
    """For example if its store cannot be reached; a ValueError is not taken for a wrong setting."""
    from torch.distributed.run import config_from_args, parse_args

    def fails(arguments):
        settings = config_from_args(parse_args(arguments))[0]
        assert int(settings.rdzv_configs['timeout']) == launcher.STORE_WAIT and settings.rdzv_configs['rank'] == 0
        raise ValueError('no such store')

    torchrun(fails)
    cause = f'machine 0 ({socket.gethostname()}): torchrun failed: ValueError: no such store'
    assert torchrun.launch(meet) == (1, (1, 0, cause))
    assert capsys.readouterr().err.splitlines()[-1] == 'torchrun failed: ValueError: no such store'  # on machine 0
    assert torchrun.interfaces == ['127.0.0.1']


def test_a_script_that_runs_nothing_is_reported_on_several_machines(meet, torchrun, capsys):
    torchrun(lambda arguments: None)
    assert torchrun.launch(meet) == (0, (0, 0, ''))
    assert 'main.py ended without a run: it has to call main()' in capsys.readouterr().err


def test_a_stop_while_it_waits_is_obeyed_at_once(meet, torchrun, tmp_path):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    assert launcher.launch_on_all(Place(2, 0, '', meet.port), 20, ['main.py'], tmp_path) == (errors.EXIT_STOPPED, '')
    assert time.monotonic() - began < 4


def test_a_machine_that_waited_in_vain_leaves_its_port_to_the_next_start(meet, torchrun, tmp_path):
    with pytest.raises(Incomplete, match=r'gave up waiting for .* after 1 s'):
        launcher.launch_on_all(Place(2, 0, '127.0.0.1', meet.port), 1, ['main.py'], tmp_path)
    meet(0)


@pytest.mark.slow
def test_a_failure_stays_one_when_a_stop_comes_while_it_waits_for_the_others(meet, torchrun):
    """So that Slurm does not requeue a job that fails each time."""

    def fails(arguments):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise ValueError('each time')

    torchrun(fails)
    code, (other, cause, text) = torchrun.launch(meet, seconds=3)
    assert (code, other, cause) == (1, 1, 0) and text.endswith('each time')


@pytest.mark.slow
def test_a_stop_between_two_starts_is_obeyed_and_the_other_machines_hear_of_it(meet, torchrun, tmp_path):
    began = []
    torchrun(began.append)
    launcher.stops.append(signal.SIGTERM)
    assert launcher.run_workers(['main.py'], tmp_path).code == errors.EXIT_STOPPED
    heard = (75, 0, f'machine 0 ({socket.gethostname()}): it was asked to stop')
    assert torchrun.launch(meet, late=1.5) == (75, heard) and not began  # it waits for machines that are just coming


def test_the_last_row_arrives_even_if_a_stop_comes_while_it_is_written(meet):
    first, second = begun(meet(0), meet(1))
    second.mine = rows.replace(second.mine, code=75)  # as announce_end does, before SignalException ends it
    second.close()
    assert wait_until(lambda: first.rows[1].code == 75, 2)


def test_a_machine_that_stops_as_the_last_one_comes_starts_no_workers(meet):
    first = meet(0)
    first.over = True
    first.thread.join()
    first.rows = [rows.replace(first.mine, port=1), row(75)]  # both are here, but one has stopped
    assert first.begun and not first.gather() and not first.running


def test_a_row_of_another_version_is_reported(meet):
    first = meet(0)
    assert is_here(first, 0)
    first.server.set('row1', '{"colour": "red"}')
    assert wait_until(lambda: 'another version of this program' in first.trouble, 5)


@pytest.mark.slow
def test_a_stop_is_obeyed_where_torch_waits_outside_of_python(tmp_path):
    """While torch waits in C++, here for a store that does not exist, Python's handlers do not run."""
    program = """
import pathlib, socket, sys, time
from launch import launcher
from torch.distributed import TCPStore
folder = pathlib.Path(sys.argv[1])
launcher.SIGNAL_WAIT = 2
launcher.obey_once(folder)
launcher.on_stop(launcher.api._terminate_process_handler)
port = launcher.machines.free_port()
with socket.create_server(('127.0.0.1', port)):
    print('waits', flush=True)
    TCPStore('127.0.0.1', port)
"""
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, '-c', program, tmp_path], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'waits\n'
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 75


def test_only_the_first_stop_signal_is_obeyed(torchrun):
    """At a second one torchrun would leave workers behind that still save."""
    with pytest.raises(launcher.SignalException):
        launcher.api._terminate_process_handler(signal.SIGTERM, None)
    assert {signal.getsignal(name) for name in stopping.STOP_SIGNALS} == {signal.SIG_IGN}


def test_a_handler_that_a_second_signal_interrupts_does_not_wait_for_itself(tmp_path, monkeypatch, torchrun):
    """run.sh and Slurm send signals at the same time, so the second may come in any line of the first one's handler."""
    monkeypatch.setattr(launcher, 'on_stop', lambda handler: None)  # signal.signal works only in the main thread
    handler, ended = launcher.api._terminate_process_handler, []

    def interrupted(line: int) -> None:
        left = line

        def trace(frame, event, arg):
            nonlocal left
            left -= event == 'line'
            if left == 0:
                sys.settrace(None)
                handler(signal.SIGINT, None)
            return trace

        sys.settrace(trace)
        try:
            handler(signal.SIGTERM, None)
        except launcher.SignalException:
            ended.append(line)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=lambda: [interrupted(line) for line in range(1, 30)], daemon=True)
    thread.start()
    thread.join(10)
    assert ended == [*range(1, 30)]


def test_a_worker_ends_when_its_launcher_gives_up(tmp_path):
    program = (
        'import time; from runtime import stopping; stopping.end_with_parent(); print(1, flush=True); time.sleep(60)'
    )
    env = os.environ | dict(RUN_PARENT=str(os.getpid()), RUN_REPORTS=str(tmp_path), PYTHONPATH=str(ROOT))
    worker = subprocess.Popen([sys.executable, '-c', program], env=env, stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b'1\n'
    assert worker.poll() is None
    (tmp_path / 'give_up').touch()
    assert worker.wait(timeout=10) == 1
