"""Image bytes to the uint8 pixels a model takes: one path for serving, export and evaluation.

It knows image files and sizes, nothing of models: scaling and normalising happen inside the graph.
"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pcae_serve.errors import TooLarge, UnreadableImage, UnsupportedType, one_line

#: The image types read, as Pillow names them; a body's type is told by its magic bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

#: How a file of these types begins: what begins so and cannot be opened is damaged, not foreign.
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")

#: Pixels an image may have before it is decoded; four times a 12-megapixel photograph.
MAX_PIXELS = 50_000_000


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
        """An image file's bytes to pixels [H, W, 3], H = W = image_size."""
        return self.crop(decode(body, max_pixels))

    def crop(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB image to pixels [H, W, 3]: shorter side to `resize`, then the centre.

        Only the centre is ever made: whole, a strip one pixel high would grow beyond any memory.
        """
        if self.squash:
            return np.asarray(image.resize((self.image_size,) * 2, self.resample), dtype=np.uint8)
        short = min(image.size)
        resized = [s * self.resize // short for s in image.size]  # rounded down, as torchvision
        left, top = ((side - self.image_size) // 2 for side in resized)
        centre = (left, top, left + self.image_size, top + self.image_size)
        if short == self.resize:
            return np.asarray(image.crop(centre), dtype=np.uint8)
        across, down = (s / r for s, r in zip(image.size, resized, strict=True))
        box = (centre[0] * across, centre[1] * down, centre[2] * across, centre[3] * down)
        sides = (self.image_size, self.image_size)
        return np.asarray(image.resize(sides, self.resample, box), dtype=np.uint8)


def decode(body: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file's bytes to an upright RGB image.

    Raises UnreadableImage (empty, truncated, damaged), UnsupportedType (no type in FORMATS) or
    TooLarge (told from the header, before any pixel is decoded). Pillow's own limit, about 179
    million pixels, stays in force above `max_pixels`.
    """
    if not body:
        raise UnreadableImage("the request body is empty: send the image file's bytes")
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except UnidentifiedImageError:
        if body.startswith(MAGIC):
            raise UnreadableImage("the image's header is truncated or damaged") from None
        raise UnsupportedType(
            f"the body is none of {', '.join(FORMATS)} (told by its first bytes)"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # -W error raises both
        raise TooLarge(f"the image has more than {max_pixels:,} pixels: scale it down") from None
    except Exception as error:  # Pillow's parsers raise many kinds on hostile headers
        raise UnreadableImage(f"the image cannot be read: {one_line(error)}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} x {height} pixels, over the limit of {max_pixels:,}:"
            " scale it down"
        )
    try:
        image.load()
        return _rgb(_upright(image))
    except Exception as error:
        raise UnreadableImage(
            f"the {image.format} image is truncated or damaged: {one_line(error)}"
        ) from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; a broken tag is no reason to refuse good pixels."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency is dropped, 16-bit grey keeps its high byte."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # Pillow would warn that RGB cannot hold a palette's
    return image.convert("RGB")
