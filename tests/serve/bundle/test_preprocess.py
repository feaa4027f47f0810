import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pcae_serve.bundle.preprocess import REDUCED, Preprocess, decode_image, read_picture
from pcae_serve.errors import RequestError, TooLarge, UnreadableImage, UnsupportedType
from tests.support.odd_images import END, chunk, png, tiff

HALF = (0.5, 0.5, 0.5)
SMALL = Preprocess(image_size=28, resize=28, mean=HALF, std=HALF)
LARGE = Preprocess(image_size=224, resize=256, mean=HALF, std=HALF)


def photo(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth colour image that JPEG hardly changes, different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=2).astype(np.uint8))


def body(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def sixteen_bit(kind: str) -> bytes:
    grey = np.asarray(photo().convert("L")).astype(np.uint16)
    return body(Image.fromarray(grey * 257), kind)


def oriented(orientation: int) -> bytes:
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return body(photo().transpose(turn), "JPEG", quality=100, subsampling=0, exif=exif)


COLOUR: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: body(photo(), "JPEG", quality=100, subsampling=0),
    "jpeg-progressive": lambda: body(photo(), "JPEG", quality=100, progressive=True),
    "jpeg-turned-over": lambda: oriented(3),
    "jpeg-on-its-side": lambda: oriented(6),
    "jpeg-broken-exif": lambda: body(photo(), "JPEG", quality=100, exif=b"Exif\0\0II*\0junk"),
    "jpeg-garbage-exif": lambda: body(photo(), "JPEG", quality=100, exif=b"Exif\0\0garbage!"),
    "png": lambda: body(photo(), "PNG"),
    "png-alpha": lambda: body(photo().convert("RGBA"), "PNG"),
    "png-palette": lambda: body(photo().quantize(256), "PNG"),
    "png-palette-transparency": lambda: body(
        photo().quantize(200), "PNG", transparency=bytes(range(200))
    ),
    "webp": lambda: body(photo(), "WEBP", lossless=True),
    "webp-alpha": lambda: body(photo().convert("RGBA"), "WEBP", lossless=True),
    "bmp": lambda: body(photo(), "BMP"),
    "gif": lambda: body(photo(), "GIF"),
    "gif-animated": lambda: body(
        photo(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]
    ),
    "tiff": lambda: body(photo(), "TIFF"),
    "tiff-lzw": lambda: body(photo(), "TIFF", compression="tiff_lzw"),
}
GREY: dict[str, Callable[[], bytes]] = {
    "png-grey": lambda: body(photo().convert("L"), "PNG"),
    "png-grey-alpha": lambda: body(photo().convert("LA"), "PNG"),
    "png-16-bit": lambda: sixteen_bit("PNG"),
    "tiff-16-bit": lambda: sixteen_bit("TIFF"),
    "jpeg-grey": lambda: body(photo().convert("L"), "JPEG", quality=100),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow warns and continues
@pytest.mark.parametrize("kind", COLOUR)
def test_every_kind_of_colour_image(kind: str) -> None:
    pixels = np.asarray(decode_image(COLOUR[kind]()))
    assert pixels.shape == (30, 40, 3)
    error = np.abs(pixels.astype(int) - np.asarray(photo()))
    assert error.mean() < (12 if "palette" in kind or "gif" in kind else 4)


@pytest.mark.parametrize("kind", GREY)
def test_every_kind_of_grey_image(kind: str) -> None:
    pixels = np.asarray(decode_image(GREY[kind]()))
    np.testing.assert_allclose(pixels[..., 0], np.asarray(photo().convert("L")), atol=3)
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("mode", ["LA", "P", "PA", "RGBA", "RGBX", "1", "YCbCr"])
def test_the_rule_is_pillows(mode: str) -> None:
    """What torchvision, timm and Hugging Face's processors make of an image."""
    image = photo().convert(mode)
    if mode in ("LA", "PA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    kind = {"RGBX": "TIFF", "YCbCr": "TIFF", "PA": "TIFF"}.get(mode, "PNG")
    file = body(image, kind)
    with Image.open(io.BytesIO(file)) as opened:
        expected = opened.convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(file)), np.asarray(expected))


def test_what_is_transparent_has_the_colour_under_it() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 30, 40, 0))
    assert (np.asarray(decode_image(body(clear, "PNG"))) == (200, 30, 40)).all()


def test_samples_of_more_than_eight_bits_keep_the_high_ones() -> None:
    colour = struct.pack(">3H", 0x12FF, 0x8000, 0xFE01) * 64
    rows = b"".join(b"\0" + colour[48 * row : 48 * (row + 1)] for row in range(8))
    wide = png(chunk(b"IDAT", zlib.compress(rows)), END, depth=16)
    assert (np.asarray(decode_image(wide)) == (0x12, 0x80, 0xFE)).all()
    twelve = tiff({258: (3, 1, 12)}, bytes([0xAB, 0xCA, 0xBC]) * 32)  # 0xabc, 0xabc
    assert (np.asarray(decode_image(twelve)) == 0xAB).all()
    white_is_zero = tiff({258: (3, 1, 16), 262: (3, 1, 0)}, struct.pack("<H", 0x0102) * 64)
    assert (np.asarray(decode_image(white_is_zero)) == 255 - 0x01).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(UnsupportedType, match=f"{mode}\\) have no defined range; save it with 8"):
        decode_image(body(photo().convert("L").convert(mode), "TIFF"))


def test_a_photograph_with_several_pictures_is_its_first() -> None:
    file = body(photo(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    with Image.open(io.BytesIO(file)) as opened:
        assert opened.format == "MPO"  # as phones write them
    np.testing.assert_array_equal(
        np.asarray(decode_image(file)), np.asarray(decode_image(body(photo(), "JPEG")))
    )


def test_no_parser_sees_what_does_not_begin_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("Pillow was asked")

    monkeypatch.setattr(Image, "open", refuse)
    for text in (b"RIFF\x24\0\0\0WAVEfmt ", b"II+\0\x08\0\0\0", b"P6 1 1 255\nabc", b"8BPS\0\1"):
        with pytest.raises(UnsupportedType, match=r"unknown image type|does not read"):
            decode_image(text)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "lzw": {"compression": "tiff_lzw"},
    }
    options = lossless.get(kind, {})
    kind = "TIFF" if kind == "lzw" else kind
    file = body(photo(), kind, exif=exif, **options)
    with Image.open(io.BytesIO(file)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(file)), np.asarray(expected))


def cloudy(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Coarse, so that what changes it is a shift and not a finer filter."""
    cells = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).convert(mode)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(33, 700), st.integers(33, 700)),
    orientation=st.integers(1, 8),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    resize=st.sampled_from([16, 20, 32]),
    squash=st.booleans(),
)
def test_a_reduced_scale_moves_nothing(
    size: tuple[int, int], orientation: int, mode: str, resize: int, squash: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = body(cloudy(size, mode), "JPEG", quality=95, exif=exif)
    crop = resize if squash else resize - 4
    preprocess = Preprocess(crop, resize, HALF, HALF, squash=squash)
    if min(size) >= 2 * REDUCED * resize:
        assert min(read_picture(file, short=REDUCED * resize).image.size) < min(size)
    difference = np.abs(preprocess(file).astype(int) - preprocess.crop(decode_image(file)))
    assert difference.max() <= 8  # a pixel's shift makes 20 and more
    assert difference.mean() < 1


def test_the_scale_keeps_twice_what_is_needed() -> None:
    file = body(cloudy((1030, 1200)), "JPEG")
    scales = {
        short: read_picture(file, short=short).image.size for short in (516, 515, 257, 128, 16)
    }
    assert scales == {
        516: (1030, 1200),
        515: (515, 600),
        257: (258, 300),
        128: (129, 150),
        16: (129, 150),
    }
    assert read_picture(file, short=16).size == (1030, 1200)


def test_the_limit_is_of_the_files_own_pixels() -> None:
    file = body(cloudy((640, 480)), "JPEG")
    with pytest.raises(TooLarge, match="640 x 480 pixels, over the limit of 307,199"):
        SMALL(file, max_pixels=640 * 480 - 1)
    assert SMALL(file, max_pixels=640 * 480).shape == (28, 28, 3)


def test_cmyk_jpeg() -> None:
    image = decode_image(body(photo().convert("CMYK"), "JPEG", quality=100))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo())).mean() < 12


def test_one_bit_png() -> None:
    assert set(np.unique(np.asarray(decode_image(body(photo().convert("1"), "PNG"))))) == {0, 255}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_unreadable(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = body(noise, kind)
    with pytest.raises(UnreadableImage, match=r"truncated|damaged|cannot read") as raised:
        decode_image(whole[: max(12, int(share * len(whole)))])
    assert raised.value.status == 400
    assert "\n" not in raised.value.detail


def test_nothing_is_unreadable() -> None:
    with pytest.raises(UnreadableImage, match="empty"):
        decode_image(b"")


@pytest.mark.parametrize("text", [b"I am named cat.jpg", b"\0" * 100, b"<svg></svg>", b"%PDF"])
def test_what_is_no_image_is_an_unsupported_type(text: bytes) -> None:
    with pytest.raises(UnsupportedType) as raised:
        decode_image(text)
    assert raised.value.status == 415


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_only_ever_raise_request_errors() -> None:
    rng, multiline = np.random.default_rng(0), 0
    for make in [*COLOUR.values(), *GREY.values()]:
        whole = make()
        for _ in range(20):
            damaged = bytearray(whole)
            for at in rng.integers(0, len(whole), 8):
                damaged[at] = rng.integers(0, 256)
            try:
                decode_image(bytes(damaged), max_pixels=1_000_000)
            except RequestError as error:
                multiline += "\n" in error.detail


def test_too_many_pixels_are_refused_before_decoding() -> None:
    header_only = body(photo(), "PNG")[:60]  # decoding this would fail as truncated
    with pytest.raises(TooLarge, match="40 x 30 pixels, over the limit of 1,199") as raised:
        decode_image(header_only, max_pixels=1199)
    assert raised.value.status == 413
    decode_image(body(photo(), "PNG"), max_pixels=1200)


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize(
    "side", [8_000, 10_000, 20_000]
)  # below, between and above Pillow's limits
def test_pillows_own_guard_changes_no_answer(side: int, action: str) -> None:
    bitmap = bytearray(body(photo(), "BMP"))
    bitmap[18:26] = np.array([side, side], dtype="<i4").tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter(action)  # type: ignore[arg-type]
        with pytest.raises(TooLarge):
            decode_image(bytes(bitmap))


@pytest.mark.parametrize("width", [27, 28, 29, 280, 281])
@pytest.mark.parametrize("height", [28, 280])
def test_shorter_side_resized_then_the_centre(width: int, height: int) -> None:
    image = photo(width, height)
    short = min(image.size)
    whole = image.resize(
        (max(28, round(width * 28 / short)), max(28, round(height * 28 / short))), SMALL.resample
    )
    left, top = ((side - 28) // 2 for side in whole.size)
    expected = np.asarray(whole.crop((left, top, left + 28, top + 28))).astype(int)
    pixels = SMALL.crop(image)
    assert pixels.shape == (28, 28, 3)
    assert np.abs(pixels - expected).max() <= 1  # the last bit, of box corners in float32


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = photo(28, 28)
    np.testing.assert_array_equal(SMALL(body(image, "PNG")), np.asarray(image))
    wide = photo(40, 28)
    np.testing.assert_array_equal(SMALL(body(wide, "PNG")), np.asarray(wide)[:, 6:34])


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3000, 2), (2, 3000), (100_000, 1)])
@pytest.mark.parametrize("preprocess", [SMALL, LARGE], ids=["small", "large"])
def test_strips_make_no_giant(size: tuple[int, int], preprocess: Preprocess) -> None:
    # resized whole, the last would have 100,000 * 256 * 256 pixels
    pixels = preprocess(body(Image.new("RGB", size, (9, 80, 200)), "PNG"))
    assert (pixels == (9, 80, 200)).all()
    assert pixels.shape == (preprocess.image_size, preprocess.image_size, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_threads_agree() -> None:
    bodies = [make() for make in [*COLOUR.values(), *GREY.values()]] * 4
    expected = [LARGE(one) for one in bodies]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(expected, pool.map(LARGE, bodies), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_crop_lies_inside() -> None:
    with pytest.raises(ValueError, match="cannot crop 224 pixels out of 200"):
        replace(LARGE, resize=200)


@pytest.mark.parametrize(
    "size", [(451, 300), (384, 191), (300, 400), (550, 660), (64, 64)], ids=str
)
def test_pixels_are_those_of_transformers(hugging_face: Any, size: tuple[int, int]) -> None:
    """Resized and cropped: the longer side rounded down, and only the crop ever made."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    theirs = hugging_face.BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=224, resample=3
    )(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    ours = Preprocess(224, 256, (0.5,) * 3, (0.5,) * 3).crop(image)
    difference = np.abs(ours.transpose(2, 0, 1).astype(int) - theirs.astype(int))
    assert difference.max() <= 2  # of 255, and hardly anywhere: a pixel to the side gives 100
    assert difference.mean() < 0.1
