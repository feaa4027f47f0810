"""PNG: its chunks.

Metadata (text, colour profiles, animation frames) never reaches Pillow, which inflates it; only the
orientation is read from it.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.bundle.image_files.orientation import find_orientation
from pcae_serve.errors import UnreadableImage

#: Maximum chunks. Programs put at least 4 kB into a chunk of pixels.
MAX_CHUNKS = 20_000
#: Maximum bytes of a text that may hold the orientation, after inflation: EXIF data have 64 kB, in
#: two digits each.
MAX_TEXT = 1 << 18

#: Samples per pixel by colour type.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_START = 8  # bytes of the signature
_ESSENTIAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PROFILE, _XMP = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"  # ImageMagick's, Adobe's
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class _Chunk(NamedTuple):
    name: bytes
    at: int  # of its data
    end: int  # of its data; a checksum of 4 bytes follows


def read_layout(body: bytes) -> Layout:
    """Read the header and the orientation. Raises UnreadableImage or struct.error if damaged."""
    name, width, height, bits, colour, _, _, interlaced = struct.unpack_from(">4sII5B", body, 12)
    if name != b"IHDR" or colour not in _SAMPLES:
        raise UnreadableImage("the image's header is truncated or damaged")
    exif: bytes | None = None
    xmp: bytes | None = None
    for chunk in _chunks(body):  # of each, only the first is inflated: a file can have thousands
        if chunk.name == b"eXIf" and exif is None:
            exif = body[chunk.at : chunk.end]
        elif chunk.name in _TEXTS:
            if exif is None and body.startswith(_PROFILE, chunk.at):
                exif = _unhex(_text(body, chunk))
            elif xmp is None and body.startswith(_XMP, chunk.at):
                xmp = _text(body, chunk)
    return Layout(
        "PNG",
        width,
        height,
        samples=_SAMPLES[colour],
        bits=bits,
        codec="PNG interlaced" if interlaced else "PNG",
        orientation=find_orientation([exif or b""], xmp or b""),
    )


def essential(body: bytes) -> bytes:
    """Return the file without the chunks that its pixels do not depend on.

    Of several headers or palettes, the first counts, as it does for `read_layout`.
    """
    view = memoryview(body)  # its slices are no copies
    kept, once, end = [view[:_START]], {b"IHDR", b"PLTE"}, _START
    for name, start, end in _chunks(body):
        if name in _ESSENTIAL and (name in once or name not in (b"IHDR", b"PLTE")):
            kept.append(view[start - 8 : end + 4])
            once.discard(name)
    kept.append(view[end + 4 :])  # a chunk that is cut off
    return b"".join(kept)


def _chunks(body: bytes) -> Iterator[_Chunk]:
    """Yield the complete chunks up to IEND. Raises UnreadableImage if there are too many."""
    at = _START
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(body):
            return
        length, name = struct.unpack_from(">I4s", body, at)
        start, at = at + 8, at + 12 + length
        if at > len(body):
            return
        yield _Chunk(name, start, start + length)
        if name == b"IEND":
            return
    raise UnreadableImage(f"the PNG has more than {MAX_CHUNKS:,} chunks; save it again")


def _text(body: bytes, chunk: _Chunk) -> bytes:
    """Return the text of a chunk behind its keyword; an empty one if it is damaged."""
    _, _, text = body[chunk.at : chunk.end].partition(b"\0")
    compressed = chunk.name == b"zTXt"
    if chunk.name == b"zTXt":
        text = text[1:]
    elif chunk.name == b"iTXt":
        compressed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]  # behind language and translated keyword
    if compressed:
        try:
            return zlib.decompressobj().decompress(text, MAX_TEXT)
        except zlib.error:
            return b""
    return text[:MAX_TEXT]


def _unhex(text: bytes) -> bytes:
    """Return the bytes of a profile in ImageMagick's form: newline, name, length, digits."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return b""
