"""report.html of a run, and compare.html of several."""

import base64
import dataclasses
import html.parser
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import records
from config import Config, SettingError
from reports import page, parts
from runtime.alive import duration
from scripts.compare import Compare, compare, legend_labels
from settings.same_run import cut_middle
from tests.helpers import columns_in, record_of
from trainer import ExampleDiffusionTrainer


class Page(html.parser.HTMLParser):
    """The texts, images and outside addresses of a page; asserts that every tag is closed."""

    VOID = {'meta', 'img', 'br'}

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.texts, self.images, self.outside = [], [], [], []
        self.feed(path.read_text())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ('src', 'href') and value:
                self.images += [value] if value.startswith('data:image/png') else []
                self.outside += [value] if re.match('(https?:)?//', value) else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return ' '.join(self.texts)


@pytest.fixture
def trained(tiny_config, build_trainer):
    """`trained(name, **settings)`: the folder of a finished run, with its report."""

    def make(name, trainer_class=None, **settings):
        config = tiny_config(experiment_name=name, sample_every=6, **settings)
        build_trainer(config, trainer_class).train_loop()
        return config.run_dir

    return make


def test_a_run_writes_a_page_with_everything(trained, monkeypatch):
    written = []
    update = page.update
    monkeypatch.setattr(page, 'update', lambda folder: written.append(folder.name) or update(folder))
    folder = trained('a', channels=16, raw_pictures=True)
    assert written == ['a'] * 2  # at steps 6 and 12
    seen = Page(folder / 'report.html')
    assert not seen.outside and 'a: step 12 of 12' in seen.text
    pictures = [*(folder / 'samples').glob('step_0000012*.png'), folder / 'samples/step_0000006_adams_ema_0.999.png']
    inside = [base64.b64decode(image.split(',')[1]) for image in seen.images]
    assert len(pictures) == 5 and {path.read_bytes() for path in pictures} <= set(inside)
    drawn = numbers_in((folder / 'report.html').read_text())
    for title in page.CURVES:
        assert title in drawn or title in ('share of time waiting for data', 'Frechet distance of samples'), title
    shown = numbers_in((folder / 'report.html').read_text().split('<details>')[0])
    assert {'loss', 'reference loss', 'training loss by t'} <= shown and 'gradient norm' not in shown  # folded
    last = record_of(folder)[-1]
    assert f'{last["eval/reference"]:.4g}' in seen.text and f'{last["eval/loss"]:.4g}' in seen.text
    assert seen.text.count('<svg') == 0 and (folder / 'report.html').read_text().count('<svg') >= 6
    settings = dict(re.findall(r'<tr><td>(\w+)</td><td>([^<]*)</td></tr>', (folder / 'report.html').read_text()))
    assert settings['channels'] == '16' and settings['num_training_steps'] == '12' and 'seed' not in settings


class Inked(ExampleDiffusionTrainer):
    def after_sampling(self, name, x, inputs):
        grey = torch.full((3, 4, 5), 10 * self.step, dtype=torch.uint8)
        self.picture('ink', grey)
        self.picture(f'ink_{name}', grey + 1)


def test_pictures_of_an_experiment_are_on_the_page_the_newest_of_each_name(trained):
    folder = trained('a', Inked, raw_pictures=True)
    inside = [base64.b64decode(image.split(',')[1]) for image in Page(folder / 'report.html').images]
    ways = [f'{sampler}_{weights}' for sampler in ('adams', 'sde_dpmpp_2m') for weights in ('ema_0.999', 'raw')]
    newest = ['ink', *(f'ink_step_0000012_{way}' for way in ways)]
    pictures = {path.stem: path.read_bytes() for path in (folder / 'samples').glob('ink*.png')}
    assert pictures.keys() == {*newest, *(f'ink_step_0000006_{way}' for way in ways)}
    assert [inside.count(pictures[name]) for name in newest] == [1, 4, 4, 4, 4]  # the four have the same pixels
    assert pictures[f'ink_step_0000006_{ways[0]}'] not in inside


def run_of(lines, **config):
    return page.Run(Path('ckpts/a'), dict(preset='digits', **config), lines)


def test_the_curves_of_a_page_are_found_by_their_names():
    names = 'eval/loss eval/loss_ema_0.9 eval/loss_t_0.0_0.1 eval/adams/frechet eval/adams/kid final/adams/frechet'
    run = run_of([{'train/step': 1, **dict.fromkeys(names.split(), 1.0)}])
    assert run.names(page.CURVES['loss']) == ['eval/loss', 'eval/loss_ema_0.9']
    assert run.names(page.CURVES['Frechet distance of samples']) == ['eval/adams/frechet']
    assert run.names(('eval/loss_t_*',)) == ['eval/loss_t_0.0_0.1']


def test_floors_and_ceilings_belong_to_their_curves():
    first = {
        'train/floor': 0.5,
        'train/floor_t_0.0_0.1': 0.1,
        'eval/reference_floor': 0.2,
        'eval/reference_gaussian': 0.9,
    }
    later = {'train/loss': 1.0, 'eval/floor_of_mine': 3.0, 'eval/reference': 0.4}
    run = run_of([{'train/step': 1, **first}, {'train/step': 2, **later}])
    assert run.bounds(['train/loss', 'eval/loss']) == ({'train/loss': 0.5}, None)
    assert run.bounds(['train/loss_t_0.0_0.1', 'train/loss_t_0.1_0.2']) == ({'train/loss_t_0.0_0.1': 0.1}, None)
    assert run.bounds(['eval/reference']) == ({'eval/reference': 0.2}, 0.9)
    assert run.bounds(['train/lr']) == ({}, None)
    assert run.final() == {'eval/reference': 0.4, 'eval/floor_of_mine': 3.0}


def test_numbers_on_top_are_from_the_first_sampler_even_if_it_is_not_a_solver():
    run = run_of([{'train/step': 1, 'final/mine/frechet': 2.0, 'final/heun/frechet': 3.0}], solver='heun')
    assert run.sampler == 'mine' and run.chosen()['Frechet distance'][0] == 2
    assert run_of([], solver='heun').sampler == 'heun'


def numbers_in(svg):
    return set(re.findall(r'>([^<>]+)</text>', svg))


def test_a_sweep_of_evaluations_is_plotted_along_what_was_varied(monkeypatch):
    def line(nfe, weights='ema', guidance=1.0, **other):
        same = dict(detector='pixels', detector_digest='a', num=10, seed=0, step=5, solver='adams')
        return same | dict(nfe=nfe, weights=weights, guidance_scale=guidance, frechet=1 / nfe) | other

    lines = [line(n, w) for n in (4, 8) for w in ('ema', 'raw')]
    (plot,) = page.sweep_plots(lines)
    assert {'Frechet distance (pixels) by nfe', 'weights ema', 'weights raw'} <= numbers_in(plot)
    assert {'Frechet distance', 'network evaluations'} <= numbers_in(plot)  # the axes
    assert page.sweep_plots([line(4), line(8, step=4)]) == []  # another step: not comparable
    both = page.sweep_plots([line(n, guidance=g) for n in (4, 8) for g in (1.0, 2.0)])
    assert len(both) == 2 and {'guidance_scale 1', 'guidance_scale 2'} <= numbers_in(both[0])
    assert {'nfe 4', 'nfe 8'} <= numbers_in(both[1])
    seen = []
    monkeypatch.setattr('reports.curves.plot', lambda curves, title, x: seen.append(curves) or '')
    page.sweep_plots([line(2, step=4), line(3, step=4), line(16), line(4), line(5, frechet=None), line(8)])
    assert seen == [{'frechet': ([4, 8, 16], [1 / 4, 1 / 8, 1 / 16])}]  # sorted, and only lines of the last step
    assert page.evaluations([dict(nfe=0, num_sample_steps=7), dict(nfe=3)]) == [['nfe'], ['7 steps'], [3]]


def test_numbers_on_axes_are_plain():
    svg = page.plot({'train/loss': ([10, 20, 30], [1.28, 1.3, 1.34])}, 'loss')
    ticks = [text for text in numbers_in(svg) if text.startswith('1.')]
    assert ticks and all(re.fullmatch(r'1[.]\d+', text) for text in ticks)


def test_compared_runs_are_named_by_what_differs():
    runs = [run_of([], base_lr=lr, log_every=i) for i, lr in enumerate((0.1, 0.2))]
    assert legend_labels(runs, ['a' * 50, 'b' * 50]) == ['base_lr=0.1', 'base_lr=0.2']
    alike = [run_of([], log_every=i) for i in range(2)]
    assert legend_labels(alike, ['a' * 50, 'b' * 50]) == [cut_middle('a' * 50, 40), cut_middle('b' * 50, 40)]


def test_evaluations_are_on_the_page(trained):
    folder = trained('a')
    (folder / 'evaluation.jsonl').write_text(
        json.dumps(dict(weights='ema', solver='heun', nfe=8, frechet=1.234)) + '\n'
    )
    page.update(folder)
    assert '1.234' in Page(folder / 'report.html').text and 'heun' in Page(folder / 'report.html').text


def test_names_are_escaped(trained):
    folder = trained('a')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | dict(data_dir='<script>alert(1)</script>')))
    page.update(folder)
    assert '<script' not in (folder / 'report.html').read_text()
    assert '<script>alert(1)</script>' in Page(folder / 'report.html').text


def test_a_page_that_cannot_be_written_does_not_end_the_run(trained, monkeypatch, capsys):
    monkeypatch.setattr(page, 'report', lambda run: 1 / 0)
    folder = trained('a')
    assert 'report.html could not be written (ZeroDivisionError' in capsys.readouterr().out
    assert record_of(folder)[-1]['train/step'] == 12


def test_runs_are_compared_by_what_differs(trained, tmp_path, capsys):
    a, b = trained('a', channels=16, base_lr=1e-3), trained('b', base_lr=2e-3)
    capsys.readouterr()
    compare(Compare((str(a), str(b)), str(tmp_path / 'x.html')))
    columns = columns_in(capsys.readouterr().out)
    assert columns['base_lr'] == ['0.001', '0.002'] and columns['channels'] == ['16', '8']
    assert columns['step'] == ['12', '12'] and 'seed' not in columns and 'experiment_name' not in columns
    finals = [f'{record_of(folder)[-1]["eval/reference"]:.4g}' for folder in (a, b)]
    assert columns['eval/reference'] == finals
    seen = Page(tmp_path / 'x.html')
    assert not seen.outside and len(seen.images) == 4  # two samplers
    assert {'loss: train/loss', 'channels=16, base_lr=0.001'} <= numbers_in((tmp_path / 'x.html').read_text())


def test_runs_of_one_name_are_distinguished(trained, tmp_path, capsys):
    a = trained('a')
    shutil.copytree(a, tmp_path / 'other/a')
    compare(Compare((str(a), str(tmp_path / 'other/a')), str(tmp_path / 'x.html')))
    assert 'ckpts/a' in capsys.readouterr().out


@pytest.mark.parametrize('folders', [('.',), ('nowhere', 'nowhere else')])
def test_a_folder_that_is_not_a_run_is_named(folders, tmp_path):
    with pytest.raises(SettingError, match=r'two or more folders|is not the folder of a run'):
        compare(Compare(folders, str(tmp_path / 'x.html')))
    assert not (tmp_path / 'x.html').exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('chromium') is None, reason='chromium is not installed')
def test_a_browser_shows_it(trained, tmp_path):
    """In light and dark mode, without an error: the screenshot is neither empty nor of one colour."""
    folder = trained('a')
    for scheme in (1, 0):
        shot = tmp_path / f'{scheme}.png'
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--window-size=1200,1600']
        flags += [
            f'--blink-settings=preferredColorScheme={scheme}',
            f'--screenshot={shot}',
            f'file://{folder}/report.html',
        ]
        subprocess.run(['chromium', *flags], check=True, capture_output=True, timeout=100)
        with Image.open(shot) as image:
            grey = image.convert('L')
            assert len(image.convert('RGB').getcolors(10**7)) > 50
            assert (grey.getpixel((5, 5)) > 200) == (scheme == 1)


def made(folder, lines=(), pictures=(), width=60, **config):
    """The folder of a run with these lines of its record and pictures of this width."""
    (folder / 'samples').mkdir(parents=True)
    settings = dict(preset='digits', solver='heun', ema_decays=[0.98], num_training_steps=20, final_eval=True)
    (folder / 'config.json').write_text(json.dumps(dataclasses.asdict(Config()) | settings | config))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    for name in pictures:
        Image.new('RGB', (width, 20), 'teal').save(folder / f'samples/{name}.png')
    return folder


def a_long_run(tmp_path, name='a'):
    ways = ('adams_ema_0.98', 'heun_ema_0.9', 'heun_ema_0.98', 'heun_raw')
    pictures = [f'step_{step:07d}_{way}' for step in (4, 8, 12, 16, 20) for way in ways]
    numbers = {'label_agreement': 0.9512, 'frechet': 0.5, 'real_frechet': 0.25, 'nearest_neighbour_ratio': 1.1}
    lines = [{'train/step': s, 'train/loss': 1 / s, 'train/waiting': 0.00076 + s / 1e8} for s in range(1, 20)]
    last = {f'final/heun/{name}': value for name, value in numbers.items()} | {
        f'final/adams/{name}': 2 * value for name, value in numbers.items()
    }
    lines[9] |= {'eval/heun/frechet': 7.0}  # from fewer samples than at the end
    lines += [{'train/step': 20, 'eval/reference': 0.4, 'eval/reference_gaussian': 0.9, 'eval/loss': 0.3} | last]
    folder = made(tmp_path / name, lines, ['data_and_augmented', *pictures], width=2264, experiment_name=name * 60)
    line = dict(weights='ema_0.98', solver='heun', nfe=8, detector='pixels', detector_digest='x', num=9) | numbers
    rows = [line | dict.fromkeys(page.COLUMNS[-9:], 1 / 3) | dict(nfe=n) for n in (4, 8)]
    (folder / 'evaluation.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    start = dict(time='2026-01-02T03:04:05+0000', step=0, command='sh run.sh ' + 'x' * 300, host='<b>', commit='f' * 40)
    (folder / 'run.json').write_text(json.dumps([start | dict(trainer=dict(file='mine.py', name='Mine'))]))
    return folder


def test_pictures_are_sorted_by_step_however_many_digits_it_has(tmp_path):
    names = [f'step_{step:07d}_{end}' for step in (9_999_999, 10_000_000) for end in ('heun_ema_0.98', 'mine')]
    run = page.read(made(tmp_path / 'a', pictures=[*names, 'ink_step_9999999', 'ink_step_10000000']))
    assert [[path.stem for path in group] for group in run.pictures()] == [names[:2], names[2:]]
    assert [path.stem for path in run.own_pictures()] == ['ink_step_10000000']


def test_pictures_come_first_then_four_numbers_then_curves_and_the_rest_is_folded(tmp_path):
    text = page.report(page.read(a_long_run(tmp_path)))
    heads = re.findall(r'<(?:h2|summary)>([^<]*)<', text)
    pictures = ['Data', 'Newest samples', 'The same noise at earlier steps']
    assert heads[:6] == [*pictures, 'Numbers', 'Curves', 'Other curves'] and text.count('<details>') == len(heads) - 5
    shown, folded = text.split('<details>', 1)
    assert re.findall('alt="(.*?)"', shown) == [
        'as read, and as prepared for training', 'step 20, heun, averaged weights (EMA 0.98)', 'step 4', 'step 12',
    ]  # fmt: skip
    assert re.findall('<div>(.*?)<br><b>(.*?)</b>', shown) == [
        ('Reference loss', '0.4'), ('Label agreement', '0.9512'), ('Frechet distance', '0.5'),
        ('Nearest-neighbour ratio', '1.1'),
    ]  # fmt: skip
    assert 'Good: near 0.25, the distance of as many real items' in shown and 'well below 0.9, the loss' in shown
    assert 'step 20, heun, raw weights' in folded and 'step 20, adams, averaged' in folded and 'EMA 0.9)' in folded
    assert all(f'<td>{cell}</td>' in folded for cell in ('mine.py:Mine', '2026-01-02 03:04', '&lt;b&gt;', 'f' * 10))
    assert 'viewport' in text and 'final numbers' not in text
    assert '<figcaption>step 20, heun, averaged weights (EMA 0.98)</figcaption>' in shown
    assert 'mean, variance' in numbers_in(shown) and 'the loss of a model that knows only the mean' in shown
    assert 'Frechet distance (pixels) by nfe' in numbers_in(folded)


def test_the_training_time_of_each_start_follows_from_the_speed():
    lines = [{'train/step': step, 'train/images_per_second': 8.0} for step in (10, 20, 30)]
    starts = [dict(time='2026-01-02T03:04:05', step=0, host='a'), dict(step=20, trainer=dict(name='Mine'))]
    run = page.Run(Path('a'), dict(global_batch_size=32), lines, starts)
    first, second = (dict(zip(page.STARTED, page.started(run, i), strict=True)) for i in range(2))
    assert (first['time'], first['step'], first['host'], first['trainer']) == ('2026-01-02 03:04', 0, 'a', '')
    assert (second['step'], second['host'], second['trainer']) == (20, None, 'Mine')
    assert (first['training'], second['training']) == (duration(80), duration(40))


@pytest.mark.parametrize(('width', 'shown'), [(60, '300px'), (179, '358px'), (180, None)])
def test_small_pictures_are_enlarged_by_a_whole_factor(tmp_path, width, shown):
    made(tmp_path / 'a', pictures=['x'], width=width)
    text = parts.images({tmp_path / 'a/samples/x.png': 'x', tmp_path / 'none.png': 'y'})
    assert re.findall('width: (.*?); image-rendering: pixelated', text) == ([shown] if shown else [])
    assert text.count('<figure>') == 1


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    folder = made(tmp_path / 'a', [{'train/step': 5, 'train/loss': 1.0}])
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write('{"train/step": 6, "tra')
    assert page.read(folder).step == 5


def test_the_page_of_an_unfinished_run_announces_the_final_numbers(tmp_path):
    text = page.report(page.read(made(tmp_path / 'a', [{'train/step': 5, 'train/loss': 1.0}])))
    assert 'Step 5 of 20: the final numbers follow after the last step.' in text
    text = page.report(page.read(made(tmp_path / 'b', [{'train/step': 5, 'train/loss': 1.0}], final_eval=False)))
    assert 'final numbers' not in text


def test_numbers_of_an_experiment_are_on_top_without_percentiles_of_histograms(tmp_path):
    lines = [{'train/step': 5, 'mine': 2.0, 'x_p05': 0.5, 'y_std': 1.0}]
    assert list(page.read(made(tmp_path / 'a', lines)).chosen()) == ['mine']


def test_axes_are_named_and_lines_have_their_names_at_their_ends():
    curves = {'train/loss': ([1, 2], [0.5, 0.4]), 'eval/loss_ema_0.98': ([2], [0.4]), 'eval/loss': ([], [])}
    svg = page.plot(curves, 'loss', {'train/loss': 0.39})
    assert {'step', 'loss', 'training', 'held-out, EMA 0.98', 'floor'} <= numbers_in(svg)
    assert 'held-out, raw' not in svg and 'legend' not in svg
    heights = [float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>(?:training|floor|held-out, EMA)', svg)]
    assert len(heights) == 3 and all(b - a > 9 for a, b in itertools.pairwise(sorted(heights)))  # none overlaps
    assert max(heights) < 196  # none is below the plot
    svg = page.plot({name: ([1, 2], y) for name, y in dict(low=[1, 1], high=[1.2, 2], middle=[3, 1.5]).items()}, 'loss')
    found = re.findall(r'fill: (#\w+)[^>]* y="([\d.]+)"[^>]*>(\w+)<', svg)
    ends = sorted((float(y), name, colour) for colour, y, name in found)  # from the top, in the colours of the curves
    assert [end[1:] for end in ends] == [('high', '#d8720c'), ('middle', '#0a9a74'), ('low', '#2b7bd1')]


def test_a_wide_range_has_a_logarithmic_axis_and_times_are_labelled_with_their_range():
    assert {'1', '10', '100'} <= numbers_in(page.plot({'a': ([1, 2, 3], [1.0, 10.0, 100.0])}, 'loss'))
    curves = {f'train/loss_t_{t}': ([1, 2], [1.0, 2.0]) for t in ('0.0_0.1', '0.1_0.2')}
    assert {'t 0.0 to 0.1', 't 0.1 to 0.2'} <= numbers_in(page.plot(curves, 'training loss by t'))


def test_a_curve_keeps_its_colour_where_others_have_no_points():
    """So a run has one colour in all plots of compare.html."""
    curves = {'a': ([], []), 'b': ([1, 2], [1.0, 2.0])}
    assert '#d8720c' in page.plot(curves, 'loss') and '#2b7bd1' not in page.plot(curves, 'loss')


@pytest.mark.parametrize(
    ('title', 'values', 'least', 'most'),
    [('share of time waiting for data', [7.62e-4, 7.7e-4], '0.0', '1.0'), ('loss', [0.5, 0.501], '0.46', '0.54')],
)
def test_no_axis_is_so_narrow_that_noise_looks_like_a_trend(title, values, least, most):
    numbers = numbers_in(page.plot({'a': ([1, 2], values)}, title))
    assert {least, most} <= numbers and not any('0.50' in number and len(number) > 4 for number in numbers)


def test_a_wide_table_is_printed_in_parts_that_begin_with_the_runs():
    columns = [['run', 'a', 'b'], *([f'number {i}', i, i + 0.5] for i in range(30))]
    text = parts.blocks(columns, 60)
    assert max(map(len, text.splitlines())) <= 60 and text.count('run') == text.count('\n\n') + 1 > 5
    assert text.split('\n\n')[0] == parts.aligned([list(line) for line in zip(*columns[:6], strict=True)])
    assert parts.blocks([['run', 'a'], ['x' * 90, 1]], 60).startswith('run  xxx')  # each part has at least one column


@pytest.mark.skipif(shutil.which('chromium') is None, reason='chromium is not installed')
@pytest.mark.parametrize('width', [390, 1280])
def test_no_page_is_wider_than_the_window(width, tmp_path):
    folders = [a_long_run(tmp_path, name) for name in 'abc']
    (tmp_path / 'one.html').write_text(page.report(page.read(folders[0])))
    compare(Compare(tuple(map(str, folders)), str(tmp_path / 'several.html')))
    for name in ('one', 'several'):
        text = (tmp_path / f'{name}.html').read_text().replace('<details', '<details open')
        (tmp_path / f'{name}_open.html').write_text(text)
        # an iframe, because headless windows are at least 500 pixels wide
        frame = f'<iframe src="{name}_open.html" style="border: 0; width: {width}px; height: 900px"></iframe>'
        script = 'f = document.querySelector("iframe"); f.onload = () => document.title = "wide " + '
        script += '[(e = f.contentDocument.documentElement).scrollWidth - e.clientWidth, f.clientWidth]'
        (tmp_path / 'frame.html').write_text(f'<!doctype html>{frame}<script>{script}</script>')
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files', '--dump-dom']
        flags += ['--virtual-time-budget=5000', '--window-size=1400,1000', f'file://{tmp_path}/frame.html']
        seen = subprocess.run(['chromium', *flags], check=True, capture_output=True, text=True, timeout=100).stdout
        assert f'<title>wide 0,{width}</title>' in seen, (name, re.findall('<title>.*?</title>', seen))


@pytest.mark.slow
def test_a_comparison_shows_the_newest_samples_and_all_differing_settings(trained, tmp_path, capsys):
    folders = [trained(name, grad_clip_norm=norm) for name, norm in (('a', 1.0), ('b', 1.0), ('c', 2.0))]
    settings = json.loads((folders[0] / 'config.json').read_text())
    del settings['seed']
    (folders[0] / 'config.json').write_text(json.dumps(settings))
    same = dict(detector='pixels', weights='ema', solver='adams', nfe=0, num=10)
    lines = [same | dict(guidance_scale=g, frechet=f) for g, f in ((1.0, 0.25), (2.0, 0.5))]
    (folders[1] / 'evaluation.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    compare(Compare(tuple(map(str, folders)), str(tmp_path / 'x.html')))
    out = capsys.readouterr().out
    assert 'grad_clip_norm' in columns_in(out) and not {'seed', 'seeds'} & columns_in(out).keys()
    assert 'adams 0 1.0 10)' in out and 'adams 0 2.0 10)' in out and '0.25' in out and '0.5' in out
    text = (tmp_path / 'x.html').read_text()
    assert 'step 12, adams' in text and 'step 6, ' not in text


def test_losses_below_zero_have_a_plot(tmp_path):
    """Some losses have a negative part."""
    below = page.plot({'a': ([1, 2], [0.5, -0.1]), 'b': ([1, 2], [0.4, 0.3])}, 'loss')
    assert below.startswith('<svg') and 'floor' not in below


@pytest.mark.parametrize('name', ['mine/$x^{$', 'cost_$', 'a$b$c'])
def test_a_metric_may_be_called_anything(name):
    """matplotlib reads text between two $ as a formula; an invalid one broke the page."""
    curves = {name: ([1, 2], [1.0, 2.0]), 'other': ([1, 2], [2.0, 1.0])}
    assert page.plot(curves, f'loss: {name}').count('<svg') == 1


def test_the_line_and_the_page_are_written_before_the_numbers(tiny_config, build_trainer, monkeypatch):
    config, seen = tiny_config(final_eval=True, num_training_steps=3, eval_every=0), []

    class Mine(ExampleDiffusionTrainer):
        def sample_metrics(self, x, inputs):
            seen.append((record_of(config.run_dir)[-1], (config.run_dir / 'report.html').read_text()))
            return dict(mine=1.0)

    build_trainer(config, Mine).train_loop()
    line, page = seen[0]
    assert line['train/step'] == 3 and 'train/loss' in line and 'step 3 of 3' in page and 'final/' not in page
    assert 'the final numbers are being computed' in page
    last = record_of(config.run_dir)
    assert [line['train/step'] for line in last] == [3] and last[0] == line | {
        f'final/{name}/mine': 1.0 for name in ('adams', 'sde_dpmpp_2m')
    }
    text = (config.run_dir / 'report.html').read_text()
    assert 'final/adams/mine' in text and '<div>mine<br><b>1</b>' in text and 'being computed' not in text


# ---------------------------------------------------------------- records of presets


def plots_of(run):
    return {title: numbers_in(page.figure(run, title)) for title in ('loss', 'reference loss', 'gradient norm')}


def test_the_record_of_a_preset_is_a_grey_line_where_the_run_has_its_settings(tmp_path):
    kept = page.read(page.RECORDS / 'digits')

    def lines_of(name='ExampleDiffusionTrainer', **settings):
        config = page.as_json(vars(Config(**settings)))
        starts = [dict(trainer=dict(file='trainer.py', name=name))]
        return plots_of(page.Run(tmp_path, config, kept.lines[:4], starts))

    same = lines_of(seed=3, log_every=5, experiment_name='mine')
    assert [title for title, texts in same.items() if page.RECORD in texts] == ['loss', 'reference loss']
    assert '400' in same['loss']  # the axis reaches to the end of the record
    assert '#808080' in page.figure(kept, 'reference loss')
    others = dict(base_lr=1e-3), dict(num_training_steps=400), dict(preset='mnist'), dict(name='Mine')
    assert not [other for other in others if page.RECORD in lines_of(**other)['loss']]


@pytest.mark.parametrize('folder', sorted(page.RECORDS.iterdir()), ids=lambda folder: folder.name)
def test_a_record_is_of_today_s_preset_whole_and_small(folder):
    """Where a preset has changed since, train it again and keep the new record."""
    run = page.read(folder)
    assert run.changed().keys() <= {'preset', 'data_path'} and run.config['preset'] == folder.name
    other, older = ({**run.config, 'optimizer': 'sgd'}, {k: v for k, v in run.config.items() if k != 'checkpointing'})
    assert page.record_for(page.Run(run.folder, other, run.lines, run.starts)) is None
    assert page.record_for(page.Run(run.folder, older, run.lines, run.starts)) is not None  # lacks a newer setting
    assert run.step == run.config['num_training_steps'] and run.starts[-1]['commit']
    assert run.curve('eval/reference')[0] and any('label_agreement' in k or 'wasserstein' in k for k in run.final())
    assert len(run.names(['train/loss_t_*'])) == 10
    assert sum(path.stat().st_size for path in folder.iterdir()) < 30_000
    assert page.record_for(run) is not None


def test_a_record_keeps_losses_and_final_numbers(tmp_path):
    line = {'train/step': 50, 'train/loss': 0.123456, 'train/loss_t_0.0_0.1': 1.5, 'train/lr': 1e-3, 'final/a/b': 2.0}
    assert records.reduced(line) == {k: v for k, v in (line | {'train/loss': 0.1235}).items() if k != 'train/lr'}
    run = page.Run(tmp_path, page.as_json(vars(Config())), [line], [dict(diff='', commit='abc')])
    page.files.write_text(tmp_path / 'config.json', json.dumps(run.config))
    page.files.write_text(tmp_path / 'metrics.jsonl', json.dumps(line) + '\n')
    with pytest.raises(SystemExit, match='not a finished run'):
        records.keep(tmp_path, tmp_path / 'records')
