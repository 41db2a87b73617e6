"""Rank, collectives and shares, with one process, with two, and with one of two inside `as_one_process()`."""

import os

import pytest
import torch

from config import SettingError
from runtime import ranks
from tests.helpers import run_ranks

# Run by each of two processes, which writes its observations as JSON. Both call collectives in the same order.
SCRIPT = """
import json, sys, threading, time
import torch
from runtime import ranks as d

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

start = time.monotonic()
if rank == 0:
    time.sleep(0.3)
d.barrier()
seen['waited'] = time.monotonic() - start

with d.as_one_process():  # collectives, called by rank 0 only
    if rank == 0:
        seen['one process'] = [d.rank(), d.world_size(), d.is_main(), d.is_first_of_machine(), d.my_items(3)]
        seen['one process'] += [d.all_gather_objects('x'), d.all_reduce(torch.ones(1), 'SUM').item(), d.any_rank(False)]
        seen['one process'] += [d.on_main(lambda: 1), d.on_each(lambda: 2, patient=True), d.rank_0_first(lambda: 3)]
        seen['one process'] += [d.gather_items(torch.arange(3), 3).tolist()]
        d.barrier()
        with d.as_one_process():
            pass
        seen['nested'] = d.acts_as_one_process()
    else:
        seen['one process'] = [d.rank(), d.world_size(), d.is_main(), d.is_first_of_machine()]
        d.print_once('not on this rank')
seen['with others'] = [d.acts_as_one_process(), d.rank(), d.world_size()]

calls = []
fn = lambda: calls.append(d.world_size()) or d.all_gather_objects(rank)
seen['on_main_as_one_process'] = d.on_main_as_one_process(fn)
seen['calls'] = calls
try:
    d.on_main_as_one_process(fail)
except FileNotFoundError as error:
    seen['one process raised'] = error.filename
with d.as_one_process():  # does not affect a background thread
    thread = threading.Thread(target=lambda: seen.update(thread=[d.acts_as_one_process(), d.rank()]))
    thread.start()
    thread.join()
seen['in step'] = d.all_gather_objects(rank)
with open(f'{sys.argv[1]}/{rank}.json', 'w') as file:
    json.dump(seen, file)
d.close()
seen = [d.rank(), d.world_size()]
assert seen == [0, 1], seen
"""


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """Observations of rank 0 and rank 1 of SCRIPT."""
    return run_ranks(SCRIPT, tmp_path_factory.mktemp('ranks'), [0, 1])


# ---------------------------------------------------------------- two processes


def test_two_know_their_ranks(both):
    assert [seen['who'] for seen in both] == [[0, 2, True, 'cpu'], [1, 2, False, 'cpu']]


def test_two_on_main_gives_the_value_of_rank_0(both):
    assert [seen['on_main'] for seen in both] == [{'from': 0, 'pair': [1, 'two']}] * 2


def test_two_on_main_raises_the_error_of_rank_0_everywhere(both):
    assert [seen['raised'] for seen in both] == [['FileNotFoundError', 2, 'rank0']] * 2
    assert [seen['after'] for seen in both] == ['still in step'] * 2


@pytest.mark.parametrize('n, shares', [(1, [[0], [0]]), (5, [[0, 2, 4], [1, 3, 4]]), (8, [[0, 2, 4, 6], [1, 3, 5, 7]])])
def test_two_shares_have_equal_length_and_reassemble_in_order(both, n, shares):
    assert [seen[f'share {n}'] for seen in both] == shares
    assert all(seen[f'gathered {n}'] for seen in both)


def test_two_any_rank(both):
    assert [seen['any'] for seen in both] == [[False, True, True, True]] * 2


def test_two_reductions_and_objects(both):
    assert [seen['reduced'] for seen in both] == [[[3.0, 10.0], [2.0, 10.0], [1.0, 0.0]]] * 2
    assert [(seen['patient'], seen['patient raised']) for seen in both] == [(0, 'rank1'), (10, 'rank1')]
    assert [seen['objects'] for seen in both] == [[{'rank': 0}, {'rank': 1}]] * 2


def test_two_barrier_waits(both):
    assert both[1]['waited'] > 0.2


def test_two_as_one_process_until_the_end_of_the_block(both):
    first, second = both
    assert first['one process'] == [0, 1, True, True, [0, 1, 2], ['x'], 1.0, False, 1, 2, 3, [0, 1, 2]]
    assert second['one process'] == [0, 1, True, True] and first['nested'] is True
    assert [seen['with others'] for seen in both] == [[False, 0, 2], [False, 1, 2]]
    assert [seen['thread'] for seen in both] == [[False, 0], [False, 1]]
    assert [seen['in step'] for seen in both] == [[0, 1]] * 2


def test_two_on_main_as_one_process_may_call_collectives(both):
    assert [seen['on_main_as_one_process'] for seen in both] == [[0]] * 2
    assert [seen['calls'] for seen in both] == [[1], []]
    assert [seen['one process raised'] for seen in both] == ['rank0'] * 2


# ---------------------------------------------------------------- one process


def test_one_process_needs_no_group(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.world_size(), ranks.is_main()) == (0, 1, True)
    ranks.setup()
    assert not torch.distributed.is_initialized()
    ranks.barrier()
    ranks.close()


def test_with_one_process_collectives_are_the_identity():
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
    """With a driver that is too old for torch's CUDA, NVML counts the GPUs, but CUDA does not start."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SettingError, match=r'8 GPU.*driver is too old.*nvidia-smi') as error:
        ranks.setup()
    assert torch.__version__ in str(error.value) and "CUDA_VISIBLE_DEVICES=''" in str(error.value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)  # the effect of CUDA_VISIBLE_DEVICES=''
    assert ranks.setup() == torch.device('cpu')


def test_apples_gpu_is_for_one_process_and_can_be_hidden(monkeypatch):
    for name in ('WORLD_SIZE', 'CUDA_VISIBLE_DEVICES'):
        monkeypatch.delenv(name, raising=False)
    assert ranks.setup() == torch.device('cpu')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(ranks.dist, 'is_initialized', lambda: True)  # joins no group
    assert ranks.setup() == torch.device('mps')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert ranks.setup() == torch.device('cpu')
    monkeypatch.setenv('WORLD_SIZE', '1')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert ranks.setup() == torch.device('cpu')


@pytest.mark.parametrize('n', [1, 2, 7])
def test_one_process_has_all_items(n):
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


def test_the_cores_of_a_machine_are_divided_among_its_processes(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    assert ranks.cores_per_process() == 6
    for processes, cores in ((1, 6), (2, 3), (4, 1), (8, 1)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        assert ranks.cores_per_process() == cores
    monkeypatch.delattr(os, 'sched_getaffinity')  # macOS
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert ranks.cores_per_process() == 1
