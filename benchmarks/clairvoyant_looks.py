"""The share of a clairvoyant schedule's recovered accuracy, with second looks and without.

    python benchmarks/clairvoyant_looks.py --profile PROFILE [--loads 0.5 0.7 1] [--json FILE]

The clairvoyant knows every arrival, and how unsure each answer will be; whether it is right it
knows as little as the server, so an answer counts with its expected accuracy on both sides. It may
run an image again at any time after its first look. Its schedule is that of a beam search
(looks_schedule.py), a lower bound of the best one; --exact adds the exact search of one look.

As in regret.py: in short windows after a longer trace of the same kind, with exact service times.
Recovered is (mean accuracy of the answers in time - the cheapest tier's) / (the best tier's - the
cheapest tier's); the share is a policy's over the clairvoyant's, from the means over the windows.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from looks_schedule import Floats, Found, Search
from optimal_schedule import best
from rounding import rounded

from pcae_serve.bundle.reader import demo_path
from pcae_serve.loadtest import platforms, workload
from pcae_serve.loadtest.drawn_looks import DrawnLooks
from pcae_serve.loadtest.platforms import Platform
from pcae_serve.loadtest.report import summarise
from pcae_serve.loadtest.simulator import End, simulate
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.waiting_price import ACCURACY_PER_S, DEFAULT_PRICE
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable

WARM_UP, CLOSING = 1500, 3.0  # requests; latencies of the last tier, see regret.py


def gains_of(table: TierTable, looks: DrawnLooks, n: int) -> Floats:
    """Return what a second look is expected to add: [n, first, second]."""
    tiers = len(table.names)
    gains = np.zeros((n, tiers, tiers))
    for each in table.escalations:
        for id_ in range(n):
            gains[id_, each.first, each.second] = each.gain(looks.margin(id_, each.first))
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", required=True)
    parser.add_argument("--traces", nargs="+", default=["azure-code", "poisson"])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 1.0])
    parser.add_argument("--mix", default="mixed")
    parser.add_argument("--capacity", type=float, required=True, help="load 1, per second")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--requests", type=int, default=60, help="in a window")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--exact", action="store_true", help="the exact search of one look, too")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    platform = platforms.read(options.profile, demo_path())
    cells = [(trace, load) for trace in options.traces for load in options.loads]
    run = partial(cell, platform, options)
    results = list[dict[str, Any]]()
    with ProcessPoolExecutor(options.jobs) as pool:
        for (trace, load), rows in zip(cells, pool.map(run, cells), strict=True):
            print(f"\n{trace}, load {load:g}", flush=True)
            for name in rows[0]:
                print(f"  {name:24}" + describe([row[name] for row in rows]))
            for name in ("pace, 2 looks", "pace, 1 look"):
                for whole in ("clairvoyant, 2 looks", "clairvoyant, 1 look"):
                    print(f"  {name} / {whole}: {share(rows, name, whole)}", flush=True)
            results.append({"trace": trace, "load": load, "windows": rows})
    if options.json:
        about = {key: value for key, value in vars(options).items() if key != "json"}
        content = rounded({"options": about, "cells": results})
        options.json.write_text(json.dumps(content, indent=0) + "\n")


def describe(figures: Sequence[dict[str, float]]) -> str:
    """Return the means over the windows, in percent."""
    return "  ".join(
        f"{name} {100 * np.mean([each[name] for each in figures]):6.2f}" for name in figures[0]
    )


def share(rows: Sequence[dict[str, dict[str, float]]], name: str, whole: str) -> str:
    """Return the share of the accuracy recovered, with its interval over the windows."""
    own = np.array([row[name]["recovered"] for row in rows])
    all_ = np.array([row[whole]["recovered"] for row in rows])
    # linearised: the ratio of means varies as the residuals do
    ratio = own.mean() / all_.mean()
    change = summarise(((own - ratio * all_) / all_.mean()).tolist())
    half = 0.0 if change.low is None else change.mean - change.low
    return f"{100 * ratio:.0f} % ± {100 * half:.0f}"


def cell(
    platform: Platform, options: argparse.Namespace, trace_and_load: tuple[str, float]
) -> list[dict[str, dict[str, float]]]:
    """Return the figures of policies and clairvoyants by window."""
    (trace, load), table = trace_and_load, platform.tier_table
    max_batch, tiers = 32, tuple(range(len(platform.tiers)))
    seconds = [[s.p50 for s in tier.values()] for tier in platform.seconds(max_batch)]
    points = [{b + 1: Seconds(s, s) for b, s in enumerate(row)} for row in seconds]
    rate, full_s, n = load * options.capacity, seconds[-1][0], options.requests

    def took(tier: int, batch: int) -> float:
        return seconds[tier][batch - 1]

    warm = workload.make(trace, options.mix, rate, WARM_UP, full_s, seed=1000)
    begin_s = warm.times_s[-1] + warm.budgets_s.max()
    policies = dict[str, tuple[Scheduler, TierTable]]()
    for looks in (2, 1):
        own = table if looks > 1 else replace(table, escalations=())
        scheduler = Scheduler(
            registry.create("pace", own, DEFAULT_PRICE),
            Latency(points, max_batch),
            max_batch=max_batch,
            queue_limit=10**6,
            escalations=Escalations(own.escalations),
            price_per_s=DEFAULT_PRICE * ACCURACY_PER_S,
        )
        drawn = DrawnLooks(own, WARM_UP, seed=1001)
        margins = drawn.margin if looks > 1 else None
        simulate(warm.times_s, warm.budgets_s, scheduler, took, tiers, margins=margins)
        policies["pace, 2 looks" if looks > 1 else "pace, 1 look"] = scheduler, own
    rows = list[dict[str, dict[str, float]]]()
    for window in range(options.windows):
        drawn_load = workload.make(trace, options.mix, rate, n, full_s, seed=window)
        left_s = drawn_load.times_s[-1] + CLOSING * full_s - drawn_load.times_s
        budgets_s = np.minimum(drawn_load.budgets_s, left_s)
        row = dict[str, dict[str, float]]()
        for name, (scheduler, own) in policies.items():
            looks_ = DrawnLooks(own, n, seed=window)
            outcome = simulate(
                drawn_load.times_s + begin_s,
                budgets_s,
                deepcopy(scheduler),
                took,
                tiers,
                margins=looks_.margin if own.escalations else None,
            )
            in_time = outcome.end == End.IN_TIME
            value = float(looks_.accuracy(outcome)[in_time].sum())
            row[name] = Found(value, int(in_time.sum())).figures(n, table.accuracy)
        for name, own in (("clairvoyant, 2 looks", table), ("clairvoyant, 1 look", None)):
            gains = np.zeros((n, len(tiers), len(tiers)))
            if own is not None:
                gains = gains_of(own, DrawnLooks(own, n, seed=window), n)
            search = Search(drawn_load.times_s, budgets_s, table.accuracy, seconds, gains)
            row[name] = search.run(options.width).figures(n, table.accuracy)
        if options.exact:
            known = best(drawn_load.times_s, budgets_s, table.accuracy, seconds, max_batch=32)
            served = sum(len(batch.members) for batch in known.batches)
            row["exact, 1 look"] = Found(known.value, served).figures(n, table.accuracy)
            row["exact, 1 look"]["proven"] = float(known.optimal)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
