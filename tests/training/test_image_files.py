import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import RequestError
from pcae_training.data import load, to_pixels
from pcae_training.image_files import FileType, Use, accepted_body, display, file_type, foreign_type
from tests.support.images import image_bytes

PREPROCESS = Preprocess(8, 8, (0.5,) * 3, (0.5,) * 3)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
JXL = b"\0\0\0\x0cJXL \r\n\x87\n"


def encoded(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.JPG", b"", FileType(Use.IMAGE)),  # damaged, which decoding reports
        ("a.jfif", b"", FileType(Use.IMAGE)),
        ("a", image_bytes(), FileType(Use.IMAGE)),
        ("photo.jpg_large", image_bytes(kind="JPEG"), FileType(Use.IMAGE)),
        ("a.heic", image_bytes(), FileType(Use.IMAGE)),  # renamed
        ("a.HEIC", HEIC, FileType(Use.UNREADABLE, "HEIC")),
        ("a", HEIC, FileType(Use.UNREADABLE, "HEIC")),
        ("a.heic", b"damaged", FileType(Use.UNREADABLE, "HEIC")),
        ("a.jxl", JXL, FileType(Use.UNREADABLE, "JPEG XL")),
        ("a.bin", b"\xff\x0a\x00", FileType(Use.UNREADABLE, "JPEG XL")),
        ("a.nef", b"II*\0", FileType(Use.UNREADABLE, "camera raw")),
        ("a.svg", b"<?xml version='1.0'?><svg/>", FileType(Use.UNREADABLE, "SVG")),
        ("a.pgm", b"P5\n1 1\n255\n0", FileType(Use.CONVERTED, "PNM")),
        ("a.txt", b"BMW is a car", FileType(Use.LEFT_OUT, "not images")),
        ("a.xml", b"<annotation/>", FileType(Use.LEFT_OUT, "not images")),
        ("a", b"", FileType(Use.LEFT_OUT, "not images")),
        ("a.jpg.part", image_bytes(), FileType(Use.LEFT_OUT, "temporary and backup files")),
        ("a.jpg~", image_bytes(), FileType(Use.LEFT_OUT, "temporary and backup files")),
    ],
)
def test_types(name: str, content: bytes, expected: FileType, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert file_type(str(tmp_path / name), name) == expected


@pytest.mark.parametrize(
    ("brands", "kind"),
    [(b"avif", "AVIF"), (b"avis", "AVIF"), (b"mif1\0\0\0\0mif1avif", "AVIF"), (b"hevc", "HEIC"),
     (b"mif1\0\0\0\0mif1heic", "HEIC"), (b"isom", None)],
)  # fmt: skip
def test_brands_of_one_container(brands: bytes, kind: str | None) -> None:
    assert foreign_type(b"\0\0\0\x20ftyp" + brands) == kind


KINDS = [
    kind
    for kind, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000"), ("PPM", None))
    if feature is None or features.check(feature)
]


@pytest.mark.parametrize("kind", KINDS)
def test_converted_images_have_the_pixels_that_pillow_reads(kind: str) -> None:
    body = encoded(kind)
    with Image.open(io.BytesIO(body)) as image:
        expected = PREPROCESS.crop(image.convert("RGB"))
    assert (to_pixels(PREPROCESS, body).permute(1, 2, 0).numpy() == expected).all()


def test_what_the_server_accepts_stays_as_it_is() -> None:
    for body in (encoded("PNG"), encoded("JPEG"), b"", b"nothing", encoded("TIFF")):
        assert accepted_body(body) is body


@pytest.mark.parametrize("body", [encoded("PPM")[:40], HEIC, JXL, b"P6\n99999 99999\n255\n"])
def test_what_cannot_be_converted_is_one_line(body: bytes) -> None:
    with pytest.raises(RequestError) as raised:
        accepted_body(body)
    assert "\n" not in str(raised.value)


def test_without_a_decoder_the_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(RequestError, match="AVIF images are not supported; convert them to JPEG"):
        accepted_body(b"\0\0\0\x20ftypavif")


def test_photos_of_all_suffixes_count(tmp_path: Path) -> None:
    """A class whose photos are all HEIC stays a class, and its photos count as unreadable."""
    for name in ("cat", "dog", "emu"):
        for i in range(4):
            file = tmp_path / "train" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image_bytes())
    for file in (tmp_path / "train" / "emu").iterdir():
        file.write_bytes(HEIC)
        file.rename(file.with_suffix(".heic"))
    shutil.copy(tmp_path / "train/cat/0.png", tmp_path / "train/cat/10")
    images = load(str(tmp_path), "train", PREPROCESS)
    assert images.classes == ["cat", "dog", "emu"]
    assert images.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    assert images.unreadable == images.in_memory().unreadable == 4
    (reason, *_) = images._skipped.reasons.values()
    assert reason.endswith("HEIC images are not supported; convert them to JPEG or PNG")


def test_display_is_one_printable_line() -> None:
    assert display("a\nb é") == r"a\nb é"
    assert display(os.fsdecode(b"\xff")) == r"\udcff"
