"""Name what a body is that is not an image of a supported type, for the error message."""

import re

#: What to send, for a body that wraps an image.
_SEND_FILE = "send the image file itself as the body, or as the file field 'image' of a form"

#: Formats by their first bytes: name, pattern.
_FORMATS = [
    ("an AVIF image", rb".{4}ftypavi[fs]"),
    ("a HEIC image", rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)"),
    ("a video", rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI "),
    ("a JPEG XL image", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    ("a JPEG 2000 image", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    ("a BigTIFF image", rb"II\+\0|MM\0\+"),
    ("a Photoshop file", rb"8BPS"),
    ("an icon", rb"\0\0[\x01\x02]\0"),
    ("a DICOM file", rb".{128}DICM"),
    ("a NumPy array", rb"\x93NUMPY"),
    ("a PDF document", rb"%PDF-"),
    ("a zip archive", rb"PK\x03\x04"),
    ("an SVG image", rb"\s*(<[?!].{0,800})?<svg\b"),
    ("HTML or XML", rb"\s*<[!?a-zA-Z]"),
]
#: Bodies that may hold an image in another form: name, pattern.
_WRAPPED = [
    ("compressed by gzip", rb"\x1f\x8b"),
    ("JSON", rb"\s*[\[{]\s*(\"|\d|[\[{\]}]|-|null|true|false)"),
    ("a data URI", rb"\s*\"?data:[\w/+.-]*[;,]"),
    ("a URL", rb"\s*\"?(https?|s3|gs|file)://"),
    ("a URL-encoded form", rb"[\w.-]{1,40}=[\w%+.&=/~-]*\s*$"),
    ("base64 text", rb"\s*\"?(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-9A-Za-z+/]{6}|SUkqA|TU0AK)"),
]
_PATTERNS = [
    (what, re.compile(pattern, re.DOTALL | re.IGNORECASE if b"<" in pattern else re.DOTALL))
    for what, pattern in _FORMATS + _WRAPPED
]
_UNWRAP = {what for what, _ in _WRAPPED}
#: Bytes of a body that are looked at.
_MAX_HEAD_BYTES = 1024


def describe(body: bytes, supported: str) -> str:
    """Return one line on a body whose first bytes match no supported type, and what to send.

    supported: names of the supported types.
    """
    head = body[:_MAX_HEAD_BYTES]
    what = next((what for what, pattern in _PATTERNS if pattern.match(head)), None)
    if what is None:
        return f"unknown image type: the first bytes match none of {supported}"
    if what in _UNWRAP:
        return f"the body is {what}, not an image; {_SEND_FILE}"
    return f"the body is {what}, which this server does not read; send one of {supported}"
