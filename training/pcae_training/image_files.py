"""Decide which files of a folder are images, and convert types that only training can read.

The content decides, as in the server: a suffix is trusted if it is one of SUFFIXES, all other files
are identified by their first bytes. Types that the server does not accept are named. Those that
Pillow reads (AVIF, JPEG 2000, PNM) are converted without loss to PNG and then decoded as usual.
"""

import io
import re
from enum import Enum
from pathlib import Path, PurePath
from typing import NamedTuple

from PIL import Image, ImageOps, features

from pcae_serve.bundle.image_limits import MAGIC
from pcae_serve.bundle.preprocess import MAX_PIXELS
from pcae_serve.errors import RequestError, TooLarge, UnreadableImage, UnsupportedType, one_line

#: Suffixes of image types that the server accepts; such files are not opened to identify them.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
)

#: Other image types by suffix. Cameras' raw files look like TIFF, but contain a thumbnail first.
RAW = "camera raw"
FOREIGN_SUFFIXES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    ".avif": "AVIF",
    ".jxl": "JPEG XL",
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), "JPEG 2000"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PNM"),
    ".psd": "PSD",
    ".ico": "ICO",
    ".svg": "SVG",
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef"), RAW),
}

#: First bytes of these types, in the order in which they are tried.
_FOREIGN_MAGIC = {
    "AVIF": re.compile(rb".{4}ftyp(?:avi[fs]|(?:mif1|miaf|msf1)(?=.{4}.*avi[fs]))", re.DOTALL),
    "HEIC": re.compile(rb".{4}ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    "PNM": re.compile(rb"P[1-6]\s+(?:#|\d)"),
    "PSD": re.compile(rb"8BPS"),
    "ICO": re.compile(rb"\0\0[\x01\x02]\0[\x01-\xff]\0"),
    "SVG": re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][^>]*>\s*)*<svg\b", re.IGNORECASE),
}
#: Two letters are not enough to identify a file without a suffix: the reserved field is zero.
_BMP = re.compile(rb"BM.{4}\0{4}", re.DOTALL)

#: Types to convert, and the feature of Pillow that each needs.
_CONVERTED = {"AVIF": "avif", "JPEG 2000": "jpg_2000", "PNM": None}
_PILLOW_NAMES = {"AVIF": "AVIF", "JPEG 2000": "JPEG2000", "PNM": "PPM"}

#: Names, in lower case, of what operating systems, file servers and notebooks leave in folders.
_SYSTEM = frozenset(
    (
        "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin",
        "system volume information", "lost+found", "#recycle", "@recycle", "icon\r", "__pycache__",
    )
)  # fmt: skip
_TEMPORARY = (".tmp", ".part", ".partial", ".crdownload", ".download", ".bak", ".swp", "~")

#: Bytes that identify a type: a comment may precede the first element of an SVG.
HEAD_BYTES = 256


class Use(Enum):
    """What is done with a file."""

    IMAGE = "image"
    CONVERTED = "converted"  # an image that training reads and the server does not
    UNREADABLE = "unreadable"  # an image of a type that Pillow cannot read here
    LEFT_OUT = "left out"


class FileType(NamedTuple):
    """A file's type and its use."""

    use: Use
    name: str = ""  # of a type that the server does not accept; for LEFT_OUT the reason


def is_system(name: str) -> bool:
    """Return whether a file or folder is hidden, or left there by a system."""
    lower = name.lower()
    return lower.startswith(".") or lower in _SYSTEM


def suffix(name: str) -> str:
    """Return a file name's suffix in lower case, "" without one."""
    return PurePath(name).suffix.lower()


def file_type(path: str, name: str) -> FileType:
    """Identify the regular file `name` at `path`. Raise OSError if it cannot be opened."""
    if name.lower().endswith(_TEMPORARY):
        return FileType(Use.LEFT_OUT, "temporary and backup files")
    ending = suffix(name)
    if ending in SUFFIXES:
        return FileType(Use.IMAGE)
    named = FOREIGN_SUFFIXES.get(ending)
    if named == RAW:
        return FileType(Use.UNREADABLE, RAW)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (Path cannot be opened unbuffered)
        head = file.read(HEAD_BYTES)
    if is_accepted(head):
        return FileType(Use.IMAGE)
    kind = foreign_type(head) or named
    if kind is None:
        return FileType(Use.LEFT_OUT, "not images")
    return FileType(Use.CONVERTED if can_convert(kind) else Use.UNREADABLE, kind)


def is_accepted(head: bytes) -> bool:
    """Return whether a file without a known suffix is of a type that the server accepts."""
    kind = next((name for name, magic in MAGIC.items() if magic.match(head)), None)
    return kind is not None and (kind != "BMP" or _BMP.match(head) is not None)


def foreign_type(head: bytes) -> str | None:
    """Return the image type that the server does not accept, by a file's first bytes."""
    return next((name for name, magic in _FOREIGN_MAGIC.items() if magic.match(head)), None)


def can_convert(kind: str) -> bool:
    """Return whether this Pillow reads the type."""
    feature = _CONVERTED.get(kind, "")
    return feature is None or (feature != "" and bool(features.check(feature)))


def accepted_body(body: bytes) -> bytes:
    """Return the image file, converted to PNG if it is of another type that Pillow reads.

    Raise RequestError, which names the type, if it cannot be read.
    """
    head = body[:HEAD_BYTES]
    if any(magic.match(head) for magic in MAGIC.values()):
        return body
    kind = foreign_type(head)
    if kind is None:
        return body
    if not can_convert(kind):
        raise UnsupportedType(f"{kind} images are not supported; convert them to JPEG or PNG")
    return _to_png(body, kind)


def _to_png(body: bytes, kind: str) -> bytes:
    try:
        with Image.open(io.BytesIO(body), formats=[_PILLOW_NAMES[kind]]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise TooLarge(f"the image has more than {MAX_PIXELS:,} pixels; scale it down")
            buffer = io.BytesIO()
            upright = ImageOps.exif_transpose(image)
            upright.save(buffer, "PNG", compress_level=1, exif=b"", icc_profile=None)
            return buffer.getvalue()
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise many types on damaged files
        raise UnreadableImage(f"cannot read the {kind} image: {one_line(error)}") from None


def unreadable_reason(kind: str) -> str:
    """Return why a file of a type that cannot be read is skipped."""
    return f"{kind} images are not supported; convert them to JPEG or PNG"


def display(path: str | Path) -> str:
    """Return a path in one line of printable text: newlines and invalid bytes are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(path)
    )
