"""BMP: its information header."""

import struct

from pcae_serve.bundle.image_files.layout import Layout

_CORE_HEADER = 12  # bytes; OS/2's, with 16-bit sides


def read_layout(body: bytes) -> Layout:
    """Read the size and the bits per pixel. Raises struct.error if the header is truncated."""
    (length,) = struct.unpack_from("<I", body, 14)
    form = "<HHHH" if length == _CORE_HEADER else "<iiHH"
    width, height, _, bits = struct.unpack_from(form, body, 18)
    return Layout("BMP", abs(width), abs(height), samples=1 if bits <= 8 else 3)
