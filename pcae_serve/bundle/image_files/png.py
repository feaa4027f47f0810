"""PNG: its header chunk."""

import struct

from pcae_serve.bundle.image_files.layout import Layout
from pcae_serve.errors import UnreadableImage

#: Samples per pixel by colour type.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def read_layout(body: bytes) -> Layout:
    """Read the header chunk. Raises UnreadableImage or struct.error if it is damaged."""
    kind, width, height, bits, colour, _, _, interlaced = struct.unpack_from(">4sII5B", body, 12)
    if kind != b"IHDR" or colour not in _SAMPLES:
        raise UnreadableImage("the image's header is truncated or damaged")
    return Layout(
        "PNG interlaced" if interlaced else "PNG",
        width,
        height,
        samples=_SAMPLES[colour],
        bits=bits,
    )
