"""JPEG: the segments before the first scan, the scans, and the end marker.

Metadata (EXIF, colour profiles, XMP, previews, comments) never reaches Pillow, which joins segments
in quadratic time; only the orientation is read from it.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.bundle.image_files.orientation import MAX_BYTES, find_orientation
from pcae_serve.errors import UnreadableImage

#: Maximum segments before the first scan. The most metadata that cameras and phones write (depth
#: maps, content credentials) is 10 MB in segments of 64 kB.
MAX_SEGMENTS = 2_048

#: Maximum bytes between two segments, which decoders skip.
MAX_JUNK = 1 << 20

#: Maximum scans. A scan of 100 bytes can cover the whole image; programs write 10 to 18.
MAX_SCANS = 32

#: How many times a JPEG that lacks its end marker is decoded.
DECODINGS = 3

#: Bytes that decode to different coefficients, whatever the position in a code they begin at.
_NOISE = b"\x5a\xa5\x3c\x96\x0f" * 20, b"\xa5\x12\xc3\x69\xf0" * 20, b"\x00\x9d\x47\x2e\xb1" * 20

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # without the restarts inside a scan
_TEM, _SOI, _EOI, _SOS, _COM = 0x01, 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_END = bytes([0xFF, _EOI])
_RESTARTS = range(0xD0, 0xD8)
_COEFFICIENTS = 64  # per block
_MAX_EXIF_SEGMENTS = MAX_BYTES >> 16


class _Segment(NamedTuple):
    marker: int
    start: int  # of its marker
    at: int  # of its content, behind the length
    end: int


def read_layout(body: bytes) -> Layout:
    """Read the frame header and the orientation.

    Raises UnreadableImage if there is no frame before the first scan, or too many segments or
    scans.
    """
    frame: _Segment | None = None
    exif: list[bytes] = []
    xmp = b""
    for segment in _head(body):
        if segment.marker in _FRAMES:
            frame = segment
        elif segment.marker == _APP1:
            if body.startswith(b"Exif\0\0", segment.at):
                if len(exif) < _MAX_EXIF_SEGMENTS:
                    exif.append(body[segment.at + 6 : segment.end])
            elif body.startswith(b"http://ns.adobe.com/xap/1.0/\0", segment.at):
                xmp = body[segment.at : segment.end]
    scan = segment  # there is at least one, and the last one is a scan
    if frame is None:
        raise UnreadableImage("the image's header is truncated or damaged")
    at = frame.at
    height, width = int.from_bytes(body[at + 1 : at + 3]), int.from_bytes(body[at + 3 : at + 5])
    factors = [body[at + 7 + 3 * i] for i in range(body[at + 5])]
    areas = [max(1, (factor >> 4) * (factor & 15)) for factor in factors]
    # a decoder keeps all coefficients of the image, unless its only scan has all components
    buffered = frame.marker in _PROGRESSIVE or body[scan.at] < len(factors)
    return Layout(
        "JPEG",
        width,
        height,
        samples=len(factors),
        codec="JPEG progressive" if buffered else "JPEG",
        scans=_count_scans(body, scan.start) if buffered else 1,
        coefficients=sum(areas) / max(areas, default=1) if buffered else 0.0,
        orientation=find_orientation(exif, xmp),
        ended=body.rfind(_END, scan.start) >= 0,
        skipped_bytes=scan.start,
    )


def essential(body: bytes) -> bytes:
    """Return the file without the metadata that its pixels do not depend on."""
    view = memoryview(body)  # its slices are no copies
    kept = [view[:2]]
    for segment in _head(body):
        if segment.marker == _SOS:
            kept.append(view[segment.start :])
        elif not _is_metadata(body, segment):
            kept.append(view[segment.start : segment.end])
    return b"".join(kept)


def with_end(body: bytes) -> list[bytes]:
    """Return a file that lacks its end marker with it, and different noise before it.

    If no scan was cut off, all show the same picture: decoders skip what is behind it. Otherwise
    the noise becomes a part of it, in each of the parts that restart markers divide it into.
    """
    whole = body.rstrip(b"\xff")  # half of a marker
    restarts = [bytes([0xFF, marker]) for marker in _RESTARTS]
    last = max(restarts, key=whole.rfind)
    start = 1 + restarts.index(last) if last in whole else 0
    following = restarts[start:] + restarts[:start]
    return [whole + noise + b"".join(each + noise for each in following) + _END for noise in _NOISE]


def is_complete(body: bytes) -> bool:
    """Return whether the scans transmit all bits of every coefficient of every component."""
    frame = next(segment for segment in _head(body) if segment.marker in _FRAMES)
    progressive = frame.marker in _PROGRESSIVE
    components = [body[frame.at + 6 + 3 * i] for i in range(body[frame.at + 5])]
    missing = {component: set(range(_COEFFICIENTS)) for component in components}
    for scan in _scans(body, frame.start):
        header = body[scan.at : scan.end]
        if not header or len(header) < 4 + 2 * header[0]:  # cut off
            return False
        count = header[0]
        parameters = header[1 + 2 * count : 4 + 2 * count]
        first, last, bits = parameters if progressive else (0, _COEFFICIENTS - 1, 0)
        if bits & 15 == 0:  # the last bits of these coefficients
            for component in header[1 : 1 + 2 * count : 2]:
                missing.get(component, set()).difference_update(range(first, last + 1))
    return not any(missing.values())


def _head(body: bytes) -> Iterator[_Segment]:
    """Yield the segments up to the first scan's header. Raises UnreadableImage if none comes."""
    for i, segment in enumerate(_segments(body, 2, MAX_JUNK)):
        if i >= MAX_SEGMENTS:
            raise UnreadableImage(
                f"the JPEG has more than {MAX_SEGMENTS:,} segments before its picture; save it"
                " again"
            )
        yield segment
        if segment.marker == _SOS:
            return
    raise UnreadableImage("the image's header is truncated or damaged")


def _count_scans(body: bytes, at: int) -> int:
    """Return at least the number of scans. Raises UnreadableImage if there are too many."""
    most = body.count(bytes([0xFF, _SOS]), at)  # other data may contain the same bytes
    return most if most <= MAX_SCANS else len(_scans(body, at))


def _scans(body: bytes, at: int) -> list[_Segment]:
    """Return the headers of the scans from `at` on. Raises UnreadableImage if there are too many.

    They are found as a decoder finds them.
    """
    scans = []
    for i, segment in enumerate(_segments(body, at, len(body))):
        if segment.marker == _SOS:
            scans.append(segment)
        if i >= MAX_SEGMENTS or len(scans) > MAX_SCANS:
            raise UnreadableImage(
                f"the JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS:,} segments; save it"
                " again"
            )
    return scans


def _segments(body: bytes, at: int, between: int) -> Iterator[_Segment]:
    """Yield the segments from `at` up to the end marker.

    between: maximum bytes that are skipped between two of them.
    """
    while (found := _MARKER.search(body, at, at + between)) and (marker := found[0][1]) != _EOI:
        start, at = found.start(), found.end()
        if marker not in (_TEM, _SOI):  # all other segments start with their length
            end = min(len(body), at + int.from_bytes(body[at : at + 2]))
            yield _Segment(marker, start, at + 2, end)
            at = end


def _is_metadata(body: bytes, segment: _Segment) -> bool:
    """Return whether a segment does not affect pixels: JFIF and Adobe markers decide on colours."""
    if segment.marker == _APP0:
        return not body.startswith(b"JFIF\0", segment.at)
    if segment.marker == _APP14:
        return not body.startswith(b"Adobe", segment.at)
    return segment.marker == _COM or _APP0 < segment.marker <= _APP15
