"""Pixels to verify and measure on: decoded image files, or generated images."""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pcae_serve.engines.base import Pixels
from pcae_training.data import LabelledImages

#: What an option for images takes, for help texts.
IMAGES_HELP = "class folders, a folder of images, parquet files or a hub name"


def decode(images: LabelledImages, rows: Sequence[int]) -> Pixels:
    """Decode image files as a request is decoded; return pixels uint8 [N, H, W, 3]."""
    return np.stack([images[row][0].permute(1, 2, 0).numpy() for row in rows])


def generate(count: int, size: int) -> Pixels:
    """Return cloudy colour images uint8 [count, size, size, 3], the same on every call.

    They contain noise at every scale from the whole image to one pixel, as photographs do, so no
    two patches are equal. They show whether graphs compute the same, not how accurate they are.
    """
    draw = np.random.Generator(np.random.PCG64(0))
    noise = np.zeros((count, size, size, 3), np.float32)
    side = 2
    while side < 2 * size:
        grid = draw.random((count, side, side, 3), dtype=np.float32) - 0.5
        for image, cells in zip(noise, grid, strict=True):
            for channel in range(3):
                coarse = Image.fromarray(cells[..., channel])
                smooth = coarse.resize((size, size), Image.Resampling.BICUBIC)
                image[..., channel] += np.asarray(smooth)
        side *= 2
    return (255 / (1 + np.exp(-2 * noise))).astype(np.uint8)


def parity_pixels(images: LabelledImages | None, count: int, size: int, least: int) -> Pixels:
    """Return up to `count` images to compare graphs on, uint8 [N, size, size, 3].

    Generated ones if there are none, or to reach the `least` number that a comparison needs.
    """
    if images is None:
        return generate(count, size)
    pixels = decode(images, range(min(count, len(images))))
    if len(pixels) < count:
        added = max(0, least - len(pixels))
        more = f" and {added} generated ones" if added else ""
        print(f"note: graphs are compared on {len(pixels)} images{more}", file=sys.stderr)
        pixels = np.concatenate([pixels, generate(added, size)]) if added else pixels
    return pixels


def shuffle_rows(count: int) -> list[int]:
    """Return row numbers 0 to count - 1 in a fixed random order: class folders are sorted."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order
