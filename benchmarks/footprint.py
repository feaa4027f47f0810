"""Footprint of serving five tiers on a CPU: one elastic graph against a static graph per tier.

    python benchmarks/footprint.py [--model vit-b] [--rounds 15] [--json FILE]

    export    seconds and peak memory of `pcae-export bundle` on random weights, with parity checks
    load      seconds and resident memory of one static tier, all tiers elastic, all tiers static;
              one process each, interleaved; memory of a process without sessions is subtracted
    speed     time of the elastic graph over that of the static one, by tier, interleaved

Random weights do not change the figures.
"""

import pcae_serve as pcae_serve  # first: it switches the usage reports of onnxruntime off

# isort: split

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from tqdm import tqdm

from pcae_serve.bundle.manifest import ELASTIC_GRAPH
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.journal import describe_machine
from pcae_training.model import VisionTransformer, ViTConfig

MODELS = {
    "tiny": ViTConfig(image_size=32, patch_size=8, width=32, heads=2, classes=10),
    "vit-s": ViTConfig(width=384, heads=6),
    "vit-b": ViTConfig(),
}
BATCHES = (1, 8)
WHAT = ("nothing", "one static", "all elastic", "all static")

#: Run in a fresh process: loads sessions, runs each once, prints seconds and resident megabytes.
LOADED = """
import json, sys, time
import numpy as np, onnxruntime as ort
files, size = json.loads(sys.argv[1]), int(sys.argv[2])
options = ort.SessionOptions()
options.log_severity_level = 3
begin = time.perf_counter()
sessions = [(ort.InferenceSession(f, options), c) for f, c in files]
load_s = time.perf_counter() - begin
pixels = np.zeros((1, size, size, 3), np.uint8)
for session, counts in sessions:
    for count in counts:
        feeds = {} if count is None else {"token_counts": np.array(count)}
        session.run(None, {"pixels": pixels} | feeds)
rss = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(json.dumps([load_s, int(rss.split()[1]) / 1e3]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="vit-b")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parity-images", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Any] = {"model": options.model}
        out, found["export"] = export(options.model, options.parity_images, Path(scratch))
        print(f"export: {found['export']}", flush=True)
        served = load_bundle(out)
        found["load"] = load(served, max(3, options.rounds // 5))
        print(*load_table(found["load"]), sep="\n", flush=True)
        found["speed"] = speed(served, options.rounds)
        print(*speed_table(found["speed"]), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found | describe_machine(), indent=1) + "\n")


def export(name: str, parity_images: int, scratch: Path) -> tuple[Path, dict[str, float]]:
    """Run `pcae-export bundle` on random weights; return the bundle and its figures."""
    torch.manual_seed(0)
    config = MODELS[name]
    size = config.image_size
    preprocess = Preprocess(size, round(size / 0.875), mean=(0.5,) * 3, std=(0.5,) * 3)
    labels = [f"class {i}" for i in range(config.classes)]
    checkpoints.save(Checkpoint(VisionTransformer(config), preprocess, labels), scratch / "model")
    command = [sys.executable, "-m", "pcae_export.cli", "bundle", scratch / "model"]
    command += [scratch / "bundle", f"--parity-images={parity_images}"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return scratch / "bundle", {
        "seconds": round(time.perf_counter() - begin, 1),
        "peak_gb": round(peak_kb / 1e6, 2),
        "parity_images": parity_images,
        "megabytes": round(sum(f.stat().st_size for f in (scratch / "bundle").rglob("*.*")) / 1e6),
    }


def load(served: Bundle, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return load seconds and resident megabytes for each of WHAT."""
    full = served.tiers[-1]
    static = [(served.file(t.model, t.graph), [None]) for t in served.tiers]
    elastic = (served.file(full.model, ELASTIC_GRAPH), [t.token_counts for t in served.tiers])
    files = dict(zip(WHAT, ([], static[-1:], [elastic], static), strict=True))
    found: dict[str, dict[str, list[float]]] = {
        what: {"seconds": [], "megabytes": []} for what in WHAT
    }
    for _ in tqdm(range(rounds), desc="loading", leave=False):
        for what, wanted in files.items():
            given = json.dumps([(str(file), counts) for file, counts in wanted])
            command = [sys.executable, "-c", LOADED, given, str(served.image_size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, megabytes = json.loads(done.stdout)
            found[what]["seconds"].append(seconds)
            found[what]["megabytes"].append(megabytes)
    return found


def speed(served: Bundle, rounds: int) -> list[dict[str, Any]]:
    """Return elastic over static time of every tier and batch size."""
    engine, size = OnnxRuntimeEngine(served), served.image_size
    options = ort.SessionOptions()
    options.log_severity_level = 3
    noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), np.uint8)
    rows = []
    for tier in served.tiers:  # one static session at a time, to save memory
        static = ort.InferenceSession(served.file(tier.model, tier.graph), options)
        for batch in BATCHES:
            ratios, pixels = [], noise[:batch]
            for turn in range(rounds + 1):
                begin = time.perf_counter()
                engine.run(tier, pixels)
                middle = time.perf_counter()
                static.run(None, {"pixels": pixels})
                end = time.perf_counter()
                if turn:  # the first turn is warm-up
                    ratios.append((middle - begin) / (end - middle))
            low, _, high = quantiles(ratios, n=4)
            rows.append(
                {"tier": tier.name, "batch": batch, "n": rounds, "ratio": median(ratios)}
                | {"low": low, "high": high}
            )
    return rows


def load_table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the footprint as Markdown; ratios are to one static tier."""
    bare = median(found["nothing"]["megabytes"])
    one = median(found["one static"]["megabytes"]) - bare
    one_s = median(found["one static"]["seconds"])
    lines = ["| loaded | MB (min-max) | ratio | seconds to load (min-max) | ratio |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for what in WHAT[1:]:
        megabytes = [value - bare for value in found[what]["megabytes"]]
        seconds = found[what]["seconds"]
        lines.append(
            f"| {what} | {median(megabytes):.0f} ({min(megabytes):.0f}-{max(megabytes):.0f})"
            f" | {median(megabytes) / one:.2f} | {median(seconds):.2f}"
            f" ({min(seconds):.2f}-{max(seconds):.2f}) | {median(seconds) / one_s:.2f} |"
        )
    return [*lines, f"\n{len(found['nothing']['seconds'])} processes each; {os.cpu_count()} cores"]


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the speed ratios as Markdown."""
    lines = ["| tier | batch | elastic / static time (quartiles) |", "| --- | --- | --- |"]
    return lines + [
        f"| {row['tier']} | {row['batch']} | {row['ratio']:.3f}"
        f" ({row['low']:.3f}-{row['high']:.3f}) |"
        for row in rows
    ]


if __name__ == "__main__":
    main()
