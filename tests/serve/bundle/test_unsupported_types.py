"""A body of another type is named in the error."""

import base64
import gzip
import io
import json
import zipfile

import numpy as np
import pytest

from pcae_serve.bundle import unsupported_types
from pcae_serve.bundle.image_limits import MAGIC, read_layout
from pcae_serve.errors import UnsupportedType

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
JPEG = b"\xff\xd8\xff\xe0" + bytes(40)


def numpy_file() -> bytes:
    np.save(file := io.BytesIO(), np.zeros(3))
    return file.getvalue()


def zip_file() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("photo.png", PNG)
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"\0\0\0\x1cftypheic" + bytes(20), "HEIC"),
        (b"\0\0\0\x1cftypmif1" + bytes(20), "HEIC"),
        (b"\0\0\0\x1cftypavif" + bytes(20), "AVIF"),
        (b"\0\0\0\x1cftypisom" + bytes(20), "video"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"II+\0\x08\0\0\0", "BigTIFF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\1\0\1\0", "icon"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"%PDF-1.7", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<!doctype html><title>404</title>", "HTML"),
        (numpy_file(), "NumPy"),
        (zip_file(), "zip"),
    ],
)
def test_a_format_is_named(body: bytes, name: str) -> None:
    message = unsupported_types.describe(body, "JPEG, PNG")
    assert name in message
    assert message.endswith("send one of JPEG, PNG")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (gzip.compress(PNG, mtime=0), "compressed by gzip"),
        (json.dumps({"image": "aGVsbG8="}).encode(), "JSON"),
        (b"[1, 2]", "JSON"),
        (b"data:image/png;base64," + base64.b64encode(PNG), "a data URI"),
        (b'"data:image/png;base64,' + base64.b64encode(PNG) + b'"', "a data URI"),
        (base64.b64encode(PNG), "base64"),
        (base64.b64encode(JPEG), "base64"),
        (b"https://example.org/cat.jpg", "a URL"),
        (b"image=%89PNG&tier=fast", "a URL-encoded form"),
    ],
)
def test_an_image_in_another_form_says_how_to_send_it(body: bytes, name: str) -> None:
    message = unsupported_types.describe(body, "JPEG, PNG")
    assert name in message
    assert "send the image file itself" in message


@pytest.mark.parametrize("body", [b"\0", b"photo", bytes(range(256)), b" " * 5000, b"{"])
def test_anything_else_is_unknown(body: bytes) -> None:
    assert unsupported_types.describe(body, "JPEG").startswith("unknown image type")


def test_the_check_of_the_header_says_it() -> None:
    with pytest.raises(UnsupportedType, match=r"HEIC.*send one of " + ", ".join(MAGIC)):
        read_layout(b"\0\0\0\x1cftypheic" + bytes(20), 1_000_000)
