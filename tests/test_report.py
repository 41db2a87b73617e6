"""report.html of a run, and compare.html of several."""

import base64
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import record_of

import report
from compare import Compare, compare
from config import SettingError


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

    def make(name, **settings):
        config = tiny_config(experiment_name=name, sample_every=6, **settings)
        build_trainer(config).train_loop()
        return config.run_dir

    return make


def test_a_run_writes_a_page_that_holds_all(trained, monkeypatch):
    written = []
    usual = report.write
    monkeypatch.setattr(report, 'write', lambda path, text: written.append(path.name) or usual(path, text))
    folder = trained('a', channels=16)
    assert written == ['report.html'] * 2  # at steps 6 and 12
    page = Page(folder / 'report.html')
    assert not page.outside and 'a: step 12 of 12' in page.text
    pictures = sorted((folder / 'samples').glob('step_*.png'))
    inside = [base64.b64decode(image.split(',')[1]) for image in page.images]
    assert {path.read_bytes() for path in pictures} <= set(inside)
    for title in report.CURVES:
        assert title in page.text or title == 'share of time waiting for data', title
    last = record_of(folder)[-1]
    assert f'{last["eval/reference"]:.4g}' in page.text and f'{last["eval/loss"]:.4g}' in page.text
    assert page.text.count('<svg') == 0 and (folder / 'report.html').read_text().count('<svg') >= 6
    settings = dict(re.findall(r'<tr><td>(\w+)</td><td>([^<]*)</td></tr>', (folder / 'report.html').read_text()))
    assert settings['channels'] == '16' and settings['num_training_steps'] == '12' and 'seed' not in settings


def test_evaluations_are_on_the_page(trained):
    folder = trained('a')
    (folder / 'evaluation.jsonl').write_text(
        json.dumps(dict(weights='ema', solver='heun', nfe=8, frechet=1.234)) + '\n'
    )
    report.update(folder)
    assert '1.234' in Page(folder / 'report.html').text and 'heun' in Page(folder / 'report.html').text


def test_names_are_escaped(trained):
    folder = trained('a')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | dict(data_dir='<script>alert(1)</script>')))
    report.update(folder)
    assert '<script' not in (folder / 'report.html').read_text()
    assert '<script>alert(1)</script>' in Page(folder / 'report.html').text


def test_a_page_that_cannot_be_written_does_not_end_the_run(trained, monkeypatch, capsys):
    monkeypatch.setattr(report, 'report', lambda run: 1 / 0)
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
    page = Page(tmp_path / 'x.html')
    assert not page.outside and len(page.images) == 2 and 'a train/loss' in (tmp_path / 'x.html').read_text()


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
