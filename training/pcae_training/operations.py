"""RandAugment's operations (arXiv 1909.13719) on a batch on its device: PIL's, each image its own.

Which image gets which is told on the CPU, so nothing waits for the device. It knows square RGB
images in [0, 1]; nothing of how operations and their strengths are drawn.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from kornia import enhance
from torch import Tensor
from torch.nn import functional as F

#: What comes in where a rotated, sheared or shifted image leaves a gap.
FILL = 0.5


class Operation(NamedTuple):
    """An operation on colours."""

    change: Callable[[Tensor, Tensor], Tensor]  # images [n, 3, S, S], argument [n] to images
    argument: Callable[[Tensor, Tensor], Tensor]  # strength [n] in [0, 1] and sign [n] to argument


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; one of a single level stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """`amount` more for the darker half of the levels. kornia's adds to all, and inverts."""
    lighter = (images + amount[:, None, None, None]).clamp(max=1)
    return torch.where(images < 128 / 255, lighter, images)


def _factor(strength: Tensor, sign: Tensor) -> Tensor:
    """1 leaves an image alone, 0.1 nearly takes away what the factor is on, 1.9 exaggerates it."""
    return 1 + 0.9 * strength * sign


#: Ranges are those of timm's "increasing" set: no operation is weaker at a greater magnitude.
COLOUR = {
    "AutoContrast": Operation(_autocontrast, lambda strength, _: strength),
    "Equalize": Operation(lambda images, _: enhance.equalize(images), lambda strength, _: strength),
    # kornia's waits for the device
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

#: What is added to the identity at full strength, from where pixels go to where they come from.
#: Shears leave the upper or left edge in place, as PIL's do.
GEOMETRY = {
    "Rotate": [[0.0, 0, 0], [0, 0, 0]],  # not linear in strength: see `_matrices`
    "ShearX": [[0, 0.3, 0.3], [0, 0, 0]],
    "ShearY": [[0, 0, 0], [0.3, 0, 0.3]],
    "TranslateX": [[0, 0, 0.9], [0, 0, 0]],  # of 2, the side: 0.45 of it
    "TranslateY": [[0, 0, 0], [0, 0, 0.9]],
}

ROTATE_DEGREES = 30

OPERATIONS = (*COLOUR, *GEOMETRY)


def operate_(images: Tensor, choice: Tensor, strength: Tensor, sign: Tensor) -> None:
    """One operation on every image [B, 3, S, S] in [0, 1], in place.

    On the CPU: choice int64 [B], a place in OPERATIONS (beyond them: none); strength [B] in [0, 1];
    sign [B] of 1 and -1, which turns those that go two ways.
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
    """Images at `index` [n], on the CPU, as `change` makes them with their arguments [n, ...]."""
    index = index.to(images.device, non_blocking=True)
    argument = argument.to(images.device, non_blocking=True)
    images.index_copy_(0, index, change(images.index_select(0, index), argument))


def _matrices(kind: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """[n, 2, 3] of GEOMETRY's `kind` [n]."""
    angle = strength * sign * (kind == 0) * math.radians(ROTATE_DEGREES)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turned = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    added = torch.tensor(list(GEOMETRY.values()))[kind]
    return turned + added * (strength * sign)[:, None, None]


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Images resampled where `matrices` [n, 2, 3] say; FILL from outside of them."""
    grid = sampling_grid(matrices, images.shape[3])
    warped = F.grid_sample(images - FILL, grid, align_corners=False)  # zeros from outside
    return (warped + FILL).clamp_(0, 1)


def sampling_grid(matrices: Tensor, size: int) -> Tensor:
    """Where `size` x `size` pixels come from, edges at -1 and 1: [n, 2, 3] to [n, size, size, 2].

    `F.affine_grid` multiplies matrices, for which a GPU may use TF32: pixels would be misplaced.
    """
    steps = (2 * torch.arange(size, device=matrices.device) + 1) / size - 1
    x, y = steps[None, None, :, None], steps[None, :, None, None]
    along_x, along_y, offset = matrices[:, None, None].unbind(-1)  # [n, 1, 1, 2] each
    return along_x * x + along_y * y + offset
