"""docs/your-project.md: its files and commands, tried from an empty folder, with updates of the clone in between."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from config import PRESETS, parse_config
from data_utils import DATASETS
from networks import NETWORKS
from runtime.errors import EXIT_BAD_SETTING
from tests.helpers import ROOT, TINY, as_flags, launch_env, record_of

PAGE = (ROOT / 'docs/your-project.md').read_text()
FILES = dict(  # name -> content
    zip(
        re.findall(r'^`(\w+\.py)`', PAGE, re.MULTILINE),
        re.findall(r'^```python\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE),
        strict=True,
    )
)
(TRAIN, GENERATE), UPDATE = (
    block.splitlines() for block in re.findall(r'^```console\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)
)


@pytest.fixture
def project(tmp_path):
    """The folder of the project, which holds the files of the page."""
    folder = tmp_path / 'project'
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content)
    return folder


def test_the_preset_names_the_data_set_and_the_network_of_the_project(project, build_trainer, monkeypatch):
    monkeypatch.syspath_prepend(project)
    with mock.patch.dict(PRESETS), mock.patch.dict(DATASETS), mock.patch.dict(NETWORKS):
        mine = __import__('mine')
        config = parse_config(['--preset', 'waves', *as_flags(TINY)])
        trainer = build_trainer(config, mine.Mine)
        trainer.train_loop()
        assert type(trainer.network.net) is sys.modules['convolutions'].Convolutions and trainer.shape == (1, 32)
        assert config.run_dir.parent == project / 'ckpts' and trainer.step == 12
        x, label = DATASETS['waves'].load(config)[0]
        power = abs(np.fft.rfft(x[:, 0].numpy())) ** 2
        assert (power.argmax(1) == label.numpy() + 1).all()  # as many periods as the class says
    for name in FILES:
        del sys.modules[name.removesuffix('.py')]


def git(folder, *words):
    names = ('-c', 'user.name=a', '-c', 'user.email=a@example.org')
    return subprocess.run(['git', *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(project):
    """A clone of this repo next to the project; its origin is a copy of the working tree."""
    origin = project.parent / 'origin'
    unwanted = shutil.ignore_patterns('.git', '.venv', '__pycache__', '.pytest_cache', 'ckpts', 'data')
    shutil.copytree(ROOT, origin, ignore=unwanted)
    git(origin, 'init', '-q', '-b', 'main')
    git(origin, 'add', '-A')
    git(origin, 'commit', '-q', '-m', 'first')
    git(project.parent, 'clone', '-q', origin, 'diffusion')
    return project.parent / 'diffusion'


@pytest.mark.slow
@pytest.mark.timeout(600)  # eight programs, one after the other
def test_runs_of_a_project_survive_updates_as_the_page_says(project, clone):
    small = as_flags(TINY | dict(lr_schedule_type='constant', experiment_name='waves_Mine'))

    def sh(command):
        return subprocess.run(
            command, shell=True, cwd=project, env=launch_env(1), capture_output=True, text=True, timeout=200
        )

    def train(steps):
        return sh(f'{TRAIN} {shlex.join(small)} --num_training_steps {steps}')

    def update(file, old, new):
        """Change a file in the origin, take in the update as the page says, and return its commit."""
        path = clone.parent / 'origin' / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        git(path.parent, 'commit', '-q', '-a', '-m', 'update')
        assert sh(' && '.join(UPDATE)).returncode == 0
        return git(path.parent, 'rev-parse', 'HEAD').strip()

    run, first = project / 'ckpts/waves_Mine', git(clone, 'rev-parse', 'HEAD').strip()
    assert (done := train(6)).returncode == 0, done.stderr
    second = update('solvers/table.py', '"""The', '"""Changed. The')
    assert second.startswith((project / 'diffusion.version').read_text().strip())
    assert (done := train(12)).returncode == 0, done.stderr
    starts = json.loads((run / 'run.json').read_text())
    assert [(start['commit'], start['step']) for start in starts] == [(first, 0), (second, 6)]
    assert [line['train/step'] for line in record_of(run)][-1] == 12
    assert not [*(clone / 'ckpts').glob('*/')] and not git(clone, 'status', '--porcelain')

    assert (done := sh(GENERATE)).returncode == 0, done.stderr
    assert np.load(project / 'samples.npz')['arr_0'].shape == (12, 1, 32)

    version = (project / 'diffusion.version').read_text().strip()
    update('trainer.py', 'return self.loss_weight(coefs) * sq_err', 'return sq_err * self.loss_weight(coefs)')
    done = train(15)
    assert done.returncode == EXIT_BAD_SETTING and '+        return sq_err * self.loss' in done.stderr, done.stderr
    git(clone, 'checkout', '-q', version)
    assert (done := train(15)).returncode == 0, done.stderr

    done = sh('sh ../diffusion/run.sh --preset waves')
    assert done.returncode == EXIT_BAD_SETTING and "preset='waves' is not a choice" in done.stderr
