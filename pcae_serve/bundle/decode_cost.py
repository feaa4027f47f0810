"""Predict what decoding an image file costs, from its header and without decoding it.

The rates were measured on one core of the machine in
benchmarks/records/2026-11-24_input; the server corrects them by what it measures.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pcae_serve.bundle.image_files import jpeg
from pcae_serve.bundle.image_files.layout import Layout


class Rate(NamedTuple):
    """What a codec takes."""

    pixel_ns: float  # per pixel, conversion to RGB included
    byte_ns: float  # per byte of the file
    pixel_bytes: float  # peak memory per pixel, besides the RGB picture


#: By Layout.codec.
RATES = {
    "JPEG": Rate(3.6, 8.0, 0.0),
    "JPEG progressive": Rate(3.6, 35.0, 0.0),
    "PNG": Rate(6.5, 14.0, 0.0),
    "PNG interlaced": Rate(14.0, 14.0, 0.0),
    "WEBP": Rate(16.0, 40.0, 12.0),
    "WEBP lossless": Rate(16.0, 9.0, 12.0),
    "GIF": Rate(7.5, 5.0, 2.0),
    "BMP": Rate(5.5, 0.5, 0.0),
    "TIFF": Rate(5.5, 0.5, 4.0),
    "TIFF LZW": Rate(8.0, 1.0, 4.0),
    "TIFF deflate": Rate(7.5, 3.0, 4.0),
    "TIFF LZMA": Rate(9.0, 21.0, 4.0),
    "TIFF JPEG": Rate(7.0, 8.0, 4.0),
    "TIFF fax": Rate(13.0, 5.0, 4.0),
}

#: Seconds for parsing and for what does not depend on the size.
BASE_S = 0.3e-3
#: Bytes of decoders' buffers that do not depend on the size.
BASE_BYTES = 1 << 20
#: Factor on predicted bytes, for allocators and rows of buffers.
BYTES_MARGIN = 1.15
#: Copies of the file while it is decoded, where there are several: Pillow's and the library's.
FILE_COPIES = {"WEBP": 3, "TIFF": 2}
#: Nanoseconds per pixel and scan of a JPEG that is decoded in several scans.
SCAN_NS = 0.4
#: Nanoseconds per pixel for turning a picture upright.
TURN_NS = 3.0
#: Nanoseconds and bytes per pixel for reducing 16-bit grey to 8 bits, in numpy.
GREY_16_BIT_NS, GREY_16_BIT_BYTES = 10.0, 6.0
#: Seconds per strip or tile of a TIFF: Pillow creates an object for an uncompressed one.
PART_S, RAW_PART_S = 1e-6, 8e-6
#: Bytes per pixel of a picture in RGB, as Pillow stores it.
RGB_BYTES = 4
#: Share of its raw size from which on a PNG counts as not compressed.
_STORED = 0.9


@dataclass(frozen=True)
class DecodeCost:
    """The predicted cost of decoding one image.

    seconds: CPU time on the reference machine. bytes: peak memory besides the file itself.
    """

    seconds: float
    bytes: int
    pixels: int = 0  # of the whole picture


def predict(layout: Layout, length: int, short: int | None = None) -> DecodeCost:
    """Predict the cost of decoding a file of `length` bytes.

    short: number of pixels that the shorter side needs, which lets a JPEG be decoded at a reduced
    scale; None: it is decoded at full scale.
    """
    rate, pixels = RATES[layout.codec or layout.kind], layout.pixels
    length -= layout.skipped_bytes
    scale = _jpeg_scale(layout, short) if layout.ended else 1
    turned = layout.orientation != 1
    grey_16_bit = layout.bits > 8 and layout.samples == 1
    shown = pixels / scale**2  # pixels of the decoded picture
    pixel_ns = rate.pixel_ns
    byte_ns = rate.byte_ns
    if layout.kind == "JPEG":
        pixel_ns = 0.3 + 3.3 / scale
        pixel_ns += SCAN_NS * layout.scans if layout.coefficients else 0.0
    elif layout.codec == "TIFF JPEG":
        pixel_ns += SCAN_NS * layout.scans * layout.samples
    elif layout.kind == "PNG":
        raw_bytes = pixels * layout.samples * layout.bits / 8
        pixel_ns += 3.2 * max(0.0, raw_bytes / max(pixels, 1) - 3)
        if length > _STORED * raw_bytes:
            byte_ns *= 0.15
    if grey_16_bit:
        pixel_ns += GREY_16_BIT_NS
    nanoseconds = pixels * pixel_ns + length * byte_ns
    nanoseconds += shown * TURN_NS if turned else 0.0
    part_s = RAW_PART_S if layout.codec == "TIFF" else PART_S
    copies = 1 + (layout.samples != 3) + turned
    pictures, files = min(copies, 2), FILE_COPIES.get(layout.kind, 1)
    if not layout.ended:  # see preprocess: decoded again, and the difference is computed
        nanoseconds *= jpeg.DECODINGS
        pictures += 2
        files += jpeg.DECODINGS
    memory = (
        shown * RGB_BYTES * pictures
        + pixels * (rate.pixel_bytes + 2 * layout.coefficients)
        + (pixels * GREY_16_BIT_BYTES if grey_16_bit else 0)
    )
    return DecodeCost(
        seconds=BASE_S + nanoseconds * 1e-9 + layout.parts * part_s,
        bytes=int(BASE_BYTES + files * length + BYTES_MARGIN * memory),
        pixels=pixels,
    )


def _jpeg_scale(layout: Layout, short: int | None) -> int:
    """Return by how much Pillow's `draft` reduces a picture: 1, 2, 4 or 8."""
    if short is None or layout.kind != "JPEG":
        return 1
    times = min(layout.width, layout.height) // short
    return next(scale for scale in (8, 4, 2, 1) if times >= scale or scale == 1)
