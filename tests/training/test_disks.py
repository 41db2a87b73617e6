"""Machines with their own disks and clones: two ranks in two folders."""

import dataclasses
import re

import pytest
import torch

import saving
from config import Config
from tests.helpers import run_ranks

# The script of two ranks in separate folders, as on two machines that share no disk: it opens runs, records outcomes.
DISKS = """
import dataclasses, json, os, sys
from pathlib import Path
import saving
from config import Config, SettingError
from runtime import ranks
from training import run_folder, run_record

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
run_record.ROOT = Path.cwd()  # a clone: scratch.py and trainer.py differ between the two
seen['scratch'] = refused(lambda: run_record.refuse_unlike(same))
sys.path.insert(0, os.getcwd())
import trainer
seen['code'] = refused(lambda: run_record.refuse_unlike(same))

def steps(name):
    found = run_folder.open_folder(Config(ckpt_dir='ckpts', experiment_name=name))
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
"""


@pytest.fixture(scope='module')
def disks(tmp_path_factory):
    """The outcomes that rank 0 and rank 1 of DISKS recorded."""
    folder = tmp_path_factory.mktemp('disks')

    def put(rank, name, step):
        run = folder / f'disk{rank}/ckpts' / name
        run.mkdir(parents=True)
        config = dataclasses.asdict(Config(ckpt_dir='ckpts', experiment_name=name))
        saving.write(run / 'last.pt', version=1, config=config, step=step, network=torch.full((3,), float(step)))

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
        assert seen['elsewhere'] == seen['host'] == seen['scratch'] == ''  # data and unused files may differ
        assert 'base_lr: 0.25 on ' in seen['settings'] and '0.5 on ' in seen['settings']
        assert seen['settings'].count('\n') == 2  # it shows what differs, and only that
        assert 'the code in trainer.py: checksum' in seen['code'] and seen['code'].count('\n') == 2
        assert 'on all machines' in seen['code']


def test_disks_every_rank_resumes_from_the_checkpoint_of_rank_0(disks):
    """Whether its own disk has the same one, an older one, or none."""
    for seen in disks:
        assert seen['none'] is None and seen['begun from'] == 7
        assert [seen[name] for name in ('same', 'only_on_0', 'older_on_1')] == [[n, [n] * 3] for n in (5, 7, 9)]


def test_disks_a_run_does_not_start_over_where_another_machine_has_it(disks):
    for seen in disks:
        assert re.match(
            r'ckpts/only_on_1/last.pt is on .*not on the machine of rank 0.*--experiment_name', seen['only_on_1']
        )
        assert 'nowhere.pt' in seen['absent']
