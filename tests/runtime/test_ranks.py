"""Rank, agreement and shares, with one process, with two, and with four that take themselves for two machines."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch

import saving
from config import Config, SettingError
from launch import launcher
from runtime import errors, ranks, stopping
from tests.helpers import ROOT

# What each of two processes does; it writes what it saw as JSON. What all ranks do together comes in the same order.
SCRIPT = """
import json, os, signal, sys, time
import torch
from runtime import errors, ranks as d, stopping
from logging_utils import RunningMeans

device = d.setup()
rank, seen = d.rank(), {}
seen['who'] = [d.rank(), d.world_size(), d.is_main(), device.type]
seen['on_main'] = d.on_main(lambda: {'from': rank, 'pair': (1, 'two')})

def fail():
    raise FileNotFoundError(2, 'only rank 0 looked', f'rank{rank}')

try:
    d.on_main(fail)
except FileNotFoundError as error:
    seen['raised'] = [type(error).__name__, error.errno, error.filename]
seen['after'] = d.on_main(lambda: 'still in step')

for n in (1, 5, 8):
    items = torch.arange(n * 6).reshape(n, 2, 3) + 100
    mine = items[torch.tensor(d.my_items(n))]
    seen[f'share {n}'] = d.my_items(n)
    seen[f'gathered {n}'] = torch.equal(d.gather_items(mine, n), items)

seen['any'] = [d.any_rank(flag) for flag in (False, rank == 0, rank == 1, True)]
value = torch.tensor([1.0 + rank, 10.0 * rank])
seen['reduced'] = [d.all_reduce(value.clone(), op).tolist() for op in ('SUM', 'MAX', 'MIN')]
seen['objects'] = d.all_gather_objects({'rank': rank})

seen['patient'] = d.on_each(lambda: time.sleep(0.2 * rank) or 10 * rank, patient=True)
try:
    d.on_each(fail if rank == 1 else lambda: None, patient=True)
except FileNotFoundError as error:
    seen['patient raised'] = error.filename

means = RunningMeans(device)  # ranks have logged other names, and other counts
means.add('both', torch.tensor(3.0 + 4 * rank), torch.tensor(1.0 + rank))
means.add(f'only {rank}', torch.tensor(5.0 + rank), torch.tensor(1.0))
seen['means'] = means.means()
again = RunningMeans(device)
again.load(means.over_ranks())  # every rank loads the sums of all, which must not count twice
again.add('both', torch.tensor(10.0), torch.tensor(1.0))
seen['restored'] = again.means()

start = time.monotonic()
if rank == 0:
    time.sleep(0.3)
d.barrier()
seen['waited'] = time.monotonic() - start

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
    time.sleep(0.3)  # the other rank reads what was begun a step ago, and does not wait for this one
stopping.poll_stop()
if rank == 1:
    seen['polled'] = time.monotonic() - start
d.barrier()

if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
seen['polls'] = [raised(stopping.poll_stop) for _ in range(4)]  # each that raises leaves nothing to read
seen['unread'] = stopping._under_way is not None
seen['stopped'] = [raised(stopping.raise_if_stopped) for _ in range(2)]
seen['failed and stopped'] = raised(stopping.raise_if_stopped, failed=rank == 0)

stopping._stop_asked = False
stopping.poll_stop()
stopping._stop_asked = rank == 0
stopping.poll_stop()  # its reduction, not read by a third poll, is read by the next `raise_if_stopped`
stopping._stop_asked = False
seen['read by the other'] = [raised(stopping.raise_if_stopped) for _ in range(2)]
seen['in order'] = d.all_gather_objects(rank)
stopping.poll_stop()  # begun and never read: the group is left all the same
with open(f'{sys.argv[1]}/{rank}.json', 'w') as file:
    json.dump(seen, file)
d.close()
seen = [d.rank(), d.world_size()]
assert seen == [0, 1], seen
"""


def run_ranks(script, folder, local_ranks):
    """What each of several processes, with these LOCAL_RANKs, wrote as JSON into `folder`."""
    (folder / 'script.py').write_text(script)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    shared = os.environ | dict(
        WORLD_SIZE=str(len(local_ranks)),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
    )
    processes = [
        subprocess.Popen(
            [sys.executable, folder / 'script.py', folder],
            env=shared | dict(RANK=str(rank), LOCAL_RANK=str(local_rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, local_rank in enumerate(local_ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert {process.returncode for process in processes} == {0}, errors
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(len(local_ranks))]


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """What rank 0 and rank 1 of SCRIPT saw."""
    return run_ranks(SCRIPT, tmp_path_factory.mktemp('ranks'), [0, 1])


# ---------------------------------------------------------------- two processes


def test_two_who(both):
    assert [seen['who'] for seen in both] == [[0, 2, True, 'cpu'], [1, 2, False, 'cpu']]


def test_two_on_main_gives_the_value_of_rank_0(both):
    assert [seen['on_main'] for seen in both] == [{'from': 0, 'pair': [1, 'two']}] * 2


def test_two_on_main_raises_the_error_of_rank_0_everywhere(both):
    assert [seen['raised'] for seen in both] == [['FileNotFoundError', 2, 'rank0']] * 2
    assert [seen['after'] for seen in both] == ['still in step'] * 2


@pytest.mark.parametrize('n, shares', [(1, [[0], [0]]), (5, [[0, 2, 4], [1, 3, 4]]), (8, [[0, 2, 4, 6], [1, 3, 5, 7]])])
def test_two_shares_are_equally_long_and_reassemble_in_order(both, n, shares):
    assert [seen[f'share {n}'] for seen in both] == shares
    assert all(seen[f'gathered {n}'] for seen in both)


def test_two_any_rank(both):
    assert [seen['any'] for seen in both] == [[False, True, True, True]] * 2


def test_two_reductions_and_objects(both):
    assert [seen['reduced'] for seen in both] == [[[3.0, 10.0], [2.0, 10.0], [1.0, 0.0]]] * 2
    assert [(seen['patient'], seen['patient raised']) for seen in both] == [(0, 'rank1'), (10, 'rank1')]
    assert [seen['objects'] for seen in both] == [[{'rank': 0}, {'rank': 1}]] * 2


def test_two_means_are_over_all_ranks(both):
    expected = {'both': pytest.approx((3 + 7) / (1 + 2)), 'only 0': 5.0, 'only 1': 6.0}
    for seen in both:
        assert seen['means'] == expected
        assert seen['restored'] == expected | {'both': pytest.approx((3 + 7 + 10 + 10) / (1 + 2 + 1 + 1))}


def test_two_barrier_waits(both):
    assert both[1]['waited'] > 0.2


def test_two_agree_on_the_greatest_code(both):
    assert [seen['agreed'] for seen in both] == [[0, 1, 2, 1]] * 2


def test_two_stop_together_when_one_got_the_signal(both):
    assert [seen['fine'] for seen in both] == [['', '', '']] * 2
    assert [seen['stopped'] for seen in both] == [['Stopped', 'Stopped']] * 2


def test_two_give_up_together_when_one_failed(both):
    """It ends as many calls as there were, on both: the third call, in which no rank failed, finds them in step."""
    assert [seen['failed'] for seen in both] == [['RankFailed', 'RankFailed', '']] * 2
    assert [seen['failed and stopped'] for seen in both] == ['RankFailed'] * 2


def test_two_polls_stop_in_the_same_step_one_later_than_the_signal_and_wait_for_nobody(both):
    assert [seen['polls'] for seen in both] == [['', 'Stopped', '', 'Stopped']] * 2
    assert [seen['unread'] for seen in both] == [False] * 2
    assert both[1]['polled'] < 0.25


def test_two_polls_leave_nothing_that_disturbs_what_comes_after(both):
    """Nor the end: SCRIPT leaves the group after a poll whose reduction nobody reads."""
    assert [seen['read by the other'] for seen in both] == [['Stopped', '']] * 2
    assert [seen['in order'] for seen in both] == [[0, 1]] * 2


# ---------------------------------------------------------------- two machines of two processes each

# ---------------------------------------------------------------- one process


def test_one_process_needs_no_group(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.world_size(), ranks.is_main()) == (0, 1, True)
    ranks.setup()
    assert not torch.distributed.is_initialized()
    ranks.barrier()
    ranks.close()


def test_one_process_is_its_own_everybody():
    value = torch.tensor([1.5, -2.0])
    for op in ('SUM', 'MAX', 'MIN'):
        assert ranks.all_reduce(value.clone(), op).tolist() == [1.5, -2.0]
    assert [ranks.any_rank(flag) for flag in (True, False)] == [True, False]
    assert ranks.all_gather_objects('x') == ['x']
    assert ranks.on_main(lambda: 5) == 5
    assert ranks.on_each(lambda: 6) == 6
    for function in (ranks.on_main, ranks.on_each):
        with pytest.raises(ZeroDivisionError):
            function(lambda: 1 // 0)


def test_gpus_that_torch_cannot_use_are_an_error_not_a_run_on_the_cpu(monkeypatch):
    """As with a driver that is older than torch's CUDA: NVML counts the GPUs, CUDA does not start."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SettingError, match=r'8 GPU.*driver is too old.*nvidia-smi') as error:
        ranks.setup()
    assert torch.__version__ in str(error.value) and "CUDA_VISIBLE_DEVICES=''" in str(error.value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)  # as CUDA_VISIBLE_DEVICES='' has it
    assert ranks.setup() == torch.device('cpu')


@pytest.mark.parametrize('n', [1, 2, 7])
def test_one_process_has_all_shares(n):
    rows = torch.randn(n, 3)
    assert ranks.my_items(n) == list(range(n))
    assert torch.equal(ranks.gather_items(rows[torch.tensor(ranks.my_items(n))], n), rows)


@pytest.mark.parametrize('world', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('n', [1, 2, 5, 8, 100])
def test_shares_cover_all_items_for_any_number_of_processes(monkeypatch, world, n):
    monkeypatch.setattr(ranks, 'world_size', lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(ranks, 'rank', lambda rank=rank: rank)
        shares.append(ranks.my_items(n))
    assert len({len(share) for share in shares}) == 1  # collectives need equal shapes
    assert [i for column in zip(*shares, strict=True) for i in column][:n] == list(range(n))
    assert {i for share in shares for i in share} == set(range(n))


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


@pytest.mark.parametrize('nproc', ['0', '-1', 'two', '1.5'])
def test_the_launcher_refuses_a_bad_number_of_processes(nproc, monkeypatch, capsys):
    monkeypatch.setenv('NPROC', nproc)
    monkeypatch.setattr(os, 'setsid', lambda: None)
    assert launcher.launch(['main.py']) == errors.EXIT_BAD_SETTING
    assert f'NPROC={nproc!r}' in capsys.readouterr().err


def test_the_first_cause_is_the_killed_rank_else_the_first_report(tmp_path):
    """What other ranks say is that their connection broke."""
    for rank, when, text in ((0, 7.5, 'RuntimeError: connection closed'), (1, 7.4, 'KeyError: broken')):
        (tmp_path / f'failed_{rank}').write_text(json.dumps(dict(time=when, rank=rank, text=text)))
    assert min(launcher.causes({0: 1}, tmp_path))[1] == 'rank 1 failed first: KeyError: broken'
    told = f'runtime.stopping.{errors.RankFailed.__name__}: another rank failed'
    (tmp_path / 'failed_2').write_text(json.dumps(dict(time=7.3, rank=2, text=told)))
    assert min(launcher.causes({0: 1}, tmp_path))[1] == 'rank 1 failed first: KeyError: broken'
    assert 'rank 2 was killed by signal 9 (SIGKILL)' in min(launcher.causes({0: 1, 2: -9}, tmp_path))[1]


def test_a_torch_that_renamed_its_signal_handler_is_an_error(monkeypatch):
    from torch.distributed.elastic.multiprocessing import api

    before = api._terminate_process_handler
    monkeypatch.setattr(api, '_terminate_process_handler', before)  # put back at the end
    launcher.patch_signal_handler()
    assert api._terminate_process_handler is not before
    monkeypatch.delattr(api, '_terminate_process_handler')
    with pytest.raises(RuntimeError, match=r'has no _terminate_process_handler.*requirements\.txt'):
        launcher.patch_signal_handler()


# ---------------------------------------------------------------- machines with disks and clones of their own

# Two ranks in folders of their own, as on two machines that share no disk. What each does with a run's folder.
DISKS = """
import dataclasses, json, os, sys
from pathlib import Path
import saving
from config import Config, SettingError
from runtime import errors, ranks, run_folder, run_record

ranks.setup()
rank, root = ranks.rank(), Path(sys.argv[1])
os.chdir(root / f'disk{rank}')
seen = {}

def refused(call):
    try:
        call()
        return ''
    except SettingError as error:
        return str(error)

same = Config(ckpt_dir='ckpts', experiment_name='same')
seen['alike'] = refused(lambda: run_record.refuse_unlike(same))
other = dataclasses.replace(same, base_lr=0.5 if rank else 0.25)
seen['settings'] = refused(lambda: run_record.refuse_unlike(other))
elsewhere = dataclasses.replace(same, data_dir=f'data{rank}', num_workers=rank)
seen['elsewhere'] = refused(lambda: run_record.refuse_unlike(elsewhere))
@dataclasses.dataclass(frozen=True)
class Mine(Config):
    host: str = 'a field of that name'
seen['host'] = refused(lambda: run_record.refuse_unlike(Mine()))
run_record.ROOT = Path.cwd()  # which has a clone: another scratch.py and another trainer.py on each
seen['scratch'] = refused(lambda: run_record.refuse_unlike(same))
sys.path.insert(0, os.getcwd())
import trainer
seen['code'] = refused(lambda: run_record.refuse_unlike(same))

def steps(name):
    found = run_folder.load_run(Config(ckpt_dir='ckpts', experiment_name=name))
    return found and [found['step'], found['network'].tolist()]

seen['none'] = steps('none')
for name in ('same', 'only_on_0', 'older_on_1'):
    seen[name] = steps(name)
seen['only_on_1'] = refused(lambda: steps('only_on_1'))
weights = Path('ckpts/only_on_0/last.pt')
seen['begun from'] = run_folder.load_on_all(weights, lambda: saving.load_checkpoint(weights))['step']
absent = Path('ckpts/nowhere.pt')
seen['absent'] = refused(lambda: run_folder.load_on_all(absent, lambda: saving.load_checkpoint(absent)))
with open(root / f'{rank}.json', 'w') as file:
    json.dump(seen, file)
ranks.close()
"""


@pytest.fixture(scope='module')
def disks(tmp_path_factory):
    """What rank 0 and rank 1 of DISKS saw."""
    folder = tmp_path_factory.mktemp('disks')

    def put(rank, name, step):
        run = folder / f'disk{rank}/ckpts' / name
        run.mkdir(parents=True)
        config = dataclasses.asdict(Config(ckpt_dir='ckpts', experiment_name=name))
        saving.save(run / 'last.pt', version=1, config=config, step=step, network=torch.full((3,), float(step)))

    for rank in (0, 1):
        put(rank, 'same', 5)
        for name in ('trainer.py', 'scratch.py'):
            (folder / f'disk{rank}' / name).write_text(f'rank = {rank}')
    put(0, 'only_on_0', 7)
    put(0, 'older_on_1', 9)
    put(1, 'older_on_1', 6)
    put(1, 'only_on_1', 3)
    return run_ranks(DISKS, folder, [0, 0])


def test_disks_ranks_that_were_not_started_alike_are_refused_on_all(disks):
    for seen in disks:
        assert seen['alike'] == ''
        assert seen['elsewhere'] == seen['host'] == seen['scratch'] == ''  # data may differ; a file that is not used
        assert 'base_lr: 0.25 on ' in seen['settings'] and '0.5 on ' in seen['settings']
        assert seen['settings'].count('\n') == 2  # it shows what differs, and only that
        assert 'the code in trainer.py: checksum' in seen['code'] and seen['code'].count('\n') == 2
        assert 'on all machines' in seen['code']


def test_disks_every_rank_goes_on_from_the_checkpoint_of_rank_0(disks):
    """Whether its own disk has the same one, an older one, or none."""
    for seen in disks:
        assert seen['none'] is None and seen['begun from'] == 7
        assert [seen[name] for name in ('same', 'only_on_0', 'older_on_1')] == [[n, [n] * 3] for n in (5, 7, 9)]


def test_disks_a_run_does_not_begin_anew_where_another_machine_has_it(disks):
    for seen in disks:
        assert re.match(
            r'ckpts/only_on_1/last.pt is on .*not on the machine of rank 0.*--experiment_name', seen['only_on_1']
        )
        assert 'nowhere.pt' in seen['absent']
