"""Files of samples: PNGs in a folder, or one .npz. All are written atomically, so a stopped program can resume."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from config import SettingError
from data_loading.arrays import LAYOUTS, LAYOUTS_BACK
from runtime import files

Draw = Callable[[Tensor], Tensor]  # samples (n, ...) -> a picture (3, H, W) uint8
PLACES = ('ckpt_dir', 'experiment_name', 'data_dir', 'data_path')  # settings on which samples do not depend


class SampleFiles:
    """Writer of samples: PNGs `out`/000/000123.png, or batches in `out`.npz.parts that are joined to `out`.npz in the
    end. Both come with a grid of the first samples."""

    def __init__(self, out: str, are_images: bool, made_by: dict[str, Any], layout: str = ''):
        """`made_by`: everything that the samples depend on. `layout`: a key of LAYOUTS, by which samples that are not
        images get the axes of the data in their file. Raises SettingError if `out` cannot hold the samples."""
        self.path, self.where = Path(out).expanduser(), f'out={out!r}'
        self.one_file, self.images = self.path.suffix == '.npz', are_images
        self.folder = self.path.with_name(f'{self.path.name}.parts') if self.one_file else self.path
        if not self.images and not self.one_file:
            remedy = 'Pass --out x.npz, which holds floats of any shape, or have `decode` end with .clamp(0, 1)'
            raise SettingError(f'{self.where}: PNGs hold only images in [0, 1], which these samples are not. {remedy}.')
        self.layout = '' if are_images else layout
        self.made_by = json.loads(json.dumps(made_by))

    def claim(self) -> None:
        """Create the folder and record `made_by` in it. Raises SettingError if it holds anything else."""
        record = self.folder / 'generate.json'
        if record.exists():
            before = json.loads(record.read_text())
            now = {name: value for name, value in self.made_by.items() if name not in PLACES}
            changed = [f'{name}: {before.get(name)} -> {x}' for name, x in now.items() if before.get(name) != x]
            if changed:
                what = f'{self.where} holds samples of other settings (there -> now): {"; ".join(changed[:4])}'
                raise SettingError(f'{what}. Pass another --out, or remove it.')
        elif self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
            raise SettingError(f'{self.where} already exists and was not written by generate.py. Pass another --out.')
        else:
            files.write_text(record, json.dumps(self.made_by, indent=1))

    def existing(self) -> set[int]:
        """Indices of the samples that already exist."""
        if self.one_file:
            return {int(i) for part in self.parts() for i in part['index']}
        return {int(path.stem) for path in self.folder.glob('[0-9]*/[0-9]*.png')}

    def parts(self) -> list[dict[str, Any]]:
        """x, label and index of the existing samples: those in the finished file, if any, and in batches."""
        parts = [arrays_of(path) for path in sorted(self.folder.glob('*.npz'))]
        if self.path.exists():
            finished = arrays_of(self.path)
            x, label = finished.pop('arr_0'), finished.pop('arr_1')
            parts.insert(0, finished | dict(x=x, label=label, index=np.arange(len(x))))
        return parts

    def add(
        self, indices: Sequence[int], x: Tensor, label: Tensor | None, cond: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write these samples; an .npz also has their conditions."""
        if self.images:  # uint8 (n, H, W, C)
            x = (x.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        array = (x if self.images else x.float()).cpu().numpy()
        if self.layout in LAYOUTS_BACK:
            array = LAYOUTS_BACK[self.layout](array)
        if self.one_file:
            labels = np.full(len(indices), -1) if label is None else label.cpu().numpy()
            more = {
                f'cond_{name}': value.cpu().numpy() for name, value in (cond or {}).items() if name != 'augmentation'
            }
            write_npz(self.folder / f'{indices[0]:08d}.npz', x=array, label=labels, index=np.array(indices), **more)
            return
        for i, image in zip(indices, array, strict=True):
            with files.atomic_write(self.png(i)) as temporary:
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, 'png')

    def png(self, i: int) -> Path:
        return self.folder / f'{i // 1000:03d}' / f'{i:06d}.png'

    def picture(self, name: str) -> Path:
        """Path of a picture: in the folder, or next to the .npz with its name as a prefix."""
        return self.path.with_name(f'{self.path.stem}_{name}') if self.one_file else self.folder / name

    def finish(
        self, shown: int, label: Tensor | None = None, classes: Sequence[str] = (), draw: Draw | None = None
    ) -> None:
        """Join the parts to one .npz: arr_0 uint8 (N, H, W, C), arr_1 the classes and `classes` their names; for PNGs
        write labels.csv. Also `draw` a grid of the first `shown` samples (n, ...)."""
        if self.one_file:
            first = self.join_parts(classes)[:shown]
        else:
            if label is not None:
                self.write_labels(label.tolist(), [*classes, 'none'])
            first = np.stack([np.array(Image.open(self.png(i))) for i in range(shown)])
        x = torch.from_numpy(LAYOUTS[self.layout](first) if self.layout else first)
        if self.images:
            x = x.reshape(*first.shape[:3], -1).permute(0, 3, 1, 2) / 255
        if draw is not None:
            with files.atomic_write(self.picture('grid.png')) as temporary:
                torchvision.io.write_png(draw(x), str(temporary))

    def write_labels(self, label: Sequence[int], names: Sequence[str]) -> None:
        """Write labels.csv with file, class and name of the first n samples, unless the existing table is longer."""
        path = self.folder / 'labels.csv'
        if path.exists() and len(path.read_text(encoding='utf-8').splitlines()) > len(label) + 1:
            return
        with (
            files.atomic_write(path) as temporary,
            open(temporary, 'w', encoding='utf-8', errors='backslashreplace') as file,
        ):
            rows = ((self.png(i).relative_to(self.folder), k, names[k]) for i, k in enumerate(label))
            csv.writer(file, lineterminator='\n').writerows([('file', 'class', 'name'), *rows])

    def join_parts(self, classes: Sequence[str] = ()) -> np.ndarray:
        """Write the .npz, delete the parts that it contains, and return its samples (N, ...)."""
        parts = self.parts()
        index, rows = np.unique(np.concatenate([part['index'] for part in parts]), return_index=True)
        n = int((index == np.arange(len(index))).sum())  # samples before the first gap: num, or more of an earlier call
        names = ['x', 'label', *(name for name in parts[-1] if name.startswith('cond_'))]
        x, label, *more = (np.concatenate([part[name] for part in parts])[rows[:n]] for name in names)
        named = {'classes': np.array(classes)} if classes else {}
        write_npz(self.path, arr_0=x, arr_1=label, **named, **dict(zip(names[2:], more, strict=True)))
        for path in self.folder.glob('*.npz'):
            if arrays_of(path)['index'].max() < n:
                path.unlink()
        return x


def write_gif(path: Path, pictures: Sequence[Tensor], milliseconds: int) -> None:
    """Write an animation that loops; the last picture stays for 1.5 s."""
    size = [max(picture.shape[i] for picture in pictures) for i in (1, 2)]
    pad = torch.nn.functional.pad
    padded = [pad(p, (0, size[1] - p.shape[2], 0, size[0] - p.shape[1]), value=255) for p in pictures]
    first, *rest = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in padded]
    with files.atomic_write(path) as temporary:
        durations = [milliseconds] * len(rest) + [1500]
        first.save(temporary, 'gif', save_all=True, append_images=rest, duration=durations, loop=0)


def write_npz(path: Path, **arrays: Any) -> None:
    with files.atomic_write(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)


def arrays_of(path: Path) -> dict[str, Any]:
    """The arrays in an .npz."""
    with np.load(path) as arrays:
        return dict(arrays)
