"""The orientation, from EXIF and XMP."""

import struct

import pytest
from PIL import Image

from pcae_serve.bundle.image_files.orientation import find_orientation
from tests.support.odd_images import exif


@pytest.mark.parametrize("value", range(1, 9))
def test_what_pillow_wrote(value: int) -> None:
    assert find_orientation([exif(value).tobytes()]) == value


@pytest.mark.parametrize("kind", [(1, "B3x"), (3, "H2x"), (4, "I")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_number_types_and_byte_orders(kind: tuple[int, str], order: str) -> None:
    number, form = kind
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    data += struct.pack(order + "HHI" + form, 274, number, 1, 6)
    assert find_orientation([data]) == 6


@pytest.mark.parametrize(
    "data", [b"", b"II", b"junk" * 9, b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"]
)
def test_junk_is_none(data: bytes) -> None:
    assert find_orientation([data]) == 1


def test_values_out_of_range_are_none() -> None:
    tags = Image.Exif()
    tags[274] = 9
    assert find_orientation([tags.tobytes()]) == 1
    assert find_orientation(xmp=b'tiff:Orientation="0"') == 1


def test_data_in_several_parts() -> None:
    data = exif(6).tobytes()
    assert find_orientation([data[:20], data[20:]]) == 6


def test_xmp_counts_if_exif_has_no_orientation() -> None:
    assert find_orientation([b"junk"], b"<tiff:Orientation>8</tiff:Orientation>") == 8
    assert find_orientation([exif(3).tobytes()], b'tiff:Orientation="8"') == 3
