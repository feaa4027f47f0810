"""GIF: the screen and the first frame."""

import struct

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.errors import UnreadableImage

#: Maximum blocks of up to 255 bytes before the first frame: 5 MB of comments.
MAX_BLOCKS = 20_000

_EXTENSION, _FRAME = 0x21, 0x2C


def read_layout(body: bytes) -> Layout:
    """Read the size that covers screen and first frame.

    Raises UnreadableImage, struct.error or IndexError if there is no frame.
    """
    width, height, _, _, _, right, bottom = _screen_and_frame(body)
    return Layout("GIF", max(width, right), max(height, bottom), samples=1)


def _screen_and_frame(body: bytes) -> tuple[int, ...]:
    width, height, flags, background, aspect = struct.unpack_from("<HHBBB", body, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = 0
    while blocks < MAX_BLOCKS:
        blocks += 1
        kind = body[at]
        if kind == _FRAME:
            x, y, across, down = struct.unpack_from("<HHHH", body, at + 1)
            return width, height, flags, background, aspect, x + across, y + down
        if kind != _EXTENSION:
            at += 1  # as decoders do
            continue
        at += 2
        while (length := body[at]) and blocks < MAX_BLOCKS:
            at += 1 + length
            blocks += 1
        at += 1
    raise UnreadableImage(
        f"the GIF has more than {MAX_BLOCKS:,} blocks before its first frame; save it again"
    )
