"""Accuracy and speed of int8 against float32 on trained weights.

    python benchmarks/int8.py --data FASHION_MNIST [--limit 10000] [--json FILE]

The demo bundle's weights and tiers in float32 and in int8 (`pcae_export.int8`) on the Fashion-MNIST
test images, through ONNX Runtime on the CPU: top-1 paired by image, agreement, and the median ratio
of float32 time to int8 time, both on every batch. `pcae-export bundle` would reject an int8 tier
that is too inaccurate; here none is rejected.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from tqdm import tqdm

from pcae_export import pack
from pcae_export.images import decode
from pcae_export.pack import Part, TierSpec
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training import checkpoint as checkpoints
from pcae_training.data import load
from pcae_training.journal import describe_machine

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="Fashion-MNIST as parquet files")
    parser.add_argument("--limit", type=int, default=10_000, help="test images")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    demo = load_bundle(demo_path())
    model = demo.tiers[0].model
    checkpoint = checkpoints.load(demo.root / "models" / model)
    wanted = {}
    for tier in demo.tiers:
        wanted[tier.name] = TierSpec(tier.keep_ratio)
        wanted[f"{tier.name}-int8"] = TierSpec(tier.keep_ratio, "int8")
    with tempfile.TemporaryDirectory() as scratch:
        served = pack.write_bundle({model: Part(checkpoint, wanted)}, Path(scratch) / "both")
        rows = measure(served, options.data, options.limit)
    print(*table(rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows} | describe_machine(), indent=1) + "\n")


def measure(served: Bundle, data: str, limit: int) -> list[dict[str, Any]]:
    """Return a row for each keep ratio."""
    engine, images = OnnxRuntimeEngine(served), load(data, "test", served.preprocess)
    tiers = {tier.name: tier for tier in served.tiers}
    names = [name for name in tiers if not name.endswith("-int8")]
    right: dict[str, list[bool]] = {name: [] for name in tiers}
    same: dict[str, list[bool]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for start in tqdm(range(0, min(limit, len(images)), BATCH), unit="batch", leave=False):
        rows = list(range(start, min(start + BATCH, len(images), limit)))
        pixels, labels = decode(images, rows), images.labels[rows].numpy()
        for name in names:
            begin = time.perf_counter()
            exact = engine.run(tiers[name], pixels).vectors.argmax(axis=1)
            middle = time.perf_counter()
            rough = engine.run(tiers[f"{name}-int8"], pixels).vectors.argmax(axis=1)
            ratios[name].append((middle - begin) / (time.perf_counter() - middle))
            right[name] += (exact == labels).tolist()
            right[f"{name}-int8"] += (rough == labels).tolist()
            same[name] += (exact == rough).tolist()
    found = []
    for name in names:
        exact, rough = (np.array(right[n], float) for n in (name, f"{name}-int8"))
        difference = rough - exact
        low, middle, high = quantiles(ratios[name], n=4)
        found.append(
            {"tier": name, "keep_ratio": tiers[name].keep_ratio, "n": len(exact)}
            | {"float32": exact.mean(), "int8": rough.mean(), "points": 100 * difference.mean()}
            | {"half_width": 196 * difference.std(ddof=1) / len(difference) ** 0.5}
            | {"agreement": float(np.mean(same[name])), "speed": median(ratios[name])}
            | {"speed_low": low, "speed_high": high, "batch": BATCH}
        )
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as a Markdown table."""
    lines = ["| tier | keep | n | float32 | int8 | points, paired 95 % | same class | speed |"]
    lines += ["| --- |" + " --- |" * 7]
    return lines + [
        f"| {row['tier']} | {row['keep_ratio']:g} | {row['n']} | {100 * row['float32']:.2f} %"
        f" | {100 * row['int8']:.2f} % | {row['points']:+.2f} ± {row['half_width']:.2f}"
        f" | {100 * row['agreement']:.2f} % | {row['speed']:.2f}"
        f" ({row['speed_low']:.2f}-{row['speed_high']:.2f}) |"
        for row in rows
    ]


if __name__ == "__main__":
    main()
