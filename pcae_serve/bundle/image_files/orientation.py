"""The orientation of a picture, from its metadata, in bounded time.

Pillow reads all tags with all their values to find this one.
"""

import re
import struct
from collections.abc import Sequence

#: Maximum number of tags that are looked at; cameras write fewer than 100.
MAX_TAGS = 4_096

#: Maximum bytes of EXIF or XMP data that are looked at, decompressed; the tag is near their start.
MAX_BYTES = 1 << 20

_TAG = 274
_FORMATS = {1: "B", 3: "H", 4: "I"}  # by type of value
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def find_orientation(exif: Sequence[bytes] = (), xmp: bytes = b"") -> int:
    """Return the orientation in EXIF data, else that in XMP data, else 1.

    exif: the parts that the file has it in. Unreadable data counts as none.
    """
    data = b"".join(exif).removeprefix(b"Exif\0\0")
    value = _in_exif(data)
    if value is None and (found := _IN_XMP.search(xmp)):
        value = int(found[1])
    return value if value is not None and 1 <= value <= 8 else 1


def _in_exif(data: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, at)
        for start in range(at + 2, at + 2 + 12 * min(count, MAX_TAGS), 12):
            tag, kind, values = struct.unpack_from(order + "HHI", data, start)
            if tag == _TAG and kind in _FORMATS and values == 1:
                return int(struct.unpack_from(order + _FORMATS[kind], data, start + 8)[0])
    except struct.error:
        pass
    return None
