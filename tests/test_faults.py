"""Crashes and faults that a run survives, with real processes: run.sh, torchrun, two gloo ranks, real signals.

docs/reliability.md names these tests. Every wait has a limit: a hang is a failure. A run that was damaged and started
again must equal `whole`, an undisturbed run, bit for bit.
"""

import ast
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import saving
from config import Config
from tests.helpers import (
    ROOT,
    TINY,
    as_flags,
    assert_same_runs,
    kill_all,
    launch_env,
    losses,
    processes_with,
    record_of,
    start_run_sh,
    wait_until,
)
from training import run_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = 'tests/experiments/faulty.py'
RUN = dict(
    num_training_steps=40,
    save_every=4,
    keep_every=20,
    log_every=1,
    eval_every=12,
    sample_every=12,
    accumulation_steps=2,
    dropout=0.1,
    translate_prob=0.5,
    label_dropout=0.1,
    dequantize=True,
)
FOLDER = 'experiment'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """`whole(nproc, **settings)`: the folder of an undisturbed run."""
    made = {}

    def run(nproc=2, **settings):
        key = (nproc, *settings.items())
        if key not in made:
            folder = tmp_path_factory.mktemp('whole')
            process = start_run_sh(
                SCRIPT,
                nproc=nproc,
                **RUN | settings | dict(ckpt_dir=str(folder), experiment_name=FOLDER, once=f'{folder}/once'),
            )
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            made[key] = folder / FOLDER
        return made[key]

    return run


class Job:
    """One run's folder, and the command that starts or resumes it."""

    def __init__(self, tmp_path, nproc=2, env=None, **settings):
        self.root, self.nproc, self.env = tmp_path, nproc, env
        self.once, self.folder = tmp_path / 'once', tmp_path / FOLDER
        self.settings = RUN | dict(ckpt_dir=str(tmp_path), experiment_name=FOLDER, once=str(self.once)) | settings

    def start(self, nproc=None, env=None, **settings):
        return start_run_sh(
            SCRIPT, nproc=nproc or self.nproc, env=(self.env or {}) | (env or {}), **self.settings | settings
        )

    def run(self, seconds=100, **kwargs):
        """Start it and wait for its end: (exit code, stdout, stderr). Fails if a process is left over."""
        process = self.start(**kwargs)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            kill_all(str(self.root)) if process.poll() is None else None
        self.ended = time.time()
        assert wait_until(lambda: not processes_with(str(self.root)), 8), processes_with(str(self.root))
        return process.returncode, out, err

    def steps(self):
        return len(record_of(self.folder)) if (self.folder / 'metrics.jsonl').exists() else 0

    def seconds_since_the_fault(self):
        return self.ended - float(self.once.read_text())


def report(name, **figures):
    """Append figures for benchmarks/RESULTS.md to the file that FAULT_FIGURES names."""
    if 'FAULT_FIGURES' in os.environ:
        with open(os.environ['FAULT_FIGURES'], 'a') as file:
            file.write(json.dumps(dict(test=name, **figures)) + '\n')


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize('nproc, kills', [(1, 13), (2, 12)])
def test_killed_at_25_random_moments(tmp_path, whole, nproc, kills):
    """SIGKILL of all processes, at start-up or while it trains and saves; the same command resumes each time."""
    settings = dict(num_training_steps=200, save_every=3, eval_every=50, sample_every=0, keep_every=0)
    job, rng, lost = Job(tmp_path, nproc=nproc, **settings), random.Random(nproc), []
    for kill in range(kills):
        process, before = job.start(), job.steps()
        if kill % 6 == 5:
            time.sleep(rng.uniform(0, 6))
        else:
            record = job.folder / 'metrics.jsonl'
            written = record.stat().st_mtime_ns if record.exists() else 0
            begun = wait_until(
                lambda record=record, written=written: record.exists() and record.stat().st_mtime_ns > written, 60
            )
            assert begun or process.poll() is not None, process.communicate()
            time.sleep(rng.uniform(0, 0.5))
        while found := processes_with(str(tmp_path)):
            kill_all(str(tmp_path))
            time.sleep(0.01 * len(found))
        process.communicate(timeout=20)
        done = max(before, job.steps())
        kept = (
            run_folder.newest_intact(Config(ckpt_dir=str(tmp_path), experiment_name=FOLDER))
            if job.folder.exists()
            else None
        )
        lost.append(done - (kept[1]['step'] if kept else 0))
    code, _, err = job.run()
    assert code == 0, err
    assert_same_runs(whole(nproc, **settings), job.folder)
    assert max(lost) <= 3 * 3, lost  # save_every, a save that was being written, and the steps during that write
    report('killed at 25 random moments', nproc=nproc, lost_steps=lost)


@pytest.mark.parametrize('fault', ['half written', 'before fsync', 'before rename', 'after rename'])
def test_killed_within_a_save(tmp_path, whole, fault):
    job = Job(tmp_path, fault=fault)
    code, _, err = job.run()
    assert code == 1 and job.once.exists() and 'rank 0 was killed by signal 9' in err.splitlines()[-1]
    assert saving.load(job.folder / 'last.pt')['step'] == (12 if fault == 'after rename' else 8)
    code, out, err = job.run()
    assert code == 0 and 'resuming' in out, err
    assert not list(job.folder.glob('.*.tmp'))
    assert_same_runs(whole(), job.folder)


def test_killed_rank_1(tmp_path, whole):
    job = Job(tmp_path, fault='training:SIGKILL:worker', fault_rank=1, fault_step=14)
    code, _, err = job.run()
    assert code == 1 and 'rank 1 was killed by signal 9 (SIGKILL)' in err.splitlines()[-1]
    report('rank 1 killed', seconds=job.seconds_since_the_fault())
    assert job.seconds_since_the_fault() < 60
    code, _, err = job.run()
    assert code == 0, err
    assert_same_runs(whole(), job.folder)


@pytest.mark.parametrize('target', ['launcher', 'run.sh'])
def test_killed_launcher_or_run_sh_leaves_no_orphans(tmp_path, whole, target):
    """Orphans would hold the lock, and write checkpoints while the next run trains."""
    job = Job(tmp_path, fault=f'training:SIGKILL:{target}', num_training_steps=4000)
    process = job.start()
    process.communicate(timeout=60)
    assert process.returncode == (1 if target == 'launcher' else -9)
    assert wait_until(lambda: not processes_with(str(tmp_path)), 5)
    job = Job(tmp_path / 'again', fault=f'training:SIGKILL:{target}')
    job.start().communicate(timeout=60)
    code, _, err = job.run()  # at once
    assert code == 0, err
    assert_same_runs(whole(), job.folder)


def test_restarts_by_itself(tmp_path, whole):
    job = Job(tmp_path, fault='training:SIGKILL:worker', fault_rank=1, env=dict(MAX_RESTARTS='3'))
    code, out, err = job.run()
    assert code == 0 and 'starting again from the last checkpoint (1 of 3 restarts)' in err and 'resuming' in out
    assert err.count('starting again') == 1
    assert_same_runs(whole(), job.folder)


def test_restarts_end(tmp_path):
    """A run that fails every time ends after MAX_RESTARTS, a wrong setting at once."""
    job = Job(tmp_path, fault='always', env=dict(MAX_RESTARTS='1'))
    code, _, err = job.run()
    assert code == 1 and err.count('starting again') == 1 and 'broken on purpose' in err.splitlines()[-1]
    code, _, err = job.run(solver='hein')
    assert code == 2 and 'starting again' not in err


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    'fault',
    [
        'start-up:SIGTERM:run.sh',
        'start-up:SIGUSR1:worker',
        'training:SIGTERM:run.sh',
        'training:SIGINT:run.sh',
        'training:SIGUSR1:launcher',
        'training:SIGTERM:launcher',
        'training:SIGTERM:worker',
        'training:SIGTERMx2:worker',
        'training:SIGTERMx2:all',
        'evaluation:SIGTERM:run.sh',
        'sampling:SIGTERM:run.sh',
        'saving:SIGTERM:run.sh',
        'saving:SIGTERM:worker',
        'final:SIGTERM:launcher',
    ],
)
def test_stop_signal(tmp_path, whole, fault):
    """In each phase, to each process, also twice: it saves and ends within 20 s with code 75, and can be resumed."""
    phase, name, target = fault.split(':')
    settings = dict(final_eval=True) if phase == 'final' else {}
    job = Job(tmp_path, fault=fault, fault_rank=1 if target == 'worker' and phase == 'training' else 0, **settings)
    code, out, err = job.run()
    assert code == 75 and job.once.exists(), (code, out, err)
    assert job.seconds_since_the_fault() < 20
    report('stop signal', phase=phase, signal=name, target=target, seconds=job.seconds_since_the_fault())
    if phase != 'start-up':
        assert 'state saved' in out and 'Traceback' not in err, err
        step = saving.load(job.folder / 'last.pt')['step']
        assert step >= 12 and f'stopped at step {step}' in out
        if phase == 'training':
            assert step in (13, 14)  # the stop flag of a step is read after the next step: nothing is lost
    code, _, err = job.run()
    assert code == 0, err
    assert_same_runs(whole(**settings), job.folder)


# ---------------------------------------------------------------- one rank fails


@pytest.mark.parametrize(
    ('fault', 'rank'),
    [('exception', 1), ('exception in evaluation', 0), ('exception in evaluation', 1), ('exception in sampling', 1)],
)
def test_exception_on_one_rank(tmp_path, whole, fault, rank):
    """In evaluation and sampling, a line of the record is due, for which the ranks exchange data."""
    job = Job(tmp_path, fault=fault, fault_rank=rank, fault_step=14)
    code, _, err = job.run()
    assert code == 1 and err.splitlines()[-1] == f"rank {rank} failed first: KeyError: 'broken on purpose'"
    assert job.seconds_since_the_fault() < 60
    report(f'{fault} on rank {rank}', seconds=job.seconds_since_the_fault())
    assert job.run()[0] == 0
    assert_same_runs(whole(), job.folder)


def test_nan_batch_on_one_rank_skips_the_step_on_all(tmp_path, whole):
    job = Job(tmp_path, fault='nan', fault_rank=1)
    code, out, err = job.run()
    assert code == 0 and 'skipped 1 of the last steps, most recently step 12' in out, err
    state = saving.load(job.folder / 'last.pt')
    assert (
        state['bad_steps'].tolist() == [0, 1, 12]
        and int(state['optimizer']['state'][0]['step']) == RUN['num_training_steps'] - 1
    )
    averages = list(state['ema']['networks'].values())
    assert all(w.isfinite().all() for weights in [state['network'], *averages] for w in weights.values())
    lines = record_of(job.folder)
    assert [line['train/bad_steps'] for line in lines] == [0] * 12 + [1] * (len(lines) - 12)
    assert losses(job.folder)[:12] == losses(whole())[:12] and losses(job.folder)[13:] != losses(whole())[13:]


def image_files(tmp_path):
    folder = tmp_path / 'data/image_folder/all'
    folder.mkdir(parents=True)
    for i in range(40):
        Image.new('RGB', (12, 10), (i, 2 * i, 3 * i)).save(folder / f'{i}.png')
    return dict(
        dataset='image_folder',
        image_size=8,
        cache=False,  # so that loader processes decode the files
        num_workers=2,
        data_dir=str(tmp_path / 'data'),
        label_dropout=0.0,
        log_every=1,
    )


def test_loader_worker_killed(tmp_path):
    job = Job(tmp_path, nproc=2, fault='loader worker', fault_rank=1, **image_files(tmp_path))
    code, _, err = job.run()
    assert code == 1 and job.seconds_since_the_fault() < 60
    assert re.search(
        r'^rank 1 failed first: RuntimeError: DataLoader worker \(pid.*\) '
        r'(is killed by signal: Killed|exited unexpectedly)',
        err.splitlines()[-1],
    )
    assert saving.load(job.folder / 'last.pt')['step'] in (8, 12)
    code, out, err = job.run()
    assert code == 0 and 'resuming' in out, err


def test_a_stop_of_all_processes_spares_the_loaders(tmp_path):
    """Until the trainers have saved, after SIGTERM to the launcher, both trainers and their loader processes."""
    job = Job(tmp_path, nproc=2, fault='stop of all', **image_files(tmp_path))
    code, out, err = job.run()
    assert code == 75 and 'state saved' in out and 'DataLoader' not in err, err
    step = saving.load(job.folder / 'last.pt')['step']
    assert 12 <= step < 40
    code, out, err = job.run()
    assert code == 0 and f'at step {step}' in out, err


def test_data_file_vanishes(tmp_path):
    job = Job(tmp_path, nproc=2, fault='data file', **image_files(tmp_path))
    code, _, err = job.run()
    assert code == 1 and job.seconds_since_the_fault() < 60
    assert 'failed first' in err and 'FileNotFoundError' in err.splitlines()[-1] and '.png' in err.splitlines()[-1]
    assert saving.load(job.folder / 'last.pt')['step'] in (8, 12)


@pytest.mark.parametrize('nproc', [1, 2])
def test_a_stop_is_obeyed_where_data_do_not_come(tmp_path, nproc):
    """A single process saves. If there are two, one waits for data and the other for it, so neither can save."""
    job = Job(tmp_path, nproc=nproc, fault='silent data', fault_rank=nproc - 1, **image_files(tmp_path))
    process = job.start()
    try:
        assert wait_until(job.once.exists, 60)
        time.sleep(2)
        process.terminate()
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
    finally:
        kill_all(str(tmp_path))
    assert time.monotonic() - began < 20
    if nproc == 1:
        assert process.returncode == 75 and 'state saved' in out, err
    else:
        assert process.returncode == 1, err
        assert re.search(r'asked to stop while waiting for data of dataset=.image_folder', err.splitlines()[-1]), err


@pytest.mark.parametrize(
    'kind, nproc, num_workers, check',
    [('empty', 1, 2, False), ('text', 2, 1, False), ('cut jpeg', 2, 2, False), ('cut jpeg', 1, 0, False),
     ('cut jpeg', 1, 1, True)],
)  # fmt: skip
def test_a_bad_image_ends_the_run_and_is_named(tmp_path, kind, nproc, num_workers, check):
    settings = image_files(tmp_path) | dict(num_workers=num_workers, check=check)
    path = tmp_path / 'data/image_folder/all' / ('bad.jpg' if kind == 'cut jpeg' else 'bad.png')
    if kind == 'cut jpeg':
        Image.effect_noise((64, 64), 50).save(path)
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_text('not an image' if kind == 'text' else '')
    code, _, err = Job(tmp_path, nproc=nproc, **settings).run(seconds=60)
    assert code == 1
    cause = r'rank \d failed first: ' + re.escape(str(path)) + ' cannot be read as an image .*'
    assert re.fullmatch(cause, err.splitlines()[-1])
    assert 'Original Traceback' not in err  # the loader process's traceback


def test_output_that_cannot_be_written(tmp_path, whole):
    """`sh run.sh 2>&1 | head -n 1`, and output into a file on a full disk: it still trains and saves."""
    job = Job(tmp_path / 'head')
    process = job.start()
    assert process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(100) == 0
    assert_same_runs(whole(), job.folder)
    job = Job(tmp_path / 'full', num_training_steps=4)
    command = ['sh', '-c', 'exec "$@" >/dev/full 2>&1', 'sh', 'sh', 'run.sh', SCRIPT, *as_flags(TINY | job.settings)]
    assert subprocess.run(command, cwd=ROOT, env=launch_env(2), timeout=100).returncode == 0
    assert job.steps() == 4


# ---------------------------------------------------------------- the disk


def test_full_disk(tmp_path, whole):
    """On a small tmpfs that another file fills up, the run ends with the cause, and the last checkpoint is whole.

    Once there is room again, the run resumes.
    """
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', disk], capture_output=True)
    if mounted.returncode:
        pytest.skip('needs to mount a tmpfs')
    try:
        job = Job(disk)
        process = job.start()
        assert wait_until(lambda: (job.folder / 'last-1.pt').exists(), 60)
        with open(disk / 'filler', 'wb', buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1024))
            except OSError:
                pass
        filled = time.time()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and 'the disk is full: [Errno 28]' in err.splitlines()[-1], err
        assert str(disk) in err.splitlines()[-1] and 'Make room' in err.splitlines()[-1]
        assert time.time() - filled < 60
        report('full disk', seconds=time.time() - filled)
        (disk / 'filler').unlink(missing_ok=True)
        assert saving.load(job.folder / 'last.pt')['step'] % 4 == 0
        code, out, err = job.run()
        assert code == 0 and 'resuming' in out, err
        assert_same_runs(whole(), job.folder)
    finally:
        kill_all(str(disk))
        subprocess.run(['umount', disk], check=True)


@pytest.mark.parametrize('nproc', [1, 2])
def test_save_over_the_limit_of_file_size(tmp_path, whole, nproc):
    """RLIMIT_FSIZE: the first save fails; the last line, within a minute, names the setting and the cause."""
    job = Job(tmp_path, nproc=nproc)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code, out, err = job.run(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and 'trying again in' in out
    assert all(
        word in err.splitlines()[-1]
        for word in ('failed first: ckpt_dir=', 'step 4', 'File too large', 'has no earlier one. Make room')
    ), err
    assert 'Traceback' not in err and not list(job.folder.glob('*.pt')) and not list(job.folder.glob('.*'))
    code, _, err = job.run()
    assert code == 0, err
    assert_same_runs(whole(nproc), job.folder)


def test_a_full_disk_that_gets_room_again_heals(tmp_path, whole):
    """A save that fails is tried again while training continues. The disk has room for two checkpoints, not three."""
    room = int(2.5 * (whole() / 'last.pt').stat().st_size)
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('needs to mount a tmpfs')
    try:
        job = Job(disk)
        filler = disk / 'filler'
        filler.write_bytes(bytes(8 * 2**20 - room))
        process = job.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if 'trying again' in line:
                filler.unlink(missing_ok=True)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and any('trying again' in line for line in lines), err
        assert_same_runs(whole(), job.folder)
    finally:
        kill_all(str(disk))
        subprocess.run(['umount', disk], check=True)


def test_read_only_ckpts(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m,ro', 'tmpfs', disk], capture_output=True).returncode:
        if os.getuid() == 0:
            pytest.skip('root may write everywhere')
        disk.chmod(0o555)
    try:
        code, _, err = Job(disk).run()
        assert code == 2 and err.count('SettingError') == 1 and 'Traceback' not in err
        assert str(disk) in err and '--ckpt_dir' in err
    finally:
        subprocess.run(['umount', disk], capture_output=True)


@pytest.mark.parametrize('damage', ['one bit', 'cut', 'empty', 'garbage'])
def test_damaged_checkpoint(tmp_path, whole, damage):
    """It is reported, the previous save is taken, and the result is the same."""
    job = Job(tmp_path, fault='training:SIGTERM:worker', fault_step=26)
    assert job.run()[0] == 75
    last = job.folder / 'last.pt'
    raw = last.read_bytes()
    at = raw.index(next(iter(saving.load(last)['network'].values())).numpy().tobytes())
    last.write_bytes(
        {
            'one bit': raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :],
            'cut': raw[:-5000],
            'empty': b'',
            'garbage': random.Random(0).randbytes(len(raw)),
        }[damage]
    )
    code, out, err = job.run()
    assert code == 0 and 'last.pt' in out and 'damaged' in out and 'resuming from last-1.pt, step 24' in out, err
    assert_same_runs(whole(), job.folder)


@pytest.mark.parametrize(
    'other, words',
    [('config', 'base_lr: 0.001 -> 0.5'), ('architecture', 'another network'), ('version', 'format version 99')],
)
def test_a_checkpoint_that_does_not_fit(tmp_path, other, words):
    """It is refused before anything is done, and is not changed."""
    job = Job(tmp_path, num_training_steps=4)
    assert job.run()[0] == 0
    last = job.folder / 'last.pt'
    state = saving.load(last)
    if other == 'architecture':
        state['network'] = {name: torch.zeros(7) for name in state['network']}
    saving.write(last, **state | dict(version=99 if other == 'version' else 1))
    before = last.read_bytes()
    code, _, err = job.run(base_lr=0.5 if other == 'config' else 0.001)
    assert code == 2 and err.count('SettingError') == 1 and words in err and 'Traceback' not in err, err
    assert last.read_bytes() == before


def test_all_checkpoints_damaged(tmp_path):
    job = Job(tmp_path, fault='training:SIGTERM:worker', fault_step=26)
    assert job.run()[0] == 75
    files = sorted(job.folder.glob('*.pt'))
    assert [path.name for path in files] == ['last-1.pt', 'last.pt', 'step_0000020.pt']
    for path in files:
        path.write_bytes(path.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in job.folder.iterdir() if path.is_file() and path.name != 'lock'}
    code, _, err = job.run()
    assert code == 2 and 'Traceback' not in err and all(path.name in err for path in files)
    assert before == {
        path.name: path.read_bytes() for path in job.folder.iterdir() if path.is_file() and path.name != 'lock'
    }


# ---------------------------------------------------------------- wandb


@pytest.mark.parametrize('how', ['SIGKILL', 'SIGSTOP'])
def test_wandb_fails_in_mid_run(tmp_path, how):
    """Its process is killed or hangs: training continues, and the local record is whole."""
    marker = f'TEST_OF_WANDB={tmp_path}'
    job = Job(
        tmp_path,
        wandb='offline',
        nproc=1,
        env=dict([marker.split('=')]),
        num_training_steps=300,
        save_every=0,
        eval_every=0,
        sample_every=0,
    )
    process = job.start()
    assert wait_until(lambda: job.steps() >= 5, 60)
    killed = []
    for pid in map(int, filter(str.isdigit, os.listdir('/proc'))):
        try:
            line, environment = (Path(f'/proc/{pid}/{name}').read_bytes() for name in ('cmdline', 'environ'))
        except OSError:
            continue
        if b'wandb-core' in line and marker.encode() in environment:
            os.kill(pid, getattr(signal, how))
            killed.append(pid)
    try:
        process.wait(timeout=100)
    finally:
        for pid in killed if how == 'SIGSTOP' else []:
            os.kill(pid, signal.SIGKILL)  # it still holds the pipes open
    out, err = process.communicate(timeout=20)
    assert killed and process.returncode == 0, err
    assert 'wandb failed' in out or (how == 'SIGSTOP' and 'wandb did not accept the rest of the record' in out)
    assert [line['train/step'] for line in record_of(job.folder)] == list(range(1, 301))


@pytest.mark.parametrize('mode, code', [('auto', 0), ('online', 2)])
def test_wandb_unreachable(tmp_path, mode, code):
    """'auto' continues offline with the whole record on disk; 'online' ends before any step, with the remedy."""
    env = dict(WANDB_BASE_URL='http://127.0.0.1:9', WANDB_API_KEY='0' * 40)
    job = Job(tmp_path, wandb=mode, env=env)
    ended, out, err = job.run()
    assert ended == code, err
    if mode == 'auto':
        assert 'recording offline' in out and [line['train/step'] for line in record_of(job.folder)] == list(
            range(1, 41)
        )
    else:
        assert "wandb='online'" in err and '--wandb offline' in err and not (job.folder / 'metrics.jsonl').exists()


# ---------------------------------------------------------------- two runs, and other numbers of processes


def test_two_runs_in_one_folder(tmp_path, whole):
    job = Job(tmp_path, num_training_steps=4000)
    first = job.start()
    assert wait_until(lambda: job.steps() >= 2, 60)
    second = job.start()
    _, err = second.communicate(timeout=60)
    holder = (job.folder / 'lock').read_text().strip()
    assert (
        second.returncode == 2
        and 'SettingError' in err
        and holder in err
        and '--experiment_name' in err
        and 'Traceback' not in err
    )
    assert int(holder.split()[1]) in processes_with(str(tmp_path)) and os.uname().nodename in holder
    assert first.poll() is None
    kill_all(str(tmp_path))
    first.communicate(timeout=20)
    job = Job(tmp_path / 'dead', nproc=1, fault='training:SIGKILL:worker')
    assert job.run()[0] == 1 and (job.folder / 'lock').exists()
    code, _, err = job.run()  # the lock of the dead process is taken over
    assert code == 0, err
    assert_same_runs(whole(1), job.folder)


def test_1_2_and_4_processes_see_and_compute_the_same(tmp_path):
    """Also with accumulation: loss curves agree within 1e-5 over 50 steps.

    Each process prepares and computes only its share.
    """
    settings = dict(
        num_training_steps=50,
        save_every=0,
        keep_every=0,
        eval_every=25,
        sample_every=0,
        precision='float32',
        dropout=0.0,
    )
    curves, worst = {}, {}
    for nproc, accumulation_steps in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)):
        name = f'{nproc}x{accumulation_steps}'
        counts = tmp_path / f'count{name}_'
        job = Job(tmp_path, nproc=nproc, experiment_name=name, env=dict(COUNT_IMAGES=str(counts)))
        job.settings |= settings | dict(accumulation_steps=accumulation_steps)
        code, _, err = job.run()
        assert code == 0, err
        curves[name] = losses(tmp_path / name)
        for rank in range(nproc):
            images = ast.literal_eval((tmp_path / f'count{name}_{rank}').read_text())
            assert images == dict.fromkeys(range(50), 32 // nproc)
    for name, curve in curves.items():
        worst[name] = max(abs(a - b) / a for a, b in zip(curves['1x1'], curve, strict=True))
    report('process counts', worst_relative_difference=worst)
    assert max(worst.values()) < 1e-5 and len(set(curves['1x1'])) == 50


@pytest.mark.parametrize('nproc', [1, 4])
def test_saved_by_2_processes_resumed_by_another_number(tmp_path, whole, nproc):
    settings = dict(dropout=0.0, accumulation_steps=1)
    job = Job(tmp_path, fault='training:SIGTERM:worker', fault_step=20, **settings)
    assert job.run()[0] == 75
    code, out, err = job.run(nproc=nproc)
    assert code == 0 and f'on {nproc} x cpu' in out, err
    assert losses(job.folder) == pytest.approx(losses(whole(**settings)), rel=1e-5)
    lines = [line['train/step'] for line in record_of(job.folder)]
    assert lines == list(range(1, 41))


def test_a_finished_run_ends_at_once(tmp_path, whole):
    folder = whole()
    job = Job(folder.parent)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.name != 'lock'}
    code, out, _ = job.run(60)
    assert code == 0 and 'is finished: 40 steps' in out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.name != 'lock'}


# ---------------------------------------------------------------- will it run tonight?


@pytest.mark.parametrize('nproc', [1, 2])
def test_check(tmp_path, nproc):
    """It does everything once, in under a minute, and leaves no file behind."""
    temporary = tmp_path / 'tmp'
    temporary.mkdir()
    places = [ROOT, tmp_path]

    def files():
        ignored = ('.git', '.venv', '.pytest_cache', '.ruff_cache', '.hypothesis')
        return {
            path: path.stat().st_mtime_ns
            for place in places
            for path in place.rglob('*')
            if path.relative_to(place).parts[0] not in ignored and path.is_file()
        }

    before, began = files(), time.monotonic()
    command = ['sh', 'run.sh', '--check', '--ckpt_dir', str(tmp_path / 'ckpts'), '--base_lr', '0.0005']
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=launch_env(nproc) | dict(TMPDIR=str(temporary)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    seconds = time.monotonic() - began
    assert result.returncode == 0, result.stderr
    assert files() == before and not list(temporary.iterdir()) and not (tmp_path / 'ckpts').exists()
    for words in (
        'settings that differ from the preset:\n  base_lr = 0.0005\n',
        '382,249 parameters',
        's a step',
        'held out',
        'sample    adams',
        'sample    sde_dpmpp_2m',
    ):
        assert words in result.stdout, words
    for words in ('judge  ', ' to start, ', ' training, ', ' for pictures, ', ' for numbers'):
        assert words in result.stdout, words
    for words in ('GB at most', 'the run   ', ' at most (save_every=100)', 'checkpoints', 'GB are free', 'it runs'):
        assert words in result.stdout, words
    assert 'solver =' not in result.stdout and 'resuming' not in result.stdout
    assert seconds < 60
    report('check', nproc=nproc, seconds=seconds)


def test_check_refuses_what_would_fail(tmp_path):
    flags = ['sh', 'run.sh', '--check', '--ckpt_dir', str(tmp_path)]
    kwargs = dict(cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=100)
    full = subprocess.run(
        [*flags, '--keep_every', '1', '--num_training_steps', '2000000000', '--lr_schedule_type', 'constant'], **kwargs
    )
    assert (
        full.returncode == 2
        and 'are free' in full.stderr
        and '--keep_every' in full.stderr
        and 'Traceback' not in full.stderr
    )
    job = Job(tmp_path, nproc=1, num_training_steps=4)
    assert job.run()[0] == 0
    other = subprocess.run([*flags, '--experiment_name', FOLDER], **kwargs)
    assert other.returncode == 2 and 'another config' in other.stderr
