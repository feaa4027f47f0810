"""The interface of scheduling policies: from a view of the queue, choose a batch and its tier.

A policy sees numbers and sorted views of the queue, which it must not change. Admission and expiry
are the scheduler's and the same for every policy.
"""

from dataclasses import dataclass
from typing import Protocol

from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.request_queue import Queue, Request


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """What a policy sees when a device is free."""

    now_s: float
    queue: Queue  # not empty; each request can still be answered in time on its cheapest tier
    forecast: Forecast
    arrivals: Arrivals
    max_batch: int
    devices: int = 1  # equal ones, this one included
    escalations: Escalations | None = None  # what second looks gain; None: there are none


@dataclass(frozen=True, slots=True)
class Run:
    """Run these requests as one batch on this tier now, and drop others from the queue."""

    tier: int
    requests: tuple[Request, ...]
    dropped: tuple[Request, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """Run nothing before `until_s`, unless another event happens first."""

    until_s: float


class Policy(Protocol):
    """Chooses batches; may learn from `observe`."""

    @property
    def name(self) -> str: ...

    def choose(self, view: SchedulerView) -> Run | Wait:
        """Return the next batch for a free device, or the time to wait until."""
        ...

    def observe(self, run: Run, seconds: float, late: int) -> None:
        """Learn from a batch that took `seconds`; `late` of its requests missed the deadline."""
        ...
