"""The parts of `--check` that its own run (test_faults.py) does not show."""

import pytest

from config import Config, SettingError
from reports import dry_run


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` passes time, and all that `timed` measures is what passed meanwhile."""
    now = [0.0]

    def timed(do):
        began = now[0]
        do()
        return now[0] - began

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(dry_run, 'timed', timed)
    return passes


@pytest.mark.parametrize('usual', [0.0005, 0.1, 3.0])
def test_the_first_step_is_told_apart_and_a_slow_one_now_and_then_counts_for_little(clock, usual):
    """The first compiles; every hundredth step waits for something."""
    steps = iter(range(10**6))

    def step():
        i = next(steps)
        clock(90.0 if i == 0 else 20 * usual if i % 100 == 50 else usual)

    first, median = dry_run.time_steps(step)
    taken = next(steps)
    assert first == 90.0 and 0.99 * usual < median < 1.2 * usual
    assert taken >= 5 and taken * usual < 40  # enough, and no more than a minute of them


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
    dry_run.link_data(Config(data_dir=str(tmp_path / 'none')), tmp_path / 'empty')  # where there are no data yet
    assert not list((tmp_path / 'empty' / 'cache').iterdir())


def test_several_machines_are_sent_to_one(monkeypatch):
    monkeypatch.setenv('GROUP_WORLD_SIZE', '2')  # torchrun's number of machines
    with pytest.raises(SettingError, match=r'check=True.*without NNODES and TORCHRUN_ARGS'):
        dry_run.dry_run(Config(), lambda config: None)


@pytest.mark.parametrize('setting', ['ckpt_dir', 'data_dir'])
def test_a_link_whose_target_is_gone_is_refused_as_in_the_run(tmp_path, setting):
    (tmp_path / 'link').symlink_to(tmp_path / 'purged')
    folders = dict(ckpt_dir=str(tmp_path / 'ckpts'), data_dir=str(tmp_path / 'data')) | {
        setting: str(tmp_path / 'link')
    }
    with pytest.raises(SettingError, match=f'^{setting}=.* is a link to .*purged'):
        dry_run.look_at_folder(Config(**folders))
