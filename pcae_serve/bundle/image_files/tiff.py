"""TIFF: the tags of the first page.

Pillow gets a copy that has only the tags that pixels depend on, each once: it reads the values of
all tags, which may overlap, and creates an object for each rational number.
"""

import struct
from math import inf
from typing import NamedTuple

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.bundle.image_files.orientation import MAX_BYTES, find_orientation
from pcae_serve.errors import UnreadableImage

#: Maximum tags of a page; common programs write fewer than 100.
MAX_TAGS = 4_096
#: Maximum strips or tiles: Pillow creates an object for each.
MAX_PARTS = 65_536
#: Maximum scans of a JPEG in a TIFF that libtiff decodes.
MAX_SCANS = 100

#: Codec by the compression tag; any other is taken for the slowest.
_CODECS = {
    1: "TIFF", 2: "TIFF fax", 3: "TIFF fax", 4: "TIFF fax", 5: "TIFF LZW", 6: "TIFF JPEG",
    7: "TIFF JPEG", 8: "TIFF deflate", 32773: "TIFF", 32946: "TIFF deflate", 50000: "TIFF deflate",
}  # fmt: skip

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _XMP = 256, 257, 258, 259, 277, 700
_STRIP_OFFSETS, _STRIP_BYTES, _ORIENTATION, _COLOURS, _JPEG_TABLES = 273, 279, 274, 320, 347
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_SHORT, _LONG = 3, 4

#: The tags that pixels depend on, and how many values they may have.
_ESSENTIAL = (
    dict.fromkeys((_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _TILE_WIDTH, _TILE_LENGTH), 1)
    | dict.fromkeys(
        (_BITS, 262, 266, 278, 284, 292, 293, 317, 326, 327, 328, 332, 334, 338, 339), 64
    )
    | dict.fromkeys((*range(512, 522), 529, 530, 531, 532), 64)  # JPEG, YCbCr
    | dict.fromkeys((_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES), MAX_PARTS)
    | {_COLOURS: 3 << 16, _JPEG_TABLES: 1 << 16}
)

_DAMAGED = "the image's header is truncated or damaged"


class _Tag(NamedTuple):
    kind: int
    values: int  # number of values
    field: bytes  # 4 bytes: the values, or where they are


def read_layout(body: bytes) -> Layout:
    """Read the first page's tags. Raises UnreadableImage or struct.error if they are damaged."""
    order, tags = _tags(body)
    values = {number: _first_value(body, order, tag) for number, tag in tags.items()}
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise UnreadableImage(_DAMAGED)
    parts = max((tags[n].values for n in (_STRIP_OFFSETS, _TILE_OFFSETS) if n in tags), default=1)
    if parts > MAX_PARTS:
        raise UnreadableImage(
            f"the TIFF has {parts} strips or tiles, over the limit of {MAX_PARTS:,};"
            " save it with larger ones"
        )
    for number, tag in tags.items():
        if tag.values > _ESSENTIAL.get(number, tag.values):
            raise UnreadableImage(
                f"the TIFF has {tag.values} values in tag {number}; save it again"
            )
    if 0 in (values.get(_TILE_WIDTH, 1), values.get(_TILE_LENGTH, 1)):
        raise UnreadableImage("the TIFF has an invalid tile size")
    compression = values.get(_COMPRESSION, 1)
    codec = _CODECS.get(compression, "TIFF LZMA")
    return Layout(
        "TIFF",
        values[_WIDTH],
        values[_HEIGHT],
        samples=max(1, values.get(_SAMPLES, 1)),
        bits=max(1, values.get(_BITS, 1)),
        codec=codec,
        scans=_scans(body, order, tags, parts) if codec == "TIFF JPEG" else 1,
        parts=parts,
        part_pixels=values.get(_TILE_WIDTH, 0) * values.get(_TILE_LENGTH, 0),
        orientation=_orientation(body, order, tags, values),
    )


def essential(body: bytes) -> bytes:
    """Return the file with a directory of only the tags that its pixels depend on."""
    order, tags = _tags(body)
    view = memoryview(body)  # its slices are no copies
    kept = {number: tag for number, tag in tags.items() if number in _ESSENTIAL}
    turned = read_layout(body).orientation
    kept[_ORIENTATION] = _Tag(_SHORT, 1, struct.pack(order + "H2x", turned))
    at = len(body) + len(body) % 2
    rows = [
        struct.pack(order + "HHI", number, tag.kind, tag.values) + tag.field
        for number, tag in sorted(kept.items())
    ]
    directory = struct.pack(order + "H", len(rows)) + b"".join(rows) + bytes(4)
    return b"".join(
        (view[:4], struct.pack(order + "I", at), view[8:], bytes(at - len(body)), directory)
    )


def _tags(body: bytes) -> tuple[str, dict[int, _Tag]]:
    """Return the byte order and the first page's tags. Of equal ones, the first counts."""
    order = "<" if body.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", body, 4)
    (count,) = struct.unpack_from(order + "H", body, at)
    if count > MAX_TAGS:
        raise UnreadableImage(f"the TIFF has {count} tags, over the limit of {MAX_TAGS:,}")
    tags: dict[int, _Tag] = {}
    for start in range(at + 2, at + 2 + 12 * count, 12):
        number, kind, values, field = struct.unpack_from(order + "HHI4s", body, start)
        tags.setdefault(number, _Tag(kind, values, field))
    return order, tags


def _scans(body: bytes, order: str, tags: dict[int, _Tag], parts: int) -> int:
    """Return at least the number of scans of each part, which is a JPEG; parts may overlap."""
    scans = body.count(b"\xff\xda")
    if _part_bytes(body, order, tags) <= len(body):
        scans -= parts - 1  # each has one at least
    return min(MAX_SCANS, max(1, scans))


def _part_bytes(body: bytes, order: str, tags: dict[int, _Tag]) -> float:
    """Return the length of all strips or tiles together, infinity if it is unknown."""
    tag = tags.get(_STRIP_BYTES) or tags.get(_TILE_BYTES)
    if tag is None or tag.kind not in (_SHORT, _LONG):
        return inf
    form = f"{order}{tag.values}{'H' if tag.kind == _SHORT else 'I'}"
    inline = struct.calcsize(form) <= 4
    (at,) = struct.unpack(order + "I", tag.field)
    try:
        counts: tuple[int, ...] = struct.unpack_from(
            form, *((tag.field, 0) if inline else (body, at))
        )
        return sum(counts)
    except struct.error:
        return inf


def _first_value(body: bytes, order: str, tag: _Tag) -> int:
    """Return the first value of a tag of 16- or 32-bit numbers, 0 of others."""
    if tag.kind not in (_SHORT, _LONG) or tag.values < 1:
        return 0
    form, size = (order + "H", 2) if tag.kind == _SHORT else (order + "I", 4)
    if tag.values * size <= 4:
        return int(struct.unpack_from(form, tag.field)[0])
    (at,) = struct.unpack(order + "I", tag.field)
    try:
        return int(struct.unpack_from(form, body, at)[0])
    except struct.error:
        return 0


def _orientation(body: bytes, order: str, tags: dict[int, _Tag], values: dict[int, int]) -> int:
    if _ORIENTATION in tags:
        value = values[_ORIENTATION]
        return value if 1 <= value <= 8 else 1
    if _XMP not in tags:
        return 1
    (at,) = struct.unpack(order + "I", tags[_XMP].field)
    return find_orientation(xmp=body[at : at + min(tags[_XMP].values, MAX_BYTES)])
