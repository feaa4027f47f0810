"""Decode image bytes to a model's uint8 pixels, in the same way for serving, export and evaluation.

Scaling to [0, 1] and normalising happen inside the graph. Every image is converted to 8-bit RGB as
by `Image.convert("RGB")`, which torchvision, timm and Hugging Face's processors use too, except
where that would destroy the picture:

- transparency is dropped: a pixel keeps its own colour, and no background is blended in;
- grey becomes three equal channels, a palette its colours, CMYK and YCbCr are converted by their
  plain formulas (in a JPEG, CMYK is inverted, as Adobe writes it); colour profiles are not applied;
- 16-bit samples keep their high 8 bits, as do 12-bit samples of a TIFF (Pillow would clip grey);
- 32-bit and signed 16-bit grey, floats and Lab are rejected: their black and white are undefined;
- of several frames, pages or pictures, the first is used.
"""

import logging
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

from pcae_serve.bundle import image_limits
from pcae_serve.bundle.image_files import jpeg
from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.errors import TooLarge, UnreadableImage, UnsupportedType, one_line

# Pillow warns about harmless damage. Python remembers each distinct warning text, and clients
# determine these texts, so they could fill the log and memory.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # errors of a file are returned to its client

#: Maximum pixels of an image, checked before decoding: four times a 12-megapixel photograph.
MAX_PIXELS = 50_000_000

#: A JPEG is decoded at scale 1/2, 1/4 or 1/8 if its shorter side stays at least this many times
#: `resize`.
REDUCED = 2

#: Pillow's modes that the rule above covers, in addition to 16-bit grey.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags and a value
_ORIENTATION = 274  # EXIF tag


class _Turn(NamedTuple):
    """How an image is turned upright, and which edges the decoder's padding moves to."""

    method: Image.Transpose
    on_its_side: bool  # width and height are swapped
    right_is_left: bool  # the decoded image's right edge becomes the upright image's left edge
    bottom_is_top: bool  # its bottom edge becomes the top edge


#: By EXIF orientation.
_TURNS = {
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: _Turn(Image.Transpose.ROTATE_180, False, True, True),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: _Turn(Image.Transpose.TRANSPOSE, True, False, False),
    6: _Turn(Image.Transpose.ROTATE_270, True, True, False),
    7: _Turn(Image.Transpose.TRANSVERSE, True, True, True),
    8: _Turn(Image.Transpose.ROTATE_90, True, False, True),
}


class Picture(NamedTuple):
    """An upright RGB image, which may have been decoded at a reduced scale."""

    image: Image.Image
    size: tuple[int, int]  # of the file, upright
    box: tuple[float, float, float, float]  # part of `image` with the picture; the rest is padding

    @classmethod
    def whole(cls, image: Image.Image) -> "Picture":
        """Return an image that was decoded at full scale."""
        return cls(image, image.size, (0, 0, *image.size))


@dataclass(frozen=True)
class Preprocess:
    """Resizes the shorter side and crops the centre. mean, std: per channel, of values in [0, 1].

    squash: resize both sides to `resize` instead, as for Hugging Face's ViTs and DeiT. crop_offset:
    how half a pixel at the crop's edge is rounded, half-even as in torchvision.
    """

    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling = Image.Resampling.BICUBIC
    squash: bool = False
    crop_offset: Literal["floor", "half-even"] = "floor"

    def __post_init__(self) -> None:
        if not 0 < self.image_size <= self.resize:
            raise ValueError(f"cannot crop {self.image_size} pixels out of {self.resize}")

    def to_config(self) -> dict[str, Any]:
        """Return the content of a Hugging Face preprocessor_config.json."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.resize, "width": self.resize}
            if self.squash
            else {"shortest_edge": self.resize},
            "resample": int(self.resample),
            "do_center_crop": not self.squash or self.image_size != self.resize,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        } | ({} if self.crop_offset == "floor" else {"crop_offset": self.crop_offset})

    def same_pixels(self, other: "Preprocess") -> bool:
        """Return whether both produce the same pixels, which do not depend on mean and std."""
        return replace(self, mean=other.mean, std=other.std) == other

    def __call__(self, body: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Decode an image file to pixels uint8 [H, W, 3], H = W = image_size.

        A JPEG at least 2 * REDUCED times as large as `resize` is decoded at a reduced scale. In
        photographs, at most one value in 1,000 then differs by more than 5 of 255, the largest
        observed difference is 11, and the mean is at most 0.7; for lines two pixels apart, the
        worst case, values differ by up to 32 (benchmarks/records/2026-11-24_input).
        """
        return self.crop(read_picture(body, max_pixels, REDUCED * self.resize))

    def crop(self, image: "Image.Image | Picture") -> NDArray[np.uint8]:
        """Resize an RGB image and crop the centre: uint8 [H, W, 3].

        Only the centre is resized, because a long strip, resized whole, could fill the memory. The
        crop is computed from the file's own size, so it does not depend on the scale of decoding.
        """
        picture = Picture.whole(image) if isinstance(image, Image.Image) else image
        image, size, (left, top, right, bottom) = picture
        sides = (self.image_size, self.image_size)
        resized = self._resized(size)
        x, y = (self._offset(side) for side in resized)
        centre = (x, y, x + self.image_size, y + self.image_size)
        if resized == size:
            return np.asarray(image.crop(centre), dtype=np.uint8)
        across, down = (right - left) / resized[0], (bottom - top) / resized[1]
        box = (
            left + centre[0] * across,
            top + centre[1] * down,
            min(right, left + centre[2] * across),  # rounding must not put it outside
            min(bottom, top + centre[3] * down),
        )
        return np.asarray(image.resize(sides, self.resample, box), dtype=np.uint8)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of the whole image after resizing."""
        if self.squash:
            return self.resize, self.resize
        width, height = (s * self.resize // min(size) for s in size)  # down, as in torchvision
        return width, height

    def _offset(self, side: int) -> int:
        """Return where the crop of a resized side begins."""
        spare = side - self.image_size
        return round(spare / 2) if self.crop_offset == "half-even" else spare // 2


def decode_image(body: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to an upright RGB image at full size. Raises like `read_picture`."""
    return read_picture(body, max_pixels).image


def read_picture(body: bytes, max_pixels: int = MAX_PIXELS, short: int | None = None) -> Picture:
    """Decode an image file to an upright RGB image.

    short: number of pixels that the shorter side needs; a JPEG may be decoded at a reduced scale
    that keeps them. Raises UnreadableImage (empty, truncated, damaged), UnsupportedType (a type not
    in image_limits.MAGIC, or samples without a defined range) or TooLarge (from the header, before
    any pixel is decoded). Pillow's own limit of about 179 million pixels remains in force above
    `max_pixels`; up to it, a GIF's header may allocate one byte per pixel.
    """
    layout = image_limits.read_layout(body, max_pixels)
    body = image_limits.essential(layout.kind, body)
    if layout.ended:
        return _read(body, layout, max_pixels, short)
    return _read_unended(body, layout, max_pixels)


def upright_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a Pillow image as upright RGB, as `read_picture` does with a file.

    Raises UnreadableImage if its file is truncated or damaged, UnsupportedType if its samples have
    no defined range, or TooLarge.
    """
    image_limits.check_size(*image.size, max_pixels)
    if 0 in image.size:
        raise UnreadableImage("the image has no pixels")
    try:
        image.load()
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(f"the image cannot be read: {one_line(error)}") from None
    _check_samples(image)
    # a copy: the conversion removes the transparency from the image's metadata
    rgb = _rgb(image.copy() if "transparency" in image.info else image)
    return rgb if turn is None else rgb.transpose(turn.method)


def _read_unended(body: bytes, layout: Layout, max_pixels: int) -> Picture:
    """Decode a JPEG that lacks its end marker. Raises UnreadableImage if it lacks more."""
    if jpeg.is_complete(body):
        picture, *others = (
            partial(_read, ended, layout, max_pixels) for ended in jpeg.with_end(body)
        )
        first = picture()
        if not any(ImageChops.difference(first.image, other().image).getbbox() for other in others):
            return first
    raise UnreadableImage("the JPEG image is truncated or damaged: its end is missing")


def _read(body: bytes, layout: Layout, max_pixels: int, short: int | None = None) -> Picture:
    """Decode the essential parts of a file."""
    kind = layout.kind
    try:
        image = Image.open(image_limits.BoundedReader(body), formats=[kind])
    except UnidentifiedImageError:
        raise UnreadableImage("the image's header is truncated or damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # -W error raises both
        raise TooLarge(f"the image has more than {max_pixels:,} pixels; scale it down") from None
    except MemoryError:  # the image may be valid
        raise
    except Exception as error:  # Pillow's parsers raise many types on hostile headers
        raise UnreadableImage(f"cannot read the image: {one_line(error)}") from None
    image_limits.check_size(*image.size, max_pixels)
    if image.width * image.height != layout.pixels:
        raise UnreadableImage("the image's header contradicts itself")
    _check_samples(image)
    turn = None if kind == "TIFF" else _TURNS.get(layout.orientation)  # Pillow turns a TIFF
    try:
        return _picture(image, short, turn)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(
            f"the {kind} image is truncated or damaged: {one_line(error)}"
        ) from None


def _check_samples(image: Image.Image) -> None:
    """Raise UnsupportedType if an image's conversion to 8-bit RGB is not defined."""
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise UnsupportedType(
            f"the {image.format or 'Pillow'} image's samples (Pillow mode {image.mode}) have no"
            " defined range;"
            " save it with 8 or 16 unsigned bits per sample"
        )
    if image.format == "BMP" and image.info.get("compression") in (1, 2):
        # Pillow decodes these byte by byte in Python: 100 bytes can take seconds
        raise UnsupportedType(
            "run-length encoded BMP is not supported; save it uncompressed, or as PNG"
        )


def _picture(image: Image.Image, short: int | None, turn: _Turn | None) -> Picture:
    """Decode an image, convert it to RGB and turn it upright.

    If the scale does not divide a side, the picture covers the side's last pixel only in part.
    """
    size = image.size
    reduced = image.draft(None, (short, short)) if short else None  # None unless it is a JPEG
    image.load()
    width, height = reduced[1][2:] if reduced else image.size
    upright = _rgb(image)
    if upright is not image:
        image.close()  # frees its pixels before the turn allocates more
    if turn is None:
        return Picture(upright, size, (0, 0, width, height))
    upright = upright.transpose(turn.method)
    if turn.on_its_side:
        size, (width, height) = size[::-1], (height, width)
    left = upright.width - width if turn.right_is_left else 0
    top = upright.height - height if turn.bottom_is_top else 0
    return Picture(upright, size, (left, top, left + width, top + height))


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any supported mode to RGB."""
    if image.mode == "RGB":
        return image  # convert would copy it
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        high = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            high = 255 - high
        return Image.fromarray(high).convert("RGB")
    image.info.pop("transparency", None)  # else Pillow warns that RGB cannot hold a palette's
    return image.convert("RGB")
