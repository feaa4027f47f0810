"""How close features are to those at keep ratio 1 by reduction, and what patch grids cost.

    python benchmarks/photograph_folder.py PHOTOS --test 12
    python benchmarks/dense.py MODEL --photos PHOTOS [--part fidelity|time] [--json FILE]

MODEL is a checkpoint that `pcae-export bundle` takes, such as facebook/dinov2-small.

fidelity: cosines of the CLS token, the mean over patches and all patches, by torch on every image
of PHOTOS/test. Crops of one photograph are alike, so the spread is that of the photographs' means.
time: a batch through ONNX Runtime on the CPU with the grids, without them, and through graphs that
have none, in turns.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pcae_export import pack
from pcae_export.feature_fidelity import measure_features
from pcae_export.images import decode
from pcae_export.pack import Part, TierSpec
from pcae_export.source import SourceOverrides, locate_source, read_source
from pcae_serve.bundle.tokens import Rule
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import load
from pcae_training.journal import describe_machine
from pcae_training.reduction import RULES

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
KINDS = {"cls": "CLS", "mean": "mean", "dense": "patches"}
#: Timing: the keep ratio, batch sizes, and rounds that each variant runs once in.
KEEP, BATCHES, ROUNDS = 0.6, (1, 8), 20
TIMED: tuple[Rule, ...] = ("ptr", "merged")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--part", choices=["fidelity", "time"], help="default: both")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    path, _ = locate_source(options.model)
    checkpoint = read_source(path, SourceOverrides(features=True)).checkpoint
    found: dict[str, Any] = {}
    if options.part in (None, "fidelity"):
        found["fidelity"] = list(fidelity(checkpoint, options.photos))
        print(*fidelity_table(found["fidelity"]), sep="\n")
    if options.part in (None, "time"):
        found["time"] = list(timed(checkpoint))
        print(*time_table(found["time"]), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found | describe_machine(), indent=1) + "\n")


def fidelity(checkpoint: Checkpoint, photos: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each rule and keep ratio: mean, lowest and highest photograph by kind."""
    images = load(str(photos), "test", checkpoint.preprocess)
    pixels, labels = decode(images, range(len(images))), images.labels.numpy()
    geometry = checkpoint.model.config.geometry
    for rule in RULES:
        use_rule(checkpoint, rule)
        counts = [geometry.counts(ratio) for ratio in RATIOS]
        for ratio, some in zip(RATIOS, measure_features(checkpoint, pixels, counts), strict=True):
            row: dict[str, Any] = {"rule": rule, "keep_ratio": ratio, "images": some.images}
            for kind, cosines in some.cosines.items():
                by_photo = [float(cosines[labels == each].mean()) for each in np.unique(labels)]
                row["photographs"] = len(by_photo)
                row[kind] = [float(cosines.mean()), min(by_photo), max(by_photo)]
            yield row


def use_rule(checkpoint: Checkpoint, rule: Rule) -> None:
    """Set the reduction of a checkpoint's model."""
    checkpoint.model.config = replace(checkpoint.model.config, reduction=rule)


def fidelity_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the rows as lines of a Markdown table."""
    yield f"| reduction | keep ratio | {' | '.join(KINDS.values())} |"
    yield "|" + " --- |" * (2 + len(KINDS))
    for row in rows:
        cells = [
            "{:.3f} ({:.3f}-{:.3f})".format(*row[kind]) if kind in row else "-" for kind in KINDS
        ]
        yield f"| {row['rule']} | {row['keep_ratio']:g} | {' | '.join(cells)} |"


def timed(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """Yield a row for two rules and each batch size: seconds by variant, of each round."""
    size = checkpoint.preprocess.image_size
    noise = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as scratch:
        for rule in TIMED:
            use_rule(checkpoint, rule)
            parts = {"vit": Part(checkpoint, {"tier": TierSpec(KEEP)})}
            made = [
                pack.write_bundle(parts, Path(scratch) / f"{rule}-{dense}", dense=dense)
                for dense in (True, False)
            ]
            [tier], (dense, plain) = made[0].tiers, map(OnnxRuntimeEngine, made)
            variants = {
                "with grids": dense.run_densely,
                "without": dense.run,
                "graph without": plain.run,
            }
            for batch in BATCHES:
                seconds: dict[str, list[float]] = {name: [] for name in variants}
                for name, run in [*variants.items()] * (ROUNDS + 1):
                    start_s = time.perf_counter()
                    run(tier, noise[:batch])
                    seconds[name].append(time.perf_counter() - start_s)
                # the first round warms up
                yield {
                    "rule": rule,
                    "batch": batch,
                    "seconds": {name: each[1:] for name, each in seconds.items()},
                }


def time_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the rows as lines of a Markdown table: the median, and the fastest of all rounds."""
    names = list(rows[0]["seconds"])
    yield f"| reduction | batch | {' | '.join(f'{name}, ms' for name in names)} |"
    yield "|" + " --- |" * (2 + len(names))
    for row in rows:
        cells = [
            f"{1e3 * median(each):.1f} ({1e3 * min(each):.1f})" for each in row["seconds"].values()
        ]
        yield f"| {row['rule']} | {row['batch']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
