"""Lines of progress: what they tell, and how often there is one."""

import pytest
import torch

from config import Config
from logging_utils import Record
from runtime import progress
from runtime.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A list with one number, the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    return now


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0, '0 s'), (0.0213, '0.021 s'), (3.44, '3.4 s'), (12.3, '12 s'), (300, '5 min'), (11600, '3.2 hours')],
)
def test_durations_are_in_units_that_can_be_read(seconds, text):
    assert duration(seconds) == text


def test_progress_tells_the_step_the_loss_and_the_time_left(capsys, clock):
    """The seconds left are always of training; those of what follows it are apart."""
    shown = Progress(100, lambda speed: 60.0 if speed == 160 else 300.0, True, step=20)
    for step in (30, 40, 50, 100):
        clock[0] += 4
        shown.show(step, 0.125, 160.0 if step < 100 else 320.0)
    assert capsys.readouterr().out.splitlines() == [
        'step 30/100  loss 0.1250  160 images/s  28 s left, '
        'then about 60 s of samples and numbers (--no_final_eval leaves the numbers out)',
        'step 50/100  loss 0.1250  160 images/s  20 s left, then about 60 s of samples and numbers',  # 4 s: too early
        'step 100/100  loss 0.1250  320 images/s  trained, then about 5 min of samples and numbers',  # the end is not
    ]
    Progress(100, lambda speed: 0.0, True, step=0).show(100, 0.125, 160.0)
    Progress(100, lambda speed: 9.0, False, step=0).show(100, 0.125, 160.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(' images/s  trained') and lines[1].endswith('trained, then about 9 s of samples')


def test_there_is_a_line_in_half_a_minute_whatever_log_every_is(tmp_path, capsys, clock):
    """With the loss so far, which the record's own line has again."""
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
