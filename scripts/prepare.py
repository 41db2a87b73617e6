"""A data set, decoded once, as one file that training reads in place.

    sh run.sh prepare.py --dataset image_folder --data_path DIR --image_size 64 --out FILE.pt
    sh run.sh --dataset arrays --data_path FILE.pt

    sh run.sh prepare.py --dataset ... --latents encoder.py:encode --out LATENTS.pt

With --latents, what a function `encode(x)` makes of images x (B, C, H, W) in [0, 1] is stored in their place: floats
(B, ...), and their mean and standard deviation by channel. The flags of data sets are those of training.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config, SettingError, parse_config
from runtime import command

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64  # images that are encoded at once


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Config):
    """The settings of training, and what is written."""

    out: str = ''
    """File to write, FILE.pt."""
    latents: str = ''
    """FILE.py:FUNCTION, an encoder whose outputs are stored instead of the images."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file that the flags ask for."""
    config = command.parsed(lambda: parse_config(argv, PrepareConfig))
    assert isinstance(config, PrepareConfig)
    command.run(lambda: prepare(config))


def prepare(config: PrepareConfig) -> None:
    """Raises SettingError."""
    from torch.utils.data import ConcatDataset, TensorDataset

    import data_utils
    from data_loading import packed
    from runtime import ranks

    path = Path(config.out).expanduser()
    if path.suffix != '.pt':
        raise SettingError(f'out={config.out!r}: pass the file to write, as --out FILE.pt.')
    if path.exists():
        raise SettingError(f'out={config.out!r} is there already. Remove it, or pass another name.')
    # a second copy on the disk is needed only to find out first what cannot be read
    once = dataclasses.replace(config, cache=config.skip_unreadable)
    spec, train, test = data_utils.load_in_turns(once, data_utils.get_dataset(config))
    held_out = len(test[0] if isinstance(test, tuple) else test)
    parts: list[Any] = [TensorDataset(*part) if isinstance(part, tuple) else part for part in (test, train)]
    if len(parts[0][0]) != 2:
        raise SettingError(f'dataset={config.dataset!r} holds pairs, for which there is no such file.')
    items: Any = ConcatDataset(parts)
    facts: dict[str, Any] = dict(
        num_classes=spec.num_classes,
        classes=spec.classes,
        scale=spec.scale,
        max_value=spec.max_value,
        held_out=held_out,
    )
    if config.latents:
        rows = latents(items, function_of(config.latents), spec, facts)
        packed.write_rows(path, rows, len(items), path.name, facts)
    else:
        del facts['held_out']
        packed.build(items, path, held_out, config.skip_unreadable, path.name, **facts)
    found = packed.read(path)
    ranks.print_once(
        f'{path}: {len(found["x"]):,} items of shape {tuple(found["x"].shape[1:])}, {held_out} held out, '
        f'{path.stat().st_size / 1e6:,.1f} MB, digest {found["digest"]}\n'
        f'train on it: sh run.sh --dataset arrays --data_path {config.out}{attention_of(tuple(found["x"].shape[1:]))}'
    )


def attention_of(shape: tuple[int, ...]) -> str:
    """The flag with which the default UNet takes images of this shape: attention on its second level."""
    return f' --attention_resolutions {max(shape[1:]) // 2}' if len(shape) == 3 and min(shape[1:]) > 1 else ''


def latents(items: Any, encode: Callable, spec: Any, facts: dict[str, Any]) -> Iterator[tuple['Tensor', int]]:
    """(latent, label) of each item. After the last, mean and std of each channel are among the facts."""
    import torch
    from torch.utils.data import DataLoader

    from runtime import ranks

    device, divisor = ranks.setup(), spec.max_value if spec.scale == 'image' else 1
    count, total, squares = 0, 0, 0
    for x, label in DataLoader(items, BATCH):
        with torch.no_grad():
            z = encode(x.to(device).float() / divisor).float().cpu()
        if len(z) != len(x) or z.ndim < 2 or not z.isfinite().all():
            raise SettingError(
                f'latents: {tuple(x.shape)} became {tuple(z.shape)}'
                f'{"" if z.isfinite().all() else " with values that are not finite"}. The encoder must give finite '
                'floats (B, C, ...), one row for each image.'
            )
        by_channel = z.double().transpose(0, 1).flatten(1)
        count += by_channel.shape[1]
        total, squares = total + by_channel.sum(1), squares + by_channel.square().sum(1)
        yield from zip(z, label.tolist(), strict=True)
    mean = torch.as_tensor(total / count)
    std = (torch.as_tensor(squares / count) - mean.square()).clamp(min=0).sqrt()
    facts |= dict(scale='float', max_value=255, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def function_of(text: str) -> Callable:
    """The function that FILE.py:FUNCTION names. Raises SettingError."""
    import importlib.util

    file, _, name = text.rpartition(':')
    path = Path(file).expanduser()
    if not path.is_file():
        raise SettingError(f'latents={text!r}: there is no file {file!r}. Pass FILE.py:FUNCTION.')
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, 'a Python file has a loader'
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise SettingError(f'latents={text!r}: {file} has no function {name!r}.')
    return found


if __name__ == '__main__':
    main()
