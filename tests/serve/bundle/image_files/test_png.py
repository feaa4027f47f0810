"""PNG files: what reaches the decoder."""

import zlib
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pcae_serve.bundle.image_files import png
from pcae_serve.bundle.preprocess import decode_image
from pcae_serve.errors import TooLarge, UnreadableImage
from tests.support.odd_images import chunk, exif, photo, save

PLAIN = save(photo(), "PNG")
HEAD = 33  # signature and header
EXIF = exif(6).tobytes().removeprefix(b"Exif\0\0")

METADATA = {
    "profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(4_000_000))),
    "many profiles": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 500,
    "text": chunk(b"tEXt", b"Comment\0" + b"x" * 5_000_000),
    "compressed text": chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000))),
    "many texts": chunk(b"tEXt", b"parameters\0a cat") * 10_000,
    "private": chunk(b"prVt", bytes(100_000)),
    "damaged gamma": chunk(b"gAMA", b""),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_changes_no_pixel_and_reaches_no_decoder(name: str) -> None:
    body = PLAIN[:HEAD] + METADATA[name] + PLAIN[HEAD:]
    assert png.essential(body) == PLAIN
    np.testing.assert_array_equal(decode_image(body), decode_image(PLAIN))


def imagemagick(data: bytes) -> bytes:
    lines = data.hex()
    return f"\nexif\n{len(data):8d}\n{lines}\n".encode()


XMP = b'<x tiff:Orientation="6"/>'
ORIENTATIONS = {
    "exif": chunk(b"eXIf", EXIF),
    "compressed": chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(imagemagick(b"Exif\0\0" + EXIF))
    ),
    "plain": chunk(b"tEXt", b"Raw profile type exif\0" + imagemagick(EXIF)),
    "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "compressed xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_orientation_is_found_wherever_programs_put_it(name: str) -> None:
    for at in (HEAD, len(PLAIN) - 12):  # in front of and behind the pixels
        body = PLAIN[:at] + ORIENTATIONS[name] + PLAIN[at:]
        assert decode_image(body).size == (30, 40)


def test_damaged_orientations_count_as_none() -> None:
    for damaged in (
        chunk(b"zTXt", b"Raw profile type exif\0\0junk"),
        chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz"),
        chunk(b"eXIf", b"II*\0"),
    ):
        assert decode_image(PLAIN[:HEAD] + damaged + PLAIN[HEAD:]).size == (40, 30)


def test_only_the_first_profile_is_inflated() -> None:
    """5,000 of them, each damaged and inflated to a megabyte, took the event loop 55 s."""
    profile = b"Raw profile type exif\0\0" + zlib.compress(bytes(1_000_000))
    body = PLAIN[:HEAD] + chunk(b"zTXt", profile) * 5_000 + PLAIN[HEAD:]
    with patch("zlib.decompressobj", wraps=zlib.decompressobj) as inflate:
        assert png.read_layout(body).orientation == 1
    assert inflate.call_count == 1


def test_the_first_of_several_headers_counts() -> None:
    """A second one would be decoded at a size that was not checked."""
    large = save(Image.new("1", (9_000, 9_000)), "PNG")
    body = PLAIN[:HEAD] + large[8:HEAD] + PLAIN[HEAD:]
    assert decode_image(body).size == (40, 30)
    with pytest.raises(TooLarge):
        decode_image(large)


def test_too_many_chunks_are_refused() -> None:
    with pytest.raises(UnreadableImage, match="20,000 chunks"):
        png.read_layout(PLAIN[:HEAD] + chunk(b"IDAT") * 30_000 + PLAIN[HEAD:])


def test_text_that_pillow_wrote() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", "grüße", zip=True)
    body = save(photo(), "PNG", pnginfo=info, icc_profile=bytes(2_000), dpi=(72, 72))
    np.testing.assert_array_equal(decode_image(body), decode_image(PLAIN))
