"""Decode one image file, for threads and processes; lack of memory is not reported as damage."""

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import UnreadableImage


def decode_image(
    preprocess: Preprocess, body: bytes, max_pixels: int, needed_bytes: int
) -> NDArray[np.uint8]:
    """Decode an image file to pixels uint8 [H, W, 3].

    needed_bytes: what decoding takes at most. Raises MemoryError if there is less, and what
    `preprocess` raises: the libraries behind Pillow report a failed allocation as a damaged file.
    """
    try:
        return preprocess(body, max_pixels)
    except UnreadableImage:
        np.empty(needed_bytes, np.uint8)  # raises MemoryError; nothing is written to it
        raise
