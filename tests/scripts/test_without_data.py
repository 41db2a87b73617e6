"""generate.py and evaluate.py for a run whose data were moved; classes in files and on the command line."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import saving
from config import Config, SettingError
from data_loading.spec import DataSpec
from data_utils import setup_data_train_and_test
from main import build, load_run
from scripts.evaluate import Evaluate, evaluate
from scripts.evaluate import main as evaluate_main
from scripts.generate import Generate, generate
from scripts.samples import parse_labels
from trainer import ExampleDiffusionTrainer
from training import run_record

CLASSES = ('a, b', 'hat', 'вино')


@pytest.fixture
def images(tmp_path):
    """A folder of 36 images of three classes."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{i}.png')
    return tmp_path / 'images'


@pytest.fixture
def made(tiny_config, images):
    """`made(trainer_class)`: the folder of a run on the images, saved at step 0."""

    def go(trainer_class=ExampleDiffusionTrainer, **settings):
        settings = dict(dataset='image_folder', data_path=str(images), image_size=(8,), label_dropout=0.1) | settings
        config = tiny_config(experiment_name='run', cache=False, **settings)
        trainer = build(config, trainer_class)
        run_record.write_start(config, trainer_class, trainer.device)
        trainer.checkpoints.save(0, wait=True)
        return config.run_dir

    return go


def drawn(run, out, **options):
    generate(Generate(**(dict(run=str(run), out=str(out), num=7, num_sample_steps=2) | options)))
    return out


def test_samples_need_only_the_folder_of_the_run(made, images, tmp_path):
    run = made()
    first = drawn(run, tmp_path / 'first.npz')
    images.rename(tmp_path / 'elsewhere')
    run = run.rename(tmp_path / 'renamed')
    again = np.load(drawn(run, tmp_path / 'again.npz'))
    assert all(np.array_equal(again[name], np.load(first)[name]) for name in ('arr_0', 'arr_1', 'classes'))
    assert again['arr_0'].dtype == np.uint8 and again['classes'].tolist() == list(CLASSES)
    trainer = load_run(run)
    assert trainer.data.classes == CLASSES and sum(trainer.data.counts) == 33
    assert trainer.shape == (3, 8, 8) and trainer.independent and trainer.drawing.has_score


@pytest.mark.slow
def test_operations_that_need_the_data_name_them_and_accept_a_new_path(made, images, tmp_path, monkeypatch, capsys):
    run = made()
    real = load_run(run).example
    moved = images.rename(tmp_path / 'elsewhere')
    trainer = load_run(run)
    needed = (
        r"this needs the data of the run \(for inputs .* data_path='.*images': there is no such folder.* as --data_path"
    )
    for read in (lambda: trainer.example, lambda: next(iter(trainer.train_loader)), lambda: trainer.test_loader.size):
        with pytest.raises(SettingError, match=needed):
            read()
    with pytest.raises(SettingError, match=needed):
        load_run(run).test_loader.open()
    with pytest.raises(SettingError, match=needed):
        evaluate(Evaluate(str(run), num=10, nfe=(2,)))
    trainer = load_run(run, data_path=str(moved))
    assert trainer.example.x0.equal(real.x0) and trainer.example.t.equal(real.t)
    trainer.record.clear()
    trainer.train_step(next(trainer.batches.steps(0)))
    monkeypatch.setenv('RUN_CALLER', str(tmp_path))
    with pytest.raises(SystemExit):
        evaluate_main(['--run', str(run), '--num', '10', '--nfe', '2', '--data_path', 'elsewhere'])
    assert '3 training or held-out items are too few' in capsys.readouterr().err


class FromData(ExampleDiffusionTrainer):
    """Samples start from the negatives of images, so they need data."""

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        prepared.x1 = -prepared.x0
        return prepared


class OnData(ExampleDiffusionTrainer):
    """The mean colour is a condition."""

    def prepare_batch_fn(self, batch, is_train):
        prepared = super().prepare_batch_fn(batch, is_train)
        prepared.cond = {'colour': prepared.x0.mean((2, 3))}
        return prepared


@pytest.mark.parametrize('trainer_class', [FromData, OnData])
def test_samples_that_start_from_data_need_them(made, images, tmp_path, trainer_class):
    run = made(trainer_class, network='mlp' if trainer_class is FromData else 'unet')
    first = np.load(drawn(run, tmp_path / 'first.npz'))['arr_0']
    moved = images.rename(tmp_path / 'elsewhere')
    with pytest.raises(SettingError, match=r'needs the data of the run .* as --data_path'):
        drawn(run, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()
    again = np.load(drawn(run, tmp_path / 'again.npz', data_path=str(moved)))['arr_0']
    assert np.array_equal(first, again)


def test_other_data_give_a_warning_or_are_refused(made, images, capsys):
    run = made()
    (images / 'hat/0.png').rename(images / 'вино/a.png')
    assert load_run(run).train_loader.size == 33
    assert 'warning: the run was trained on other data (33+3 items, 3 classes' in capsys.readouterr().out
    loader, larger = load_run(run).train_loader, dataclasses.replace(load_run(run).config, image_size=(9,))
    for config, other in ((Config(dataset='digits'), r'\(1, 8, 8\), 10 classes'), (larger, r'\(3, 9, 9\), 3 classes')):
        loader.load = lambda config=config: setup_data_train_and_test(config, torch.device('cpu'))[0]
        with pytest.raises(SettingError, match=rf'of shape \(3, 8, 8\), 3 classes, not {other}'):
            loader.open()


def test_a_run_of_an_older_version_needs_its_data(made, images, tmp_path):
    run = made()
    saved = saving.load(run / 'last.pt')
    del saved['facts']
    saving.write(run / 'last.pt', **saved)
    moved = images.rename(tmp_path / 'elsewhere')
    with pytest.raises(SettingError, match=r'older version.*there is no such folder.* as --data_path'):
        drawn(run, tmp_path / 'x.npz')
    assert len(np.load(drawn(run, tmp_path / 'x.npz', data_path=str(moved)))['arr_0']) == 7


def test_a_checkpoint_without_its_run_json_is_refused_with_a_remedy(made, tmp_path):
    (tmp_path / 'by_itself').mkdir()
    path = (made() / 'last.pt').rename(tmp_path / 'by_itself/last.pt')
    with pytest.raises(SettingError, match=r'Copy the run\.json .* next to its \.pt files; or pass the run.s folder'):
        load_run(path)
    (tmp_path / 'ckpts/run/run.json').rename(tmp_path / 'by_itself/run.json')
    assert load_run(path).step == 0


# ---------------------------------------------------------------- classes


def rows_of(folder):
    with open(folder / 'labels.csv', newline='', encoding='utf-8') as file:
        return list(csv.reader(file))


def test_the_classes_of_pngs_are_in_a_table(made, tmp_path):
    run, out = made(), tmp_path / 'x'
    drawn(run, out, labels='вино,0')
    expected = [(f'000/{i:06d}.png', *((2, 'вино') if i % 2 == 0 else (0, 'a, b'))) for i in range(7)]
    header = ['file', 'class', 'name']
    assert rows_of(out) == [header, *[list(map(str, row)) for row in expected]]
    assert all((out / row[0]).is_file() for row in expected)
    (out / 'labels.csv').unlink()  # an older version wrote no table
    drawn(run, out, labels='вино,0', num=5)
    assert len(rows_of(out)) == 6
    drawn(run, out, labels='вино,0', num=9, batch_size=2)
    drawn(run, out, labels='вино,0', num=3)
    assert len(rows_of(out)) == 10 and rows_of(out)[:8] == [header, *[list(map(str, row)) for row in expected]]


def test_without_classes_there_is_no_table(made, tmp_path):
    run = made(label_dropout=1.0)
    assert not (drawn(run, tmp_path / 'x') / 'labels.csv').exists()


def test_classes_can_be_named_on_the_command_line():
    spec = DataSpec(lambda config: (), num_classes=3, classes=('Ankle boot', 'Bag', '0'))
    assert parse_labels('Bag,Ankle boot', spec, 0.1) == [1, 0] and parse_labels('Ankle boot', spec, 0.1) == [0]
    assert parse_labels('1, Bag 2', spec, 0.1) == [1, 1, 2] and parse_labels('', spec, 0.1) == []
    assert parse_labels('0', spec, 0.1) == [2]  # the class whose name is 0
    comma = DataSpec(lambda config: (), num_classes=2, classes=('a, b', 'say "c"'))
    assert parse_labels('"a, b", 1,say "c"', comma, 0.1) == [0, 1, 1]
    assert parse_labels('1, "a, b"', comma, 0.1) == [1, 0]
    with pytest.raises(SettingError, match=r'separated by commas, and a name with a comma in quotes: .* \'"a, b"\'\.'):
        parse_labels('a, b', comma, 0.1)
    numbers = DataSpec(lambda config: (), num_classes=2, classes=('1', '2'))
    assert parse_labels('2,1', numbers, 0.1) == [1, 0]
    with pytest.raises(
        SettingError, match=r"'0' is not a class.* are 0 '1', 1 '2'"
    ):  # all names are numbers, so a number means a name
        parse_labels('0,1', numbers, 0.1)
    with pytest.raises(
        SettingError, match=r"labels='Boot': 'Boot' is not a class.* are 0 'Ankle boot', 1 'Bag', 2 '0'"
    ):
        parse_labels('Boot', spec, 0.1)


def test_a_step_of_a_run_opened_read_only_has_the_dropout_of_the_run(made, tiny_config):
    run = made(dropout=0.5)
    seen = []
    for lazy in (False, True):
        trainer = load_run(run, weights='raw')
        if not lazy:  # as in training, where everything is built before the first step
            trainer.losses.later()
        trainer.record.clear()
        trainer.train_step(next(trainer.batches.steps(0)))
        seen.append(torch.rand(()))  # depends on the random numbers that dropout has consumed
    assert seen[0] == seen[1]
