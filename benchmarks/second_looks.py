"""Measure second looks: accuracy at equal multiply-adds, simulated traces, and a live server.

benchmarks/second_looks.py cascades --data DATA --out FOLDER     answers.npz, cascades.json
benchmarks/second_looks.py simulate --answers FOLDER/answers.npz --profile PROFILE --json FILE
benchmarks/second_looks.py live --data DATA --json FILE

`cascades` runs every test image on every tier of the demo, with the margins that its calibration
gives. `simulate` serves these very images: each simulated request is one of them, so that a right
answer is its label, not an expectation. `live` alternates servers on one core with the load
generator on another one; see live.sh for what it needs of the machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rounding import rounded

from pcae_export.calibrate import best_cascades, measure_cascades
from pcae_export.measure import mean_interval, measure_quality
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import demo_path, load_bundle
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_serve.loadtest import platforms, report, workload
from pcae_serve.loadtest.platforms import Platform
from pcae_serve.loadtest.report import Figures, summarise
from pcae_serve.loadtest.simulation import SERVICE_SEED, find_capacity
from pcae_serve.loadtest.simulator import Outcome, draw, simulate
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.waiting_price import ACCURACY_PER_S, DEFAULT_PRICE
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_training.data import load

TRACES = ("azure-code", "poisson", "gamma-4", "flash")
LOADS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.5)
MIX, MAX_BATCH, QUEUE_LIMIT = "mixed", 32, 256
#: Seconds from a request's arrival to the queue: decoding a small image.
DECODE_S = 0.0012
#: Added to a seed for the order of the images.
IMAGE_SEED = 3_000_017
#: Share of the multiply-adds of `full` at which its accuracy is looked for.
SHARE = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("cascades")
    one.add_argument("--data", required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=cascades)
    two = commands.add_parser("simulate")
    two.add_argument("--answers", type=Path, required=True)
    two.add_argument("--profile", required=True)
    two.add_argument("--requests", type=int, default=4000)
    two.add_argument("--seeds", type=int, default=5)
    two.add_argument("--trace", nargs="*", default=TRACES)
    two.add_argument("--load", nargs="*", type=float, default=LOADS)
    two.add_argument("--capacity", type=float, help="load 1, per second (default: computed)")
    two.add_argument("--rivals", action="store_true", help="other policies and fixed tiers, too")
    two.add_argument("--jobs", type=int, default=2)
    two.add_argument("--json", type=Path)
    two.set_defaults(run=simulated)
    three = commands.add_parser("live")
    three.add_argument("--data", required=True, help="parquet file with a column `label`")
    three.add_argument("--folder", type=Path, required=True, help="keeps the runs; resumable")
    three.add_argument("--rates", nargs="*", type=float, required=True, help="requests per second")
    three.add_argument("--trace", nargs="*", default=("azure-code", "gamma-4"))
    three.add_argument("--requests", type=int, default=1500)
    three.add_argument("--full-ms", type=float, required=True, help="of one image, for budgets")
    three.add_argument("--seeds", type=int, default=5)
    three.add_argument("--variants", nargs="*", default=list(VARIANTS))
    three.add_argument("--limit-s", type=float, default=np.inf, help="start no server after this")
    three.set_defaults(run=live)
    arguments = parser.parse_args()
    arguments.run(arguments)


# accuracy at equal multiply-adds


def cascades(arguments: argparse.Namespace) -> None:
    """Measure every tier and cascade on all test images; print the front."""
    bundle = load_bundle(demo_path())
    calibration = bundle.manifest.calibration
    assert calibration is not None
    images = load(arguments.data, "test", bundle.preprocess)
    images.align(bundle.labels)
    rows, engine = range(len(images)), OnnxRuntimeEngine(bundle)
    temperatures = calibration.temperatures
    measured = measure_quality(bundle, engine, images, rows, True, temperatures)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {}
    for name, found in measured.items():
        assert found.margins is not None
        arrays |= {f"{name}.right": found.scores > 0.5, f"{name}.margin": found.margins}
    np.savez_compressed(arguments.out / "answers.npz", **arrays)
    every = measure_cascades(measured, bundle.tiers, calibration)
    (arguments.out / "cascades.json").write_text(
        json.dumps([rounded(asdict(each)) for each in every], indent=0) + "\n"
    )
    for each in best_cascades(every):
        print(
            f"{each.first:9} {each.second:9} {100 * each.share:5.1f} % again"
            f"  {each.macs / 1e6:6.1f} M  {100 * each.quality:.2f} %"
            f"  over the best tier {100 * each.over:+.2f} ± {100 * each.half_width:.2f}"
        )
    print(full_for_less(arrays, bundle.tiers))


def full_for_less(arrays: Any, tiers: Sequence[Tier]) -> str:
    """Return how close cascades come to the last tier within SHARE of its multiply-adds."""
    last, best = tiers[-1], ("", -1.0, 0.0, 0.0, 0.0)
    for first in tiers[:-1]:
        share = (SHARE * last.macs - first.macs) / last.macs  # of the images that may run again
        if share <= 0:
            continue
        margins = arrays[f"{first.name}.margin"]
        again = np.argsort(margins, kind="stable")[: int(share * len(margins))]
        right = arrays[f"{first.name}.right"].astype(float)
        right[again] = arrays[f"{last.name}.right"][again]
        difference = right - arrays[f"{last.name}.right"]
        low, high = mean_interval(difference)
        if right.mean() > best[1]:
            best = (first.name, float(right.mean()), float(difference.mean()), low, high)
    name, top1, mean, low, high = best
    return (
        f"{name} then {last.name} at {SHARE:g} of its multiply-adds: {100 * top1:.2f} %,"
        f" {100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] points against {last.name}"
    )


# simulated


class KnownImages:
    """What every tier answers to the test images, one of which each request is."""

    def __init__(self, file: Path, names: Sequence[str], n: int, seed: int) -> None:
        with np.load(file) as arrays:
            self.margins = [arrays[f"{name}.margin"] for name in names]
            self.right = np.stack([arrays[f"{name}.right"] for name in names])  # [tiers, images]
        draws = np.random.Generator(np.random.PCG64(seed + IMAGE_SEED))
        self.image = draws.integers(0, self.right.shape[1], n)

    def margin(self, id_: int, tier: int) -> float:
        return float(self.margins[tier][self.image[id_]])

    def is_right(self, outcome: Outcome) -> NDArray[np.bool_]:
        """Return which requests [n] were answered right, by the tier that answered."""
        found: NDArray[np.bool_] = self.right[outcome.tier, self.image] & (outcome.tier >= 0)
        return found


def simulated(arguments: argparse.Namespace) -> None:
    """Print a row per trace, load and policy: with second looks, without, and fixed tiers."""
    platform = platforms.read(arguments.profile, demo_path())
    capacity = arguments.capacity or find_capacity(platform, MIX, MAX_BATCH)
    print(f"load 1 is {capacity:.1f}/s; full takes {1e3 * platform.full_s:.2f} ms", flush=True)
    policies = [("pace", 2), ("pace", 1)]
    if arguments.rivals:
        policies += [(name, 1) for name in registry.PUBLISHED]
        policies += [(f"fixed:{tier.name}", 1) for tier in platform.tiers]
    keys = [
        (trace, level, policy, looks, seed)
        for trace in arguments.trace
        for level in arguments.load
        for policy, looks in policies
        for seed in range(arguments.seeds)
    ]
    run = partial(
        run_one, platform=platform, capacity=capacity, n=arguments.requests, file=arguments.answers
    )
    rows = list[dict[str, Any]]()
    with ProcessPoolExecutor(arguments.jobs) as workers:
        found = zip(keys, workers.map(run, keys, chunksize=arguments.seeds), strict=True)
        for (trace, level, policy, looks), group in groupby(found, key=lambda each: each[0][:4]):
            figures = [each for _, each in group]
            row = {"trace": trace, "load": level, "policy": policy, "looks": looks}
            row |= {name: [getattr(f, name) for f in figures] for name in SHOWN}
            rows.append(row)
            if policy == "pace" and looks == 1:
                print(compare(rows[-2], rows[-1]), flush=True)
    if arguments.json:
        about = {"capacity_per_s": capacity, "mix": MIX, "requests": arguments.requests}
        arguments.json.write_text(json.dumps(about | {"rows": rounded(rows)}, indent=0) + "\n")
    for level in arguments.load:
        print(f"\nload {level:g}: effective accuracy, mean over the seeds")
        for policy, looks in policies:
            means = [
                np.mean(row["effective_accuracy"])
                for row in rows
                if (row["load"], row["policy"], row["looks"]) == (level, policy, looks)
            ]
            print(f"  {policy:16} looks {looks}  " + "  ".join(f"{100 * m:6.2f}" for m in means))


SHOWN = (
    "effective_accuracy", "attainment", "mean_accuracy", "response_mean_ms", "response_p50_ms",
    "response_p99_ms",
)  # fmt: skip


def run_one(
    key: tuple[str, float, str, int, int], platform: Platform, capacity: float, n: int, file: Path
) -> Figures:
    """Simulate one run."""
    trace, level, policy, looks, seed = key
    table = platform.tier_table
    given = workload.make(trace, MIX, level * capacity, n, platform.full_s, seed)
    images = KnownImages(file, table.names, len(given.times_s), seed)
    escalations = Escalations(table.escalations) if looks > 1 else None
    scheduler = Scheduler(
        registry.create(policy, table, DEFAULT_PRICE),
        platform.latency(MAX_BATCH),
        max_batch=MAX_BATCH,
        queue_limit=QUEUE_LIMIT,
        escalations=escalations,
        price_per_s=DEFAULT_PRICE * ACCURACY_PER_S,
    )
    tiers = tuple(range(len(platform.tiers)))
    outcome = simulate(
        given.times_s,
        given.budgets_s,
        scheduler,
        draw(platform.seconds(MAX_BATCH), MAX_BATCH, seed + SERVICE_SEED),
        tiers,
        decode_s=DECODE_S,
        margins=images.margin if looks > 1 else None,
    )
    return report.figures(outcome, table, tiers, images.is_right(outcome))


def compare(two: dict[str, Any], one: dict[str, Any]) -> str:
    """Return a line: with second looks, without, and the paired differences by seed."""
    parts = [f"{one['trace']:11} load {one['load']:<4g}"]
    for name, label in (("effective_accuracy", "effective"), ("attainment", "attainment")):
        change = summarise([100 * (a - b) for a, b in zip(two[name], one[name], strict=True)])
        low, high = change.low or 0.0, change.high or 0.0
        parts.append(
            f"{label} {100 * np.mean(two[name]):.2f} / {100 * np.mean(one[name]):.2f}"
            f" ({change.mean:+.2f} [{low:+.2f}, {high:+.2f}])"
        )
    parts.append(
        f"response {np.mean(two['response_mean_ms']):.1f} / {np.mean(one['response_mean_ms']):.1f}"
        f" ms, p99 {np.mean(two['response_p99_ms']):.0f} / {np.mean(one['response_p99_ms']):.0f}"
    )
    return "  ".join(parts)


# live

VARIANTS = {
    "pace, 2 looks": ["--max-looks", "2"],
    "pace, 1 look": ["--max-looks", "1"],
    **{
        f"fixed:{name}": ["--policy", f"fixed:{name}", "--max-looks", "1"]
        for name in ("fast", "brisk", "balanced", "full")
    },
    **{
        name: ["--policy", name, "--max-looks", "1"]
        for name in ("model-switching", "slackfit", "infaas", "greedy")
    },
}
BIN, PORT = Path(sys.executable).parent, 8077
#: A run is void if the generator sent its 99th percentile later than this.
MAX_LAG_MS = 2.0


def live(arguments: argparse.Namespace) -> None:
    """Run every variant in turn, seed by seed; print the means of what is not void."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in VARIANTS if name in arguments.variants]
    end_s = time.monotonic() + arguments.limit_s
    for seed in range(arguments.seeds):
        for name in names if seed % 2 == 0 else names[::-1]:
            if time.monotonic() > end_s:
                print("the time is up; the same command continues", file=sys.stderr)
                return
            missing = [
                (trace, rate, file)
                for trace in arguments.trace
                for rate in arguments.rates
                if not (file := run_file(arguments.folder, name, trace, rate, seed)).exists()
            ]
            if missing:
                run_live(name, missing, seed, arguments)
    show_live(arguments.folder)


def run_file(folder: Path, name: str, trace: str, rate: float, seed: int) -> Path:
    """Return the file of a run's figures."""
    variant = name.replace(" ", "").replace(",", "-")
    return folder / f"{variant}_{trace}_{rate:g}_{seed}.json"


def run_live(
    name: str, cells: Sequence[tuple[str, float, Path]], seed: int, arguments: argparse.Namespace
) -> None:
    """Start a server on core 0, replay each cell from core 1, stop it; write the figures.

    cells: trace, requests per second, file of the figures.
    """
    command = ["taskset", "-c", "0", str(BIN / "pcae-serve"), "--port", str(PORT)]
    command += ["--threads", "1", "--no-access-log", *VARIANTS[name]]
    command += ["--cache-dir", str(arguments.folder / "cache")]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for trace, rate, file in cells:
            row = replay(trace, rate, seed, arguments)
            about = {"variant": name, "trace": trace, "rate": rate, "seed": seed}
            file.write_text(json.dumps(about | {"at": time.time(), "row": row}) + "\n")
    finally:
        server.terminate()
        server.wait(30)


def replay(trace: str, rate: float, seed: int, arguments: argparse.Namespace) -> Any:
    """Send a trace to the server, and return its row of the report."""
    given = workload.make(trace, MIX, rate, arguments.requests, arguments.full_ms / 1e3, seed)
    with tempfile.TemporaryDirectory() as scratch:
        arrivals, out = Path(scratch) / "arrivals.csv", Path(scratch) / "out.json"
        pairs = zip(given.times_s - given.times_s[0], 1e3 * given.budgets_s, strict=True)
        arrivals.write_text(
            "arrival_s,budget_ms\n" + "".join(f"{at:.6f},{budget:.3f}\n" for at, budget in pairs)
        )
        command = [str(BIN / "pcae-serve"), "replay", f"http://127.0.0.1:{PORT}", "--pin", "1"]
        command += ["--trace", str(arrivals), "--requests", str(arguments.requests)]
        command += ["--images", arguments.data, "--labels", "column", "--json", str(out)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # 1: it lagged
        return json.loads(out.read_text())["rows"][0]


def figure_of(row: Any) -> float:
    """Return the effective accuracy of a run."""
    return float(row["figures"]["effective_accuracy"]["mean"])


def show_live(folder: Path) -> None:
    """Print the mean of each variant over its seeds, and differences to the first one by seed."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    by_key = {(r["trace"], r["rate"], r["variant"], r["seed"]): r["row"] for r in runs}
    for trace, rate in sorted({(r["trace"], r["rate"]) for r in runs}):
        print(f"\n{trace}, {rate:g}/s")
        ours = next(iter(VARIANTS))
        for name in VARIANTS:
            rows = {k[3]: row for k, row in by_key.items() if k[:3] == (trace, rate, name)}
            valid = {seed: r for seed, r in rows.items() if r["client"]["lag_p99_ms"] <= MAX_LAG_MS}
            if not valid:
                print(f"  {name:16} {len(rows)} runs, all void")
                continue
            means = {
                figure: np.mean([r["figures"][figure]["mean"] for r in valid.values()])
                for figure in ("effective_accuracy", "attainment", "response_mean_ms")
            }
            changes = [
                100 * (figure_of(r) - figure_of(ref))
                for seed, r in valid.items()
                if (ref := by_key.get((trace, rate, ours, seed))) is not None
            ]
            change = summarise(changes) if changes else None
            against = (
                ""
                if change is None or change.low is None
                else f"  {change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}] against {ours}"
            )
            print(
                f"  {name:16} effective {100 * means['effective_accuracy']:6.2f}  attainment"
                f" {100 * means['attainment']:6.2f}  response {means['response_mean_ms']:6.1f} ms"
                f"  runs {len(valid)} of {len(rows)}{against}"
            )


if __name__ == "__main__":
    main()
