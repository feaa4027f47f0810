"""RandAugment's operations (arXiv 1909.13719), as defined by PIL, one per image of a batch.

They run on the batch's device; the choice of operations is on the CPU, so no sync is needed. Images
are square RGB in [0, 1].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from kornia import enhance
from torch import Tensor
from torch.nn import functional as F

#: Level of the gaps that rotating, shearing or shifting leaves.
FILL = 0.5


class Operation(NamedTuple):
    """An operation on colours."""

    change: Callable[[Tensor, Tensor], Tensor]  # images [n, 3, S, S], argument [n] to images
    argument: Callable[[Tensor, Tensor], Tensor]  # strength [n] in [0, 1] and sign [n] to argument


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to [0, 1], unless it has a single level."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Add `amount` to the darker half of the levels. (kornia's adds to all, and inverts.)"""
    lighter = (images + amount[:, None, None, None]).clamp(max=1)
    return torch.where(images < 128 / 255, lighter, images)


def _factor(strength: Tensor, sign: Tensor) -> Tensor:
    """Return an enhancement's factor: 1 changes nothing, 0.1 nearly removes, 1.9 exaggerates."""
    return 1 + 0.9 * strength * sign


#: Ranges as in timm's "increasing" set: no operation gets weaker as the magnitude grows.
COLOUR = {
    "AutoContrast": Operation(_autocontrast, lambda strength, _: strength),
    "Equalize": Operation(lambda images, _: enhance.equalize(images), lambda strength, _: strength),
    # kornia's needs a device sync
    "Invert": Operation(lambda images, _: 1 - images, lambda strength, _: strength),
    "Posterize": Operation(enhance.posterize, lambda strength, _: 4 - (4 * strength).long()),
    "Solarize": Operation(
        enhance.solarize, lambda strength, _: (256 - (256 * strength).floor()) / 255
    ),
    "SolarizeAdd": Operation(_solarize_add, lambda strength, _: (110 * strength).floor() / 255),
    "Color": Operation(enhance.adjust_saturation_with_gray_subtraction, _factor),
    "Contrast": Operation(enhance.adjust_contrast_with_mean_subtraction, _factor),
    "Brightness": Operation(enhance.adjust_brightness_accumulative, _factor),
    "Sharpness": Operation(enhance.sharpness, _factor),
}

#: Matrices added to the identity at full strength; they map output to input coordinates. Shears
#: leave the upper or left edge in place, as PIL's do.
GEOMETRY = {
    "Rotate": [[0.0, 0, 0], [0, 0, 0]],  # not linear in strength: see `_matrices`
    "ShearX": [[0, 0.3, 0.3], [0, 0, 0]],
    "ShearY": [[0, 0, 0], [0.3, 0, 0.3]],
    "TranslateX": [[0, 0, 0.9], [0, 0, 0]],  # coordinates span 2: 0.45 of the side
    "TranslateY": [[0, 0, 0], [0, 0, 0.9]],
}

ROTATE_DEGREES = 30

OPERATIONS = (*COLOUR, *GEOMETRY)


def operate_(images: Tensor, choice: Tensor, strength: Tensor, sign: Tensor) -> None:
    """Apply one operation to every image [B, 3, S, S] in [0, 1], in place.

    On the CPU: choice int64 [B], an index of OPERATIONS (beyond them: none); strength [B] in
    [0, 1]; sign [B] of 1 and -1, the direction of operations that have two.
    """
    for number, (change, argument) in enumerate(COLOUR.values()):
        index = (choice == number).nonzero().squeeze(1)
        if len(index):
            _change_(images, index, change, argument(strength[index], sign[index]))
    kind = choice - len(COLOUR)
    index = ((kind >= 0) & (kind < len(GEOMETRY))).nonzero().squeeze(1)
    if len(index):
        matrices = _matrices(kind[index], strength[index], sign[index])
        _change_(images, index, _warp, matrices)


def _change_(
    images: Tensor, index: Tensor, change: Callable[[Tensor, Tensor], Tensor], argument: Tensor
) -> None:
    """Apply `change` with arguments [n, ...] to the images at `index` [n], on the CPU, in place."""
    index = index.to(images.device, non_blocking=True)
    argument = argument.to(images.device, non_blocking=True)
    images.index_copy_(0, index, change(images.index_select(0, index), argument))


def _matrices(kind: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Return the matrices [n, 2, 3] of GEOMETRY's operations `kind` [n]."""
    angle = strength * sign * (kind == 0) * math.radians(ROTATE_DEGREES)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turned = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    added = torch.tensor(list(GEOMETRY.values()))[kind]
    return turned + added * (strength * sign)[:, None, None]


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images by `matrices` [n, 2, 3], with FILL outside of the image."""
    grid = sampling_grid(matrices, images.shape[3])
    warped = F.grid_sample(images - FILL, grid, align_corners=False)  # zeros from outside
    return (warped + FILL).clamp_(0, 1)


def sampling_grid(matrices: Tensor, size: int) -> Tensor:
    """Return the input coordinates of `size` x `size` pixels, [n, size, size, 2], edges at ±1.

    matrices: [n, 2, 3]. `F.affine_grid` uses a matrix product, which a GPU may compute in TF32, too
    inaccurate for coordinates.
    """
    steps = (2 * torch.arange(size, device=matrices.device) + 1) / size - 1
    x, y = steps[None, None, :, None], steps[None, :, None, None]
    along_x, along_y, offset = matrices[:, None, None].unbind(-1)  # [n, 1, 1, 2] each
    return along_x * x + along_y * y + offset
