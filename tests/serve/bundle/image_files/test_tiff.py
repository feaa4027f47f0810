"""TIFF files: what reaches the decoder."""

import struct

import numpy as np
import pytest
from PIL import Image

from pcae_serve.bundle.image_files import tiff as tiff_file
from pcae_serve.bundle.preprocess import decode_image
from pcae_serve.errors import UnreadableImage
from tests.support.odd_images import photo, save, tiff

MB = 1_000_000


def test_metadata_changes_no_pixel() -> None:
    info = {
        34675: bytes(500_000),  # colour profile
        37724: b"Adobe Photoshop Document Data Block\0" * 50_000,
        33723: bytes(2_000),
        282: 72.5,
        270: "a photograph",
    }
    plain, rich = save(photo(), "TIFF"), save(photo(), "TIFF", tiffinfo=info)
    np.testing.assert_array_equal(decode_image(rich), decode_image(plain))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_the_orientation_is_applied_once(orientation: int, compression: str) -> None:
    image = photo()
    turned = save(image, "TIFF", tiffinfo={274: orientation}, compression=compression)
    expected = decode_image(save(image, "JPEG", quality=100, exif=_exif(orientation)))
    upright = decode_image(turned)
    assert upright.size == expected.size
    difference = np.asarray(upright).astype(int) - np.asarray(expected)
    assert abs(difference).mean() < 4


def _exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def test_the_orientation_of_xmp_counts_if_no_tag_has_it() -> None:
    xmp = b'<x tiff:Orientation="6"/>'
    body = tiff({257: (4, 1, 4), 278: (4, 1, 4), 700: (1, len(xmp), xmp)}, bytes(32))
    assert decode_image(body).size == (4, 8)


N = 1_000_000
HOSTILE: dict[str, dict[int, tuple[int, int, int | bytes]]] = {
    "rationals": {282: (5, N, struct.pack("<II", 3, 7) * N)},
    "one long tag": {60_000: (7, 4 * N, bytes(4 * N))},
    "overlapping tags": dict.fromkeys(range(1000, 3000), (7, N, 8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_tags_are_never_read(name: str) -> None:
    """Pillow took 0.75 s and 370 MB for them; its copy of the file does not have them."""
    body = tiff(HOSTILE[name], bytes(64))
    assert decode_image(body).size == (8, 8)
    assert not tags_of(tiff_file.essential(body)) & HOSTILE[name].keys()


def tags_of(body: bytes) -> set[int]:
    """Return the numbers of a TIFF's tags."""
    (at,) = struct.unpack_from("<I", body, 4)
    (count,) = struct.unpack_from("<H", body, at)
    return {struct.unpack_from("<H", body, at + 2 + 12 * i)[0] for i in range(count)}


@pytest.mark.parametrize(
    "tags",
    [
        {258: (3, N, struct.pack("<H", 8) * N)},
        {279: (4, N, struct.pack("<I", 8) * N)},
        {320: (3, N, bytes(2 * N))},
    ],
)
def test_tags_that_pixels_depend_on_have_a_limit(tags: dict[int, tuple[int, int, bytes]]) -> None:
    with pytest.raises(UnreadableImage, match="values in tag"):
        decode_image(tiff({**tags}))


def test_too_many_tags_are_refused() -> None:
    with pytest.raises(UnreadableImage, match="5009 tags"):
        decode_image(tiff(dict.fromkeys(range(1000, 6000), (3, 1, 0))))
