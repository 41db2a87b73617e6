"""Images of a folder and of Hugging Face `datasets`: the files used, their decoding, and the cache."""

import io
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from config import SettingError
from data_loading import images, packed
from data_loading.images import list_images, pixels_of
from data_utils import setup_data_train_and_test
from tests.helpers import ROOT

CPU = torch.device('cpu')
WHITE = (255, 255, 255)
STAMPS = Path('/usr/share/tuxpaint/stamps')  # Debian's tuxpaint-stamps-default


def write_images(folder: Path, sizes: dict[str, list[tuple[int, int]]]) -> None:
    """Write PNGs of these (width, height) for each class; an image has one colour, whose red part is its class."""
    for i, (name, of_class) in enumerate(sizes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for j, size in enumerate(of_class):
            Image.new('RGB', size, (100 * i, 7 * j, 50)).save(folder / name / f'{j}.png')


def pixels(path, size=(4, 4), channels=3, background=WHITE):
    return pixels_of(path, size, channels, background)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize('ending', ['png', 'webp', 'gif', 'bmp', 'tif', 'ppm', 'jpg'])
def test_every_kind_of_file(folder, ending):
    lossless = dict(lossless=True) if ending == 'webp' else {}
    path = folder / f'x.{ending}'
    Image.new('RGB', (4, 4), (200, 100, 50)).save(path, **lossless)
    got = pixels(path).float()
    assert (got - torch.tensor([200.0, 100.0, 50.0])[:, None, None]).abs().max() <= (3 if ending == 'jpg' else 0)


def test_transparent_parts_show_the_background(folder):
    """Also if the hidden colour differs, for palettes, and for grey with transparency."""
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, :2] = (10, 20, 30, 255)
    rgba[:, 2:3] = (90, 0, 0, 0)
    rgba[:, 3:] = (0, 0, 0, 51)  # a fifth of black
    Image.fromarray(rgba).save(folder / 'rgba.png')
    Image.fromarray(rgba[..., [0, 3]]).convert('LA').save(folder / 'la.png')
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    palette.save(folder / 'p.png', transparency=palette.getpixel((2, 0)))
    got = pixels(folder / 'rgba.png', background=(100, 200, 50))
    assert got[:, 0].T.tolist() == [[10, 20, 30], [10, 20, 30], [100, 200, 50], [80, 160, 40]]
    assert pixels(folder / 'la.png', channels=1, background=(100, 100, 100))[0, 0].tolist() == [10, 10, 100, 80]
    assert pixels(folder / 'p.png', background=(1, 2, 3))[:, 0, 2].tolist() == [1, 2, 3]


def test_sixteen_bits_are_scaled(folder):
    levels = np.linspace(0, 65535, 16).round().astype(np.uint16).reshape(4, 4)
    Image.fromarray(levels).save(folder / 'x.png')
    assert pixels(folder / 'x.png', channels=1)[0].flatten().tolist() == [17 * k for k in range(16)]
    Image.fromarray(np.full((4, 4), 255, np.uint16)).save(folder / 'y.png')
    assert pixels(folder / 'y.png', channels=1).unique().tolist() == [255]
    Image.fromarray(np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)).save(folder / 'x.tif')
    with pytest.raises(ValueError, match=r'-1 to 1 .float32. are not an 8-bit or 16-bit image'):
        pixels(folder / 'x.tif')


def test_grey_levels_of_few_values_do_not_become_black(folder, config_of, capsys):
    """A label image or mask with 16 bits per pixel; an image with higher levels than the others is refused."""
    for i in range(12):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint16)).save(folder / f'{i}.png')
    train, _, test = setup_data_train_and_test(config_of(), CPU)
    got = torch.cat([train.everything()[0], test.everything()[0]]).mul(255).round().unique().tolist()
    assert got == [20 * i for i in range(12)]
    assert 'grey levels of 16-bit images end at 220, so 255 is taken as white' in capsys.readouterr().out
    assert pixels(folder / '11.png', channels=1).unique().tolist() == [220]
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(folder / 'x.png')
    with pytest.raises(ValueError, match='to 300, other images end at 255'):
        pixels_of(folder / 'x.png', (8, 8), 1, WHITE, white=255)
    setup_data_train_and_test(config_of(), CPU)
    assert 'grey levels end at 300, but 65535 is white' in capsys.readouterr().out


@pytest.mark.parametrize(('mode', 'largest', 'warned'), [
    ('L', 3, True), ('L', 16, True), ('L', 17, False), ('I;16', 3, True), ('I;16', 4095, True), ('I;16', 60_000, False),
    ('RGB', 3, False),
])  # fmt: skip
def test_warns_of_label_images_with_the_flag(folder, config_of, capsys, mode, largest, warned):
    for i in range(12):
        value = min(i, largest) if i else largest
        if mode == 'RGB':
            Image.new(mode, (8, 8), (value,) * 3).save(folder / f'{i}.png')
        else:
            Image.fromarray(np.full((8, 8), value, np.uint8 if mode == 'L' else np.uint16)).save(folder / f'{i}.png')
    list_images(config_of())
    out = capsys.readouterr().out
    assert (f'pass --dataset arrays --value_range 0 {largest}, or rescale them' in out) == warned, out


@pytest.mark.parametrize('brand', ['heic', 'mif1', 'abcd'])
def test_a_photo_of_a_phone_under_another_name_is_to_be_converted(folder, config_of, brand):
    write_images(folder, {'': [(9, 9)] * 4})
    (folder / 'x.jpg').write_bytes(b'\0\0\0\x18ftyp' + brand.encode() + bytes(99))
    kind = "'abcd'" if brand == 'abcd' else 'HEIC'
    with pytest.raises(SettingError, match=rf'x\.jpg .*it is of the format {kind}: convert it to JPEG or PNG\)'):
        setup_data_train_and_test(config_of(), CPU)


def test_only_the_orientation_of_EXIF_data_is_read(folder):
    """Some phones write an exposure bias of -1/0, which Pillow cannot write again."""
    entries = [(0x112, 3, struct.pack('<H', 6)), (0x9204, 10, struct.pack('<ii', -1, 0))]
    body, end = b'', 8 + 2 + 12 * len(entries) + 4
    for tag, kind, value in entries:
        body += struct.pack('<HHI', tag, kind, 1) + (value if len(value) <= 4 else struct.pack('<I', end)).ljust(
            4, b'\0'
        )
    tiff = b'II*\0' + struct.pack('<IH', 8, len(entries)) + body + struct.pack('<I', 0) + entries[1][2]
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, 16:] = 255
    Image.fromarray(picture).save(folder / 'x.jpg', exif=b'Exif\0\0' + tiff)
    got = pixels(folder / 'x.jpg', (32, 16))
    assert got[:, :14].max() < 20 and got[:, 18:].min() > 235  # the right half is below


@pytest.mark.parametrize('ending', ['tif', 'jpg', 'png', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_all_orientations(folder, ending, orientation):
    image = Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8).repeat(16, 0).repeat(16, 1))
    exif = image.getexif()
    exif[0x112] = orientation
    image.convert('RGB').save(folder / f'x.{ending}', exif=exif)
    with Image.open(folder / f'x.{ending}') as saved:
        want = np.array(ImageOps.exif_transpose(saved).convert('L'))[8::16, 8::16]
    got = pixels(folder / f'x.{ending}', (32, 32), 1)[0, 8::16, 8::16].numpy()
    assert np.abs(got.astype(int) - want).max() < 6
    image.crop((0, 0, 32, 16)).convert('RGB').save(folder / f'x.{ending}', exif=exif)
    found = images.head(folder / f'x.{ending}')
    upright = (32, 16) if orientation < 5 or ending == 'png' else (16, 32)  # a PNG is not decoded here
    assert found and (found.width, found.height) == upright


def test_a_photograph_stands_upright(folder):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 10)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    image.save(folder / 'x.png', exif=exif)
    want = torch.rot90(torch.arange(16).reshape(4, 4) * 10, -1)
    assert torch.equal(pixels(folder / 'x.png', channels=1)[0].long(), want)


def test_an_animation_gives_its_first_picture(folder):
    first, second = (Image.new('RGB', (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0)))
    first.save(folder / 'x.gif', save_all=True, append_images=[second])
    assert pixels(folder / 'x.gif')[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize('size', [(8, 8), (8, 16), (16, 8), (4, 4)])
@pytest.mark.parametrize('turned', [False, True])
def test_the_middle_is_cut_out(folder, size, turned):
    """In an image of three equal parts in a row, the middle part fills the cropped image."""
    picture = np.zeros((16, 48, 3), np.uint8)
    picture[:, 16:32] = 200
    Image.fromarray(picture.swapaxes(0, 1) if turned else picture).save(folder / 'x.png')
    got = pixels(folder / 'x.png', size)
    assert got.shape == (3, *size)
    longer = max(1, size[0 if turned else 1] / size[1 if turned else 0])  # relative to the width of the part
    assert got.float().mean() == pytest.approx(200 / longer, abs=1)
    middle = got[:, :, size[1] // 2] if not turned else got[:, size[0] // 2]
    assert ((middle.int() - 200).abs() <= 4).all()


@pytest.mark.parametrize('channels', [1, 3])
def test_fit_pad_keeps_all_and_stretch_distorts(folder, channels):
    picture = np.full((8, 32, 3), 100, np.uint8)
    picture[:, :8] = 200
    Image.fromarray(picture).save(folder / 'x.png')
    padded = pixels_of(folder / 'x.png', (16, 16), channels, (30, 30, 30), 'pad')
    assert padded.shape == (channels, 16, 16)
    assert padded[:, :6].unique().tolist() == padded[:, 10:].unique().tolist() == [30]
    assert (padded[:, 6:10, :3].float() - 200).abs().max() < 12 and padded[:, 6:10, 6:].unique().tolist() == [100]
    stretched = pixels_of(folder / 'x.png', (16, 16), channels, WHITE, 'stretch')
    assert (stretched[:, :, :3].float() - 200).abs().max() < 12 and (stretched[:, :, 6:].float() - 100).abs().max() < 12
    Image.new('RGB', (20_000, 10)).save(folder / 'long.png')
    assert (pixels_of(folder / 'long.png', (16, 16), 3, WHITE, 'pad') == 0).sum() == 3 * 16


def test_what_cropping_cuts_is_printed(folder, config_of, capsys):
    write_images(folder, {'': [(8, 8)] * 3 + [(8, 32)]})
    list_images(config_of())
    assert (
        f'image_folder: cropping cuts 19% of the pixels on average, 75% at most ({folder}/3.png); --fit pad'
        in capsys.readouterr().out
    )
    for fit in ('pad', 'stretch'):
        assert list_images(config_of(fit=fit)).made['fit'] == fit
        assert 'cropping' not in capsys.readouterr().out


@pytest.mark.parametrize(('size', 'fit', 'warned'), [
    ((1, 1), 'crop', True), ((20_000, 10), 'crop', True), ((20_000, 10), 'pad', True), ((2, 9), 'pad', False),
    ((3, 9), 'crop', False), ((2, 9), 'crop', True), ((80, 9), 'crop', False),
])  # fmt: skip
def test_images_that_are_too_small_or_long_are_named(folder, config_of, capsys, size, fit, warned):
    write_images(folder, {'': [(8, 8)] * 3 + [size]})
    list_images(config_of(fit=fit, image_size=(9,)))
    out = capsys.readouterr().out
    assert (
        f'warning: image_folder: 1 of 4 images, such as {folder}/3.png ({size[0]}x{size[1]}), are enlarged' in out
    ) == warned, out


def test_a_preset_that_flips_warns_of_letters(folder, config_of, capsys):
    write_images(folder, {'cat': [(9, 9)] * 3, 'symbols': [(9, 9)] * 3})
    list_images(config_of())
    assert 'mirrored' not in capsys.readouterr().out
    list_images(config_of(flip_prob=0.5))
    assert (
        "warning: image_folder: images are mirrored or turned: add --flip_prob 0 if they show letters ('symbols')"
        in (capsys.readouterr().out)
    )
    shutil.rmtree(folder / 'symbols')
    list_images(config_of(flip_prob=0.5, rotate_prob=1))
    out = capsys.readouterr().out
    assert 'add --flip_prob 0 --rotate_prob 0 if they show letters, or' in out and 'warning' not in out


def test_reducing_averages_and_does_not_skip(folder):
    """A checkerboard of single pixels becomes grey; taking every n-th pixel would leave only black or only white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(folder / 'x.png')
    assert (pixels(folder / 'x.png', channels=1).float() - 127.5).abs().max() < 3


# ---------------------------------------------------------------- the files used


def test_classes_are_the_first_folders(folder, config_of, capsys):
    write_images(folder, {'cat': [(9, 9)] * 4, 'dog': [(9, 9)] * 5, 'dog/small/old': [(9, 9)] * 2})
    train, _, test = setup_data_train_and_test(config_of(), CPU)
    assert train.spec.classes == ('cat', 'dog') and train.spec.num_classes == 2 and train.spec.shape == (3, 8, 8)
    assert (train.size, test.size) == (10, 1)
    labels = torch.cat([train.everything()[1], test.everything()[1]])
    assert labels.bincount().tolist() == [4, 7]
    out = capsys.readouterr().out
    assert 'image_folder: 10 + 1 held-out items of shape 3x8x8, 2 classes: cat 4, dog 7\n' in out


@pytest.mark.parametrize('below', ['', 'only'])
def test_images_in_one_folder_have_no_class(folder, config_of, capsys, below):
    write_images(folder, {below: [(9, 9)] * 5})
    train, _, _ = setup_data_train_and_test(config_of(), CPU)
    assert train.spec.num_classes == 0 and 'no classes' in capsys.readouterr().out


def test_images_next_to_folders_of_classes_are_refused(folder, config_of):
    write_images(folder, {'': [(9, 9)] * 3, 'cat': [(9, 9)] * 2})
    with pytest.raises(SettingError, match=r'3 images next to folders \(cat\) without a class'):
        list_images(config_of())


def test_hidden_and_other_files_are_skipped_and_counted(folder, config_of, capsys):
    write_images(folder, {'a': [(9, 9)] * 3, 'b': [(9, 9)] * 3, '.hidden': [(9, 9)], 'a/.thumbnails': [(9, 9)]})
    (folder / 'a' / '._0.png').write_text('hidden')
    for name in ('a/notes.txt', 'a/more.txt', 'x.svg', 'README'):
        (folder / name).write_text('no image')
    assert len(list_images(config_of()).files) == 6
    out = capsys.readouterr().out
    assert 'skipped files that are not images: .txt 2, README 1\n' in out
    assert 'skipped images that must be converted first: .svg 1\n' in out
    assert 'skipped thumbnails, hidden and system folders: .hidden 1, .thumbnails 1\n' in out


def test_a_circle_of_links_ends(folder, config_of):
    write_images(folder, {'a': [(9, 9)] * 3, 'b': [(9, 9)] * 2})
    (folder / 'a' / 'again').symlink_to(folder)
    (folder / 'b' / 'self').symlink_to(folder / 'b')
    assert sorted(list_images(config_of()).files) == [
        *(f'a/{i}.png' for i in range(3)),
        *(f'b/{i}.png' for i in range(2)),
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_folder_that_may_not_be_read_is_named(folder, config_of):
    write_images(folder, {'a': [(9, 9)] * 3, 'b': [(9, 9)] * 2})
    (folder / 'b').chmod(stat.S_IWUSR)
    with pytest.raises(SettingError, match=r'Permission denied.*/b'):
        list_images(config_of())


def test_a_folder_that_cannot_be_listed_is_named(folder, config_of, monkeypatch):
    write_images(folder, {'a': [(9, 9)] * 3, 'b': [(9, 9)] * 2})
    listed = os.scandir

    def scandir(path):
        if str(path).endswith('/b'):
            raise PermissionError(13, 'Permission denied', str(path))
        return listed(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(SettingError, match=r'Permission denied.*/b.*Make it readable'):
        list_images(config_of())


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda folder: folder.rmdir(), 'there is no such folder. Pass a folder of images'),
        (lambda folder: None, r'it holds no image \(.jpg, .*Pass a folder of images'),
        (lambda folder: (folder / 'x.svg').write_text(''), r'holds no image .*, only .svg 1'),
        (lambda folder: write_images(folder, {'a': [(9, 9)]}), 'of 1 item at most 0 can be held out'),
    ],
)
def test_a_folder_without_enough_images_is_refused(folder, config_of, make, words):
    make(folder)
    with pytest.raises(SettingError, match=words):
        setup_data_train_and_test(config_of(), CPU)


def test_an_unknown_colour_is_refused(folder, config_of):
    write_images(folder, {'a': [(9, 9)] * 3})
    with pytest.raises(SettingError, match="background='whitish' is not a colour"):
        list_images(config_of(background='whitish'))


def test_grey_images_have_one_channel_if_all_are_grey(folder, config_of):
    for i in range(3):
        Image.new('L', (9, 9), 50 * i).save(folder / f'{i}.png')
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(folder / 'deep.png')
    assert setup_data_train_and_test(config_of(), CPU)[0].spec.shape == (1, 8, 8)
    Image.new('RGB', (9, 9)).save(folder / 'colour.png')
    assert setup_data_train_and_test(config_of(), CPU)[0].spec.shape == (3, 8, 8)


def test_colour_is_looked_for_in_all_images_that_are_not_broken(folder, config_of, monkeypatch):
    monkeypatch.setattr(images, 'LOOKED_AT', 2)
    for i in range(3):
        Image.new('L', (9, 9), 50 * i).save(folder / f'{i}.png')
    Image.new('RGB', (9, 9)).save(folder / '4.png')
    (folder / '3.png').write_bytes(b'')
    files = [folder / f'{i}.png' for i in range(5)]
    assert [images.how_made(config_of(), files[:n])['channels'] for n in (4, 5)] == [1, 3]


# ---------------------------------------------------------------- unreadable files


def zero_bytes(path):
    path.write_bytes(b'')


def cut_off(path):
    Image.effect_noise((64, 64), 50).save(path.with_suffix('.jpg'))
    path.write_bytes(path.with_suffix('.jpg').read_bytes()[:900])
    path.with_suffix('.jpg').unlink()


def text(path):
    path.write_text('I am no image')


def gone(path):
    path.symlink_to('/nowhere/at/all.png')


@pytest.mark.parametrize('spoil', [zero_bytes, cut_off, text])
def test_unreadable_files_are_named_before_training_or_left_out(folder, config_of, capsys, spoil):
    write_images(folder, {'a': [(9, 9)] * 4, 'b': [(9, 9)] * 4})
    for name in ('a/bad1.png', 'b/bad2.jpeg'):
        spoil(folder / name)
    with pytest.raises(SettingError, match=r'2 of 10 cannot be read.*a/bad1\.png') as caught:
        setup_data_train_and_test(config_of(), CPU)
    assert 'b/bad2.jpeg' in str(caught.value) and '--skip_unreadable' in str(caught.value)
    assert not list(Path(config_of().data_dir, 'cache').glob('*.pt'))
    capsys.readouterr()
    train, _, test = setup_data_train_and_test(config_of(skip_unreadable=True), CPU)
    assert train.size + test.size == 8 and 'left out 2 that cannot be read' in train.spec.skipped
    assert 'left out 2 that cannot be read' in capsys.readouterr().out


def test_too_little_memory_is_not_called_a_broken_image():
    with pytest.raises(MemoryError), images.readable('x'):
        raise MemoryError


def test_a_link_to_nowhere_is_refused(folder, config_of):
    write_images(folder, {'a': [(9, 9)] * 4})
    gone(folder / 'a' / 'gone.png')
    with pytest.raises(SettingError, match=r'a/gone\.png.*cannot be read'):
        setup_data_train_and_test(config_of(), CPU)


def test_a_panorama_is_taken(folder, config_of):
    write_images(folder, {'': [(9, 9)] * 3 + [(20_000, 10)]})
    assert setup_data_train_and_test(config_of(), CPU)[0].size == 3


# ---------------------------------------------------------------- the cache


def decoded(monkeypatch) -> list[str]:
    """The names of the files that this process decodes from now on."""
    names: list[str] = []

    def counted(path, **made):
        names.append(path.name)
        return pixels_of(path, **made)

    monkeypatch.setattr(images, 'pixels_of', counted)
    return names


def test_files_are_decoded_once_and_again_when_the_folder_changes(folder, config_of, monkeypatch):
    write_images(folder, {'a': [(9, 9)] * 4, 'b': [(9, 9)] * 4})
    names = decoded(monkeypatch)
    seen = set()

    def load(**settings):
        names.clear()
        loader = setup_data_train_and_test(config_of(**settings), CPU)[0]
        seen.add(loader.fingerprint)
        return len(names)

    assert load() == 8 and load() == 0 and len(seen) == 1
    Image.new('RGB', (9, 9), (1, 2, 3)).save(folder / 'a' / '0.png')  # perhaps of the same size in bytes
    assert load() == 8 and load() == 0 and len(seen) == 2
    assert load(image_size=(4,)) == 8 and load() == 0 and len(seen) == 3
    assert load(fit='pad') == 8 and load(fit='pad') == 0 and len(seen) == 3  # square images: the same pixels
    os.utime(folder / 'a' / '1.png', (1, 1))
    assert load() == 8 and len(seen) == 3  # the same pixels: the same data
    (folder / 'a' / '2.png').rename(folder / 'b' / '22.png')
    assert load() == 8 and len(seen) == 4


def test_a_damaged_cache_is_made_again(folder, config_of, monkeypatch):
    write_images(folder, {'a': [(9, 9)] * 4})
    before = setup_data_train_and_test(config_of(), CPU)[0].everything()[0]
    (path,) = Path(config_of().data_dir, 'cache').glob('*.pt')
    path.write_bytes(path.read_bytes()[:100])
    names = decoded(monkeypatch)
    assert torch.equal(setup_data_train_and_test(config_of(), CPU)[0].everything()[0], before) and len(names) >= 4


def test_the_cache_holds_what_the_files_hold(folder, config_of):
    write_images(folder, {'a': [(40, 30), (8, 8), (9, 31)] * 2, 'b': [(100, 17), (16, 16)] * 3})
    cached = setup_data_train_and_test(config_of(global_batch_size=4, batch_shards=1), CPU)
    direct = setup_data_train_and_test(config_of(global_batch_size=4, batch_shards=1, cache=False), CPU)
    for ours, theirs in ((cached[0], direct[0]), (cached[2], direct[2])):
        for a, b in zip(ours.take(range(ours.size)), theirs.take(range(ours.size)), strict=True):
            assert torch.equal(a, b)
    for _, a, b in zip(range(5), cached[0], direct[0], strict=False):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_many_files_are_decoded_by_several_processes(folder, config_of, monkeypatch):
    write_images(folder, {'a': [(9, 9)] * 150, 'b': [(9, 9)] * 150})
    names = decoded(monkeypatch)
    loader = setup_data_train_and_test(config_of(), CPU)[0]
    assert len(names) < 10  # in this process
    x, label = loader.everything()
    assert torch.equal((x[:, 0] * 255).round(), (100.0 * label)[:, None, None].expand(len(x), 8, 8))


def test_without_room_for_the_cache_the_files_are_read(folder, config_of, monkeypatch, capsys):
    write_images(folder, {'a': [(9, 9)] * 4})
    monkeypatch.setattr(packed, 'space_for', lambda path: 100)
    loader = setup_data_train_and_test(config_of(), CPU)[0]
    assert loader.resident is None and loader.take([0])[0].shape == (1, 3, 8, 8)
    assert 'no room for a cache' in capsys.readouterr().out


def test_two_runs_at_once_build_one_cache(folder, config_of, tmp_path):
    write_images(folder, {'a': [(300, 300)] * 100, 'b': [(300, 300)] * 100})
    code = (
        'import sys, torch; from config import Config; from data_utils import setup_data_train_and_test as setup\n'
        f'c = Config(dataset="image_folder", data_path={str(folder)!r}, image_size=(8,), data_dir={str(tmp_path)!r})\n'
        'print(setup(c, torch.device("cpu"))[0].fingerprint)'
    )
    both = [subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in '12']
    out = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and out[0].split('\n')[-2] == out[1].split('\n')[-2]
    assert len(list((tmp_path / 'cache').glob('*.pt'))) == 1 and not list((tmp_path / 'cache').glob('.*.tmp'))


def test_images_that_are_added_leave_the_held_out_ones_there(folder, config_of):
    write_images(folder, {'a': [(9, 9)] * 60})
    before = list_images(config_of()).files
    write_images(folder, {'b': [(9, 9)] * 6})
    after = list_images(config_of()).files
    assert len(set(before[:6]) & set(after[:6])) >= 4
    assert [name for name in after if name in set(before)] == before


@pytest.mark.parametrize('held_out', [0, 1, 7])
def test_the_number_of_held_out_images_is_a_setting(folder, config_of, held_out):
    write_images(folder, {'a': [(9, 9)] * 30})
    train, _, test = setup_data_train_and_test(config_of(held_out=held_out), CPU)
    assert (train.size, test.size) == (30 - (held_out or 3), held_out or 3)
    with pytest.raises(SettingError, match='held_out=30: of 30 items at most 29 can be held out'):
        setup_data_train_and_test(config_of(held_out=30), CPU)


# ---------------------------------------------------------------- real pictures


@pytest.mark.skipif(not STAMPS.is_dir(), reason="Debian's tuxpaint-stamps-default is not installed")
def test_real_pictures_of_odd_sizes_with_transparency(config_of, capsys):
    config = config_of(data_path=str(STAMPS), image_size=(32,))
    train, _, test = setup_data_train_and_test(config, CPU)
    assert train.size + test.size > 700 and 'animals' in train.spec.classes and train.spec.shape == (3, 32, 32)
    assert '.svg' in capsys.readouterr().out
    x, _ = train.everything()
    black = (x.flatten(1).max(1).values < 0.05).sum()  # 44 if transparency is dropped: pictures of black lines
    assert black <= 3 and x[:, :, 0, 0].mean() > 0.8  # letters i and l are black in the middle; corners are empty


def test_images_with_one_channel_are_grey(tmp_path):
    for mode, grey in dict.fromkeys(['1', 'L', 'LA', 'I;16'], True).items() | {('RGB', False), ('RGBA', False)}:
        Image.new(mode, (4, 4)).save(tmp_path / f'{mode[:4].replace(";", "")}.png')
        found = images.head(tmp_path / f'{mode[:4].replace(";", "")}.png')
        assert found and found.is_grey == grey, mode


def test_another_background_is_decoded_again(folder, config_of):
    for i in range(20):
        Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(folder / f'{i}.png')
    for colour, value in (('white', 1), ('black', 0)):
        assert setup_data_train_and_test(config_of(background=colour), CPU)[0].everything()[0].mean() == value


def test_held_out_images_are_of_all_folders(folder, config_of):
    write_images(folder, {'a': [(9, 9)] * 30, 'b': [(9, 9)] * 30})
    assert setup_data_train_and_test(config_of(), CPU)[2].labels.unique().tolist() == [0, 1]


def test_with_skip_and_without_it_are_two_caches(folder, config_of):
    write_images(folder, {'a': [(9, 9)] * 10, 'b': [(9, 9)] * 10})
    (folder / 'a/0.png').write_bytes(b'no image')
    train, _, test = setup_data_train_and_test(config_of(skip_unreadable=True), CPU)
    assert train.size + test.size == 19
    with pytest.raises(SettingError, match='cannot be read'):
        setup_data_train_and_test(config_of(), CPU)


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture
def no_network(monkeypatch):
    """No test contacts the hub."""

    def refuse(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # the hub's client retries with growing delays
    datasets.disable_progress_bars()


def write_splits(folder: Path, splits: dict[str, int], mode='RGB', **columns) -> None:
    """A parquet file for each split, with images of one colour, whose first channel is 50 times their class."""
    features = datasets.Features(
        {'picture': datasets.Image(), 'kind': datasets.ClassLabel(names=['cat', 'dog', 'owl'])}
        | {name: kind for name, (kind, _) in columns.items()}
    )
    for split, n in splits.items():
        label = [i % 3 for i in range(n)]
        pictures = [Image.new(mode, (12, 9), 50 * k if mode == 'L' else (50 * k, i, 7)) for i, k in enumerate(label)]
        more = {name: list(map(value, range(n))) for name, (_, value) in columns.items()}
        rows = dict(picture=pictures, kind=label) | more
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f'{split}-00000-of-00001.parquet'))


@pytest.fixture
def load(no_network, tiny_config, tmp_path):
    def make(path=None, **settings):
        path = str(path or tmp_path / 'hub')
        default = dict(dataset='hub', data_path=path, image_size=(8,), num_workers=0)
        return setup_data_train_and_test(tiny_config(**(default | settings)), CPU)

    (tmp_path / 'hub').mkdir()
    return make


@pytest.mark.parametrize('cache', [True, False])
@pytest.mark.parametrize('split', ['test', 'validation'])
def test_images_classes_and_the_held_out_split(load, tmp_path, capsys, cache, split):
    write_splits(tmp_path / 'hub', {'train': 20, split: 7})
    train, _, test = load(cache=cache)
    assert (train.size, test.size) == (20, 7) and train.spec.classes == ('cat', 'dog', 'owl')
    for loader in (train, test):
        x, label = loader.take(range(loader.size))
        assert x.shape[1:] == (3, 8, 8) and label.tolist() == [i % 3 for i in range(loader.size)]
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), 50 * label)
        assert (x[:, 1, 0, 0] * 255).round().tolist() == list(range(loader.size))
    assert not cache or 'cat 10, dog 9, owl 8' in capsys.readouterr().out


def test_without_a_held_out_split_a_shuffled_tenth_is(load, tmp_path):
    write_splits(tmp_path / 'hub', {'train': 40}, mode='L')
    train, _, test = load()
    assert (train.size, test.size, train.spec.shape) == (36, 4, (1, 8, 8))
    assert torch.cat([train.everything()[1], test.everything()[1]]).bincount().tolist() == [14, 13, 13]
    assert load(seed=5)[0].fingerprint == train.fingerprint
    assert load(held_out=9)[2].size == 9
    assert not torch.equal(load(held_out=30)[2].everything()[1], torch.arange(30) % 3)


def test_columns_are_found_or_named(load, tmp_path):
    more = dict(
        other=(datasets.Image(), lambda i: Image.new('RGB', (9, 9), (200, 0, 0))),
        age=(datasets.Value('int32'), lambda i: i % 5),
        name=(datasets.Value('string'), str),
    )
    write_splits(tmp_path / 'hub', {'train': 20}, **more)
    with pytest.raises(SettingError, match=r"which column holds the images; image columns: \['picture', 'other'\]"):
        load()
    assert load(columns=('picture',))[0].spec.num_classes == 3
    train, *_ = load(columns=('other', 'age'))
    x, _ = train.everything()
    assert train.spec.num_classes == 5 and (x[:, 0] * 255).round().unique().tolist() == [200]
    assert load(columns=('picture', 'name'))[0].spec.classes == tuple(sorted(map(str, range(20))))
    for columns, words in (
        (('age',), "column 'age' does not hold images"),
        (('picture', 'gone'), "'gone' does not hold classes.*columns: picture, kind, other, age, name"),
    ):
        with pytest.raises(SettingError, match=words):
            load(columns=columns)


def test_two_columns_of_classes_are_refused(load, tmp_path):
    write_splits(tmp_path / 'hub', {'train': 20}, fine=(datasets.ClassLabel(names=['a', 'b']), lambda i: i % 2))
    with pytest.raises(SettingError, match=r"cannot tell which of \['kind', 'fine'\] holds .*Pass --columns"):
        load()
    by_kind, by_fine = (load(columns=('picture', name))[0] for name in ('kind', 'fine'))  # two caches
    assert by_kind.spec.classes == ('cat', 'dog', 'owl') and by_fine.spec.classes == ('a', 'b')


def test_train_is_trained_on_wherever_it_is_listed(load, tmp_path):
    write_splits(tmp_path / 'hub', {'extra': 5, 'train': 20, 'test': 7})
    lines = [f'  - split: {name}\n    path: {name}-*' for name in ('extra', 'test', 'train')]
    head = '\n'.join(['---', 'configs:', '- config_name: default', '  data_files:', *lines, '---'])
    (tmp_path / 'hub/README.md').write_text(f'{head}\n')
    train, _, test = load()
    assert (train.size, test.size) == (20, 7)


def test_a_tenth_of_a_single_split_is_held_out_whatever_its_name(load, tmp_path):
    write_splits(tmp_path / 'hub', {'test': 40})
    train, _, test = load()
    assert (train.size, test.size) == (36, 4)


def test_a_row_without_an_image_is_one_that_cannot_be_read_and_later_ones_may_have_colours(load, tmp_path):
    features = datasets.Features({'picture': datasets.Image()})
    pictures = [Image.new('L' if i < 9 else 'RGB', (9, 9)) for i in range(12)]
    rows = dict(picture=[None if i == 3 else picture for i, picture in enumerate(pictures)])
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / 'hub/train.parquet'))
    with pytest.raises(SettingError, match=r"1 of 12 cannot be read\. row 3, column 'picture' cannot be read"):
        load()
    assert load(skip_unreadable=True)[0].spec.shape == (3, 8, 8)


def test_a_row_that_is_not_an_image_is_named_or_left_out(load, tmp_path):
    features = datasets.Features({'picture': datasets.Image(decode=False)})
    rows = [dict(bytes=b'text' if i == 3 else png(i), path=None) for i in range(12)]
    table = datasets.Dataset.from_dict(dict(picture=rows), features=features).cast_column('picture', datasets.Image())
    table.to_parquet(str(tmp_path / 'hub/train.parquet'))
    with pytest.raises(SettingError, match=r"1 of 12 cannot be read\. row \d+, column 'picture' cannot be read"):
        load()
    train, _, test = load(skip_unreadable=True)
    assert train.size + test.size == 11 and train.spec.num_classes == 0


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((9, 9), 10 * i, np.uint8)).save(file, 'png')
    return file.getvalue()


@pytest.mark.parametrize(
    ('path', 'words'),
    [
        ('nobody/nothing', r"data_path='nobody/nothing' cannot be loaded .*the network connection"),
        ('', 'needs the name of a data set, or a folder'),
        ('empty', 'cannot be loaded'),
    ],
)
def test_a_missing_data_set_is_one_clear_line(no_network, tiny_config, tmp_path, path, words):
    if path == 'empty':
        path = str(tmp_path / 'empty')
        Path(path).mkdir()
    with pytest.raises(SettingError, match=words) as caught:
        setup_data_train_and_test(tiny_config(dataset='hub', data_path=path, image_size=(8,)), CPU)
    assert '\n' not in str(caught.value)


def test_the_package_is_optional(load, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
    with pytest.raises(SettingError, match='pip install datasets'):
        load()


def test_a_held_out_split_is_never_trained_on(load, tmp_path):
    write_splits(tmp_path / 'hub', {'train': 20, 'test': 9})
    train, _, test = load(held_out=4)
    assert (train.size, test.size) == (20, 4)
    with pytest.raises(SettingError, match='has 9 held-out images'):
        load(held_out=10)


def test_where_there_are_both_the_validation_split_is_held_out(load, tmp_path):
    write_splits(tmp_path / 'hub', {'train': 20, 'validation': 5, 'test': 9})
    assert load()[2].size == 5


def test_the_hub_obeys_fit_and_prints_the_share_that_is_cut(load, tmp_path, capsys):
    write_splits(tmp_path / 'hub', {'train': 20})  # 12 x 9
    cropped = load()[0].everything()[0]
    assert 'hub: cropping cuts 25% of the pixels on average, 25% at most; --fit pad' in capsys.readouterr().out
    padded = load(fit='pad')[0].everything()[0]
    assert (padded[:, :, 0] == 1).all() and not (cropped[:, :, 0] == 1).all()


def test_height_comes_before_width_and_other_sizes_are_decoded_again(load, tmp_path):
    write_splits(tmp_path / 'hub', {'train': 20})
    assert load(image_size=(8, 6))[0].spec.shape == (3, 8, 6)
    assert load(image_size=(4,))[0].spec.shape == (3, 4, 4)


def test_other_files_are_decoded_again(load, tmp_path):
    write_splits(tmp_path / 'hub', {'train': 20})
    first = load()[0]
    write_splits(tmp_path / 'hub', {'train': 20}, mode='L')
    assert load()[0].spec.shape == (1, 8, 8) and first.spec.shape == (3, 8, 8)
