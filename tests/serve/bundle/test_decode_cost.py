"""What decoding an image file will cost, from its header."""

import struct
from collections.abc import Callable

import pytest
from PIL import Image

from pcae_serve.bundle import decode_cost, image_limits
from pcae_serve.bundle.decode_cost import DecodeCost
from pcae_serve.bundle.preprocess import MAX_PIXELS, decode_image
from pcae_serve.errors import RequestError, TooLarge
from tests.support.odd_images import CASES, noise, photo, png, save

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")  # as preprocess has it

FULL = 512  # twice the size that a model of 224 pixels resizes to


def refused(call: Callable[[bytes], object], body: bytes) -> None:
    """Check that a call returns, or refuses with one line."""
    try:
        call(body)
    except RequestError as error:
        detail = error.detail
    else:
        return
    assert "\n" not in detail


def predict(body: bytes, short: int | None = FULL) -> DecodeCost:
    layout = image_limits.read_layout(body, MAX_PIXELS)
    return decode_cost.predict(layout, len(body), short)


SMALL = noise(200)
LARGE = SMALL.resize((1500, 1200))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_more_pixels_cost_more(kind: str) -> None:
    small, large = (predict(save(image, kind)) for image in (SMALL, LARGE))
    assert large.seconds > 3 * small.seconds
    assert large.bytes > small.bytes
    assert large.pixels == 1_800_000


def test_a_reduced_scale_is_cheap_and_progressive_scans_are_not() -> None:
    body, progressive = save(LARGE, "JPEG"), save(LARGE, "JPEG", progressive=True)
    assert predict(body, 300).seconds < predict(body, None).seconds
    assert predict(body, 300).bytes < predict(body, None).bytes / 4
    assert predict(progressive).seconds > 2 * predict(body).seconds
    assert predict(progressive).bytes > predict(body).bytes + 2 * 1_800_000


def test_a_jpeg_without_its_end_is_decoded_in_full_and_again() -> None:
    """It was taken for one at a reduced scale: 5 MB were predicted, and 579 MB used."""
    body = save(LARGE, "JPEG")
    whole, cut = predict(body, 100), predict(body[:-2], 100)
    assert cut.seconds > 3 * whole.seconds
    assert cut.bytes > 3 * 4 * 1_800_000


def test_strips_of_a_tiff_may_share_a_jpeg_of_many_scans() -> None:
    body = save(Image.new("L", (800, 800)), "TIFF", compression="jpeg", tiffinfo={278: 8})
    cost = predict(body)
    assert cost.seconds < 0.02  # 100 strips with one scan each
    entry = body.index(struct.pack("<H", 279), int.from_bytes(body[4:8], "little"))
    shared = bytearray(body)
    shared[entry + 2 : entry + 4] = struct.pack("<H", 2)  # StripByteCounts of an unknown type
    assert predict(bytes(shared)).seconds > 5 * cost.seconds


def test_a_tiny_file_that_is_a_large_picture() -> None:
    """38 bytes that took a second and 786 MB."""
    body = bytearray(save(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    body[21:25] = struct.pack("<I", 7070 | 7070 << 14)
    cost = predict(bytes(body))
    assert cost.seconds > 0.5
    assert 750e6 < cost.bytes < 1_000e6


def test_an_animation_costs_its_canvas() -> None:
    frames = {"save_all": True, "append_images": [Image.new("RGB", (1000, 1000))]}
    assert predict(save(Image.new("RGB", (1000, 1000)), "WEBP", **frames)).pixels == 1_000_000


def test_too_many_pixels_are_refused_by_the_header() -> None:
    with pytest.raises(TooLarge):
        predict(png(size=(8_000, 8_000)))


def test_what_can_be_decoded_can_be_predicted() -> None:
    for name, (make, status) in CASES.items():
        body = make()
        if status == 200:
            size = decode_image(body).size
            assert predict(body).pixels == size[0] * size[1], name
        else:
            refused(predict, body)


def test_metadata_costs_nothing() -> None:
    plain = save(photo(), "JPEG")
    segments = b"".join(b"\xff\xe1" + (60_002).to_bytes(2) + bytes(60_000) for _ in range(100))
    heavy = plain[:2] + segments + plain[2:]
    light, other = (
        decode_cost.predict(image_limits.read_layout(body, 10**6), len(body))
        for body in (plain, heavy)
    )
    assert other.seconds == pytest.approx(light.seconds, rel=0.1)
    assert other.bytes == pytest.approx(light.bytes, rel=0.1)
