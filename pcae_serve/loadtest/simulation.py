"""pcae-serve simulate: policies on traces, by the server's own scheduler on a virtual clock.

    platform, policies x traces x loads x seeds -> a simulation for each, over processes -> report

A cell follows from its seed alone, whatever process runs it. It knows what to run, not how it is
told (`report`) or what a platform is (`profiles`).
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from pcae_serve.errors import StartError
from pcae_serve.loadtest import platforms, report, workload
from pcae_serve.loadtest.platforms import Platform
from pcae_serve.loadtest.report import Figures, Row
from pcae_serve.loadtest.simulator import draw, simulate
from pcae_serve.loadtest.traffic import Count, Traffic
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.settings import MAX_BATCH

#: Of the machine's capacity: idle, busy, just enough, too much.
LOADS = (0.3, 0.7, 1.0, 1.5)
#: Added to a cell's seed for its service times: they must not follow the arrivals' numbers.
SERVICE_SEED = 1_000_003


class Simulate(Traffic):
    """Play traces through the scheduler on a virtual clock: what each policy makes of them."""

    policy: list[str] = Field(
        ["all"],
        description=f"{', '.join((*registry.OURS, *registry.PUBLISHED))}, fixed:TIER, nexus:TIER,"
        " each also with +drop; with commas or repeated; all: all of them",
    )
    load: list[float] | None = Field(
        None,
        description="arrivals in multiples of what the platform can serve in time, as 0.3,1;"
        f" default {','.join(map(str, LOADS))}, for a file its own pace",
    )
    rate: list[float] | None = Field(None, description="instead of --load: requests a second")
    requests: Count = Field(4000, description="of every cell; all of them count")
    seeds: Count = Field(3, description="how often each cell is run, from seed 0")
    profile: str = Field(
        "gpu",
        description="what serves: gpu or cpu (ready-made), machine (this one's cached profile), or"
        " a JSON file of theirs or of pcae-export profile",
    )
    bundle: Path | None = Field(
        None, description="whose accuracies a measured profile has; the demo bundle if left out"
    )
    capacity: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="requests a second that load 1 means; else"
        " the best clairvoyant schedule of the mix is worked out (may take a minute)",
    )  # fmt: skip
    devices: int = Field(1, ge=1, description="equal devices behind one queue")
    max_batch: int = Field(MAX_BATCH, ge=1, description="images in one batch at most")
    queue_limit: int = Field(256, ge=1, description="requests that wait at once; beyond: refused")
    decode_ms: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="from a request's arrival to the queue"
    )
    host_ms: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="of HTTP and decoding a request takes from the"
        " core that batches run on; 0: they have cores of their own",
    )  # fmt: skip
    jobs: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)), ge=1,
        description="processes; one a core if left out",
    )  # fmt: skip
    json_: Path | None = Field(None, alias="json", description="also write everything there")
    png: Path | None = Field(None, description="also draw attainment over accuracy recovered")

    def cli_cmd(self) -> None:
        report.require("pcae-serve simulate")
        platform = platforms.read(self.profile, self.bundle)
        policies = resolve(self.policy, platform.tier_table)
        traces = self.traces()
        capacity = self._capacity(platform, traces)
        cells = self._cells(policies, traces, capacity)
        rows = list(self._rows(cells, self._figures(platform, cells), capacity))
        labels = " ".join(f"{t.name} {t.accuracy:.4g}" for t in platform.tiers)
        notes = [f"On {platform.source}; tiers {labels}."]
        if capacity is not None:
            notes.append(f"Load 1 is {capacity:.4g} requests/s.")
        report.show(rows, notes)
        if self.json_ is not None:
            about = {
                "command": "simulate",
                "settings": self.model_dump(mode="json"),
                "capacity_per_s": capacity,
                "platform": platform.model_dump(mode="json"),
            }
            report.write_json(self.json_, rows, about)
        if self.png is not None:
            caption = f"{self.mix} budgets, {self.requests} requests, {self.seeds} seeds; "
            report.write_png(self.png, rows, caption + platform.source.partition(":")[0])

    def _capacity(self, platform: Platform, traces: Sequence[str]) -> float | None:
        """Requests a second of load 1; worked out only where a load asks for it."""
        if self.capacity is not None:
            return self.capacity
        known = platform.capacity_per_s.get(self.mix)
        if known is not None and self.max_batch == MAX_BATCH:
            return known * self.devices
        if self.rate or not (self.load or any(not trace.endswith(".csv") for trace in traces)):
            return None
        with told(f"working out the capacity for {self.mix} budgets"):
            one = capacity(platform, self.mix, self.max_batch)
        if one <= 0:
            raise StartError(
                f"no rate of {self.mix} budgets can be served in time on {self.profile}: give"
                " looser budgets, or --rate"
            )
        return one * self.devices

    def _cells(
        self, policies: Sequence[str], traces: Sequence[str], capacity: float | None
    ) -> list["Cell"]:
        cells = []
        for trace in traces:
            rates: Sequence[float | None]
            if self.rate:
                rates = self.rate
            elif trace.endswith(".csv") and not self.load:
                rates = [None]
            else:
                assert capacity is not None  # _capacity has seen to it
                rates = [load * capacity for load in self.load or LOADS]
            cells += [
                Cell(policy, trace, rate, seed)
                for rate in rates
                for policy in policies
                for seed in range(self.seeds)
            ]
        return cells

    def _figures(self, platform: Platform, cells: Sequence["Cell"]) -> list["Ran"]:
        """Of every cell, in their order, with a bar over those done."""
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        play = partial(run, self, platform)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        done = list[Ran]()
        jobs = min(self.jobs, len(cells))
        with (
            Progress(*columns, console=Console(stderr=True), transient=True) as progress,
            pool(jobs) as workers,
        ):
            bar = progress.add_task("simulating", total=len(cells))
            for ran in map(play, cells) if workers is None else workers.map(play, cells):
                done.append(ran)
                progress.advance(bar)
        return done

    def _rows(
        self, cells: Sequence["Cell"], ran: Sequence["Ran"], capacity: float | None
    ) -> Iterator[Row]:
        for i in range(0, len(cells), self.seeds):
            cell, runs = cells[i], ran[i : i + self.seeds]
            rate = runs[0].rate if cell.rate is None else cell.rate
            load = None if capacity is None or rate is None else rate / capacity
            yield Row(
                policy=cell.policy,
                trace=cell.trace,
                mix=self.mix,
                load=load,
                rate=rate,
                offered=runs[0].offered,
                runs=tuple(one.figures for one in runs),
            )


@dataclass(frozen=True)
class Cell:
    """One simulation; all else is the same for all."""

    policy: str
    trace: str
    rate: float | None  # None: as recorded
    seed: int


@dataclass(frozen=True)
class Ran:
    figures: Figures
    offered: int
    rate: float | None  # None: all at once


def run(settings: Simulate, platform: Platform, cell: Cell) -> Ran:
    """One cell, from its seed."""
    load = workload.make(
        cell.trace, settings.mix, cell.rate, settings.requests, platform.full_s, cell.seed
    )
    scheduler = Scheduler(
        registry.create(cell.policy, platform.tier_table),
        platform.latency(settings.max_batch),
        devices=settings.devices,
        max_batch=settings.max_batch,
        queue_limit=settings.queue_limit,
    )
    points = platform.seconds(settings.max_batch)
    seconds = draw(points, settings.max_batch, cell.seed + SERVICE_SEED)
    tiers = tuple(range(len(platform.tiers)))
    outcome = simulate(
        load.times_s,
        load.budgets_s,
        scheduler,
        seconds,
        tiers,
        decode_s=settings.decode_ms / 1e3,
        host_s=settings.host_ms / 1e3,
    )
    count, span_s = len(load.times_s), float(load.times_s[-1])
    rate = (count - 1) / span_s if span_s > 0 else None
    return Ran(report.figures(outcome, platform.tier_table, tiers), count, rate)


def capacity(platform: Platform, mix: str, max_batch: int) -> float:
    """Requests a second that the best clairvoyant schedule on one device answers in time."""
    from pcae_serve.loadtest.capacity import capacity as clairvoyant

    multiples, shares = zip(*workload.parse_mix(mix), strict=True)
    table = [
        [seconds[batch].p50 for batch in range(1, max_batch + 1)]
        for seconds in platform.seconds(max_batch)
    ]
    return clairvoyant([m * platform.full_s for m in multiples], shares, table)


def resolve(given: Sequence[str], tier_table: TierTable) -> list[str]:
    """Policies by name, each tried once here: a typing error must not wait for its turn."""
    every = [*registry.OURS, *registry.PUBLISHED]
    every += [f"{name}:{registry.FIRST}" for name in registry.WITH_TIER]
    specs = [spec for word in given for spec in (every if word == "all" else [word])]
    for spec in specs:
        registry.create(spec, tier_table)
    return list(dict.fromkeys(specs))


@contextmanager
def pool(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes, gone at once when something goes wrong; None where one job is enough."""
    if jobs == 1:
        yield None
        return
    # spawned, not forked: a bar's thread is running
    workers = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _deaf)
    try:
        yield workers
    except BaseException:
        workers.shutdown(wait=False, cancel_futures=True)
        # not only those that the pool knows of: it may have been starting one just now
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    workers.shutdown()


def _deaf() -> None:
    """Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say on a terminal what is being waited for."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
