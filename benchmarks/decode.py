"""Differences and time saved if JPEGs are decoded at a reduced scale.

    python benchmarks/decode.py [--photos FOLDER] [--data FASHION_MNIST] [--rounds 9] [--json FILE]

    pixels      a file decoded in full and at a reduced scale: largest, 99.9th percentile and mean
                difference of a value in [0, 255] after the resize to 256 and the crop to 224;
                `times` is how many times `resize` the reduced shorter side must keep (the server's
                is REDUCED)
    ms          median time to decode and crop on one thread, both ways interleaved
    agreement   share of upscaled Fashion-MNIST images with the same class on the demo bundle

Kinds of images: clouds have noise at every scale, as photographs do; grain adds pixel-sized noise,
as sensors do; gratings have lines 2 to 9 pixels apart, the worst case. Photographs smaller than the
tested size are scaled up.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pcae_serve.bundle import preprocess
from pcae_serve.bundle.preprocess import MAX_PIXELS, Picture, Preprocess, decode_image, read_picture
from pcae_serve.bundle.reader import load_bundle
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine

DEMO = Path(preprocess.__file__).parent / "demo"
LARGE = Preprocess(image_size=224, resize=256, mean=(0.5,) * 3, std=(0.5,) * 3)
SIZES = ((4032, 3024), (3001, 2003), (1920, 1080), (1031, 1027))  # some not divisible by 8
TIMES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Row:
    """One kind of image at one size."""

    kind: str
    size: str
    times: int  # the reduced shorter side is at least this many times `resize`
    scale: int
    largest: int
    p999: float
    mean: float
    whole_ms: float
    reduced_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of photographs to measure as well")
    parser.add_argument("--data", help="Fashion-MNIST, for the agreement")
    parser.add_argument("--images", type=int, default=150, help="images of --data")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    rows = []
    for kind, make in kinds(options.photos):
        for size in SIZES:
            body = jpeg(make(size))
            rows += [row for t in TIMES if (row := compare(kind, size, body, t, options.rounds))]
    print("| kind | size | times | scale | largest | p99.9 | mean | whole ms | reduced ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        figures = f"{row.largest} | {row.p999:.0f} | {row.mean:.2f}"
        took = f"{row.whole_ms:.1f} | {row.reduced_ms:.1f}"
        print(f"| {row.kind} | {row.size} | {row.times} | 1/{row.scale} | {figures} | {took} |")
    report: dict[str, object] = {"rows": [asdict(row) for row in rows]}
    if options.data:
        report["agreement"] = agreement(options.data, options.images)
        print(report["agreement"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def compare(kind: str, size: tuple[int, int], body: bytes, times: int, rounds: int) -> Row | None:
    """Return the row, or None if the image is not reduced at this many times `resize`."""
    short = times * LARGE.resize
    picture = read_picture(body, MAX_PIXELS, short)
    scale = round(picture.size[0] / picture.image.width)
    if scale == 1:
        return None
    whole = LARGE.crop(decode_image(body)).astype(int)
    difference = np.abs(LARGE.crop(picture).astype(int) - whole)
    ways: tuple[Callable[[], Image.Image | Picture], ...] = (
        lambda: decode_image(body),
        lambda: read_picture(body, MAX_PIXELS, short),
    )
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for way, seconds in zip(ways, took, strict=True):
            begin = time.perf_counter()
            LARGE.crop(way())
            seconds.append(time.perf_counter() - begin)
    return Row(
        kind,
        "x".join(map(str, size)),
        times,
        scale,
        int(difference.max()),
        float(np.quantile(difference, 0.999)),
        float(difference.mean()),
        *(1e3 * statistics.median(seconds) for seconds in took),
    )


def kinds(photos: Path | None) -> Iterator[tuple[str, Callable[[tuple[int, int]], Image.Image]]]:
    yield "clouds", clouds
    yield "grain", lambda size: grain(clouds(size), 8)
    yield "gratings", gratings
    for file in sorted(photos.iterdir()) if photos else ():
        with Image.open(file) as image:
            photo = image.convert("RGB")
        yield file.stem, lambda size, photo=photo: fitted(photo, size)  # type: ignore[misc]


def clouds(size: tuple[int, int]) -> Image.Image:
    """Return noise at every scale from the whole image to two pixels, each half as strong."""
    draw, whole, side = np.random.default_rng(0), np.zeros((size[1], size[0], 3), np.float32), 3
    while side < max(size):
        cells = draw.random((side, side, 3), np.float32) - 0.5
        for c in range(3):
            coarse = Image.fromarray(cells[..., c])
            whole[..., c] += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / side**0.5
        side *= 2
    return Image.fromarray((255 / (1 + np.exp(-6 * whole))).astype(np.uint8))


def grain(image: Image.Image, deviation: float) -> Image.Image:
    """Return the image with Gaussian noise of `deviation` levels."""
    noise = np.random.default_rng(1).normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def gratings(size: tuple[int, int]) -> Image.Image:
    """Return black and white lines, vertical and horizontal, of varying distance."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    period = 2 + 7 * x // size[0]
    lines = np.where((y * 4 // size[1]) % 2, x, y) % period < period / 2
    return Image.fromarray((255 * lines).astype(np.uint8)).convert("RGB")


def fitted(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the photograph scaled and cropped to `size`."""
    scale = max(s / p for s, p in zip(size, photo.size, strict=True))
    larger = photo.resize(
        (max(size[0], round(photo.width * scale)), max(size[1], round(photo.height * scale))),
        Image.Resampling.LANCZOS,
    )
    return larger.crop((0, 0, *size))


def jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def agreement(data: str, count: int) -> dict[str, float]:
    """Compare the demo bundle's classes of test images of 1400 pixels, in full and reduced."""
    from pcae_training.data import load

    served = load_bundle(DEMO)
    engine, images = OnnxRuntimeEngine(served), load(data, "test", served.preprocess)
    tiers = {tier.name: tier for tier in (served.tiers[0], served.tiers[-1])}
    same = dict.fromkeys(tiers, 0)
    right = {name: np.zeros(2) for name in tiers}
    differences = []
    for row in range(count):
        with Image.open(io.BytesIO(images.body(row))) as small:
            large = small.convert("RGB").resize((1400, 1400), Image.Resampling.BICUBIC)
        body = jpeg(grain(large, 8))
        both = np.stack([served.preprocess.crop(decode_image(body)), served.preprocess(body)])
        differences.append(np.abs(np.subtract(*both.astype(int))))
        for name, tier in tiers.items():
            classes = engine.run(tier, both).vectors.argmax(1)
            same[name] += int(classes[0] == classes[1])
            right[name] += classes == int(images.labels[row])
    found: dict[str, float] = {
        "images": count,
        "largest": int(np.max(differences)),
        "mean": float(np.mean(differences)),
    }
    for name in tiers:
        found |= {f"same class, {name}": same[name] / count}
        found |= {f"top-1 {name}, whole": float(right[name][0]) / count}
        found |= {f"top-1 {name}, reduced": float(right[name][1]) / count}
    return found


if __name__ == "__main__":
    main()
