"""Signs of life: lines where a program would be silent, and none where it is not."""

import os
import subprocess
import sys
import time

import pytest

from runtime import alive, ranks
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(alive, 'EVERY', 0.2)


def test_a_silent_block_prints_what_it_does_and_how_far_it_is(capsys):
    with alive.still('training'):
        time.sleep(0.3)
        with alive.still('drawing samples') as doing:
            doing.share = 0.4
            time.sleep(0.25)
    time.sleep(0.3)  # no line after the block
    assert capsys.readouterr().out == '... still training\n... still drawing samples, 40%\n'


def test_a_block_that_prints_by_itself_is_left_alone(capsys):
    with alive.still('training'):
        for _ in range(8):
            ranks.print_once('step')
            time.sleep(0.05)
    assert 'still' not in capsys.readouterr().out


def test_items_have_a_share_where_there_is_no_terminal(capsys):
    assert [x for x in alive.each([0.25, 0, 0.25], 'reading', 3) if not time.sleep(x)] == [0.25, 0, 0.25]
    assert capsys.readouterr().out == '... still reading, 0%\n... still reading, 67%\n'


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with alive.still('training'):
        time.sleep(0.3)
    assert not capsys.readouterr().out


def test_a_process_that_is_forked_meanwhile_can_print():
    """While the line is printed, to a pipe that nobody reads, the lock of stdout is held."""
    script = """
import os, sys, time
from runtime import alive
alive.EVERY = 0.1
with alive.still('x' * 200_000):
    time.sleep(0.5)
    if os.fork() == 0:
        print('child', file=sys.stderr, flush=True)
        print('child', flush=True)
        os._exit(0)
    os.wait()
print('end', flush=True)
"""
    run = subprocess.Popen(
        [sys.executable, '-c', script], env=os.environ | {'PYTHONPATH': str(ROOT)}, stdout=-1, stderr=-1, text=True
    )
    try:
        time.sleep(1.5)
        out, err = run.communicate(timeout=20)
    finally:
        run.kill()
    assert out.endswith('end\n') and 'child\n' in out and err == 'child\n'
