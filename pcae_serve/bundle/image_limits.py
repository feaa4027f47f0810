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

#: Maximum scans of a JPEG. A scan of 100 bytes can cover the whole image; programs write 10 to 18.
MAX_SCANS = 32

#: Maximum segments of a JPEG whose scans must be counted.
MAX_SEGMENTS = 10_000

#: Maximum strips or tiles of a TIFF: Pillow creates an object for each.
MAX_PARTS = 65_536

_READERS: dict[str, Callable[[bytes], Layout]] = {
    "JPEG": jpeg.read_layout,
    "PNG": png.read_layout,
    "WEBP": webp.read_layout,
    "BMP": bmp.read_layout,
    "GIF": gif.read_layout,
    "TIFF": tiff.read_layout,
}

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # without the restarts inside a scan
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA
_TILE_WIDTH, _TILE_LENGTH, _STRIP_OFFSETS, _TILE_OFFSETS = 322, 323, 273, 324
_SHORT, _LONG = 3, 4


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


def check_header(body: bytes, max_pixels: int) -> str:
    """Return the type of an image file by its magic bytes, as Pillow names it.

    Raises UnsupportedType if it is not in MAGIC, and UnreadableImage or TooLarge if the file is
    empty or its layout exceeds a limit.
    """
    if not body:
        raise UnreadableImage("the request body is empty; send the image file's bytes")
    kind = next((name for name, magic in MAGIC.items() if magic.match(body)), None)
    if kind is None:
        raise UnsupportedType(unsupported_types.describe(body, ", ".join(MAGIC)))
    try:
        if kind == "JPEG":
            _check_jpeg(body)
        elif kind == "PNG":
            _check_png(body)
        elif kind == "TIFF":
            _check_tiff(body, max_pixels)
    except struct.error:
        raise UnreadableImage("the image's header is truncated or damaged") from None
    return kind


def read_layout(body: bytes, max_pixels: int) -> Layout:
    """Return what an image file's header says about the work of decoding it.

    Raises UnreadableImage, UnsupportedType or TooLarge.
    """
    kind = check_header(body, max_pixels)
    try:
        layout = _READERS[kind](body)
    except (struct.error, IndexError):
        raise UnreadableImage("the image's header is truncated or damaged") from None
    check_size(layout.width, layout.height, max_pixels)
    return layout


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


def _check_jpeg(body: bytes) -> None:
    """Limit scans, counted as libjpeg finds them: other data may contain the same bytes."""
    if body.count(bytes([0xFF, _SOS])) <= MAX_SCANS:
        return
    at = scans = 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(body, at)
        if found is None or (marker := found[0][1]) == _EOI:
            return
        at, scans = found.end(), scans + (marker == _SOS)
        if scans > MAX_SCANS:
            break
        if marker not in (_TEM, _SOI):  # all other segments start with their length
            at += int.from_bytes(body[at : at + 2])
    raise UnreadableImage(
        f"the JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS:,} segments; save it again"
    )


def _check_png(body: bytes) -> None:
    """Allow one colour profile, as the standard does: Pillow inflates each, to up to 1 MB."""
    if body.count(b"iCCP") < 2:
        return
    at, profiles = 8, 0
    while at + 8 <= len(body):
        length, kind = struct.unpack_from(">I4s", body, at)
        profiles += kind == b"iCCP"
        if profiles > 1:
            raise UnreadableImage("the PNG has more than one colour profile; save it again")
        at += 12 + length


def _check_tiff(body: bytes, max_pixels: int) -> None:
    """Check strips and tiles: a tile is decoded whole, even if the image uses little of it."""
    order = "<" if body.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", body, 4)
    (entries,) = struct.unpack_from(order + "H", body, at)
    sides = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    for start in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", body, start)
        if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) and count > MAX_PARTS:
            raise UnreadableImage(
                f"the TIFF has {count} strips or tiles, over the limit of {MAX_PARTS:,};"
                " save it with larger ones"
            )
        if tag in sides:
            if count != 1 or kind not in (_SHORT, _LONG):
                raise UnreadableImage("the TIFF has an invalid tile size")
            format_ = order + ("H" if kind == _SHORT else "I")
            (side,) = struct.unpack_from(format_, body, start + 8)
            sides[tag] = max(sides[tag], side)  # if a tag occurs twice, readers may use either
    width, length = sides.values()
    if width * length > max_pixels:
        raise TooLarge(
            f"the TIFF has tiles of {width} x {length} pixels, over the limit of {max_pixels:,};"
            " save it with smaller ones"
        )
