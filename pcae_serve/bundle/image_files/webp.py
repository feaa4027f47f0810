"""WebP: the canvas and the codec of the first frame."""

import struct

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.errors import UnreadableImage

#: Maximum chunks before the picture; common programs write at most 5.
MAX_CHUNKS = 64

_ALPHA, _LOSSLESS_ALPHA = 0x10, 1 << 28  # flags of the extended and of the lossless header
_FRAME_HEADER = 16  # bytes of an animation's frame before its own chunks


def read_layout(body: bytes) -> Layout:
    """Read canvas size and codec. Raises UnreadableImage or struct.error if damaged."""
    first = body[12:16]
    if first == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 26)
        return Layout("WebP", width & 0x3FFF, height & 0x3FFF)
    if first == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 21)
        samples = 4 if bits & _LOSSLESS_ALPHA else 3
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        return Layout("WebP lossless", width, height, samples)
    if first != b"VP8X" or len(body) < 30:
        raise UnreadableImage("the image's header is truncated or damaged")
    width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (24, 27))
    return Layout(_codec(body), width, height, samples=4 if body[20] & _ALPHA else 3)


def _codec(body: bytes) -> str:
    """Return the codec of the first picture. Raises UnreadableImage if there is none."""
    at = 12
    for _ in range(MAX_CHUNKS):
        name, length = struct.unpack_from("<4sI", body, at)
        if name == b"VP8 ":
            return "WebP"
        if name == b"VP8L":
            return "WebP lossless"
        at += 8 + (_FRAME_HEADER if name == b"ANMF" else length + length % 2)
    raise UnreadableImage(f"the WebP has more than {MAX_CHUNKS} chunks before its picture")
