"""Image files made on the spot."""

import io

import numpy as np
from PIL import Image


def image_bytes(level: int = 128, kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    """A grey image; its brightness is what the simulated engine classifies by."""
    pixels = np.full((size[1], size[0], 3), level, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()
