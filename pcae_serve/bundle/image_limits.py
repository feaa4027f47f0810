"""Check an image file's type and layout before it is decoded.

Each limit rejects files that would occupy a decoder for seconds or fill memory, as measured in
benchmarks/records/2026-11-24_input. Files of cameras and common programs stay far below all limits.
"""

import io
import re
import struct
from collections.abc import Callable

from pcae_serve.bundle import unsupported_types
from pcae_serve.bundle.image_files import bmp, gif, jpeg, png, tiff, webp
from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.errors import TooLarge, UnreadableImage, UnsupportedType

#: Magic bytes of each supported type, by Pillow's name for it. A file that matches but cannot be
#: opened is damaged; a file that matches none is of an unsupported type.
MAGIC = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "BMP": re.compile(rb"BM"),
    "GIF": re.compile(rb"GIF8"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
}

#: Maximum pixels per side. Each row adds memory of its own: 50,000,000 rows of one pixel take 1 GB.
MAX_SIDE = 100_000

_READERS: dict[str, Callable[[bytes], Layout]] = {
    "JPEG": jpeg.read_layout,
    "PNG": png.read_layout,
    "WEBP": webp.read_layout,
    "BMP": bmp.read_layout,
    "GIF": gif.read_layout,
    "TIFF": tiff.read_layout,
}
#: Return the file without the metadata that Pillow need not read; other files are read whole.
_ESSENTIAL: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": jpeg.essential,
    "PNG": png.essential,
    "TIFF": tiff.essential,
}


class BoundedReader(io.BytesIO):
    """A file in memory that limits the number of reads.

    Pillow's parsers are loops in Python that read a few bytes at a time: a header of millions of
    empty parts would hold the interpreter's lock for seconds. Files of common programs need at most
    one read per 128 bytes (comments in a GIF). The limit is that plus 10,000.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self._reads_left = 10_000 + len(body) // 128

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise OSError("the file has too many parts")
        return super().read(size)


def read_layout(body: bytes, max_pixels: int) -> Layout:
    """Return what an image file's header says about the work of decoding it.

    Raises UnsupportedType if its type is not in MAGIC, UnreadableImage if it is empty, damaged or
    has too many parts, and TooLarge if it has too many pixels.
    """
    if not body:
        raise UnreadableImage("the request body is empty; send the image file's bytes")
    kind = next((name for name, magic in MAGIC.items() if magic.match(body)), None)
    if kind is None:
        raise UnsupportedType(unsupported_types.describe(body, ", ".join(MAGIC)))
    try:
        layout = _READERS[kind](body)
    except (struct.error, IndexError):
        raise UnreadableImage("the image's header is truncated or damaged") from None
    check_size(layout.width, layout.height, max_pixels)
    if layout.part_pixels > max_pixels:
        raise TooLarge(
            f"the image has tiles of {layout.part_pixels:,} pixels, over the limit of"
            f" {max_pixels:,}; save it with smaller ones"
        )
    return layout


def essential(kind: str, body: bytes) -> bytes:
    """Return the file without metadata, which Pillow reads in more than linear time."""
    return _ESSENTIAL[kind](body) if kind in _ESSENTIAL else body


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise TooLarge if an image has too many pixels to decode."""
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} x {height} pixels, over the limit of {max_pixels:,};"
            " scale it down"
        )
    if max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"the image has {width} x {height} pixels, over the limit of {MAX_SIDE:,} per side;"
            " split it"
        )
