"""Finds the images of a folder, their classes, and the part that is held out. images.py decodes them."""

import csv
import json
import os
import unicodedata
from collections import Counter, defaultdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from data_loading.labels import HELD_OUT, TRAIN, held_out_first
from data_loading.spec import counted
from data_loading.stores import ENDINGS
from runtime.errors import SettingError
from runtime.ranks import print_once

IMAGE_ENDINGS = ('.jpg', '.jpeg', '.jfif', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm')
IMAGE_ENDINGS += ('.avif',) if '.avif' in Image.registered_extensions() else ()
TO_CONVERT = ('.heic', '.heif', '.avif', '.svg', '.jxl', '.dng', '.psd')  # images that Pillow does not read
LISTS = ('labels.csv', 'dataset.json', 'generate.json')  # lists of classes, and the settings of generate.py
ARRAYS, ARCHIVES = {*ENDINGS}, {'.zip', '.tar', '.gz', '.tgz', '.bz2', '.xz', '.7z', '.rar'}
NO_ENDING = 'no ending'
SYSTEM = set('@eadir @tmp __macosx #recycle #snapshot $recycle.bin lost+found'.split()) | {'system volume information'}
OTHERS, CONVERT = 'files that are not images', 'images that must be converted first'  # kinds of skipped files

Class = tuple[int, int, str]  # sort key of a class: numbers by value, before other names
Classes = dict[str, Class]  # file -> class; empty: no classes
Groups = dict[str, list[str]]  # folder -> files; '': files in the folder itself


def find(root: Path, where: str) -> tuple[list[str], list[int], int, dict[str, Any]]:
    """(paths of all images below `root`, the held-out part first, each part in the order of `in_order`; their labels;
    number of images in the folder's own held-out part; facts). Prints what is skipped. Raises SettingError, which
    begins with `where`."""
    check_is_folder(root, where)
    files, notes = walk(root, where)
    base, groups, listed = class_folders(root, files, where)
    held_out: list[str] = []
    if listed is None and (parts := split(root, base, groups, where)):
        files, held_out, classes, line = parts
        notes.insert(0, line)
        groups = {}
    else:
        classes = classes_by_folder(root, files, where)
        if base and classes and listed is None:
            notes.insert(0, f'classes are the folders in {base}/')
    kinds = sorted(set(classes.values()))
    names = tuple(printable(name) for *_, name in kinds)
    if listed is None and not names:
        notes.append('no classes: they are read from folders, one for each class, or from labels.csv (file,class)')
    elif not names and (root / base / 'dataset.json').is_file():
        notes.append('no classes: dataset.json has no labels that are whole numbers')
    warn_of_classes(names, groups if listed is None else {}, root / base)
    number = {kind: i for i, kind in enumerate(kinds)}
    labels = {file: number[classes[file]] if classes else 0 for file in [*held_out, *files]}
    files = in_order(held_out, labels) + in_order(files, labels)
    notes = [printable(note) for note in notes]
    for note in notes:
        print_once(f'image_folder: {note}')
    facts = dict(classes=names, num_classes=len(names), skipped='; '.join(notes))
    return files, [labels[file] for file in files], len(held_out), facts


def in_order(files: list[str], labels: dict[str, int]) -> list[str]:
    """The files in an order whose first n, for any n, hold each class as often as all files do, rounded.

    Within a class the order is by the hash of the name, so it is the same in every run, for every seed, and mostly also
    when images are added.
    """
    files = sorted(files, key=lambda name: blake2b(os.fsencode(name)).digest())
    return [files[i] for i in held_out_first([labels[file] for file in files])]


def split(root: Path, base: str, groups: Groups, where: str) -> tuple[list[str], list[str], Classes, str] | None:
    """(training files, held-out files, their classes, a line to print) if the folders `groups` are train/ and val/,
    test/ and so on; else None. No files are held out if none has a class of train/. Raises SettingError."""
    parts = {name.lower(): name for name in groups}
    train = next((parts[name] for name in TRAIN if name in parts), None)
    own = [parts[name] for name in HELD_OUT if name in parts]
    if own and len(own) == len(groups) > 1:
        names, path = ', '.join(f'{name}/' for name in own), printable(str(root / base / own[0]))
        raise SettingError(f'{where}: it holds {names} but no train/. Pass the part to train on: --data_path {path}.')
    if not own or not train:
        return None
    classes, held_out, held = classes_by_folder(root, groups[train], where), [], ''
    known = set(classes.values())
    for name in own:
        theirs = classes_by_folder(root, groups[name], where)
        held_out = [file for file in groups[name] if not classes or theirs.get(file) in known]
        if held_out:
            held = name
            classes = classes and classes | {file: theirs[file] for file in held_out}
            break
    notes = [f'{train}/ is the training part, {f"{held}/" if held else "a part of it"} is held out']
    missing = known - {classes[file] for file in held_out if classes}
    if held and missing:
        notes.append(f'{held}/ has no {some_names([name for *_, name in sorted(missing)])}')
    unused = sorted(f'{name}/' if name else counted(len(groups['']), 'image') for name in groups.keys() - {train, held})
    lacking = len(groups[held]) - len(held_out) if held else 0
    unused += [f'{counted(lacking, "image")} of classes that {train}/ lacks'] if lacking else []
    if unused:
        why = '' if held else f' ({train}/ does not have their classes)'
        notes.append(f'left unused: {", ".join(unused)}{why}')
    return groups[train], held_out, classes, '; '.join(notes)


def check_is_folder(root: Path, where: str) -> None:
    """Raise SettingError with a remedy if `root` is not a folder."""
    ending = root.suffix.lower()
    if root.is_dir():
        return
    if not root.exists():
        why = 'there is no such folder. Pass a folder of images, or with one folder for each class, as --data_path'
    elif ending in ARCHIVES:
        why = f'this is a {ending[1:]} archive: unpack it, and pass the folder as --data_path'
    elif ending in IMAGE_ENDINGS + TO_CONVERT:
        why = f'this is a single image. Pass a folder of images, such as --data_path {root.parent}'
    else:
        why = f'this is a file. Pass a folder of images; --dataset arrays reads {", ".join(ENDINGS)}'
    raise SettingError(f'{where}: {why}.')


def printable(name: str) -> str:
    """`name` with bytes that are not UTF-8 escaped."""
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def some_names(names: list[str]) -> str:
    """'cat, dog, owl', cut off after eight names."""
    return ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '')


# ---------------------------------------------------------------- files


def walk(root: Path, where: str) -> tuple[list[str], list[str]]:
    """(paths of all images below root, messages about skipped files). Raises SettingError if there are no images."""
    files: list[str] = []
    skipped: dict[str, Counter[str]] = defaultdict(Counter)  # kind -> ending or name -> how many
    seen: set[tuple[int, int]] = set()  # folders already entered: ends a circle of links

    def refuse(error: OSError) -> None:
        raise SettingError(f'{where}: {printable(str(error))}. Make it readable, or move it elsewhere.') from None

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            skipped['folders that are read under another name'][os.path.relpath(folder, root)] += 1
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = {name for name in below if name.startswith('.') or name.lower() in SYSTEM}
        skipped['thumbnails, hidden and system folders'].update(hidden)
        below[:] = sorted(set(below) - hidden, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith('.') or name in LISTS:
                continue
            if ending not in IMAGE_ENDINGS:
                skipped[CONVERT if ending in TO_CONVERT else OTHERS][ending or name] += 1
            elif 'generate.json' in names:  # generate.py puts samples into folders below, and only overviews here
                skipped['pictures next to generate.json'][name] += 1
            else:
                files.append(os.path.relpath(os.path.join(folder, name), root))
    others = skipped[OTHERS]
    if len(bare := [name for name in others if name[0] != '.']) > 3:
        others[NO_ENDING] = sum(others.pop(name) for name in bare)
    if not files:
        present = skipped[OTHERS] + skipped[CONVERT]
        remedy = 'Pass a folder of images, or with one folder for each class, as --data_path.'
        remedy = 'Convert them to PNG or JPEG.' if skipped[CONVERT] else remedy
        remedy = '--dataset arrays reads one such file; np.stack joins several.' if present.keys() & ARRAYS else remedy
        remedy = 'Give the files an ending, such as .png.' if present[NO_ENDING] else remedy
        remedy = 'Unpack the archive.' if present.keys() & ARCHIVES else remedy
        only = f', only {listing(present)}' if present else ''
        raise SettingError(f'{where}: it holds no image ({", ".join(IMAGE_ENDINGS)}){only}. {remedy}')
    return files, [f'skipped {kind}: {listing(counts)}' for kind, counts in skipped.items() if counts]


def listing(counts: Counter[str]) -> str:
    """'.txt 3, .svg 2'."""
    return some_names([f'{name} {count}' for name, count in counts.most_common()])


# ---------------------------------------------------------------- classes


def class_folders(root: Path, files: list[str], where: str) -> tuple[str, Groups, Classes | None]:
    """(base, files by folder below it, `listed` classes): base is root, or the first folder below it that holds images,
    several folders or a list of classes, where each above holds only one folder."""
    base, above = '', ''
    while True:
        groups = defaultdict(list)
        for file in files:
            first, _, rest = file[len(above) :].partition(os.sep)
            groups[first if rest else ''].append(file)
        classes = listed(root, base, where)
        if classes is not None or '' in groups or len(groups) > 1:
            return base, groups, classes
        base = os.path.join(base, *groups)
        above = f'{base}{os.sep}'


def classes_by_folder(root: Path, files: list[str], where: str) -> Classes:
    """The class of each file: from a list in their folder, or else the first folder below their common ones. Empty
    without classes. Raises SettingError."""
    base, groups, classes = class_folders(root, files, where)
    if classes is None and '' in groups and len(groups) > 1:
        folders, images = sorted(filter(None, groups)), counted(len(groups['']), 'image')
        text = f'{images}{base and f" in {base}"} next to folders ({", ".join(folders[:3])}) without a class. Move '
        text += f'them into a folder, or pass one that holds only images, as --data_path {root / base / folders[0]}.'
        raise SettingError(f'{where}: {printable(text)}')
    if classes is None:
        return {file: key(name) for name, group in groups.items() for file in group} if len(groups) > 1 else {}
    known = {file: classes[file] for file in files if file in classes}
    if classes and len(known) < len(files):
        without = next(printable(file) for file in files if file not in known)
        text = f'{len(files) - len(known)} of {len(files)} images are not in its list of classes ({without})'
        text += '' if known else f'; the list has {printable(next(iter(classes)))}'
        raise SettingError(f'{where}: {text}. Add them, or remove dataset.json and labels.csv to train without it.')
    return known


def key(name: str) -> Class:
    """The sort key of a class: numbers by value, before other names."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def listed(root: Path, base: str, where: str) -> Classes | None:
    """The classes in dataset.json (written by EDM's dataset_tool) or labels.csv (file,class,name), if the folder `base`
    has such a list; empty if its folders only split up a large set; else None. Raises SettingError."""
    path = root / base / 'dataset.json'
    try:
        found = json.loads(path.read_text('utf-8')) if path.is_file() else None
        if isinstance(found, dict) and 'labels' in found:
            pairs = found['labels'] or []
            return {os.path.join(base, file): key(str(kind)) for file, kind in pairs if isinstance(kind, int)}
        path = root / base / 'labels.csv'
        rows = list(csv.reader(path.read_text('utf-8-sig').splitlines())) if path.is_file() else []
        if rows and rows[0][:2] != ['file', 'class']:
            raise ValueError(f'it begins with {",".join(rows[0])}, not with file,class')
        if rows:
            rows = [[*row, ''] for row in rows[1:] if len(row) > 1 and row[1] not in ('', '-1')]
            return {os.path.join(base, file): (*key(kind)[:2], name or kind) for file, kind, name, *_ in rows}
    except (ValueError, TypeError, OSError) as error:
        raise SettingError(f'{where}: {path.name} cannot be read ({error}). Fix or remove it.') from None
    return {} if (root / base / 'generate.json').is_file() else None


def warn_of_classes(names: tuple[str, ...], groups: Groups, base: Path) -> None:
    """Warn of classes that look like two names of one class, or that look like no classes."""
    alike = defaultdict(list)
    for name in names:
        alike[unicodedata.normalize('NFC', name).casefold().strip()].append(name)
    twice = [' and '.join(group) for group in alike.values() if len(group) > 1]
    parts = [name for name in names if name.lower() in TRAIN + HELD_OUT]
    below = [{file.split(os.sep)[-2] for file in files} for files in groups.values()] if names else []
    shared = sorted(below[0]) if below and len(below[0]) > 1 and all(below[0] == other for other in below) else []
    shards = bool(names) and all(name.isdecimal() and len(name) == len(names[0]) > 4 for name in names)
    warnings = [
        twice and f'{", ".join(twice[:3])} are two classes. Merge their folders if they are one',
        parts and f'{parts[0]}/ is taken as a class. If it is a part of the data, pass --data_path {base / parts[0]}',
        shared
        and f'the classes are {some_names(list(names))}, and each holds the folders {some_names(shared)}. If these are '
        f'the classes, pass one of those, as --data_path {base / names[0]}',
        shards and f'folders {names[0]}, {names[1]} ... are taken as classes. If they are not, add --label_dropout 1',
    ]
    for warning in filter(None, warnings):
        print_once(f'warning: image_folder: {printable(warning)}.')
