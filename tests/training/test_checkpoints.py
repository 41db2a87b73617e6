"""Saving and restoring checkpoints, with real files and with small parts in place of a trainer's."""

import copy
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import saving
from config import SettingError
from ema import EMA
from networks import get_network
from runtime import stopping
from runtime.errors import NonFiniteLoss, SaveError
from tests.helpers import assert_same
from tests.runtime.test_ranks import run_ranks
from training import checkpoints as module
from training.bad_steps import BadSteps
from training.checkpoints import Checkpoints, Writer, to_host, write_checkpoint
from training.run_folder import Identity, last_path, open_folder

SHAPE, CLASSES = (1, 8, 8), 10
MINE = Identity('mine.py:Mine', {'mine.py': 'a = 1\n'}, '1500 images, f00d')
IN_A_FILE = (  # the entries that previous versions wrote, and `facts`
    'version config trainer code data shape num_classes cond classes about_data facts step finished wandb_id '
    'bad_steps record network ema optimizer modules emas optimizers state'
)


class Record:
    def __init__(self):
        self.wandb_id, self.sums = None, {}

    def state_dict(self):
        return self.sums

    def load_state_dict(self, sums):
        self.sums = sums


class Experiment:
    def __init__(self):
        self.scale = None

    def state(self):
        return {'scale': self.scale}

    def load_state(self, state):
        self.scale = state['scale']


def about():
    return dict(shape=SHAPE, num_classes=CLASSES, classes=list('ab'), about_data='1500 images', cond={}, facts={})


def make(config, identity=MINE, seed=0, names=('network', 'critic')):
    """Checkpoints of two networks with optimizers and averages, after two steps from weights of this seed."""
    held = dict(modules={}, optimizers={}, emas={}, record=Record(), experiment=Experiment(), about=about)
    held['bad_steps'] = BadSteps(config, torch.device('cpu'))
    checkpoints = Checkpoints(config, identity, held)
    torch.manual_seed(seed)
    for name in names:  # filled later, as by setup_networks
        module = get_network(config, SHAPE, CLASSES) if name == 'network' else nn.Linear(2, 2)
        held['modules'][name] = module
        held['emas'][name] = EMA(module, config.ema_decays)
        held['optimizers'][name] = optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(2):
            for p in module.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            held['emas'][name].update(module)
    held['record'].sums = {'train/loss': torch.tensor([seed + 0.5, 1.0])}
    held['record'].wandb_id = f'id{seed}'
    held['experiment'].scale = float(seed)
    held['bad_steps'].counts += seed
    return checkpoints


def saved(config, step=4, **more):
    checkpoints = make(config, seed=1)
    checkpoints.restore()
    checkpoints.save(step, wait=True, **more)
    return checkpoints


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_everything_is_restored_in_place(tiny_config):
    config = tiny_config(experiment_name='run')
    first, second = saved(config), make(config)
    networks = copy.copy(second.held['modules'])
    before = copy.deepcopy(first.objects(4, False))
    assert second.restore() == 4
    assert_same(second.objects(4, False), before)
    assert second.held['modules']['network'] is networks['network'] and not second.finished
    assert second.held['record'].wandb_id == 'id1' and second.held['experiment'].scale == 1.0


def test_the_names_in_a_file_are_the_same_as_in_earlier_versions(tiny_config):
    config = tiny_config(experiment_name='run')
    held = saved(config).held
    state = saving.load_checkpoint(config.run_dir / 'last.pt')
    assert sorted(state) == sorted(IN_A_FILE.split())
    assert [list(state[group]) for group in ('modules', 'emas', 'optimizers')] == 3 * [['critic']]
    assert_same(state['network'], dict(held['modules']['network'].state_dict()))
    assert state['optimizer']['state'] and state['ema']['num_updates'] == 2
    assert (state['trainer'], state['code'], state['data']) == (MINE.trainer, MINE.code, MINE.data)
    loaded, _, its_config = saving.load_for_sampling(config.run_dir / 'last.pt')
    assert its_config == config
    assert_same(dict(loaded.state_dict()), dict(held['emas']['network'].networks[0.999].state_dict()))


@pytest.mark.parametrize(
    ('steps', 'saved_finished', 'finished'), [(12, True, True), (16, True, False), (12, False, False)]
)
def test_a_run_is_finished_if_it_was_and_has_no_more_steps_now(tiny_config, capsys, steps, saved_finished, finished):
    settings = dict(experiment_name='run', lr_schedule_type='constant')
    assert saved(tiny_config(**settings), 12, finished=saved_finished).finished is saved_finished
    capsys.readouterr()
    again = make(tiny_config(num_training_steps=steps, **settings))
    assert again.restore() == 12 and again.finished is finished
    assert ('resuming' in capsys.readouterr().out) is not finished


def test_reading_writes_nothing_and_training_is_refused(tiny_config, capsys):
    config = tiny_config(experiment_name='run', keep_every=4)
    saved(config)
    before = files_of(Path(config.ckpt_dir))
    reader = make(config, Identity('other.py:Other', {}, 'other data'))
    assert reader.restore(config.run_dir / 'step_0000004.pt') == 4
    assert 'was trained on other data' in (out := capsys.readouterr().out) and 'reading' in out
    assert reader.held['experiment'].scale == 1.0
    for refused in (reader.refuse_if_read_only, lambda: reader.save(5)):
        with pytest.raises(
            SettingError, match=r'opened to read \(load_run\). To continue training, call `main` or run.sh with'
        ):
            refused()
    assert files_of(Path(config.ckpt_dir)) == before
    make(config).refuse_if_read_only()


def test_every_keep_every_th_step_is_kept(tiny_config):
    config = tiny_config(experiment_name='run', keep_every=4)
    checkpoints = saved(config, 0)
    for step in (3, 4, 6, 8):
        checkpoints.save(step)
    checkpoints.wait()
    kept = {path.name: saving.load(path)['step'] for path in config.run_dir.glob('*.pt')}
    assert kept == {'last.pt': 8, 'last-1.pt': 6, 'step_0000004.pt': 4, 'step_0000008.pt': 8}


def test_a_checkpoint_of_other_parts_is_refused(tiny_config):
    config = tiny_config(experiment_name='run')
    saved(config)
    with pytest.raises(
        SettingError, match=r"last\.pt' has modules \['critic'\].*Experiment has \[\].*--experiment_name"
    ):
        make(config, names=['network']).restore()


@pytest.mark.parametrize(
    ('value', 'is_kept'), [(np.float64(2.0), False), (Path('a'), False), ([2.0, {'a': 'b'}], True)]
)
def test_a_state_that_could_not_be_loaded_again_is_refused(tiny_config, value, is_kept):
    checkpoints = make(tiny_config())
    checkpoints.check()
    checkpoints.held['experiment'].scale = value
    if is_kept:
        checkpoints.check()
    else:
        with pytest.raises(SettingError, match=r'Experiment: a checkpoint cannot hold what `state` gives.*float\(x\)'):
            checkpoints.check()


def test_an_optimizer_that_could_not_be_loaded_again_is_refused(tiny_config):
    checkpoints = make(tiny_config())
    checkpoints.held['optimizers']['critic'].param_groups[0]['lr'] = np.float64(0.1)
    with pytest.raises(SettingError, match='what `optimizers` gives'):
        checkpoints.check()


def test_the_check_reads_to_main_memory_whatever_device_the_tensors_are_on(tiny_config, monkeypatch):
    checkpoints, load, places = make(tiny_config()), torch.load, []
    monkeypatch.setattr(torch, 'load', lambda *a, **k: (places.append(k.get('map_location')), load(*a, **k)))
    checkpoints.check()
    assert places == ['cpu', 'cpu']


def test_after_too_many_bad_steps_nothing_is_saved(tiny_config):
    checkpoints = saved(config := tiny_config(experiment_name='run'))
    checkpoints.held['bad_steps'].counts[0] = config.max_bad_steps
    before = files_of(config.run_dir)
    with pytest.raises(NonFiniteLoss):
        checkpoints.save(8, wait=True)
    assert files_of(config.run_dir) == before


def test_a_write_is_finished_however_training_ends(tiny_config, monkeypatch):
    config, write = tiny_config(experiment_name='run'), module.write_checkpoint
    checkpoints = saved(config)
    monkeypatch.setattr(module, 'write_checkpoint', lambda *a, **k: (time.sleep(0.3), write(*a, **k)))
    with pytest.raises(ZeroDivisionError), checkpoints:
        began = time.monotonic()
        checkpoints.save(8)
        assert time.monotonic() - began < 0.2
        _ = 1 / 0
    assert saving.load(config.run_dir / 'last.pt')['step'] == 8


def test_a_write_that_failed_is_raised_by_the_next_save(tiny_config, monkeypatch):
    checkpoints = saved(tiny_config(experiment_name='run'))
    monkeypatch.setattr(stopping, '_stop_asked', False)
    monkeypatch.setattr(module, 'write_checkpoint', lambda *_, **__: 1 / 0)
    checkpoints.save(8)
    checkpoints.__exit__()
    with pytest.raises(SaveError, match='step 8 cannot be written'):
        checkpoints.save(12)


# ---------------------------------------------------------------- the weights of another run


def test_a_new_run_starts_from_the_averaged_weights_of_init_from(tiny_config, capsys):
    other = tiny_config(experiment_name='other')
    average = saved(other).held['emas']['network'].networks[0.999].state_dict()
    config = tiny_config(experiment_name='run', init_from=str(other.run_dir / 'last.pt'), model_type='x0')
    checkpoints = make(config)
    assert checkpoints.restore() == 0
    ema = checkpoints.held['emas']['network']
    for network in (checkpoints.held['modules']['network'], ema.networks[0.999]):
        assert_same(dict(network.state_dict()), dict(average))
    assert ema.num_updates == 0 and checkpoints.held['record'].wandb_id == 'id0'
    out = capsys.readouterr().out
    assert f'starting from the weights of {config.init_from}' in out and f'model_type: {other.model_type} -> x0' in out


def test_a_run_that_resumes_needs_no_init_from(tiny_config):
    other = tiny_config(experiment_name='other')
    saved(other)
    config = tiny_config(experiment_name='run', init_from=str(other.run_dir / 'last.pt'))
    saved(config)
    (other.run_dir / 'last.pt').unlink()
    assert make(config).restore() == 4


# ---------------------------------------------------------------- the file


def run_of(config, steps):
    """A run's folder after saves at these steps."""
    open_folder(config)
    for step in steps:
        write_checkpoint(config, dict(step=step), keep=step % 10 == 0)


@pytest.mark.parametrize('keep_last', [1, 2, 4])
def test_the_last_k_and_every_mth_are_kept(tiny_config, keep_last):
    config = tiny_config(keep_last=keep_last)
    run_of(config, range(1, 24))
    kept = {path.name: saving.load(path)['step'] for path in config.run_dir.glob('*.pt')}
    expected = {'last.pt': 23} | {f'last-{i}.pt': 23 - i for i in range(1, keep_last)}
    assert kept == expected | {'step_0000010.pt': 10, 'step_0000020.pt': 20}
    assert not list(config.run_dir.glob('.*'))


def test_a_copy_in_main_memory_stays_as_it_was():
    """It keeps the strides, and a second copy reuses the memory."""
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    value = dict(a=[weight, (torch.tensor(3), 'text', None)], b=torch.nn.Parameter(torch.ones(3)))
    host = to_host(value)
    then = weight.clone()
    weight.zero_()
    assert (
        torch.equal(host['a'][0], then)
        and host['a'][0].stride() == weight.stride()
        and host['a'][1][1:] == ('text', None)
    )
    assert not host['b'].requires_grad
    again = to_host(value, host)
    assert again['a'][0].data_ptr() == host['a'][0].data_ptr() and not again['a'][0].any()
    other = to_host(dict(a=[torch.ones(7)]), host)
    assert torch.equal(other['a'][0], torch.ones(7))


def test_a_background_write_holds_the_state_of_its_moment(tiny_config, monkeypatch):
    """Even if the state changes while it is written. Two writes never overlap."""
    config = tiny_config(num_training_steps=50)
    open_folder(config)
    writer, network, busy = Writer(config), nn.Linear(100, 100), []
    write = write_checkpoint

    def slow(*args, **kwargs):
        busy.append(1)
        assert len(busy) == 1
        time.sleep(0.2)
        write(*args, **kwargs)
        busy.pop()

    monkeypatch.setattr(module, 'write_checkpoint', slow)
    for step in (1, 2, 3):
        nn.init.constant_(network.weight, step)
        began = time.monotonic()
        writer.write(dict(step=step, network=network.state_dict()), keep=False)
        assert step > 1 or time.monotonic() - began < 0.1
        nn.init.constant_(network.weight, -1)
    writer.wait()
    steps = {name: saving.load(config.run_dir / name) for name in ('last.pt', 'last-1.pt')}
    assert [state['step'] for state in steps.values()] == [3, 2]
    assert all((state['network']['weight'] == state['step']).all() for state in steps.values())


@pytest.mark.parametrize('failures', [1, 2, 4])
def test_a_write_that_fails_is_tried_again_and_then_an_error_that_names_the_folder(tiny_config, monkeypatch, failures):
    config = tiny_config()
    open_folder(config)
    write, left = torch.save, [failures]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, 'No space left on device')
        write(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', full)
    monkeypatch.setattr(module, 'RETRY_AFTER', (0.01, 0.01, 0.01))
    monkeypatch.setattr(stopping, '_stop_asked', False)
    writer = Writer(config)
    writer.write(dict(step=7), keep=False)
    if failures < 4:
        writer.wait()
        assert saving.load(last_path(config))['step'] == 7 and not stopping._stop_asked
    else:
        with pytest.raises(SaveError, match=f'{config.ckpt_dir}.*step 7.*No space left.*Make room'):
            writer.wait()
        assert stopping._stop_asked and not last_path(config).exists()


def test_failed_writes_leave_all_earlier_saves_as_they_were(tiny_config, monkeypatch):
    config = tiny_config(keep_last=3)
    run_of(config, [1, 2, 3])
    before = files_of(config.run_dir)

    def full(state, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    for _ in range(3):
        with pytest.raises(OSError, match='No space'):
            write_checkpoint(config, dict(step=4))
    assert files_of(config.run_dir) == before


def test_the_old_file_is_there_until_the_new_one_is_whole(tiny_config, monkeypatch):
    config, write, seen = tiny_config(), torch.save, []
    run_of(config, [7])

    def write_and_look(state, file):
        write(state, file)
        file.flush()
        seen.append(saving.load(last_path(config))['step'])

    monkeypatch.setattr(torch, 'save', write_and_look)
    write_checkpoint(config, dict(step=8))
    assert seen == [7] and saving.load(last_path(config))['step'] == 8


def test_a_save_of_the_same_step_leaves_the_one_before(tiny_config):
    config = tiny_config()
    open_folder(config)
    writer = Writer(config)
    for step, finished in ((4, False), (8, False), (8, True)):
        writer.write(dict(step=step, finished=finished), keep=False)
    writer.wait()
    last, before = (saving.load(config.run_dir / name) for name in ('last.pt', 'last-1.pt'))
    assert (last['step'], last['finished'], before['step']) == (8, True, 4)


def test_any_error_in_the_background_is_a_SaveError(tiny_config, monkeypatch):
    config = tiny_config()
    open_folder(config)
    monkeypatch.setattr(stopping, '_stop_asked', False)
    writer = Writer(config)
    writer.write(dict(step=4, network=lambda: 'cannot be pickled'), keep=False)
    with pytest.raises(SaveError, match='step 4'):
        writer.wait()


def test_fewer_saves_are_kept_when_keep_last_is_lowered(tiny_config):
    run_of(tiny_config(experiment_name='run', keep_last=4), range(1, 6))
    config = tiny_config(experiment_name='run', keep_last=2)
    write_checkpoint(config, dict(step=6))
    assert sorted(path.name for path in config.run_dir.glob('*.pt')) == ['last-1.pt', 'last.pt']


@pytest.mark.parametrize('links', [True, False])
def test_a_kept_checkpoint_survives_the_next_save(tiny_config, monkeypatch, links):
    if not links:

        def no_link(*_):
            raise OSError('not on this file system')

        monkeypatch.setattr(os, 'link', no_link)
    config = tiny_config()
    open_folder(config)
    write_checkpoint(config, dict(step=4), keep=True)
    kept = config.run_dir / 'step_0000004.pt'
    before = kept.read_bytes()
    assert before == last_path(config).read_bytes()
    write_checkpoint(config, dict(step=5))
    write_checkpoint(config, dict(step=8), keep=True)
    assert kept.read_bytes() == before and saving.load(kept)['step'] == 4
    assert saving.load(last_path(config))['step'] == 8
    assert sorted(path.name for path in config.run_dir.iterdir()) == [
        'config.json',
        'last-1.pt',
        'last.pt',
        'lock',
        'step_0000004.pt',
        'step_0000008.pt',
    ]
    assert saving.load(config.run_dir / 'last-1.pt')['step'] == 5


# ---------------------------------------------------------------- several processes

RANKS = """
import json, sys, time
from pathlib import Path
import torch
from config import Config
from runtime import ranks
from runtime.errors import SaveError
from tests.training.test_checkpoints import make, saving, module

class Record:
    wandb_id, mine = None, 1.0
    def state_dict(self):
        return {'sum': ranks.all_reduce(torch.tensor([self.mine]))}
    def load_state_dict(self, sums):
        self.mine = sums['sum'].item() if ranks.is_main() else 0.0

ranks.setup()
folder, rank, seen = Path(sys.argv[1]), ranks.rank(), {}
tiny = dict(channels=8, num_res_blocks=1, attention_resolutions=(), ema_decays=(0.999,))
config = Config(ckpt_dir=str(folder / 'ckpts'), experiment_name='run', **tiny)
first, second = make(config), make(config, seed=1)
first.held['record'], second.held['record'] = Record(), Record()
first.restore()
writes, write = [], module.write_checkpoint
module.write_checkpoint = lambda *a, **k: (writes.append(rank), write(*a, **k))
first.save(4, wait=True)
seen['writes'], seen['step'] = writes, second.restore()
pairs = zip(*(c.held['modules']['network'].state_dict().values() for c in (first, second)), strict=True)
seen['same'] = all(a.equal(b) for a, b in pairs)
seen['sum'] = second.objects(4, False)['record']['sum'].item()
module.RETRY_AFTER = ()
module.write_checkpoint = lambda *a, **k: 1 / 0
try:
    first.save(8, wait=True)
except SaveError as error:
    seen['error'] = str(error)
Path(folder, f'{rank}.json').write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_the_first_of_two_processes_writes_and_both_restore_and_fail_together(tmp_path):
    for rank, seen in enumerate(run_ranks(RANKS, tmp_path, [0, 1])):
        assert seen['writes'] == [0] * (rank == 0) and seen['step'] == 4 and seen['same']
        assert seen['sum'] == 2.0 and 'step 8 cannot be written' in seen['error']


def test_the_names_of_checkpoints_survive_a_power_cut_too(tiny_config, monkeypatch):
    config, synced = tiny_config(keep_every=4), []
    config.run_dir.mkdir(parents=True)
    names = lambda folder: sorted(path.name for path in folder.iterdir())  # noqa: E731
    monkeypatch.setattr(module, 'sync', lambda folder: synced.append((folder, names(folder))))
    write_checkpoint(config, dict(step=4), keep=True)
    assert synced == [(config.run_dir, ['last.pt', 'step_0000004.pt'])]
