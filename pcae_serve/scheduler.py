"""The scheduler: a state machine without I/O and without a clock. Events in, actions out.

    Arrived  headers parsed: refuse what is hopeless before any work
    Decoded  joins the queue, ordered by deadline over all tiers        -> Refuse, Dispatch, WakeAt
    Left     its client went away
    Timer    the time of an earlier WakeAt has come                     -> Expire, Dispatch
    Done     a device has finished its batch                            -> Dispatch

The server drives it from asyncio, a simulator from a virtual clock; the same events give the same
actions. It knows deadlines and predicted seconds, nothing of images, sockets or engines.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, assert_never

from pcae_serve.latency import Latency
from pcae_serve.policies import Policy, Request, Run, Situation, Wait


@dataclass(frozen=True)
class Arrived:
    now_s: float
    request: Request


@dataclass(frozen=True)
class Decoded:
    now_s: float
    id: int


@dataclass(frozen=True)
class Left:
    now_s: float
    id: int


@dataclass(frozen=True)
class Timer:
    now_s: float


@dataclass(frozen=True)
class Done:
    now_s: float
    device: int
    seconds: float | None  # None where the engine failed: nothing to learn from


Event = Arrived | Decoded | Left | Timer | Done


@dataclass(frozen=True)
class Dispatch:
    """Run these requests on a device, on one tier."""

    device: int
    tier: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Refuse:
    """Answer at once that it cannot be done in time."""

    id: int
    why: Literal["budget", "load", "full"]
    needed_s: float  # what the fastest allowed tier takes on an idle machine
    retry_after_s: float  # when the work now queued should be done


@dataclass(frozen=True)
class Expire:
    """Uploading, decoding or waiting took so long that no allowed tier can make it any more."""

    id: int


@dataclass(frozen=True)
class WakeAt:
    """Send a Timer at this time; a later WakeAt replaces it."""

    at_s: float


Action = Dispatch | Refuse | Expire | WakeAt

#: A timer set for the very moment of a deadline may fire a rounding error before it.
_PAST_S = 1e-4


@dataclass(frozen=True)
class _Running:
    run: Run
    expected_end_s: float


class Scheduler:
    """One deadline-ordered queue over all tiers, served by `devices` equal devices."""

    def __init__(
        self,
        policy: Policy,
        latency: Latency,
        *,
        devices: int = 1,
        max_batch: int = 32,
        queue_limit: int = 256,
    ) -> None:
        """queue_limit: requests in hand, decoding ones included; beyond it they are refused."""
        self._policy, self._latency = policy, latency
        self._max_batch, self._queue_limit = max_batch, queue_limit
        self._decoding: dict[int, Request] = {}
        self._queue: list[Request] = []  # by deadline
        self._running: list[_Running | None] = [None] * devices
        self._wake_at_s: float | None = None

    def handle(self, event: Event) -> list[Action]:
        """Take one event, in the order of their times; return what is to be done, in order."""
        now_s, actions = event.now_s, list[Action]()
        match event:
            case Arrived(request=request):
                if (refusal := self._refusal(now_s, request)) is not None:
                    actions.append(refusal)
                else:
                    self._decoding[request.id] = request
            case Decoded(id=id_):
                if id_ in self._decoding:
                    request = self._decoding.pop(id_)
                    if (refusal := self._refusal(now_s, request)) is not None:
                        actions.append(refusal)
                    else:
                        insort(self._queue, request, key=_urgency)
            case Left(id=id_):
                self._decoding.pop(id_, None)
                self._queue = [request for request in self._queue if request.id != id_]
            case Timer():
                self._wake_at_s = None
            case Done(device=device, seconds=seconds):
                self._finish(device, seconds, now_s)
            case _:
                assert_never(event)
        actions += self._expire(now_s)
        actions += self._dispatch(now_s)
        return actions

    @property
    def waiting(self) -> int:
        """Requests in hand that no device works on yet."""
        return len(self._decoding) + len(self._queue)

    def _refusal(self, now_s: float, request: Request) -> Refuse | None:
        """Why no allowed tier can answer in time, if that is already certain."""
        cheapest = request.tiers[0]
        needed_s = self._latency.idle(cheapest)
        drain_s = self._drain_s(now_s, self._queue)
        if needed_s > request.deadline_s - request.arrival_s:
            return Refuse(request.id, "budget", needed_s, drain_s)
        if self.waiting >= self._queue_limit:
            return Refuse(request.id, "full", needed_s, drain_s)
        ahead = [r for r in self._queue if r.deadline_s <= request.deadline_s]
        wait_s = self._drain_s(now_s, ahead)
        done_s = now_s + wait_s + self._latency.promised(cheapest, 1, now_s)
        if wait_s > 0 and done_s > request.deadline_s:  # else it is not the load that is to blame
            return Refuse(request.id, "load", needed_s, drain_s)
        return None

    def _drain_s(self, now_s: float, requests: Sequence[Request]) -> float:
        """Seconds until a device is free and these are done, each on its cheapest tier."""
        starts = [0.0 if r is None else max(0.0, r.expected_end_s - now_s) for r in self._running]
        per_tier: dict[int, int] = {}
        for request in requests:
            per_tier[request.tiers[0]] = per_tier.get(request.tiers[0], 0) + 1
        work_s = 0.0
        for tier, count in per_tier.items():
            batches = ceil(count / self._max_batch)
            once_s = self._latency.expected(tier, 1, now_s)
            image_s = self._latency.expected(tier, 2, now_s) - once_s
            work_s += count * image_s + batches * (once_s - image_s)
        return min(starts) + work_s / len(self._running)

    def _finish(self, device: int, seconds: float | None, now_s: float) -> None:
        running = self._running[device]
        if running is None:
            raise ValueError(f"device {device} finished a batch that it was not given")
        self._running[device] = None
        if seconds is not None:
            run = running.run
            self._latency.observe(run.tier, len(run.requests), seconds, now_s)
            self._policy.observe(run, seconds)

    def _expire(self, now_s: float) -> list[Action]:
        """Those whom even their fastest tier, started now, would answer too late."""
        late = {r.id for r in self._queue if self._latest_start_s(r, now_s) < now_s}
        self._queue = [request for request in self._queue if request.id not in late]
        return [Expire(id_) for id_ in sorted(late)]

    def _latest_start_s(self, request: Request, now_s: float) -> float:
        return request.deadline_s - self._latency.expected(request.tiers[0], 1, now_s)

    def _dispatch(self, now_s: float) -> list[Action]:
        actions, wake_s = list[Action](), list[float]()
        for device, running in enumerate(self._running):
            if running is not None or not self._queue:
                continue
            choice = self._policy.choose(
                Situation(now_s, tuple(self._queue), self._latency, self._max_batch)
            )
            if isinstance(choice, Wait):
                wake_s.append(choice.until_s)
                break  # the devices are equal: what one waits for, all do
            chosen = {request.id for request in choice.requests}
            self._queue = [request for request in self._queue if request.id not in chosen]
            end_s = now_s + self._latency.expected(choice.tier, len(chosen), now_s)
            self._running[device] = _Running(choice, end_s)
            ids = tuple(request.id for request in choice.requests)
            actions.append(Dispatch(device, choice.tier, ids))
        if self._queue:
            wake_s.append(min(self._latest_start_s(r, now_s) for r in self._queue))
        if wake_s and (at_s := max(now_s, min(wake_s)) + _PAST_S) != self._wake_at_s:
            self._wake_at_s = at_s
            actions.append(WakeAt(at_s))
        return actions


def _urgency(request: Request) -> tuple[float, int]:
    return request.deadline_s, request.id
