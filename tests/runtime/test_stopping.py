"""All ranks stop in the same step; reports of a process to the launcher; how it ends."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime import errors, ranks, stopping
from tests.helpers import ROOT, run_ranks, wait_until

# Run by each of two processes, which writes its observations as JSON. Both call collectives in the same order.
SCRIPT = """
import json, os, signal, sys, time
import torch
from runtime import errors, ranks as d, stopping

d.setup()
rank, seen = d.rank(), {}

def raised(call, **flags):
    try:
        call(**flags)
    except (errors.Stopped, errors.RankFailed) as error:
        return type(error).__name__
    return ''

seen['agreed'] = [stopping.agree(code) for code in (0, rank, 2 * rank, 1 - rank)]
stopping.catch_stop_signals()
seen['fine'] = [raised(stopping.raise_if_stopped), raised(stopping.poll_stop), raised(stopping.poll_stop)]
seen['failed'] = [raised(stopping.raise_if_stopped, failed=rank == r) for r in (0, 1, 2)]

start = time.monotonic()
if rank == 0:
    time.sleep(0.3)  # the other rank reads the previous step's reduction, and does not wait for this rank
stopping.poll_stop()
if rank == 1:
    seen['polled'] = time.monotonic() - start
d.barrier()

stopping.poll_stop()  # its reduction is pending while rank 1 is inside as_one_process()
if rank == 1:
    with d.as_one_process():
        before = stopping._pending
        os.kill(os.getpid(), signal.SIGTERM)
        seen['one process'] = [raised(stopping.raise_if_stopped), raised(stopping.poll_stop), stopping.finish_poll()]
        seen['one process'] += [raised(stopping.raise_if_stopped, failed=True), before is stopping._pending]
seen['polls'] = [raised(stopping.poll_stop) for _ in range(4)]  # a poll that raises leaves no pending reduction
seen['unread'] = stopping._pending is not None
seen['stopped'] = [raised(stopping.raise_if_stopped) for _ in range(2)]
seen['failed and stopped'] = raised(stopping.raise_if_stopped, failed=rank == 0)

stopping._stop_asked = False
stopping.poll_stop()
stopping._stop_asked = rank == 0
stopping.poll_stop()  # no third poll reads its reduction, but the next `raise_if_stopped` does
stopping._stop_asked = False
seen['read by the other'] = [raised(stopping.raise_if_stopped) for _ in range(2)]
seen['in order'] = d.all_gather_objects(rank)
stopping.poll_stop()  # its reduction is never read; leaving the group must still work
with open(f'{sys.argv[1]}/{rank}.json', 'w') as file:
    json.dump(seen, file)
"""


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """Observations of rank 0 and rank 1 of SCRIPT."""
    return run_ranks(SCRIPT, tmp_path_factory.mktemp('ranks'), [0, 1])


# ---------------------------------------------------------------- two processes


def test_two_agree_on_the_greatest_code(both):
    assert [seen['agreed'] for seen in both] == [[0, 1, 2, 1]] * 2


def test_two_stop_together_when_one_got_the_signal(both):
    assert [seen['fine'] for seen in both] == [['', '', '']] * 2
    assert [seen['stopped'] for seen in both] == [['Stopped', 'Stopped']] * 2


def test_two_give_up_together_when_one_failed(both):
    """A failure on one rank ends the same call on both. In the third call no rank failed, and both are in step."""
    assert [seen['failed'] for seen in both] == [['RankFailed', 'RankFailed', '']] * 2
    assert [seen['failed and stopped'] for seen in both] == ['RankFailed'] * 2


def test_two_polls_stop_in_the_same_step_one_after_the_signal_without_waiting(both):
    assert [seen['polls'] for seen in both] == [['', 'Stopped', '', 'Stopped']] * 2
    assert [seen['unread'] for seen in both] == [False] * 2
    assert both[1]['polled'] < 0.25


def test_two_polls_do_not_disturb_later_collectives(both):
    """Nor the end: SCRIPT leaves the group after a poll whose reduction is never read."""
    assert [seen['read by the other'] for seen in both] == [['Stopped', '']] * 2
    assert [seen['in order'] for seen in both] == [[0, 1]] * 2


def test_two_a_signal_inside_as_one_process_is_noted_and_obeyed_later(both):
    """Inside `as_one_process()` there is no communication, and the pending reduction stays unread."""
    assert both[1]['one process'] == ['', '', 0, 'RankFailed', True]


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize('check', [stopping.raise_if_stopped, stopping.poll_stop])
def test_one_process_stops_at_once_but_only_after_a_signal(monkeypatch, check):
    monkeypatch.setattr(stopping, '_stop_asked', False)
    check()
    stopping.ask_to_stop()
    with pytest.raises(errors.Stopped):
        check()


def test_one_process_that_failed_gives_up_and_reports_its_own_error(monkeypatch, tmp_path):
    monkeypatch.setattr(stopping, '_stop_asked', True)
    monkeypatch.setenv('RUN_REPORTS', str(tmp_path))
    monkeypatch.setenv('RANK', '3')
    with pytest.raises(errors.RankFailed) as failed:
        try:
            raise MemoryError('no room for 64 images')
        except MemoryError:
            stopping.raise_if_stopped(failed=True)
    stopping.report_failure(failed.value)
    assert json.loads((tmp_path / 'failed_3').read_text())['text'] == 'MemoryError: no room for 64 images'


def test_one_process_inside_as_one_process_stops_at_the_end_of_the_block(monkeypatch):
    monkeypatch.setattr(stopping, '_stop_asked', True)
    with ranks.as_one_process():
        stopping.raise_if_stopped()
        stopping.poll_stop()
    with pytest.raises(errors.Stopped):
        stopping.raise_if_stopped()


@pytest.mark.parametrize('rank', [None, '0'])
def test_stop_signals_are_caught_only_in_workers_of_torchrun(monkeypatch, tmp_path, rank):
    monkeypatch.setenv('RUN_REPORTS', str(tmp_path))
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv('RANK', raising=False)
    if rank is not None:
        monkeypatch.setenv('RANK', rank)
    before = {name: signal.getsignal(name) for name in stopping.STOP_SIGNALS}
    try:
        stopping.exit_on_stop_signals()
        ends = {signal.getsignal(name) for name in stopping.STOP_SIGNALS}
        stopping.catch_stop_signals()
        caught = {signal.getsignal(name) for name in stopping.STOP_SIGNALS}
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if rank is None:
        assert ends == caught == set(before.values()) and not (tmp_path / 'outcome').exists()
    else:
        assert ends == {signal.SIG_DFL} and caught == {stopping.ask_to_stop}
        assert (tmp_path / 'outcome').read_text() == '1'


def test_a_block_that_hangs_ends_at_its_time_limit():
    before, left = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    with pytest.raises(TimeoutError, match=r'0\.1 s'), stopping.time_limit(0.1):
        threading.Event().wait(30)
    with stopping.time_limit(30):
        pass
    assert signal.getsignal(signal.SIGALRM) is before  # pytest-timeout's own alarm
    assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(left, abs=5)


def test_an_exit_handler_that_hangs_is_cut_off():
    code = (
        'import atexit, time\nfrom runtime import stopping\n'
        'atexit.register(lambda: time.sleep(60))\nstopping.limit_exit(3, seconds=1)'
    )
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=40).returncode == 3


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    code = 'import os, time\nfrom runtime import stopping\nstopping.end_with_parent()\nprint(os.getpid(), flush=True)\n'
    parent = (
        'import os, subprocess, sys\nenv = os.environ | {"RUN_PARENT": str(os.getpid())}\n'
        f'subprocess.run([sys.executable, "-c", {code + "time.sleep(60)"!r}], env=env, start_new_session=True)'
    )
    with subprocess.Popen([sys.executable, '-c', parent], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.kill()
    assert wait_until(lambda: not Path(f'/proc/{child}').exists(), 10)


# ---------------------------------------------------------------- a wait for data


@pytest.fixture
def short_ticks(monkeypatch):
    for name, value in dict(TICK=0.05, LINE_AFTER=0.1, LIMIT=0.5, _stop_asked=False).items():
        monkeypatch.setattr(stopping, name, value)


def test_a_wait_for_data_prints_a_line_and_ends(short_ticks, capsys):
    began = time.monotonic()
    with pytest.raises(errors.DataError, match=r'^data of x: nothing came in 0 minutes'), stopping.waiting('data of x'):
        time.sleep(30)
    assert 0.4 < time.monotonic() - began < 5
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 5 and lines[0] == '... rank 0 is waiting for data of x: nothing for 0 s'
    with stopping.waiting('data of x'):
        time.sleep(0.2)  # slow data are not an error
    time.sleep(0.6)  # the alarm is off after the block


@pytest.mark.parametrize('processes, error', [(1, errors.Stopped), (2, errors.DataError)])
def test_a_wait_for_data_obeys_a_stop_signal(short_ticks, monkeypatch, processes, error):
    """A single process can save. One of several cannot, because the others wait for it."""
    monkeypatch.setattr(ranks, 'world_size', lambda: processes)
    stopping.ask_to_stop()
    began = time.monotonic()
    with pytest.raises(error), stopping.waiting('data'):
        time.sleep(30)
    assert 0.05 < time.monotonic() - began < 0.4  # not at the first tick: the data may still come
