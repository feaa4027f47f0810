"""Which patches a pretraining image shows and which it hides, and patches as plain numbers.

It knows grids and counts, nothing of networks or losses.
"""

from fractions import Fraction
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Mask(NamedTuple):
    """A split of an image's patches, by index: together every patch once."""

    visible: Tensor  # [B, v], int64
    hidden: Tensor  # [B, n - v], int64


def visible_patches(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: floor(n * (1 - mask_ratio)), exactly as a decimal.

    >>> [visible_patches(196, ratio) for ratio in (0.6, 0.75, 0.85, 0.9)]
    [78, 49, 29, 19]
    """
    return floor(patches * (1 - Fraction(str(mask_ratio))))


def mask(noise: Tensor, mask_ratio: float, unit: int = 1) -> Mask:
    """Hide the patches of highest noise.

    noise float32 [B, (grid / unit)^2], a number for each square of `unit` x `unit` patches, which
    is shown or hidden as a whole (SimMIM hides squares of two patches).
    """
    units = noise.shape[1]
    shown = visible_patches(units, mask_ratio)
    order = noise.argsort(dim=1)
    visible, hidden = order[:, :shown], order[:, shown:]
    return Mask(_spread(visible, units, unit), _spread(hidden, units, unit))


def _spread(index: Tensor, units: int, unit: int) -> Tensor:
    """Indices of squares [B, u] to those of their patches [B, u * unit^2]."""
    if unit == 1:
        return index
    across = round(units**0.5)
    row, column = index // across * unit, index % across * unit
    inside = [(down, right) for down in range(unit) for right in range(unit)]
    patches = [(row + down) * (across * unit) + column + right for down, right in inside]
    return torch.stack(patches, dim=2).flatten(1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] to the numbers of each patch, [B, n, C * p * p], as a convolution reads them."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, m] of tokens [B, n, D]: [B, m, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
