"""Augmentation of a batch on its device: per-image flips, rotations, shifts, ..., never in the data loader.

An augmenter maps x (B, C, H, W) in [0, 1], before `encode`, to (x, augmented), with augmented (B,) bool: was this image
changed? With all probabilities 0 it takes data of any rank.
An augmentation that would change the meaning of the data (a flipped digit) is refused when the augmenter is built, or
it has a label, which the network gets as cond['augmentation']: what was done, and zeros for nothing, as in sampling.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config, SettingError


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


LEAST_CROP = 0.8  # side of the smallest crop, as a fraction of the image's


def resampled(x: Tensor, linear: Tensor, shift: Tensor) -> Tensor:
    """out(p) = x(linear (p - shift)), with bilinear interpolation, and reflection beyond the border.

    x (B, C, H, W). Positions p (x, y) are in pixels from the centre. linear (B, 2, 2); shift (B, 2), in sides.
    """
    (a, b, c, d), wide = linear.flatten(1).unbind(1), x.shape[3] / x.shape[2]
    linear = torch.stack([a, b / wide, c * wide, d], 1).view(-1, 2, 2)  # affine_grid counts each side from -1 to 1
    offset = -(linear @ (2 * shift)[:, :, None])
    grid = F.affine_grid(torch.cat([linear, offset], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode='reflection', align_corners=False)


def crop(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """A random part of the chosen images, with sides of LEAST_CROP or more of theirs, resized to their size."""
    share = 1 - (1 - LEAST_CROP) * torch.rand(len(x), 1, device=x.device)
    centre = (1 - share) * (torch.rand(len(x), 2, device=x.device) - 0.5)  # the middle of the part, in sides
    linear = share[:, :, None] * torch.eye(2, device=x.device)
    return torch.where(chosen[:, None, None, None], resampled(x, linear, -centre / share), x), chosen


def turn(angle: Tensor) -> Tensor:
    """(B,) -> (B, 2, 2), the matrices of rotations."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def geometric(x: Tensor, prob: float) -> tuple[Tensor, Tensor]:
    """EDM's augmentation, each of its parts with probability `prob`, and its label (B, 9) for the network.

    Half of all images are flipped along x, whatever `prob` is. An image is then flipped along y (in half of the cases),
    scaled by 2^(0.2 n), turned by any angle, stretched by 2^(0.2 n) in any direction, which keeps its area, and shifted
    by n / 8 of its sides; each n is from N(0, 1). The label holds both flips, n of the scale, cos - 1 and sin of the
    angle, n (cos, sin) of the stretch, and both n of the shift (Karras et al. 2022, appendix F.2). Here n of the
    stretch is positive, or the label would be the same for a direction that is stretched and one that is shortened.
    The paper stretches along the sides in half of the cases, and resamples with sharper filters.
    """
    b, device = len(x), x.device
    given = (torch.rand(b, 6, device=device) < prob).to(x.dtype)
    given[:, 0] = 1
    flips = given[:, :2] * torch.randint(2, (b, 2), device=device)
    shift = given[:, 5:] * torch.randn(b, 2, device=device)
    scale, stretch = (given[:, 2:5:2] * torch.randn(b, 2, device=device)).unbind(1)
    stretch = stretch.abs()
    angle, direction = (math.pi * (2 * torch.rand(2, b, device=device) - 1)).unbind()
    angle = given[:, 3] * angle
    factors = torch.stack([2 ** (-0.2 * (scale + stretch)), 2 ** (-0.2 * (scale - stretch))], 1)
    inverse = torch.diag_embed(1 - 2 * flips) @ turn(-angle)
    inverse = inverse @ turn(direction) @ torch.diag_embed(factors) @ turn(-direction)
    turned, stretched = [angle.cos() - 1, angle.sin()], [stretch * direction.cos(), stretch * direction.sin()]
    label = torch.cat([flips, torch.stack([scale, *turned, *stretched], 1), shift], 1)
    out = resampled(x, inverse, shift / 8)
    return torch.where((label != 0).any(1)[:, None, None, None], out, x), label


# setting that holds the probability -> (augmentation, field of the DataSpec that allows it; empty: always allowed,
# because the network gets a label)
AUGMENTATIONS: dict[str, tuple[Callable[[Tensor, Tensor, Config], tuple[Tensor, Tensor]], str]] = {
    'flip_prob': (lambda x, chosen, c: flip(x, chosen), 'flip_keeps_label'),
    'rotate_prob': (lambda x, chosen, c: rotate(x, chosen), 'rotation_keeps_label'),
    'translate_prob': (lambda x, chosen, c: translate(x, chosen, c.max_translation), 'translation_keeps_label'),
    'crop_prob': (lambda x, chosen, c: crop(x, chosen), 'translation_keeps_label'),
    'geometric_prob': (lambda x, chosen, c: geometric(x, c.geometric_prob), ''),
}
LABELS = {'geometric_prob': 9}  # setting -> size of the label that its augmentation returns in place of the mask


class Augmenter:
    """The augmentations whose probability is above 0, in the order of the table."""

    def __init__(self, config: Config):
        self.config, self.active = config, [name for name in AUGMENTATIONS if getattr(config, name) > 0]
        self.label_size = sum(LABELS.get(name, 0) for name in self.active)
        self.labels: list[Tensor] | None = None  # labels of the last call

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        augmented, self.labels = torch.zeros(len(x), dtype=torch.bool, device=x.device), []
        for name in self.active:
            chosen = torch.rand(len(x), device=x.device) < getattr(self.config, name)
            x, done = AUGMENTATIONS[name][0](x, chosen, self.config)
            if name in LABELS:
                self.labels.append(done)
                done = (done != 0).any(1)
            augmented |= done
        return x, augmented

    def condition(self, x0: Tensor, is_augmented: bool = True) -> dict[str, Tensor]:
        """The condition of the network for x0 (B, ...): the labels of the last call, which are then forgotten; zeros if
        there are none, or x0 is not augmented. {} if no augmentation has a label. Raises SettingError if that call was
        for another number of images."""
        labels, self.labels = self.labels if is_augmented else None, None
        label = torch.cat(labels, 1) if labels else x0.new_zeros(len(x0), self.label_size)
        if self.label_size and len(label) != len(x0):
            raise SettingError(
                f'{self.active[-1]}={getattr(self.config, self.active[-1]):g}: prepare_batch_fn augments {len(label)} '
                f'images and returns {len(x0)}. Augment all in one call, or use --{self.active[-1]} 0.'
            )
        return {'augmentation': label} if self.label_size else {}


def get_augmenter(config: Config, allowed: dict[str, Any], pairs: bool = False) -> Augmenter:
    """The augmentations whose probability is above 0, in the order of the table.

    `allowed`: the fields of the data set's DataSpec; `flip_keeps_label` and the like say what is allowed. Raises
    SettingError for an augmentation that would change the meaning of the data, and for any augmentation of data that
    are not images, or that are `pairs` (x0, x1) or have images as conditions, where it would change x0 only.
    """
    active = {setting: getattr(config, setting) for setting in AUGMENTATIONS if getattr(config, setting) > 0}
    for setting, prob in active.items():
        if (field := AUGMENTATIONS[setting][1]) and not allowed[field]:
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

    if (augmenter := Augmenter(config)).label_size and 'augmentation' in allowed.get('conditions', ()):
        raise SettingError(
            f'dataset={config.dataset!r} has a condition augmentation: rename it, or --geometric_prob 0.'
        )
    return augmenter
