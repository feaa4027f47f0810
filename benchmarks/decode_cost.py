"""Predicted and measured cost of decoding: CPU seconds and peak memory, per kind of file.

    python benchmarks/decode_cost.py [--side 7000] [--match TEXT] [--json FILE]

Files have up to side² pixels: flat ones, whose few bytes are the cheapest attack, smooth ones like
photographs, and noise. Each is decoded in a process of its own. The rates in
pcae_serve/bundle/decode_cost.py should predict seconds within a factor of two, and bytes from
above.
"""

import argparse
import io
import json
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pcae_serve.bundle import decode_cost, image_limits  # noqa: E402
from pcae_serve.bundle.preprocess import REDUCED, Preprocess  # noqa: E402

HEAD = """\
| file | MB | predicted, s | measured, s | ratio | predicted, MB | measured, MB |
| --- | --- | --- | --- | --- | --- | --- |"""
ROW = (
    "| {file} | {file_mb:.2f} | {predicted_s:.3f} | {measured_s:.3f} | {times:.2f} |"
    " {predicted_mb:.0f} | {measured_mb:.0f} |"
)
MAX_PIXELS = 10**9
PREPROCESS = Preprocess(224, 256, (0.5,) * 3, (0.5,) * 3)
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "lzma", "zstd", "jpeg", "packbits")


def contents(side: int) -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (min(side, 1_000), min(side, 1_000), 3), np.uint8)
    times = -(-side // tile.shape[0])
    noise = np.tile(tile, (times, times, 1))[:side, :side]
    coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
    return {
        "flat": Image.new("RGB", (side, side), (9, 99, 9)),
        "smooth": coarse.resize((side, side)),
        "noise": Image.fromarray(noise),
    }


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def png_raw(side: int, bits: int, colour: int, interlaced: int, pixel_bytes: int) -> bytes:
    """Return a PNG of zeros; Pillow writes neither 16-bit colour nor interlaced files."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, interlaced)
    packer = zlib.compressobj(6)
    rows = side * (1 + side * pixel_bytes) + 16 * side * interlaced
    pixels = b"".join(packer.compress(bytes(1 << 20)) for _ in range(rows // (1 << 20) + 1))
    parts = (b"IHDR", head), (b"IDAT", pixels + packer.flush()), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def many_scans(image: Image.Image) -> bytes:
    body = save(image, "JPEG", progressive=True)
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * (32 - body.count(b"\xff\xda")) + b"\xff\xd9"


def strips(image: Image.Image) -> bytes:
    """As many strips as are allowed, of one row each."""
    tall = image.resize((max(1, image.width**2 // 65_000), 65_000), Image.Resampling.NEAREST)
    return save(tall, "TIFF", compression="tiff_lzw", tiffinfo={278: 1})


def turned() -> Image.Exif:
    tags = Image.Exif()
    tags[274] = 6
    return tags


def files(side: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield name and maker of each file."""

    def add(name: str, kind: str, of: Image.Image, **options: Any) -> tuple[str, Any]:
        return name, lambda: save(of, kind, **options)

    for content, image in contents(side).items():
        rgba, grey = image.convert("RGBA"), image.convert("L")
        band = image.crop((0, 0, side, min(side, 900)))  # too low for a reduced scale
        yield add(f"jpeg {content}", "JPEG", image, quality=90)
        yield add(f"jpeg grey {content}", "JPEG", grey, quality=90)
        yield add(f"jpeg cmyk {content}", "JPEG", image.convert("CMYK"), quality=90)
        yield add(f"jpeg full scale {content}", "JPEG", band, quality=90)
        yield add(f"jpeg full scale turned {content}", "JPEG", band, quality=90, exif=turned())
        yield add(f"jpeg progressive {content}", "JPEG", image, quality=90, progressive=True)
        yield f"jpeg 32 scans {content}", lambda image=image: many_scans(image)
        yield add(f"png {content}", "PNG", image, compress_level=1)
        yield add(f"png turned {content}", "PNG", image, compress_level=1, exif=turned())
        yield add(f"png alpha turned {content}", "PNG", rgba, compress_level=1, exif=turned())
        yield add(f"png grey {content}", "PNG", grey, compress_level=1)
        yield add(f"webp {content}", "WEBP", image, method=0)
        yield add(f"webp alpha turned {content}", "WEBP", rgba, method=0, exif=turned())
        yield add(f"webp lossless {content}", "WEBP", image, lossless=True, method=0, quality=0)
        yield add(f"gif {content}", "GIF", grey.convert("P"))
        yield add(f"bmp {content}", "BMP", image)
        yield add(f"tiff turned {content}", "TIFF", image, tiffinfo={274: 6})
        for compression in TIFF_COMPRESSIONS:
            yield add(f"tiff {compression} {content}", "TIFF", image, compression=compression)
        yield add(f"tiff fax {content}", "TIFF", image.convert("1"), compression="group4")
        yield f"tiff 65,000 strips {content}", lambda image=image: strips(image)
    yield "png 16-bit alpha interlaced", lambda: png_raw(side, 16, 6, 1, 8)
    yield "png 16-bit alpha", lambda: png_raw(side, 16, 6, 0, 8)
    yield "png interlaced", lambda: png_raw(side, 8, 2, 1, 3)
    yield "png 16-bit grey", lambda: png_raw(side, 16, 0, 0, 2)
    wide = np.zeros((side, side), np.uint16)
    yield "tiff 16-bit grey", lambda: save(Image.fromarray(wide), "TIFF")


def memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def measure(path: Path) -> dict[str, float]:
    """Decode a file in this process: CPU seconds, and the growth of memory."""
    body = path.read_bytes()
    PREPROCESS(save(Image.new("RGB", (8, 8)), "PNG"))  # imports happen at the first image
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before_mb, before_s = memory_mb("VmRSS"), time.process_time()
    PREPROCESS(body, MAX_PIXELS)
    return {
        "seconds": time.process_time() - before_s,
        "mb": memory_mb("VmHWM") - before_mb,
    }


def compare(name: str, body: bytes, folder: Path) -> dict[str, Any]:
    file = folder / "image"
    file.write_bytes(body)
    command = [sys.executable, __file__, "--alone", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    layout = image_limits.read_layout(body, MAX_PIXELS)
    cost = decode_cost.predict(layout, len(body), REDUCED * PREPROCESS.resize)
    measured = json.loads(done.stdout)
    return {
        "file": name,
        "file_mb": len(body) / 1e6,
        "predicted_s": cost.seconds,
        "measured_s": measured["seconds"],
        "times": measured["seconds"] / cost.seconds,
        "predicted_mb": cost.bytes / 1e6,
        "measured_mb": measured["mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare predicted with measured decoding cost.")
    parser.add_argument("--side", type=int, default=7_000)
    parser.add_argument("--match", default="", help="only files whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.alone)))
        return
    print(HEAD)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in files(arguments.side):
            if arguments.match in name:
                row = compare(name, make(), Path(folder))
                rows.append(row)
                print(ROW.format(**row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
