"""Policies choose which waiting requests run next, and on which tier. One interface, many bodies.

A policy knows no clock; it is given numbers, and sorted views of the queue that it must not change.
Admission, expiry and refusal are the scheduler's and the same for all.
"""

from dataclasses import dataclass
from typing import Protocol

from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.request_queue import Queue, Request


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """What a policy sees when a device is free."""

    now_s: float
    queue: Queue  # never empty; each can still make it on its cheapest tier
    forecast: Forecast
    arrivals: Arrivals
    max_batch: int
    devices: int = 1  # equal ones, this one included


@dataclass(frozen=True, slots=True)
class Run:
    """Run these requests together on this tier now; those let go are told so at once."""

    tier: int
    requests: tuple[Request, ...]
    dropped: tuple[Request, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """Run nothing before `until_s`, unless something happens."""

    until_s: float


class Policy(Protocol):
    """Decides; may learn from what it is told, but only from that."""

    @property
    def name(self) -> str: ...

    def choose(self, view: SchedulerView) -> Run | Wait:
        """The next batch for a free device; `situation.queue` is not empty."""
        ...

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """A batch chosen earlier took `seconds`, which made `late` of its requests late."""
        ...
