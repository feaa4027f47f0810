"""Choose the visible and hidden patches of pretraining images, and extract patches' pixels."""

from fractions import Fraction
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Mask(NamedTuple):
    """A split of an image's patches, by index; every patch occurs once."""

    visible: Tensor  # [B, v], int64
    hidden: Tensor  # [B, n - v], int64


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Return how many of `patches` stay visible: floor(n * (1 - mask_ratio)), in exact decimals.

    >>> [visible_patches(196, ratio) for ratio in (0.6, 0.75, 0.85, 0.9)]
    [78, 49, 29, 19]
    """
    return floor(patches * (1 - Fraction(str(mask_ratio))))


def hide_patches(noise: Tensor, mask_ratio: float, unit: int = 1) -> Mask:
    """Hide the patches of highest noise.

    noise: float32 [B, (grid / unit)^2], one number per square of `unit` x `unit` patches, which is
    hidden as a whole (SimMIM uses a unit of 2).
    """
    units = noise.shape[1]
    shown = visible_patches(units, mask_ratio)
    order = noise.argsort(dim=1)
    visible, hidden = order[:, :shown], order[:, shown:]
    return Mask(_spread(visible, units, unit), _spread(hidden, units, unit))


def _spread(index: Tensor, units: int, unit: int) -> Tensor:
    """Convert indices of squares [B, u] to those of their patches [B, u * unit^2]."""
    if unit == 1:
        return index
    across = round(units**0.5)
    row, column = index // across * unit, index % across * unit
    inside = [(down, right) for down in range(unit) for right in range(unit)]
    patches = [(row + down) * (across * unit) + column + right for down, right in inside]
    return torch.stack(patches, dim=2).flatten(1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Return the pixels of each patch, [B, n, C * p * p], in a convolution's order."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the tokens [B, m, D] at `index` [B, m] of tokens [B, n, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
