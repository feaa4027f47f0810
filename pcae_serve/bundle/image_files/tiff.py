"""TIFF: the tags of the first page."""

import struct

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.errors import UnreadableImage

#: Codec by the compression tag; any other is taken for the slowest.
_CODECS = {
    1: "TIFF", 2: "TIFF fax", 3: "TIFF fax", 4: "TIFF fax", 5: "TIFF LZW", 6: "TIFF JPEG",
    7: "TIFF JPEG", 8: "TIFF deflate", 32773: "TIFF", 32946: "TIFF deflate", 50000: "TIFF deflate",
}  # fmt: skip

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324
_SHORT, _LONG = 3, 4


def read_layout(body: bytes) -> Layout:
    """Read the first page's tags. Raises UnreadableImage or struct.error if they are damaged."""
    order = "<" if body.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", body, 4)
    (entries,) = struct.unpack_from(order + "H", body, at)
    values: dict[int, int] = {}
    parts = 1
    for start in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", body, start)
        if tag in (_STRIP_OFFSETS, _TILE_OFFSETS):
            parts = max(parts, count)
        values[tag] = _first_value(body, order, start, kind, count)
    if _WIDTH not in values or _HEIGHT not in values:
        raise UnreadableImage("the image's header is truncated or damaged")
    return Layout(
        _CODECS.get(values.get(_COMPRESSION, 1), "TIFF LZMA"),
        values[_WIDTH],
        values[_HEIGHT],
        samples=max(1, values.get(_SAMPLES, 1)),
        bits=max(1, values.get(_BITS, 8)),
        parts=parts,
    )


def _first_value(body: bytes, order: str, start: int, kind: int, count: int) -> int:
    """Return the first value of a tag of 16- or 32-bit numbers, 0 of others."""
    if kind not in (_SHORT, _LONG) or count < 1:
        return 0
    size = 2 if kind == _SHORT else 4
    at = start + 8
    if count * size > 4:
        (at,) = struct.unpack_from(order + "I", body, at)
    (value,) = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), body, at)
    return int(value)
