"""Parts of `--check` that the whole run of it in test_faults.py does not show."""

from types import SimpleNamespace

import pytest
import torch

from config import Config, SettingError
from reports import dry_run


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time pass; `timed` measures only this time."""
    now = [0.0]

    def timed(do):
        began = now[0]
        do()
        return now[0] - began

    def advance(seconds):
        now[0] += seconds

    monkeypatch.setattr(dry_run, 'timed', timed)
    return advance


@pytest.mark.parametrize('seconds', [0.0005, 0.1, 3.0])
def test_the_first_step_is_timed_separately_and_rare_slow_steps_hardly_count(clock, seconds):
    """The first step compiles; every hundredth is slow."""
    steps = iter(range(10**6))

    def step():
        i = next(steps)
        clock(90.0 if i == 0 else 20 * seconds if i % 100 == 50 else seconds)

    first, median = dry_run.time_steps(step)
    taken = next(steps)
    assert first == 90.0 and 0.99 * seconds < median < 1.2 * seconds
    assert taken >= 5 and taken * seconds < 40  # enough steps, in less than a minute


@pytest.mark.parametrize(
    ('save_every', 'loses'), [(0, 'all since step_N.pt'), (20, '40 s at most'), (500, '2 min at most')]
)
def test_a_kill_loses_no_more_than_the_run(tmp_path, capsys, save_every, loses):
    rehearsal = object.__new__(dry_run.Rehearsal)
    rehearsal.config = Config(ckpt_dir=str(tmp_path), num_training_steps=60, save_every=save_every)
    rehearsal.begins_at, rehearsal.steps_left, rehearsal.step_seconds = 0, 60, 2.0
    rehearsal.seconds, rehearsal.size = {'training': 120.0}, 1
    rehearsal.trained = SimpleNamespace(device=torch.device('cpu'))
    rehearsal.print_estimate()
    assert f'a kill    loses {loses} (save_every={save_every})' in capsys.readouterr().out


def test_what_is_new_in_the_cache_is_not_kept(tmp_path):
    data = tmp_path / 'data'
    (data / 'cache').mkdir(parents=True)
    (data / 'images.npz').write_text('images')
    (data / 'cache' / 'known').write_text('known')
    stand_in = tmp_path / 'stand_in'
    dry_run.link_data(Config(data_dir=str(data)), stand_in)
    assert (stand_in / 'images.npz').read_text() == 'images' and (stand_in / 'cache' / 'known').read_text() == 'known'
    (stand_in / 'cache' / 'new').write_text('new')
    assert {path.name for path in (data / 'cache').iterdir()} == {'known'}
    dry_run.link_data(Config(data_dir=str(tmp_path / 'none')), tmp_path / 'empty')  # no data there yet
    assert not list((tmp_path / 'empty' / 'cache').iterdir())


def test_several_machines_are_refused(monkeypatch):
    monkeypatch.setenv('GROUP_WORLD_SIZE', '2')  # torchrun's number of machines
    with pytest.raises(SettingError, match=r'check=True.*without NNODES and TORCHRUN_ARGS'):
        dry_run.dry_run(Config(), lambda config: None)


@pytest.mark.parametrize('setting', ['ckpt_dir', 'data_dir'])
def test_a_dangling_link_is_refused_as_in_the_run(tmp_path, setting):
    (tmp_path / 'link').symlink_to(tmp_path / 'purged')
    folders = dict(ckpt_dir=str(tmp_path / 'ckpts'), data_dir=str(tmp_path / 'data')) | {
        setting: str(tmp_path / 'link')
    }
    with pytest.raises(SettingError, match=f'^{setting}=.* is a link to .*purged'):
        dry_run.look_at_folder(Config(**folders))
