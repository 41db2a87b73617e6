"""The folder of a run: what it goes on from, who may be in it, and writes in the background."""

import dataclasses
import itertools
import json
import random
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import saving
from config import Config, SettingError
from runtime import stopping
from runtime.errors import SaveError
from tests.helpers import ROOT
from training import run_folder
from training.run_folder import Identity


def test_a_new_run_has_a_config_and_no_checkpoint(tiny_config):
    config = tiny_config(base_lr=0.125)
    assert run_folder.load_run(config) is None
    assert json.loads((config.run_dir / 'config.json').read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )


def test_another_config_in_the_folder_is_refused_with_the_differences(tiny_config):
    config = tiny_config(experiment_name='run')
    run_folder.load_run(config)
    run_folder.save_run(config, None, step=4)
    before = (config.run_dir / 'config.json').read_text()
    with pytest.raises(SettingError) as caught:
        run_folder.load_run(tiny_config(experiment_name='run', base_lr=0.5, channel_mults=(1, 3), log_every=9))
    assert 'base_lr: 0.001 -> 0.5' in str(caught.value) and 'channel_mults: (1, 2) -> (1, 3)' in str(caught.value)
    assert 'log_every' not in str(caught.value) and '--experiment_name' in str(caught.value)
    assert (config.run_dir / 'config.json').read_text() == before


def test_free_settings_may_change(tiny_config):
    config = tiny_config(experiment_name='run')
    run_folder.load_run(config)
    run_folder.save_run(config, None, step=4)
    changed = tiny_config(experiment_name='run', log_every=9, accumulation_steps=2, solver='euler', wandb='auto')
    assert run_folder.load_run(changed)['step'] == 4
    assert json.loads((config.run_dir / 'config.json').read_text())['log_every'] == 9


# ---------------------------------------------------------------- whose run it is

MINE = Identity('mine.py:Mine', {'mine.py': 'a = 1\nb = 2\n', 'base.py:Base': 'class Base: ...\n'}, '1500 images, f00d')


def held(config, identity=MINE, **objects):
    """The folder of a run after a save, and what is in it."""
    run_folder.load_run(config, identity)
    writer = run_folder.Writer(config)
    writer.write(None, step=4, **vars(identity) | objects)
    writer.wait()
    return files(config)


def files(config):
    return {path.name: path.read_bytes() for path in config.run_dir.iterdir() if path.name != 'lock'}


@pytest.mark.parametrize('finished', [False, True])
@pytest.mark.parametrize(
    'other, words',
    [
        (dict(trainer='other.py:Other'), 'another trainer.*mine.py:Mine -> other.py:Other.*--experiment_name'),
        (dict(data='9 images, beef'), "data_dir='.*f00d -> 9 images, beef.*--experiment_name, or the old data"),
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
            run_folder.load_run(now, dataclasses.replace(MINE, **other))
    assert files(config) == before
    assert run_folder.load_run(config, MINE)['step'] == 4


def test_same_code_goes_on_with_changed_code_and_says_so(tiny_config, capsys):
    config = tiny_config(experiment_name='run')
    held(config)
    changed = dataclasses.replace(MINE, code={'mine.py': 'a = 5\n'})
    assert run_folder.load_run(dataclasses.replace(config, same_code=True), changed)['step'] == 4
    assert 'the code has changed since step 4' in capsys.readouterr().out
    for other in (dict(trainer='x'), dict(data='x')):  # these it does not allow
        with pytest.raises(SettingError):
            run_folder.load_run(dataclasses.replace(config, same_code=True), dataclasses.replace(MINE, **other))
    assert run_folder.load_run(dataclasses.replace(config, same_code=True), MINE)['step'] == 4
    assert capsys.readouterr().out == ''


def test_a_long_diff_is_cut_to_40_lines(tiny_config):
    config = tiny_config(experiment_name='run')
    held(config, dataclasses.replace(MINE, code={'mine.py': ''}))
    with pytest.raises(SettingError) as caught:
        run_folder.load_run(config, dataclasses.replace(MINE, code={'mine.py': '\n'.join(map(str, range(100)))}))
    _, *diff, rest = str(caught.value).splitlines()
    assert len(diff) == 40 and diff[:2] == ['--- mine.py (saved)', '+++ mine.py (now)']
    assert rest == '... and 63 more lines'  # 3 of the head and 100, less 40


def test_checkpoints_without_an_identity_are_accepted(tiny_config):
    config = tiny_config(experiment_name='run')
    run_folder.load_run(config)
    run_folder.save_run(config, None, step=4)
    assert run_folder.load_run(config, MINE)['step'] == 4


@pytest.mark.parametrize('trained', [False, True])
def test_a_new_folder_of_a_run_that_is_refused_is_removed_unless_it_was_trained(tiny_config, trained):
    config = tiny_config(experiment_name='run')
    run_folder.load_run(config)
    if trained:
        run_folder.save_run(config, None, step=4)
    before = files(config)
    run_folder.discard_new(config)
    assert config.run_dir.exists() is trained
    assert not trained or files(config) == before
    assert (run_folder.load_run(config) is not None) is trained  # and it can begin again
    assert (config.run_dir / 'lock').exists()


def test_a_folder_that_was_there_is_never_removed(tiny_config):
    config = tiny_config(experiment_name='run')
    config.run_dir.mkdir(parents=True)
    run_folder.load_run(config)
    run_folder.discard_new(config)
    assert files(config).keys() == {'config.json'}


# ---------------------------------------------------------------- default names


def start(config, trainer_class=None):
    """The name under which a run starts, its folder then being in use."""
    settled = run_folder.settle_name(config, trainer_class)
    assert dataclasses.replace(settled, experiment_name=config.experiment_name) == config
    run_folder.load_run(settled)
    return settled.experiment_name


def edited(**defaults):
    """Config as if its defaults had been edited."""
    fields = [(name, type(value), value) for name, value in defaults.items()]
    return dataclasses.make_dataclass('Config', fields, bases=(Config,), frozen=True)


def test_edited_defaults_are_another_run_with_a_name_that_says_what_differs(tmp_path, capsys):
    folder = dict(ckpt_dir=str(tmp_path))
    assert start(Config(**folder)) == 'digits' == start(Config(**folder))
    assert capsys.readouterr().out == ''
    assert start(edited(base_lr=0.25)(**folder)) == 'digits_base_lr=0p25'
    (line,) = capsys.readouterr().out.splitlines()
    assert f'{tmp_path}/digits' in line and 'base_lr: 0.004 -> 0.25' in line and 'called digits_base_lr=0p25' in line
    assert start(edited(base_lr=0.25)(**folder)) == 'digits_base_lr=0p25'  # the same command goes on
    assert start(edited(log_every=7)(**folder)) == 'digits'  # no other experiment


def test_a_name_that_is_taken_too_is_made_longer(tmp_path):
    folder = dict(ckpt_dir=str(tmp_path))
    start(Config(**folder))
    taken = Config(experiment_name='digits_base_lr=0p25', base_lr=0.25, seed=7, **folder)
    assert start(taken) == 'digits_base_lr=0p25'
    assert start(edited(base_lr=0.25)(**folder)) == 'digits_base_lr=0p25_seed=0'


def test_many_edits_each_find_a_name_of_their_own(tmp_path):
    names = set()
    for lr, seed, channels in itertools.product((0.001, 0.25), (0, 1), (32, 64)):
        config = edited(base_lr=lr, seed=seed, channels=channels)(ckpt_dir=str(tmp_path))
        names.add(name := start(config))
        assert start(config) == name
    assert len(names) == 8 and all(len(name) <= 120 for name in names)


def test_a_name_that_was_given_stays_and_another_config_is_refused(tmp_path):
    given = Config(experiment_name='mine', ckpt_dir=str(tmp_path))
    run_folder.load_run(given)
    run_folder.save_run(given, None, step=4)
    other = dataclasses.replace(given, seed=5)
    assert run_folder.settle_name(other, int) is other
    with pytest.raises(SettingError, match='seed: 0 -> 5'):
        run_folder.load_run(other)


def test_the_trainer_class_is_in_a_default_name(tmp_path):
    class Coupled: ...

    folder = dict(ckpt_dir=str(tmp_path))
    assert [start(Config(**folder), cls) for cls in (None, Coupled, Coupled)] == ['digits'] + 2 * ['digits_Coupled']
    assert start(edited(seed=3)(**folder), Coupled) == 'digits_Coupled_seed=3'
    assert Config().default_name('Coupled') == 'digits_Coupled'


def test_a_folder_without_a_readable_config_is_no_other_run(tmp_path):
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
    run_folder.load_run(config)
    for step in steps:
        run_folder.save_run(config, step if step % 10 == 0 else None, step=step, finished=False, network=dict(w=FILLER))


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(tiny_config, capsys, damage):
    config = tiny_config(num_training_steps=50)
    run_of(config, [10, 20, 25])
    last = run_folder.last_path(config)
    damaged = DAMAGE[damage](last.read_bytes())
    last.write_bytes(damaged)
    assert run_folder.load_run(config)['step'] == 20
    assert str(last) in (out := capsys.readouterr().out) and 'going on from last-1.pt, step 20' in out
    assert last.with_name('last.pt.damaged').read_bytes() == damaged  # nothing is lost
    assert saving.load(last)['step'] == 20  # and the next save pushes a good one back
    run_folder.save_run(config, None, step=26, finished=False)
    assert [saving.load(config.run_dir / name)['step'] for name in ('last.pt', 'last-1.pt')] == [26, 20]


def test_kept_checkpoints_are_the_last_resort_newest_first(tiny_config):
    config = tiny_config(num_training_steps=50)
    run_of(config, [10, 20, 25, 26])
    for name in ('last.pt', 'last-1.pt'):
        (config.run_dir / name).write_bytes(b'')
    assert run_folder.load_run(config)['step'] == 20


def test_a_run_never_begins_anew_over_remains(tiny_config):
    config = tiny_config(num_training_steps=50)
    run_of(config, [10, 25])
    for path in config.run_dir.glob('*.pt'):
        path.write_bytes(path.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in config.run_dir.iterdir()}
    for _ in range(2):  # it says so every time
        with pytest.raises(
            SettingError,
            match=r'no checkpoint that is whole.*last\.pt.*last-1\.pt.*step_0000010\.pt.*--experiment_name',
        ):
            run_folder.load_run(config)
    lock = config.run_dir / 'lock'
    assert {path: raw for path, raw in before.items() if path != lock} == {
        path: path.read_bytes() for path in before if path != lock
    }


def test_a_missing_last_checkpoint_is_no_new_run_either(tiny_config):
    config = tiny_config(num_training_steps=50)
    run_of(config, [24, 25])
    run_folder.last_path(config).unlink()
    assert run_folder.load_run(config)['step'] == 24


def test_a_checkpoint_of_a_newer_program_is_refused(tiny_config, monkeypatch):
    config = tiny_config(num_training_steps=50)
    run_of(config, [24])
    monkeypatch.setattr(saving, 'VERSION', saving.VERSION + 1)
    run_folder.save_run(config, None, step=25)
    monkeypatch.undo()
    with pytest.raises(SettingError, match=r'last\.pt.*format version 2.*reads up to 1.*git pull'):
        run_folder.load_run(config)
    with pytest.raises(SettingError, match='format version 2'):
        saving.load_for_sampling(run_folder.last_path(config))


@pytest.mark.parametrize('keep_last', [1, 2, 4])
def test_the_last_k_and_every_mth_are_kept(tiny_config, keep_last):
    config = tiny_config(keep_last=keep_last)
    run_of(config, range(1, 24))
    kept = {path.name: saving.load(path)['step'] for path in config.run_dir.glob('*.pt')}
    expected = {'last.pt': 23} | {f'last-{i}.pt': 23 - i for i in range(1, keep_last)}
    assert kept == expected | {'step_0000010.pt': 10, 'step_0000020.pt': 20}
    assert not list(config.run_dir.glob('.*'))


def test_links_to_one_file_leave_no_rest(tmp_path):
    (tmp_path / 'a').write_text('x')
    run_folder.link_as(tmp_path / 'a', tmp_path / 'b')
    run_folder.link_as(tmp_path / 'a', tmp_path / 'b')  # rename does nothing then, and leaves its source
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'b']


def test_a_copy_in_main_memory_stays_as_it_was():
    """Also its strides, and again into the same memory."""
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    value = dict(a=[weight, (torch.tensor(3), 'text', None)], b=torch.nn.Parameter(torch.ones(3)))
    host = run_folder.to_host(value)
    then = weight.clone()
    weight.zero_()
    assert (
        torch.equal(host['a'][0], then)
        and host['a'][0].stride() == weight.stride()
        and host['a'][1][1:] == ('text', None)
    )
    assert not host['b'].requires_grad
    again = run_folder.to_host(value, host)
    assert again['a'][0].data_ptr() == host['a'][0].data_ptr() and not again['a'][0].any()
    other = run_folder.to_host(dict(a=[torch.ones(7)]), host)
    assert torch.equal(other['a'][0], torch.ones(7))


def test_a_background_write_holds_the_state_of_its_moment(tiny_config, monkeypatch):
    """The state changes while it is written, and two are never written at once."""
    config = tiny_config(num_training_steps=50)
    run_folder.load_run(config)
    writer, network, busy = run_folder.Writer(config), nn.Linear(100, 100), []
    write = run_folder.save_run

    def slow(*args, **kwargs):
        busy.append(1)
        assert len(busy) == 1
        time.sleep(0.2)
        write(*args, **kwargs)
        busy.pop()

    monkeypatch.setattr(run_folder, 'save_run', slow)
    for step in (1, 2, 3):
        nn.init.constant_(network.weight, step)
        began = time.monotonic()
        writer.write(None, step=step, network=network)
        assert step > 1 or time.monotonic() - began < 0.1
        nn.init.constant_(network.weight, -1)
    writer.wait()
    steps = {name: saving.load(config.run_dir / name) for name in ('last.pt', 'last-1.pt')}
    assert [state['step'] for state in steps.values()] == [3, 2]
    assert all((state['network']['weight'] == state['step']).all() for state in steps.values())


@pytest.mark.parametrize('failures', [1, 2, 4])
def test_a_write_that_fails_is_tried_again_and_then_an_error_that_names_the_folder(tiny_config, monkeypatch, failures):
    config = tiny_config()
    run_folder.load_run(config)
    write, left = torch.save, [failures]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, 'No space left on device')
        write(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', full)
    monkeypatch.setattr(run_folder, 'RETRY_AFTER', (0.01, 0.01, 0.01))
    monkeypatch.setattr(stopping, '_stop_asked', False)
    writer = run_folder.Writer(config)
    writer.write(None, step=7)
    if failures < 4:
        writer.wait()
        assert saving.load(run_folder.last_path(config))['step'] == 7 and not stopping._stop_asked
    else:
        with pytest.raises(SaveError, match=f'{config.ckpt_dir}.*step 7.*No space left.*Make room'):
            writer.wait()
        assert stopping._stop_asked and not run_folder.last_path(config).exists()


def test_failed_writes_leave_all_earlier_saves_as_they_were(tiny_config, monkeypatch):
    config = tiny_config(keep_last=3)
    run_of(config, [1, 2, 3])
    before = {path.name: path.read_bytes() for path in config.run_dir.glob('*.pt')}

    def full(state, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    for _ in range(3):
        with pytest.raises(OSError, match='No space'):
            run_folder.save_run(config, None, step=4)
    assert {path.name: path.read_bytes() for path in config.run_dir.glob('*.pt')} == before


def test_a_save_of_the_same_step_leaves_the_one_before(tiny_config):
    config = tiny_config()
    run_folder.load_run(config)
    writer = run_folder.Writer(config)
    for step, finished in ((4, False), (8, False), (8, True)):
        writer.write(None, step=step, finished=finished)
    writer.wait()
    last, before = (saving.load(config.run_dir / name) for name in ('last.pt', 'last-1.pt'))
    assert (last['step'], last['finished'], before['step']) == (8, True, 4)


def test_an_error_of_any_kind_in_the_background_is_no_save(tiny_config, monkeypatch):
    config = tiny_config()
    run_folder.load_run(config)
    monkeypatch.setattr(stopping, '_stop_asked', False)
    writer = run_folder.Writer(config)
    writer.write(None, step=4, network=lambda: 'cannot be pickled')
    with pytest.raises(SaveError, match='step 4'):
        writer.wait()


def test_fewer_saves_are_kept_when_keep_last_is_lowered(tiny_config):
    run_of(tiny_config(experiment_name='run', keep_last=4), range(1, 6))
    config = tiny_config(experiment_name='run', keep_last=2)
    run_folder.save_run(config, None, step=6)
    assert sorted(path.name for path in config.run_dir.glob('*.pt')) == ['last-1.pt', 'last.pt']


def test_a_flipped_bit_of_any_byte_is_noticed_or_harmless(tmp_path):
    path = tmp_path / 'a.pt'
    weight = torch.arange(6.0)
    saving.save(path, step=7, weight=weight)
    raw = path.read_bytes()
    rng = random.Random(0)
    for i in range(len(raw)):
        bit = rng.randrange(8)
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1 :])
        try:
            state = saving.load(path)
        except saving.DamagedCheckpoint:
            continue
        assert state['step'] == 7 and torch.equal(state['weight'], weight), (i, bit)


LOCK = """
import sys
from pathlib import Path
from runtime import run_folder
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

    first, said = start()
    try:
        assert said == 'in'
        second, said = start()
        second.kill()
        assert f'process {first.pid} on {socket.gethostname()}' in said and '--experiment_name' in said
        first.kill()
        first.wait()
        third, said = start()  # its file is still there
        third.kill()
        assert said == 'in'
    finally:
        first.kill()


@pytest.mark.parametrize('below', ['', 'below'])
def test_a_ckpt_dir_that_is_no_folder_is_named(tiny_config, tmp_path, below):
    (tmp_path / 'file').write_text('')
    folder = str(tmp_path / 'file' / below)
    with pytest.raises(SettingError, match='ckpt_dir') as caught:
        run_folder.load_run(tiny_config(ckpt_dir=folder))
    assert folder in str(caught.value)


@pytest.mark.parametrize('links', [True, False])
def test_a_kept_checkpoint_survives_the_next_save(tiny_config, monkeypatch, links):
    if not links:

        def no_link(*_):
            raise OSError('not on this file system')

        monkeypatch.setattr(run_folder.os, 'link', no_link)
    config = tiny_config()
    run_folder.load_run(config)
    run_folder.save_run(config, 4, step=4)
    kept = config.run_dir / 'step_0000004.pt'
    before = kept.read_bytes()
    assert before == run_folder.last_path(config).read_bytes()
    run_folder.save_run(config, None, step=5)
    run_folder.save_run(config, 8, step=8)
    assert kept.read_bytes() == before and saving.load(kept)['step'] == 4
    assert saving.load(run_folder.last_path(config))['step'] == 8
    assert sorted(path.name for path in config.run_dir.iterdir()) == [
        'config.json',
        'last-1.pt',
        'last.pt',
        'lock',
        'step_0000004.pt',
        'step_0000008.pt',
    ]
    assert saving.load(config.run_dir / 'last-1.pt')['step'] == 5
