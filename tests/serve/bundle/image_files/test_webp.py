"""WebP files: codec and metadata."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcae_serve.bundle.image_files import webp
from pcae_serve.bundle.preprocess import decode_image
from pcae_serve.errors import UnreadableImage
from tests.support.odd_images import exif, photo, save, tiff

PLAIN = save(photo(), "WEBP", lossless=True)


def test_metadata_changes_no_pixel() -> None:
    rich = save(photo(), "WEBP", lossless=True, exif=exif(1), icc_profile=bytes(9), xmp=b"<x/>")
    np.testing.assert_array_equal(decode_image(rich), decode_image(PLAIN))


def test_the_orientation_is_found() -> None:
    assert decode_image(save(photo(), "WEBP", exif=exif(6))).size == (30, 40)
    xmp = b'<x tiff:Orientation="6"/>'
    assert decode_image(save(photo(), "WEBP", xmp=xmp)).size == (30, 40)


def test_overlapping_tags_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 tags of the same megabyte."""

    def read(*_: Any) -> None:
        pytest.fail("Pillow reads all tags")

    monkeypatch.setattr(Image.Exif, "load", read)
    tags = tiff(dict.fromkeys(range(1000, 3000), (7, 1000000, 8)), bytes(1_000_000))
    body = save(photo(), "WEBP", exif=tags)
    assert decode_image(body).size == (40, 30)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("animated", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_codec_of_the_first_picture(lossless: bool, animated: bool, mode: str) -> None:
    image = photo().convert(mode)
    more = {"save_all": True, "append_images": [image.rotate(90)]} if animated else {}
    layout = webp.read_layout(save(image, "WEBP", lossless=lossless, **more))
    assert (layout.codec == "WEBP lossless") is lossless
    assert (layout.width, layout.height) == (40, 30)


def test_too_many_chunks_are_refused() -> None:
    body = save(photo(), "WEBP", exif=exif(6))
    with pytest.raises(UnreadableImage, match="10,000 chunks"):
        webp.read_layout(body + b"abcd\0\0\0\0" * 10_001)
