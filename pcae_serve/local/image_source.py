"""Images as a Python program holds them, as pixels of the model's input.

Files are decoded by the server's decoder. A Pillow image or an array has been decoded already, at
full size: it is converted, resized and cropped in the same way.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pcae_serve.bounded_file import read_regular
from pcae_serve.bundle import decode_cost, image_limits
from pcae_serve.bundle.preprocess import REDUCED, Preprocess, upright_rgb
from pcae_serve.errors import RequestError, UnreadableImage
from pcae_serve.runtime import refusals
from pcae_serve.runtime.decode_call import decode_image

#: An image: the path of a file, the bytes of one, a Pillow image, or uint8 [H, W, 3] or [H, W].
ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
)

#: Largest file that is read.
MAX_FILE_BYTES = 1 << 30


def is_image(images: object) -> bool:
    """Return whether an argument is one image, not several. Raises TypeError if it is neither."""
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return True
    if isinstance(images, Iterable):
        return False
    raise _wrong_type(images)


def is_sequence(images: object) -> bool:
    """Return whether several images are all there already: a list, a tuple or an array of them."""
    return isinstance(images, Sequence | np.ndarray)


def read_pixels(image: Any, preprocess: Preprocess, max_pixels: int) -> NDArray[np.uint8]:
    """Return the pixels uint8 [H, W, 3] of an image, H = W = image_size.

    Raises OSError if a file cannot be read, a RequestError as the server does if it is not an image
    that can be decoded, TypeError for another type, and ValueError for another kind of array.
    """
    try:
        if isinstance(image, np.ndarray):
            return preprocess.crop(_from_array(image, max_pixels))
        if isinstance(image, Image.Image):
            return preprocess.crop(upright_rgb(image, max_pixels))
        if isinstance(image, bytes | bytearray | memoryview):
            body = bytes(image)
        elif isinstance(image, str | os.PathLike):
            body = read_regular(Path(image), MAX_FILE_BYTES)
        else:
            raise _wrong_type(image)
        return _from_file(body, preprocess, max_pixels)
    except MemoryError:
        raise out_of_memory() from None


def out_of_memory() -> RequestError:
    """Return the error of an image for which there is too little memory."""
    return refusals.out_of_memory().error


def _from_file(body: bytes, preprocess: Preprocess, max_pixels: int) -> NDArray[np.uint8]:
    if not body:
        raise UnreadableImage("the file is empty")
    layout = image_limits.read_layout(body, max_pixels)
    cost = decode_cost.predict(layout, len(body), REDUCED * preprocess.resize)
    return decode_image(preprocess, body, max_pixels, cost.bytes)


def _from_array(pixels: NDArray[np.uint8], max_pixels: int) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ValueError(f"an array of pixels has dtype uint8, not {pixels.dtype}")
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ValueError(
            f"an array of pixels has the shape [H, W, 3] or [H, W], not {list(pixels.shape)}"
        )
    if 0 in pixels.shape:
        raise UnreadableImage("the image has no pixels")
    image_limits.check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return Image.fromarray(pixels).convert("RGB")


def _wrong_type(image: object) -> TypeError:
    return TypeError(
        f"an image is a path, bytes, a Pillow image or a uint8 array, not {type(image).__name__}"
    )
