"""Runs that differ only in their seed: one row with mean and spread, and differences that are judged by the spread."""

import dataclasses
import json
import re
import statistics

import pytest

import main
from config import Config, SettingError
from reports.seeds import cells, changes_of, grouped, text_of_changes
from scripts import compare, sweep
from scripts.compare import take_seeds
from tests.helpers import columns_in
from tests.scripts.test_compare import PARTS, compared  # noqa: F401


def made(folder, name, curve, number, **settings):
    """Write a run's folder with this loss curve and one number at the end; returns its path."""
    run = folder / name
    run.mkdir(parents=True)
    config = Config(experiment_name=name, ckpt_dir=str(folder), **settings)
    (run / 'config.json').write_text(json.dumps(dataclasses.asdict(config)))
    lines = [{'train/step': 10 * (i + 1), 'train/loss': value} for i, value in enumerate(curve)]
    lines[-1] |= {'final/adams/frechet': number, 'eval/loss': number / 2}
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (run / 'run.json').write_text(json.dumps([{'trainer': {'name': 'Mine'}}]))
    return str(run)


@pytest.fixture
def folders(tmp_path):
    """Three seeds for each of three learning rates: the second rate is worse, the third as good as the first."""
    numbers = {1e-3: (1.0, 1.1, 1.2), 2e-3: (2.0, 2.1, 2.2), 3e-3: (1.05, 1.15, 1.3)}
    return [
        made(tmp_path, f'lr{1000 * lr:.0f}_{seed}', [3 + seed, 2 + 2 * seed, 1 + seed], number, base_lr=lr, seed=seed)
        for lr, values in numbers.items()
        for seed, number in enumerate(values)
    ]


def test_the_table_has_a_row_for_each_setting_with_mean_and_spread(folders, capsys, tmp_path):
    compare.compare(compare.Compare(tuple(folders), str(tmp_path / 'x.html')))
    text = capsys.readouterr().out
    table, changes = map(columns_in, text.split('difference from'))
    assert table['seeds'] == ['3'] * 3 and table['final/adams/frechet'] == ['1.1 ± 0.1', '2.1 ± 0.1', '1.167 ± 0.13']
    assert table['base_lr'] == ['0.001', '0.002', '0.003'] and 'seed' not in table
    assert changes['final/adams/frechet'] == ['+1', 'none']
    page = (tmp_path / 'x.html').read_text()
    assert page.count('1.1 ± 0.1') == 2 and '<td>none</td>' in page and 'Differences from base_lr=0.001' in page
    assert '<title>9 runs</title>' in page and '<b>lr1_0</b><br>base_lr=0.001</td>' in page
    for rate, difference in ('0.002', r'\+1'), ('0.003', 'none'):
        assert re.search(f'<tr><td>base_lr={rate}</td>(<td>[^<]*</td>)*<td>{difference}</td>', page)


def test_curves_have_the_mean_and_a_band(folders, monkeypatch):
    from reports import page

    drawn = []
    monkeypatch.setattr(page, 'plot', lambda curves, title, bands: drawn.append((curves, bands)) or '<svg/>')
    groups = grouped([page.read(folder) for folder in folders])
    assert [len(group) for group in groups] == [3, 3, 3]
    compare.shared_plot(groups, ['a', 'b', 'c'], 'loss', ('train/loss',))
    ((curves, bands),) = drawn
    assert curves['a'] == ([10, 20, 30], [4.0, 4.0, 2.0])
    assert bands['b'] == [statistics.stdev([3, 4, 5]), statistics.stdev([2, 4, 6]), 1.0]


def test_a_band_is_drawn_around_the_mean():
    from reports.page import plot

    curves = {'a': ([1, 2], [2.0, 3.0]), 'b': ([1, 2], [5.0, 6.0])}
    plain, banded = plot(curves, 'loss'), plot(curves, 'loss', bands={'a': [0.5, 0.5]})
    assert 'FillBetween' in banded and 'FillBetween' not in plain


def test_with_one_seed_each_a_hint_replaces_the_differences(folders, capsys, tmp_path):
    compare.compare(compare.Compare((folders[0], folders[3]), str(tmp_path / 'x.html')))
    text = capsys.readouterr().out
    assert 'chance: base_lr=0.001 or every other run has only one seed. Train with --seed 1' in text
    assert 'seeds' not in re.findall(r'^\w+', text, re.M) and 'warning' not in text
    compare.compare(compare.Compare((folders[0], made(tmp_path, 'other', [1.0], 1.0, dataset='mnist'))))
    assert 'warning: these runs are of different data sets' in capsys.readouterr().out


def test_runs_with_other_settings_trainers_or_data_are_separate_groups(tmp_path):
    from reports.page import read

    runs = [
        read(made(tmp_path, f'n{i}', [1.0], 1.0, **settings))
        for i, settings in enumerate([
            dict(seed=4, init_from='a_seed=4_teacher'), dict(seed=5, init_from='a_seed=4_seed=5_teacher'),
            dict(seed=0, channels=16), dict(seed=1, channels=32), dict(seed=2, channels=16),
            dict(seed=0, data_path='split_seed=1'), dict(seed=1, data_path='split_seed=2'),  # other data
        ])
    ]  # fmt: skip
    runs[4].starts = [{'trainer': {'name': 'Other'}}]
    assert [[runs.index(run) for run in group] for group in grouped(runs)] == [[0, 1], [2], [3], [4], [5], [6]]


def test_differences_are_judged_by_both_spreads():
    rows = [['a', [1.0, 2.0], [2.5, 3.5]], ['b', [1.0, 2.0], [2.4, 3.4]], ['c', [1.0], [5.0]], ['step', [1, 1], [2, 2]]]
    # spreads: 0.7071 each, together exactly 1
    assert changes_of(rows) == [['a', '+1.5'], ['b', '+1.4']]
    assert changes_of([['a', [1.0, 2.0], [1.9, 2.9]]]) == [['a', 'none']]
    assert changes_of([['a', [1.0, 2.0], [2.0, 3.0]]]) == [['a', 'none']]  # equal to the spread, so not larger
    assert cells([['a', [1.0, 2.0], [3.0]], ['b', [1.0, 2.0], [3.0]]], [3, 1])[1:] == [
        ['a', '1.5 ± 0.71 (2 of 3)', 3.0],
        ['b', '1.5 ± 0.71 (2 of 3)', 3.0],
    ]
    assert cells([['a', [1.0, 2.0], [3.0]]], [2, 1]) == [['seeds', 2, 1], ['a', '1.5 ± 0.71', 3.0]]
    assert cells([['a', [1.0], []]], [1, 1]) == [['a', 1.0, None]]
    assert cells([['step', [9, 9], []]], [2, 2]) == [['seeds', 2, 2], ['step', 9, None]]  # not 9 ± 0


def test_numbers_that_are_not_finite_are_counted():
    """The record holds such numbers as text."""
    rows = [['a', [1.0, 'nan', 2.0], [1.0, 2.0, 3.0]], ['b', [1.0, 2.0], [9.0, 9.5]], ['c', ['inf'], [1.0]]]
    assert cells(rows, [3, 3])[1:] == [
        ['a', 'not finite in 1 of 3', '2 ± 1'], ['b', '1.5 ± 0.71 (2 of 3)', '9.25 ± 0.35 (2 of 3)'],
        ['c', 'inf (1 of 3)', '1.0 (1 of 3)'],
    ]  # fmt: skip
    assert changes_of(rows) == [['b', '+7.75']]


def test_two_runs_with_the_same_seed_are_separate(tmp_path):
    """For example, before and after a change of the code."""
    from reports.page import read

    runs = [read(made(tmp_path, f'n{i}', [1.0], 1.0, seed=seed)) for i, seed in enumerate([0, 0, 1, 1])]
    assert [[runs.index(run) for run in group] for group in grouped(runs)] == [[0, 2], [1, 3]]
    assert text_of_changes([], ['x']) == ''


@pytest.mark.parametrize(
    ('words', 'seeds', 'rest'),
    [
        ([], 1, []),
        (['--base_lr', '1e-3'], 1, ['--base_lr', '1e-3']),
        (['--seeds', '3', '--base_lr', '1e-3'], 3, ['--base_lr', '1e-3']),
        (['--a=b=c', '--seeds=2'], 2, ['--a=b=c']),
    ],
)
def test_seeds_are_taken_from_the_command_line(words, seeds, rest):
    assert take_seeds(words) == (seeds, rest)


@pytest.mark.parametrize('words', [['--seeds'], ['--seeds', '0'], ['--seeds=x'], ['--seeds', '--base_lr']])
def test_wrong_numbers_of_seeds_are_refused(words):
    with pytest.raises(SettingError, match=r'seeds=.*whole number.*--seeds 3'):
        take_seeds(words)


def test_a_sweep_trains_every_combination_with_these_seeds():
    runs = sweep.combinations('--base_lr 1e-3 2e-3 --seeds 2 -- --preset digits --seed 5'.split())
    assert [run[-4:] for run in runs] == [['--base_lr', lr, '--seed', seed] for lr in ('1e-3', '2e-3') for seed in '56']
    assert sweep.combinations(['--seeds', '3', '--', '--preset', 'digits'])[2][-2:] == ['--seed', '2']
    with pytest.raises(SettingError, match='--seed and --seeds are both given'):
        sweep.combinations('--seed 1 2 --seeds 2 --'.split())
    with pytest.raises(SettingError, match='has no values'):
        sweep.combinations(['--seeds', '1', '--'])


def test_examples_train_with_seeds(compared, tmp_path, capsys, monkeypatch):  # noqa: F811
    trained = []
    start = main.start
    monkeypatch.setattr(main, 'start', lambda c, t: [trained.append((c.experiment_name, c.seed)), start(c, t)])
    two = {name: PARTS[name] for name in ('plain', 'halved')}
    compared(two, '--seeds', '2', '--seed', '4')
    assert trained == [
        ('mine_seed=4_plain', 4), ('mine_seed=4_halved', 4),
        ('mine_seed=4_seed=5_plain', 5), ('mine_seed=4_seed=5_halved', 5),
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert columns_in(text)['seeds'] == ['2', '2']
    changes = columns_in(text[text.index('difference from plain') :])
    assert changes['eval/loss'][0].startswith('-')  # half as large: more than the spread
    assert (tmp_path / 'mine_seed=4_compared.html').exists()


def test_seeds_at_different_steps_give_a_warning(capsys):
    text_of_changes([['step', [100, 50], [100, 100]]], ['a', 'b'])
    assert capsys.readouterr().out == 'warning: the seeds of a are at steps 50 to 100: train them to the end\n'


def test_a_group_is_named_after_its_first_run(folders, capsys, tmp_path):
    compare.compare(compare.Compare((folders[0], folders[1], folders[3]), str(tmp_path / 'x.html')))
    assert columns_in(capsys.readouterr().out)['run'] == ['lr1_0', 'lr2_0']


def test_a_curve_has_only_the_steps_that_all_seeds_have(tmp_path, monkeypatch):
    from reports import page

    drawn = []
    monkeypatch.setattr(page, 'plot', lambda curves, title, bands: drawn.append((curves, bands)) or '<svg/>')
    folders = [made(tmp_path, f'n{seed}', [3.0, 2.0, 1.0][:n], 1.0, seed=seed) for seed, n in enumerate((3, 2, 3))]
    compare.shared_plot(grouped([page.read(folder) for folder in folders]), ['a'], 'loss', ('train/loss',))
    assert drawn == [({'a': ([10, 20], [3.0, 2.0])}, {'a': [0.0, 0.0]})]
