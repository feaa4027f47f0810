"""pcae-serve simulate: flags of a simulation; `loadtest.simulation` runs it."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pcae_serve.flags import Metavar
from pcae_serve.loadtest import platforms, report
from pcae_serve.loadtest.simulation import (
    Cell,
    Setup,
    find_capacity,
    make_rows,
    resolve_policies,
    run_cells,
)
from pcae_serve.loadtest.workload import Count, WorkloadFlags
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.settings import CACHE_DIR, MAX_BATCH, Settings
from pcae_serve.sources.locate import locate_bundle
from pcae_serve.sources.names import ModelName, is_remote

#: Default loads, in multiples of the capacity: idle, busy, at capacity, overloaded.
LOADS = (0.3, 0.7, 1.0, 1.5)


class Simulate(WorkloadFlags):
    """Compare scheduling policies on request traces, on a virtual clock.

    Runs the server's scheduler with service times from a latency profile, and prints attainment,
    accuracy and response times of every policy.
    """

    policy: list[str] = Field(
        ["all"],
        description=f"policies: {', '.join((*registry.OURS, *registry.PUBLISHED))}, fixed:TIER,"
        " nexus:TIER, each optionally with +drop; comma-separated or repeated; all: every one",
    )
    waiting_price: float = Field(
        DEFAULT_PRICE, ge=0, allow_inf_nan=False, description="accuracy points that must be gained"
        " for each 100 ms of response time, for policy pace; 0: use the whole budget",
    )  # fmt: skip
    load: list[float] | None = Field(
        None,
        description="arrival rates in multiples of the platform's capacity, such as 0.3,1;"
        f" default {','.join(map(str, LOADS))}, or the recorded times of a .csv trace",
    )
    rate: list[float] | None = Field(
        None, description="arrival rates in requests per second, instead of --load"
    )
    requests: Count = Field(4000, description="requests per run; none is discarded as warm-up")
    seeds: Count = Field(3, description="runs per policy, trace and rate, with seeds from 0")
    max_looks: int = Field(
        2, ge=1, le=2, description="how often an image may run, if --profile is of a calibrated"
        " bundle",
    )  # fmt: skip
    profile: str = Field(
        "gpu",
        description="latency profile: gpu or cpu (built in), machine (cached by the server here),"
        " or a JSON file in their format or from pcae-export profile --json",
    )
    bundle: Annotated[ModelName | None, Metavar("DIR")] = Field(
        None, description="bundle that gives a measured profile its accuracies; default: the demo"
    )
    capacity: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="requests per second that load 1 stands for;"
        " default: computed from a clairvoyant schedule (may take a minute)",
    )  # fmt: skip
    devices: int = Field(1, ge=1, description="number of equal devices that share the queue")
    max_batch: int = Field(MAX_BATCH, ge=1, description="maximum batch size")
    queue_limit: int = Field(
        256, ge=1, description="maximum queued requests; further ones are rejected"
    )
    decode_ms: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="time from a request's arrival to the queue"
    )
    host_ms: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="HTTP and decoding time per request on the"
        " core that runs the batches; 0: they run on other cores",
    )  # fmt: skip
    jobs: int | None = Field(None, ge=1, description="parallel processes; default: one per core")
    json_: Path | None = Field(None, alias="json", description="write all figures to this file")
    png: Path | None = Field(
        None, description="plot attainment against accuracy recovered to this file"
    )

    def cli_cmd(self) -> None:
        report.require("pcae-serve simulate")
        platform = platforms.read(self.profile, self._bundle)
        policies = resolve_policies(self.policy, platform.tier_table)
        traces = self.traces()
        setup = Setup(
            platform,
            self.mix,
            self.requests,
            self.devices,
            self.max_batch,
            self.queue_limit,
            self.decode_ms / 1e3,
            self.host_ms / 1e3,
            self.waiting_price,
            self.max_looks,
        )
        capacity_per_s = self._capacity(setup, traces)
        cells = [
            Cell(policy, trace, rate, seed)
            for trace in traces
            for rate in self.rates(trace, capacity_per_s, LOADS)
            for policy in policies
            for seed in range(self.seeds)
        ]
        results = run_cells(setup, cells, self.jobs or len(os.sched_getaffinity(0)))
        rows = make_rows(setup, cells, results, self.seeds, capacity_per_s)
        tiers = ", ".join(f"{tier.name} {tier.accuracy:.4g}" for tier in platform.tiers)
        notes = [f"Platform: {platform.source}.", f"Tiers and their accuracy: {tiers}."]
        if capacity_per_s is not None:
            notes.append(f"Load 1: {capacity_per_s:.4g} requests/s.")
        report.show(rows, notes)
        if self.json_ is not None:
            about = {
                "command": "simulate",
                "settings": self.model_dump(mode="json"),
                "capacity_per_s": capacity_per_s,
                "platform": platform.model_dump(mode="json"),
            }
            report.write_json(self.json_, rows, about)
        if self.png is not None:
            caption = f"{self.mix} budgets; "
            report.write_png(self.png, rows, caption + platform.source.partition(":")[0])

    @property
    def _bundle(self) -> Path | None:
        """Return the folder of --bundle, fetched if it is on the hub."""
        if self.bundle is None:
            return None
        cache_dir = Settings().cache_dir if is_remote(self.bundle) else CACHE_DIR
        return locate_bundle(self.bundle, cache_dir, partial(print, file=sys.stderr))

    def _capacity(self, setup: Setup, traces: Sequence[str]) -> float | None:
        """Return the requests per second of load 1; compute them only if a load needs them."""
        if self.capacity is not None:
            return self.capacity
        known = setup.known_capacity_per_s
        if known is not None and self.max_batch == MAX_BATCH:
            return known
        if self.rate or not (self.load or any(not trace.endswith(".csv") for trace in traces)):
            return None
        return find_capacity(setup.platform, self.mix, self.max_batch) * self.devices
