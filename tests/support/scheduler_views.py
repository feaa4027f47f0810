"""Scheduler views for policies, with exact seconds that can be checked by hand."""

from collections.abc import Iterable, Sequence

from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.latency import Latency, Seconds
from pcae_serve.scheduling.policies.base import Run, SchedulerView
from pcae_serve.scheduling.request_queue import Queue, Request
from pcae_serve.scheduling.tiers import TierTable

TIER_TABLE = TierTable(("fast", "balanced", "full"), (0.80, 0.85, 0.90))
ALL = (0, 1, 2)
MOST = 32


def linear(*tiers: tuple[float, float], tail: float = 1.0, most: int = MOST) -> Latency:
    """Return a latency model; tiers: seconds of overhead and per image; tail: p99 over median."""
    sizes = (1, 32)
    return Latency(
        [{b: Seconds(o + b * i, tail * (o + b * i)) for b in sizes} for o, i in tiers], most
    )


#: 0.1, 0.2 and 0.4 s for one image, and 0.01, 0.02 and 0.04 s for each further one.
LINES = ((0.09, 0.01), (0.18, 0.02), (0.36, 0.04))
LATENCY = linear(*LINES)


def waiting(*budgets_s: float, tiers: tuple[int, ...] = ALL) -> list[Request]:
    """Return requests that arrived at 0, numbered in this order."""
    return [Request(i, 0.0, budget, tiers) for i, budget in enumerate(budgets_s)]


def load(rate: float, now_s: float = 0.0, budgets_s: Sequence[float] = (1.0,)) -> Arrivals:
    """Return regular arrivals up to `now_s`, with these budgets in turn."""
    arrivals = Arrivals()
    for i in range(128 if rate else 0):
        arrivals.observe(now_s - (128 - i) / rate, budgets_s[i % len(budgets_s)])
    return arrivals


def view(
    requests: Iterable[Request],
    *,
    latency: Latency = LATENCY,
    now_s: float = 0.0,
    most: int = MOST,
    arrivals: Arrivals | None = None,
    devices: int = 1,
) -> SchedulerView:
    queue = Queue()
    for request in requests:
        queue.add(request)
    return SchedulerView(
        now_s, queue, latency.forecast(now_s), arrivals or Arrivals(), most, devices
    )


def ids(run: object) -> list[int]:
    """Return the ids of the requests that run."""
    assert isinstance(run, Run)
    return [request.id for request in run.requests]
