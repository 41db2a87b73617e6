"""The record: metrics.jsonl, running means, and wandb for real, without its server."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import logging_utils
from config import Config, SettingError, parse_config
from logging_utils import Logger, Progress, RunningMeans, Speedometer

CPU = torch.device('cpu')
DISABLED = Config(wandb='disabled')


def lines_of(folder: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f'{name} is not JSON')

    return [json.loads(line, parse_constant=refuse) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


# ---------------------------------------------------------------- metrics.jsonl


def test_each_line_is_json_with_the_step_and_exact_values(tmp_path):
    logger = Logger(DISABLED, tmp_path)
    logger.log({'train/loss': 0.1, 'train/images': 128}, 1)
    logger.log({'train/loss': 1 / 3}, 2)
    logger.close()
    assert lines_of(tmp_path) == [
        {'train/step': 1, 'train/loss': 0.1, 'train/images': 128},
        {'train/step': 2, 'train/loss': 1 / 3},
    ]


def test_values_that_are_not_finite_can_be_written(tmp_path):
    Logger(DISABLED, tmp_path).log({'a': math.nan, 'b': math.inf, 'c': -math.inf, 'd': -3.5}, 1)
    (line,) = lines_of(tmp_path)
    assert [float(line['a']), float(line['b']), float(line['c']), line['d']] == [
        pytest.approx(math.nan, nan_ok=True),
        math.inf,
        -math.inf,
        -3.5,
    ]


@pytest.mark.parametrize('step, left', [(0, []), (1, []), (6, [3]), (7, [3, 6]), (9, [3, 6]), (99, [3, 6, 9])])
def test_the_record_is_cut_back_to_the_step_of_the_checkpoint(tmp_path, step, left):
    logger = Logger(DISABLED, tmp_path)
    for i in (3, 6, 9):
        logger.log({'train/loss': i / 7}, i)
    Logger(DISABLED, tmp_path, step).log({'train/loss': 0.5}, 100)
    assert [line['train/step'] for line in lines_of(tmp_path)] == [*left, 100]


def test_wandb_that_cannot_start_is_done_without_unless_asked_for(tmp_path, monkeypatch, capsys):
    """As for a user without a home folder."""
    import wandb

    def login(**_):
        raise KeyError('getpwuid(): uid not found: 4711')

    monkeypatch.setattr(wandb, 'login', login)
    monkeypatch.delenv('WANDB_MODE', raising=False)
    assert logging_utils.start_wandb(Config(wandb='auto'), tmp_path, None) is None
    assert 'uid not found: 4711' in capsys.readouterr().out
    with pytest.raises(SettingError, match='uid not found: 4711'):
        logging_utils.start_wandb(Config(wandb='online'), tmp_path, None)


def test_a_line_that_is_none_is_named(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    for bad in ('{"train/step": 2]}', '{"step": 2}'):
        path.write_text('{"train/step": 1}\n' + bad + '\n')
        with pytest.raises(SettingError, match=rf'{path}: line 2 is no line of a record \(.*step.*Mend or remove it'):
            Logger(Config(wandb='disabled'), tmp_path, 5)
        assert path.read_text().endswith(bad + '\n')


@pytest.mark.parametrize('half', ['{', '{"train/step": 9, "train/lo', '{"train/step": 9, "a": 1', '\n', '\0\0\0\0'])
def test_a_half_written_last_line_is_dropped(tmp_path, half):
    logger = Logger(DISABLED, tmp_path)
    logger.log({'a': 1.0}, 3)
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write(half)
    Logger(DISABLED, tmp_path, 10).log({'a': 2.0}, 10)
    assert [line['train/step'] for line in lines_of(tmp_path)] == [3, 10]


def test_a_line_is_on_the_disk_when_log_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(logging_utils.os, 'fsync', lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    logger = Logger(DISABLED, tmp_path)
    for step in (1, 2):
        logger.log({'a': 1.0}, step)
        assert synced[-1] == (tmp_path / 'metrics.jsonl').stat().st_size > 0
    assert len(synced) == 3  # and once when the record was opened


def test_only_the_first_process_keeps_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging_utils.ranks, 'is_main', lambda: False)
    monkeypatch.setattr(logging_utils.ranks, 'on_main', lambda fn: None)
    logger = Logger(DISABLED, tmp_path, wandb_id='abc')
    logger.log({'a': 1.0}, 1)
    logger.log_picture('x', torch.zeros(3, 4, 4, dtype=torch.uint8), 1)
    logger.log_curve('x', [(0, 1)], 'step', 'lr')
    logger.close()
    logging_utils.print_once('hello')
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ''


def test_a_picture_on_disk_has_the_same_pixels(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    Logger(DISABLED, tmp_path).log_picture('step_0000003_heun_raw', picture, 3)
    pixels = np.asarray(Image.open(tmp_path / 'samples' / 'step_0000003_heun_raw.png'))
    assert np.array_equal(pixels, picture.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------- running means


def test_means_are_those_of_numpy():
    rng = np.random.default_rng(0)
    batches = [
        rng.normal(5, 1, size).astype(np.float32) for size in (3, 8, 1)
    ]  # unequal, so the mean of means would be wrong
    means = RunningMeans(CPU)
    for batch in batches:
        means.add('loss', torch.from_numpy(batch).sum(), torch.tensor(float(len(batch))))
    assert means.means()['loss'] == pytest.approx(np.concatenate(batches).mean(dtype=np.float64), rel=1e-6)


def test_a_name_logged_on_some_steps_is_averaged_over_these():
    means = RunningMeans(CPU)
    for step in range(10):
        means.add('always', torch.tensor(float(step)), torch.tensor(1.0))
        if step % 4 == 0:
            means.add('sometimes', torch.tensor(float(step)), torch.tensor(1.0))
        means.add('empty bin', torch.tensor(0.0), torch.tensor(0.0))
    assert means.means() == {'always': 4.5, 'sometimes': 4.0}
    means.clear()
    assert means.means() == {}


def test_a_small_term_is_not_lost_in_a_large_sum():
    means = RunningMeans(CPU)
    for value in (2.0**24, *[1.0] * 1000):  # float32 would drop each 1
        means.add('x', torch.tensor(value), torch.tensor(1.0))
    assert means.means()['x'] == pytest.approx((2**24 + 1000) / 1001, rel=1e-6)


def test_means_go_on_from_a_checkpoint(tmp_path):
    whole, first, second = RunningMeans(CPU), RunningMeans(CPU), RunningMeans(CPU)
    for i, value in enumerate((0.3, 0.9, 1.7, 0.2)):
        for means in (whole, first if i < 2 else second):
            means.add('x', torch.tensor(value), torch.tensor(1.0))
        if i == 1:
            torch.save(first.over_ranks(), tmp_path / 'x.pt')
            second.load(torch.load(tmp_path / 'x.pt', weights_only=True))
    assert second.means() == whole.means()


def test_values_keep_no_graph():
    means, weight = RunningMeans(CPU), torch.ones(1, requires_grad=True)
    for _ in range(2):
        means.add('x', (3 * weight).sum(), torch.tensor(1.0))
        means.add_finite('y', 3 * weight)
        means.add_by_time('z', 3 * weight, 0.5 * weight)
        waiting = [x for calls in means.waiting.values() for call in calls for x in call if x is not None]
        assert not any(x.requires_grad for x in waiting)
        means.over_ranks()
        assert means.waiting == {} and not any(pair.requires_grad for pair in means.sums.values())


def steps_of_training(n):
    """(losses, times, gradient norm) as a training step has them; some are not finite."""
    generator = torch.Generator().manual_seed(0)
    for step in range(n):
        losses, t = torch.rand(2, 7 + step % 3, generator=generator)
        losses = 10.0 ** (step % 9 - 4) * losses
        if step % 5 == 2:
            losses[1], losses[3] = torch.nan, torch.inf
        yield losses, t, losses[0]


def fill(means, steps):
    for losses, t, norm in steps:
        means.add_finite('loss', losses)
        means.add_by_time('loss_t', losses, t)
        means.add_finite('norm', norm)
        means.add('total', losses[0].double() * 3, torch.tensor(3.0))
        means.add('lr', 0.1, 1)


def test_means_of_a_training_are_those_of_numpy():
    steps = list(steps_of_training(40))
    means = RunningMeans(CPU)
    fill(means, steps)
    losses, t = (np.concatenate([step[i].numpy() for step in steps]) for i in (0, 1))
    first = np.array([losses[0].item() for losses, _, _ in steps], np.float64)
    edges = np.arange(11) / 10
    ok = np.isfinite(losses)
    expected = dict(loss=losses[ok].mean(dtype=np.float64), norm=first.mean(), total=first.mean(), lr=0.1)
    for low, high in itertools.pairwise(edges):
        expected[f'loss_t_{low:.1f}_{high:.1f}'] = losses[ok & (t >= low) & (t < high)].mean(dtype=np.float64)
    assert means.means() == pytest.approx(expected, rel=1e-6)
    assert list(means.over_ranks()) == sorted(expected)
    counts = {name: pair[1].item() for name, pair in means.over_ranks().items()}
    assert (counts['loss'], counts['norm'], counts['total'], counts['lr']) == (ok.sum(), 40, 120, 40)


@pytest.mark.parametrize('most', [1, 2, 7, 64])
def test_sums_do_not_depend_on_when_they_are_made(monkeypatch, most):
    """Bit for bit: neither on how many wait, nor on being saved and loaded in between."""
    steps = list(steps_of_training(40))
    whole = RunningMeans(CPU)
    fill(whole, steps)
    monkeypatch.setattr(RunningMeans, 'MOST', most)
    often, saved = RunningMeans(CPU), RunningMeans(CPU)
    fill(often, steps)
    fill(saved, steps[:13])
    resumed = RunningMeans(CPU)
    fill(resumed, steps[:2])  # forgotten by load
    resumed.load(saved.over_ranks())
    fill(resumed, steps[13:])
    expected = whole.over_ranks()
    for means in (often, resumed):
        sums = means.over_ranks()
        assert sums.keys() == expected.keys()
        assert all(sums[name].equal(expected[name]) for name in sums)


def test_a_step_costs_no_arithmetic_and_what_waits_is_bounded():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (str(func),)
            return func(*args, **kwargs or {})

    steps, means = list(steps_of_training(600)), RunningMeans(CPU)
    with Operations() as seen:
        for losses, t, norm in steps[:100]:
            means.add_finite('loss', losses)
            means.add_by_time('loss_t', losses, t)
            means.add_finite('norm', norm)
            means.add('lr', 0.1, 1)
    assert set(seen.names) <= {'aten.detach.default'}  # which computes nothing
    for losses, t, norm in steps:
        fill(means, [(losses, t, norm)])
        assert sum(map(len, means.waiting.values())) < RunningMeans.MOST
    assert means.sums  # some were folded


def test_numbers_and_tensors_of_one_name_go_together():
    means = RunningMeans(CPU)
    means.add('x', 0.1, 1)
    means.add('x', torch.tensor(0.5), torch.tensor(1.0))
    means.add('x', 1, 2)
    assert means.means() == {'x': pytest.approx(1.6 / 4, rel=1e-6)}


def test_speed_is_that_since_the_restart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logging_utils.time, 'monotonic', lambda: now[0])
    speed = Speedometer(10)
    assert speed.images_per_second(10, 128) is None  # no step yet
    now[0] += 4
    assert speed.images_per_second(15, 128) == 5 * 128 / 4
    speed.restart(15)
    now[0] += 2
    assert speed.images_per_second(16, 128) == 128 / 2


# ---------------------------------------------------------------- the line for people


def test_progress_tells_the_step_the_loss_and_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logging_utils.time, 'monotonic', lambda: now[0])
    progress = Progress(20, 100, seconds_between_lines=5)
    for step in (30, 40, 50, 100):
        now[0] += 4
        progress.show(step, 0.125, 640)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown] == [
        '30/100',
        '50/100',
        '100/100',
    ]  # 4 s after a line is too early, the end is not
    assert 'loss 0.1250' in shown[0] and '640 images/s' in shown[0]
    assert '0.3 min of training left' in shown[1]  # 30 steps took 12 s, 50 are left: 20 s


# ---------------------------------------------------------------- wandb


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """No key is found anywhere, and wandb knows nothing of earlier tests."""
    import wandb

    home = tmp_path / 'home'
    home.mkdir()
    for name in ('HOME', 'WANDB_CONFIG_DIR', 'WANDB_CACHE_DIR', 'WANDB_DATA_DIR'):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv('NETRC', str(home / 'netrc'))
    for name in ('WANDB_API_KEY', 'WANDB_MODE', 'WANDB_BASE_URL', 'WANDB_DIR', 'WANDB_PROJECT', 'WANDB_ENTITY'):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


def offline_records(run_dir: Path) -> list[dict]:
    """The records of the one offline run in `run_dir`, read back by wandb's own reader."""
    (folder,) = (run_dir / 'wandb').glob('offline-run-*')
    command = [Path(sys.executable).with_name('wandb'), 'leet', 'inspect', '--json', folder]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def history(records: list[dict]) -> list[dict]:
    return [record['history']['item'] for record in records if record['type'] == 'history']


def test_wandb_offline_holds_what_was_logged(tmp_path, no_account):
    config = Config(wandb='offline', base_lr=0.125, wandb_project='a-project', experiment_name='a-run')
    start = dict(commit='abc', versions=dict(torch='2.15'), argv=['main.py'])
    logger = Logger(config, tmp_path, step=100, start=start)
    values = [{'train/loss': 0.1, 'eval/loss': 1 / 3}, {'train/loss': 1e-8}]
    logger.log(values[0], 100)
    logger.log(values[1], 200)
    picture = torch.randint(0, 256, (3, 8, 9), dtype=torch.uint8)
    logger.log_picture('step_0000200_heun_ema', picture, 200)
    logger.log_curve('lr_schedule', [(0, 0.5), (1, 0.25)], 'step', 'lr')
    logger.close()
    records = offline_records(tmp_path)
    run = next(record['run'] for record in records if record['type'] == 'run')
    assert (run['project'], run['display_name'], run['run_id']) == ('a-project', 'a-run', logger.wandb_id)
    stored = run['config']['update']
    for name, value in vars(config).items():
        assert stored[name] == (list(value) if isinstance(value, tuple) else value), name
    assert stored['start'] == start
    rows = history(records)
    for row, given, step in zip(rows, values, (100, 200), strict=False):
        assert row['train/step'] == step
        assert {name: row[name] for name in given} == given
    assert rows[2]['train/step'] == 200
    (path,) = [
        value for name, value in rows[2].items() if name.startswith('samples/heun_ema') and name.endswith('.path')
    ]
    (file,) = (tmp_path / 'wandb').glob(f'offline-run-*/files/{path}')
    assert np.array_equal(np.asarray(Image.open(file)), picture.permute(1, 2, 0).numpy())
    (table,) = (tmp_path / 'wandb').glob('offline-run-*/files/media/table/lr_schedule*.json')
    assert json.loads(table.read_text())['data'] == [[0, 0.5], [1, 0.25]]
    metric = next(record['metric'] for record in records if record['type'] == 'metric')
    assert (metric['glob_name'], metric['step_metric']) == ('*', 'train/step')
    assert records[-1]['exit']['exit_code'] == 0


def test_a_table_of_evaluations_joins_the_run(tmp_path, no_account):
    config = Config(wandb='offline', experiment_name='a-run')
    logger = Logger(config, tmp_path)
    logger.close()
    (before,) = (tmp_path / 'wandb').glob('offline-run-*')
    time.sleep(1.1)  # wandb names folders by the second
    rows = [dict(weights='ema', frechet=0.5), dict(weights='raw', kid=1.5)]
    logging_utils.log_table(config, tmp_path, logger.wandb_id, 'evaluation', rows)
    (new,) = {*(tmp_path / 'wandb').glob('offline-run-*')} - {before}
    assert new.name.endswith(logger.wandb_id)  # the same run
    (table,) = new.glob('files/media/table/evaluation*.json')
    found = json.loads(table.read_text())
    assert found['columns'] == ['weights', 'frechet', 'kid']
    assert found['data'] == [['ema', 0.5, None], ['raw', None, 1.5]]


def test_a_wandb_sweep_starts_runs(monkeypatch):
    """The command of the page about settings, filled in as wandb's agent does it."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    text = (Path(__file__).parent.parent / 'docs/settings.md').read_text()
    sweep = yaml.safe_load(text.split('```yaml\n')[1].split('```')[0])
    given = dict(base_lr=0.0007, time_sampler='uniform')
    assert sweep['parameters'].keys() == given.keys()
    flags = create_sweep_command_args({'args': {name: {'value': value} for name, value in given.items()}})['args']
    words = [w for word in create_sweep_command(sweep['command']) for w in (flags if word == '${args}' else [word])]
    assert words[:2] == ['sh', 'run.sh']
    config = parse_config(words[2:])
    assert {name: getattr(config, name) for name in given} == given and not config.final_pictures
    assert sweep['metric']['name'] == 'eval/reference'
    assert config.experiment_name == 'digits_time_sampler=uniform_base_lr=0p0007'


def test_wandb_goes_on_under_the_same_id_and_with_changed_settings(tmp_path, no_account):
    ids = []
    for log_every in (50, 60):
        logger = Logger(Config(wandb='offline', log_every=log_every), tmp_path, wandb_id=ids[0] if ids else None)
        ids.append(logger.wandb_id)
        logger.close()
    assert ids[0] == ids[1] and len(ids[0]) >= 8


def test_auto_without_a_key_keeps_the_record_on_disk_and_says_so(tmp_path, no_account, capsys):
    start = time.monotonic()
    logger = Logger(Config(wandb='auto'), tmp_path / 'home', wandb_id='kept')
    assert time.monotonic() - start < 5
    logger.log({'a': 1.0}, 1)
    logger.close()
    assert logger.run is None and logger.wandb_id == 'kept'
    shown = capsys.readouterr().out
    assert 'wandb' in shown and 'not logged in' in shown and 'on disk' in shown and 'wandb login' in shown
    assert not (tmp_path / 'home' / 'wandb').exists()
    assert len(lines_of(tmp_path / 'home')) == 1


def test_auto_obeys_wandb_mode(tmp_path, no_account, monkeypatch):
    for mode, expected in (('disabled', False), ('offline', True)):
        monkeypatch.setenv('WANDB_MODE', mode)
        logger = Logger(Config(wandb='auto'), tmp_path)
        logger.close()
        assert (logger.run is not None) is expected
    assert (tmp_path / 'wandb').exists()


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # an import fails
    Logger(DISABLED, tmp_path).close()
    with pytest.raises(ImportError):
        Logger(Config(wandb='offline'), tmp_path)


def test_online_without_a_key_says_what_to_do(tmp_path, no_account):
    with pytest.raises(SettingError, match=r"wandb='online'.*wandb login.*--wandb offline"):
        Logger(Config(wandb='online'), tmp_path)


@pytest.mark.parametrize('mode', ['auto', 'online'])
def test_a_malformed_key_is_an_error_with_a_remedy(tmp_path, no_account, monkeypatch, mode):
    monkeypatch.setenv('WANDB_API_KEY', 'abc')
    with pytest.raises(SettingError, match='WANDB_API_KEY'):
        Logger(Config(wandb=mode), tmp_path)


@pytest.mark.slow
def test_auto_with_a_key_but_no_server_records_offline(tmp_path, no_account, monkeypatch, capsys):
    monkeypatch.setenv('WANDB_API_KEY', 40 * 'a')
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
    monkeypatch.setattr(logging_utils, 'WANDB_INIT_TIMEOUT', 2)
    start = time.monotonic()
    logger = Logger(Config(wandb='auto'), tmp_path)
    assert time.monotonic() - start < 60
    logger.log({'train/loss': 0.25}, 3)
    logger.close()
    assert 'does not answer' in capsys.readouterr().out
    records = offline_records(tmp_path)
    assert [(row['train/step'], row['train/loss']) for row in history(records)] == [(3, 0.25)]
    assert records[-1]['exit']['exit_code'] == 0
    assert lines_of(tmp_path) == [{'train/step': 3, 'train/loss': 0.25}]
    assert 40 * 'a' not in json.dumps(records) + ''.join(os.listdir(tmp_path / 'wandb'))


def test_the_time_a_dead_server_costs_is_bounded():
    assert 5 <= logging_utils.WANDB_INIT_TIMEOUT <= 60
