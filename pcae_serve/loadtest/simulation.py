"""Simulate every policy on every trace, rate and seed, with the server's own scheduler.

    platform, cells -> one simulation each, in parallel processes -> rows of the report

A cell's result depends on its seed alone, not on the number of processes.
"""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from pcae_serve.errors import StartError
from pcae_serve.loadtest import capacity, progress, report, workload
from pcae_serve.loadtest.drawn_looks import DrawnLooks
from pcae_serve.loadtest.platforms import Platform
from pcae_serve.loadtest.report import Figures, Row
from pcae_serve.loadtest.simulator import draw, simulate
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.policies import registry
from pcae_serve.scheduling.policies.waiting_price import ACCURACY_PER_S
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.scheduling.tiers import TierTable

#: Added to a cell's seed for its service times, so that they are independent of the arrivals.
SERVICE_SEED = 1_000_003
#: Added to a cell's seed for the margins of its answers.
LOOK_SEED = 2_000_003


@dataclass(frozen=True)
class Setup:
    """Settings that all cells share."""

    platform: Platform
    mix: str  # of budgets
    requests: int
    devices: int
    max_batch: int
    queue_limit: int
    decode_s: float  # from arrival to the queue
    host_s: float  # per request, taken from the core that batches run on
    waiting_price: float  # accuracy points per 100 ms, for the policies that consider it
    max_looks: int = 2  # how often an image may run; more than once needs a calibrated bundle

    @property
    def known_capacity_per_s(self) -> float | None:
        """The platform's recorded capacity for this mix, on all devices."""
        one_device = self.platform.capacity_per_s.get(self.mix)
        return None if one_device is None else one_device * self.devices


@dataclass(frozen=True)
class Cell:
    """One simulation."""

    policy: str
    trace: str
    rate: float | None  # requests per second; None: as recorded
    seed: int


@dataclass(frozen=True)
class CellResult:
    figures: Figures
    offered: int
    rate: float | None  # None: all requests arrive at the same time


def run_cell(setup: Setup, cell: Cell) -> CellResult:
    """Simulate one cell from its seed."""
    platform, table = setup.platform, setup.platform.tier_table
    if setup.max_looks < 2:
        table = replace(table, escalations=())
    load = workload.make(
        cell.trace, setup.mix, cell.rate, setup.requests, platform.full_s, cell.seed
    )
    scheduler = Scheduler(
        registry.create(cell.policy, table, setup.waiting_price),
        platform.latency(setup.max_batch),
        devices=setup.devices,
        max_batch=setup.max_batch,
        queue_limit=setup.queue_limit,
        escalations=Escalations(table.escalations),
        price_per_s=setup.waiting_price * ACCURACY_PER_S,
    )
    looks = DrawnLooks(table, len(load.times_s), cell.seed + LOOK_SEED)
    points = platform.seconds(setup.max_batch)
    seconds = draw(points, setup.max_batch, cell.seed + SERVICE_SEED)
    tiers = tuple(range(len(platform.tiers)))
    outcome = simulate(
        load.times_s,
        load.budgets_s,
        scheduler,
        seconds,
        tiers,
        decode_s=setup.decode_s,
        host_s=setup.host_s,
        margins=looks.margin if table.escalations else None,
    )
    count, span_s = len(load.times_s), float(load.times_s[-1])
    rate = (count - 1) / span_s if span_s > 0 else None
    figures = report.figures(outcome, table, tiers, accuracy=looks.accuracy(outcome))
    return CellResult(figures, count, rate)


def run_cells(setup: Setup, cells: Sequence[Cell], jobs: int) -> list[CellResult]:
    """Simulate all cells in up to `jobs` processes and return the results in their order."""
    run = partial(run_cell, setup)
    with _pool(min(jobs, len(cells))) as workers:
        results = map(run, cells) if workers is None else workers.map(run, cells)
        return list(progress.track(results, len(cells), "simulating"))


def make_rows(
    setup: Setup,
    cells: Sequence[Cell],
    results: Sequence[CellResult],
    seeds: int,
    capacity_per_s: float | None,
) -> list[Row]:
    """Group the results into rows of `seeds` consecutive cells."""
    rows = []
    for i in range(0, len(cells), seeds):
        cell, seeded = cells[i], results[i : i + seeds]
        rate = seeded[0].rate if cell.rate is None else cell.rate
        load = None if capacity_per_s is None or rate is None else rate / capacity_per_s
        rows.append(
            Row(
                policy=cell.policy,
                trace=cell.trace,
                mix=setup.mix,
                load=load,
                rate=rate,
                offered=seeded[0].offered,
                runs=tuple(result.figures for result in seeded),
            )
        )
    return rows


def find_capacity(platform: Platform, mix: str, max_batch: int) -> float:
    """Compute the requests per second that load 1 stands for, on one device.

    It is the rate at which a clairvoyant schedule answers 99 % in time. Raise StartError if no rate
    does.
    """
    multiples, shares = zip(*workload.parse_mix(mix), strict=True)
    table = [
        [seconds[batch].p50 for batch in range(1, max_batch + 1)]
        for seconds in platform.seconds(max_batch)
    ]
    budgets_s = [multiple * platform.full_s for multiple in multiples]
    with progress.status(f"computing the capacity for {mix} budgets (may take a minute)"):
        found = capacity.capacity(budgets_s, shares, table)
    if found <= 0:
        raise StartError(
            f"{mix} budgets cannot be met at any rate; use larger budgets, or set --rate"
        )
    return found


def resolve_policies(given: Sequence[str], tier_table: TierTable) -> list[str]:
    """Return the policies' names, each once; `all` is every policy. Raise StartError if unknown."""
    every = [*registry.OURS, *registry.PUBLISHED]
    every += [f"{name}:{registry.FIRST}" for name in registry.WITH_TIER]
    specs = [spec for word in given for spec in (every if word == "all" else [word])]
    for spec in specs:
        registry.create(spec, tier_table)
    return list(dict.fromkeys(specs))


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Start worker processes, terminated at once on an exception; None if one job is enough."""
    if jobs == 1:
        yield None
        return
    # spawned, not forked: the thread that shows progress is running
    workers = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _leave_interrupts_to_parent
    )
    try:
        yield workers
    except BaseException:
        workers.shutdown(wait=False, cancel_futures=True)
        # the pool may be starting one that it has not listed yet
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    workers.shutdown()


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
