"""Augmentation of a batch on its device: per-image flips, rotations and shifts, never in the data loader.

An augmenter maps x (B, C, H, W) to (x, augmented), with augmented (B,) bool: was this image changed? With all
probabilities 0 it takes data of any rank.
An augmentation that would change the meaning of the data (a flipped digit) is refused when the augmenter is built.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from config import Config, SettingError

Augmenter = Callable[[Tensor], tuple[Tensor, Tensor]]


def flip(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Left-right flip of the chosen images."""
    return torch.where(chosen[:, None, None, None], x.flip(3), x), chosen


def rotate(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation of the chosen images by 90, 180 or 270 degrees, equally likely; by 180 if they are not square."""
    turns = (1, 2, 3) if x.shape[2] == x.shape[3] else (2,)
    which = torch.randint(len(turns), chosen.shape, device=x.device)
    out = x
    for i, k in enumerate(turns):
        out = torch.where((chosen & (which == i))[:, None, None, None], torch.rot90(x, k, (2, 3)), out)
    return out, chosen


def translate(x: Tensor, chosen: Tensor, max_shift: int) -> tuple[Tensor, Tensor]:
    """Shift of the chosen images by whole pixels, uniform in [-max_shift, max_shift]^2; border pixels fill the gap."""
    b, c, h, w = x.shape
    shift = torch.randint(-max_shift, max_shift + 1, (2, b), device=x.device) * chosen
    rows = (torch.arange(h, device=x.device) - shift[0][:, None]).clamp(0, h - 1)  # (B, H)
    columns = (torch.arange(w, device=x.device) - shift[1][:, None]).clamp(0, w - 1)  # (B, W)
    x = x.gather(2, rows[:, None, :, None].expand(b, c, h, w))
    return x.gather(3, columns[:, None, None, :].expand(b, c, h, w)), (shift != 0).any(0)


# setting that holds the probability -> (augmentation, field of the DataSpec that allows it)
AUGMENTATIONS: dict[str, tuple[Callable[[Tensor, Tensor, Config], tuple[Tensor, Tensor]], str]] = {
    'flip_prob': (lambda x, chosen, c: flip(x, chosen), 'flip_keeps_label'),
    'rotate_prob': (lambda x, chosen, c: rotate(x, chosen), 'rotation_keeps_label'),
    'translate_prob': (lambda x, chosen, c: translate(x, chosen, c.max_translation), 'translation_keeps_label'),
}


def get_augmenter(config: Config, allowed: dict[str, Any], pairs: bool = False) -> Augmenter:
    """The augmentations whose probability is above 0, in the order of the table.

    `allowed`: the fields of the data set's DataSpec; `flip_keeps_label` and the like say what is allowed. Raises
    SettingError for an augmentation that would change the meaning of the data, and for any augmentation of data that
    are not images, or that are `pairs` (x0, x1) or have images as conditions, where it would change x0 only.
    """
    active = {setting: getattr(config, setting) for setting in AUGMENTATIONS if getattr(config, setting) > 0}
    for setting, prob in active.items():
        if not allowed[AUGMENTATIONS[setting][1]]:
            raise SettingError(
                f'{setting}={prob:g} would change what the images of dataset={config.dataset!r} mean. '
                f'Use --{setting} 0.'
            )
        if len(allowed.get('shape') or (1, 1, 1)) != 3:
            raise SettingError(
                f'{setting}={prob:g} is for images (C, H, W), and dataset={config.dataset!r} has the shape '
                f'{allowed["shape"]}. Use --{setting} 0.'
            )
        if pairs or any(len(shape) > 1 for shape in allowed.get('condition_shapes', ())):
            raise SettingError(
                f'{setting}={prob:g} would change x0 and not {"x1 of the pairs" if pairs else "the conditions"} of '
                f'dataset={config.dataset!r}. Use --{setting} 0, and augment both alike in prepare_batch_fn.'
            )

    def augmenter(x: Tensor) -> tuple[Tensor, Tensor]:
        augmented = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for setting, prob in active.items():
            chosen = torch.rand(len(x), device=x.device) < prob
            x, done = AUGMENTATIONS[setting][0](x, chosen, config)
            augmented |= done
        return x, augmented

    return augmenter
