"""What an image file's header says about the work of decoding it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The properties of an image file that decide what decoding costs."""

    kind: str  # as Pillow names it, for example "JPEG"
    width: int
    height: int
    samples: int = 3  # per pixel
    bits: int = 8  # per sample
    codec: str = ""  # key of decode_cost.RATES, for example "TIFF LZW"; by default `kind`
    scans: int = 1  # passes over the whole image
    parts: int = 1  # strips or tiles
    part_pixels: int = 0  # of a tile, which is decoded whole even if the image uses little of it
    coefficients: float = 0.0  # per pixel, if the codec keeps all of them at once
    orientation: int = 1  # as in EXIF
    skipped_bytes: int = 0  # before the pixels, nearly all of it metadata that no decoder sees
    ended: bool = True  # False: the file lacks its end marker

    @property
    def pixels(self) -> int:
        return self.width * self.height
