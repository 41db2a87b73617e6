"""Rank, agreement and shares, with one process and with two real ones."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from runtime import launch, ranks, stopping

# What each of two processes does; it writes what it saw as JSON. Steps that all ranks take together come in the same order.
SCRIPT = """
import json, os, signal, sys, time
import torch
from runtime import ranks as d, stopping
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

def stopped():
    try:
        stopping.raise_if_stopped()
    except stopping.Stopped:
        return True
    return False

stopping.catch_stop_signals()
seen['stopped'] = [stopped()]
if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
seen['stopped'] += [stopped(), stopped()]
with open(f'{sys.argv[1]}/{rank}.json', 'w') as file:
    json.dump(seen, file)
d.close()
seen = [d.rank(), d.world_size()]
assert seen == [0, 1], seen
"""


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """What rank 0 and rank 1 of SCRIPT saw."""
    folder = tmp_path_factory.mktemp('ranks')
    (folder / 'script.py').write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    shared = os.environ | dict(
        WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'
    )
    shared |= dict(CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, folder / 'script.py', folder]
    processes = [
        subprocess.Popen(command, env=shared | dict(RANK=str(r), LOCAL_RANK=str(r)), stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads((folder / f'{r}.json').read_text()) for r in range(2)]


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
    assert [seen['objects'] for seen in both] == [[{'rank': 0}, {'rank': 1}]] * 2


def test_two_means_are_over_all_ranks(both):
    expected = {'both': pytest.approx((3 + 7) / (1 + 2)), 'only 0': 5.0, 'only 1': 6.0}
    for seen in both:
        assert seen['means'] == expected
        assert seen['restored'] == expected | {'both': pytest.approx((3 + 7 + 10 + 10) / (1 + 2 + 1 + 1))}


def test_two_barrier_waits(both):
    assert both[1]['waited'] > 0.2


def test_two_stop_together_when_one_got_the_signal(both):
    assert [seen['stopped'] for seen in both] == [[False, True, True]] * 2


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
    with pytest.raises(ZeroDivisionError):
        ranks.on_main(lambda: 1 // 0)


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


def test_raise_if_stopped_only_after_a_signal(monkeypatch):
    monkeypatch.setattr(stopping, '_stop_asked', False)
    stopping.raise_if_stopped()
    stopping.ask_to_stop()
    with pytest.raises(stopping.Stopped):
        stopping.raise_if_stopped()


@pytest.mark.parametrize('nproc', ['0', '-1', 'two', '1.5'])
def test_the_launcher_refuses_a_bad_number_of_processes(nproc, monkeypatch, capsys):
    monkeypatch.setenv('NPROC', nproc)
    monkeypatch.setattr(os, 'setsid', lambda: None)
    assert launch.launch(['main.py']) == stopping.EXIT_BAD_SETTING
    assert f'NPROC={nproc!r}' in capsys.readouterr().err


def test_the_first_cause_is_the_killed_rank_else_the_first_report(tmp_path):
    """What other ranks say is that their connection broke."""
    for rank, when, text in ((0, 7.5, 'RuntimeError: connection closed'), (1, 7.4, 'KeyError: broken')):
        (tmp_path / f'failed_{rank}').write_text(json.dumps(dict(time=when, rank=rank, text=text)))
    assert launch.first_cause({0: 1}, tmp_path) == 'rank 1 failed first: KeyError: broken'
    assert 'rank 2 was killed by signal 9 (SIGKILL)' in launch.first_cause({0: 1, 2: -9}, tmp_path)
