"""Finding the images of a folder: files, classes, and the held-out part."""

import json
import os
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

from config import SettingError
from data_loading.folders import in_order, some_names
from data_loading.images import list_images, load_image_folder
from data_utils import setup_data_train_and_test
from tests.data_loading.test_images import write_images

CPU = torch.device('cpu')
NINE = [(9, 9)]


def classes_of(found) -> dict[str, str]:
    """The class of each file."""
    return {file: found.facts['classes'][i] for file, i in zip(found.files, found.labels, strict=True)}


# ---------------------------------------------------------------- a split


def test_train_and_val_are_the_split_and_not_classes(folder, config_of, capsys):
    write_images(folder, {f'{part}/{kind}': NINE * 5 for part in ('Train', 'test', 'val') for kind in ('cat', 'dog')})
    (folder / 'extra').mkdir()
    Image.new('RGB', (9, 9)).save(folder / 'extra/x.png')
    train, _, test = setup_data_train_and_test(config_of(), CPU)
    assert train.spec.classes == ('cat', 'dog') and (train.size, test.size) == (10, 10)
    assert (
        'image_folder: Train/ is the training part, val/ is held out; left unused: extra/, test/\n'
        in capsys.readouterr().out
    )
    assert {file.split('/')[0] for file in list_images(config_of()).files[:10]} == {'val'}
    assert setup_data_train_and_test(config_of(held_out=4), CPU)[2].labels.bincount().tolist() == [2, 2]


@pytest.mark.parametrize('below', ['', 'data/set/'])
def test_a_split_without_classes(folder, config_of, capsys, below):
    """Also the layout of object detection, train/images and train/labels, and below single folders."""
    write_images(folder, {f'{below}train/images': NINE * 6, f'{below}valid/images': NINE * 3})
    train, _, test = setup_data_train_and_test(config_of(), CPU)
    assert train.spec.num_classes == 0 and (train.size, test.size) == (6, 3)


def test_a_held_out_folder_whose_classes_are_not_known_is_left_unused(folder, config_of, capsys):
    write_images(folder, {'train/cat': NINE * 20, 'train/dog': NINE * 20, 'test': NINE * 7, 'val/cat': NINE * 2})
    train, _, test = setup_data_train_and_test(config_of(), CPU)
    assert train.size + test.size == 40 and test.labels.tolist().count(0) == 2
    assert (
        'a part of it is held out; left unused: test/, val/ (train/ does not have their classes)'
        in capsys.readouterr().out
    )


def test_classes_that_train_lacks_are_left_out_of_the_held_out_part(folder, config_of, capsys):
    write_images(folder, {'train/cat': NINE * 9, 'train/dog': NINE * 9, 'test/dog': NINE * 2, 'test/emu': NINE * 3})
    train, _, test = setup_data_train_and_test(config_of(), CPU)
    assert (train.size, test.size) == (18, 2) and test.labels.tolist() == [1, 1]
    out = capsys.readouterr().out
    assert 'test/ is held out; test/ has no cat; left unused: 3 images of classes that train/ lacks\n' in out


def test_the_first_held_out_folder_with_classes_of_train_is_held_out(folder, config_of, capsys):
    both = {f'{part}/{kind}': NINE * 3 for part in ('train', 'test') for kind in ('cat', 'dog')}
    write_images(folder, both | {'val': NINE * 4})
    assert {file.split('/')[0] for file in list_images(config_of()).files[:6]} == {'test'}
    assert 'train/ is the training part, test/ is held out; left unused: val/\n' in capsys.readouterr().out


def test_parts_without_train_are_refused_and_a_class_may_be_called_train(folder, config_of, capsys):
    write_images(folder, {'bus': NINE * 5, 'train': NINE * 5})
    assert list_images(config_of()).facts['classes'] == ('bus', 'train')
    assert (
        f'train/ is taken as a class. If it is a part of the data, pass --data_path {folder}/train'
        in capsys.readouterr().out
    )
    shutil.rmtree(folder / 'bus')
    (folder / 'train').rename(folder / 'val')
    write_images(folder, {'test': NINE * 5})
    with pytest.raises(SettingError, match=rf'it holds val/, test/ but no train/.* --data_path {folder}/val'):
        list_images(config_of())


# ---------------------------------------------------------------- classes


def test_classes_below_single_folders_are_found(folder, config_of, capsys):
    write_images(folder, {'set/images/cat': NINE * 3, 'set/images/dog': NINE * 3})
    assert list_images(config_of()).facts['classes'] == ('cat', 'dog')
    assert 'image_folder: classes are the folders in set/images/\n' in capsys.readouterr().out
    Image.new('RGB', (9, 9)).save(folder / 'set/images/cover.png')
    with pytest.raises(SettingError, match=rf'1 image in set/images next to .*--data_path {folder}/set/images/cat'):
        list_images(config_of())


def test_warns_of_folders_that_hold_the_same_folders(folder, config_of, capsys):
    write_images(folder, {f'{fold}/{kind}': NINE for fold in ('fold1', 'fold2') for kind in ('cat', 'dog')})
    assert list_images(config_of()).facts['classes'] == ('fold1', 'fold2')
    assert (
        f'holds the folders cat, dog. If these are the classes, pass one of those, as --data_path {folder}/fold1'
        in (capsys.readouterr().out)
    )


@pytest.mark.parametrize('below', ['', 'only', 'train/x'])
def test_without_classes_prints_the_two_ways_to_give_them(folder, config_of, capsys, below):
    write_images(folder, {below: NINE * 4})
    for name in 'abc':
        (folder / below / '0.png').with_name(f'cat_{name}.png').write_bytes((folder / below / '0.png').read_bytes())
    list_images(config_of())
    out = capsys.readouterr().out
    assert 'no classes: they are read from folders, one for each class, or from labels.csv (' in out
    assert 'classes are the folders' not in out
    write_images(folder / below, {'cat, tame': NINE, 'dog': NINE})
    shutil.rmtree(folder / 'x', ignore_errors=True)
    for path in (folder / below).glob('*.png'):
        path.rename(path.parent / 'dog' / path.name)
    assert list_images(config_of()).facts['classes'] == ('cat, tame', 'dog')  # a comma in a name is kept
    assert 'no classes' not in capsys.readouterr().out


def test_few_counts_the_names_after_the_eighth():
    assert some_names(list('abcdefgh')) == 'a, b, c, d, e, f, g, h'
    assert some_names(list('abcdefghij')) == 'a, b, c, d, e, f, g, h and 2 more'


def test_numbers_are_sorted_as_numbers(folder, config_of):
    write_images(folder, dict.fromkeys(('10', '9', '100', 'b', 'a'), NINE))
    assert list_images(config_of()).facts['classes'] == ('9', '10', '100', 'a', 'b')


@pytest.mark.parametrize('labels', ['null', 'vectors', 'numbers', 'none'])
def test_shards_of_dataset_tool_are_not_classes(folder, config_of, capsys, labels):
    names = [f'0000{i // 3}/img{i:08d}.png' for i in range(6)]
    write_images(folder, {'00000': [], '00001': []})
    for name in names:
        Image.new('RGB', (9, 9)).save(folder / name)
    given = dict(
        numbers=[[name, 10 - i % 2] for i, name in enumerate(names)], vectors=[[name, [0, 1]] for name in names]
    )
    found = dict(labels=given.get(labels))
    if labels != 'none':
        (folder / 'dataset.json').write_text(json.dumps(found))
    got = list_images(config_of())
    warned = 'folders 00000, 00001 ... are taken as classes. If they are not, add --label_dropout 1'
    out = capsys.readouterr().out
    assert (warned in out) == (labels == 'none')
    assert ('no classes: dataset.json has no labels that are whole numbers\n' in out) == (labels in ('null', 'vectors'))
    if labels in ('null', 'vectors'):
        assert got.facts['classes'] == () and got.labels == [0] * 6
    if labels == 'numbers':
        assert classes_of(got) == {name: ['10', '9'][i % 2] for i, name in enumerate(names)}
        assert got.facts['classes'] == ('9', '10')
        before = got.state()
        found['labels'] = [[name, 19 - label] for name, label in found['labels']]
        (folder / 'dataset.json').write_text(json.dumps(found))
        assert list_images(config_of()).state() != before  # the cache is made again
        found['labels'].pop()
        (folder / 'dataset.json').write_text(json.dumps(found))
        with pytest.raises(
            SettingError, match=r'1 of 6 images are not in its list of classes \(00001/img00000005.png\)'
        ):
            list_images(config_of())
        found['labels'] = [[name.removesuffix('.png'), 0] for name in names]
        (folder / 'dataset.json').write_text(json.dumps(found))
        with pytest.raises(SettingError, match=r'6 of 6 images .* list of .*; the list has 00000/img00000000\)?\.'):
            list_images(config_of())
        (folder / 'dataset.json').write_text('{')
        with pytest.raises(SettingError, match=r'dataset.json cannot be read'):
            list_images(config_of())


@pytest.mark.parametrize('with_classes', [False, True])
def test_reads_samples_of_generate(folder, config_of, capsys, with_classes):
    write_images(folder, {'000': NINE * 4, '001': NINE * 2, '': NINE})
    (folder / '0.png').rename(folder / 'grid.png')
    (folder / 'generate.json').write_text('{}')
    if with_classes:
        rows = [
            f'{name},{i % 3 + 8},kind {i % 3}'
            for i, name in enumerate(['000/0.png', '000/1.png', '000/2.png', '000/3.png', '001/0.png', '001/1.png'])
        ]
        (folder / 'labels.csv').write_text('file,class,name\n' + '\n'.join(rows))
    found = list_images(config_of())
    assert len(found.files) == 6 and 'skipped pictures next to generate.json: grid.png' in capsys.readouterr().out
    assert found.facts['classes'] == (('kind 0', 'kind 1', 'kind 2') if with_classes else ())
    assert not with_classes or classes_of(found)['001/1.png'] == 'kind 2'


def test_labels_csv_with_other_columns_is_refused(folder, config_of):
    write_images(folder, {'': NINE * 4})
    (folder / 'labels.csv').write_text('id,breed\n0.png,cat\n')
    with pytest.raises(
        SettingError, match=r'labels\.csv cannot be read \(it begins with id,breed, not with file,class'
    ):
        list_images(config_of())
    (folder / 'labels.csv').write_text('file,class\n0.png,cat\n1.png,dog\n2.png,cat\n3.png,cat\n')
    assert classes_of(list_images(config_of())) == {'0.png': 'cat', '1.png': 'dog', '2.png': 'cat', '3.png': 'cat'}


def test_labels_csv_may_come_from_a_spreadsheet_and_have_no_classes(folder, config_of):
    """With a byte order mark, and with -1, which generate.py writes for a sample without a class."""
    write_images(folder, {'': NINE * 2})
    for kinds, wanted in ((('cat', 'dog'), ('cat', 'dog')), (('-1', '-1'), ())):
        text = '\ufefffile,class\n' + ''.join(f'{i}.png,{kind}\n' for i, kind in enumerate(kinds))
        (folder / 'labels.csv').write_text(text, encoding='utf-8')
        assert list_images(config_of()).facts['classes'] == wanted


def test_other_names_of_classes_are_other_data(folder, config_of):
    write_images(folder, {'': NINE * 2})
    marks = set()
    for name in ('cat', 'lynx'):
        (folder / 'labels.csv').write_text(f'file,class,name\n0.png,0,{name}\n1.png,1,dog\n')
        marks.add(list_images(config_of()).fingerprint())
    assert len(marks) == 2


def test_two_names_of_one_folder_are_printed(folder, config_of, capsys):
    write_images(folder, {'cat': NINE * 3, 'Cat': NINE * 3, 'dog': NINE * 2})
    (folder / 'aaa').symlink_to(folder / 'dog')
    found = list_images(config_of())
    assert found.facts['classes'] == ('Cat', 'cat', 'dog') and len(found.files) == 8
    out = capsys.readouterr().out
    assert 'warning: image_folder: Cat and cat are two classes. Merge' in out
    assert 'skipped folders that are read under another name: aaa 1\n' in out


def test_system_folders_are_not_classes(folder, config_of, capsys):
    write_images(
        folder, {'cat': NINE * 3, 'dog': NINE * 3, '@eaDir/1.jpg': NINE, '__MACOSX/cat': NINE, '#recycle': NINE}
    )
    (folder / 'cat/Thumbs.db').write_text('')
    assert list_images(config_of()).facts['classes'] == ('cat', 'dog')
    out = capsys.readouterr().out
    assert '.db 1' in out and all(f'{name} 1' in out for name in ('@eaDir', '__MACOSX', '#recycle'))


def test_names_that_are_not_unicode_are_printed(folder, config_of, capsys):
    write_images(folder, {'cat': NINE * 3, 'x': NINE * 3})
    os.rename(os.fsencode(folder / 'x'), os.fsencode(folder) + b'/caf\xe9')
    train, _, _ = setup_data_train_and_test(config_of(), CPU)
    assert train.spec.classes == ('caf\\xe9', 'cat')
    (folder / 'cat/0.png').write_bytes(b'')
    os.rename(os.fsencode(folder / 'cat/0.png'), os.fsencode(folder) + b'/cat/\xe9.png')
    with pytest.raises(SettingError, match=r'cat/\\xe9.png cannot be read') as caught:
        setup_data_train_and_test(config_of(), CPU)
    assert str(caught.value).encode() and capsys.readouterr().out.encode()


# ---------------------------------------------------------------- paths that are not a folder of images


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('x.zip', r'x\.zip.: this is a zip archive: unpack it, and pass the folder'),
        ('x.png', r'a single image\. Pass a folder of images, such as --data_path .*images'),
        ('x.HEIC', 'a single image'),
        ('x.npy', r'a file\. Pass a folder of images; --dataset arrays reads .npy'),
    ],
)
def test_a_file_is_refused_with_what_to_do(folder, config_of, name, words):
    (folder / name).write_bytes(b'')
    with pytest.raises(SettingError, match=words):
        list_images(config_of(data_path=str(folder / name)))


@pytest.mark.parametrize(
    ('names', 'remedy'),
    [
        ('x.heic', r'only .heic 1\. Convert them'),
        ('x.zip', 'Unpack the archive'),
        ('a b c d', r'only no ending 4\. Give the files an ending, such as \.png'),
        ('a.npy b.npy', r'only .npy 2\. --dataset arrays reads one such file; np\.stack joins several'),
        ('README', r'only README 1\. Pass a folder of images'),
    ],
)
def test_a_folder_without_an_image_says_what_to_do(folder, config_of, names, remedy):
    for name in names.split():
        (folder / name).write_bytes(b'')
    with pytest.raises(SettingError, match=remedy):
        list_images(config_of())


# ---------------------------------------------------------------- the held-out part


@pytest.mark.parametrize('n', [1, 5, 14, 40, 86])
def test_the_first_files_are_of_all_classes(n):
    sizes = dict(a=60, b=25, c=7, d=1, e=1)
    labels = {f'{name}{i}': ord(name) for name, size in sizes.items() for i in range(size)}
    order = in_order(list(labels), labels)
    assert sorted(order) == sorted(labels) and order == in_order(list(reversed(labels)), labels)
    held = Counter(name[0] for name in order[:n])
    assert all(held[name] < size for name, size in sizes.items())  # each class keeps one to train on
    assert n > 40 or all(abs(held[name] - size * n / 94) < 1.1 for name, size in sizes.items())
    added = labels | {f'b{i}': ord('b') for i in range(25, 28)}
    assert len(set(order[:n]) & set(in_order(list(added), added)[:n])) >= n - 1 - n // 10


def test_a_class_keeps_an_image_to_train_on(folder, config_of):
    write_images(folder, {f'c{i:02d}': NINE for i in range(15)} | {f'd{i}': NINE * 5 for i in range(5)})
    for held_out in (0, 20):
        train, _, test = setup_data_train_and_test(config_of(held_out=held_out), CPU)
        assert min(train.spec.counts) >= 1 and test.size == (held_out or 4)
    with pytest.raises(SettingError, match=r'held_out=21: of 40 items at most 20 .*each of 20 classes needs one'):
        load_image_folder(config_of(held_out=21))
    for i in range(5):
        shutil.rmtree(folder / f'd{i}')
    with pytest.raises(SettingError, match='of 15 items at most 0 can be held out'):
        load_image_folder(config_of())
    write_images(folder, {'c00': NINE * 2} | {f'e{i}': NINE for i in range(5)})  # a tenth of 21 is two
    assert setup_data_train_and_test(config_of(), CPU)[2].size == 1
