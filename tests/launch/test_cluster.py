"""Runs on two hosts with a cable between them, and on a real Slurm with two nodes (two_hosts.sh, slurm_up.sh).

They need root on Linux, and Debian's iproute2, slurm-wlm and munge. docs/reliability.md names these tests.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT, TINY, as_flags, launch_env, losses, record_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
RUN = TINY | dict(channels=4, log_every=1, save_every=5, eval_every=0, experiment_name='run')


def needs(*programs):
    """Skip the test if programs, or the right to use them, are absent."""
    absent = [name for name in programs if not shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/sbin')]
    if absent or os.getuid() != 0:
        pytest.skip(f'not here: {", ".join(absent) or "root"}')
    if subprocess.run(['unshare', '--net', '--uts', '--mount', 'true'], capture_output=True).returncode:
        pytest.skip('this machine allows no namespaces')


def steps(folder):
    return len(record_of(folder)) if (folder / 'metrics.jsonl').exists() else 0


# ---------------------------------------------------------------- two hosts


class Hosts:
    """Two hosts and one run on both."""

    def __init__(self, tmp_path, names):
        self.root = tmp_path
        self.place = dict(HOSTS=f'{tempfile.gettempdir()}/hosts_{os.getpid()}')
        self.script('up', names)
        self.runs: dict[str, subprocess.Popen] = {}

    def script(self, *arguments):
        done = subprocess.run(
            ['sh', 'tests/launch/two_hosts.sh', *arguments],
            cwd=ROOT,
            env=os.environ | self.place,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def start(self, host, own_disk=False, env=None, **settings):
        """Start the run's part on h1 or h2. `own_disk`: with the host's own folder in place of ckpts/."""
        flags = as_flags(RUN | dict(ckpt_dir=str(self.root / 'ckpts')) | settings)
        command = ['sh', 'run.sh', *flags]
        if own_disk:
            (self.root / 'ckpts').mkdir(exist_ok=True)
            (self.root / host).mkdir(exist_ok=True)
            mount = 'mount --bind "$0" "$1" && shift && exec "$@"'
            command = ['sh', '-c', mount, str(self.root / host), str(self.root / 'ckpts'), *command]
        where = dict(NNODES='2', NODE_RANK=str(int(host[1]) - 1), MASTER_ADDR='h1')
        with open(self.log(host), 'w') as log:
            self.runs[host] = subprocess.Popen(
                ['sh', 'tests/launch/two_hosts.sh', 'on', host, *command],
                cwd=ROOT,
                env=launch_env(1) | self.place | where | (env or {}),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def both(self, **kwargs):
        self.start('h1', **kwargs)
        self.start('h2', **kwargs)

    def log(self, host):
        return self.root / f'{host}.log'

    def printed(self, host, text, times=1):
        return self.log(host).read_text().count(text) >= times

    def last(self, host):
        return self.log(host).read_text().splitlines()[-1]

    def ends(self, seconds=60):
        """The exit codes on h1 and h2."""
        end = time.monotonic() + seconds
        codes = [self.runs[host].wait(timeout=max(0.1, end - time.monotonic())) for host in ('h1', 'h2')]
        assert 'hostname of the client socket' not in self.log('h1').read_text() + self.log('h2').read_text()
        return codes

    def processes(self, host, word):
        """The processes on a host whose command line begins with or has this word."""
        name = f'{Path(self.place["HOSTS"]).name}-{host}'
        pids = subprocess.run(['ip', 'netns', 'pids', name], capture_output=True, text=True).stdout.split()
        found = []
        for pid in pids:
            with contextlib.suppress(OSError):
                line = Path(f'/proc/{pid}/cmdline').read_bytes().decode().split('\0')
                if word in line:
                    found.append(int(pid))
        return found

    def signal(self, host, signum, word='run.sh'):
        for pid in self.processes(host, word):
            os.kill(pid, signum)


@pytest.fixture
def hosts(request, tmp_path):
    needs('ip', 'nsenter', 'unshare')
    made = Hosts(tmp_path, getattr(request, 'param', 'good'))
    yield made
    made.script('down')
    [run.wait(timeout=20) for run in made.runs.values()]


@pytest.mark.parametrize('hosts', ['debian'], indirect=True)
def test_two_hosts_learn_what_one_process_does_and_wait_for_the_second(hosts, run_sh):
    """A host's own name means 127.0.1.1 here, and machine 0 comes late: until then its port is closed."""
    folder = hosts.root / 'ckpts/run'
    hosts.start('h2')
    assert wait_until(lambda: hosts.printed('h2', 'waiting for machine 0 at h1:29500 = 10.78.0.1 (nothing listens'), 40)
    hosts.start('h1')
    assert hosts.ends() == [0, 0], hosts.last('h1')
    assert run_sh(**RUN | dict(experiment_name='single')).returncode == 0
    assert losses(folder) == pytest.approx(losses(folder.parent / 'single'), rel=1e-5) and steps(folder) == 12


def test_two_hosts_stop_together_and_resume_from_the_checkpoint_of_the_first(hosts):
    """SIGTERM to one host; then the other host's disk has no checkpoint; then its launcher is killed."""
    folder = hosts.root / 'h1/run'
    hosts.both(own_disk=True, num_training_steps=5000)
    assert wait_until(lambda: steps(folder) > 5, 60), hosts.last('h1')
    asked = time.monotonic()
    hosts.signal('h2', signal.SIGTERM)
    assert hosts.ends(20) == [75, 75] and 'state saved' in hosts.log('h1').read_text()
    assert time.monotonic() - asked < 20 and not (hosts.root / 'h2/run/last.pt').exists()
    done = steps(folder)
    hosts.both(own_disk=True, num_training_steps=5000)
    assert wait_until(lambda: steps(folder) > done, 60), hosts.last('h1')
    log = hosts.log('h1').read_text()
    assert 'not all machines have the' in log and f'resuming {hosts.root}/ckpts/run at step {done}' in log
    hosts.signal('h2', signal.SIGKILL, 'launch.start')
    assert hosts.ends(30) == [1, 1] and re.match(r'machine 1 \(h2\) ', hosts.last('h1')), hosts.last('h1')


def test_two_hosts_a_cable_is_cut_and_put_back(hosts):
    """Both hosts miss each other within a minute, print that last, and resume from the last save with a cable again."""
    folder = hosts.root / 'ckpts/run'
    hosts.both(env=dict(MAX_RESTARTS='1'), num_training_steps=5000)
    assert wait_until(lambda: steps(folder) > 5, 60), hosts.last('h1')
    hosts.script('cut')
    cut = time.monotonic()
    assert wait_until(lambda: all(hosts.printed(host, 'starting again') for host in ('h1', 'h2')), 60)
    assert 30 < time.monotonic() - cut < 60
    for host, other in (('h1', 'machine 1 (h2)'), ('h2', 'machine 0 (h1)')):
        assert re.search(rf'{re.escape(other)} has been silent for 4\d s', hosts.log(host).read_text())
    hosts.script('heal')
    done = steps(folder)
    assert wait_until(lambda: hosts.printed('h1', 'resuming') and steps(folder) > done, 60), hosts.last('h1')
    hosts.signal('h1', signal.SIGTERM)
    assert hosts.ends(20) == [75, 75]


@pytest.mark.parametrize('hosts', ['nameless'], indirect=True)
def test_two_hosts_that_cannot_run_together_say_why(hosts):
    by_address = dict(MASTER_ADDR='10.78.0.1')
    hosts.start('h1', env=by_address)
    hosts.start('h2')
    assert hosts.runs['h2'].wait(30) == 2 and "MASTER_ADDR='h1'" in hosts.last('h2') and 'ip addr' in hosts.last('h2')
    hosts.start('h2', env=by_address, base_lr=0.5)
    assert hosts.ends(30) == [2, 2]
    for host in ('h1', 'h2'):
        assert hosts.printed(host, 'base_lr: 0.001 on h1, 0.5 on h2'), hosts.last(host)
    hosts.script('cut')
    hosts.start('h1', env=by_address | dict(NODE_WAIT='8'))
    hosts.start('h2', env=by_address | dict(NODE_WAIT='8'))
    assert hosts.ends(40) == [1, 1]
    assert 'gave up waiting for machine 1 of 2 to come to port 29500 of machine 0 after 8 s' in hosts.last('h1')
    assert re.search('waiting for machine 0 at 10.78.0.1:29500 after 8 s: .*(no answer|No route)', hosts.last('h2'))
    hosts.script('heal')
    hosts.both(env=by_address | dict(MASTER_PORT='29600'))
    # torchrun's `python -u main.py`: the launchers have met and workers begin, but there is nothing to save yet
    assert wait_until(lambda: hosts.processes('h2', '-u'), 60)
    hosts.signal('h2', signal.SIGTERM)
    assert hosts.ends(40) == [75, 75] and not hosts.printed('h2', 'Traceback')


# ---------------------------------------------------------------- Slurm


class Slurm:
    def __init__(self, folder):
        self.root, self.place = folder, dict(CLUSTER=f'{tempfile.gettempdir()}/slurm_{os.getpid()}')
        done = self.script('up')
        if done.returncode:
            logs = [
                f'{path}:\n{path.read_text()[-2000:]}' for path in sorted(Path(self.place['CLUSTER']).glob('**/*.log'))
            ]
            self.script('down')
            pytest.fail('\n'.join([done.stdout[-2000:] + done.stderr[-2000:], *logs]))

    def script(self, *arguments, seconds=120):
        return subprocess.run(
            ['sh', 'tests/launch/slurm_up.sh', *map(str, arguments)],
            cwd=ROOT,
            env=launch_env(1) | self.place | dict(NPROC=''),
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def on(self, *command, **kwargs):
        done = self.script('on', 'head', *command, **kwargs)
        return done.returncode, done.stdout + done.stderr

    def flags(self, **settings):
        return as_flags(RUN | dict(ckpt_dir=str(self.root / 'ckpts')) | settings)

    def submit(self, *options, script=(), **settings):
        """The number of a job that runs slurm.sh with these options of sbatch."""
        command = ['sbatch', '--parsable', f'--output={self.root}/%x-%a.out', *options, 'launch/slurm.sh', *script]
        code, out = self.on(*command, *([] if '--' in script else self.flags(**settings)))
        assert code == 0, out
        return out.strip()

    def job(self, number, field):
        code, out = self.on('scontrol', 'show', 'job', number)
        return re.findall(rf'\b{field}=(\S+)', out) if code == 0 else []

    def end_of(self, number, seconds=90):
        ended = ('COMPLETED', 'FAILED', 'CANCELLED', 'NODE_FAIL')
        assert wait_until(lambda: {*self.job(number, 'JobState')} <= {*ended}, seconds), self.job(number, 'JobState')
        return sorted({*zip(self.job(number, 'JobState'), self.job(number, 'ExitCode'), strict=True)})


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    needs('ip', 'nsenter', 'unshare', 'slurmctld', 'slurmd', 'munged')
    cluster = Slurm(tmp_path_factory.mktemp('slurm'))
    try:
        yield cluster
    finally:
        cluster.script('down')


def test_slurm_stops_a_job_on_two_nodes_and_it_resumes(slurm):
    folder, log = slurm.root / 'ckpts/stopped', slurm.root / 'stopped-4294967294.out'
    options = ('--nodes=2', '--time=10', '--job-name=stopped')
    job = slurm.submit(*options, experiment_name='stopped', num_training_steps=5000)
    assert wait_until(lambda: steps(folder) > 5, 90)
    slurm.on('scancel', '--signal=TERM', job)
    assert wait_until(lambda: slurm.job(job, 'JobState') == ['PENDING'], 30), log.read_text()
    assert 'state saved' in log.read_text()
    done = steps(folder)
    time.sleep(6)  # Slurm fails a job that starts again before all nodes know of its first end

    def resumes():
        if slurm.job(job, 'JobState') == ['PENDING']:  # else Slurm waits until two minutes after the job's last end
            slurm.on('scontrol', 'update', f'JobId={job}', 'StartTime=now')
        time.sleep(1)  # on two busy cores, calls without a pause keep Slurm from starting it
        return steps(folder) > done

    assert wait_until(resumes, 150), log.read_text()
    assert f'at step {done}' in log.read_text() and 'on 2 x cpu' in log.read_text()
    slurm.on('scancel', job)
    assert slurm.end_of(job)[0][0] == 'CANCELLED'
    assert wait_until(lambda: log.read_text().count('state saved') == 2, 30)


def test_slurm_keeps_exit_codes_and_runs_arrays_and_tasks(slurm):
    """A wrong flag is FAILED 2:0 and not requeued; an array runs a grid; several tasks on a node are refused."""
    kill = '--export=ALL,SLURM_KILL_BAD_EXIT=1'  # srun then ends the other node when one has ended, with another code
    wrong = slurm.submit('--nodes=2', '--job-name=wrong', kill, solver='hein')
    short = slurm.submit('--time=1', '--job-name=short')
    assert slurm.end_of(wrong) == slurm.end_of(short) == [('FAILED', '2:0')]
    assert "solver='hein'" in (slurm.root / 'wrong-4294967294.out').read_text()
    assert '--time=00:01:00 is too short' in (slurm.root / 'short-4294967294.out').read_text()
    flags = slurm.flags()
    where = flags.index('--experiment_name')
    del flags[where : where + 2]
    grid = ('sweep.py', '--base_lr', '1e-3', '2e-3', '--', *flags)
    array = slurm.submit('--array=0-1', '--job-name=grid', script=grid)
    code, out = slurm.on('srun', '-N2', '--ntasks-per-node=2', 'sh', 'run.sh', *slurm.flags(experiment_name='tasks'))
    assert code == 2 and 'srun started run.sh several times on one node. Use --ntasks-per-node=1' in out, out
    assert slurm.end_of(array) == [('COMPLETED', '0:0')]
    assert [steps(folder) for folder in sorted(slurm.root.glob('ckpts/*base_lr=0p002*'))] == [12]
