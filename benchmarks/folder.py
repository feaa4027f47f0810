"""Throughput of `pcae-serve classify FOLDER --out` against the bare engine.

    python benchmarks/folder.py FOLDER… [--bundle BUNDLE] [--tier TIER …] [--rounds 9] [--limit N]
        [--other CHECKOUT] [--json FILE]

The images of each FOLDER by four ways, in turns:

    engine   ONNX Runtime alone on pixels that are ready, by its own defaults, at the batch size and
             on the graph (elastic, or the tier's own) that a first round finds fastest
    loop     the same session and batches in a loop on one thread: decode a batch, then run it
    command  `pcae-serve classify` as a process of its own, to the end of its table; its start is
             what the same command takes for one image, and is subtracted
    decode   files to pixels, one at a time; nothing else runs
    other    with --other: the command of another checkout of this repository, such as an older one

Reported are images per second, and ratios within a round: their medians and quartiles. `together`
is what a perfect overlap would reach: the engine's seconds plus decoding's, over all cores.
"""

import pcae_serve as pcae_serve  # first: it switches the usage reports of onnxruntime off

# isort: split

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.preprocess import MAX_PIXELS
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines import cpus
from pcae_serve.local.image_files import ImageFiles
from pcae_serve.local.image_source import read_pixels

BATCHES = (1, 4, 8, 16, 32)
#: Images that each batch size runs to find the fastest one.
TRIED = 32

Pixels = NDArray[np.uint8]


class Way(NamedTuple):
    """How the bare engine runs: its session, whether token counts are an input, batch size."""

    session: ort.InferenceSession
    counts: list[int] | None
    graph: str
    batch: int

    def run(self, pixels: Pixels) -> None:
        """Run one batch, uint8 [N, H, W, 3]."""
        feeds: dict[str, Any] = {"pixels": pixels}
        if self.counts is not None:
            feeds["token_counts"] = np.array(self.counts, np.int64)
        self.session.run(None, feeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--bundle", type=Path, default=demo_path(), help="default: the demo")
    parser.add_argument("--tier", action="append", help="repeatable; default: the most accurate")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=int, help="images of each folder; default: all")
    parser.add_argument("--other", type=Path, help="another checkout, whose command runs as well")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    bundle = load_bundle(options.bundle)
    named = {tier.name: tier for tier in bundle.tiers}
    rows = []
    for name in options.tier or [bundle.tiers[-1].name]:
        way = None
        for folder in options.folders:
            files = ImageFiles([str(folder.absolute())]).names[: options.limit]
            pixels = np.stack([read_pixels(file, bundle.preprocess, MAX_PIXELS) for file in files])
            way = way or fastest(bundle, named[name], pixels[:TRIED])
            ways = ways_of(way, pixels, bundle, named[name], files, options.other)
            seconds = measure(ways, options.rounds)
            row = {
                "bundle": bundle.manifest.name,
                "tier": name,
                "folder": folder.name,
                "images": len(files),
                "engine_batch": way.batch,
                "engine_graph": way.graph,
                "seconds": seconds,
            }
            rows.append(row)
            print(*lines(row), sep="\n", flush=True)
    if options.json:
        found = {
            "command": sys.argv,
            "onnxruntime": ort.__version__,
            "python": platform.python_version(),
            "cores": cpus.count_usable(),
        }
        options.json.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


def ways_of(
    way: Way,
    pixels: Pixels,
    bundle: Bundle,
    tier: Tier,
    files: Sequence[str],
    other: Path | None,
) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name."""
    ways: dict[str, Callable[[], None]] = {
        "engine": lambda: engine(way, pixels),
        "loop": lambda: loop(way, bundle, files),
        "start": lambda: command(bundle, tier, files[:1]),
        "command": lambda: command(bundle, tier, files),
        "decode": lambda: decode(bundle, files),
    }
    if other is not None:
        ways["other"] = lambda: command(bundle, tier, files, other)
    return ways


def measure(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # in another order each time, so that none always follows the same one
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(timed(ways[name]))
    return seconds


def sessions(bundle: Bundle, tier: Tier) -> Iterator[tuple[ort.InferenceSession, str]]:
    """Yield a session of the elastic graph, and of the tier's own graph if there is one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = cpus.count_usable()
    options.log_severity_level = 3
    own = bundle.root / "models" / tier.model / f"{tier.name}.onnx"
    for graph in (bundle.file(tier.model, tier.elastic_graph), own):
        if Path(graph).exists():
            yield ort.InferenceSession(graph, options, ["CPUExecutionProvider"]), Path(graph).name


def fastest(bundle: Bundle, tier: Tier, pixels: Pixels) -> Way:
    """Return the graph and batch size with the most images per second; the best of two turns."""
    ways = []
    for session, graph in sessions(bundle, tier):
        elastic = any(given.name == "token_counts" for given in session.get_inputs())
        counts = list(tier.token_counts) if elastic else None
        ways += [Way(session, counts, graph, batch) for batch in BATCHES if batch <= len(pixels)]
    best: dict[int, float] = {}
    for _ in range(2):
        for place, way in enumerate(ways):
            way.run(pixels[: way.batch])  # allocates for this size
            used = pixels[: len(pixels) // way.batch * way.batch]
            took = timed(lambda way=way, used=used: engine(way, used)) / len(used)  # type: ignore[misc]
            best[place] = min(best.get(place, took), took)
    return ways[min(best, key=lambda place: best[place])]


def timed(run: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def engine(way: Way, pixels: Pixels) -> None:
    for at in range(0, len(pixels), way.batch):
        way.run(pixels[at : at + way.batch])


def loop(way: Way, bundle: Bundle, files: Sequence[str]) -> None:
    for at in range(0, len(files), way.batch):
        some = files[at : at + way.batch]
        way.run(np.stack([read_pixels(file, bundle.preprocess, MAX_PIXELS) for file in some]))


def decode(bundle: Bundle, files: Sequence[str]) -> None:
    for file in files:
        read_pixels(file, bundle.preprocess, MAX_PIXELS)


def command(bundle: Bundle, tier: Tier, files: Sequence[str], checkout: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.csv"
        words = ["-m", "pcae_serve", "classify", "--bundle", str(bundle.root), "--tier", tier.name]
        subprocess.run(
            [sys.executable, *words, "--out", str(out), "--", *files],
            check=True,
            capture_output=True,
            cwd=checkout,
            env=os.environ if checkout is None else os.environ | {"PYTHONPATH": str(checkout)},
        )
        rows = len(out.read_text().splitlines()) - 1
        assert rows == len(files), f"{rows} rows for {len(files)} images"


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield the results of a tier as text."""
    count, cores = row["images"], cpus.count_usable()
    seconds = {name: np.array(values) for name, values in row["seconds"].items()}
    seconds["after start"] = seconds["command"] - seconds["start"]
    if "other" in seconds:
        seconds["other after"] = seconds["other"] - seconds["start"]
    seconds["together"] = seconds["engine"] + seconds["decode"] / cores
    yield (
        f"{row['bundle']}, tier {row['tier']}, {row['folder']}: {count:,} images,"
        f" {len(seconds['engine'])} rounds; engine at batch {row['engine_batch']} on"
        f" {row['engine_graph']}"
    )
    names = ["engine", "loop", "together", "command", "after start", "decode"]
    for name in names + ["other after"] * ("other" in seconds):
        yield f"  {name:<12} {spread(count / seconds[name], '.1f')} images/s"
    yield f"  start {spread(seconds['start'], '.2f')} s"
    for over in ("engine", "together", "loop", *(["other after"] * ("other" in seconds))):
        for name in ("after start", "command"):
            yield f"  {name} / {over}: {spread(seconds[over] / seconds[name], '.3f')}"


def spread(values: NDArray[np.float64], form: str) -> str:
    """Return the median, and the quartiles in brackets."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


if __name__ == "__main__":
    main()
