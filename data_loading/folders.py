"""The images of a folder: which files, which classes, which part is held out. images.py decodes them."""

import csv
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from runtime.errors import SettingError
from runtime.ranks import print_once

IMAGE_ENDINGS = ('.jpg', '.jpeg', '.jfif', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm')
IMAGE_ENDINGS += ('.avif',) if '.avif' in Image.registered_extensions() else ()
TO_CONVERT = ('.heic', '.heif', '.avif', '.svg', '.jxl', '.dng', '.psd')  # images that Pillow does not read
LISTS = ('labels.csv', 'dataset.json', 'generate.json')  # of classes, and of generate.py
ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.bz2', '.xz', '.7z', '.rar')
SYSTEM = set('@eadir @tmp __macosx #recycle #snapshot $recycle.bin lost+found'.split()) | {'system volume information'}
TRAIN, HELD_OUT = ('train', 'training'), ('val', 'valid', 'validation', 'test', 'testing')  # the first is held out

Class = tuple[int, int, str]  # classes are sorted by these: numbers as numbers, before other names
Classes = dict[str, Class]  # by file; empty: no classes
Groups = dict[str, list[str]]  # files by folder; '': those that lie in the folder itself


@dataclass(frozen=True)
class Found:
    """The images of a folder, the held-out part first: of n of them, any first ones are of all classes."""

    files: list[str]  # paths below the folder
    labels: list[int]
    classes: tuple[str, ...]
    held_out: int  # images of a held-out part of its own; 0: there is none
    skipped: str  # what is left unused, for the report


def find(root: Path, where: str) -> Found:
    """All images below `root`. What is skipped is printed. Raises SettingError, which begins with `where`."""
    check_is_folder(root, where)
    files, notes = walk(root, where)
    base, groups, listed = settled(root, files, where)
    held_out: list[str] = []
    if listed is None and (parts := split(root, base, groups, where)):
        files, held_out, classes, line = parts
        notes.insert(0, line)
        groups = {}
    else:
        classes = classes_of(root, files, where)
        if base and classes and listed is None:
            notes.insert(0, f'classes are the folders in {printable(base)}/')
    kinds = sorted({classes[file] for file in files} if classes else ())
    number = {kind: i for i, kind in enumerate(kinds)}
    names = tuple(printable(name) for *_, name in kinds)
    warn_of_classes(names, {} if listed is not None or not names else groups, root / base)
    files = in_order(held_out, classes) + in_order(files, classes)
    labels = [number[classes[file]] if classes else 0 for file in files]
    for note in notes:
        print_once(f'image_folder: {note}')
    return Found(files, labels, names, len(held_out), '; '.join(notes))


def split(root: Path, base: str, groups: Groups, where: str) -> tuple[list[str], list[str], Classes, str] | None:
    """(training files, held-out files, their classes, a line on it) if the folders `groups` are train/ and val/, test/
    and so on; else None. No files are held out if the classes of those folders are not known. Raises SettingError."""
    parts = {name.lower(): name for name in groups}
    own = [parts[name] for name in HELD_OUT if name in parts]
    train = next((parts[name] for name in TRAIN if name in parts), None)
    if own and len(own) == len(groups) > 1:
        names, path = ', '.join(f'{name}/' for name in own), printable(str(root / base / own[0]))
        raise SettingError(f'{where}: it holds {names} and no train/. Pass the part to train on: --data_path {path}.')
    if not own or not train:
        return None
    classes, held_out, held = classes_of(root, groups[train], where), [], 'a part of it'
    known = set(classes.values())
    for name in own:
        theirs = classes_of(root, groups[name], where)
        held_out = [file for file in groups[name] if not classes or theirs.get(file) in known]
        if held_out:
            held = name
            classes = classes and classes | {file: theirs[file] for file in held_out}
            break
    line = f'{train}/ is trained on, {held}{"/" if held_out else ""} is held out'
    if held_out and len(held_out) < len(groups[held]):
        line += f' ({len(groups[held]) - len(held_out)} images of classes that {train}/ lacks are left unused)'
    unused = sorted(f'{name}/' if name else f'{len(groups[""])} images' for name in groups if name not in (train, held))
    if unused:
        why = '' if held_out else f', as their classes are not known to {train}/'
        line += f'; {", ".join(unused)} {"is" if len(unused) == 1 else "are"} left unused{why}'
    return groups[train], held_out, classes, printable(line)


def check_is_folder(root: Path, where: str) -> None:
    """Raises SettingError, which says what to do, if `root` is not a folder."""
    ending = root.suffix.lower()
    if root.is_file() and ending in ARCHIVES:
        raise SettingError(f'{where}: a {ending[1:]}: unpack it, and pass the folder as --data_path.')
    if root.is_file() and ending in IMAGE_ENDINGS + TO_CONVERT:
        raise SettingError(f'{where}: a single image. Pass a folder of images, such as --data_path {root.parent}.')
    if root.is_file():
        raise SettingError(f'{where}: a file. Pass a folder of images; --dataset arrays reads .npy, .npz and .pt.')
    if not root.is_dir():
        remedy = 'Pass a folder of images, or of one folder for each class, as --data_path.'
        raise SettingError(f'{where}: there is no such folder. {remedy}')


def printable(name: str) -> str:
    """`name` with the bytes that are not UTF-8 as text."""
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


# ---------------------------------------------------------------- files


def walk(root: Path, where: str) -> tuple[list[str], list[str]]:
    """(paths below root of all images, lines on what was skipped). Raises SettingError if there are none."""
    files: list[str] = []
    again: list[str] = []
    others, system, drawn = Counter[str](), Counter[str](), Counter[str]()
    seen: set[tuple[int, int]] = set()  # folders that were entered: ends a circle of links

    def refuse(error: OSError) -> None:
        raise SettingError(f'{where}: {printable(str(error))}. Make it readable, or move it elsewhere.') from None

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            again.append(os.path.relpath(folder, root))
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = {name for name in below if name.startswith('.') or name.lower() in SYSTEM}
        system.update(hidden)
        below[:] = sorted(set(below) - hidden, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for name in (name for name in names if not name.startswith('.')):
            if name in LISTS:
                continue
            if not name.lower().endswith(IMAGE_ENDINGS):
                others[Path(name).suffix or name] += 1
            elif 'generate.json' in names:  # of generate.py, whose samples lie in folders below
                drawn[name] += 1
            else:
                files.append(os.path.relpath(os.path.join(folder, name), root))
    convert = Counter({ending: others.pop(ending) for ending in list(others) if ending.lower() in TO_CONVERT})
    if not files:
        raise SettingError(f'{where}: {nothing(others, convert)}')
    lines = [
        others and f'skipped {others.total()} files that are not images: {listing(others)}',
        convert and f'skipped {convert.total()} images that cannot be read: convert them ({listing(convert)})',
        system and f'skipped thumbnails, hidden and system folders: {listing(system)}',
        drawn and f'skipped pictures next to generate.json: {", ".join(sorted(drawn))}',
        again and f'skipped folders that are read under another name: {", ".join(again[:8])}',
    ]
    return files, [printable(line) for line in lines if line]


def nothing(others: Counter[str], convert: Counter[str]) -> str:
    """The error for a folder without readable images: `others` and `convert` count its files by ending."""
    only = f', only {listing(others + convert)}' if others or convert else ''
    remedy = 'Pass a folder of images, or of one folder for each class, as --data_path.'
    remedy = 'Convert them to PNG or JPEG.' if convert else remedy
    remedy = 'Unpack the archive.' if any(ending.lower() in ARCHIVES for ending in others) else remedy
    return f'it holds no image ({", ".join(IMAGE_ENDINGS)}){only}. {remedy}'


def listing(counts: Counter[str]) -> str:
    """'.txt 3, .svg 2'."""
    more = [f'and {len(counts) - 8} more kinds'] if len(counts) > 8 else []
    return ', '.join([f'{name} {count}' for name, count in counts.most_common(8)] + more)


def in_order(files: Iterable[str], classes: Classes) -> list[str]:
    """The files in an order whose first n, for any n, hold each class as often as the whole does, rounded.

    Within a class the order is by the hash of the name, so it is the same in every run, for every seed, and mostly also
    when images are added. One image of each class comes at the end.
    """
    files = sorted(files, key=lambda name: blake2b(os.fsencode(name)).digest())
    size, before = Counter(map(classes.get, files)), Counter[Class | None]()
    place = {}
    for file in files:
        kind = classes.get(file)
        place[file] = (before[kind] + 0.5) / size[kind] if before[kind] < size[kind] - 1 else 1
        before[kind] += 1
    return sorted(files, key=place.__getitem__)


# ---------------------------------------------------------------- classes


def settled(root: Path, files: list[str], where: str) -> tuple[str, Groups, Classes | None]:
    """(base, files by folder below it, `listed` classes): base is the first folder on the path, below root, that holds
    images, several folders or a list of classes."""
    base, above = '', ''
    while True:
        groups = defaultdict(list)
        for file in files:
            first, _, rest = file[len(above) :].partition(os.sep)
            groups[first if rest else ''].append(file)
        classes = listed(root, base, files, where)
        if classes is not None or '' in groups or len(groups) > 1:
            return base, groups, classes
        base = os.path.join(base, *groups)
        above = f'{base}{os.sep}'


def classes_of(root: Path, files: list[str], where: str) -> Classes:
    """The class of each of these files: as a list in their folder says, or else the first folder below those that all
    share. Empty without classes. Raises SettingError."""
    base, groups, classes = settled(root, files, where)
    if classes is None and '' in groups and len(groups) > 1:
        folders = sorted(map(printable, filter(None, groups)))
        raise SettingError(
            f'{where}: {len(groups[""])} images lie in {printable(base) or "it"} next to folders '
            f'({", ".join(folders[:3])}), so that their class is not known. Move them into a folder, or pass a folder '
            f'that holds only images, such as --data_path {printable(str(root / base / folders[0]))}.'
        )
    if classes is None:
        return {file: key(name) for name, group in groups.items() for file in group} if len(groups) > 1 else {}
    known = {file: classes[file] for file in files if file in classes}
    if known and len(known) < len(files):
        without = next(file for file in files if file not in known)
        text = f'{len(files) - len(known)} of {len(files)} images are not in its list of classes ({printable(without)})'
        raise SettingError(f'{where}: {text}. Add them, or remove dataset.json and labels.csv to train without it.')
    return known


def key(name: str) -> Class:
    """The sort key of a class: numbers by value, before other names."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def listed(root: Path, base: str, files: list[str], where: str) -> Classes | None:
    """The classes in dataset.json (of EDM's dataset_tool) or labels.csv (file,class,name), if the folder `base` has
    such a list; empty if its folders are only parts of a large set; else None. Raises SettingError."""
    path = root / base / 'dataset.json'
    try:
        found = json.loads(path.read_text('utf-8')) if path.is_file() else None
        if isinstance(found, dict) and 'labels' in found:
            pairs = found['labels'] or []
            return {os.path.join(base, file): key(str(kind)) for file, kind in pairs if isinstance(kind, int)}
        path, drawn = root / base / 'labels.csv', (root / base / 'generate.json').is_file()
        rows = list(csv.reader(path.read_text('utf-8-sig').splitlines())) if path.is_file() else []
        if rows and not drawn and rows[0][:2] != ['file', 'class']:
            raise ValueError(f'it begins with {",".join(rows[0])}, not with file,class')
        if rows:
            rows = [[*row, ''] for row in rows if len(row) > 1 and row[0] != 'file' and row[1] not in ('', '-1')]
            return {os.path.join(base, file): (*key(kind)[:2], name or kind) for file, kind, name, *_ in rows}
    except (ValueError, TypeError, OSError) as error:
        raise SettingError(f'{where}: {path.name} cannot be read ({error}). Fix or remove it.') from None
    return {} if drawn else None


def warn_of_classes(names: tuple[str, ...], groups: Groups, base: Path) -> None:
    """Print a warning where classes look like one that is called by two names, or like something else."""
    alike = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize('NFC', name).casefold().strip()].append(name)
    twice = [' and '.join(group) for group in alike.values() if len(group) > 1]
    parts = [name for name in names if name.lower() in TRAIN + HELD_OUT]
    below = [{file.split(os.sep)[-2] for file in files} for files in groups.values()]
    shared = sorted(below[0]) if below and len(below[0]) > 1 and all(below[0] == other for other in below) else []
    shards = bool(names) and all(name.isdecimal() and len(name) == len(names[0]) > 4 for name in names)
    warnings = [
        twice and f'{", ".join(twice[:3])} are two classes. Merge their folders if they are one',
        parts and f'{parts[0]}/ is taken as a class. If it is a part of the data, pass --data_path {base / parts[0]}',
        shared
        and f'the classes are {", ".join(names[:2])} ..., and each holds the folders {", ".join(shared[:3])}. If these '
        f'are the classes, pass one of those, as --data_path {base / names[0]}',
        shards and f'folders {names[0]}, {names[1]} ... are taken as classes. If they are not, add --label_dropout 1',
    ]
    for warning in filter(None, warnings):
        print_once(f'warning: image_folder: {printable(warning)}.')
