"""Discrete-event simulation: the server's scheduler and policies on a virtual clock.

arrivals and budgets, scheduler, service times drawn from a profile  ->  Outcome
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from pcae_serve.scheduling.events import (
    Action,
    Answer,
    Arrived,
    BatchAccounted,
    Decoded,
    Dispatch,
    Done,
    Event,
    Reject,
    Remove,
    SetTimer,
    Timer,
)
from pcae_serve.scheduling.latency import Seconds
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import Scheduler

#: (tier, batch size) -> seconds that the batch takes.
Draw = Callable[[int, int], float]
#: (request, tier) -> margin of the request's answer on that tier.
Margins = Callable[[int, int], float]


class End(IntEnum):
    """How a request ended."""

    IN_TIME = 0
    LATE = 1  # answered after its deadline
    REJECTED = 2  # refused at admission
    EXPIRED = 3  # its deadline passed in the queue
    DROPPED = 4  # removed from the queue by the policy
    FAILED = 5  # an error or a broken connection; a simulation has none


@dataclass
class Outcome:
    """How n requests ended, and how the devices spent their time."""

    arrival_s: NDArray[np.float64]  # [n]
    budget_s: NDArray[np.float64]  # [n]
    end: NDArray[np.int8]  # [n], an End
    tier: NDArray[np.int16]  # [n], the tier that answered; -1: none
    end_s: NDArray[np.float64]  # [n], time of the answer, rejection, expiry or drop
    busy_s: float = 0.0
    late_s: float = 0.0  # part of busy_s spent on late answers
    padding_s: float = 0.0  # part of busy_s
    cancelled_s: float = 0.0  # part of busy_s spent on requests whose client left
    batches: list[int] = field(default_factory=list)  # sizes, in order
    span_s: float = 0.0  # from the first arrival to the last end
    first: NDArray[np.int16] | None = None  # [n], the tier of the first look; None: as `tier`


def draw(points: list[dict[int, Seconds]], max_batch: int, seed: int) -> Draw:
    """Return a function that draws service times: log-normal, half as wide below the median.

    points: for each tier, quantiles by batch size, interpolated linearly. The 99th percentile of
    the draws is the profile's p99.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    sizes = np.arange(max_batch + 1, dtype=float)
    medians, widths = [], []
    for tier in points:
        batches = sorted(tier)
        medians.append(np.interp(sizes, batches, [tier[b].p50 for b in batches]))
        widths.append(
            np.interp(sizes, batches, [np.log(tier[b].p99 / tier[b].p50) / 2.326 for b in batches])
        )
    table = [list(map(float, median)) for median in medians]
    width = [list(map(float, w)) for w in widths]
    normals: list[float] = []

    def seconds(tier: int, batch: int) -> float:
        if not normals:
            normals.extend(float(z) for z in generator.standard_normal(4096))
        z = max(-3.0, min(3.0, normals.pop()))
        return table[tier][batch] * float(np.exp(width[tier][batch] * (z if z > 0 else z / 2)))

    return seconds


def simulate(
    times_s: NDArray[np.float64],
    budgets_s: NDArray[np.float64],
    scheduler: Scheduler,
    seconds: Draw,
    tiers: tuple[int, ...] | list[tuple[int, ...]],
    *,
    decode_s: float = 0.0,
    host_s: float = 0.0,
    callers: Sequence[str] | None = None,
    margins: Margins | None = None,
    observer: Callable[[Event, list[Action]], None] | None = None,
) -> Outcome:
    """Offer every request to the scheduler and carry out its actions until all have ended.

    times_s, budgets_s: [n], times ascending. tiers: the allowed ones, of all requests or of each of
    the n. decode_s: from arrival to the queue. host_s: HTTP and decoding time per request if they
    share the core with the batches; each arrival delays every batch in progress by it. callers: of
    each of the n, if several share the devices. margins: of answers, for second looks; None: every
    request has one look. observer: called with every event and the actions
    that it led to.
    """
    n = len(times_s)
    outcome = Outcome(
        times_s,
        budgets_s,
        np.full(n, End.REJECTED, np.int8),
        np.full(n, -1, np.int16),
        np.array(times_s, float),
        first=(first := np.full(n, -1, np.int16)),
    )
    allowed = tiers if isinstance(tiers, list) else [tiers] * n
    agenda: list[tuple[float, int, int, float]] = []  # time, order, device or ~id, seconds
    running: dict[int, Dispatch] = {}
    delay_s: dict[int, float] = {}  # by device: how much later its batch ends
    host_until_s = 0.0  # while no batch is in progress
    wake_s, order, next_ = float("inf"), 0, 0
    arrivals, budgets = times_s.tolist(), budgets_s.tolist()
    while True:
        arrive_s = arrivals[next_] if next_ < n else float("inf")
        agenda_s = agenda[0][0] if agenda else float("inf")
        now_s = min(arrive_s, agenda_s, wake_s)
        if now_s == float("inf"):
            break
        events: list[Event]
        if agenda_s == now_s:  # at equal times, ends precede arrivals
            _, _, device_or_id, took_s = heappop(agenda)
            if (more_s := delay_s.pop(device_or_id, 0.0)) > 0:
                order += 1
                heappush(agenda, (now_s + more_s, order, device_or_id, took_s + more_s))
                continue
            if device_or_id < 0:
                events = [Decoded(now_s, ~device_or_id)]
            else:
                dispatch = running.pop(device_or_id)
                found = list[tuple[int, float]]()
                for id_ in dispatch.ids:
                    deadline_s = arrivals[id_] + budgets[id_]
                    late = now_s > deadline_s
                    if first[id_] >= 0 and late:  # the first answer was sent in time
                        outcome.end_s[id_] = deadline_s
                        continue
                    if first[id_] < 0:
                        first[id_] = dispatch.tier
                        outcome.end[id_] = End.LATE if late else End.IN_TIME
                        if margins is not None and not late:
                            found.append((id_, margins(id_, dispatch.tier)))
                    outcome.tier[id_] = dispatch.tier
                    outcome.end_s[id_] = now_s
                events = [Done(now_s, device_or_id, took_s, tuple(found))]
        elif wake_s == now_s:
            wake_s = float("inf")
            events = [Timer(now_s)]
        else:
            request = Request(
                next_,
                now_s,
                now_s + budgets[next_],
                allowed[next_],
                decode_s=decode_s,
                ready_s=now_s + decode_s,
                caller=callers[next_] if callers else "",
                max_looks=1 if margins is None else 2,
            )
            events = [Arrived(now_s, request)]
            for device in running:
                delay_s[device] = delay_s.get(device, 0.0) + host_s
            if not running:
                host_until_s = max(host_until_s, now_s) + host_s
            if decode_s:
                order += 1
                heappush(agenda, (now_s + decode_s, order, ~next_, 0.0))
            else:
                events.append(Decoded(now_s, next_))
            next_ += 1
        for event in events:
            actions = scheduler.handle(event)
            if observer is not None:
                observer(event, actions)
            for action in actions:
                match action:
                    case Dispatch(device=device, tier=tier, ids=ids):
                        took_s = seconds(tier, len(ids)) + max(0.0, host_until_s - now_s)
                        running[device] = action
                        outcome.batches.append(len(ids))
                        order += 1
                        heappush(agenda, (now_s + took_s, order, device, took_s))
                    case Reject(id=id_, why=why):
                        outcome.end[id_] = End.EXPIRED if why == "expired" else End.REJECTED
                        outcome.end_s[id_] = now_s
                    case Remove(id=id_, why=why):
                        dropped = why == "dropped"
                        outcome.end[id_] = End.DROPPED if dropped else End.EXPIRED
                        outcome.end_s[id_] = now_s
                    case Answer(id=id_):
                        outcome.end_s[id_] = now_s
                    case SetTimer(at_s=at_s):
                        wake_s = max(at_s, now_s)
                    case BatchAccounted() as batch:
                        outcome.busy_s += batch.seconds
                        outcome.late_s += batch.seconds * batch.late / batch.batch
    outcome.span_s = float(outcome.end_s.max() - times_s[0]) if n else 0.0
    return outcome
