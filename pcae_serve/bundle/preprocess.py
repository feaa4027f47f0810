"""Image bytes to the uint8 pixels a model takes: one path for serving, export and evaluation.

It knows image files and sizes, nothing of models: scaling and normalising happen inside the graph.

Any image becomes 8-bit RGB by one rule, that of `Image.convert("RGB")`, which torchvision, timm and
Hugging Face's processors follow too, but where it would lose the picture:

- transparency is dropped: a pixel has the colour that lies under it, no background is put there;
- grey becomes three equal channels, a palette its colours, CMYK and YCbCr their plain formulas
  (in a JPEG, CMYK is inverted, as Adobe writes it); colour profiles are not applied;
- samples of 16 bits keep the high 8, those of 12 bits in a TIFF too (Pillow alone would clip grey);
- 32-bit and signed 16-bit grey, floats and Lab are refused: they name no range for black and white;
- of several frames, pages or pictures the first counts.
"""

import contextlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pcae_serve.bundle import image_limits
from pcae_serve.errors import TooLarge, UnreadableImage, UnsupportedType, one_line

# Pillow warns of damage that it can do without. Each text is printed once and then remembered for
# ever, and clients choose what it says: they could fill the log and the memory.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # an error of a file is its client's to know

#: Pixels an image may have before it is decoded; four times a 12-megapixel photograph.
MAX_PIXELS = 50_000_000

#: A JPEG is decoded at 1/2, 1/4 or 1/8 where its shorter side stays this many times `resize`.
REDUCED = 2

#: Modes that the rule above covers beside 16-bit grey.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


class _Turn(NamedTuple):
    """How an image is made upright, and where the edges go that may be padded."""

    method: Image.Transpose
    on_its_side: bool  # width and height change places
    right_is_left: bool  # the upright image's left edge is what was decoded last of a row
    bottom_is_top: bool  # the upright image's upper edge, likewise of a column


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
    size: tuple[int, int]  # the file's own, upright
    box: tuple[float, float, float, float]  # what the picture takes of `image`: the rest is padding

    @classmethod
    def whole(cls, image: Image.Image) -> "Picture":
        """Decoded at full scale."""
        return cls(image, image.size, (0, 0, *image.size))


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, crop the centre; mean and std per channel, of values in [0, 1].

    squash: resize both sides to image_size instead, as Hugging Face's ViTs were trained.
    """

    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling = Image.Resampling.BICUBIC
    squash: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.image_size <= self.resize:
            raise ValueError(f"cannot crop {self.image_size} pixels out of {self.resize}")
        if self.squash and self.image_size != self.resize:
            raise ValueError("what is squashed to its size is not cropped")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocess":
        """Read a Hugging Face preprocessor_config.json.

        Raises KeyError where a field is missing, ValueError for what is not supported.
        """
        size = config["size"]
        squash = "shortest_edge" not in size and not config.get("do_center_crop", False)
        side = size["shortest_edge"] if "shortest_edge" in size else size["height"]
        crop = size if squash else config.get("crop_size", {"height": side, "width": side})
        if crop["height"] != crop["width"]:
            raise ValueError("images that are not square are not supported")
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor must be 1/255, not {config['rescale_factor']}")
        plain = not config.get("do_normalize", True)
        return cls(
            image_size=int(crop["height"]),
            resize=int(side),
            mean=(0.0,) * 3 if plain else tuple(config["image_mean"]),
            std=(1.0,) * 3 if plain else tuple(config["image_std"]),
            resample=Image.Resampling(config["resample"]),
            squash=squash,
        )

    def to_config(self) -> dict[str, Any]:
        """The same as a Hugging Face preprocessor_config.json."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.resize, "width": self.resize}
            if self.squash
            else {"shortest_edge": self.resize},
            "resample": int(self.resample),
            "do_center_crop": not self.squash,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def same_pixels(self, other: "Preprocess") -> bool:
        """Whether both make the same pixels; mean and std come later, inside the graph."""
        return replace(self, mean=other.mean, std=other.std) == other

    def __call__(self, body: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """An image file's bytes to pixels [H, W, 3], H = W = image_size.

        A JPEG at least 2 * REDUCED times as large as `resize` is decoded at a reduced scale. In
        photographs, at most one value in 1,000 then differs by more than 5 of 255, none was seen
        to by more than 11, and the mean is 0.7 at most; lines two pixels apart, the worst there
        is, differ by up to 32 (benchmarks/records/2026-11-24_input).
        """
        return self.crop(read_picture(body, max_pixels, REDUCED * self.resize))

    def crop(self, image: "Image.Image | Picture") -> NDArray[np.uint8]:
        """An RGB image to pixels [H, W, 3]: shorter side to `resize`, then the centre.

        Only the centre is ever made: whole, a strip would grow beyond any memory. What is cut is
        told by the file's own size, so that the scale of decoding moves nothing.
        """
        picture = Picture.whole(image) if isinstance(image, Image.Image) else image
        image, size, (left, top, right, bottom) = picture
        sides = (self.image_size, self.image_size)
        if self.squash:
            return np.asarray(image.resize(sides, self.resample, picture.box), dtype=np.uint8)
        short = min(size)
        resized = [s * self.resize // short for s in size]  # rounded down, as torchvision
        x, y = ((side - self.image_size) // 2 for side in resized)
        centre = (x, y, x + self.image_size, y + self.image_size)
        if short == self.resize:
            return np.asarray(image.crop(centre), dtype=np.uint8)
        across, down = (right - left) / resized[0], (bottom - top) / resized[1]
        box = (
            left + centre[0] * across,
            top + centre[1] * down,
            left + centre[2] * across,
            top + centre[3] * down,
        )
        return np.asarray(image.resize(sides, self.resample, box), dtype=np.uint8)


def decode_image(body: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file's bytes to an upright RGB image, as large as the file. Raises as `read`."""
    return read_picture(body, max_pixels).image


def read_picture(body: bytes, max_pixels: int = MAX_PIXELS, short: int | None = None) -> Picture:
    """An image file's bytes to an upright RGB image, of which `short` pixels a side may do.

    Raises UnreadableImage (empty, truncated, damaged), UnsupportedType (no type in
    image_limits.MAGIC, or samples without a range) or TooLarge (read from the header, before any
    pixel is decoded).
    Pillow's own limit, about 179 million pixels, stays in force above `max_pixels`, and is the one
    up to which a GIF's header may take memory, a byte a pixel.
    """
    if not body:
        raise UnreadableImage("the request body is empty: send the image file's bytes")
    kind = image_limits.check_header(body, max_pixels)
    try:
        image = Image.open(image_limits.BoundedReader(body), formats=[kind])
    except UnidentifiedImageError:
        raise UnreadableImage("the image's header is truncated or damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # -W error raises both
        raise TooLarge(f"the image has more than {max_pixels:,} pixels: scale it down") from None
    except MemoryError:  # it may be a good image
        raise
    except Exception as error:  # Pillow's parsers raise many kinds on hostile headers
        raise UnreadableImage(f"the image cannot be read: {one_line(error)}") from None
    image_limits.check_size(*image.size, max_pixels)
    _check_samples(image)
    try:
        return _picture(image, short)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(
            f"the {kind} image is truncated or damaged: {one_line(error)}"
        ) from None


def _check_samples(image: Image.Image) -> None:
    """Raises UnsupportedType for an image that has no one reading as 8-bit RGB."""
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise UnsupportedType(
            f"the {image.format} image's samples (Pillow calls them {image.mode}) have no agreed"
            " range: save it with 8 or 16 bits, unsigned"
        )
    if image.format == "BMP" and image.info.get("compression") in (1, 2):
        # Pillow decodes these byte by byte in Python: 100 bytes can take seconds
        raise UnsupportedType("run-length BMPs are not read: save it uncompressed, or as PNG")


def _picture(image: Image.Image, short: int | None) -> Picture:
    """Decoded, made RGB and turned, with the place of the picture in it.

    A side that the scale does not divide ends in a pixel that the picture fills in part.
    """
    size = image.size
    reduced = image.draft(None, (short, short)) if short else None  # None where it is no JPEG
    image.load()
    width, height = reduced[1][2:] if reduced else image.size
    turn, upright = _turn(image), _rgb(image)
    if upright is not image:
        image.close()  # lets its pixels go before they are turned
    if turn is None:
        return Picture(upright, size, (0, 0, width, height))
    upright = upright.transpose(turn.method)
    if turn.on_its_side:
        size, (width, height) = size[::-1], (height, width)
    left = upright.width - width if turn.right_is_left else 0
    top = upright.height - height if turn.bottom_is_top else 0
    return Picture(upright, size, (left, top, left + width, top + height))


def _turn(image: Image.Image) -> _Turn | None:
    """As its EXIF orientation says; a broken tag is no reason to refuse good pixels."""
    with contextlib.suppress(Exception):
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of the rule to RGB."""
    if image.mode == "RGB":
        return image  # convert would copy it
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        high = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            high = 255 - high
        return Image.fromarray(high).convert("RGB")
    image.info.pop("transparency", None)  # Pillow would warn that RGB cannot hold a palette's
    return image.convert("RGB")
