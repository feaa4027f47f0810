"""Regret: effective accuracy of every policy against the offline optimum, in short windows.

    python benchmarks/regret.py [--profile gpu] [--windows 20] [--requests 60] [--jobs 2] [--json F]

On the virtual clock, with a ready-made profile; takes minutes to an hour. Before each window a
policy runs a longer trace of the same kind, so that it has learnt the load; the queue then empties,
and the arrivals of the window follow. No deadline lies beyond the end of the window. Service times
are exactly the medians, for policies and optimum alike, so the gap comes from unknown arrivals and
from the choice of batch and tier.

Effective accuracy is the accuracy of the answers in time over all offered requests. The share of
the gap that our policy closes, from the means over the windows of a cell:

    (ours - best other) / (optimum - best other)
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
from optimal_schedule import best

from pcae_serve.loadtest import platforms, workload
from pcae_serve.loadtest.simulator import End, simulate
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.scheduler import Scheduler

OURS = "pace"
OTHERS = (
    "nexus:fastest",
    "fixed:fastest",
    "greedy",
    "greedy+drop",
    "conservative",
    "conservative+drop",
    "slackfit",
    "slackfit+drop",
    "infaas",
    "infaas+drop",
    "model-switching",
    "model-switching+drop",
)
LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.5)
WARM_UP = 1500  # requests
#: No deadline lies later than this after the last arrival, in the full tier's batch-1 latency.
CLOSING = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--traces", nargs="+", default=["poisson", "gamma-4", "azure-code"])
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--mix", default="mixed")
    parser.add_argument("--windows", type=int, default=20, help="windows of each trace and load")
    parser.add_argument("--requests", type=int, default=60, help="requests in a window")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells = [(trace, load) for trace in options.traces for load in options.loads]
    run = partial(cell, options.profile, options.mix, options.windows, options.requests)
    print(f"{'trace':12s} load  best other (which){'':15s} ours  optimum  closed  proven")
    results, closed = [], []
    with ProcessPoolExecutor(options.jobs) as pool:
        for (trace, load), (values, proven) in zip(cells, pool.map(run, cells), strict=True):
            means = {name: float(np.mean(values[name])) for name in values}
            best = max(OTHERS, key=means.__getitem__)
            gap = means["optimum"] - means[best]
            share = (means[OURS] - means[best]) / gap if gap > 0 else float("nan")
            closed.append(share)
            print(
                f"{trace:12s} {load:4.1f}  {means[best]:.4f} {best:26s} {means[OURS]:.4f}"
                f" {means['optimum']:.4f} {share:7.1%}  {proven}/{options.windows}",
                flush=True,
            )
            results.append({"trace": trace, "load": load, "proven": proven, "values": values})
    print(
        f"gap closed, mean over cells: {np.nanmean(closed):.1%} (median {np.nanmedian(closed):.1%})"
    )
    if options.json:
        options.json.write_text(json.dumps({"options": str(vars(options)), "cells": results}))


def cell(
    profile: str, mix: str, windows: int, requests: int, trace_and_load: tuple[str, float]
) -> tuple[dict[str, list[float]], int]:
    """Return effective accuracy by policy and window, and the number of proven optima."""
    (trace, load), platform = trace_and_load, platforms.read(profile)
    tier_table, allowed = platform.tier_table, tuple(range(len(platform.tiers)))
    accuracy = tier_table.accuracy
    table = [[s.p50 for s in tier.values()] for tier in platform.seconds(32)]  # [tiers, batches]
    points = [{b + 1: Seconds(s, s) for b, s in enumerate(row)} for row in table]
    rate, full_s = load * platform.capacity_per_s[mix], table[-1][0]
    values: dict[str, list[float]] = {"optimum": []}
    proven = 0
    warm = workload.make(trace, mix, rate, WARM_UP, full_s, seed=1000)
    begin_s = warm.times_s[-1] + warm.budgets_s.max()  # the queue is empty by then
    seconds = partial(_table_lookup, table)
    schedulers = {}
    for spec in (OURS, *OTHERS):
        scheduler = Scheduler(
            registry.create(spec, tier_table), Latency(points, 32), max_batch=32, queue_limit=10**6
        )
        simulate(warm.times_s, warm.budgets_s, scheduler, seconds, allowed)
        schedulers[spec] = scheduler
        values[spec] = []
    for window in range(windows):
        drawn = workload.make(trace, mix, rate, requests, full_s, seed=window)
        # no traffic follows the window: later deadlines could be met on an idle device
        left_s = drawn.times_s[-1] + CLOSING * full_s - drawn.times_s
        budgets_s = np.minimum(drawn.budgets_s, left_s)
        optimum = best(drawn.times_s, budgets_s, accuracy, table, max_batch=32)
        proven += optimum.optimal
        values["optimum"].append(optimum.value / requests)
        for spec, scheduler in schedulers.items():
            outcome = simulate(
                drawn.times_s + begin_s,
                budgets_s,
                deepcopy(scheduler),
                seconds,
                allowed,
            )
            in_time = outcome.tier[outcome.end == End.IN_TIME]
            values[spec].append(float(np.array(accuracy)[in_time].sum()) / requests)
    return values, proven


def _table_lookup(table: list[list[float]], tier: int, batch: int) -> float:
    return table[tier][batch - 1]


if __name__ == "__main__":
    main()
