"""Writes of checkpoints: in the background, whole or not at all, and the ones before stay."""

import os
import time

import pytest
import torch
from torch import nn

import saving
from runtime import stopping
from runtime.errors import SaveError
from training import writer as writer_module
from training.run_folder import last_path, open_folder
from training.writer import Writer, to_host, write_checkpoint


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
    """Also its strides, and again into the same memory."""
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
    """The state changes while it is written, and two are never written at once."""
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

    monkeypatch.setattr(writer_module, 'write_checkpoint', slow)
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
    monkeypatch.setattr(writer_module, 'RETRY_AFTER', (0.01, 0.01, 0.01))
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
    before = {path.name: path.read_bytes() for path in config.run_dir.glob('*.pt')}

    def full(state, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    for _ in range(3):
        with pytest.raises(OSError, match='No space'):
            write_checkpoint(config, dict(step=4))
    assert {path.name: path.read_bytes() for path in config.run_dir.glob('*.pt')} == before


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
