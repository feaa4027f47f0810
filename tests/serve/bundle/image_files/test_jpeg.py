"""JPEG files: what reaches the decoder, and files without an end marker."""

import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcae_serve.bundle.image_files import jpeg
from pcae_serve.bundle.preprocess import decode_image, read_picture
from pcae_serve.errors import RequestError, UnreadableImage
from tests.support.odd_images import exif, noise, photo, save

PLAIN = save(photo(), "JPEG", quality=90)
END = b"\xff\xd9"


def segment(number: int, content: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", 2 + len(content)) + content


#: As cameras, phones and programs write it, in front of the picture.
METADATA = {
    "exif with a preview": segment(1, exif(1).tobytes() + PLAIN),
    "several exif segments": segment(1, exif(1).tobytes()) + segment(1, b"Exif\0\0" + bytes(9)),
    "profile in four segments": b"".join(
        segment(2, b"ICC_PROFILE\0" + bytes([i + 1, 4]) + bytes(60_000)) for i in range(4)
    ),
    "profile with a segment missing": segment(2, b"ICC_PROFILE\0\1\2" + bytes(100)),
    "xmp": segment(1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
    "depth map in extended xmp": segment(1, b"http://ns.adobe.com/xmp/extension/\0" * 900) * 150,
    "several pictures": segment(2, b"MPF\0II*\0junk"),
    "photoshop": segment(13, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 500),
    "thermal image": segment(3, b"DJI" * 20_000) * 40,
    "content credentials": segment(11, b"JP\0\1" * 16_000) * 160,
    "comments": b"\xff\xfe\0\7hello" * 100,
    "stuffing": b"\xff" * 100,
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_changes_no_pixel_and_reaches_no_decoder(name: str) -> None:
    body = PLAIN[:2] + METADATA[name] + PLAIN[2:]
    assert jpeg.essential(body) == PLAIN
    np.testing.assert_array_equal(decode_image(body), decode_image(PLAIN))


def test_what_decides_on_colours_stays() -> None:
    cmyk = save(photo().convert("CMYK"), "JPEG")
    assert b"Adobe" in jpeg.essential(cmyk)
    assert jpeg.essential(PLAIN) == PLAIN


@pytest.mark.parametrize("share", [0, 1])
def test_the_orientation_is_found_in_front_of_and_behind_other_segments(share: int) -> None:
    fill = METADATA["profile in four segments"]
    parts = [segment(1, exif(6).tobytes()), fill]
    body = PLAIN[:2] + b"".join(parts[::-1] if share else parts) + PLAIN[2:]
    assert decode_image(body).size == (30, 40)


def test_the_orientation_of_xmp_counts_if_exif_has_none() -> None:
    xmp = segment(1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')
    assert decode_image(PLAIN[:2] + xmp + PLAIN[2:]).size == (30, 40)
    both = segment(1, exif(1).tobytes()) + xmp
    assert decode_image(PLAIN[:2] + both + PLAIN[2:]).size == (40, 30)


def test_thousands_of_segments_are_refused() -> None:
    """38,000 small EXIF segments behind 280 large ones took minutes."""
    body = PLAIN[:2] + segment(1, b"Exif\0\0" + bytes(65_000)) * 15 + segment(1, b"Exif\0\0") * 4000
    with pytest.raises(UnreadableImage, match="2,048 segments"):
        jpeg.read_layout(body + PLAIN[2:])


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "all colours": {"subsampling": 0},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_end_marker_is_missing(kind: str, mode: str) -> None:
    body = save(noise().convert(mode), "JPEG", **KINDS[kind])
    whole = decode_image(body)
    for short in (body[:-2], body[:-1], body[:-2] + bytes(50)):
        np.testing.assert_array_equal(decode_image(short), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_is_refused(kind: str) -> None:
    """Also if it would be decoded at a reduced scale, which does not show all that is missing."""
    body = save(noise(), "JPEG", **KINDS[kind])
    whole = np.asarray(decode_image(body))
    for length in [*range(2, len(body) - 40, 97), *range(len(body) - 40, len(body) - 2)]:
        try:
            picture = read_picture(body[:length], short=8)
        except RequestError:
            continue
        np.testing.assert_array_equal(picture.image, whole)


def test_a_scan_is_missing() -> None:
    """Every scan is whole, but the last one is not there."""
    body = save(photo(), "JPEG", progressive=True)
    with pytest.raises(UnreadableImage, match="its end is missing"):
        decode_image(body[: body.rindex(b"\xff\xda")])


def test_bytes_behind_the_end_are_not_its_end() -> None:
    film = PLAIN + b"\xff\xda\0\2film" * 1000
    np.testing.assert_array_equal(decode_image(film), decode_image(PLAIN))
    assert isinstance(decode_image(film), Image.Image)
