"""The scheduler: a state machine without I/O and without a clock. Events in, actions out.

    event           what happened                                  actions that can follow
    Arrived         headers parsed; hopeless requests are refused  Refuse
    Decoded         the request joins the queue                    Refuse, Dispatch, SetTimer
    ClientLeft      its client went away
    TierDisabled    a tier has failed; no request runs on it       Expire, Dispatch
    TaskSubmitted   background work                                StartTask
    DeviceLost      a device never comes back
    Timer           the time of an earlier SetTimer has come       Expire, Dispatch
    Done            a device finished its batch or task            BatchAccounted, Dispatch

The server drives it from asyncio, a simulator from a virtual clock; the same events give the same
actions. It knows deadlines and predicted seconds, nothing of images, sockets or engines.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal, assert_never

from pcae_serve.scheduling.admission import DeviceCapacity, OverloadFactor, check_admission
from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.latency import Forecast, Latency
from pcae_serve.scheduling.policies.base import Policy, Run, SchedulerView, Wait
from pcae_serve.scheduling.request_queue import Queue, Request


@dataclass(frozen=True)
class Arrived:
    now_s: float
    request: Request


@dataclass(frozen=True)
class Decoded:
    now_s: float
    id: int


@dataclass(frozen=True)
class ClientLeft:
    now_s: float
    id: int


@dataclass(frozen=True)
class TierDisabled:
    now_s: float
    tier: int


@dataclass(frozen=True)
class TaskSubmitted:
    now_s: float
    id: int  # of errands, not of requests
    seconds: float  # that it should take


@dataclass(frozen=True)
class DeviceLost:
    now_s: float
    device: int


@dataclass(frozen=True)
class Timer:
    now_s: float


@dataclass(frozen=True)
class Done:
    now_s: float
    device: int
    seconds: float | None  # None where the engine failed: nothing to learn from


Event = Arrived | Decoded | ClientLeft | TierDisabled | TaskSubmitted | DeviceLost | Timer | Done


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
    """Nobody will work on it any more.

    late  uploading, decoding or waiting took so long that no allowed tier can make it
    load  the policy lets it go, so that others make it
    tier  every tier that it allows has failed
    """

    id: int
    why: Literal["late", "load", "tier"]


@dataclass(frozen=True)
class StartTask:
    """Do what was offered on a device: nobody is kept waiting by it."""

    device: int
    id: int


@dataclass(frozen=True)
class SetTimer:
    """Send a Timer at this time; a later SetTimer replaces it."""

    at_s: float


@dataclass(frozen=True)
class BatchAccounted:
    """A device's time went into a batch; some of it for answers that were late, or nobody's."""

    device: int
    tier: int
    batch: int
    seconds: float
    late: int  # of the batch
    cancelled: int  # of the batch: their clients left while it ran


Action = Dispatch | StartTask | Refuse | Expire | SetTimer | BatchAccounted

log = logging.getLogger(__name__)

#: A timer set for the very moment of a deadline may fire a rounding error before it.
_PAST_S = 1e-4
#: While an errand runs, so many requests may be expected that it would make late.
MAX_KEPT = 0.05
#: An errand that found no such moment for so long takes the next one at which nobody waits.
PATIENCE_S = 2.0
#: Under steady load there is no such moment. Then errands take up to this share of a device where
#: all who wait have that much time left, ...
SPARE_SHARE = 0.05
#: ... and this share in any case, and not less than one in so long: admission reckons with it.
FORCED_SHARE = 0.01
OVERDUE_S = 5.0
#: How often a moment is looked for where nothing else happens.
LOOK_S = 0.1


@dataclass
class _Running:
    run: Run | None  # None: an errand
    expected_end_s: float
    left: set[int] = field(default_factory=set)


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
        """queue_limit: requests that wait, decoding ones included; beyond it they are refused."""
        self._policy, self._latency = policy, latency
        self.policy_failed = False  # it could not choose at least once, and the log says why
        self._max_batch, self._queue_limit = max_batch, queue_limit
        self._arrivals, self._overload_factor = Arrivals(), OverloadFactor()
        self._decoding, self._queue = Queue(), Queue()
        self._errands: deque[TaskSubmitted] = deque()
        self._errand_s, self._errand_took_s = 0.0, 0.0  # when one began last, and for how long
        self._running: list[_Running | None] = [None] * devices
        self._lost: set[int] = set()
        self._wake_at_s: float | None = None

    def handle(self, event: Event) -> list[Action]:
        """Take one event, in the order of their times; return what is to be done, in order."""
        now_s, actions = event.now_s, list[Action]()
        forecast = self._latency.forecast(now_s)
        match event:
            case Arrived(request=request):
                self._arrivals.observe(now_s, request.budget_s)
                if (refusal := self._refusal(request, now_s, forecast)) is not None:
                    return [refusal]
                self._decoding.add(request)
                return []  # nothing can run before it is decoded
            case Decoded(id=id_):
                if (decoded := self._decoding.remove(id_)) is not None:
                    self._queue.add(decoded)
            case ClientLeft(id=id_):
                self._leave(id_)
            case TierDisabled(tier=tier):
                actions += self._close(tier)
            case TaskSubmitted():
                self._errands.append(event)
            case DeviceLost(device=device):
                self._lost.add(device)
                self._running[device] = _Running(None, inf)
            case Timer():
                self._wake_at_s = None
            case Done(device=device, seconds=seconds):
                actions += self._finish(device, seconds, now_s)
                forecast = self._latency.forecast(now_s)
            case _:
                assert_never(event)
        actions += self._expire(now_s, forecast, event.id if isinstance(event, Decoded) else None)
        actions += self._dispatch(now_s, forecast)
        if not self._busy and not self._queue and not self._decoding:
            self._overload_factor.caught_up()
        return actions

    @property
    def _busy(self) -> bool:
        """Whether a device that is not lost has something to do."""
        return any(r is not None for i, r in enumerate(self._running) if i not in self._lost)

    @property
    def policy(self) -> str:
        """Its name."""
        return self._policy.name

    @property
    def waiting(self) -> int:
        """Requests in hand that no device works on yet."""
        return len(self._decoding) + len(self._queue)

    def drain_s(self, now_s: float) -> float:
        """Seconds until all that is in hand should be done, each on its cheapest tier."""
        machine = self._machine(now_s, self._latency.forecast(now_s))
        return machine.seconds((self._queue, self._decoding), inf)

    def _refusal(self, request: Request, now_s: float, forecast: Forecast) -> Refuse | None:
        """Why a newcomer cannot be answered in time, if that is already certain."""
        machine = self._machine(now_s, forecast)
        needed_s = self._latency.idle(request.tiers[0])
        waiting = self._queue, self._decoding
        why: Literal["budget", "load", "full"] | None
        why = check_admission(request, needed_s, machine, waiting)
        if why != "budget" and self.waiting >= self._queue_limit:
            why = "full"
        if why is None:
            return None
        return Refuse(request.id, why, needed_s, machine.seconds(waiting, inf))

    def _machine(self, now_s: float, forecast: Forecast) -> DeviceCapacity:
        """What there is to serve with."""
        overdue = self._overdue(now_s)
        frees_in_s = [
            0.0 if running is None else max(0.0, running.expected_end_s - now_s)
            for device, running in enumerate(self._running)
            if device not in self._lost
        ]
        return DeviceCapacity(
            now_s,
            forecast,
            self._max_batch,
            max(1, len(frees_in_s)),
            min(frees_in_s, default=0.0) + (self._errands[0].seconds if overdue else 0.0),
            self._overload_factor.times,
        )

    def _run_errands(self, now_s: float, forecast: Forecast) -> Iterator[Action]:
        """Errands in the order of their coming, where a free device is not soon missed."""
        for device, running in enumerate(self._running):
            if running is not None or not self._errands:
                continue
            errand = self._errands[0]
            patient = now_s < errand.now_s + PATIENCE_S and not self._overdue(now_s)
            kept = self._missed(errand.seconds, now_s, forecast) > MAX_KEPT
            if patient and (self._decoding or kept):
                return
            yield self._begin_errand(device, now_s)

    def _overdue(self, now_s: float, share: float = FORCED_SHARE) -> bool:
        """Whether errands have had less than their share of a device for so long."""
        if not self._errands:
            return False
        errand = self._errands[0]
        waited_s = now_s - max(self._errand_s, errand.now_s)
        return waited_s > min(OVERDUE_S, max(errand.seconds, self._errand_took_s) / share)

    def _spares(self, now_s: float, forecast: Forecast) -> bool:
        """Whether an errand is due that all who wait have the time for."""
        if not self._overdue(now_s, SPARE_SHARE):
            return False
        return now_s + self._errands[0].seconds < min(self._last_calls(forecast))

    def _last_calls(self, forecast: Forecast) -> Iterator[float]:
        """Of those who wait, by their fastest tier: when the most urgent one has to begin."""
        for tier, requests in self._queue.by_cheapest.items():
            if requests:
                yield requests[0].deadline_s - forecast.p50(tier, 1)

    def _begin_errand(self, device: int, now_s: float) -> StartTask:
        errand = self._errands.popleft()
        self._running[device] = _Running(None, now_s + errand.seconds)
        self._errand_s, self._errand_took_s = now_s, errand.seconds
        return StartTask(device, errand.id)

    def _missed(self, seconds: float, now_s: float, forecast: Forecast) -> float:
        """Requests expected within that time that cannot wait for the end of it."""
        after_s = seconds + forecast.p99(0, 1)
        tight = sum(each.share for each in self._arrivals.classes if each.budget_s < after_s)
        return tight * seconds * self._arrivals.rate(now_s)

    def _leave(self, id_: int) -> None:
        if self._decoding.remove(id_) is None and self._queue.remove(id_) is None:
            for running in self._running:
                run = None if running is None else running.run
                if running is not None and run and any(r.id == id_ for r in run.requests):
                    running.left.add(id_)

    def _close(self, tier: int) -> list[Action]:
        """Nobody waits for that tier any more; who allows no other one has waited in vain."""
        actions = list[Action]()
        for queue in (self._queue, self._decoding):
            for request in list(queue.allowing(tier)):
                queue.remove(request.id)
                if rest := tuple(other for other in request.tiers if other != tier):
                    queue.add(replace(request, tiers=rest))
                else:
                    actions.append(Expire(request.id, "tier"))
        return actions

    def _finish(self, device: int, seconds: float | None, now_s: float) -> list[Action]:
        running = self._running[device]
        if running is None:
            raise ValueError(f"device {device} finished a batch that it was not given")
        self._running[device] = _Running(None, inf) if device in self._lost else None
        run, left = running.run, running.left
        if run is None:
            return []
        late = sum(r.deadline_s < now_s and r.id not in left for r in run.requests)
        if seconds is not None:
            self._latency.observe(run.tier, len(run.requests), seconds, now_s)
            self._policy.observe(run, seconds, late)
            self._overload_factor.in_time(len(run.requests) - late - len(left))
            self._overload_factor.in_vain(late)
        return [
            BatchAccounted(device, run.tier, len(run.requests), seconds or 0.0, late, len(left))
        ]

    def _expire(self, now_s: float, forecast: Forecast, decoded: int | None) -> list[Action]:
        """Those whom even their fastest tier, started now, would answer too late."""
        late = list[int]()
        for tier, requests in self._queue.by_cheapest.items():
            doomed_s = now_s + forecast.p50(tier, 1)  # deadlines before this cannot be met
            for request in requests:
                if request.deadline_s >= doomed_s:
                    break
                late.append(request.id)
        for id_ in sorted(late):
            self._queue.remove(id_)
        # who was decoded too late was not kept waiting
        self._overload_factor.in_vain(sum(id_ != decoded for id_ in late))
        return [Expire(id_, "late") for id_ in sorted(late)]

    def _choose(self, view: SchedulerView) -> Run | Wait:
        """The policy's choice. A fault of it must cost nobody an answer, nor stop the machine."""
        try:
            return self._policy.choose(view)
        except Exception:
            if not self.policy_failed:  # it may well fail each time: the log is to stay readable
                log.exception(
                    "the policy %s failed; as long as it does, the most urgent request is served"
                    " alone on its cheapest tier (told once)",
                    self._policy.name,
                )
            self.policy_failed = True
            head = view.queue.by_deadline[0]
            return Run(head.tiers[0], (head,))

    def _dispatch(self, now_s: float, forecast: Forecast) -> list[Action]:
        actions, wake_s = list[Action](), list[float]()
        for device, running in enumerate(self._running):
            if running is not None or not self._queue:
                continue
            if self._overdue(now_s) or self._spares(now_s, forecast):
                actions.append(self._begin_errand(device, now_s))
                continue
            choice = self._choose(
                SchedulerView(
                    now_s,
                    self._queue,
                    forecast,
                    self._arrivals,
                    self._max_batch,
                    len(self._running) - len(self._lost),
                )
            )
            if isinstance(choice, Wait):
                wake_s.append(choice.until_s)
                break  # the devices are equal: what one waits for, all do
            self._overload_factor.in_vain(len(choice.dropped))  # as those who expire: alike for all
            for request in choice.dropped:
                self._queue.remove(request.id)
                actions.append(Expire(request.id, "load"))
            for request in choice.requests:
                self._queue.remove(request.id)
            end_s = now_s + forecast.p50(choice.tier, len(choice.requests))
            self._running[device] = _Running(choice, end_s)
            ids = tuple(request.id for request in choice.requests)
            actions.append(Dispatch(device, choice.tier, ids))
        if self._errands and not self._queue:
            actions += self._run_errands(now_s, forecast)
            if self._errands and None in self._running:
                wake_s.append(now_s + LOOK_S)
        wake_s += self._last_calls(forecast)
        if wake_s and (at_s := max(now_s, min(wake_s)) + _PAST_S) != self._wake_at_s:
            self._wake_at_s = at_s
            actions.append(SetTimer(at_s))
        return actions
