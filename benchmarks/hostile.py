"""Time and memory of decoding files that are crafted to be expensive, each in its own process.

    python benchmarks/hostile.py [NAME ...]

Files are as large as the server accepts by default: bodies of 20 MB, 50 million pixels. The files
named largest_* are not attacks but the largest images that are decoded. FILES lists the names.
"""

import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import odd_images  # noqa: E402
from tests.support.odd_images import END, MB, PIXELS, bmp, chunk, exif, photo, save, tiff  # noqa: E402

SIDE = 7_071  # squared, just under 50 million
LIMIT_S = 300


def png_profiles() -> bytes:
    """20 MB of colour profiles that decompress to 1 MB each."""
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(MB)))
    return odd_images.png(*[profile] * (20 * MB // len(profile)), PIXELS, END)


def png_chunks() -> bytes:
    return odd_images.png(chunk(b"abCd") * (20 * MB // 12), PIXELS, END)


def png_empty_pixels() -> bytes:
    return odd_images.png(chunk(b"IDAT") * (20 * MB // 12), PIXELS, END)


def png_one_pixel_wide() -> bytes:
    return save(Image.new("L", (1, 50 * MB)), "PNG")


def jpeg_junk() -> bytes:
    return odd_images.after_start(save(photo(), "JPEG"), b"\xff\0" + bytes(20 * MB))


def jpeg_segments() -> bytes:
    return odd_images.after_start(save(photo(), "JPEG"), b"\xff\xee\0\2" * (5 * MB))


def jpeg_scans() -> bytes:
    """2,000 scans of 49 million pixels, in 0.3 MB."""
    body = save(Image.new("L", (7_000, 7_000)), "JPEG", progressive=True)
    return body[:-2] + body[body.rindex(b"\xff\xda") : -2] * 2_000 + b"\xff\xd9"


def jpeg_scans_allowed() -> bytes:
    body = save(Image.new("L", (7_000, 7_000)), "JPEG", progressive=True)
    return body[:-2] + body[body.rindex(b"\xff\xda") : -2] * 26 + b"\xff\xd9"


def gif_blocks() -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\2\2\x4c\1\0;"
    return odd_images.gif_many_blocks()[:15] + b"\1a" * (10 * MB) + b"\0" + frame


def gif_disposal() -> bytes:
    """A frame that Pillow allocates for its disposal while it reads the header."""
    control = b"!\xf9\4\x08\0\0\0\0,"
    frame = struct.pack("<HHHHB", 0, 0, 13_000, 13_000, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + control + frame + b"\2\2\x4c\1\0;"


def bmp_run_length() -> bytes:
    """Rows that end after one pixel; Pillow fills the rest byte by byte."""
    return bmp(50_000, 1_000, 4, 2, b"\1\1\0\0" * 1_000)


def tiff_strips() -> bytes:
    return odd_images.tiff_many_strips()


def tiff_tile() -> bytes:
    """8 x 8 pixels of a tile of 1,600 million."""
    tile = {259: (3, 1, 8), 322: (4, 1, 40_000), 323: (4, 1, 40_000)}
    return tiff(tile, zlib.compress(bytes(40_000**2), 1))


def largest_png() -> bytes:
    return save(Image.new("RGB", (SIDE, SIDE)), "PNG")


def largest_png_alpha_turned() -> bytes:
    return save(Image.new("RGBA", (SIDE, SIDE)), "PNG", exif=exif(6))


def largest_jpeg() -> bytes:
    return save(Image.new("RGB", (SIDE, SIDE)), "JPEG", subsampling=0)


def largest_jpeg_progressive() -> bytes:
    return save(Image.new("RGB", (SIDE, SIDE)), "JPEG", subsampling=0, progressive=True)


def largest_webp() -> bytes:
    return save(Image.new("RGB", (SIDE, SIDE)), "WEBP")


def largest_webp_alpha_turned() -> bytes:
    return save(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), "WEBP", exif=exif(6))


FILES: dict[str, Callable[[], bytes]] = {
    make.__name__: make
    for make in (
        png_profiles, png_chunks, png_empty_pixels, png_one_pixel_wide, jpeg_junk, jpeg_segments,
        jpeg_scans, jpeg_scans_allowed, gif_blocks, gif_disposal, bmp_run_length, tiff_strips,
        tiff_tile, largest_png, largest_png_alpha_turned, largest_jpeg, largest_jpeg_progressive,
        largest_webp, largest_webp_alpha_turned,
    )
}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        print(measure(sys.argv[2]))
        return
    print("| file | MB | seconds | memory, MB | answer |\n| --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or FILES:
        command = [sys.executable, __file__, "--alone", name]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
            print(done.stdout.strip(), flush=True)
        except subprocess.TimeoutExpired:
            print(f"| {name} | | over {LIMIT_S} | | |", flush=True)


def measure(name: str) -> str:
    from pcae_serve.bundle.preprocess import Preprocess
    from pcae_serve.errors import RequestError

    preprocess = Preprocess(224, 256, (0.5,) * 3, (0.5,) * 3)
    body = FILES[name]()
    preprocess(save(photo(), "PNG"))  # imports happen at the first image
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, begin = memory_mb("VmRSS"), time.perf_counter()
    try:
        preprocess(body)
        answer = "200"
    except RequestError as error:
        answer = f"{error.status} {error.detail}"
    took_s = time.perf_counter() - begin
    peak_mb = memory_mb("VmHWM") - before
    return f"| {name} | {len(body) / MB:.1f} | {took_s:.2f} | {peak_mb:.0f} | {answer[:70]} |"


def memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
