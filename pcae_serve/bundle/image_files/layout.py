"""What an image file's header says about the work of decoding it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The properties of an image file that decide what decoding costs."""

    codec: str  # key of decode_cost.RATES, for example "PNG" or "TIFF LZW"
    width: int
    height: int
    samples: int = 3  # per pixel
    bits: int = 8  # per sample
    scans: int = 1  # passes over the whole image
    parts: int = 1  # strips or tiles
    coefficients: float = 0.0  # per pixel, if the codec keeps all of them at once
    turned: bool = False  # its EXIF orientation differs from the stored one

    @property
    def pixels(self) -> int:
        return self.width * self.height
