"""WebP: the canvas, the codec of the first picture, the orientation."""

import struct
from collections.abc import Iterator

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.bundle.image_files.orientation import MAX_BYTES, find_orientation
from pcae_serve.errors import UnreadableImage

#: Maximum chunks, one for each frame of an animation included.
MAX_CHUNKS = 10_000

_START = 12  # bytes before the first chunk
_ALPHA, _EXIF_OR_XMP = 0x10, 0x08 | 0x04  # flags of the extended header
_LOSSLESS_ALPHA = 1 << 28  # in the header of a lossless picture
_FRAME_HEADER = 16  # bytes of an animation's frame before its own chunks
_CODECS = {b"VP8 ": "WEBP", b"VP8L": "WEBP lossless"}


def read_layout(body: bytes) -> Layout:
    """Read canvas size, codec and orientation. Raises UnreadableImage or struct.error."""
    first = body[_START : _START + 4]
    if first == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 26)
        return Layout("WEBP", width & 0x3FFF, height & 0x3FFF)
    if first == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 21)
        return Layout(
            "WEBP",
            (bits & 0x3FFF) + 1,
            (bits >> 14 & 0x3FFF) + 1,
            samples=4 if bits & _LOSSLESS_ALPHA else 3,
            codec="WEBP lossless",
        )
    if first != b"VP8X" or len(body) < 30:
        raise UnreadableImage("the image's header is truncated or damaged")
    width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (24, 27))
    flags = body[20]
    codec, exif, xmp = "", b"", b""
    for name, at, end in _chunks(body):
        if name == b"ANMF":
            name = body[at + _FRAME_HEADER : at + _FRAME_HEADER + 4]
            name = b"VP8 " if name == b"ALPH" else name
        codec = codec or _CODECS.get(name, "")
        if name == b"EXIF":
            exif = exif or body[at : min(end, at + MAX_BYTES)]
        elif name == b"XMP ":
            xmp = xmp or body[at : min(end, at + MAX_BYTES)]
        if codec and not flags & _EXIF_OR_XMP:
            break
    return Layout(
        "WEBP",
        width,
        height,
        samples=4 if flags & _ALPHA else 3,
        codec=codec or "WEBP",
        orientation=find_orientation([exif], xmp),
    )


def _chunks(body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the data of each chunk. Raises UnreadableImage if too many."""
    at = _START
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(body):
            return
        name, length = struct.unpack_from("<4sI", body, at)
        yield name, at + 8, at + 8 + length
        at += 8 + length + length % 2
    raise UnreadableImage(f"the WebP has more than {MAX_CHUNKS:,} chunks; save it again")
