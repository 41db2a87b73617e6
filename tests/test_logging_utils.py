"""The record: metrics.jsonl, means, speed, progress, and the real wandb with a fake server or with none."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import logging_utils
from config import Config, SettingError
from logging_utils import Record, bars
from runtime import stopping
from runtime.errors import SaveError, Stopped
from tests.runtime.test_ranks import run_ranks

CPU = torch.device('cpu')


def record_in(folder: Path, **settings) -> Record:
    """A record whose folder is `folder`/run."""
    settings = dict(wandb='disabled', global_batch_size=32, num_training_steps=100) | settings
    return Record(Config(ckpt_dir=str(folder), experiment_name='run', **settings), CPU)


def write(record: Record, step: int, **values: float) -> None:
    with record.line(step) as line:
        line |= values


def lines_of(folder: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f'{name} is not JSON')

    return [json.loads(line, parse_constant=refuse) for line in (folder / 'run/metrics.jsonl').read_text().splitlines()]


# ---------------------------------------------------------------- metrics.jsonl


def test_each_line_is_json_with_step_images_and_exact_values(tmp_path):
    record = record_in(tmp_path)
    with record.open(0):
        write(record, 1, loss=0.1)
        write(record, 2, loss=1 / 3)
        write(record, 3)
    assert lines_of(tmp_path) == [
        {'train/step': 1, 'train/images': 32, 'loss': 0.1},
        {'train/step': 2, 'train/images': 64, 'loss': 1 / 3},
    ]
    assert list(lines_of(tmp_path)[0]) == ['train/step', 'train/images', 'loss']


def test_a_histogram_is_not_copied_from_the_device_without_wandb(tmp_path):
    record = record_in(tmp_path)
    with record.open(0):
        record.histogram('x', torch.zeros(3, device='meta'), 1)  # cannot be copied


@pytest.mark.parametrize('error', [Stopped, ZeroDivisionError])
def test_what_was_computed_before_a_stop_is_written(tmp_path, error):
    record = record_in(tmp_path)
    with pytest.raises(error), record.open(0), record.line(7) as line:
        line['loss'] = 0.5
        raise error
    assert lines_of(tmp_path) == [{'train/step': 7, 'train/images': 224, 'loss': 0.5}]


def test_values_that_are_not_finite_can_be_written(tmp_path):
    record = record_in(tmp_path)
    with record.open(0):
        write(record, 1, a=math.nan, b=math.inf, c=-math.inf, d=-3.5)
    (line,) = lines_of(tmp_path)
    assert [line[name] for name in 'abcd'] == ['nan', 'inf', '-inf', -3.5]


@pytest.mark.parametrize('step, left', [(0, []), (1, []), (6, [3]), (7, [3, 6]), (9, [3, 6]), (99, [3, 6, 9])])
def test_the_record_is_cut_back_to_the_step_of_the_checkpoint(tmp_path, step, left):
    record = record_in(tmp_path)
    with record.open(0):
        for i in (3, 6, 9):
            write(record, i, loss=i / 7)
    with record.open(step):
        write(record, 100, loss=0.5)
    assert [line['train/step'] for line in lines_of(tmp_path)] == [*left, 100]


def test_a_malformed_line_is_named(tmp_path):
    record = record_in(tmp_path)
    record.path.parent.mkdir()
    for bad in ('{"train/step": 2]}', '{"step": 2}'):
        record.path.write_text('{"train/step": 1}\n' + bad + '\n')
        expected = rf'{record.path}: line 2 is not a line of a record \(.*step.*Fix or remove it'
        with pytest.raises(SettingError, match=expected), record.open(5):
            pass
        assert record.path.read_text().endswith(bad + '\n')


@pytest.mark.parametrize('half', ['{', '{"train/step": 9, "train/lo', '{"train/step": 9, "a": 1', '\n', '\0\0\0\0'])
def test_a_half_written_last_line_is_dropped(tmp_path, half):
    record = record_in(tmp_path)
    with record.open(0):
        write(record, 3, a=1.0)
    with open(record.path, 'a') as file:
        file.write(half)
    with record.open(10):
        write(record, 10, a=2.0)
    assert [line['train/step'] for line in lines_of(tmp_path)] == [3, 10]


def test_a_line_is_on_the_disk_when_its_block_ends(tmp_path, monkeypatch):
    synced = []
    record = record_in(tmp_path)
    with record.open(0):
        monkeypatch.setattr(logging_utils.os, 'fsync', lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        for step in (1, 2):
            write(record, step, a=1.0)
            assert len(synced) == step and synced[-1] == record.path.stat().st_size > 0


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path):
    record = record_in(tmp_path)
    with record.open(0):
        record.path.unlink()
        record.path.mkdir()
        with pytest.raises(SaveError, match=r'cannot be written.*Make room'):
            write(record, 1, a=1.0)
        (record.path.parent / 'samples').write_text('in the way')
        with pytest.raises(SaveError, match='cannot be written'):
            record.picture('x', torch.zeros(3, 4, 4, dtype=torch.uint8), 1)


def test_a_folder_that_was_deleted_in_mid_run_is_named(tmp_path):
    record = record_in(tmp_path / 'run')
    with record.open(0):
        shutil.rmtree(record.path.parent)
        with pytest.raises(
            SaveError, match=r'run: the record cannot be written \(.*The folder is gone: put it back, and'
        ):
            write(record, 1, a=1.0)


def test_a_picture_on_disk_has_the_same_pixels(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    record = record_in(tmp_path)
    record.picture('before', picture, 3)  # not open: nothing is written
    with record.open(0):
        record.picture('step_0000003_heun_raw', picture, 3)
        record.picture('path', picture, 3, '.')
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.png')) == [
        'run/path.png',
        'run/samples/step_0000003_heun_raw.png',
    ]
    for path in tmp_path.rglob('*.png'):
        assert np.array_equal(np.asarray(Image.open(path)), picture.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------- means and speed


def test_what_is_logged_is_averaged_over_elements_and_steps_since_the_last_clear(tmp_path):
    record = record_in(tmp_path)
    record.log('mine', 100.0)  # not open: it belongs to no step
    with record.open(0):
        record.log('mine', 5.0)
        record.clear()
        record.log('mine', torch.tensor([1, 2, 3]))
        record.log('mine', 10.0)
        record.losses(torch.tensor([1.0, 3.0]), torch.tensor([0.05, 0.95]))
        record.losses(torch.tensor([5.0, math.nan]), torch.tensor([0.05, 0.5]), torch.tensor([True, False]))
        record.step(0.25, {'network': torch.tensor(2.0), 'other': torch.tensor(3.0)})
        record.step(0.75, {'network': torch.tensor(math.inf), 'other': torch.tensor(5.0)})
        values = record.summary(0)
    record.log('mine', 100.0)
    assert values.pop('train/memory_gb') > 0
    assert values == {
        'mine': 4.0,
        'train/augmented': 0.5,
        'train/grad_norm': 2.0,
        'train/grad_norm_other': 4.0,
        'train/loss': 3.0,
        'train/loss_t_0.0_0.1': 3.0,
        'train/loss_t_0.9_1.0': 3.0,
        'train/lr': 0.75,  # from the last step
    }
    assert record.state_dict()['mine'].tolist() == [16.0, 4.0]


def test_what_is_logged_apart_stays_apart(tmp_path):
    record = record_in(tmp_path)
    with record.logging_apart() as early:  # also before the record is open, as evaluate.py does
        record.log('x', 7.0)
    with record.open(0):
        record.log('x', 1.0)
        with record.logging_apart() as outer:
            record.log('x', 2.0)
            with record.logging_apart() as inner:
                record.log('x', 3.0)
                record.losses(torch.tensor([9.0]), torch.tensor([0.5]))  # from training
            record.log('x', 4.0)
        with contextlib.suppress(Stopped), record.logging_apart() as broken:
            record.log('x', 50.0)
            raise Stopped
        record.log('x', 2.0)
        values = record.summary(0)
    assert (early, outer, inner, broken) == ({'x': 7.0}, {'x': 3.0}, {'x': 3.0}, {})
    assert (values['x'], values['train/loss']) == (1.5, 9.0)


NAMES_OF_THE_RUN = 'train/loss loss eval/loss train/lr train/loss_t_0.0_0.1 train/loss_ema_0.98 reference train/waiting'


@pytest.mark.parametrize('name', [*NAMES_OF_THE_RUN.split(), 'eval/reference_floor', 'step_0000001_train/loss'])
def test_names_that_a_run_records_itself_are_refused(tmp_path, name):
    record = record_in(tmp_path)
    with record.open(0), pytest.raises(SettingError, match=r'the run records this itself. Choose another name'):
        record.log(name, 1.0)
    with record.open(0):
        for other in ('train/loss_of_mine', 'lr', 'train/grad_norm_of_mine', 'waiting', 'eval/loss_of_mine'):
            record.log(other, 1.0)


def test_means_continue_from_a_checkpoint(tmp_path):
    first, second = record_in(tmp_path / 'first'), record_in(tmp_path / 'second')
    with first.open(0):
        first.log('x', 0.5)
        torch.save(first.state_dict(), tmp_path / 'x.pt')
    second.load_state_dict(torch.load(tmp_path / 'x.pt', weights_only=True))
    with second.open(1):
        second.log('x', 1.0)
        assert second.summary(1)['x'] == 0.75


@pytest.fixture
def clock(monkeypatch):
    """A list with one number, the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(logging_utils.time, 'monotonic', lambda: now[0])
    return now


def test_speed_and_waiting_are_those_since_something_was_due(tmp_path, clock):
    """At step 12 a checkpoint was saved, and no line written: the time of the save does not count in the speed."""
    record = record_in(tmp_path, log_every=5, save_every=12, eval_every=0, sample_every=0)
    waited = [30.0]  # seconds of waiting for data since the loader was made
    record.waited = lambda: waited[0]
    with record.open(10):
        assert 'train/images_per_second' not in record.summary(10)  # no step yet
        clock[0] += 7
        waited[0] += 5
        write(record, 10)
        assert record.restarted == (107.0, 10)
        clock[0] += 4
        waited[0] += 1
        values = record.summary(11)
        assert (values['train/images_per_second'], values['train/waiting']) == (32 / 4, 0.25)
        write(record, 11, loss=1.0)  # nothing is due
        assert record.restarted == (107.0, 10)
        write(record, 12)
        assert record.restarted == (111.0, 12)
        clock[0] += 2
        waited[0] += 0.5
        values = record.summary(15)
        assert (values['train/images_per_second'], values['train/waiting']) == (3 * 32 / 2, 0.25)
        write(record, 100)  # the last step
        assert record.restarted == (113.0, 100)


def test_a_line_that_is_written_early_is_replaced_by_the_whole_one(tmp_path):
    record = record_in(tmp_path)
    with record.open(0):
        write(record, 5, a=0.0)
        with record.line(10) as line:
            line |= dict(a=1.0)
            record.write(10, line)
            assert [(line['train/step'], line['a']) for line in lines_of(tmp_path)] == [(5, 0.0), (10, 1.0)]
            line |= dict(b=2.0)
        write(record, 15, a=3.0)
    lines = lines_of(tmp_path)
    assert [line['train/step'] for line in lines] == [5, 10, 15] and (lines[1]['a'], lines[1]['b']) == (1.0, 2.0)
    with record.open(10):  # cuts the file
        write(record, 15, a=4.0)
    assert [line['a'] for line in lines_of(tmp_path)] == [0.0, 4.0]


def test_a_small_loss_is_not_shown_as_nothing(tmp_path, capsys, clock):
    record = record_in(tmp_path)
    with record.open(0):
        clock[0] += 100
        record.losses(torch.tensor([0.0000123]), torch.tensor([0.5]))
        record.summary(30)
    assert 'loss 1.23e-05 ' in capsys.readouterr().out


def test_the_rate_belongs_to_its_step_also_when_resumed(tmp_path):
    """A mean since the last line would be half of the rate in a warm-up."""
    record, again = record_in(tmp_path), record_in(tmp_path)
    with record.open(0):
        for lr in (0.1, 0.2, 0.3):
            record.step(lr, {})
        held = record.state_dict()
        assert held['train/lr'].tolist() == [0.3, 1.0]
    again.load_state_dict(held)
    with again.open(3):
        again.step(0.4, {})
        assert again.summary(4)['train/lr'] == 0.4


def test_a_step_in_front_of_a_name_is_dropped(tmp_path):
    """Names of pictures start with a step: numbers logged under them would start a new series at each sampling."""
    record = record_in(tmp_path)
    with record.open(0):
        record.log('step_0000100_adams_raw/ink', 1.0)
        record.log('step_0000200_adams_raw/ink', 3.0)
        record.log('my_step_3_name', 5.0)
        record.log('step_1_error', 1.0)  # a name of the experiment, not of a picture
        record.log('step_4_error', 3.0)
        values = record.summary(0)
    assert values['adams_raw/ink'] == 2.0 and values['my_step_3_name'] == 5.0
    assert (values['step_1_error'], values['step_4_error']) == (1.0, 3.0)


def test_bars_stand_on_the_ground_the_lowest_values_at_the_left():
    dark = np.asarray(bars(torch.tensor([0.0] * 10 + [1.0])))[16:] < 255
    assert dark.shape == (100, 320) and dark[:, 0].all() and not dark[:, 160].any()
    assert dark[-10:, -1].all() and dark[:, -1].sum() == 10


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    record = record_in(tmp_path)
    with record.open(20):
        for _ in range(3):
            record.step(0.1, {})
        record.losses(torch.tensor([0.125]), torch.tensor([0.5]))
        record.summary(23)
        assert record.progress.bar.n == 23
    record.step(0.1, {})
    assert record.progress is None  # outside of `open`, a step shows nothing
    shown = capsys.readouterr()
    assert 'loss 0.1250' in shown.err and '/100' in shown.err and shown.out == ''


# Script of each of two processes; counts the calls of torch.distributed.
RANKS = """
import json, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from config import Config
from logging_utils import Record
from runtime import ranks
from runtime.errors import SaveError

device = ranks.setup()
rank, calls, seen = ranks.rank(), [], {}

def counted(name, call):
    return lambda *args, **kwargs: calls.append(name) or call(*args, **kwargs)

NAMES = 'send recv isend irecv barrier monitored_barrier batch_isend_irecv broadcast_object_list scatter_object_list'
for name in dir(dist):
    if callable(getattr(dist, name)) and (name in NAMES.split() or name.split('_')[0] in
                                          ('all', 'reduce', 'broadcast', 'gather', 'scatter')):
        setattr(dist, name, counted(name, getattr(dist, name)))

folder = Path(sys.argv[1])
config = Config(ckpt_dir=str(folder), experiment_name='run', wandb='disabled', global_batch_size=8)
record = Record(config, device)
with record.open(0):
    calls.clear()
    for step in range(1500):  # more than the number of values that wait to be summed
        record.clear() if step == 2 else None
        record.log('mine', torch.tensor([1.0 + rank]))
        record.log(f'only {rank}', 5.0)
        record.losses(torch.rand(4), torch.rand(4), torch.ones(4, dtype=torch.bool))
        record.step(0.5, {'network': torch.tensor(1.0)})
    seen['in steps'] = list(calls)
    values = record.summary(1500)
    seen['in a summary'] = len(calls)
    seen['values'] = {name: values[name] for name in ('mine', 'only 0', 'only 1', 'train/lr')}
    seen['sums'] = {name: pair.tolist() for name, pair in record.state_dict().items() if name[0] != 't'}
    with record.line(1500) as line:
        line['loss'] = 0.25 + rank
    record.picture('x', torch.full((3, 4, 4), rank, dtype=torch.uint8), 1500)
    record.histogram('x', torch.ones(3), 1500)
    ranks.barrier()
    seen['lines'] = record.path.read_text()
    ranks.barrier()
    calls.clear()
    try:
        with record.line(1501) as line:
            line['loss'] = 0.5
            raise ZeroDivisionError  # on the other rank too, but `line` cannot know that
    except ZeroDivisionError:
        seen['at an error'] = list(calls)
    ranks.barrier()
    if rank == 0:
        record.path.unlink()
        record.path.mkdir()
    try:
        with record.line(1501) as line:
            line['loss'] = 0.5
    except SaveError as error:
        seen['error'] = str(error)
(folder / f'{rank}.json').write_text(json.dumps(seen))
"""


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    return run_ranks(RANKS, tmp_path_factory.mktemp('record'), [0, 1])


@pytest.mark.slow
def test_two_processes_send_nothing_while_they_train(two):
    for seen in two:
        assert seen['in steps'] == [] and seen['in a summary'] > 0


def test_after_an_error_on_one_rank_no_rank_waits_for_another(two):
    assert [seen['at an error'] for seen in two] == [[], []]


def test_two_processes_have_the_same_means_and_one_record(two):
    for seen in two:
        assert seen['values'] == {'mine': 1.5, 'only 0': 5.0, 'only 1': 5.0, 'train/lr': 0.5}
        assert seen['sums'] == {'mine': [4494.0, 2996.0], 'only 0': [7490.0, 1498.0], 'only 1': [7490.0, 1498.0]}
        assert seen['lines'] == '{"train/step": 1500, "train/images": 12000, "loss": 0.25}\n'


def test_two_processes_end_together_if_the_disk_is_full(two):
    for seen in two:
        assert 'cannot be written' in seen['error']


def test_a_time_limit_ends_what_waits_and_leaves_other_timers_as_they_were():
    import signal
    import threading

    before = signal.getsignal(signal.SIGALRM)
    for wait in (lambda: threading.Event().wait(5), lambda: time.sleep(5)):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r'no answer in 0\.1 s'), stopping.time_limit(0.1):
            wait()
        assert time.monotonic() - start < 2
    with stopping.time_limit(0.1):
        pass
    time.sleep(0.2)  # nothing comes later
    assert signal.getsignal(signal.SIGALRM) is before
