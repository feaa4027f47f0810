"""What an image file says of itself, told before a decoder is let at it.

It knows how files are laid out, nothing of pixels. Every limit stands against a file that would
hold a decoder for seconds or fill memory, as measured in benchmarks/records/2026-11-24_input; what
cameras and programs write stays far below each of them.
"""

import io
import re
import struct

from pcae_serve.errors import TooLarge, UnreadableImage, UnsupportedType

#: How a file of each type that is read begins, by the name that Pillow has for it. What begins so
#: and cannot be opened is damaged; what begins otherwise is of another type.
MAGIC = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "BMP": re.compile(rb"BM"),
    "GIF": re.compile(rb"GIF8"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
}

#: Pixels of a side. A row costs memory beside its pixels: 50,000,000 rows of one pixel take 1 GB.
MAX_SIDE = 100_000

#: Scans of a JPEG. Each goes over the whole image, for as little as 100 bytes; programs write 10
#: to 18.
MAX_SCANS = 32

#: Segments of a JPEG, for one whose scans must be counted.
MAX_SEGMENTS = 10_000

#: Strips or tiles of a TIFF: Pillow makes an object for each.
MAX_PARTS = 65_536

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # but not the restarts inside a scan
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA
_TILE_WIDTH, _TILE_LENGTH, _STRIP_OFFSETS, _TILE_OFFSETS = 322, 323, 273, 324
_SHORT, _LONG = 3, 4


class BoundedReader(io.BytesIO):
    """A file in memory that ends the loops of Pillow's parsers, which run in Python.

    A parser reads some bytes at a time: a header of millions of empty parts would keep it, and
    the interpreter's lock, for seconds. What programs write needs a read in 128 bytes at most, by
    comments of a GIF; the first 10,000 are free.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self._reads_left = 10_000 + len(body) // 128

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise OSError("it is made of too many parts")
        return super().read(size)


def check_header(body: bytes, max_pixels: int) -> str:
    """The type of an image file, by its first bytes and as Pillow names it.

    Raises UnsupportedType where it is none in MAGIC; UnreadableImage or TooLarge where its layout
    is beyond a limit.
    """
    kind = next((name for name, magic in MAGIC.items() if magic.match(body)), None)
    if kind is None:
        raise UnsupportedType(f"the body is none of {', '.join(MAGIC)} (told by its first bytes)")
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


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises TooLarge for an image that is not to be decoded."""
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} x {height} pixels, over the limit of {max_pixels:,}:"
            " scale it down"
        )
    if max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"the image has {width} x {height} pixels, over the limit of {MAX_SIDE:,} a side:"
            " cut it up"
        )


def _check_jpeg(body: bytes) -> None:
    """The scans are counted as libjpeg finds them: data of other kinds may hold the same bytes."""
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
        if marker not in (_TEM, _SOI):  # all others say how long they are
            at += int.from_bytes(body[at : at + 2])
    raise UnreadableImage(
        f"the JPEG has more than {MAX_SCANS} scans, or {MAX_SEGMENTS:,} segments: save it anew"
    )


def _check_png(body: bytes) -> None:
    """One colour profile, as the standard has it: Pillow inflates each, to up to 1 MB."""
    if body.count(b"iCCP") < 2:
        return
    at, profiles = 8, 0
    while at + 8 <= len(body):
        length, kind = struct.unpack_from(">I4s", body, at)
        profiles += kind == b"iCCP"
        if profiles > 1:
            raise UnreadableImage("the PNG has more than one colour profile: save it anew")
        at += 12 + length


def _check_tiff(body: bytes, max_pixels: int) -> None:
    """A tile is decoded whole, however little of it the image shows."""
    order = "<" if body.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", body, 4)
    (entries,) = struct.unpack_from(order + "H", body, at)
    sides = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    for start in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", body, start)
        if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) and count > MAX_PARTS:
            raise UnreadableImage(
                f"the TIFF has {count} strips or tiles, over the limit of {MAX_PARTS:,}:"
                " save it with larger ones"
            )
        if tag in sides:
            if count != 1 or kind not in (_SHORT, _LONG):
                raise UnreadableImage("the TIFF says nothing sensible of its tiles' size")
            format_ = order + ("H" if kind == _SHORT else "I")
            (side,) = struct.unpack_from(format_, body, start + 8)
            sides[tag] = max(sides[tag], side)  # of a tag given twice, readers take either
    width, length = sides.values()
    if width * length > max_pixels:
        raise TooLarge(
            f"the TIFF has tiles of {width} x {length} pixels, over the limit of {max_pixels:,}:"
            " save it with smaller ones"
        )
