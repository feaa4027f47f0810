"""Rotary positions (DINOv3): the channels of queries and keys turn by the place of their patch.

Angles follow from the grid alone, so a model has no parameters for them. Tokens that are not
patches (CLS, registers, means of dropped patches) are not turned, as if they lay in the middle.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which the channels of each token turn."""

    cos: Tensor  # float32 [1 or B, N, 1, d / 2], d channels per head
    sin: Tensor  # of the same shape

    def turn(self, x: Tensor) -> Tensor:
        """Turn x [B, N, heads, d]: a channel of the first half with that of the second."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def keep(self, index: Tensor, prefix: int, patches: int, means: int) -> "Rotation":
        """Return the angles after a stage: a patch keeps its own, an appended mean has none.

        index: int64 [B, m], the patches kept of those after the first `prefix` tokens. means: 1
        if a mean is appended, else 0.
        """
        rows = index[..., None, None].expand(-1, -1, 1, self.cos.shape[3])  # [B, m, 1, d / 2]
        kept = []
        for table, still in zip(self, (1.0, 0.0), strict=True):
            whole = table.expand(index.shape[0], -1, -1, -1)
            mean = torch.full_like(rows[:, :1], still, dtype=table.dtype).narrow(1, 0, means)
            before, after = whole[:, :prefix], whole[:, prefix + patches :]
            of_patches = whole[:, prefix : prefix + patches].gather(1, rows)
            kept.append(torch.cat([before, of_patches, after, mean], dim=1))
        return Rotation(*kept)


class RotaryPositions(nn.Module):
    """The angles of a grid of patches: constants, which the state dict does not contain."""

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: int, channels: int, theta: float) -> None:
        """Compute the angles of grid x grid patches for heads of `channels` channels.

        theta: frequencies fall from 1 turn per half image to almost 1 / theta.
        """
        super().__init__()
        # on the CPU, with values, even if the model is built without any
        count = partial(torch.arange, dtype=torch.float64, device="cpu")
        middles = (2 * count(grid) + 1) / grid - 1
        steps = count(channels // 4) / (channels // 4)
        axis = torch.outer(middles, 2 * math.pi / theta**steps)  # [grid, d / 4]
        row, column = axis.repeat_interleave(grid, dim=0), axis.repeat(grid, 1)  # x runs fastest
        angle = torch.cat([row, column], dim=1)[None, :, None]  # [1, grid^2, 1, d / 2]
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, prefix: int) -> Rotation:
        """Return the angles of `prefix` tokens, which are not turned, and of all patches."""
        still = self.cos.new_ones(1, prefix, 1, self.cos.shape[3])
        return Rotation(
            torch.cat([still, self.cos], dim=1),
            torch.cat([still.new_zeros(still.shape), self.sin], dim=1),
        )
