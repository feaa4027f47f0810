"""Pixels to prove and to measure on: decoded image files, or made ones where none are at hand.

It knows images and sizes, nothing of models or of labels.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pcae_serve.engines.base import Pixels
from pcae_training.data import LabelledImages


def decode(images: LabelledImages, rows: Sequence[int]) -> Pixels:
    """Image files to pixels [N, H, W, 3] uint8, by the way requests take."""
    return np.stack([images[row][0].permute(1, 2, 0).numpy() for row in rows])


def generate(count: int, size: int) -> Pixels:
    """Cloudy colour images [count, size, size, 3] uint8, always the same ones.

    Noise at every scale from the whole image to a pixel, as photographs have it: no two patches
    are equal. They show that graphs compute alike, and nothing of how good an answer is.
    """
    draw = np.random.Generator(np.random.PCG64(0))
    whole = np.zeros((count, size, size, 3), np.float32)
    side = 2
    while side < 2 * size:
        grid = draw.random((count, side, side, 3), dtype=np.float32) - 0.5
        for image, cells in zip(whole, grid, strict=True):
            for channel in range(3):
                coarse = Image.fromarray(cells[..., channel])
                smooth = coarse.resize((size, size), Image.Resampling.BICUBIC)
                image[..., channel] += np.asarray(smooth)
        side *= 2
    return (255 / (1 + np.exp(-2 * whole))).astype(np.uint8)
