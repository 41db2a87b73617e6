"""report.html of a run, and compare.html of several."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from config import SettingError
from reports import page
from scripts.compare import Compare, compare, labels_of
from settings.same_run import cut_middle
from tests.helpers import record_of
from trainer import ExampleDiffusionTrainer


class Page(html.parser.HTMLParser):
    """The texts, tags and addresses of a page; that every tag is closed."""

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


def test_a_run_writes_a_page_that_holds_all(trained, monkeypatch):
    written = []
    update = page.update
    monkeypatch.setattr(page, 'update', lambda folder: written.append(folder.name) or update(folder))
    folder = trained('a', channels=16)
    assert written == ['a'] * 2  # at steps 6 and 12
    seen = Page(folder / 'report.html')
    assert not seen.outside and 'a: step 12 of 12' in seen.text
    pictures = sorted((folder / 'samples').glob('step_*.png'))
    inside = [base64.b64decode(image.split(',')[1]) for image in seen.images]
    assert {path.read_bytes() for path in pictures} <= set(inside)
    for title in page.CURVES:
        assert title in seen.text or title in ('share of time waiting for data', 'Frechet distance of samples'), title
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
    folder = trained('a', Inked)
    inside = [base64.b64decode(image.split(',')[1]) for image in Page(folder / 'report.html').images]
    ways = [f'{sampler}_{weights}' for sampler in ('adams', 'sde_dpmpp_2m') for weights in ('ema_0.999', 'raw')]
    newest = ['ink', *(f'ink_step_0000012_{way}' for way in ways)]
    pictures = {path.stem: path.read_bytes() for path in (folder / 'samples').glob('ink*.png')}
    assert pictures.keys() == {*newest, *(f'ink_step_0000006_{way}' for way in ways)}
    assert [inside.count(pictures[name]) for name in newest] == [1, 4, 4, 4, 4]  # the four are alike
    assert pictures[f'ink_step_0000006_{ways[0]}'] not in inside


def run_of(lines, **config):
    return page.Run(Path('ckpts/a'), dict(preset='digits', **config), lines)


def test_the_curves_of_a_page_are_found_by_their_names():
    names = 'eval/loss eval/loss_ema_0.9 eval/loss_t_0.0_0.1 eval/adams/frechet eval/adams/kid final/adams/frechet'
    run = run_of([{'train/step': 1, **dict.fromkeys(names.split(), 1.0)}])
    assert run.names(page.CURVES['loss']) == ['eval/loss', 'eval/loss_ema_0.9']
    assert run.names(page.CURVES['Frechet distance of samples']) == ['eval/adams/frechet']
    assert run.names(('eval/loss_t_*',)) == ['eval/loss_t_0.0_0.1']


def test_levels_belong_to_their_curves():
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


def numbers_in(svg):
    return set(re.findall(r'>([^<>]+)</text>', svg))


def test_a_sweep_of_evaluations_is_plotted_along_what_was_varied():
    def line(nfe, weights='ema', guidance=1.0, **other):
        same = dict(detector='pixels', detector_digest='a', num=10, seed=0, step=5, solver='adams')
        return same | dict(nfe=nfe, weights=weights, guidance_scale=guidance, frechet=1 / nfe) | other

    lines = [line(n, w) for n in (4, 8) for w in ('ema', 'raw')]
    (plot,) = page.sweep_plots(lines)
    assert {'Frechet distance (pixels) by nfe', 'weights ema', 'weights raw'} <= numbers_in(plot)
    assert page.sweep_plots([line(4), line(8, step=4)]) == []  # of another step: not to be compared
    both = page.sweep_plots([line(n, guidance=g) for n in (4, 8) for g in (1.0, 2.0)])
    assert len(both) == 2 and {'guidance_scale 1', 'guidance_scale 2'} <= numbers_in(both[0])
    assert {'nfe 4', 'nfe 8'} <= numbers_in(both[1])
    assert page.evaluations([dict(nfe=0, num_sample_steps=7), dict(nfe=3)]) == [['nfe'], ['7 steps'], [3]]


def test_numbers_on_axes_are_plain():
    svg = page.plot({'train/loss': ([10, 20, 30], [1.28, 1.3, 1.34])}, 'loss')
    ticks = [text for text in numbers_in(svg) if text.startswith('1.')]
    assert ticks and all(re.fullmatch(r'1[.]\d+', text) for text in ticks)


def test_compared_runs_are_called_by_what_differs():
    runs = [run_of([], base_lr=lr, log_every=i) for i, lr in enumerate((0.1, 0.2))]
    assert labels_of(runs, ['a' * 50, 'b' * 50]) == ['base_lr=0.1', 'base_lr=0.2']
    alike = [run_of([], log_every=i) for i in range(2)]
    assert labels_of(alike, ['a' * 50, 'b' * 50]) == [cut_middle('a' * 50, 40), cut_middle('b' * 50, 40)]


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
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) == 3}
    assert rows['base_lr'] == ['0.001', '0.002'] and rows['channels'] == ['16', '8'] and rows['step'] == ['12', '12']
    assert 'seed' not in rows and 'experiment_name' not in rows
    finals = [f'{record_of(folder)[-1]["eval/reference"]:.4g}' for folder in (a, b)]
    assert rows['eval/reference'] == finals
    seen = Page(tmp_path / 'x.html')
    assert not seen.outside and len(seen.images) == 4  # of two ways to sample
    assert {'loss: train/loss', 'channels=16, base_lr=0.001'} <= numbers_in((tmp_path / 'x.html').read_text())


def test_runs_of_one_name_are_told_apart(trained, tmp_path, capsys):
    a = trained('a')
    shutil.copytree(a, tmp_path / 'other/a')
    compare(Compare((str(a), str(tmp_path / 'other/a')), str(tmp_path / 'x.html')))
    assert 'ckpts/a' in capsys.readouterr().out


@pytest.mark.parametrize('folders', [('.',), ('nowhere', 'nowhere else')])
def test_what_is_no_run_is_named(folders, tmp_path):
    with pytest.raises(SettingError, match=r'two or more folders|is not the folder of a run'):
        compare(Compare(folders, str(tmp_path / 'x.html')))
    assert not (tmp_path / 'x.html').exists()


@pytest.mark.skipif(shutil.which('chromium') is None, reason='chromium is not installed')
def test_a_browser_shows_it(trained, tmp_path):
    """In light and dark, without an error: the picture is neither empty nor of one colour."""
    from PIL import Image

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


@pytest.mark.slow
def test_a_comparison_shows_the_newest_and_what_differs_in_any(trained, tmp_path, capsys):
    folders = [trained(name, grad_clip_norm=norm) for name, norm in (('a', 1.0), ('b', 1.0), ('c', 2.0))]
    settings = json.loads((folders[0] / 'config.json').read_text())
    del settings['seed']
    (folders[0] / 'config.json').write_text(json.dumps(settings))
    same = dict(detector='pixels', weights='ema', solver='adams', nfe=0, num=10)
    lines = [same | dict(guidance_scale=g, frechet=f) for g, f in ((1.0, 0.25), (2.0, 0.5))]
    (folders[1] / 'evaluation.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    compare(Compare(tuple(map(str, folders)), str(tmp_path / 'x.html')))
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert 'grad_clip_norm' in rows and 'seed' not in rows and 'seeds' not in rows
    assert 'adams 0 1.0 10)' in out and 'adams 0 2.0 10)' in out and '0.25' in out and '0.5' in out
    text = (tmp_path / 'x.html').read_text()
    assert 'step_0000012' in text and 'step_0000006' not in text


def test_losses_below_zero_have_a_plot(tmp_path):
    """As those of a run whose loss has a negative part."""
    below = page.plot({'a': ([1, 2], [0.5, -0.1]), 'b': ([1, 2], [0.4, 0.3])}, 'loss')
    assert below.startswith('<svg') and 'floor' not in below


@pytest.mark.parametrize('name', ['mine/$x^{$', 'cost_$', 'a$b$c'])
def test_a_metric_may_be_called_anything(name):
    """matplotlib takes what is between two $ for mathematics; a wrong formula ended the page for good."""
    curves = {name: ([1, 2], [1.0, 2.0]), 'other': ([1, 2], [2.0, 1.0])}
    assert page.plot(curves, f'loss: {name}').count('<svg') == 1


def test_the_line_and_the_page_are_there_before_the_numbers(tiny_config, build_trainer, monkeypatch):
    config, seen = tiny_config(final_eval=True, num_training_steps=3, eval_every=0), []

    class Mine(ExampleDiffusionTrainer):
        def sample_metrics(self, x, inputs):
            seen.append((record_of(config.run_dir)[-1], (config.run_dir / 'report.html').read_text()))
            return dict(mine=1.0)

    build_trainer(config, Mine).train_loop()
    line, page = seen[0]
    assert line['train/step'] == 3 and 'train/loss' in line and 'step 3 of 3' in page and 'final/' not in page
    last = record_of(config.run_dir)
    assert [line['train/step'] for line in last] == [3] and last[0] == line | {
        f'final/{name}/mine': 1.0 for name in ('adams', 'sde_dpmpp_2m')
    }
    assert 'final/adams/mine' in (config.run_dir / 'report.html').read_text()
