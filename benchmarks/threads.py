"""How to share few cores between decoding and the engine, for single images and for streams.

    python benchmarks/threads.py [--rounds 9] [--json FILE]

The demo bundle on the CPU. The plans take turns in one process, so that disturbances on a shared
machine affect all of them:

    spin       the engine uses every core; its threads spin between batches (ONNX Runtime's default)
    park       the engine uses every core; its threads sleep between batches
    split      the engine uses all cores but one, the decoder that one
    single     the engine uses one thread

alone_ms: an image is decoded and run on an idle machine. stream_per_s: images per second if the
decoders feed an engine that runs batches of 8.
"""

import pcae_serve as pcae_serve  # first: it switches the usage reports of onnxruntime off

# isort: split

import argparse
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines import cpus

BATCH = 8


def photo() -> bytes:
    """Return a JPEG of 1200 x 900 pixels of blurred noise."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def session(bundle: Bundle, tier: Tier, threads: int, spin: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    path = bundle.file(tier.model, tier.elastic_graph)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Plan:
    def __init__(self, bundle: Bundle, tier: Tier, threads: int, spin: bool, decoders: int) -> None:
        self.session = session(bundle, tier, threads, spin)
        self.bundle, self.decoders = bundle, ThreadPoolExecutor(decoders)
        self.counts = np.array(tier.token_counts, dtype=np.int64)

    def decode(self, body: bytes) -> Any:
        return self.decoders.submit(self.bundle.preprocess, body)

    def run(self, pixels: Any) -> None:
        self.session.run(None, {"pixels": np.stack(pixels), "token_counts": self.counts})

    def alone(self, body: bytes, repeats: int = 10) -> float:
        """Return median seconds of one image, with pauses that let spinning threads stop."""
        seconds = []
        for _ in range(repeats):
            begin_s = time.perf_counter()
            self.run([self.decode(body).result()])
            seconds.append(time.perf_counter() - begin_s)
            time.sleep(0.01)
        return float(np.median(seconds))

    def stream(self, body: bytes, batches: int = 12) -> float:
        """Return images per second, with two batches decoded in advance."""
        ahead = [[self.decode(body) for _ in range(BATCH)] for _ in range(2)]
        begin_s = time.perf_counter()
        for _ in range(batches):
            pixels = [decoded.result() for decoded in ahead.pop(0)]
            ahead.append([self.decode(body) for _ in range(BATCH)])
            self.run(pixels)
        return batches * BATCH / (time.perf_counter() - begin_s)


def plans(bundle: Bundle, tier: Tier, usable: int) -> Iterator[tuple[str, Plan]]:
    yield "spin", Plan(bundle, tier, usable, True, usable)
    yield "park", Plan(bundle, tier, usable, False, usable)
    yield "split", Plan(bundle, tier, max(1, usable - 1), False, 1)
    yield "single", Plan(bundle, tier, 1, False, usable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tier", default="balanced")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = load_bundle(demo_path())
    [tier] = [tier for tier in bundle.tiers if tier.name == arguments.tier]
    small = next(iter((Path(__file__).parents[1] / "docs" / "samples").glob("*.png"))).read_bytes()
    bodies = {"28 x 28": small, "1200 x 900": photo()}
    usable = cpus.count_usable()
    contenders = dict(plans(bundle, tier, usable))
    results: dict[str, dict[str, list[float]]] = {}
    order = np.random.default_rng(0)
    for turn in range(1 + arguments.rounds):
        for i in order.permutation(len(contenders)):
            name = list(contenders)[i]
            for size, body in bodies.items():
                row = results.setdefault(f"{size}, {name}", {"alone_ms": [], "stream_per_s": []})
                alone, stream = contenders[name].alone(body), contenders[name].stream(body)
                if turn:  # the first turn is warm-up
                    row["alone_ms"].append(1e3 * alone)
                    row["stream_per_s"].append(stream)
    print(f"{usable} cores, tier {tier.name}, {arguments.rounds} rounds: medians (quartiles)")
    for size in bodies:
        base = results[f"{size}, spin"]
        for name in contenders:
            row = results[f"{size}, {name}"]
            cells = []
            for figure, values in row.items():
                low, middle, high = np.percentile(values, (25, 50, 75))
                ratio = np.median(np.array(values) / np.array(base[figure]))
                cells.append(f"{figure} {middle:7.1f} ({low:.1f}-{high:.1f}) {ratio:5.2f}x")
            print(f"{size:>10}  {name:<7}", "   ".join(cells))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
