"""main.load_run: a run's trainer in another process, read-only, by the class and file that run.json names."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from config import SettingError
from main import load_run
from runtime import importing
from tests.helpers import ROOT, TINY, launch_env, record_of
from training import run_folder

pytestmark = pytest.mark.slow

SCRIPT = """
import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from config import Config
from main import main
from networks.residual_mlp import MLP
from networks import NETWORKS
from runtime import stopping
from solvers import SOLVERS
from trainer import ExampleDiffusionTrainer


@dataclass(frozen=True)
class MyConfig(Config):
    depth: int = 2


NETWORKS['mine'] = lambda config, shape, num_classes: MLP(shape, num_classes, 32, config.depth, dropout=config.dropout)
SOLVERS['of_mine'] = replace(SOLVERS['heun'])


class Mine(ExampleDiffusionTrainer):
    def train_step(self, micro_batches):
        super().train_step(micro_batches)
        if self.step == int(os.environ.get('STOP_AT', 0)):
            stopping.ask_to_stop()

    def show(self, name, x, inputs):
        super().show(name, x, inputs)
        torch.save(x, os.path.join(os.path.dirname(__file__), f'{name}.pt'))


if __name__ == '__main__':
    main(trainer_class=Mine, config_class=MyConfig)
"""

# Script of another process, which prints what it reads from the run, as JSON.
READER = """
import json
import sys
from pathlib import Path

import torch

import saving
from config import SettingError
from main import load_run

run, middle, folder = map(Path, sys.argv[1:])
facts = {}


def load(*args, **settings):
    return load_run(*args, trust=True, **settings)


def error_of(fn):
    try:
        fn()
    except SettingError as error:
        return str(error)


facts['names mine.py'] = error_of(lambda: saving.load_for_sampling(run / 'last.pt'))
kept = saving.load(run / 'last.pt')
states = {f'ema_{decay:g}': state for decay, state in kept['ema']['networks'].items()} | {'raw': kept['network']}
for weights in ('ema', 'raw', 'ema_0.9', 'ema_0.5'):
    trainer = load(run, weights=weights)
    mine = trainer.network.state_dict()
    facts[weights] = [name for name, state in states.items() if all(mine[key].equal(state[key]) for key in state)]
    if weights == 'ema':
        facts['classes'] = [type(trainer).__name__, type(trainer.config).__name__, trainer.config.depth, trainer.step]
    if weights in ('ema', 'raw'):
        name = 'ema_0.5' if weights == 'ema' else 'raw'
        inputs = trainer.sample_inputs(trainer.gallery.num_shown)
        for solver, sampler in trainer.samplers().items():
            x = trainer.drawing.samples(sampler, trainer.network, inputs)
            facts[f'{solver}_{name}'] = x.equal(torch.load(folder / f'step_0000012_{solver}_{name}.pt'))
    raw = trainer.weights()['raw'].state_dict()
    facts[f'raw of {weights}'] = all(raw[key].equal(kept['network'][key]) for key in raw)
facts['no setting'] = error_of(lambda: load(run, steps=3))
budget = load(run, sample_nfe=4).config
facts['steps'] = [budget.sample_nfe, load(run, num_sample_steps=7).config.sample_nfe]
facts['unknown'] = error_of(lambda: load(run, weights='ema_0.99'))
network, _, _ = saving.load_for_sampling(run / 'last.pt', config_class=type(trainer.config))
facts['load_for_sampling'] = all(value.equal(states['ema_0.5'][key]) for key, value in network.state_dict().items())

replayed = load(middle, weights='raw')
replayed.record.clear()
replayed.train_step(next(replayed.batches.steps(replayed.step)))
facts['replayed'] = [replayed.step, replayed.record.means.means()['train/loss']]
reader = load(run)
facts['train_loop'] = error_of(reader.train_loop)
facts['save'] = error_of(lambda: reader.checkpoints.save(reader.step, wait=True))
print('FACTS', json.dumps(facts))
"""


def contents(folder):
    """Name, size and modification time of everything in a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob('*'))}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """(folder of a run that was started twice, its script, a copy of it at step 8)."""
    folder = tmp_path_factory.mktemp('mine')
    script = folder / 'mine.py'
    script.write_text(SCRIPT)
    settings = dict(network='mine', depth=3, solver='of_mine', dropout=0.2, log_every=1, sample_every=12, keep_every=8)
    for more in ({}, dict(max_bad_steps=5)):
        flags = [f'--{name}={value}' for name, value in (settings | more | dict(ckpt_dir=folder / 'ckpts')).items()]
        flags += [f'--{name}={TINY[name]}' for name in ('global_batch_size', 'num_training_steps', 'warmup_steps')]
        flags += [
            '--experiment_name=run',
            '--num_sample_steps=2',
            '--wandb=disabled',
            '--no_final_eval',
            '--raw_pictures',
        ]
        flags += ['--ema_decays', '0.5', '0.9']
        env = launch_env(1) | ({} if more else dict(STOP_AT='5'))
        done = subprocess.run(
            ['sh', 'run.sh', str(script), *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == (0 if more else 75), done.stderr
    run = folder / 'ckpts/run'
    middle = folder / 'ckpts/middle'
    shutil.copytree(run, middle)
    shutil.copy2(run / 'step_0000008.pt', middle / 'last.pt')
    return run, script, middle


@pytest.fixture(scope='module')
def read(made):
    """Facts that READER printed while this process held the locks of the folders."""
    run, script, middle = made
    folders = (run, middle)
    for folder in folders:
        run_folder.lock_run(folder)
    before = [contents(folder) for folder in folders]
    command = [sys.executable, '-c', READER, str(run), str(middle), str(script.parent)]
    done = subprocess.run(command, cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=200)
    after = [contents(folder) for folder in folders]
    for folder in folders:
        run_folder._locks.pop(folder.resolve() / 'lock').close()
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.rpartition('FACTS ')[2])
    return facts | {'before': before, 'after': after}


def test_classes_and_settings_come_from_the_script(read):
    assert read['classes'] == ['Mine', 'MyConfig', 3, 12]


def test_the_weights_are_the_requested_ones(read):
    assert [read[name] for name in ('ema', 'ema_0.5', 'ema_0.9', 'raw')] == [
        ['ema_0.5'],
        ['ema_0.5'],
        ['ema_0.9'],
        ['raw'],
    ]
    assert "weights='ema_0.99'" in read['unknown'] and 'has ema_0.5, ema_0.9, raw. Choose one' in read['unknown']
    assert read['load_for_sampling']
    assert all(read[f'raw of {name}'] for name in ('ema', 'ema_0.9', 'raw'))  # `weights` still has the raw ones


def test_settings_that_do_not_exist_are_named(read):
    assert read['no setting'].startswith('steps: no such setting.')
    assert read['steps'] == [4, 0]


def test_it_draws_what_the_run_drew(read):
    drawn = {f'{solver}_{name}': True for solver in ('of_mine', 'sde_dpmpp_2m') for name in ('ema_0.5', 'raw')}
    assert {name: read[name] for name in drawn} == drawn


def test_nothing_is_written_also_while_another_process_trains(read):
    assert read['before'] == read['after']


def test_a_step_is_replayed(made, read):
    losses = {line['train/step']: line['train/loss'] for line in record_of(made[0])}
    assert read['replayed'] == [9, losses[9]]


def test_a_run_that_is_read_cannot_be_trained_on(read):
    for refused in (read['train_loop'], read['save']):
        assert 'was opened to read (load_run). To continue training, call `main` or run.sh' in refused


def test_without_its_script_a_checkpoint_names_it(made, read):
    assert "network='mine' is registered by mine.py: import that file first" in read['names mine.py']


def test_every_start_is_recorded(made):
    run, script, _ = made
    first, second = json.loads((run / 'run.json').read_text())
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for start in (first, second):
        assert start['command'].startswith(f'NPROC=1 sh run.sh {script} --network=mine --depth=3')
        assert start['commit'] == commit and start['processes'] == 1 and start['device'].startswith('cpu')
        assert torch.__version__.startswith(start['versions']['torch'].split('+')[0])
        assert start['trainer'] == dict(file=str(script), name='Mine')
        assert start['config'] == dict(file=str(script), name='MyConfig')
    assert (first['step'], second['step']) == (0, 5) and '--max_bad_steps=5' in second['argv']


def test_a_run_without_its_script_raises_an_error(made, tmp_path):
    run, script, _ = made
    shutil.copytree(run, tmp_path / 'run')
    path = tmp_path / 'run/run.json'
    path.write_text(path.read_text().replace(str(script), str(tmp_path / 'gone.py')))
    with pytest.raises(SettingError, match=r'gone\.py, which started the run, is gone\. Put it back, or link'):
        load_run(tmp_path / 'run')
    (tmp_path / 'gone.py').symlink_to(script)  # as the message suggests
    assert type(load_run(tmp_path / 'run', trust=True)).__name__ == 'Mine'


def test_a_script_that_would_train_when_it_is_imported_is_named(made, tmp_path):
    run, script, _ = made
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'unguarded.py').write_text(script.read_text().replace("if __name__ == '__main__':", 'if True:'))
    path = tmp_path / 'run/run.json'
    path.write_text(path.read_text().replace(str(script), str(tmp_path / 'unguarded.py')))
    with pytest.raises(SettingError, match=r'unguarded\.py trains when it is imported: put its main'):
        load_run(tmp_path / 'run', trust=True)
    importing.refuse_to_train()  # does nothing: the import is over


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    with pytest.raises(SettingError, match=r'has no run\.json'):
        load_run(tmp_path)


TABLES = """
from main import main
from processes import PROCESSES, GaussianProcess


class Quadratic(GaussianProcess):
    def alpha(self, t):
        return 1 - t**2

    def sigma(self, t):
        return t


PROCESSES['quadratic'] = lambda config: Quadratic()

if __name__ == '__main__':
    main()
"""


def test_a_script_that_only_fills_tables_is_imported_too(tmp_path, run_sh):
    """The trainer's class is then in trainer.py, and run.json names the script too."""
    script = tmp_path / 'tables_of_mine.py'
    script.write_text(TABLES)
    result = run_sh(str(script), process_name='quadratic')
    assert result.returncode == 0, result.stderr
    read = f'import main; print(type(main.load_run({str(tmp_path / "ckpts/run")!r}, trust=True).process).__name__)'
    reader = subprocess.run([sys.executable, '-c', read], cwd=ROOT, env=launch_env(1), capture_output=True, text=True)
    assert reader.returncode == 0 and reader.stdout.endswith('Quadratic\n'), reader.stderr


UNUSED = """
import torch
from torch import nn

from main import main
from networks import NETWORKS
from networks.residual_mlp import MLP


class WithUnused(MLP):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = nn.Linear(64, 3)

    def forward(self, xt, time, label=None):
        return super().forward(xt, time, label), self.second(xt.flatten(1))


NETWORKS['unused'] = lambda config, shape, num_classes: WithUnused(shape, num_classes, 32)

if __name__ == '__main__':
    main()
"""


def test_an_output_that_the_loss_leaves_out_trains_on_two_processes(tmp_path, run_sh):
    script = tmp_path / 'unused_output.py'
    script.write_text(UNUSED)
    result = run_sh(str(script), nproc=2, network='unused')
    assert result.returncode == 0, result.stderr


def test_a_script_that_never_calls_main_gets_a_message(tmp_path, run_sh):
    script = tmp_path / 'forgotten.py'
    script.write_text(
        'from trainer import ExampleDiffusionTrainer\n\n\nclass Mine(ExampleDiffusionTrainer):\n    pass\n'
    )
    result = run_sh(str(script))
    assert 'forgotten.py ended without a run: it has to call main()' in result.stderr
    assert 'ended without a run' not in run_sh(num_training_steps=3).stderr


def test_load_run_takes_a_path_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(SettingError, match=rf'^{tmp_path}/nowhere does not exist'):
        load_run('~/nowhere')
