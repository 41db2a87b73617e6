"""A run's copy on wandb: offline runs, read back by wandb's own reader, and servers that are slow, down or fake."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config, SettingError, parse_config
from runtime import wandb_run
from runtime.errors import Stopped
from tests.helpers import ROOT, TINY, as_flags, launch_env, record_of
from tests.test_logging_utils import lines_of, record_in, write
from trainer import ExampleDiffusionTrainer


def test_wandb_that_cannot_start_is_done_without_unless_asked_for(tmp_path, monkeypatch, capsys):
    """For example, for a user without a home folder."""
    import wandb

    def login(**_):
        raise KeyError('getpwuid(): uid not found: 4711')

    monkeypatch.setattr(wandb, 'login', login)
    monkeypatch.delenv('WANDB_MODE', raising=False)
    assert wandb_run.start_wandb(Config(wandb='auto'), tmp_path, None) is None
    assert 'uid not found: 4711' in capsys.readouterr().out
    with pytest.raises(SettingError, match='uid not found: 4711'):
        wandb_run.start_wandb(Config(wandb='online'), tmp_path, None)


def test_a_run_without_the_package_keeps_its_record_on_disk(tiny_config, build_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # importing it fails
    monkeypatch.delenv('WANDB_MODE', raising=False)
    config = tiny_config(wandb='auto')
    build_trainer(config).train_loop()
    assert record_of(config.run_dir)[-1]['train/step'] == 12
    assert capsys.readouterr().out.count('so the record is kept on disk only') == 1
    for mode in ('online', 'offline'):
        with pytest.raises(SettingError, match=f"wandb='{mode}': .*Install wandb, or use --wandb disabled"):
            wandb_run.start_wandb(Config(wandb=mode), tmp_path, None)


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """There is no key anywhere, and wandb has no state from earlier tests."""
    import wandb

    home = tmp_path / 'home'
    home.mkdir()
    for name in ('HOME', 'WANDB_CONFIG_DIR', 'WANDB_CACHE_DIR', 'WANDB_DATA_DIR'):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv('NETRC', str(home / 'netrc'))
    for name in 'API_KEY MODE BASE_URL DIR PROJECT ENTITY RUN_GROUP NAME TAGS NOTES RUN_ID SWEEP_ID'.split():
        monkeypatch.delenv(f'WANDB_{name}', raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


def offline_records(run_dir: Path) -> list[dict]:
    """The records of the one offline run in `run_dir`, read back by wandb's own reader."""
    (folder,) = (run_dir / 'wandb').glob('offline-run-*')
    command = [Path(sys.executable).with_name('wandb'), 'leet', 'inspect', '--json', folder]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record['type'] == kind]


def summary(records: list[dict]) -> dict:
    return {name: value for update in of_kind(records, 'summary') for name, value in update['update'].items()}


def history(records: list[dict]) -> list[dict]:
    return [record['history']['item'] for record in records if record['type'] == 'history']


def test_wandb_offline_holds_what_was_recorded(tmp_path, no_account):
    record = record_in(tmp_path, wandb='offline', base_lr=0.125, wandb_project='a-project')
    start = dict(commit='abc', versions=dict(torch='2.15'), argv=['main.py'])
    values = [{'train/loss': 0.1, 'eval/loss': 1 / 3}, {'train/loss': 1e-8}]
    picture = torch.randint(0, 256, (3, 8, 9), dtype=torch.uint8)
    with record.open(100, start):
        write(record, 100, **values[0])
        record.picture('step_0000200_heun_ema_0.98', picture, 200)
        record.histogram('times', torch.tensor([[0.0, 1.0], [1.0, 1.0]]), 200)
        write(record, 200, **values[1])
    run_dir = record.path.parent
    records = offline_records(run_dir)
    run = next(each['run'] for each in records if each['type'] == 'run')
    assert (run['project'], run['display_name'], run['run_id']) == ('a-project', 'run', record.wandb_id)
    stored = run['config']['update']
    for name, value in vars(record.config).items():
        assert stored[name] == (list(value) if isinstance(value, tuple) else value), name
    assert stored['start'] == start
    first, second = history(records)  # a row for each step
    for row, given, step in ((first, values[0], 100), (second, values[1], 200)):
        assert (row['train/step'], row['_step'], row['train/images']) == (step, step, step * 32)
        assert {name: row[name] for name in given} == given
    assert second['samples/heun_ema_0.98.caption'] == 'heun, averaged weights (EMA 0.98), step 200'
    (file,) = (run_dir / 'wandb').glob(f'offline-run-*/files/{second["samples/heun_ema_0.98.path"]}')
    assert np.array_equal(np.asarray(Image.open(file)), picture.permute(1, 2, 0).numpy())
    assert sum(second['times.values']) == 4
    metric = next(each['metric'] for each in records if each['type'] == 'metric')
    assert (metric['glob_name'], metric['step_metric']) == ('*', 'train/step')
    assert records[-1]['exit']['exit_code'] == 0


VARIABLES = dict(PROJECT='p2', ENTITY='e2', RUN_GROUP='g2', TAGS='a,b', NOTES='some words', NAME='n2')


@pytest.mark.parametrize(
    'settings, variables, expected',
    [
        ({}, {}, dict(project='diffusion', run_group='run', display_name='run')),
        ({}, VARIABLES, dict(project='p2', entity='e2', run_group='g2', display_name='n2', notes='some words')),
        (dict(wandb_project='p1', wandb_entity='e1'), VARIABLES, dict(project='p1', entity='e1', run_group='g2')),
    ],
)
def test_a_flag_wins_over_a_variable_which_wins_over_the_default(
    tmp_path, no_account, monkeypatch, settings, variables, expected
):
    for name, value in variables.items():
        monkeypatch.setenv(f'WANDB_{name}', value)
    with record_in(tmp_path, wandb='offline', **settings).open(0):
        pass
    (run,) = of_kind(offline_records(tmp_path / 'run'), 'run')
    assert {name: run.get(name) for name in expected} == expected
    assert run.get('tags', []) == variables.get('TAGS', '').split(',')[: 2 * bool(variables)]


@pytest.mark.parametrize(
    'settings, group',
    [
        (dict(seed=3), 'digits'),
        (dict(seed=3, base_lr=1e-3), 'digits_base_lr=0p001'),
        (dict(experiment_name='mine_seed=3'), 'mine'),
        (dict(experiment_name='seed3-mine'), 'mine'),
        (dict(experiment_name='seed3'), 'seed3'),
        (dict(experiment_name='mine'), 'mine'),
    ],
)
def test_runs_that_differ_only_in_the_seed_form_a_group(settings, group):
    assert wandb_run.group_of(Config(**settings)).strip('-_') == group


def test_runs_whose_long_names_end_in_a_hash_form_a_group_too():
    long = dict(base_lr=1.23e-3, time_sampler='uniform', weight_decay=0.123, grad_clip_norm=0.25, warmup_steps=12)
    names = [Config(seed=seed, **long) for seed in (0, 1, 2)]
    assert len({config.experiment_name for config in names}) == 3
    assert {wandb_run.group_of(config) for config in names} == {names[0].experiment_name}


def test_a_wrong_variable_is_refused(tmp_path, no_account, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'no')
    with pytest.raises(SettingError, match="WANDB_MODE='no': it must be online, offline or disabled"):
        record_in(tmp_path, wandb='auto').open(0).__enter__()
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_TAGS', 65 * 'a')
    with pytest.raises(SettingError, match=r"wandb='offline': .*--wandb disabled"):
        record_in(tmp_path, wandb='offline').open(0).__enter__()


def test_pictures_of_a_name_are_one_panel_and_losses_by_time_one_plot(tmp_path, no_account):
    record = record_in(tmp_path, wandb='offline')
    picture = torch.zeros(3, 4, 5, dtype=torch.uint8)
    with record.open(0):
        for step, loss in ((10, 1.0), (20, 0.5)):
            record.picture(f'step_{step:07d}_adams_raw', picture, step)
            record.picture(f'ink_step_{step:07d}_adams_raw', picture, step)
            floor = {'train/floor_t_0.0_0.1': 0.125} if step == 10 else {}  # logged once, but stays in the plot
            line = {'train/loss_t_0.0_0.1': 2 * loss, 'train/loss_t_0.1_0.2': loss, 'eval/reference_t_0.0_0.1': loss}
            write(record, step, **line, **floor, **{'eval/loss': loss})
        write(record, 30, **{'train/loss_t_0.0_0.1': 9.0})  # nothing was evaluated
    records = offline_records(tmp_path / 'run')
    rows = history(records)
    for row, step in zip(rows, (10, 20), strict=False):
        assert row['samples/adams_raw.caption'] == f'adams, raw weights, step {step}'
        assert row['samples/ink_adams_raw.caption'] == f'ink_adams, raw weights, step {step}'
        assert not any('step_0' in name for name in row)
    assert ['loss_by_time_table.path' in row for row in rows] == [True, True, False]
    (file,) = (tmp_path / 'run/wandb').glob(f'offline-run-*/files/{rows[1]["loss_by_time_table.path"]}')
    points = {tuple(point) for point in json.loads(file.read_text())['data']}
    assert points == {
        (0.05, 'train/loss', 1.0), (0.15, 'train/loss', 0.5), (0.05, 'train/floor', 0.125),
        (0.05, 'eval/reference', 0.5),
    }  # fmt: skip
    hidden = [metric['glob_name'] for metric in of_kind(records, 'metric') if metric['options'].get('hidden')]
    assert hidden == ['train/loss_t_*', 'train/floor_t_*', 'eval/reference_t_*']


def test_a_repeated_step_is_on_wandb_once(tmp_path, no_account):
    """The second start has no checkpoint with an id, as happens after an error before the first save."""
    record = record_in(tmp_path, wandb='offline')
    with pytest.raises(ZeroDivisionError), record.open(0):
        for step in (10, 20, 30):
            write(record, step, loss=1 / step)
        raise ZeroDivisionError
    (first,) = (tmp_path / 'run/wandb').glob('offline-run-*')
    records = offline_records(tmp_path / 'run')
    assert of_kind(records, 'exit')[0]['exit_code'] == 1  # the run has failed
    assert of_kind(records, 'alert')[0]['title'] == 'the run failed'
    first.rename(tmp_path / 'first')
    again = record_in(tmp_path, wandb='offline')
    with pytest.raises(Stopped), again.open(20):
        for step in (20, 30, 31, 40):
            write(again, step, loss=1 / step)
        raise Stopped
    records = offline_records(tmp_path / 'run')
    assert of_kind(records, 'exit')[0]['exit_code'] == 0 and not of_kind(records, 'alert')  # a stop is not a failure
    assert [(row['_step'], row['train/step']) for row in history(records)] == [(31, 31), (40, 40)]
    (run,) = of_kind(records, 'run')
    assert run['run_id'] == record.wandb_id == again.wandb_id
    assert [line['train/step'] for line in lines_of(tmp_path)] == [10, 20, 30, 31, 40]


def test_a_run_that_turns_wandb_on_later_has_complete_curves(tmp_path, no_account):
    record = record_in(tmp_path)
    with record.open(0):
        for step in (10, 20, 30):
            write(record, step, loss=1 / step if step < 20 else float('nan'))
    again = record_in(tmp_path, wandb='offline')
    with again.open(30):
        write(again, 30, loss=1 / 30)
    rows = history(offline_records(tmp_path / 'run'))
    assert [(row['train/step'], row['_step']) for row in rows] == [(10, 10), (20, 20), (30, 30)]
    assert [row['loss'] for row in rows] == [1 / 10, 'NaN', 1 / 30]  # wandb writes NaN as text


def test_a_row_is_shown_when_its_line_is_written_and_a_line_may_grow(tmp_path, no_account):
    record = record_in(tmp_path, wandb='offline')
    with record.open(0):
        record.write(10, {'a': 1.0})
        record.histogram('h', torch.ones(3), 10)
        record.write(10, {'a': 1.0, 'b': 2.0})  # in a real run minutes later, after sampling
        write(record, 20, a=3.0)
    rows = history(offline_records(tmp_path / 'run'))
    assert [row['train/step'] for row in rows] == [10, 10, 20]
    assert rows[0]['a'] == 1 and 'a' not in rows[1] and rows[1]['b'] == 2 and rows[1]['h_p50'] == 1
    assert lines_of(tmp_path)[0].items() >= {'a': 1.0, 'b': 2.0, 'h_p05': 1.0, 'h_p95': 1.0}.items()


def test_an_alert_of_each_kind_is_sent_once_an_hour(tmp_path, no_account):
    from training.bad_steps import BadSteps

    record = record_in(tmp_path, wandb='offline')
    bad_steps = BadSteps(record.config, torch.device('cpu'))
    with record.open(0):
        for step in range(3):
            bad_steps.check(torch.tensor(torch.nan), step)
            assert bad_steps.report(record.alert) == step + 1
        record.alert('another', 'text')
    alerts = of_kind(offline_records(tmp_path / 'run'), 'alert')
    assert [(alert['title'], alert['level']) for alert in alerts] == [
        ('steps were skipped', 'WARN'),
        ('another', 'WARN'),
    ]
    assert 'skipped 1 of the last steps, most recently step 0' in alerts[0]['text']
    assert {alert['wait_duration'] for alert in alerts} == {'3600000'}


def test_an_alert_is_sent_again_after_an_hour(tmp_path, monkeypatch):
    sent, now = [], [5.0]
    run = SimpleNamespace(id='x', starting_step=0, offline=True, alert=lambda kind, *_, **__: sent.append(kind))
    wandb_copy = wandb_run.WandbRun(run, tmp_path, -1)
    monkeypatch.setattr(wandb_run, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    for now[0], expected in (5.0, 1), (3600.0, 1), (3606.0, 2), (7200.0, 2), (7207.0, 3):
        wandb_copy.alert('a', 'text')
        assert len(sent) == expected


def test_a_table_of_evaluations_joins_the_run(tmp_path, no_account):
    record = record_in(tmp_path, wandb='offline')
    with record.open(0):
        pass
    run_dir, run_id = record.path.parent, record.wandb_id
    (before,) = (run_dir / 'wandb').glob('offline-run-*')
    time.sleep(1.1)  # wandb names folders by the second
    rows = [dict(weights='ema', frechet=0.5), dict(weights='raw', kid=1.5)]
    notes = run_dir / 'wandb/resume.json'
    notes.write_text(under_way := json.dumps(dict(id=run_id, sent=None)))
    wandb_run.log_table(record.config, run_dir, run_id, 'evaluation', rows)
    assert notes.read_text() == under_way
    (new,) = {*(run_dir / 'wandb').glob('offline-run-*')} - {before}
    assert new.name.endswith(run_id)  # the same run
    (table,) = new.glob('files/media/table/evaluation*.json')
    found = json.loads(table.read_text())
    assert found['columns'] == ['weights', 'frechet', 'kid']
    assert found['data'] == [['ema', 0.5, None], ['raw', None, 1.5]]


SWEEP = ROOT / 'examples/sweep.yaml'


def agent_words(**given) -> list[str]:
    """The command that wandb's agent runs for these values: it fills in the macros of the sweep's command."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(SWEEP.read_text())
    assert sweep['parameters'].keys() >= given.keys() and sweep['metric']['name'] == 'eval/reference'
    filled = create_sweep_command_args({'args': {name: {'value': value} for name, value in given.items()}})
    filled |= dict(env=['/usr/bin/env'], interpreter=['python'], program=[sweep['program']])
    groups = (
        filled.get(word[2:-1], []) if word.startswith('${') else [word]
        for word in create_sweep_command(sweep['command'])
    )
    return [word for group in groups for word in group]


def test_the_wandb_sweep_uses_existing_settings():
    import yaml

    given = dict(base_lr=0.002, time_sampler='uniform', seed=1)
    words = agent_words(**given)
    assert words[:3] == ['/usr/bin/env', 'sh', 'run.sh'] and words[-3:] == [f'--{k}={v}' for k, v in given.items()]
    config = parse_config(words[3:])
    assert {name: getattr(config, name) for name in given} == given and not config.final_pictures
    assert wandb_run.group_of(config) == 'digits_time_sampler=uniform_base_lr=0p002'
    assert yaml.safe_load(SWEEP.read_text())['parameters'].keys() == given.keys()


@pytest.mark.slow
def test_a_run_of_a_sweep_gets_the_id_of_the_agent(tmp_path):
    words = agent_words(base_lr=0.002, time_sampler='uniform', seed=1)
    short = TINY | dict(ckpt_dir=str(tmp_path), num_training_steps=4, wandb='offline')
    for name in ('base_lr', 'time_sampler', 'optimizer'):
        short.pop(name)
    env = launch_env(1) | dict(WANDB_RUN_ID='trial7', WANDB_SWEEP_ID='s5', WANDB_PROJECT='p')
    done = subprocess.run([*words, *as_flags(short)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (folder,) = [path.parent for path in tmp_path.glob('*/wandb')]
    (run,) = of_kind(offline_records(folder), 'run')
    assert (run['run_id'], run['sweep_id'], run['project']) == ('trial7', 's5', 'p')
    assert 'seed' not in run['run_group'] and 'seed=1' in run['display_name']


class Mine(ExampleDiffusionTrainer):
    def after_sampling(self, name, x, inputs):
        self.log('after/brightness', x)
        self.picture(f'{name}_mine', (255 * x[0]).byte().expand(3, -1, -1))
        self.histogram('after/greys', x)


@pytest.mark.slow
def test_a_whole_run_is_on_wandb(tiny_config, build_trainer, no_account):
    """Every value by step, final numbers in the summary, a panel for each sampler and set of weights, and own hooks."""
    settings = dict(sample_every=6, eval_metrics_every=6, final_eval=True, raw_pictures=True)
    config = tiny_config(wandb='offline', **settings)
    build_trainer(config, Mine).train_loop()
    records, lines = offline_records(config.run_dir), record_of(config.run_dir, levels=True)
    rows = [row for row in history(records) if row['train/step'] > 0]
    for line in lines:
        here = {k: v for row in rows if row['train/step'] == line['train/step'] for k, v in row.items()}
        assert here.items() >= line.items()
    last, end = lines[-1], summary(records)
    final = {name: value for name, value in last.items() if name.startswith(('final/', 'eval/'))}
    assert len([name for name in final if name.startswith('final/')]) > 4 and end.items() >= final.items()
    for panel in ('adams_ema_0.999', 'adams_raw', 'adams_raw_mine', 'sde_dpmpp_2m_raw'):
        assert [row['train/step'] for row in rows if f'samples/{panel}.path' in row] == [6, 12]
    assert last['after/greys_p05'] <= last['after/greys_p50'] <= last['after/greys_p95'] and 'after/brightness' in last
    assert sum(rows[-1].get('after/greys.values') or end['after/greys.values']) == 60 * 64
    picture = np.asarray(Image.open(config.run_dir / 'samples/histogram_after_greys.png'))
    assert picture.shape == (116, 320) and (picture[16:] < 255).any()
    from reports import page

    assert 'histogram_after_greys' in page.report(page.read(config.run_dir))


def test_a_resumed_run_keeps_its_wandb_id_with_changed_settings(tmp_path, no_account):
    ids = [None]
    for log_every in (50, 60):
        record = record_in(tmp_path, wandb='offline', log_every=log_every)
        record.wandb_id = ids[-1]
        with record.open(0):
            ids.append(record.wandb_id)
    assert ids[1] == ids[2] and len(ids[1]) >= 8


def test_auto_without_a_key_keeps_the_record_on_disk_and_prints_that(tmp_path, no_account, capsys):
    start = time.monotonic()
    record = record_in(tmp_path, wandb='auto')
    record.wandb_id = 'kept'
    with record.open(0):
        assert time.monotonic() - start < 5
        write(record, 1, a=1.0)
    assert record.wandb_id == 'kept'
    shown = capsys.readouterr().out
    assert 'wandb' in shown and 'not logged in' in shown and 'on disk' in shown and 'wandb login' in shown
    assert not (tmp_path / 'run/wandb').exists()
    assert len(lines_of(tmp_path)) == 1


@pytest.mark.parametrize('mode', ['disabled', 'offline'])
def test_auto_obeys_wandb_mode(tmp_path, no_account, monkeypatch, mode):
    monkeypatch.setenv('WANDB_MODE', mode)
    with record_in(tmp_path, wandb='auto').open(0):
        pass
    assert (tmp_path / 'run/wandb').exists() is (mode == 'offline')


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # `import wandb` now fails
    record = record_in(tmp_path)
    with record.open(0):
        record.picture('x', torch.zeros(3, 4, 4, dtype=torch.uint8), 0)
    with pytest.raises(SettingError, match='Install wandb'), record_in(tmp_path, wandb='offline').open(0):
        pass


def test_online_without_a_key_is_an_error_with_a_remedy(tmp_path, no_account):
    with pytest.raises(SettingError, match=r"wandb='online'.*wandb login.*--wandb offline"):
        record_in(tmp_path, wandb='online').open(0).__enter__()


@pytest.mark.parametrize('mode', ['auto', 'online'])
def test_a_malformed_key_is_an_error_with_a_remedy(tmp_path, no_account, monkeypatch, mode):
    monkeypatch.setenv('WANDB_API_KEY', 'abc')
    with pytest.raises(SettingError, match='WANDB_API_KEY'):
        record_in(tmp_path, wandb=mode).open(0).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize('is_open', [True, False])
def test_the_start_waits_for_the_server_only_as_long_as_allowed(
    tiny_config, build_trainer, no_account, monkeypatch, is_open
):
    """With a server that accepts connections but never answers, and without one."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        monkeypatch.setenv('WANDB_API_KEY', 40 * 'a')
        monkeypatch.setenv('WANDB_BASE_URL', f'http://127.0.0.1:{server.getsockname()[1]}')
        monkeypatch.setattr(wandb_run, 'INIT_TIMEOUT', 3)
        if not is_open:
            server.close()
        trainers = [
            build_trainer(tiny_config(experiment_name=mode, wandb=mode, num_training_steps=20, sample_every=5))
            for mode in ('disabled', 'auto')
        ]
        seconds = []
        for trainer in trainers:
            start = time.monotonic()
            trainer.train_loop()
            seconds.append(time.monotonic() - start)
    assert seconds[1] < 2 * seconds[0] + 3 + 10, seconds  # 10: wandb's own start and end, see the table below
    records = offline_records(trainers[1].config.run_dir)
    assert [row['train/step'] for row in history(records)][-1] == 20


# The first start of a run, which is killed or raises an error.
FIRST = """
import os, signal, sys, time
from pathlib import Path
from tests.test_logging_utils import record_in, write

folder, mode, end = sys.argv[1:]
record = record_in(Path(folder), wandb=mode)
with record.open(0):
    for step in (10, 20, 30):
        write(record, step, loss=1 / step)
    if end == 'killed':
        time.sleep(1)  # before it has sent anything
        os.kill(os.getpid(), signal.SIGKILL)
    if end == 'error':
        raise RuntimeError('lost')
"""


@pytest.mark.slow
@pytest.mark.parametrize('mode, end', [('online', 'killed'), ('online', 'error'), ('offline', 'error')])
def test_a_server_has_each_step_of_a_resumed_run_once(tmp_path, no_account, monkeypatch, mode, end):
    server = subprocess.Popen([sys.executable, '-c', SERVER, tmp_path / 'hang'], stdout=subprocess.PIPE, text=True)
    try:
        url = f'http://127.0.0.1:{server.stdout.readline().strip()}'
        env = dict(WANDB_API_KEY=40 * 'a', WANDB_BASE_URL=url, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        subprocess.run([sys.executable, '-c', FIRST, tmp_path, mode, end], timeout=60, cwd=ROOT)
        again = record_in(tmp_path, wandb=mode)
        with again.open(20):
            for step in (20, 30, 40):
                write(again, step, loss=1 / step)
        if mode == 'offline':
            sync = [Path(sys.executable).with_name('wandb'), 'sync', '--yes']
            subprocess.run(sync, cwd=tmp_path / 'run', check=True, timeout=60, capture_output=True)
        with urllib.request.urlopen(f'{url}/rows') as answer:
            rows = json.loads(answer.read())
    finally:
        server.kill()
    assert [(row['train/step'], row['_step'], row['loss']) for row in rows] == [(s, s, 1 / s) for s in (10, 20, 30, 40)]


@pytest.mark.slow
def test_auto_with_a_key_but_no_server_records_offline(tmp_path, no_account, monkeypatch, capsys):
    monkeypatch.setenv('WANDB_API_KEY', 40 * 'a')
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
    monkeypatch.setattr(wandb_run, 'INIT_TIMEOUT', 2)
    start = time.monotonic()
    record = record_in(tmp_path, wandb='auto')
    with record.open(0):
        assert time.monotonic() - start < 60
        write(record, 3, **{'train/loss': 0.25})
    assert 'does not answer' in capsys.readouterr().out
    records = offline_records(tmp_path / 'run')
    assert [(row['train/step'], row['train/loss']) for row in history(records)] == [(3, 0.25)]
    assert records[-1]['exit']['exit_code'] == 0
    assert lines_of(tmp_path) == [{'train/step': 3, 'train/images': 96, 'train/loss': 0.25}]
    assert 40 * 'a' not in json.dumps(records) + ''.join(os.listdir(tmp_path / 'run/wandb'))


# A fake server: it answers wandb's requests at the start of a run, stores the rows that wandb sends, and serves them at
# /rows. While the file `hang` exists, it accepts and reads requests without answering.
SERVER = """
import gzip, http.server, json, os, sys, time

rows = []

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        text = (gzip.decompress(body) if self.headers.get('Content-Encoding') == 'gzip' else body).decode('latin1')
        while os.path.exists(sys.argv[1]):
            time.sleep(0.2)
        data = {}
        if 'file_stream' in self.path:
            for name, sent in (json.loads(text).get('files') or {}).items():
                if 'history' in name:
                    rows[sent['offset']:] = map(json.loads, sent['content'])
        elif 'RunResumeStatus' in text and rows:
            bucket = dict(id='x', name='abc', displayName='d', summaryMetrics='{}', config='{}', tags=[],
                          eventsTail='[]', historyTail=json.dumps([json.dumps(rows[-1])]), logLineCount=0,
                          historyLineCount=len(rows), eventsLineCount=0, wandbConfig='{"t": 1}')
            data = dict(model=dict(id='p', name='p', entity=dict(id='e', name='me'), bucket=bucket))
        elif 'upsertBucket' in text:
            project = dict(id='p', name='p', entity=dict(id='e', name='me'))
            bucket = dict(id='x', name='abc', displayName='d', description='', config='{}', sweepName=None,
                          project=project, historyLineCount=len(rows))
            data = dict(upsertBucket=dict(bucket=bucket, inserted=not rows))
        elif 'createRunFiles' in text:
            data = dict(createRunFiles=dict(runID='x', uploadHeaders=[], files=[]))
        answer = json.dumps(rows if self.path == '/rows' else dict(data=data)).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

# A run with 200 lines; it makes the server hang, kills it, or stops wandb's own process.
CLIENT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from config import Config
from logging_utils import Record
from runtime import command

what, when, folder, server = sys.argv[1:]

def harm():
    if what == 'hangs':
        open(f'{folder}/hang', 'w').close()
    elif what == 'gone':
        os.kill(int(server), signal.SIGKILL)
    else:  # wandb's own process
        parent = f'PPid:\\t{os.getpid()}\\n'
        children = [path.parent for path in Path('/proc').glob('[0-9]*/status') if parent in path.read_text()]
        (core,) = [int(path.name) for path in children if 'wandb-core' in (path / 'cmdline').read_text()]
        os.kill(core, signal.SIGSTOP)
        open(f'{folder}/core', 'w').write(str(core))

def seconds(call):
    start = time.monotonic()
    call()
    return time.monotonic() - start

def write(step):
    with record.line(step) as line:
        line |= {f'train/x{i}': float(i) for i in range(100)}

def work():
    if when == 'start':
        harm()
    context = record.open(0)
    seen['open'] = seconds(context.__enter__)
    seen['line'] = 0.0
    for step in range(1, 201):
        if step == 50 and when == 'mid':
            harm()
        seen['line'] = max(seen['line'], seconds(lambda: write(step)))
    if when == 'end':
        harm()
    seen['close'] = seconds(lambda: context.__exit__(None, None, None))

seen, start = {}, time.monotonic()
config = Config(ckpt_dir=folder, experiment_name='run', wandb='auto', log_every=1, num_training_steps=200)
record = Record(config, torch.device('cpu'))
command.run(work)
seen['ended'] = time.time()
open(f'{folder}/seen.json', 'w').write(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    'what, when',
    [('hangs', 'start'), ('hangs', 'mid'), ('hangs', 'end'), ('gone', 'mid'), ('stopped', 'mid'), ('stopped', 'end')],
)
def test_neither_a_hanging_server_nor_wandb_itself_delays_a_run(tmp_path, no_account, what, when):
    """Measured with wandb 0.31.0, in seconds: `open`, the longest line, `close`, and from there until the process ends.

    what, when    | open | line | close | exit | wandb without time_limit and limit_exit
    hangs, start  | 36.2 | 0.02 |  0.0  | 10.1 | exit 22.4, of the offline run that replaces it
    hangs, mid    |  1.0 | 0.07 | 10.1  | 10.1 | exit 12.3; a line with a picture takes 0.5, as without a server
    hangs, end    |  1.0 | 0.07 | 10.1  | 10.1 | exit 12.3
    gone, mid     |  1.0 | 0.05 | 10.1  |  0.8 |
    stopped, mid  |  1.0 | 15.0 |  0.0  | 10.1 | `run.log` never returns
    stopped, end  |  1.0 | 0.06 | 15.0  | 10.1 | `run.finish` never returns

    So wandb's finish_timeout covers a hanging server, but not wandb's own process (stopped by SIGSTOP).
    """
    hang = tmp_path / 'hang'
    server = subprocess.Popen([sys.executable, '-c', SERVER, hang], stdout=subprocess.PIPE, text=True)
    url = f'http://127.0.0.1:{server.stdout.readline().strip()}'
    env = os.environ | dict(WANDB_API_KEY=40 * 'a', WANDB_BASE_URL=url, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    command = [sys.executable, '-c', CLIENT, what, when, tmp_path, str(server.pid)]
    try:
        with open(tmp_path / 'out', 'w') as out:  # not a pipe: a stopped process would keep it open
            done = subprocess.run(command, env=env, stdout=out, stderr=out, timeout=100)
        exited, seen = time.time(), json.loads((tmp_path / 'seen.json').read_text())
    finally:
        server.kill()
        if (tmp_path / 'core').exists():
            os.kill(int((tmp_path / 'core').read_text()), 9)
    assert done.returncode == 0
    assert seen['open'] < 45 and seen['line'] < 16 and seen['close'] < 16 and exited - seen['ended'] < 12
    assert what == 'stopped' or seen['line'] < 2  # a hanging server does not delay training
    assert [line['train/step'] for line in lines_of(tmp_path)] == list(range(1, 201))
    shown = (tmp_path / 'out').read_text()
    if when == 'start':
        assert 'recording offline' in shown
    else:
        problem = 'failed' if (what, when) == ('stopped', 'mid') else 'did not accept the rest of the record'
        assert f'wandb {problem} (TimeoutError: ' in shown and '`wandb sync` can send' in shown


def test_the_time_lost_to_a_dead_server_is_bounded():
    assert 5 <= wandb_run.INIT_TIMEOUT <= 60
