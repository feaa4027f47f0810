"""JPEG: segments up to the first scan."""

import re

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.errors import UnreadableImage

#: Maximum segments before the picture. The largest metadata that cameras and phones write (depth
#: maps, content credentials) is 10 MB in segments of 64 kB.
MAX_SEGMENTS = 2_048

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # without the restarts inside a scan
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}


def read_layout(body: bytes) -> Layout:
    """Read the frame header. Raises UnreadableImage if there is none before the first scan."""
    frame: tuple[int, int] | None = None  # marker, and where its parameters start
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(body, at)
        if found is None or (marker := found[0][1]) == _EOI:
            break
        at = found.end()
        if marker in (_TEM, _SOI):
            continue
        if marker in _FRAMES:
            frame = marker, at + 2
        if marker == _SOS:
            if frame is None:
                break
            return _layout(body, *frame, in_scan=body[at + 2])
        at += int.from_bytes(body[at : at + 2])
    else:
        raise UnreadableImage(
            f"the JPEG has more than {MAX_SEGMENTS:,} segments of metadata; save it again"
        )
    raise UnreadableImage("the image's header is truncated or damaged")


def _layout(body: bytes, marker: int, at: int, in_scan: int) -> Layout:
    """Return the layout of a frame whose parameters start at `at`.

    in_scan: number of components in the first scan. If these are not all, or the frame is
    progressive, the decoder keeps the coefficients of the whole image.
    """
    height, width = int.from_bytes(body[at + 1 : at + 3]), int.from_bytes(body[at + 3 : at + 5])
    components = body[at + 5]
    factors = [body[at + 7 + 3 * i] for i in range(components)]
    areas = [max(1, (factor >> 4) * (factor & 15)) for factor in factors]
    buffered = marker in _PROGRESSIVE or in_scan < components
    return Layout(
        "JPEG progressive" if buffered else "JPEG",
        width,
        height,
        samples=components,
        scans=body.count(bytes([0xFF, _SOS])) if buffered else 1,
        coefficients=sum(areas) / max(areas, default=1) if buffered else 0.0,
    )
