"""Decode a data set once, into one file that training maps into memory.

    sh run.sh prepare.py --dataset image_folder --data_path DIR --image_size 64 --out FILE.pt
    sh run.sh --dataset arrays --data_path FILE.pt

    sh run.sh prepare.py --dataset ... --latents encoder.py:encode --out LATENTS.pt

With --latents, the file holds `encode(x)` for images x (B, C, H, W) in [0, 1]: floats (B, ...), with their mean and
standard deviation per channel. The data are chosen by the same flags as in training.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config import Config, SettingError, parse_config
from runtime import alive, command
from runtime.files import from_caller


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Config):
    """The settings of training, the file to write, and the encoder."""

    out: str = ''
    """File to write, FILE.pt."""
    latents: str = ''
    """FILE.py:FUNCTION, an encoder whose outputs are stored instead of the images."""


def main(argv: Sequence[str] | None = None) -> None:
    config = command.parsed(lambda: parse_config(argv, PrepareConfig))
    assert isinstance(config, PrepareConfig)
    command.run(lambda: prepare(config))


@alive.print_while('preparing the data')
def prepare(config: PrepareConfig) -> None:
    """Write the file, the held-out part first, and print the command that trains on it. Raises SettingError."""
    from torch.utils.data import ConcatDataset

    import data_utils
    from data_loading import packed
    from runtime import ranks

    path = Path(config.out).expanduser()
    if path.suffix != '.pt':
        raise SettingError(f'out={config.out!r}: pass the file to write, as --out FILE.pt.')
    if path.exists():
        raise SettingError(f'out={config.out!r} already exists. Remove it, or pass another name.')
    # a cache is a second copy on the disk; it is needed only to find the unreadable files before writing
    spec, train, test = data_utils.load_data(dataclasses.replace(config, cache=config.skip_unreadable))
    if test.has_pairs or spec.conditions:
        raise SettingError(f'dataset={config.dataset!r}: prepare.py cannot store pairs (x, label, x1) or conditions.')
    items: Any = ConcatDataset([part.items for part in (test, train)])
    facts = {name: getattr(spec, name) for name in ('num_classes', 'classes', 'scale', 'max_value')}
    if config.latents:
        facts['held_out'] = len(test)
        rows = latents(items, function_of(config.latents), spec.scaled, facts)
        packed.write_rows(path, rows, len(items), path.name, facts)
    else:
        facts |= dict(value_range=spec.value_range) if spec.value_range else {}
        packed.build(items, path, len(test), config.skip_unreadable, path.name, **facts)
    content = packed.read(path)
    n, *shape = content['x'].shape
    # a suggestion for the default UNet: attention on its second level
    attention = f' --attention_resolutions {max(shape[1:]) // 2}' if len(shape) == 3 and min(shape[1:]) > 1 else ''
    ranks.print_once(
        f'{path}: {n:,} items of shape {tuple(shape)}, {content["held_out"]} held out, '
        f'{path.stat().st_size / 1e6:,.1f} MB, digest {content["digest"]}\n'
        f'train on it: sh run.sh --dataset arrays --data_path {config.out}{attention}'
    )


def latents(items: Any, encode: Callable, scaled: Callable, facts: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """Yield (encode(scaled(x)), label) of each item. After the last one, `facts` has the mean and std of each channel
    over the training items, which follow the held-out ones."""
    import torch
    from torch.utils.data import DataLoader

    from runtime import ranks

    device, done, count, total, squares = ranks.setup(), 0, 0, 0, 0
    for x, label in DataLoader(items, batch_size=64):
        with torch.no_grad():
            z = encode(scaled(x.to(device))).float().cpu()
        if len(z) != len(x) or z.ndim < 2 or not z.isfinite().all():
            bad = '' if z.isfinite().all() else ' with values that are not finite'
            became = f'latents: {tuple(x.shape)} became {tuple(z.shape)}{bad}'
            raise SettingError(f'{became}. The encoder must return finite floats (B, C, ...), one row per image.')
        by_channel = z[max(0, facts['held_out'] - done) :].double().transpose(0, 1).flatten(1)
        done += len(z)
        count += by_channel.shape[1]
        total, squares = total + by_channel.sum(1), squares + by_channel.square().sum(1)
        yield from zip(z, label.tolist(), strict=True)
    mean = torch.as_tensor(total / count)
    std = (torch.as_tensor(squares / count) - mean.square()).clamp(min=0).sqrt()
    facts |= dict(scale='float', max_value=255, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def function_of(text: str) -> Callable:
    """The function that FILE.py:FUNCTION names. Raises SettingError."""
    from runtime import importing

    file, _, name = text.rpartition(':')
    path = Path(from_caller(file)).expanduser().resolve()
    if not path.is_file():
        raise SettingError(f'latents={text!r}: there is no file {file!r}. Pass FILE.py:FUNCTION.')
    function = getattr(importing.import_file(str(path)), name, None)
    if not callable(function):
        raise SettingError(f'latents={text!r}: {file} has no function {name!r}. Pass FILE.py:FUNCTION.')
    return function


if __name__ == '__main__':
    main()
