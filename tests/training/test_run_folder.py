"""The folder of a run: its name, its lock, the checkpoint that it resumes from, and which runs may resume in it."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import saving
from config import Config, SettingError
from tests.helpers import ROOT
from training import run_folder
from training.checkpoints import write_checkpoint
from training.run_folder import Identity


def test_a_new_run_has_a_config_and_no_checkpoint(tiny_config):
    config = tiny_config(base_lr=0.125)
    assert run_folder.open_folder(config) is None
    assert json.loads((config.run_dir / 'config.json').read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )


def test_another_config_in_the_folder_is_refused_with_the_differences(tiny_config):
    config = tiny_config(experiment_name='run')
    run_folder.open_folder(config)
    write_checkpoint(config, dict(step=4))
    before = (config.run_dir / 'config.json').read_text()
    with pytest.raises(SettingError) as caught:
        run_folder.open_folder(tiny_config(experiment_name='run', base_lr=0.5, channel_mults=(1, 3), log_every=9))
    assert 'base_lr: 0.001 -> 0.5' in str(caught.value) and 'channel_mults: (1, 2) -> (1, 3)' in str(caught.value)
    assert 'log_every' not in str(caught.value) and '--experiment_name' in str(caught.value)
    assert f'--init_from {config.run_dir}/last.pt' in str(caught.value) and 'trained longer' not in str(caught.value)
    assert (config.run_dir / 'config.json').read_text() == before


def test_training_longer_is_refused_with_the_schedules_that_allow_it(tiny_config):
    config = tiny_config(experiment_name='run')
    held(config)
    with pytest.raises(SettingError, match=r'12 -> 20\. .*longer: cosine ends .*inverse_sqrt do not.*init_from'):
        run_folder.open_folder(dataclasses.replace(config, num_training_steps=20), MINE)


def test_other_data_are_named_by_the_setting_of_their_location(tiny_config):
    """Here data_path changed, and data_dir has its default."""
    config = tiny_config(experiment_name='run', data_path='a')
    held(config)
    other = dataclasses.replace(config, data_path='b')
    with pytest.raises(SettingError, match=r"^data_path='b': the data are not those .*f00d -> 9 images"):
        run_folder.open_folder(other, dataclasses.replace(MINE, data='9 images'))


def test_free_settings_may_change(tiny_config):
    config = tiny_config(experiment_name='run')
    run_folder.open_folder(config)
    write_checkpoint(config, dict(step=4))
    changed = tiny_config(experiment_name='run', log_every=9, accumulation_steps=2, solver='euler', wandb='auto')
    assert run_folder.open_folder(changed)['step'] == 4
    assert json.loads((config.run_dir / 'config.json').read_text())['log_every'] == 9


# ---------------------------------------------------------------- which run it is

MINE = Identity('mine.py:Mine', {'mine.py': 'a = 1\nb = 2\n', 'base.py:Base': 'class Base: ...\n'}, '1500 images, f00d')


def held(config, identity=MINE, **objects):
    """Save a run; returns the files in its folder."""
    run_folder.open_folder(config, identity)
    write_checkpoint(config, dict(step=4, **vars(identity) | objects))
    return files(config)


def files(config):
    return {path.name: path.read_bytes() for path in config.run_dir.iterdir() if path.name != 'lock'}


@pytest.mark.parametrize('finished', [False, True])
@pytest.mark.parametrize(
    'other, words',
    [
        (dict(trainer='other.py:Other'), 'another trainer.*mine.py:Mine -> other.py:Other.*--experiment_name'),
        (
            dict(data='9 images, beef'),
            "data_dir='.*f00d -> 9 images, beef.*the old data.*--init_from .*run/last.pt",
        ),
        (
            dict(code=MINE.code | {'mine.py': 'a = 1\nb = 3\n'}),
            r'step 4.*--experiment_name.*--same_code.*\n-b = 2\n\+b = 3',
        ),
        (dict(code={'mine.py': MINE.code['mine.py']}), r'\n-class Base'),
        (dict(code=MINE.code | {'more.py:More': 'c'}), r'\n\+\+\+ more.py:More \(now\)\n.*\n\+c'),
    ],
    ids=['trainer', 'data', 'code', 'less code', 'more code'],
)
def test_a_run_of_another_is_refused_and_left_as_it_is(tiny_config, other, words, finished):
    config = tiny_config(experiment_name='run', num_training_steps=4)
    before = held(config, finished=finished)
    for now in (config, dataclasses.replace(config, log_every=9)):
        with pytest.raises(SettingError, match=f'(?s){words}'):
            run_folder.open_folder(now, dataclasses.replace(MINE, **other))
    assert files(config) == before
    assert run_folder.open_folder(config, MINE)['step'] == 4


def test_same_code_resumes_with_changed_code_and_prints_it(tiny_config, capsys):
    config = tiny_config(experiment_name='run')
    held(config)
    changed = dataclasses.replace(MINE, code={'mine.py': 'a = 5\n'})
    assert run_folder.open_folder(dataclasses.replace(config, same_code=True), changed)['step'] == 4
    assert 'the code has changed since step 4' in capsys.readouterr().out
    for other in (dict(trainer='x'), dict(data='x')):  # same_code does not allow these
        with pytest.raises(SettingError):
            run_folder.open_folder(dataclasses.replace(config, same_code=True), dataclasses.replace(MINE, **other))
    assert run_folder.open_folder(dataclasses.replace(config, same_code=True), MINE)['step'] == 4
    assert capsys.readouterr().out == ''


def test_a_long_diff_is_cut_to_40_lines(tiny_config):
    config = tiny_config(experiment_name='run')
    held(config, dataclasses.replace(MINE, code={'mine.py': ''}))
    with pytest.raises(SettingError) as caught:
        run_folder.open_folder(config, dataclasses.replace(MINE, code={'mine.py': '\n'.join(map(str, range(100)))}))
    _, *diff, rest = str(caught.value).splitlines()
    assert len(diff) == 40 and diff[:2] == ['--- mine.py (saved)', '+++ mine.py (now)']
    assert rest == '... and 63 more lines'  # 3 of the head and 100, less 40


def test_checkpoints_without_an_identity_are_accepted(tiny_config):
    config = tiny_config(experiment_name='run')
    run_folder.open_folder(config)
    write_checkpoint(config, dict(step=4))
    assert run_folder.open_folder(config, MINE)['step'] == 4


@pytest.mark.parametrize('trained', [False, True])
def test_a_new_folder_of_a_run_that_is_refused_is_removed_unless_it_was_trained(tiny_config, trained):
    config = tiny_config(experiment_name='run')
    run_folder.open_folder(config)
    (config.run_dir / 'metrics.jsonl').write_text('{}' if trained else '')
    if trained:
        write_checkpoint(config, dict(step=4))
    before = files(config)
    run_folder.discard_new(config)
    assert config.run_dir.exists() is trained
    assert not trained or files(config) == before
    assert (run_folder.open_folder(config) is not None) is trained  # and it can begin again
    assert (config.run_dir / 'lock').exists()


def test_a_folder_that_existed_before_is_never_removed(tiny_config):
    config = tiny_config(experiment_name='run')
    config.run_dir.mkdir(parents=True)
    run_folder.open_folder(config)
    run_folder.discard_new(config)
    assert files(config).keys() == {'config.json'}


# ---------------------------------------------------------------- default names


def start(config, trainer_class=None):
    """Start a run, which takes its folder; returns its name."""
    settled = run_folder.settle_name(config, trainer_class)
    assert dataclasses.replace(settled, experiment_name=config.experiment_name) == config
    run_folder.open_folder(settled)
    return settled.experiment_name


def edited(**defaults):
    """Config with these defaults, as if a user had edited them."""
    fields = [(name, type(value), value) for name, value in defaults.items()]
    return dataclasses.make_dataclass('Config', fields, bases=(Config,), frozen=True)


def test_edited_defaults_are_another_run_whose_name_shows_the_difference(tmp_path, capsys):
    folder = dict(ckpt_dir=str(tmp_path))
    assert start(Config(**folder)) == 'digits' == start(Config(**folder))
    assert capsys.readouterr().out == ''
    assert start(edited(base_lr=0.25)(**folder)) == 'digits_base_lr=0p25'
    (line,) = capsys.readouterr().out.splitlines()
    assert f'{tmp_path}/digits' in line and 'base_lr: 0.004 -> 0.25' in line and 'called digits_base_lr=0p25' in line
    assert start(edited(base_lr=0.25)(**folder)) == 'digits_base_lr=0p25'  # the same command resumes
    assert start(edited(log_every=7)(**folder)) == 'digits'  # the same experiment


def test_a_name_that_is_taken_too_is_made_longer(tmp_path):
    folder = dict(ckpt_dir=str(tmp_path))
    start(Config(**folder))
    taken = Config(experiment_name='digits_base_lr=0p25', base_lr=0.25, seed=7, **folder)
    assert start(taken) == 'digits_base_lr=0p25'
    assert start(edited(base_lr=0.25)(**folder)) == 'digits_base_lr=0p25_seed=0'


def test_each_of_many_edits_finds_its_own_name(tmp_path):
    names = set()
    for lr, seed, channels in itertools.product((0.001, 0.25), (0, 1), (32, 64)):
        config = edited(base_lr=lr, seed=seed, channels=channels)(ckpt_dir=str(tmp_path))
        names.add(name := start(config))
        assert start(config) == name
    assert len(names) == 8 and all(len(name) <= 120 for name in names)


def test_a_run_under_the_longer_name_of_older_versions_keeps_it(tmp_path):
    """Another run does not take that name: neither one with other settings, nor one whose name is short enough."""
    settings = dict(channels=8, channel_mults=(1, 2, 2), global_batch_size=32, num_training_steps=60, base_lr=0.002)
    config = Config(ckpt_dir=str(tmp_path), **settings)
    older = config.older_name()
    assert len(older) > 60 and len(config.experiment_name) <= 60
    started = dataclasses.replace(config, experiment_name=older)
    run_folder.open_folder(started)
    assert start(config) == older
    other = Config(ckpt_dir=str(tmp_path), **settings | dict(seed=1))
    assert start(other) == other.experiment_name != older
    (tmp_path / older / 'config.json').write_text((tmp_path / other.experiment_name / 'config.json').read_text())
    assert start(config) == config.experiment_name


def test_a_name_that_was_given_stays_and_another_config_is_refused(tmp_path):
    given = Config(experiment_name='mine', ckpt_dir=str(tmp_path))
    run_folder.open_folder(given)
    write_checkpoint(given, dict(step=4))
    other = dataclasses.replace(given, seed=5)
    assert run_folder.settle_name(other, int) is other
    with pytest.raises(SettingError, match='seed: 0 -> 5'):
        run_folder.open_folder(other)


def test_the_trainer_class_is_in_a_default_name(tmp_path):
    class Coupled: ...

    folder = dict(ckpt_dir=str(tmp_path))
    assert [start(Config(**folder), cls) for cls in (None, Coupled, Coupled)] == ['digits'] + 2 * ['digits_Coupled']
    assert start(edited(seed=3)(**folder), Coupled) == 'digits_Coupled_seed=3'
    assert Config().default_name('Coupled') == 'digits_Coupled'


def test_a_folder_without_a_readable_config_is_not_another_run(tmp_path):
    (tmp_path / 'digits').mkdir()
    assert run_folder.settle_name(Config(ckpt_dir=str(tmp_path))).experiment_name == 'digits'
    (tmp_path / 'digits' / 'config.json').write_text('{"seed')
    assert run_folder.settle_name(Config(ckpt_dir=str(tmp_path))).experiment_name == 'digits'


# ---------------------------------------------------------------- damaged checkpoints

DAMAGE = {
    'empty': lambda raw: b'',
    'cut': lambda raw: raw[: len(raw) // 2],
    'cut by one byte': lambda raw: raw[:-1],
    'zeros': lambda raw: bytes(len(raw)),
    'garbage': lambda raw: bytes(range(256)) * 20,
    'one bit': lambda raw: (at := raw.index(b'weightweight')) and raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :],
}
FILLER = torch.tensor(list(b'weight' * 500), dtype=torch.uint8)


def run_of(config, steps):
    """A run's folder after saves at these steps."""
    run_folder.open_folder(config)
    for step in steps:
        write_checkpoint(config, dict(step=step, finished=False, network=dict(w=FILLER)), keep=step % 10 == 0)


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(tiny_config, capsys, damage):
    config = tiny_config(num_training_steps=50)
    run_of(config, [10, 20, 25])
    last = run_folder.last_path(config)
    damaged = DAMAGE[damage](last.read_bytes())
    last.write_bytes(damaged)
    assert run_folder.open_folder(config)['step'] == 20
    assert str(last) in (out := capsys.readouterr().out) and 'resuming from last-1.pt, step 20' in out
    assert last.with_name('last.pt.damaged').read_bytes() == damaged  # kept for inspection
    assert saving.load(last)['step'] == 20  # so the next save makes a whole one the previous
    write_checkpoint(config, dict(step=26, finished=False))
    assert [saving.load(config.run_dir / name)['step'] for name in ('last.pt', 'last-1.pt')] == [26, 20]


def test_kept_checkpoints_are_the_last_resort_newest_first(tiny_config):
    config = tiny_config(num_training_steps=50)
    run_of(config, [10, 20, 25, 26])
    for name in ('last.pt', 'last-1.pt'):
        (config.run_dir / name).write_bytes(b'')
    assert run_folder.open_folder(config)['step'] == 20


def test_a_run_never_starts_over_on_top_of_damaged_checkpoints(tiny_config):
    config = tiny_config(num_training_steps=50)
    run_of(config, [10, 25])
    for path in config.run_dir.glob('*.pt'):
        path.write_bytes(path.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in config.run_dir.iterdir()}
    for _ in range(2):  # every time
        with pytest.raises(
            SettingError,
            match=r'no checkpoint that is whole.*last\.pt.*last-1\.pt.*step_0000010\.pt.*--experiment_name',
        ):
            run_folder.open_folder(config)
    lock = config.run_dir / 'lock'
    assert {path: raw for path, raw in before.items() if path != lock} == {
        path: path.read_bytes() for path in before if path != lock
    }


def test_a_missing_last_checkpoint_is_not_a_new_run(tiny_config):
    config = tiny_config(num_training_steps=50)
    run_of(config, [24, 25])
    run_folder.last_path(config).unlink()
    assert run_folder.open_folder(config)['step'] == 24


def test_a_checkpoint_of_a_newer_program_is_refused(tiny_config, monkeypatch):
    config = tiny_config(num_training_steps=50)
    run_of(config, [24])
    monkeypatch.setattr(saving, 'VERSION', saving.VERSION + 1)
    write_checkpoint(config, dict(step=25))
    monkeypatch.undo()
    with pytest.raises(SettingError, match=r'last\.pt.*format version 2.*reads up to 1.*git pull'):
        run_folder.open_folder(config)
    with pytest.raises(SettingError, match='format version 2'):
        saving.load_for_sampling(run_folder.last_path(config))


LOCK = """
import sys
from pathlib import Path
from training import run_folder
from config import SettingError
try:
    run_folder.lock_run(Path(sys.argv[1]))
    print('in', flush=True)
except SettingError as error:
    print(error, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    def start():
        process = subprocess.Popen(
            [sys.executable, '-c', LOCK, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return process, process.stdout.readline().strip()

    first, line = start()
    try:
        assert line == 'in'
        second, line = start()
        second.kill()
        assert f'process {first.pid} on {socket.gethostname()}' in line and '--experiment_name' in line
        first.kill()
        first.wait()
        third, line = start()  # the lock file of the first is still there
        third.kill()
        assert line == 'in'
    finally:
        first.kill()


@pytest.mark.parametrize('below', ['', 'below'])
def test_a_ckpt_dir_that_is_not_a_folder_is_named(tiny_config, tmp_path, below):
    (tmp_path / 'file').write_text('')
    folder = str(tmp_path / 'file' / below)
    with pytest.raises(SettingError, match='ckpt_dir') as caught:
        run_folder.open_folder(tiny_config(ckpt_dir=folder))
    assert folder in str(caught.value)


def test_a_finished_run_keeps_its_config_until_it_is_trained_longer(tiny_config):
    settings = dict(experiment_name='run', lr_schedule_type='constant')
    held(tiny_config(num_training_steps=4, **settings), finished=True)
    for steps, expected in ((4, (4, 3)), (8, (8, 9))):
        config = tiny_config(num_training_steps=steps, log_every=9, **settings)
        assert run_folder.open_folder(config, MINE)['step'] == 4
        written = json.loads((config.run_dir / 'config.json').read_text())
        assert (written['num_training_steps'], written['log_every']) == expected


def test_a_lock_names_its_last_holder_only(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, '_locks', {})
    (tmp_path / 'lock').write_text('process 1 on another machine, since 2020-02-20 20:20:20\n')
    for _ in range(2):
        run_folder.lock_run(tmp_path)
        (line,) = (tmp_path / 'lock').read_text().splitlines()
        assert line.startswith(f'process {os.getpid()} on {socket.gethostname()}, since ')
