"""Images per second of every tier through the served engine, compared with the MAC ratio.

    python benchmarks/tiers.py [--rounds 15] [--models demo,vit-s,vit-b] [--keep 0.5,1]

On the CPU, through ONNX Runtime; only the engine is timed, without HTTP and decoding. Each round
runs every tier once at one batch size, interleaved, so that disturbances on a shared machine affect
all of them. The ratio is to `full` within a round; its median over the rounds is divided by the MAC
ratio. ViT-S and ViT-B have random weights, which do not change the speed.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

from pcae_export import pack
from pcae_export.pack import Part
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_serve.runtime.latency_profile import processor
from pcae_training.checkpoint import Checkpoint
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.model_config import from_config

RANDOM = {
    "vit-s": ViTConfig(width=384, heads=6),
    "vit-b": ViTConfig(width=768, heads=12),
}
BATCHES = (1, 8)


@dataclass(frozen=True)
class Row:
    """One tier at one batch size. Times are of one batch."""

    model: str
    batch: int
    tier: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    images_per_s: float
    mac_ratio: float  # full's MACs over the tier's
    ratio: float  # full's time over the tier's, median over rounds
    ratio_low: float  # its quartiles
    ratio_high: float

    @property
    def efficiency(self) -> float:
        """The share of the MAC ratio that is reached."""
        return self.ratio / self.mac_ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", default="demo,vit-s,vit-b")
    parser.add_argument("--keep", help="keep ratios instead of the bundle's tiers; must include 1")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    parser.add_argument("--json", type=Path, help="write rows and machine to this file")
    options = parser.parse_args()
    rows = list[Row]()
    print(machine())
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            served = open_bundle(name, Path(scratch))
            if options.keep:
                served = with_tiers(served, options.keep.split(","))
            measured = measure(name, served, options.rounds, options.threads)
        rows += measured
        print(table(measured), flush=True)
    if options.json:
        content = {
            "machine": machine(),
            "rounds": options.rounds,
            "rows": [asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def open_bundle(name: str, scratch: Path) -> Bundle:
    """Return the demo bundle, or export one with random weights."""
    if name == "demo":
        return load_bundle(demo_path())
    torch.manual_seed(0)
    preprocess = Preprocess(image_size=224, resize=256, mean=(0.5,) * 3, std=(0.5,) * 3)
    labels = [f"class {i}" for i in range(1000)]
    checkpoint = Checkpoint(VisionTransformer(RANDOM[name]), preprocess, labels)
    return pack.write_bundle({"vit": Part(checkpoint)}, scratch / name)


def with_tiers(served: Bundle, keep_ratios: list[str]) -> Bundle:
    """Return the bundle with other keep ratios; on the elastic graph only token counts change."""
    full = served.tiers[-1]
    config = json.loads(served.file(full.model, "config.json").read_text())
    geometry = from_config(config)[0].geometry
    tiers = []
    for ratio in sorted(keep_ratios, key=float):
        counts = geometry.counts(ratio)
        costs = {"keep_ratio": float(ratio), "token_counts": counts, "macs": geometry.macs(counts)}
        tiers.append(full.model_copy(update={"name": f"k={ratio}", **costs}))
    return replace(served, manifest=served.manifest.model_copy(update={"tiers": tuple(tiers)}))


def measure(name: str, served: Bundle, rounds: int, threads: int) -> list[Row]:
    """Time every tier at every batch size, tiers interleaved."""
    engine = OnnxRuntimeEngine(served, threads=threads)
    size, rows = served.image_size, []
    noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), np.uint8)
    full = served.tiers[-1]
    for batch in BATCHES:
        times: dict[str, list[float]] = {tier.name: [] for tier in served.tiers}
        for tier in served.tiers:
            engine.run(tier, noise[:batch])  # warm-up
        for _ in tqdm(range(rounds), desc=f"{name}, batch {batch}", leave=False):
            for tier in served.tiers:
                begin = time.perf_counter()
                engine.run(tier, noise[:batch])
                times[tier.name].append(time.perf_counter() - begin)
        for tier in served.tiers:
            runs = times[tier.name]
            ratios = np.array(times[full.name]) / np.array(runs)
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            rows.append(
                Row(
                    model=name,
                    batch=batch,
                    tier=tier.name,
                    median_ms=median(runs) * 1e3,
                    fastest_ms=min(runs) * 1e3,
                    slowest_ms=max(runs) * 1e3,
                    images_per_s=batch / median(runs),
                    mac_ratio=full.macs / tier.macs,
                    ratio=float(middle),
                    ratio_low=float(low),
                    ratio_high=float(high),
                )
            )
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        f"\n{rows[0].model}\n",
        "| batch | tier | ms per batch (min-max) | images/s | ratio to full (quartiles) | MAC ratio"
        " | ratio / MAC ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.batch} | {row.tier} | {row.median_ms:.1f}"
        f" ({row.fastest_ms:.1f}-{row.slowest_ms:.1f}) | {row.images_per_s:.1f} | {row.ratio:.2f}"
        f" ({row.ratio_low:.2f}-{row.ratio_high:.2f}) | {row.mac_ratio:.2f}"
        f" | {row.efficiency:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def machine() -> str:
    """Describe processor, cores and versions in one line."""
    return (
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()},"
        f" onnxruntime {OnnxRuntimeEngine.version}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
