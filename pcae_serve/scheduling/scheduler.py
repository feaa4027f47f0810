"""The scheduler: a state machine without I/O and without a clock. Events in, actions out.

The server drives it from asyncio, the simulator from a virtual clock. The same events give the same
actions.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import assert_never

from pcae_serve.scheduling.admission import DeviceCapacity, OverloadFactor, check_admission
from pcae_serve.scheduling.arrivals import Arrivals
from pcae_serve.scheduling.background import RECHECK_S, BackgroundTask, BackgroundTasks
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.events import (
    Action,
    Answer,
    Arrived,
    BatchAccounted,
    ClientLeft,
    Decoded,
    DeviceLost,
    Dispatch,
    Done,
    Event,
    LooksEnded,
    Reject,
    RejectReason,
    Remove,
    SetTimer,
    StartTask,
    TaskSubmitted,
    TierDisabled,
    Timer,
)
from pcae_serve.scheduling.feasibility import Backlog, group_by_cheapest, keep_feasible
from pcae_serve.scheduling.latency import Forecast, Latency
from pcae_serve.scheduling.policies.base import Policy, Run, SchedulerView, Wait
from pcae_serve.scheduling.request_queue import Queue, Request
from pcae_serve.scheduling.second_looks import SecondLooks
from pcae_serve.scheduling.shares import Shares

log = logging.getLogger(__name__)

#: Added to timers, in seconds: one set for exactly a deadline may fire a rounding error before it.
_TIMER_SLACK_S = 1e-4


@dataclass
class _Running:
    run: Run | None  # None for a background task
    expected_end_s: float
    left: set[int] = field(default_factory=set)  # ids of the batch whose clients left
    again: bool = False  # a batch of second looks, whose requests have a first answer


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
        weights: Mapping[str, float] | None = None,
        escalations: Escalations | None = None,
        price_per_s: float = 0.0,
    ) -> None:
        """Create a scheduler with an empty queue.

        queue_limit: largest number of waiting requests, those being decoded included; further ones
        are refused. weights: of callers by name, 1 for others, see shares.py. escalations: what
        second looks gain; None: there are none. price_per_s: accuracy that a second of response
        time must bring in a second look.
        """
        self._policy, self._latency = policy, latency
        self.policy_failed = False  # the policy raised at least once; the first time is logged
        self._max_batch, self._queue_limit = max_batch, queue_limit
        self._arrivals, self._overload_factor = Arrivals(), OverloadFactor()
        self._decoding, self._queue = Queue(), Queue()
        self._shares = Shares(weights or {}, (self._decoding, self._queue), queue_limit)
        self._background = BackgroundTasks()
        self._escalations = escalations or None
        self._looks = SecondLooks(escalations or Escalations(()), price_per_s)
        self._running: list[_Running | None] = [None] * devices
        self._lost: set[int] = set()
        self._timer_s: float | None = None
        self._wake_s = list[float]()  # times to decide again, of the event being handled

    def handle(self, event: Event) -> list[Action]:
        """Handle one event and return the actions to take, in order. Events come in time order."""
        now_s, actions = event.now_s, list[Action]()
        self._wake_s.clear()
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
                actions += self._disable(tier)
            case TaskSubmitted(id=id_, seconds=task_s):
                self._background.submit(BackgroundTask(id_, now_s, task_s))
            case DeviceLost(device=device):
                self._lost.add(device)
                self._running[device] = _Running(None, inf)
            case LooksEnded():
                actions += [Answer(id_) for id_ in self._looks.end()]
            case Timer():
                self._timer_s = None
            case Done(device=device, seconds=seconds, margins=margins):
                finished = self._running[device]
                actions += self._finish(device, seconds, now_s)
                forecast = self._latency.forecast(now_s)
                actions += self._offer_looks(finished, margins, now_s, forecast)
            case _:
                assert_never(event)
        actions += self._expire(now_s, forecast, event.id if isinstance(event, Decoded) else None)
        actions += self._dispatch(now_s, forecast)
        actions += self._look_again(now_s, forecast)
        actions += self._set_timer(now_s, forecast)
        if not self._busy and not self._queue and not self._decoding:
            self._overload_factor.caught_up()
            self._shares.caught_up()
        return actions

    @property
    def _busy(self) -> bool:
        """Whether a device that is not lost is running a batch or a task."""
        return any(r is not None for i, r in enumerate(self._running) if i not in self._lost)

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return self._policy.name

    @property
    def waiting(self) -> int:
        """Number of accepted requests that no device has started on."""
        return len(self._decoding) + len(self._queue)

    def drain_s(self, now_s: float) -> float:
        """Return the seconds until all accepted work should be done, each on its cheapest tier."""
        capacity = self._capacity(now_s, self._latency.forecast(now_s))
        return capacity.drain_s((self._queue, self._decoding))

    def early_refusal(self, request: Request, now_s: float) -> Reject | None:
        """Return why a request would be refused if it arrived now. Changes no state.

        A cheap check for a request whose body is still to come: it compares the load with every
        deadline, but not the reference schedule.
        """
        capacity = self._capacity(now_s, self._latency.forecast(now_s))
        why = self._why_refused(request, capacity, None)
        return None if why is None else self._reject(request, why, capacity)

    def _refusal(self, request: Request, now_s: float, forecast: Forecast) -> Reject | None:
        """Return why a new request cannot be served, or None if it is accepted."""
        capacity = self._capacity(now_s, forecast)
        self._shares.arrived(request, capacity)
        why = self._why_refused(request, capacity, forecast)
        if why is None:
            self._shares.admitted(request, capacity)
            return None
        if why not in ("budget", "expired"):
            self._shares.refused(now_s)
        return self._reject(request, why, capacity)

    def _why_refused(
        self, request: Request, capacity: DeviceCapacity, forecast: Forecast | None
    ) -> RejectReason | None:
        """Return why a request cannot be served. forecast: to compare the reference schedule."""
        needed_s, waiting = self._latency.idle(request.tiers[0]), (self._queue, self._decoding)
        why = check_admission(request, needed_s, capacity, waiting)
        if why is None and forecast is not None:
            feasible = self._stays_feasible(request, capacity.now_s, forecast)
            why = None if feasible else "load"
        if why not in ("budget", "expired") and self.waiting >= self._queue_limit:
            why = "full"
        if why is None and self._shares.is_over(request, capacity):
            why = "share"
        return why

    def _reject(self, request: Request, why: RejectReason, capacity: DeviceCapacity) -> Reject:
        needed_s = self._latency.idle(request.tiers[0]) + request.decode_s
        # until the decoders have caught up, and the devices
        decoders_s = request.ready_s - request.decode_s - capacity.now_s
        retry_after_s = max(capacity.drain_s((self._queue, self._decoding)), decoders_s)
        return Reject(request.id, why, needed_s, retry_after_s)

    def _stays_feasible(self, request: Request, now_s: float, forecast: Forecast) -> bool:
        """Return whether the backlog with a new request misses no more deadlines than without it.

        Not checked under overload, nor on one device if all waiting requests have the same cheapest
        tier and batching pays on it: there a policy forms larger batches than the reference
        schedule does, so the reference would refuse requests that can be served.
        """
        if self._overload_factor.overloaded:
            return True
        tiers = {tier for queue in (self._queue, self._decoding) for tier in queue.cheapest_tiers}
        cheapest = request.tiers[0]
        one_tier = tiers <= {cheapest} and len(self._working) == 1
        if one_tier and forecast.useful_batch(cheapest) > 1:
            return True
        if not tiers and None in self._running:  # an idle device takes it at once
            return True
        backlog = self._backlog(now_s, forecast)
        misses = backlog.adding(request).misses()
        return not misses or misses <= backlog.misses()

    def _backlog(self, now_s: float, forecast: Forecast) -> Backlog:
        """Return all waiting requests, and when each working device is expected to be free."""
        free_s = [self._free_s(device, now_s) for device in self._working]
        free_s[free_s.index(min(free_s))] += self._background.reserved_s(now_s)
        waiting = group_by_cheapest((self._queue, self._decoding))
        return Backlog(tuple(free_s), waiting, forecast, self._max_batch)

    def _free_s(self, device: int, now_s: float) -> float:
        running = self._running[device]
        return now_s if running is None else max(now_s, running.expected_end_s)

    @property
    def _working(self) -> list[int]:
        """The devices that are not lost; all of them if none is left."""
        devices = range(len(self._running))
        return [device for device in devices if device not in self._lost] or list(devices)

    def _capacity(self, now_s: float, forecast: Forecast) -> DeviceCapacity:
        free_in_s = [
            0.0 if running is None else max(0.0, running.expected_end_s - now_s)
            for device, running in enumerate(self._running)
            if device not in self._lost
        ]
        return DeviceCapacity(
            now_s,
            forecast,
            self._max_batch,
            max(1, len(free_in_s)),
            min(free_in_s, default=0.0) + self._background.reserved_s(now_s),
            self._overload_factor.times,
        )

    def _latest_starts(self, forecast: Forecast) -> Iterator[float]:
        """Yield, per cheapest tier, when its most urgent queued request has to start."""
        for tier, requests in self._queue.by_cheapest.items():
            if requests:
                yield requests[0].deadline_s - forecast.p50(tier, 1)

    def _leave(self, id_: int) -> None:
        waits = (self._decoding, self._queue, self._looks)
        if all(queue.remove(id_) is None for queue in waits):
            for running in self._running:
                run = None if running is None else running.run
                if running is not None and run and any(r.id == id_ for r in run.requests):
                    running.left.add(id_)

    def _disable(self, tier: int) -> list[Action]:
        """Remove a tier from every waiting request; expire those that allow no other."""
        actions = list[Action]()
        for queue in (self._queue, self._decoding):
            for request in list(queue.allowing(tier)):
                queue.remove(request.id)
                if rest := tuple(other for other in request.tiers if other != tier):
                    queue.add(replace(request, tiers=rest))
                else:
                    actions.append(Remove(request.id, "failed"))
        return actions + [Answer(id_) for id_ in self._looks.disable(tier)]

    def _offer_looks(
        self,
        first: _Running | None,
        margins: Sequence[tuple[int, float]],
        now_s: float,
        forecast: Forecast,
    ) -> Iterator[Action]:
        """Keep those requests of a finished batch whose second look is worth its time."""
        run = None if first is None else first.run
        if first is None or run is None:
            return
        view = self._view(now_s, forecast)
        requests = {request.id: request for request in run.requests}
        for id_, margin in margins:
            if id_ in first.left:
                continue
            late = self._overload_factor.overloaded
            if late or not self._looks.offer(
                requests[id_], run.tier, margin, view, len(run.requests)
            ):
                yield Answer(id_)

    def _may_look(self, run: Run, device: int, now_s: float, forecast: Forecast) -> bool:
        """Return whether a batch of second looks costs no accepted request its deadline."""
        if not self._decoding:
            return True
        backlog = self._backlog(now_s, forecast)
        end_s = now_s + forecast.p99(run.tier, len(run.requests))
        busy = backlog.busy_until(end_s, self._working.index(device))
        return busy.misses() <= backlog.misses()

    def _look_again(self, now_s: float, forecast: Forecast) -> Iterator[Action]:
        """Answer requests that can wait no longer; use idle devices for second looks."""
        for id_ in self._looks.overdue(now_s, forecast):
            yield Answer(id_)
        for device, running in enumerate(self._running):
            if running is not None or self._queue or not self._looks:
                continue
            run = self._looks.choose(self._view(now_s, forecast), len(self._decoding))
            if run is None or not self._may_look(run, device, now_s, forecast):
                break
            ids = tuple(request.id for request in run.requests)
            self._looks.take(ids)
            end_s = now_s + forecast.p50(run.tier, len(ids))
            self._running[device] = _Running(run, end_s, again=True)
            yield Dispatch(device, run.tier, ids)

    def _finish(self, device: int, seconds: float | None, now_s: float) -> list[Action]:
        running = self._running[device]
        if running is None:
            raise ValueError(f"device {device} finished a batch that was never dispatched to it")
        self._running[device] = _Running(None, inf) if device in self._lost else None
        run, left = running.run, running.left
        if run is None:
            return []
        late = 0  # of second looks: the first answer was sent in time
        if not running.again:
            late = sum(r.deadline_s < now_s and r.id not in left for r in run.requests)
        if seconds is not None:
            self._latency.observe(run.tier, len(run.requests), seconds, now_s)
        if seconds is not None and not running.again:
            self._policy.observe(run, seconds, late)
            self._overload_factor.in_time(len(run.requests) - late - len(left))
            self._overload_factor.missed(late)
        return [
            BatchAccounted(device, run.tier, len(run.requests), seconds or 0.0, late, len(left))
        ]

    def _expire(self, now_s: float, forecast: Forecast, decoded: int | None) -> list[Action]:
        """Remove requests that would be late even if their fastest tier started now.

        decoded: id of a request that has only just joined the queue.
        """
        late = list[int]()
        for tier, requests in self._queue.by_cheapest.items():
            soonest_s = now_s + forecast.p50(tier, 1)  # deadlines before this cannot be met
            for request in requests:
                if request.deadline_s >= soonest_s:
                    break
                late.append(request.id)
        for id_ in sorted(late):
            self._queue.remove(id_)
        # decoding, not queueing, made the one decoded now late
        self._overload_factor.missed(sum(id_ != decoded for id_ in late))
        return [Remove(id_, "expired") for id_ in sorted(late)]

    def _choose(self, view: SchedulerView) -> Run | Wait:
        """Return the policy's choice; if the policy raises, run the most urgent request alone."""
        try:
            return self._policy.choose(view)
        except Exception:
            if not self.policy_failed:  # it may fail on every call: log only the first failure
                log.exception(
                    "policy %s failed; while it does, the most urgent request runs alone on its"
                    " cheapest tier (logged once)",
                    self._policy.name,
                )
            self.policy_failed = True
            head = view.queue.by_deadline[0]
            return Run(head.tiers[0], (head,))

    def _keep_feasible(
        self, choice: Run | Wait, device: int, now_s: float, forecast: Forecast
    ) -> Run | Wait:
        """Return the policy's choice, or another one if it costs more requests their deadline."""
        return keep_feasible(
            choice,
            self._backlog(now_s, forecast),
            self._queue,
            now_s=now_s,
            device=self._working.index(device),
            latest_start_s=min(self._latest_starts(forecast)),
            overloaded=self._overload_factor.overloaded,
        )

    def _dispatch(self, now_s: float, forecast: Forecast) -> list[Action]:
        """Give work to every free device: a due task, a batch, or a task if nothing is queued."""
        actions = list[Action]()
        for device, running in enumerate(self._running):
            if running is not None or not self._queue:
                continue
            if self._background and self._background.may_delay_queue(
                now_s, min(self._latest_starts(forecast))
            ):
                actions.append(self._start_task(device, now_s))
                continue
            view = self._view(now_s, forecast)
            choice = self._keep_feasible(self._choose(view), device, now_s, forecast)
            if isinstance(choice, Wait):
                self._wake_s.append(choice.until_s)
                break  # the devices are equal, so the policy would wait on the others as well
            actions += self._start_batch(device, choice, now_s, forecast)
        if self._background and not self._queue:
            actions += self._use_idle_devices(now_s, forecast)
            if self._background and None in self._running:
                self._wake_s.append(now_s + RECHECK_S)
        return actions

    def _set_timer(self, now_s: float, forecast: Forecast) -> Iterator[SetTimer]:
        """Wake up if a wait ends, or a request has to start or be answered."""
        wake_s = [*self._wake_s, *self._latest_starts(forecast)]
        wake_s += self._looks.latest_starts(forecast)
        if wake_s and (at_s := max(now_s, min(wake_s)) + _TIMER_SLACK_S) != self._timer_s:
            self._timer_s = at_s
            yield SetTimer(at_s)

    def _view(self, now_s: float, forecast: Forecast) -> SchedulerView:
        return SchedulerView(
            now_s,
            self._queue,
            forecast,
            self._arrivals,
            self._max_batch,
            len(self._running) - len(self._lost),
            None if self._looks.ended else self._escalations,
        )

    def _start_batch(
        self, device: int, run: Run, now_s: float, forecast: Forecast
    ) -> Iterator[Action]:
        self._shares.starts(run.requests, self._capacity(now_s, forecast))
        # a dropped request was accepted and not served, exactly like an expired one
        self._overload_factor.missed(len(run.dropped))
        for request in run.dropped:
            self._queue.remove(request.id)
            yield Remove(request.id, "dropped")
        for request in run.requests:
            self._queue.remove(request.id)
        end_s = now_s + forecast.p50(run.tier, len(run.requests))
        self._running[device] = _Running(run, end_s)
        yield Dispatch(device, run.tier, tuple(request.id for request in run.requests))

    def _start_task(self, device: int, now_s: float) -> StartTask:
        task = self._background.start(now_s)
        self._running[device] = _Running(None, now_s + task.seconds)
        return StartTask(device, task.id)

    def _use_idle_devices(self, now_s: float, forecast: Forecast) -> Iterator[StartTask]:
        for device, running in enumerate(self._running):
            if running is None and self._background.may_use_idle_device(
                now_s, decoding=bool(self._decoding), forecast=forecast, arrivals=self._arrivals
            ):
                yield self._start_task(device, now_s)
