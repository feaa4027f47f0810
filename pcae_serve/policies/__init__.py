"""Policies choose which waiting requests run next, and on which tier. One interface, many bodies.

A policy knows no clock and no queue; it is given numbers. Admission, expiry and refusal are the
scheduler's and the same for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pcae_serve.latency import Latency


@dataclass(frozen=True)
class Request:
    """What scheduling needs to know of a request. Times are seconds of one clock."""

    id: int
    arrival_s: float  # when its headers were parsed
    deadline_s: float  # arrival and budget
    tiers: tuple[int, ...]  # allowed, the cheapest first, never empty


@dataclass(frozen=True)
class Situation:
    """What a policy sees when a device is free."""

    now_s: float
    waiting: Sequence[Request]  # by deadline, the earliest first; each can still make it
    latency: Latency
    max_batch: int


@dataclass(frozen=True)
class Run:
    """Run these requests together on this tier now."""

    tier: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Wait:
    """Run nothing before `until_s`, unless something happens."""

    until_s: float


class Policy(Protocol):
    """Decides; may learn from what it is told, but only from that."""

    name: str

    def choose(self, situation: Situation) -> Run | Wait:
        """The next batch for a free device; `situation.waiting` is not empty."""
        ...

    def observe(self, run: Run, seconds: float) -> None:
        """A batch chosen earlier took `seconds`."""
        ...
