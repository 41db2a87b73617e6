"""Console output: a line when a program is silent for long and none otherwise; progress of training."""

import io
import os
import subprocess
import sys
import time

import pytest
import torch

from config import Config
from logging_utils import Record
from runtime import alive, ranks
from runtime.alive import Progress, duration
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def short_silence(monkeypatch):
    monkeypatch.setattr(alive, 'MAX_SILENCE', 0.2)


def test_a_silent_block_prints_its_name_and_progress(capsys):
    with alive.print_while('training'):
        time.sleep(0.3)
        with alive.print_while('drawing samples') as task:
            task.share = 0.4
            time.sleep(0.25)
    time.sleep(0.3)  # no line after the block
    assert capsys.readouterr().out == '... still training\n... still drawing samples, 40%\n'


def test_after_an_inner_block_the_outer_one_is_printed(capsys):
    with alive.print_while('training'):
        with alive.print_while('saving'):
            pass
        time.sleep(0.3)
    assert capsys.readouterr().out == '... still training\n'


def test_a_bar_counts_as_output_when_it_is_redrawn(clock):
    for least, last_output in ((0, 160.0), (1e9, 100.0)):
        clock[0] = 100.0
        alive.note_output()
        progress = Progress(3, lambda speed: 0.0, False, step=0)
        progress.bar = alive.tqdm(total=3, file=io.StringIO(), mininterval=least)
        clock[0] += 60
        progress.advance()
        assert alive._last_output == last_output


def test_a_block_that_prints_gets_no_extra_lines(capsys):
    with alive.print_while('training'):
        for _ in range(8):
            ranks.print_once('step')
            time.sleep(0.05)
    assert 'still' not in capsys.readouterr().out


def test_without_a_terminal_items_are_reported_in_percent(capsys):
    assert [x for x in alive.with_progress([0.25, 0, 0.25], 'reading', 3) if not time.sleep(x)] == [0.25, 0, 0.25]
    assert capsys.readouterr().out == '... still reading, 0%\n... still reading, 67%\n'


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with alive.print_while('training'):
        time.sleep(0.3)
    assert not capsys.readouterr().out


def test_a_process_forked_during_a_print_can_print():
    """The parent holds the lock of stdout: it prints a line to a pipe that nobody reads."""
    script = """
import os, sys, time
from runtime import alive
alive.MAX_SILENCE = 0.1
with alive.print_while('x' * 200_000):
    time.sleep(0.5)
    if os.fork() == 0:
        print('child', file=sys.stderr, flush=True)
        print('child', flush=True)
        os._exit(0)
    os.wait()
print('end', flush=True)
"""
    run = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', script],  # Python 3.12 and later warn of a fork with threads
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=-1,
        stderr=-1,
        text=True,
    )
    try:
        time.sleep(1.5)
        out, err = run.communicate(timeout=20)
    finally:
        run.kill()
    assert out.endswith('end\n') and 'child\n' in out and err == 'child\n'


# ---------------------------------------------------------------- lines of training


@pytest.fixture
def clock(monkeypatch):
    """A list with one number: the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(alive.time, 'monotonic', lambda: now[0])
    return now


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0, '0 s'), (0.0213, '0.021 s'), (3.44, '3.4 s'), (12.3, '12 s'), (300, '5 min'), (11600, '3.2 hours')],
)
def test_durations_have_readable_units(seconds, text):
    assert duration(seconds) == text


def test_progress_shows_the_step_the_loss_and_the_time_left(capsys, clock):
    """The time left is of training only; the time for samples is shown separately."""
    shown = Progress(100, lambda speed: 60.0 if speed == 160 else 300.0, True, step=20)
    for step in (30, 40, 50, 100):
        clock[0] += 4
        shown.show(step, 0.125, 160.0 if step < 100 else 320.0)
    assert capsys.readouterr().out.splitlines() == [
        'step 30/100  loss 0.1250  160 images/s  28 s left, '
        'then about 60 s of samples, then numbers (--no_final_eval leaves them out)',
        # no line at step 40, 4 s after the one before
        'step 50/100  loss 0.1250  160 images/s  20 s left, then about 60 s of samples, then numbers',
        # 4 s after the last line, too, but the last step is always printed
        'step 100/100  loss 0.1250  320 images/s  trained, then about 5 min of samples, then numbers',
    ]
    Progress(100, lambda speed: 0.0, True, step=0).show(100, 0.125, 160.0)
    Progress(100, lambda speed: 9.0, False, step=0).show(100, 0.125, 160.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(' images/s  trained') and lines[1].endswith('trained, then about 9 s of samples')


def test_there_is_a_line_every_half_minute_whatever_log_every_is(tmp_path, capsys, clock):
    """It shows the mean loss so far, which the next line of the record still includes."""
    settings = dict(wandb='disabled', global_batch_size=32, num_training_steps=100, log_every=50)
    record = Record(Config(ckpt_dir=str(tmp_path), experiment_name='run', **settings), torch.device('cpu'))
    with record.open(0):
        for step in range(1, 51):
            clock[0] += 2
            record.losses(torch.tensor([float(step)]), torch.tensor([0.5]))
            record.step(0.1, {})
        values = record.summary(50)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ['13/100', '26/100', '39/100', '50/100']
    assert lines[0] == 'step 13/100  loss 7.0000  16 images/s  3 min left' and values['train/loss'] == 25.5
