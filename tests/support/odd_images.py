"""Unusual, damaged and hostile image files, with the HTTP status that each must get.

Each case is named after its property. Cases that took seconds or a gigabyte without a limit say so.
"""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

SIZE = (40, 30)
MB = 1_000_000


class Odd(NamedTuple):
    """A case: a function that makes the file's bytes, and the expected status."""

    make: Callable[[], bytes]
    status: int


CASES: dict[str, Odd] = {}


def case(status: int, name: str = "", *arguments: Any) -> Callable[[Any], Any]:
    """Add a case: the decorated function with `arguments`, named after the function and `name`."""

    def add(make: Callable[..., bytes]) -> Callable[..., bytes]:
        full = "-".join(filter(None, [make.__name__.replace("_", "-").strip("-"), name]))
        assert full not in CASES, full
        CASES[full] = Odd(lambda: make(*arguments), status)
        return make

    return add


def photo(width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    """A smooth colour image, different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=2).astype(np.uint8))


def noise(side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (8, 8), depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG with these chunks after its header; by default those of an 8 x 8 image."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks or (PIXELS, END))


PIXELS, END = chunk(b"IDAT", zlib.compress(bytes(8 * 25))), chunk(b"IEND")


def tiff(
    tags: dict[int, tuple[int, int, int | bytes]], pixels: bytes = bytes(64), order: str = "<"
) -> bytes:
    """A TIFF of tags {number: (type, count, value or bytes)}; b"" is replaced by the pixels' place.

    Grey, 8 x 8, uncompressed, one strip, unless `tags` differ.
    """
    default: dict[int, tuple[int, int, int | bytes]] = {
        256: (4, 1, 8), 257: (4, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
        273: (4, 1, b""), 277: (3, 1, 1), 278: (4, 1, 8), 279: (4, 1, len(pixels)),
    }  # fmt: skip
    if 322 in tags:  # tiles stand in for strips
        default = {n: v for n, v in default.items() if n not in (273, 278, 279)}
        default |= {324: (4, 1, b""), 325: (4, 1, len(pixels))}
    entries = sorted((default | tags).items())
    at = 8 + 2 + 12 * len(entries) + 4
    rows, tail = b"", pixels
    for number, (kind, count, given) in entries:
        value = at if given == b"" else given
        if isinstance(value, bytes):
            at_tail, tail = at + len(tail), tail + value
            value = at_tail
        short = kind == 3 and count == 1
        inline = struct.pack(order + "H2x", value) if short else struct.pack(order + "I", value)
        rows += struct.pack(order + "HHI", number, kind, count) + inline
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return (
        magic
        + struct.pack(order + "I", 8)
        + struct.pack(order + "H", len(entries))
        + rows
        + struct.pack(order + "I", 0)
        + tail
    )


def bmp(width: int, height: int, bits: int, compression: int, pixels: bytes = b"") -> bytes:
    palette = bytes(range(256)) * 4 if bits <= 8 else b""
    start = 54 + len(palette)
    head = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 256 if palette else 0, 0
    )
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + palette + pixels


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def after_start(body: bytes, segment: bytes) -> bytes:
    """A JPEG with something right behind its first marker."""
    return body[:2] + segment + body[2:]


# what people send

MODES = {
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
}
for _kind, _modes in MODES.items():
    for _mode in _modes:

        @case(200, f"{_kind}-{_mode}".lower(), _kind, _mode)
        def plain(kind: str, mode: str) -> bytes:
            if mode == "I;16":
                wide = np.asarray(photo().convert("L")).astype(np.uint16) * 257
                return save(Image.fromarray(wide), kind)
            return save(photo().convert(mode), kind)


for _orientation in (1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535):

    @case(200, str(_orientation), _orientation)
    def orientation(value: int) -> bytes:
        return save(photo(), "JPEG", exif=exif(value))


for _kind in ("PNG", "WEBP", "TIFF"):

    @case(200, _kind.lower(), _kind)
    def orientation_in(kind: str) -> bytes:
        return save(photo(), kind, exif=exif(6))


@case(200)
def jpeg_progressive() -> bytes:
    return save(photo(), "JPEG", progressive=True)


@case(200)
def jpeg_several_pictures() -> bytes:
    """As phones write them (MPO): the photograph, and a second one behind it."""
    return save(photo(), "MPO", save_all=True, append_images=[photo(20, 15)])


@case(200)
def jpeg_motion_photo() -> bytes:
    """A film behind the photograph, in which any bytes may stand: also those of a scan."""
    return save(photo(), "JPEG") + b"\xff\xda\0\2" * 1000


@case(200)
def jpeg_with_a_large_profile() -> bytes:
    return save(photo(), "JPEG", icc_profile=bytes(500_000))


@case(200)
def jpeg_with_junk_between_segments() -> bytes:
    return after_start(save(photo(), "JPEG"), b"\xff\xfe\0\4ab" + b"\xff" * 100)


@case(200)
def jpeg_on_one_line() -> bytes:
    return save(photo(3000, 1), "JPEG")


@case(200)
def jpeg_large() -> bytes:
    return save(photo(2050, 1027), "JPEG")


@case(200)
def png_colour_16_bit() -> bytes:
    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(8))
    return png(chunk(b"IDAT", zlib.compress(rows)), END, depth=16)


@case(200)
def png_grey_alpha_16_bit() -> bytes:
    rows = b"".join(b"\0" + bytes(range(32)) for _ in range(8))
    return png(chunk(b"IDAT", zlib.compress(rows)), END, depth=16, colour=4)


@case(200)
def png_transparent_palette() -> bytes:
    return save(photo().quantize(200), "PNG", transparency=bytes(range(200)))


@case(200)
def png_transparent_colour() -> bytes:
    return save(photo(), "PNG", transparency=(1, 2, 3))


@case(200)
def png_animated() -> bytes:
    return save(photo(), "PNG", save_all=True, append_images=[Image.new("RGB", SIZE)])


@case(200)
def png_with_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 100_000, zip=True)
    return save(photo(), "PNG", pnginfo=text)


@case(200)
def png_bytes_behind_its_end() -> bytes:
    return save(photo(), "PNG") + b"more"


@case(200)
def png_with_a_large_profile() -> bytes:
    return save(photo(), "PNG", icc_profile=bytes(8 * MB))


@case(200)
def jpeg_without_end() -> bytes:
    return save(photo(), "JPEG")[:-2]


@case(200)
def gif_animated() -> bytes:
    return save(photo(), "GIF", save_all=True, append_images=[Image.new("RGB", SIZE)])


@case(200)
def gif_transparent() -> bytes:
    return save(photo().quantize(64), "GIF", transparency=3)


@case(200)
def gif_frame_beyond_its_screen() -> bytes:
    body = bytearray(save(photo(), "GIF"))
    body[6:10] = struct.pack("<HH", 4, 3)
    return bytes(body)


@case(200)
def webp_animated() -> bytes:
    return save(photo(), "WEBP", save_all=True, append_images=[Image.new("RGB", SIZE)])


@case(200)
def webp_lossless_alpha() -> bytes:
    return save(photo().convert("RGBA"), "WEBP", lossless=True)


@case(200)
def bmp_16_bit() -> bytes:
    return bmp(8, 8, 16, 0, bytes(128))


@case(200)
def bmp_from_the_top() -> bytes:
    return bmp(8, -8, 24, 0, bytes(192))


for _compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate", "zstd"):

    @case(200, _compression, _compression)
    def tiff_compressed(compression: str) -> bytes:
        return save(photo(), "TIFF", compression=compression)


@case(200)
def tiff_fax() -> bytes:
    return save(photo().convert("1"), "TIFF", compression="group4")


@case(200)
def tiff_pages() -> bytes:
    return save(photo(), "TIFF", save_all=True, append_images=[Image.new("L", (3, 3))])


@case(200)
def tiff_pages_in_a_circle() -> bytes:
    body = bytearray(tiff({}))
    at = 10 + 12 * struct.unpack_from("<H", body, 8)[0]
    body[at : at + 4] = struct.pack("<I", 8)
    return bytes(body)


@case(200)
def tiff_12_bit() -> bytes:
    return tiff({258: (3, 1, 12)}, bytes(range(96)))


@case(200)
def tiff_white_is_zero_16_bit() -> bytes:
    return tiff({258: (3, 1, 16), 262: (3, 1, 0)}, bytes(128))


@case(200)
def tiff_big_endian() -> bytes:
    return tiff({}, order=">")


# no defined conversion to RGB, or not an image

for _mode in ("I", "F"):

    @case(415, _mode.lower(), _mode)
    def tiff_samples(mode: str) -> bytes:
        return save(photo().convert("L").convert(mode), "TIFF")


@case(415)
def tiff_lab() -> bytes:
    return tiff({258: (3, 3, struct.pack("<3H", 8, 8, 8)), 262: (3, 1, 8), 277: (3, 1, 3)},
                bytes(192))  # fmt: skip


@case(415)
def bmp_run_length() -> bytes:
    return bmp(8, 8, 8, 1, b"\x08\x11\0\0" * 8 + b"\0\1")


for _name, _text in {
    "text": b"I am named cat.jpg",
    "zeros": bytes(100),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pdf": b"%PDF-1.7\n",
    "wav": b"RIFF\x24\0\0\0WAVEfmt ",
    "avif": b"\0\0\0\x1cftypavif\0\0\0\0",
    "jpeg-2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "ppm": b"P6 1 1 255\nabc",
    "icon": b"\0\0\1\0\1\0\x10\x10",
    "photoshop": b"8BPS\0\1",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "big-tiff": b"II+\0\x08\0\0\0",
    "one-byte": b"\xff",
    "mp4": b"\0\0\0\x18ftypmp42",
}.items():

    @case(415, _name, _text)
    def no_image(text: bytes) -> bytes:
        return text


# what is damaged


@case(400)
def empty() -> bytes:
    return b""


for _kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
    for _share in (0.05, 0.5, 0.95):

        @case(400, f"{_kind}-{_share}".lower(), _kind, _share)
        def truncated(kind: str, share: float) -> bytes:
            body = save(noise(), kind)
            return body[: max(12, int(share * len(body)))]

    @case(400, _kind.lower(), _kind)
    def only_magic(kind: str) -> bytes:
        return save(noise(), kind)[:12]


@case(400)
def jpeg_large_cut_off() -> bytes:
    """Decoded at a reduced scale it must be noticed, too."""
    return save(noise(300), "JPEG")[:-100]


@case(400)
def jpeg_without_pixels() -> bytes:
    return b"\xff\xd8\xff\xd9"


@case(400)
def jpeg_without_size() -> bytes:
    return save(photo(), "JPEG").replace(b"\xff\xc0", b"\xff\xef")


@case(400)
def jpeg_zero_by_zero() -> bytes:
    body = bytearray(save(photo(), "JPEG"))
    at = body.index(b"\xff\xc0")
    body[at + 5 : at + 9] = bytes(4)
    return bytes(body)


@case(200)
def jpeg_mangled_by_text_mode() -> bytes:
    """The damage is not detectable: a JPEG has no checksum, and its decoder continues."""
    return save(noise(), "JPEG").replace(b"\n", b"\r\n")


@case(400)
def png_mangled_by_text_mode() -> bytes:
    return save(noise(), "PNG").replace(b"\r\n", b"\n")


@case(400)
def png_zero_by_zero() -> bytes:
    return png(size=(0, 0))


@case(400)
def png_without_pixels() -> bytes:
    return png(END)


@case(400)
def png_of_an_unknown_depth() -> bytes:
    return png(depth=3)


@case(400)
def png_wrong_checksum() -> bytes:
    body = bytearray(png())
    body[29] ^= 1
    return bytes(body)


@case(200)
def png_too_few_rows() -> bytes:
    """Not cut off, but written so: the rows that were never compressed are black."""
    return png(chunk(b"IDAT", zlib.compress(bytes(50))), END)


@case(400)
def gif_zero_by_zero() -> bytes:
    body = bytearray(save(photo(), "GIF"))
    body[6:10] = bytes(4)
    at = body.index(b",", 13)
    body[at + 5 : at + 9] = bytes(4)
    return bytes(body)


@case(400)
def gif_without_a_frame() -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";"


@case(400)
def bmp_zero_by_zero() -> bytes:
    return bmp(0, 0, 24, 0)


@case(400)
def bmp_of_an_unknown_header() -> bytes:
    return b"BM" + bytes(12) + struct.pack("<I", 17) + bytes(60)


@case(400)
def tiff_zero_by_zero() -> bytes:
    return tiff({256: (4, 1, 0), 257: (4, 1, 0)})


@case(400)
def tiff_without_size() -> bytes:
    return tiff({256: (2, 1, 8)})


@case(400)
def tiff_unknown_compression() -> bytes:
    return tiff({259: (3, 1, 9999)})


@case(400)
def tiff_directory_beyond_the_end() -> bytes:
    return b"II*\0" + struct.pack("<I", 2**31)


@case(400)
def tiff_pixels_beyond_the_end() -> bytes:
    return tiff({273: (4, 1, 2**31)})


@case(400)
def tiff_damaged_deflate() -> bytes:
    return tiff({259: (3, 1, 8)}, b"no deflate")


@case(400)
def tiff_tiles_without_a_size() -> bytes:
    return tiff({322: (4, 2, struct.pack("<II", 16, 16)), 323: (4, 1, 16)})


@case(400)
def tiff_jpeg_of_nothing() -> bytes:
    return tiff({259: (3, 1, 7)}, b"\xff\xd8\xff\xd9")


@case(400)
def webp_empty() -> bytes:
    return b"RIFF\x04\0\0\0WEBP"


@case(400)
def webp_of_an_unknown_codec() -> bytes:
    return b"RIFF\x10\0\0\0WEBPVP9 \x04\0\0\0abcd"


@case(200)
def exif_of_junk() -> bytes:
    return save(photo(), "JPEG", exif=b"Exif\0\0II*\0junk")


@case(200)
def exif_of_garbage() -> bytes:
    return save(photo(), "JPEG", exif=b"Exif\0\0garbage!")


@case(200)
def exif_pointing_nowhere() -> bytes:
    entry = struct.pack("<HHII", 0x0112, 5, 2**31, 2**31)
    tags = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)
    return save(photo(), "JPEG", exif=b"Exif\0\0" + tags)


@case(200)
def mpo_index_of_junk() -> bytes:
    return after_start(save(photo(), "JPEG"), b"\xff\xe2\0\x0aMPF\0junk")


# what is too large


@case(413)
def png_bomb() -> bytes:
    return png(chunk(b"IDAT", zlib.compress(bytes(10_000))), END, size=(60_000, 60_000))


@case(413)
def png_bomb_within_pillows_limit() -> bytes:
    return png(chunk(b"IDAT", zlib.compress(bytes(10_000))), END, size=(8_000, 8_000))


@case(413)
def jpeg_bomb() -> bytes:
    body = bytearray(save(photo(), "JPEG"))
    at = body.index(b"\xff\xc0")
    body[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(body)


@case(413)
def webp_bomb() -> bytes:
    body = bytearray(save(photo(), "WEBP", lossless=True))
    bits = struct.unpack_from("<I", body, 21)[0] | 0x3FFF | 0x3FFF << 14
    body[21:25] = struct.pack("<I", bits)
    return bytes(body)


@case(413)
def gif_bomb() -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 65_000, 65_000, 0, 0, 0)
        + (b"," + struct.pack("<HHHHB", 0, 0, 65_000, 65_000, 0) + b"\2\2\x4c\1\0;")
    )


@case(413)
def gif_bomb_in_a_frame() -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 8_000, 8_000, 0) + b"\2\2\x4c\1\0;"
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + frame


@case(413)
def tiff_bomb() -> bytes:
    return tiff({256: (4, 1, 2**31), 257: (4, 1, 2**31)})


@case(413)
def bmp_bomb() -> bytes:
    return bmp(2**30, 2**30, 24, 0)


@case(413)
def tiff_bomb_in_a_tile() -> bytes:
    """Took 1.6 GB and 7 s: the image is 8 x 8, its only tile is not."""
    return tiff(
        {259: (3, 1, 8), 322: (4, 1, 40_000), 323: (4, 1, 40_000)}, zlib.compress(bytes(MB))
    )


@case(413)
def png_rows_of_one_pixel() -> bytes:
    """Took 1 GB: a row has its own memory."""
    return png(chunk(b"IDAT", zlib.compress(bytes(MB))), END, size=(1, 49_000_000))


# what kept a decoder for long


@case(200)
def png_many_profiles() -> bytes:
    """Took 52 s: each is inflated to 1 MB."""
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(MB)))
    return png(*[profile] * 500, PIXELS, END)


@case(200)
def png_text_bomb() -> bytes:
    return png(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(8 * MB))), PIXELS, END)


@case(400)
def png_many_chunks() -> bytes:
    return png(chunk(b"abCd") * 100_000, PIXELS, END)


@case(400)
def png_many_empty_pixels() -> bytes:
    return png(chunk(b"IDAT") * 100_000, PIXELS, END)


@case(400)
def jpeg_many_scans() -> bytes:
    """Took minutes on a large one: each scan goes over the whole image."""
    body = save(photo(), "JPEG", progressive=True)
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * 200 + b"\xff\xd9"


@case(400)
def jpeg_many_segments() -> bytes:
    """Took 8 s and 0.7 GB."""
    return after_start(save(photo(), "JPEG"), b"\xff\xee\0\2" * 100_000)


@case(400)
def jpeg_many_exif_segments() -> bytes:
    """Took as long as 100 photographs: Pillow joins them one by one."""
    segment = b"\xff\xe1\0\x09Exif\0\0\0"
    return after_start(save(photo(), "JPEG"), segment * 4_000)


@case(200)
def tiff_many_rationals() -> bytes:
    """Took 0.75 s and 370 MB."""
    return tiff({282: (5, MB, struct.pack("<II", 3, 7) * MB)})


@case(200)
def tiff_overlapping_tags() -> bytes:
    return tiff(dict.fromkeys(range(1000, 3000), (7, MB, 8)), bytes(MB))


@case(200)
def jpeg_junk() -> bytes:
    return after_start(save(photo(), "JPEG"), b"\xff\0" + bytes(100_000))


@case(400)
def gif_many_blocks() -> bytes:
    """Took 0.9 GB."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0)
    return screen + b"!\xfe" + b"\1a" * 100_000 + b"\0;"


@case(415)
def bmp_run_length_row_by_byte() -> bytes:
    """Took 7 s, of 100 bytes."""
    return bmp(50_000, 1_000, 4, 2, b"\1\1\0\0" * 1_000)


@case(400)
def tiff_many_strips() -> bytes:
    """Took 15 s: an object for each, of an image of 8 rows."""
    return tiff({273: (4, 2 * MB, bytes(8 * MB)), 278: (4, 1, 1)})
