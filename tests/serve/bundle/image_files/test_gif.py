"""GIF files: the first frame."""

import struct

import pytest

from pcae_serve.bundle.image_files import gif
from pcae_serve.errors import UnreadableImage
from tests.support.odd_images import photo, save

PLAIN = save(photo(), "GIF")


def test_the_size_covers_screen_and_first_frame() -> None:
    body = bytearray(PLAIN)
    body[6:10] = struct.pack("<HH", 50, 3)
    layout = gif.read_layout(bytes(body))
    assert (layout.width, layout.height) == (50, 30)


def test_too_many_comments_are_refused() -> None:
    table = 13 + 3 * (2 << (PLAIN[10] & 7))
    comment = b"!\xfe" + b"\x01a" * 30_000 + b"\0"
    with pytest.raises(UnreadableImage, match="20,000 blocks"):
        gif.read_layout(PLAIN[:table] + comment + PLAIN[table:])


def test_metadata_in_front_of_the_frame() -> None:
    table = 13 + 3 * (2 << (PLAIN[10] & 7))
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 1_000 + b"\0"
    assert gif.read_layout(PLAIN[:table] + comment + PLAIN[table:]).width == 40
