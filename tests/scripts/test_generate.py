"""generate.py: samples of a run in files, identical for any batch size and number of processes."""

import dataclasses
import json
import shutil
import signal
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config, SettingError
from data_utils import DATASETS, DataSpec, load_digits
from evaluation.detectors import get_detector
from main import load_run
from reports.pictures import Gallery
from reports.plots import GAP, LINE_HEIGHT, image_grid, rendered_text, text_width
from runtime import errors
from scripts import generate as program
from scripts import samples
from scripts.generate import Generate
from scripts.samples import SampleFiles, parse_labels
from tests.helpers import ROOT, launch_env, wait_until
from trainer import ExampleDiffusionTrainer
from training.experiment import SampleInputs
from utils import NoiseOfEach


@pytest.fixture
def run(short_run):
    return short_run


@pytest.fixture
def draw(run, tmp_path):
    """`draw(out, **options)` runs the program in this process and returns the path."""

    def go(out: str, **options):
        program.generate(
            Generate(**(dict(run=str(run), out=str(tmp_path / out), num=30, num_sample_steps=3) | options))
        )
        return tmp_path / out

    return go


def images(path) -> np.ndarray:
    """(N, H, W), read from a folder of PNGs or an .npz."""
    if path.suffix == '.npz':
        return np.load(path)['arr_0'][..., 0]
    return np.stack([np.array(Image.open(file)) for file in sorted(path.glob('[0-9]*/*.png'))])


@pytest.mark.parametrize('solver', ['adams', 'sde_dpmpp_2m'])
def test_a_sample_is_the_same_in_any_batch_and_file_format(draw, solver):
    whole = images(draw('a.npz', solver=solver))
    assert whole.shape == (30, 8, 8) and whole.std() > 20
    assert len({image.tobytes() for image in whole}) == 30
    pngs = images(draw('folder', solver=solver, batch_size=7))
    assert np.abs(pngs.astype(int) - whole).max() <= 1 and (pngs != whole).mean() < 0.01
    fewer = images(draw('b.npz', solver=solver, num=11, batch_size=4))
    assert np.abs(fewer.astype(int) - whole[:11]).max() <= 1
    assert np.abs(images(draw('c.npz', solver=solver, seed=1)).astype(int) - whole).mean() > 20


@pytest.mark.slow
def test_two_processes_draw_the_same_samples_as_one(draw, run, tmp_path):
    one_process = images(draw('one_process.npz', solver='sde_dpmpp_2m'))
    flags = ['--run', run, '--out', tmp_path / 'both', '--num', '30', '--num_sample_steps', '3', '--batch_size', '4']
    command = ['sh', 'run.sh', 'generate.py', *map(str, flags), '--solver', 'sde_dpmpp_2m']
    done = subprocess.run(command, cwd=ROOT, env=launch_env(2), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and '30 samples in' in done.stdout and 'samples/s' in done.stdout, done.stderr
    assert np.abs(images(tmp_path / 'both').astype(int) - one_process).max() <= 1


def test_labels_weights_guidance_and_evaluations_reach_the_sampler(draw, run):
    plain = images(draw('plain.npz'))
    threes = np.load(draw('threes.npz', labels='3, 5'))
    assert threes['arr_1'].tolist() == [3, 5] * 15
    assert np.load(draw('plain.npz'))['arr_1'].tolist() == [i % 10 for i in range(30)]
    label = np.array([i % 10 for i in range(30)])
    same = label == np.array([3, 5] * 15)
    assert np.abs(threes['arr_0'][..., 0].astype(int) - plain)[same].max() <= 1
    for i, options in enumerate(
        (
            dict(weights='raw'),
            dict(weights='ema_0.9'),
            dict(guidance_scale=3.0),
            dict(guidance_scale=0.0),
            dict(nfe=9),
            dict(time_grid='uniform'),
        )
    ):
        assert not np.array_equal(images(draw(f'{i}.npz', **options)), plain), options


def test_the_noise_of_a_sample_depends_only_on_its_index(run, draw, monkeypatch):
    """Each sample computed by hand: the noise of its index, the run's solver, decode."""
    trainer = load_run(run, num_sample_steps=3)
    rows = []
    for i in range(5):
        with NoiseOfEach(0, 'sample_inputs', [i]):
            x1 = torch.randn_like(torch.empty(1, 1, 8, 8))
        inputs = SampleInputs(x1, torch.tensor([i % 10]))
        with torch.no_grad():
            x = trainer.draw(trainer.get_model_fn(trainer.network), inputs, trainer.config.solver)
        rows.append((trainer.decode(x) * 255).round().byte()[0, 0].numpy())
    assert np.abs(np.stack(rows).astype(int) - images(draw('x.npz', num=5))).max() <= 1


def test_existing_samples_are_not_drawn_again(draw, monkeypatch, capsys):
    out = draw('folder', num=20)
    before = {path: path.stat().st_mtime_ns for path in out.glob('0*/*.png')}
    for i in (3, 17):
        (out / f'000/{i:06d}.png').unlink()
    added = []
    add = SampleFiles.add
    monkeypatch.setattr(
        SampleFiles, 'add', lambda self, indices, *rest: added.extend(indices) or add(self, indices, *rest)
    )
    draw('folder', num=25)
    assert added == [3, 17, 20, 21, 22, 23, 24] and '18 of them already drawn' in capsys.readouterr().out
    assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) == 18
    first = images(draw('x.npz', num=20))
    added.clear()
    more = images(draw('x.npz', num=25))
    assert added == [20, 21, 22, 23, 24] and np.array_equal(more[:20], first) and len(more) == 25
    for options, words in (
        (dict(guidance_scale=2.0), 'guidance_scale: 1.0 -> 2.0'),
        (dict(seed=1), 'sample_seed: 0 -> 1'),
        (dict(weights='raw'), 'weights: ema -> raw'),
        (dict(labels='3,5'), 'labels:  -> 3,5'),
    ):
        with pytest.raises(SettingError, match=r'samples of other settings \(there -> now\): ' + words):
            draw('folder', **options)
    monkeypatch.setattr('evaluation.detectors.digest_of', lambda network: 'other')
    with pytest.raises(SettingError, match=r'weights_digest: [0-9a-f]+ -> other'):
        draw('folder')


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize('num', [3, 10])
def test_processes_without_work_wait_for_the_rest(run, tmp_path, num):
    """Two processes share an odd number of batches, and one of them draws a path."""
    flags = ['--run', run, '--out', tmp_path / 'x', '--num', num, '--num_sample_steps', '3', '--batch_size', '4']
    command = ['sh', 'run.sh', 'generate.py', *map(str, flags), '--trajectory']
    done = subprocess.run(command, cwd=ROOT, env=launch_env(2), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and (tmp_path / 'x/path.gif').is_file(), done.stderr
    assert len(list((tmp_path / 'x').glob('0*/*.png'))) == num


def test_a_gap_in_an_unfinished_file_is_filled(draw, tmp_path):
    whole = images(draw('whole.npz', num=30))
    draw('x.npz', num=30, batch_size=5)
    parts = tmp_path / 'x.npz.parts'
    label = np.arange(30) % 10
    (tmp_path / 'x.npz').unlink()  # as after a kill: only samples 0 to 4 and 20 to 29 exist
    for rows in (np.arange(5), np.arange(20, 30)):
        np.savez(parts / f'{rows[0]:08d}.npz', x=whole[rows][..., None], label=label[rows], index=rows)
    assert np.array_equal(images(draw('x.npz', num=10)), whole[:10])
    assert np.array_equal(images(draw('x.npz', num=30)), whole)


@pytest.mark.slow
def test_stopped_and_resumed(run, draw, tmp_path):
    flags = ['--run', run, '--out', tmp_path / 'x.npz', '--num', '400', '--num_sample_steps', '3', '--batch_size', '2']
    command = ['sh', 'run.sh', 'generate.py', *map(str, flags)]
    start = dict(cwd=ROOT, env=launch_env(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = subprocess.Popen(command, **start)
    parts = tmp_path / 'x.npz.parts'
    assert wait_until(lambda: parts.is_dir() and len(list(parts.glob('*.npz'))) > 5, 60)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == errors.EXIT_STOPPED and not (tmp_path / 'x.npz').exists()
    done = subprocess.run(command, cwd=ROOT, env=launch_env(1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and 'of them already drawn' in done.stdout, done.stderr
    assert np.abs(images(tmp_path / 'x.npz').astype(int) - images(draw('y.npz', num=400))).max() <= 1
    assert [path.name for path in parts.iterdir()] == ['generate.json']


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(labels='3,10'), r"labels='3,10': the run has classes 0 to 9"),
        (dict(labels='cat'), r"labels='cat': the run has classes 0 to 9"),
        (dict(weights='ema_0.99'), 'has ema_0.5, ema_0.9, raw'),
        (dict(solver='adam'), "solver='adam' is not a choice.*'adams'"),
        (dict(num=0), 'num=0'),
        (dict(batch_size=0), 'batch_size=0'),
    ],
)
def test_impossible_options_are_refused(draw, options, words, tmp_path):
    with pytest.raises(SettingError, match=words):
        draw('folder', **options)
    assert not (tmp_path / 'folder').exists()


def test_a_folder_with_other_files_is_not_touched(draw, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.txt').write_text('years of work')
    np.savez(tmp_path / 'mine.npz', years=3)
    for out in ('mine', 'mine.npz'):
        with pytest.raises(SettingError, match=r'already exists and was not written by generate\.py'):
            draw(out)


def test_a_run_without_a_checkpoint_is_named(draw, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SettingError, match='empty'):
        draw('x', run=str(tmp_path / 'empty'))


def test_pictures_and_the_record(draw, run, monkeypatch):
    shown, path_of = [], Gallery.path_of
    monkeypatch.setattr(Gallery, 'path_of', lambda self, *given: shown.append(given) or path_of(self, *given))
    out = draw('folder', trajectory=True, num=25)
    ((states, label),) = shown
    x, x0 = ((255 * part).round().squeeze(1).numpy() for part in (states[-1].x, states[0].x0))
    assert label.tolist() == [*range(8)] and np.abs(x - images(out)[:8]).max() <= 1 and np.abs(x - x0).max() > 9
    with (
        Image.open(out / 'grid.png') as grid,
        Image.open(out / 'path.png') as path,
        Image.open(out / 'path.gif') as gif,
    ):
        assert grid.width > 400 and path.width > 200 and path.height > path.width
        assert gif.is_animated and gif.n_frames == 4 and gif.width >= 400  # the noise, and three steps
        times = [(gif.seek(i), gif.info['duration'])[1] for i in (0, 1, 3)]
        assert times == [100, 100, 1500] and gif.info['loop'] == 0  # it loops forever
        frames = [np.array(gif.convert('RGB')) for gif.n in range(4) if gif.seek(gif.n) is None]
    first, last = ('t = 0.999', 't = 0.001')
    for frame, text in ((frames[0], first), (frames[-1], last)):  # a line with the time, then a line of class names
        title = rendered_text(text, text_width(text) + 4).permute(1, 2, 0).numpy()
        assert np.abs(frame[:LINE_HEIGHT, : title.shape[1]].astype(int) - title).max() < 40
        for i in range(10):
            name = rendered_text(str(i), 48).permute(1, 2, 0).numpy()
            place = frame[LINE_HEIGHT : 2 * LINE_HEIGHT, GAP + 50 * i :][:, :48]
            assert np.abs(place.astype(int) - name).max() < 40
    made_by = json.loads((out / 'generate.json').read_text())
    assert (made_by['step'], made_by['sample_seed'], made_by['num_sample_steps']) == (12, 0, 3)


def test_the_pictures_of_training_become_an_animation(draw, run, tmp_path):
    """It has only the pictures of the first sampler with averaged weights, in the order of steps."""
    folder = tmp_path / 'run/samples'
    shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('samples', 'lock'))
    folder.mkdir()
    given = dict(run=str(tmp_path / 'run'), num=2)
    with pytest.raises(SettingError, match=r'training_gif=True: .*samples has no pictures step_\*\.png.*leave --'):
        draw('none', **given, training_gif=True)
    assert not (tmp_path / 'none').exists()  # nothing was drawn
    for name, grey in ('0000012_adams_ema_0.5', 200), ('0000003_adams_ema_0.5', 60), ('0000003_adams_raw', 0):
        Image.new('RGB', (500 - grey, 100), (grey, grey, grey)).save(folder / f'step_{name}.png')
    with Image.open(draw('folder', **given, training_gif=True, weights='raw', solver='heun') / 'training.gif') as gif:
        assert gif.n_frames == 2 and gif.size == (440, 100)
        greys = [np.array(gif.convert('L'))[50, 50] for i in range(2) if gif.seek(i) is None]
    assert np.abs(np.array(greys, int) - [60, 200]).max() < 8


# ---------------------------------------------------------------- the noise of each sample


@pytest.mark.parametrize('make', [torch.randn_like, torch.rand_like])
def test_noise_of_each_is_random_and_depends_on_the_index(make):
    x = torch.zeros(64, 3, 4)
    with NoiseOfEach(0, 'a', range(64)):
        whole, again = make(x), make(x)
    with NoiseOfEach(0, 'a', [5, 63]):
        some = make(x[:2])
        other_shape = torch.randn(7)
    assert torch.equal(some, whole[[5, 63]]) and not torch.equal(whole, again) and other_shape.shape == (7,)
    mean, std = (0, 1) if make is torch.randn_like else (0.5, 12**-0.5)
    assert whole.mean().item() == pytest.approx(mean, abs=0.1) and whole.std().item() == pytest.approx(std, rel=0.1)
    with NoiseOfEach(1, 'a', range(64)):
        assert not torch.equal(make(x), whole)
    assert make(x.double()).dtype == torch.float64


def test_overridden_hooks_are_used(run, tmp_path, monkeypatch):
    """sample_inputs is called for all samples at once, and draw for each batch."""
    trainer = load_run(run, num_sample_steps=3)
    numbers = []

    class Own(type(trainer)):
        def sample_inputs(self, n):
            numbers.append(n)
            inputs = super().sample_inputs(n)
            return dataclasses.replace(inputs, x1=torch.linspace(0, 1, n)[:, None, None, None].expand(n, 1, 8, 8))

        def draw(self, model_fn, inputs, solver):
            return 2 * inputs.x1 - 1

    trainer.__class__ = Own
    monkeypatch.setattr('scripts.samples.load_run', lambda *args, **kwargs: trainer)
    program.generate(Generate(run=str(run), out=str(tmp_path / 'x.npz'), num=30, batch_size=7))
    assert set(numbers) == {30}
    with pytest.raises(SettingError, match=r'trajectory=True: Own\.draw does not use the solvers of the repo'):
        program.generate(Generate(run=str(run), out=str(tmp_path / 'y.npz'), num=30, trajectory=True))
    assert np.array_equal(images(tmp_path / 'x.npz')[:, 0, 0], (torch.linspace(0, 1, 30) * 255).round().byte().numpy())


def test_the_grid_shows_the_first_samples_with_class_names(draw, tmp_path):
    arrays = np.load(draw('x.npz', labels='3,5', batch_size=7))
    assert arrays['arr_1'].tolist() == [3, 5] * 15
    x = torch.from_numpy(arrays['arr_0']).permute(0, 3, 1, 2) / 255
    grid = image_grid(x, 10, names=[str(k) for k in arrays['arr_1']])
    assert np.array_equal(np.array(Image.open(tmp_path / 'x_grid.png')), grid.permute(1, 2, 0).numpy())


def test_labels_are_refused_for_a_run_without_classes():
    with pytest.raises(SettingError, match='the run has learned no classes'):
        parse_labels('3', DataSpec(lambda config: (), num_classes=10), 1.0)
    with pytest.raises(SettingError, match='the run has no classes'):
        parse_labels('3', DataSpec(lambda config: ()), 0.0)
    with pytest.raises(SettingError, match='class 1 has no training items'):
        parse_labels('0,1', DataSpec(lambda config: (), num_classes=2, counts=(5, 0)), 0.1)


class Kelvin(ExampleDiffusionTrainer):
    def encode(self, x):
        return (x - 296) / 16

    def decode(self, x0):
        return 16 * x0 + 296


def test_floats_are_written_unchanged(tiny_config, build_trainer, tmp_path, monkeypatch):
    """They have the shape of images, but are temperatures: they are not clipped, and image detectors refuse them."""
    (x, label), held_out = load_digits(Config())
    parts = tuple((280 + 2 * part[0].float(), part[1]) for part in ((x, label), held_out))
    monkeypatch.setitem(DATASETS, 'kelvin', DataSpec(lambda config: parts, num_classes=10, scale='float'))
    config = tiny_config(dataset='kelvin')
    trainer = build_trainer(config, Kelvin)
    trainer.train_loop()
    monkeypatch.setattr(samples, 'load_run', lambda *args, **kwargs: trainer)
    options = dict(run='kelvin', num=12, num_sample_steps=3)
    program.generate(Generate(**options, out=str(tmp_path / 'x.npz')))
    written = np.load(tmp_path / 'x.npz')['arr_0']
    assert written.dtype == np.float32 and written.shape == (12, 1, 8, 8)
    assert 200 < written.min() < 296 < written.max() < 400 and len(np.unique(written)) > 700
    with pytest.raises(SettingError, match=r'PNGs hold only images in \[0, 1\], .*Pass --out x\.npz'):
        program.generate(Generate(**options, out=str(tmp_path / 'x')))
    with pytest.raises(SettingError, match=r"'inception' needs images in \[0, 1\] .*, in \[280, 312\]"):
        get_detector(trainer.judge.data, 'inception')


@pytest.mark.parametrize('labels, wanted', [('1', [1, 1, 1, 1]), ('2,0', [2, 0, 2, 0]), ('', [0, 1, 2, 0])])
def test_conditions_are_of_the_requested_classes(tiny_config, build_trainer, monkeypatch, labels, wanted):
    label = torch.arange(300) % 3
    part = torch.randn(300, 1, 16), label, 10.0 * label
    data = DataSpec(lambda config: (part, part), num_classes=3, scale='float', conditions=('ten',))
    monkeypatch.setitem(DATASETS, 'tens', data)
    trainer = build_trainer(tiny_config(dataset='tens'))
    monkeypatch.setattr(samples, 'load_run', lambda *args, **kwargs: trainer)
    inputs = samples.Samples('run', 'ema', 4, 0, labels).inputs(range(4))
    assert inputs.label.tolist() == wanted and inputs.cond['ten'].tolist() == [10 * c for c in wanted]


@pytest.mark.parametrize('shape', [(2, 9), (1, 4, 4), (2, 3, 3, 4), (2,), (3,)])
def test_paths_of_samples_that_are_not_images(tiny_config, build_trainer, monkeypatch, tmp_path, shape):
    """Curves, heat maps, slices and points; all frames of the animation have one scale. Nothing draws vectors."""
    load = lambda config: tuple((torch.randn(40, *shape), torch.zeros(40)) for _ in range(2))  # noqa: E731
    monkeypatch.setitem(DATASETS, 'floats', DataSpec(load, scale='float'))
    trainer = build_trainer(tiny_config(dataset='floats', network='mlp', num_training_steps=2, warmup_steps=1))
    trainer.train_loop()
    monkeypatch.setattr(samples, 'load_run', lambda *args, **kwargs: trainer)
    scales, draw_items = [], trainer.gallery.draw_items
    trainer.gallery.draw_items = lambda *args, **more: scales.append(more.get('scale')) or draw_items(*args, **more)
    go = partial(program.generate, Generate(run='floats', out=str(tmp_path / 'x.npz'), num=12, trajectory=True))
    if shape == (3,):
        with pytest.raises(SettingError, match=r'trajectory=True: no entry of KINDS'):
            go()
        return
    go()
    with Image.open(tmp_path / 'x_path.png') as path, Image.open(tmp_path / 'x_path.gif') as gif:
        assert path.width > 200 and gif.is_animated and gif.n_frames == trainer.config.num_sample_steps + 1
    assert scales[:2] == [None, None] and len({id(scale) for scale in scales[2:]}) == 1  # grid, path, frames
    assert scales[2].shape == (12 * (trainer.config.num_sample_steps + 1), *shape)
    with Image.open(tmp_path / 'x_grid.png') as grid:
        x = torch.from_numpy(np.load(tmp_path / 'x.npz')['arr_0'])[: trainer.gallery.num_shown]
        assert np.array_equal(np.array(grid), draw_items(x, [], across=8).permute(1, 2, 0).numpy())


def test_samples_that_decode_clamps_to_0_and_1_are_images(tiny_config, build_trainer, monkeypatch):
    class Latents(ExampleDiffusionTrainer):
        def decode(self, x0):
            return x0.clamp(0, 1)

    (x, label), held_out = load_digits(Config())
    parts = tuple((part[0].float() / 64, part[1]) for part in ((x, label), held_out))
    monkeypatch.setitem(DATASETS, 'dark', DataSpec(lambda config: parts, num_classes=10, scale='float'))
    assert build_trainer(tiny_config(dataset='dark'), Latents).gallery.are_images
    assert not build_trainer(tiny_config(dataset='dark', experiment_name='as_it_is')).gallery.are_images
    assert build_trainer(tiny_config(experiment_name='digits')).gallery.are_images


def test_samples_that_are_not_finite_are_counted(draw, capsys, monkeypatch):
    monkeypatch.setattr(
        samples.Samples, 'draw', lambda self, i: (torch.full((len(i), 1, 8, 8), torch.nan), self.inputs(i))
    )
    draw('x.npz', num=12, batch_size=5)
    assert 'warning: 12 samples have values that are not finite' in capsys.readouterr().out
