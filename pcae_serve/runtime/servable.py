"""A bundle in service: its scheduler, its devices and the requests that were offered to it.

    offer -> receive -> admit -> decode -> queue -> dispatch -> result

An engine error fails only the current batch; the engine is then recreated. Decoding and engines run
on threads, everything else on the event loop.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.engines.base import Engine, Output, run_directly
from pcae_serve.errors import BundleError, one_line
from pcae_serve.observability.metrics import Failure, Metrics
from pcae_serve.runtime import refusals, tier_health
from pcae_serve.runtime.background_tasks import BackgroundTasks
from pcae_serve.runtime.memory_budget import MemoryBudget
from pcae_serve.runtime.offered import OfferedRequest
from pcae_serve.runtime.reasons import explain_tier
from pcae_serve.runtime.refusals import Refusal
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.resources import Resources
from pcae_serve.runtime.scheduler_driver import SchedulerDriver
from pcae_serve.runtime.second_looks import FirstAnswers, send_first_answers
from pcae_serve.runtime.threads import Device
from pcae_serve.runtime.tier_health import TierHealth
from pcae_serve.runtime.worker import NotFinite, Worker
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.event_log import Recorder, Setup
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
    LooksEnded,
    Reject,
    Remove,
    StartTask,
    TierDisabled,
)
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.settings import Settings

log = logging.getLogger(__name__)

#: Creates a device's engine for a bundle; its trial batches go through the engine that the last
#: argument returns. Blocks.
EngineFactory = Callable[[Bundle, int, Callable[[Engine], Engine]], Engine]


@dataclass
class _Batch:
    """A batch on a device, until the scheduler has accounted for it."""

    dispatch: Dispatch
    requests: list[OfferedRequest]
    start_s: float
    predicted_s: float
    padding: int = 0  # rows computed beyond the requests
    hung: bool = False  # answered as failed, while the call still runs


class Servable:
    """A bundle in service. `latency` is its latency model."""

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        engines: Sequence[Engine],
        setup: Setup,
        devices: Sequence[Device],
        metrics: Metrics,
        *,
        make_engine: EngineFactory | None = None,
        recorder: Recorder | None = None,
        on_device_lost: Callable[[int], None] | None = None,
    ) -> None:
        """Create a servable that admits requests at once.

        engines: one per device. make_engine: replaces an engine that failed; None: the engine is
        used again. on_device_lost: called with a device that will not return from a call, to call
        `device_lost` of every servable on it; None: this is the only one.
        """
        self.settings, self.bundle = settings, bundle
        self.latency = setup.latency()
        self._driver = SchedulerDriver(
            setup,
            self.latency,
            self._act,
            on_fault=self._batch_not_started,
            recorder=recorder,
        )
        self._handle = self._driver.handle
        self.setup = setup
        self._counted_accuracy = lru_cache(64)(setup.counted_accuracy)
        self._idle_accuracy = lru_cache(64)(partial(setup.idle_accuracy, latency=self.latency))
        self._first_answers = FirstAnswers(
            bundle, Escalations(setup.tier_table.escalations), self._first_answer_sent
        )
        self._metrics, self._make_engine = metrics, make_engine
        self._stopped = False
        self._offered: dict[int, OfferedRequest] = {}
        self._ids = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._batches: dict[int, _Batch] = {}  # by device
        self._health = TierHealth(setup.tier_table.names, metrics)
        on_lost = on_device_lost or self.device_lost
        self._workers = [
            Worker(
                engine,
                device,
                watchdog_s=settings.watchdog_s,
                make=None if make_engine is None else partial(self._recreate_engine, i),
                on_broken=self._engine_broken,
                on_lost=partial(on_lost, i),
            )
            for i, (engine, device) in enumerate(zip(engines, devices, strict=True))
        ]
        self.background = BackgroundTasks(self._workers, self._handle)
        for i, worker in enumerate(self._workers):
            if worker.lost:
                self._handle(DeviceLost(_now_s(), i))

    @contextmanager
    def offer(self, request: InferenceRequest, resources: Resources) -> Iterator[OfferedRequest]:
        """Offer a request whose headers have arrived; it arrives at the scheduler with its body.

        If the load would refuse it already, it arrives now, so that nothing is uploaded first.
        The request ends with the context: it is counted once, and the scheduler forgets it. Raises
        TaskNotSupported, InvalidParameter, or the RequestError that it is refused with.
        """
        self._require_supported(request)
        scheduled = self._scheduled(request, next(self._ids))
        offered = OfferedRequest(
            request,
            scheduled,
            settings=self.settings,
            bundle=self.bundle,
            resources=resources,
            require=self._require_supported,
            arrive=self._arrive,
            enqueue=self._enqueue,
        )
        self._offered[scheduled.id] = offered
        try:
            if self._is_refused_early(offered):
                self._arrive(offered)
                offered.raise_if_refused()
                self._leave(offered)  # it is not refused after all: it arrives with its body
            yield offered
        except MemoryError:
            log.error("too little memory for a request")
            error, offered.outcome = refusals.out_of_memory()
            raise error from None
        finally:
            del self._offered[scheduled.id]
            offered.end()
            if offered.outcome is not None:
                self._metrics.record_request(offered.outcome, request.key_name)
            if not offered.result.done() or offered.result.cancelled():
                self._leave(offered)
            else:
                offered.result.exception()  # mark it as retrieved, if nothing awaited it

    def _require_supported(self, request: InferenceRequest) -> None:
        """Raise TaskNotSupported if bundle or engines do not return what is requested."""
        if request.answers is not None and request.answers != self.bundle.output:
            raise refusals.wrong_kind(request.answers)
        if request.patches and (error := refusals.no_patches(self.bundle, self.engines)):
            raise error

    def load_refuses(self, request: InferenceRequest) -> bool:
        """Return whether the load would refuse a request if it arrived now. Changes no state.

        Raises InvalidParameter.
        """
        scheduled = self._scheduled(request, -1)
        if not (tiers := self._working_tiers(scheduled, request.tier)):
            return False
        scheduled = replace(scheduled, tiers=tiers)
        reject = self._driver.scheduler.early_refusal(scheduled, _now_s())
        return reject is not None and reject.why not in ("budget", "expired")

    def _is_refused_early(self, offered: OfferedRequest) -> bool:
        """Return whether the request would be refused if it arrived now. Changes no state."""
        scheduled = offered.scheduled
        if not (tiers := self._working_tiers(scheduled, offered.request.tier)):
            return True
        scheduled = replace(scheduled, tiers=tiers)
        return self._driver.scheduler.early_refusal(scheduled, _now_s()) is not None

    def _scheduled(self, request: InferenceRequest, id_: int) -> Request:
        """Return a request as the scheduler sees it. Raises InvalidParameter."""
        tiers = self.bundle.allowed_tiers(request.tier, request.min_tier)
        return Request(
            id_,
            request.arrival_s,
            request.deadline_s,
            tiers,
            caller=request.caller,
            max_looks=request.max_looks or self.settings.max_looks,
        )

    def _arrive(self, offered: OfferedRequest, decode_s: float = 0.0, wait_s: float = 0.0) -> None:
        """Have the scheduler admit or refuse a request.

        decode_s: predicted time of decoding it on an idle server. wait_s: predicted time until it
        will be decoded.
        """
        tiers = self._working_tiers(offered.scheduled, offered.request.tier)
        if not tiers:
            offered.refuse(self._tiers_disabled(offered.scheduled.tiers))
            return
        now_s = _now_s()
        offered.scheduled = replace(
            offered.scheduled, tiers=tiers, decode_s=decode_s, ready_s=now_s + wait_s
        )
        offered.arrived = True
        self._handle(Arrived(now_s, offered.scheduled))

    def _leave(self, offered: OfferedRequest) -> None:
        """Have the scheduler forget a request, if it has arrived there."""
        if offered.arrived:
            offered.arrived = False
            self._handle(ClientLeft(_now_s(), offered.scheduled.id))

    def _working_tiers(self, scheduled: Request, tier: str) -> tuple[int, ...]:
        """Return the allowed tiers that are in rotation, the cheapest first. tier: as named."""
        tiers = scheduled.tiers
        working = self._health.in_rotation(tiers)
        if not working and tier == "auto":  # dominated tiers are better than none
            working = self._health.in_rotation(range(tiers[0], len(self.bundle.tiers)))
        return working

    def _enqueue(self, admitted: OfferedRequest) -> None:
        """Put a decoded request into the scheduler's queue."""
        self._handle(Decoded(admitted.queued_s, admitted.scheduled.id))

    def _act(self, action: Action) -> None:
        """Carry out an action of the scheduler."""
        match action:
            case Dispatch():
                self._dispatch(action)
            case StartTask():
                self.background.start(action)
            case Reject(id=id_):
                admitted = self._offered[id_]
                fastest = self.bundle.tiers[admitted.scheduled.tiers[0]].name
                queue_limit = self.settings.queue_limit
                admitted.refuse(refusals.rejected(action, admitted.scheduled, fastest, queue_limit))
            case Answer(id=id_):
                answered = self._offered[id_]
                answered.arrived = False  # the scheduler has forgotten it
                answered.send_first_answer()
            case Remove(id=id_):
                self._offered[id_].refuse(self._removal(action, self._offered[id_]))
            case BatchAccounted(device=device):
                self._account(action, self._batches.pop(device, None))

    def _removal(self, remove: Remove, admitted: OfferedRequest) -> Refusal:
        """Return why a queued request will not run."""
        match remove.why:
            case "expired":
                return refusals.expired_in_queue(admitted.request.budget_ms)
            case "dropped":
                return refusals.dropped(self.policy)
            case "failed":
                return self._tiers_disabled(admitted.scheduled.tiers)

    def _dispatch(self, dispatch: Dispatch) -> None:
        """Run a batch on its device."""
        now_s, tier = _now_s(), self.bundle.tiers[dispatch.tier]
        requests = [self._offered[id_] for id_ in dispatch.ids]
        pixels = [request.pixels for request in requests if request.pixels is not None]
        forecast = self.latency.forecast(now_s)
        predicted_s = forecast.p50(dispatch.tier, len(requests))
        batch = _Batch(dispatch, requests, now_s, predicted_s)
        self._batches[dispatch.device] = batch
        for admitted in requests:  # now, with the forecast that the tier was chosen by
            if admitted.first_answer is not None:
                admitted.reason = self._first_answers.explain_again(admitted.first_answer)
            elif admitted.request.tier != "auto":
                admitted.reason = "the request names this tier"
            else:
                admitted.reason = explain_tier(
                    admitted.scheduled,
                    dispatch.tier,
                    len(requests),
                    forecast,
                    now_s,
                    self.setup,
                    self.policy,
                    self.bundle.dominated_above(admitted.scheduled.tiers),
                )
        worker = self._workers[dispatch.device]
        dense = any(request.request.patches for request in requests)
        worker.run(
            lambda: worker.compute(tier, np.stack(pixels), dense),
            partial(self._batch_ended, batch),
            partial(self._batch_hung, batch),
        )

    def _batch_ended(self, batch: _Batch, call: asyncio.Future[Output]) -> None:
        """Deliver the results of a batch."""
        now_s, dispatch = _now_s(), batch.dispatch
        try:
            output = call.result()
        except (Exception, asyncio.CancelledError) as error:
            if not batch.hung:
                kind = Failure.NAN if isinstance(error, NotFinite) else Failure.EXCEPTION
                self._batch_failed(batch, kind, error)
            if not self._stopped:
                self._spawn(self._recover(dispatch.device))
            return
        batch.padding = output.padding
        if not batch.hung:
            self._health.succeeded(dispatch.tier)
        margins, tier = list[tuple[int, float]](), self.bundle.tiers[dispatch.tier]
        for row, admitted in enumerate(batch.requests):
            if admitted.result.done():  # the client left, or the batch hung
                continue
            result = admitted.answer(output, row, tier, batch.start_s, now_s)
            if admitted.first_answer is None and self._first_answers.may_look_again(admitted):
                result, found = self._first_answers.hold(admitted, result)
                if found is not None:
                    margins.append((admitted.scheduled.id, found))
            if admitted.first_answer is None or result.looks > 1:
                self._deliver(admitted, result)
        # not the engine's own seconds: event loop and host add to every answer's latency
        seconds = now_s - batch.start_s
        self._handle(Done(now_s, dispatch.device, seconds, tuple(margins)))

    def _first_answer_sent(self, admitted: OfferedRequest, result: InferenceResult) -> None:
        """Count a request that ended with its first answer; have the scheduler forget it."""
        self._leave(admitted)
        self._count(admitted, result)

    def _deliver(self, admitted: OfferedRequest, result: InferenceResult) -> None:
        """Give a request its result, and count it."""
        if (first := admitted.first_answer) is not None:
            changed = bool(first.vector.argmax() != result.vector.argmax())
            self._metrics.record_second_look(result.tier.name, changed=changed)
        admitted.deliver(result)
        self._count(admitted, result)

    def _count(self, admitted: OfferedRequest, result: InferenceResult) -> None:
        """Count an answer.

        An answer that a second look could have improved has a debt of what that was expected to
        gain. One that no second look would improve has none, on whichever tier it ran.
        """
        tier, tiers = self.bundle.tiers.index(result.tier), admitted.scheduled.tiers
        accuracy = self.setup.tier_table.accuracy[tier]
        if self._first_answers.may_look_again(admitted):
            debt = admitted.look_gain if result.looks == 1 else 0.0
        else:
            debt = max(0.0, self._idle_accuracy(tiers) - self._counted_accuracy(tiers)[tier])
        self._metrics.record_answer(
            result.tier.name,
            decode_s=result.decode_s,
            queue_s=result.queue_s,
            compute_s=result.compute_s,
            total_s=result.total_s,
            in_time=result.met_budget,
            degraded=admitted.request.tier == "auto" and debt > 0,
            accuracy=accuracy,
            best_accuracy=accuracy + debt,
        )

    def _account(self, action: BatchAccounted, batch: _Batch | None) -> None:
        """Count a device's time, except of a batch that could not be started."""
        if batch is not None:
            self._metrics.record_batch(
                self.bundle.tiers[action.tier].name,
                action.seconds,
                batch=action.batch,
                late=action.late,
                cancelled=action.cancelled,
                padding=batch.padding,
                predicted_s=batch.predicted_s,
            )
            for offered in batch.requests:
                image_s = action.seconds / action.batch
                self._metrics.callers.record_compute(offered.request.key_name, image_s)

    def _batch_hung(self, batch: _Batch, error: TimeoutError) -> None:
        batch.hung = True
        self._batch_failed(batch, Failure.TIMEOUT, error)

    def _batch_failed(self, batch: _Batch, kind: Failure, error: BaseException) -> None:
        """Answer a batch that failed; take its tier out of rotation if it keeps failing."""
        tier, name = batch.dispatch.tier, self.bundle.tiers[batch.dispatch.tier].name
        failures = self._health.failed(tier)
        log.error(
            "a batch of %d on tier %s failed on %s (%s, %d in a row): %s",
            len(batch.requests),
            name,
            self._workers[batch.dispatch.device].name,
            kind,
            failures,
            one_line(error),
            exc_info=error if kind is Failure.EXCEPTION else None,
            extra={"request_id": None},  # the record belongs to the batch, not to one request
        )
        self._metrics.record_failure(name, kind)
        out_of_memory = isinstance(error, MemoryError)
        for admitted in batch.requests:
            admitted.refuse(refusals.out_of_memory() if out_of_memory else refusals.batch_failed())
        if self._health.disable_if_failing(tier):
            self._handle(TierDisabled(_now_s(), tier))
            self._spawn(self._health.probe_until_healthy(tier, self._probe))

    async def _probe(self, tier: int) -> None:
        """Run one image of noise on a tier as a background task. Raises what the engine raises."""
        size = self.bundle.image_size
        noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)

        def run(device: int) -> Output:
            return self._workers[device].compute(self.bundle.tiers[tier], noise)

        await self.background.submit(self.latency.idle(tier), run)

    async def _recover(self, device: int) -> None:
        """Recreate the engine of a device whose last batch failed; then the device is free."""
        if await self._workers[device].recreate_engine():
            self._handle(Done(_now_s(), device, None))

    def _recreate_engine(self, device: int) -> Engine:
        """Create an engine from the same files. Raises BundleError if they have changed."""
        assert self._make_engine is not None
        if load_bundle(self.bundle.root).digest != self.bundle.digest:
            raise BundleError(f"{self.bundle.root} now holds another bundle; reload it")
        return self._make_engine(self.bundle, device, run_directly)

    def _batch_not_started(self, dispatch: Dispatch) -> None:
        for id_ in dispatch.ids:
            if (admitted := self._offered.get(id_)) is not None:
                admitted.refuse(refusals.batch_not_started())

    def _engine_broken(self) -> None:
        """Refuse all requests if no device has an engine."""
        if not self.works:
            self._refuse_all(refusals.no_engine())

    def _tiers_disabled(self, tiers: Sequence[int]) -> Refusal:
        names = [self.bundle.tiers[tier].name for tier in tiers]
        return refusals.tiers_disabled(names, tier_health.PROBE_INTERVAL_S)

    def device_lost(self, device: int) -> None:
        """Refuse the batch on a device that will not return; refuse all if it was the last one."""
        self._handle(DeviceLost(_now_s(), device))
        if (batch := self._batches.get(device)) is not None:
            for admitted in batch.requests:
                admitted.refuse(refusals.device_lost())
        if not self.works:
            self._refuse_all(refusals.device_lost())

    def end_looks(self) -> None:
        """Send every first answer that waits, and start no second look from now on."""
        self._handle(LooksEnded(_now_s()))

    def send_first_answers(self, memory: MemoryBudget, wanted_bytes: int) -> None:
        """Send first answers that wait, until `wanted_bytes` are free."""
        send_first_answers(self._offered.values(), memory, wanted_bytes)

    def stop(self) -> None:
        """Refuse every request because the server is stopping; handle no more events."""
        self._refuse_all(refusals.stopped())
        self._stopped = True
        self._driver.stop()
        self.background.cancel()
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """Stop, and release what the engines hold. No request may be unanswered."""
        self.stop()
        for worker in self._workers:
            worker.close()
        self._driver.close()

    def _refuse_all(self, refusal: Refusal) -> None:
        """End all requests, those that are uploaded or decoded included."""
        for admitted in list(self._offered.values()):
            admitted.refuse(refusal)
            self._leave(admitted)
            admitted.stop_waiting()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def engines(self) -> list[Engine]:
        """The current engines, one per device."""
        return [worker.engine for worker in self._workers]

    @property
    def policy(self) -> str:
        """Name of the policy that chooses tiers and batches."""
        return self._driver.scheduler.policy

    @property
    def unanswered(self) -> int:
        """Number of offered requests that have not been answered."""
        return len(self._offered)

    @property
    def waiting(self) -> int:
        """Number of admitted requests that no device has started on."""
        return self._driver.scheduler.waiting

    @property
    def idle(self) -> bool:
        """Whether nothing is unanswered and no device is in use, not even for clients that left."""
        return not self._offered and not any(worker.busy for worker in self._workers)

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until all admitted requests should be answered."""
        return self._driver.predicted_wait_s

    @property
    def disabled_tiers(self) -> frozenset[int]:
        """Tiers that are out of rotation."""
        return self._health.disabled

    @property
    def works(self) -> bool:
        """Whether any tier is in rotation and any device works."""
        return self._health.works and any(worker.works for worker in self._workers)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
