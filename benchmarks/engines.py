"""Latency of every tier in every engine of this machine, from host memory to host memory.

    python benchmarks/engines.py [--device cuda:0] [--model vit-b] [--bundle DIR] [--json FILE]

    torch            the training model, eager; at keep ratio 1 it is a plain timm ViT
    torch.compile    the same, compiled for each tier and batch size, with CUDA graphs on a GPU
    cuda             ONNX Runtime on the bundle's fused graphs (needs --bundle, onnxruntime-gpu)
    tensorrt         the plans of `pcae-export tensorrt` (needs --bundle)
    onnxruntime      the elastic graph on a CPU (needs --bundle)

Input is uint8 pixels and output float32 logits, both in main memory; GPUs compute in half
precision. Engines, tiers and batch sizes are interleaved within a round; figures are medians over
rounds with quartiles. The ratio is to keep ratio 1 of the same engine within a round. For GPUs with
a known peak, the share of it is reported. Without --bundle the weights are random, which does not
change the speed. Engines that are missing are listed with the reason.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pcae_export.profiling import PEAKS
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.engines.base import Engine, Pixels
from pcae_serve.engines.loader import load_engine
from pcae_serve.errors import PcaeError, one_line
from pcae_training.checkpoint import read_json
from pcae_training.journal import describe_machine
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.model_config import from_config

MODELS = {
    "tiny": ViTConfig(image_size=32, patch_size=8, width=32, heads=2, classes=10),
    "vit-s": ViTConfig(width=384, heads=6),
    "vit-b": ViTConfig(),
}
WARM_UP = 3

#: Runs one batch on one tier, from pixels to logits.
Run = Callable[[str, Pixels], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu")
    parser.add_argument("--model", choices=MODELS, default="vit-b", help="used without --bundle")
    parser.add_argument("--bundle", type=Path, help="bundle whose tiers are run, by torch too")
    parser.add_argument("--keep", default="1.0,0.8,0.6", help="keep ratios, used without --bundle")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: quartiles need them")
    served = load_bundle(options.bundle) if options.bundle else None
    config = MODELS[options.model] if served is None else of_bundle(served)
    if served is None:
        counts = {ratio: config.geometry.counts(ratio) for ratio in options.keep.split(",")}
    else:
        counts = {tier.name: tier.token_counts for tier in served.tiers}
    batches = [int(batch) for batch in options.batches.split(",")]
    found, missing = contenders(config, counts, served, options, max(batches))
    for name, reason in missing.items():
        print(f"{name}: not measured: {reason}")
    macs = {tier: config.geometry.macs(of) for tier, of in counts.items()}
    rows = measure(found, macs, batches, config.image_size, options.rounds)
    print(*table(rows), sep="\n")
    if options.json:
        content = {"config": vars(config), "rows": rows, "missing": missing} | describe_machine()
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def of_bundle(served: Bundle) -> ViTConfig:
    """Return the configuration of the bundle's most expensive model."""
    model = served.tiers[-1].model
    return from_config(read_json(served.file(model, "config.json")))[0]


def contenders(
    config: ViTConfig,
    counts: Mapping[str, tuple[int, ...]],
    served: Bundle | None,
    options: argparse.Namespace,
    max_batch: int,
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the engines that can run here, by name, and why the others cannot."""
    device = torch.device(options.device)
    half = torch.float16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = VisionTransformer(config).to(device, half).eval().requires_grad_(False)

    def in_torch(forward: Callable[..., torch.Tensor]) -> Run:
        @torch.inference_mode()
        def run(tier: str, pixels: Pixels) -> Any:
            images = torch.from_numpy(pixels).to(device, non_blocking=True)
            images = (images.permute(0, 3, 1, 2).to(half) / 255 - 0.5) / 0.5
            return forward(images, counts[tier]).float().cpu().numpy()

        return run

    found: dict[str, Run] = {"torch": in_torch(model)}
    missing: dict[str, str] = {}
    if options.no_compile:
        missing["torch.compile"] = "skipped by --no-compile"
    else:
        torch._dynamo.config.recompile_limit = 64  # a graph for each tier and batch size
        mode = "reduce-overhead" if device.type == "cuda" else None
        found["torch.compile"] = in_torch(torch.compile(model, mode=mode, dynamic=False))
    for backend in ("cuda", "tensorrt") if device.type == "cuda" else ("onnxruntime",):
        if served is None:
            missing[backend] = "no --bundle"
            continue
        try:
            engine = load_engine(backend, served, options.device, max_batch=max_batch)
        except PcaeError as error:
            missing[backend] = one_line(error)
            continue
        found[backend] = in_engine(engine, served)
    return found, missing


def in_engine(engine: Engine, served: Bundle) -> Run:
    tiers = {tier.name: tier for tier in served.tiers}
    return lambda tier, pixels: engine.run(tiers[tier], pixels)


def measure(
    found: Mapping[str, Run],
    macs: Mapping[str, int],
    batches: list[int],
    size: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Time every engine, tier and batch size, interleaved; return a row for each."""
    noise = np.random.default_rng(0).integers(0, 256, (max(batches), size, size, 3), np.uint8)
    cases = list(product(found, macs, batches))
    taken: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    for turn in tqdm(range(WARM_UP + rounds), desc="measuring", leave=False):
        for engine, tier, batch in cases:
            begin = time.perf_counter()
            found[engine](tier, noise[:batch])
            if turn >= WARM_UP:
                taken[engine, tier, batch].append(time.perf_counter() - begin)
    full = max(macs, key=lambda tier: macs[tier])
    peak = peak_flops()
    rows = []
    for (engine, tier, batch), seconds in taken.items():
        whole = taken[engine, full, batch]
        ratios = [a / b for a, b in zip(whole, seconds, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        flops = 2 * macs[tier] * batch / median(seconds)
        rows.append(
            {
                "engine": engine, "tier": tier, "batch": batch, "n": rounds,
                "median_ms": 1e3 * median(seconds),
                "quartiles_ms": [1e3 * q for q in quantiles(seconds, n=4)[::2]],
                "images_per_s": batch / median(seconds),
                "ratio": median(ratios), "ratio_low": low, "ratio_high": high,
                "mac_ratio": macs[full] / macs[tier],
                "share_of_peak": None if peak is None else flops / peak,
            }
        )  # fmt: skip
    return rows


def peak_flops() -> float | None:
    """Return the dense half-precision peak of this machine's GPU, or None if unknown."""
    return PEAKS.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as a Markdown table."""
    lines = [
        "| engine | batch | tier | ms (quartiles) | images/s | to keep ratio 1 (quartiles)"
        " | MAC ratio | ratio / MAC ratio | share of peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (row["engine"], row["batch"])):
        low, high = row["quartiles_ms"]
        share = "" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.0f} %"
        lines.append(
            f"| {row['engine']} | {row['batch']} | {row['tier']} | {row['median_ms']:.2f}"
            f" ({low:.2f}-{high:.2f}) | {row['images_per_s']:.0f} | {row['ratio']:.2f}"
            f" ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) | {row['mac_ratio']:.2f}"
            f" | {row['ratio'] / row['mac_ratio']:.2f} | {share} |"
        )
    return lines


if __name__ == "__main__":
    main()
