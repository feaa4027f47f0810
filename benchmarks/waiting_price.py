"""The price of waiting: response time against accuracy and attainment, over the price.

    python benchmarks/waiting_price.py simulate [--platform demo cpu gpu] [--json F]
    python benchmarks/waiting_price.py live [--seconds 30] [--rounds 3] [--images F] [--json F]

simulate: `pace` at six prices and every fixed tier, on the same seeds, on the virtual clock. Each
row of `pace` is compared with the fastest fixed tier that is as accurate within its interval, and
its attainment with that at price 0, paired by seed. Takes minutes to an hour; a busy machine does
not matter.

live: the server on CPU 0 with the demo bundle, the load generator on CPU 1, `pace` at price 0 and
at the default price against fixed tiers, in turn. Needs two quiet cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rounding import rounded

from pcae_serve.bundle.quality import wilson_interval
from pcae_serve.loadtest import platforms, workload
from pcae_serve.loadtest.platforms import BatchSeconds, Platform, TimedTier
from pcae_serve.loadtest.report import Row, summarise
from pcae_serve.loadtest.simulation import Cell, Setup, make_rows, run_cells
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE

PRICES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
#: The median response time may be this many times that of the comparable fixed tier.
GOAL = 1.5
#: Accuracies of a platform without intervals count as equal within this.
EXACT = 0.0005
#: Tiers of the demo of 2026-11-23: keep ratio and top-1 of 10,000 images.
DEMO = {
    "fast": (0.25, 0.8773),
    "brisk": (0.30, 0.8804),
    "balanced": (0.35, 0.8836),
    "full": (1.00, 0.8870),
}
DEMO_IMAGES = 10_000
#: HTTP and decoding on the demo's one core, from benchmarks/records/2026-11-24_scheduling.
HOST_S, DECODE_S = 0.0028, 0.004
FIGURES = (
    "attainment",
    "accuracy_recovered",
    "mean_accuracy",
    "effective_accuracy",
    "response_mean_ms",
    "response_p50_ms",
    "response_p99_ms",
)
#: Figures that are also written for each seed.
BY_SEED = ("attainment", "mean_accuracy", "response_p50_ms")
#: Fixed tiers that the live server is compared with; `full` cannot serve these rates.
LIVE_TIERS = ("fast", "brisk", "balanced")
BIN = Path(sys.executable).parent
PORT = 8079


class Case(NamedTuple):
    """One table: a trace at a rate or load, with one budget or a mix."""

    platform: str
    trace: str
    mix: str
    rate: float  # requests per second
    label: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    modes = parser.add_subparsers(required=True)
    simulated = modes.add_parser("simulate")
    simulated.add_argument("--platform", nargs="+", default=["demo", "cpu", "gpu"])
    simulated.add_argument("--requests", type=int, default=1000)
    simulated.add_argument("--seeds", type=int, default=5)
    simulated.add_argument("--jobs", type=int, default=2)
    simulated.set_defaults(run=simulate)
    lived = modes.add_parser("live")
    lived.add_argument("--rates", type=float, nargs="+", default=[30, 45])
    lived.add_argument("--budgets-ms", type=float, nargs="+", default=[500, 1000])
    lived.add_argument("--seconds", type=float, default=30, help="of each run")
    lived.add_argument("--rounds", type=int, default=3)
    lived.add_argument("--images", type=Path, help="a parquet file with images and labels")
    lived.set_defaults(run=live)
    for mode in (simulated, lived):
        mode.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    content = arguments.run(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rounded(content)) + "\n")


# simulated


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a table per workload; return all rows."""
    every = [case for name in arguments.platform for case in cases(name)]
    rows = list[dict[str, Any]]()
    with ProcessPoolExecutor(arguments.jobs) as workers:
        for case, found in zip(
            every, workers.map(partial(simulate_one, arguments=arguments), every), strict=True
        ):
            print(f"\n{case.platform}, {case.trace}, {case.label}")
            for row in found:
                print(line(row), flush=True)
            rows += found
    paced = [row for row in rows if row["price"] is not None]
    for price in PRICES:
        of_price = [row for row in paced if row["price"] == price]
        missed = [row for row in of_price if row["p50_ratio"] and row["p50_ratio"] > GOAL]
        lost = [row for row in of_price if (row["attainment_high"] or 0.0) < 0]
        change = [row["attainment_change"] for row in of_price]
        print(
            f"price {price:g}: median over {GOAL:g} times the comparable tier's in {len(missed)} of"
            f" {len(of_price)} rows; attainment {min(change):+.2f} to {max(change):+.2f} points,"
            f" below price 0 outside the interval in {len(lost)}"
        )
    return {"requests": arguments.requests, "seeds": arguments.seeds, "rows": rows}


def cases(platform: str) -> Iterator[Case]:
    """Yield the workloads of a platform."""
    if platform == "demo":
        full_s = demo().full_s
        for budget_s in (0.5, 1.0):
            mix = f"{budget_s / full_s}:1"
            for rate in (5, 30, 45, 60, 75, 85, 95):
                yield Case(platform, "poisson", mix, rate, f"{rate}/s, {budget_s:g} s")
        for rate in (15, 30, 45):
            yield Case(platform, "azure-code", mix, rate, f"{rate}/s, {budget_s:g} s")
        return
    capacity_per_s = platforms.read(platform).capacity_per_s["mixed"]
    for trace in ("azure-code", "poisson", "gamma-4", "flash"):
        for load in (0.3, 0.5, 0.7, 0.9, 1.1, 1.5):
            yield Case(platform, trace, "mixed", load * capacity_per_s, f"load {load:g}")


def demo() -> Platform:
    """Return the demo's four tiers, from measurements of its model at other keep ratios.

    `cpu` has the model at 0.3, 0.4 and 1.0, on one thread; 0.25 and 0.35 are drawn from the first
    two.
    """
    measured = {0.3: 0, 0.4: 1, 1.0: 5}
    of_ratio = {ratio: platforms.read("cpu").tiers[i].points for ratio, i in measured.items()}

    def points(ratio: float) -> tuple[BatchSeconds, ...]:
        if ratio in of_ratio:
            return of_ratio[ratio]
        part = (ratio - 0.3) / 0.1
        return tuple(
            BatchSeconds(
                batch=one.batch,
                p50_s=one.p50_s + part * (two.p50_s - one.p50_s),
                p99_s=one.p99_s + part * (two.p99_s - one.p99_s),
            )
            for one, two in zip(of_ratio[0.3], of_ratio[0.4], strict=True)
        )

    tiers = tuple(
        TimedTier(name=name, accuracy=top1, n=DEMO_IMAGES, points=points(ratio))
        for name, (ratio, top1) in DEMO.items()
    )
    return Platform(source="the demo's tiers, from cpu.json", tiers=tiers)


def simulate_one(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate all prices and all fixed tiers of one workload and return the rows."""
    on_demo = case.platform == "demo"
    platform = demo() if on_demo else platforms.read(case.platform)
    setup = Setup(
        platform,
        case.mix,
        arguments.requests,
        devices=1,
        max_batch=32,
        queue_limit=256,
        decode_s=DECODE_S if on_demo else 0.0,
        host_s=HOST_S if on_demo else 0.0,
        waiting_price=0.0,
    )
    runs = [(f"fixed:{tier.name}", None) for tier in platform.tiers]
    fixed = simulate_policies(setup, case, [policy for policy, _ in runs], arguments)
    paced = {
        price: simulate_policies(replace(setup, waiting_price=price), case, ["pace"], arguments)[0]
        for price in PRICES
    }
    rows = [as_row(case, platform, row, None, fixed, paced[0.0]) for row in fixed]
    rows += [as_row(case, platform, row, price, fixed, paced[0.0]) for price, row in paced.items()]
    return rows


def simulate_policies(
    setup: Setup, case: Case, policies: Sequence[str], arguments: argparse.Namespace
) -> list[Row]:
    cells = [
        Cell(policy, case.trace, case.rate, seed)
        for policy in policies
        for seed in range(arguments.seeds)
    ]
    return make_rows(setup, cells, run_cells(setup, cells, 1), arguments.seeds, None)


def as_row(
    case: Case,
    platform: Platform,
    row: Row,
    price: float | None,
    fixed: Sequence[Row],
    free: Row,
) -> dict[str, Any]:
    """Return the figures of a row, and how it compares with fixed tiers and with price 0."""
    figures = {
        name: None if (found := row.summary(name)) is None else found.mean for name in FIGURES
    }
    change = summarise(
        [
            100 * (one.attainment - two.attainment)
            for one, two in zip(row.runs, free.runs, strict=True)
        ]
    )
    rival = comparable(platform, figures["mean_accuracy"], fixed)
    rival_ms = None if rival is None else mean(rival, "response_p50_ms")
    p50_ms = figures["response_p50_ms"]
    return {
        "platform": case.platform,
        "trace": case.trace,
        "label": case.label,
        "rate": case.rate,
        "policy": row.policy,
        "price": price,
        **figures,
        "attainment_change": change.mean,
        "attainment_low": change.low,
        "attainment_high": change.high,
        "comparable": None if rival is None else rival.policy,
        "p50_ratio": p50_ms / rival_ms if p50_ms and rival_ms else None,
        "by_seed": {name: [getattr(run, name) for run in row.runs] for name in BY_SEED},
    }


def comparable(platform: Platform, accuracy: float | None, fixed: Sequence[Row]) -> Row | None:
    """Return the fixed tier with the smallest median of those as accurate within its interval."""
    rivals = []
    for tier, row in zip(platform.tiers, fixed, strict=True):
        reached = mean(row, "mean_accuracy")
        if accuracy is None or reached is None:
            continue
        high = reached + EXACT if tier.n is None else wilson_interval(reached, tier.n)[1]
        if high >= accuracy:
            rivals.append(row)
    return min(rivals, key=lambda row: mean(row, "response_p50_ms") or 0.0, default=None)


def mean(row: Row, name: str) -> float | None:
    summary = row.summary(name)
    return None if summary is None else summary.mean


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""

    def number(name: str, factor: float = 1.0, digits: int = 2) -> str:
        value = row[name]
        return "-" if value is None else f"{factor * value:.{digits}f}"

    name = row["policy"] if row["price"] is None else f"pace, price {row['price']:g}"
    ratio = "" if row["p50_ratio"] is None else f"{row['p50_ratio']:.2f} x {row['comparable']}"
    return (
        f"{name:18} attainment {number('attainment', 100):>6} ({row['attainment_change']:+.2f})"
        f"  accuracy {number('mean_accuracy', 100)}, recovered"
        f" {number('accuracy_recovered', 100, 1):>5}  response mean / p50 / p99"
        f" {number('response_mean_ms', digits=1):>6} / {number('response_p50_ms', digits=1):>6} /"
        f" {number('response_p99_ms', digits=1):>7} ms  {ratio}"
    )


# live


def live(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every variant in turn, round by round; print the means."""
    variants = {
        "pace, price 0": ["--waiting-price", "0"],
        f"pace, price {DEFAULT_PRICE:g}": ["--waiting-price", f"{DEFAULT_PRICE:g}"],
        **{f"fixed:{tier}": ["--policy", f"fixed:{tier}"] for tier in LIVE_TIERS},
    }
    runs = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(arguments.rounds):
            order = list(variants.items())
            for name, flags in order if round_ % 2 == 0 else order[::-1]:
                runs += live_server(name, flags, round_, Path(folder), arguments)
    keys = ("rate", "budget_ms", "variant")
    runs.sort(key=lambda run: [run[key] for key in keys])
    for group, members in groupby(runs, key=lambda run: [run[key] for key in keys]):
        figures = [run["figures"] for run in members]
        parts = []
        for name in FIGURES:
            values = [each[name] for each in figures if each[name] is not None]
            low, high = min(values, default=0.0), max(values, default=0.0)
            parts.append(f"{name} {sum(values) / max(1, len(values)):.4g} ({low:.4g}-{high:.4g})")
        print(*group, *parts, sep="  ")
    return {"seconds": arguments.seconds, "rounds": arguments.rounds, "runs": runs}


def live_server(
    name: str, flags: Sequence[str], round_: int, folder: Path, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Start the server, send every rate and budget, stop it; yield the figures of each run."""
    command = ["taskset", "-c", "0", str(BIN / "pcae-serve"), "--port", str(PORT), "--threads", "1"]
    command += ["--cache-dir", str(folder), "--no-access-log", *flags]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stderr=log)
        try:
            for rate in arguments.rates:
                for budget_ms in arguments.budgets_ms:
                    report = replay(rate, budget_ms, round_, folder, arguments)
                    row = report["rows"][0]
                    run = {
                        "variant": name,
                        "round": round_,
                        "rate": rate,
                        "budget_ms": budget_ms,
                        "void": report["about"]["void"],
                        "figures": row["by_seed"][0],
                        "client": row["client"],
                    }
                    figures = run["figures"]
                    p50_ms = figures["response_p50_ms"] or 0.0
                    print(
                        f"round {round_ + 1}, {name}, {rate:g}/s, {budget_ms:g} ms: attainment"
                        f" {figures['attainment']:.3f}, p50 {p50_ms:.1f} ms"
                        + (", INVALID: the load generator lagged" if run["void"] else ""),
                        file=sys.stderr,
                    )
                    yield run
        finally:
            server.terminate()
            server.wait(60)


def replay(
    rate: float, budget_ms: float, seed: int, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Send Poisson arrivals with one budget from CPU 1; return the report."""
    trace, file = folder / "trace.csv", folder / "report.json"
    count = int(rate * arguments.seconds)
    times_s = workload.arrivals("poisson", rate, count, seed)
    workload.Workload(times_s, 0 * times_s + budget_ms / 1e3).save(trace)
    command = [str(BIN / "pcae-serve"), "replay", f"http://127.0.0.1:{PORT}", "--pin", "1"]
    command += ["--trace", str(trace), "--requests", str(count), "--json", str(file)]
    if arguments.images is not None:
        command += ["--images", str(arguments.images), "--labels", "column"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not file.exists():
        raise SystemExit(f"replay failed: {done.stderr.strip()}")
    content: dict[str, Any] = json.loads(file.read_text())
    file.unlink()
    return content


if __name__ == "__main__":
    main()
