"""A servable: one bundle in service, with its scheduler and the requests it has taken.

    image -> Arrived -> decode -> Decoded -> scheduler -> a worker -> answer

A failure costs the batch in which it happens: its requests are answered, and a tier that goes on
failing leaves routing until a trial batch succeeds. How an engine is watched and made anew is its
worker's business. Everything but decoding and the engines runs on the event loop. It knows nothing
of HTTP, nor of other servables beside it.
"""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle import reader as bundles
from pcae_serve.bundle.reader import Bundle, Tier
from pcae_serve.engines.base import Engine, Output, at_once
from pcae_serve.errors import (
    BudgetTooSmall,
    BundleError,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    OutOfMemory,
    OutOfService,
    Overloaded,
    RequestError,
    TaskNotSupported,
    UploadTimeout,
    one_line,
)
from pcae_serve.observability.metrics import Failure, Metrics, Outcome
from pcae_serve.runtime.threads import Device, Threads
from pcae_serve.runtime.worker import NotFinite, Worker
from pcae_serve.scheduling.event_log import Recorder, Setup
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.scheduler import (
    Action,
    Arrived,
    BatchAccounted,
    ClientLeft,
    Decoded,
    DeviceLost,
    Dispatch,
    Done,
    Event,
    Expire,
    Refuse,
    SetTimer,
    StartTask,
    TaskSubmitted,
    TierDisabled,
    Timer,
)
from pcae_serve.scheduling.tiers import TierTable
from pcae_serve.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

#: When to come back if a policy let a request go: what it served instead is done by then, and
#: HTTP counts in whole seconds.
LET_GO_RETRY_S = 1.0
#: When to come back where there was no memory for an image: others have been decoded by then.
NO_MEMORY_RETRY_S = 1.0
#: Failures of a tier, one after the other, that take it out of routing.
MAX_FAILURES = 3
#: A tier out of routing is tried so often.
RETRY_S = 15.0
#: Accuracies of tiers that nobody measured, the cheapest's and the best one's.
UNMEASURED = (0.9, 1.0)

#: Makes a device's engine for a bundle anew. It blocks; `through` is what its trials run through.
Make = Callable[[Bundle, int, Callable[[Engine], Engine]], Engine]


@dataclass(frozen=True)
class InferenceRequest:
    """What a caller wants of one image; `arrival_s` is the loop's time after its headers."""

    arrival_s: float
    budget_ms: float
    tier: str = "auto"
    min_tier: str | None = None
    answers: Literal["logits", "features"] | None = None  # None: as the bundle's models answer

    @property
    def deadline_s(self) -> float:
        return self.arrival_s + self.budget_ms / 1e3


@dataclass(frozen=True)
class InferenceResult:
    """One image's share of a batch, and where its time went."""

    vector: NDArray[np.float32]  # [classes] logits, or [width] features
    kept: tuple[NDArray[np.int32], ...]  # per stage [m_i]
    met_budget: bool
    bundle: Bundle  # whose model it was
    tier: Tier
    reason: str
    decode_s: float
    queue_s: float
    compute_s: float
    total_s: float


@dataclass
class _Waiting:
    """A request in hand."""

    ask: InferenceRequest
    request: Request
    answer: asyncio.Future[InferenceResult]
    pixels: NDArray[np.uint8] | None = None  # [H, W, 3], once decoded
    decode_s: float = 0.0
    queued_s: float = 0.0
    reason: str = ""  # why its tier, once it has one
    patience: asyncio.Timeout | None = None  # with the upload or decoder
    outcome: Outcome = Outcome.LEFT  # unless somebody says otherwise


class Servable:
    """A bundle being served. `latency` is what its batches are expected to take."""

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        engines: Sequence[Engine],
        setup: Setup,
        devices: Sequence[Device],
        metrics: Metrics,
        *,
        make: Make | None = None,
        recorder: Recorder | None = None,
        on_lost: Callable[[int], None] | None = None,
    ) -> None:
        """engines: one a device. make: what replaces one that failed; None: it is used again.

        on_lost is told of a device that never comes back, which other servables may run on too; it
        calls `lost` of each. None: there are no others.
        """
        self.settings, self.bundle = settings, bundle
        self.latency = setup.latency()
        self._scheduler = setup.scheduler(self.latency)
        self._accuracy = setup.tier_table.accuracy
        self._metrics, self._make = metrics, make
        self._recorder = recorder
        if recorder is not None:
            recorder.begin(setup)
        self._stopped = False
        self._waiting: dict[int, _Waiting] = {}
        self._ids = itertools.count()
        self._errands: dict[
            int, tuple[Callable[[int], Any], Callable[[], None] | None, asyncio.Future[Any]]
        ] = {}
        self._errand_ids = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        # of the batch on each device, or the one that ended last there:
        self._padding = [0] * len(engines)  # rows
        self._predicted_s = [0.0] * len(engines)
        self._failures: Counter[int] = Counter()  # of each tier, since it last answered
        self._out_of_service: set[int] = set()  # tiers out of routing
        self._tasks: set[asyncio.Task[None]] = set()
        self._batches: dict[int, list[_Waiting]] = {}  # of each device, in progress
        tell_lost = on_lost or self.lost
        self._workers = [
            Worker(
                engine,
                device,
                watchdog_s=settings.watchdog_s,
                make=None if make is None else partial(self._remake, i),
                on_broken=self._broken,
                on_lost=partial(tell_lost, i),
            )
            for i, (engine, device) in enumerate(zip(engines, devices, strict=True))
        ]
        for i, worker in enumerate(self._workers):
            if worker.lost:
                self._handle(DeviceLost(asyncio.get_running_loop().time(), i))

    @property
    def engines(self) -> list[Engine]:
        """Those that run now, one a device."""
        return [worker.engine for worker in self._workers]

    @property
    def in_hand(self) -> int:
        """Requests that have not been answered yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing is in hand, nor on a device: those who left leave their batch behind."""
        return not self._waiting and not any(worker.busy for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Requests in hand that no device works on yet."""
        return self._scheduler.waiting

    @property
    def policy(self) -> str:
        """The name of what chooses tiers and batches."""
        return self._scheduler.policy

    @property
    def drain_s(self) -> float:
        """Seconds until all that is in hand should be done."""
        return self._scheduler.drain_s(asyncio.get_running_loop().time())

    @property
    def out_of_service(self) -> frozenset[int]:
        """Tiers that have failed and are out of routing."""
        return frozenset(self._out_of_service)

    @property
    def works(self) -> bool:
        """Whether anything can be answered: a tier on a device."""
        some_tier = len(self._out_of_service) < len(self.bundle.tiers)
        return some_tier and any(worker.works for worker in self._workers)

    async def answer(
        self, ask: InferenceRequest, read: Callable[[], Awaitable[bytes]], decoders: Threads
    ) -> InferenceResult:
        """Read, decode, queue and run one image. Raises a RequestError where it cannot be done."""
        loop = asyncio.get_running_loop()
        request = Request(next(self._ids), ask.arrival_s, ask.deadline_s, self._allowed(ask))
        waiting = _Waiting(ask, request, loop.create_future())
        self._waiting[request.id] = waiting
        try:
            self._handle(Arrived(loop.time(), request))
            if not waiting.answer.done():
                await self._decode(waiting, read, decoders)
                if not waiting.answer.done():
                    self._handle(Decoded(waiting.queued_s, request.id))
            return await waiting.answer
        finally:  # answered, refused, unreadable, or the client left and this was cancelled
            del self._waiting[request.id]
            self._metrics.ended(waiting.outcome)
            if not waiting.answer.done() or waiting.answer.cancelled():
                self._handle(ClientLeft(loop.time(), request.id))

    async def errand(
        self,
        seconds: float,
        work: Callable[[int], T],
        terminate: Callable[[], None] | None = None,
    ) -> T:
        """Run `work(device)`, which should take about `seconds`, where nobody is kept waiting.

        terminate: has it end with an error, where it takes far too long; None: the device's engine
        is told to.
        """
        if self._stopped:
            raise Draining
        loop = asyncio.get_running_loop()
        id_, result = next(self._errand_ids), loop.create_future()
        self._errands[id_] = work, terminate, result
        self._handle(TaskSubmitted(loop.time(), id_, seconds))
        done: T = await result
        return done

    def lost(self, device: int) -> None:
        """A device never comes back: answer its batch, and all if it was the last one."""
        self._handle(DeviceLost(asyncio.get_running_loop().time(), device))
        gone = OutOfService("the engine does not come back: ask another server")
        for waiting in self._batches.get(device, []):
            _refuse(waiting, gone, Outcome.FAILED)
        if not self.works:
            self._refuse_all(gone, Outcome.FAILED)

    def stop(self) -> None:
        """Answer everybody in hand that the server is stopping; take nothing more."""
        self._refuse_all(Draining(), Outcome.REFUSED_DRAINING)
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for *_, result in self._errands.values():
            result.cancel()
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """Give back what the engines hold. Nothing may be in hand."""
        self.stop()
        for worker in self._workers:
            worker.close()
        if self._recorder is not None:
            self._recorder.close()

    def _allowed(self, ask: InferenceRequest) -> tuple[int, ...]:
        """Tiers that may answer now, cheapest first. Raises a RequestError where there is none."""
        if ask.answers is not None and ask.answers != self.bundle.answers:
            raise TaskNotSupported(
                "this bundle's models have no head, so no classes: POST to /embed instead"
                if ask.answers == "logits"
                else "this bundle's models answer with classes: POST to /classify instead"
            )
        tiers = self.bundle.allowed(ask.tier, ask.min_tier)
        if not self._out_of_service:
            return tiers
        if rest := tuple(tier for tier in tiers if tier not in self._out_of_service):
            return rest
        if ask.tier == "auto":  # those that a cheaper one dominates are better than none
            lowest = tiers[0]
            rest = tuple(
                i for i in range(lowest, len(self.bundle.tiers)) if i not in self._out_of_service
            )
        if not rest:
            self._metrics.ended(Outcome.FAILED)
            raise self._all_out(tiers)
        return rest

    def _all_out(self, tiers: Sequence[int]) -> OutOfService:
        names = ", ".join(repr(self.bundle.tiers[tier].name) for tier in tiers)
        return OutOfService(
            f"tier {names} fails and is out of service for now: allow another tier, or retry",
            retry_after_s=RETRY_S,
        )

    async def _decode(
        self,
        waiting: _Waiting,
        read: Callable[[], Awaitable[bytes]],
        decoders: Threads,
    ) -> None:
        """Image file to pixels, for as long as the budget lasts."""
        loop, settings = asyncio.get_running_loop(), self.settings
        uploaded_s = min(waiting.request.deadline_s, waiting.ask.arrival_s + settings.upload_s)
        body: bytes | None = None
        try:
            async with asyncio.timeout_at(uploaded_s) as waiting.patience:
                body = await read()
            start_s = loop.time()
            decode = partial(self.bundle.preprocess, body, settings.max_pixels)
            async with asyncio.timeout_at(waiting.request.deadline_s) as waiting.patience:
                waiting.pixels = await decoders.submit(decode)
        except TimeoutError:
            if waiting.answer.done():  # refused meanwhile: that is its answer
                return
            waiting.outcome = Outcome.EXPIRED
            if body is None and uploaded_s < waiting.request.deadline_s:
                raise UploadTimeout(
                    f"the body did not arrive within {settings.upload_s:g} s: send it faster"
                ) from None
            raise DeadlineExceeded(
                f"the budget of {waiting.ask.budget_ms:g} ms passed before the image was read:"
                " retry with a larger one"
            ) from None
        except MemoryError:
            waiting.outcome = Outcome.FAILED
            log.error("an image of %d bytes could not be decoded: no memory", len(body or b""))
            raise OutOfMemory(
                "the server has no memory to read this image now: retry later, or a smaller one",
                retry_after_s=NO_MEMORY_RETRY_S,
            ) from None
        except RequestError:
            waiting.outcome = Outcome.UNREADABLE
            raise
        except Exception:
            if body is not None:  # else its client has left
                waiting.outcome = Outcome.FAILED
            raise
        finally:
            waiting.patience = None
        waiting.queued_s = loop.time()
        waiting.decode_s = waiting.queued_s - start_s

    def _handle(self, event: Event) -> None:
        if self._stopped:
            return
        actions = self._scheduler.handle(event)
        if self._recorder is not None:
            self._recorder.record(event, actions)
        for action in actions:
            try:
                self._act(action)
            except Exception:  # one request's trouble must not become everybody's
                log.exception("a fault in the server: %s came to nothing", type(action).__name__)
                if isinstance(action, Dispatch):  # who was in it waits for nothing else
                    self._abandon(action)

    def _abandon(self, dispatch: Dispatch) -> None:
        """A batch that could not be begun: answer it, and give its device back."""
        for id_ in dispatch.ids:
            if (waiting := self._waiting.get(id_)) is not None:
                _refuse(waiting, EngineFailed("a fault in the server: retry"), Outcome.FAILED)
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: self._handle(Done(loop.time(), dispatch.device, None)))

    def _act(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case StartTask():
                self._run_errand(action)
            case Refuse(id=id_):
                waiting = self._waiting[id_]
                _refuse(waiting, *self._refusal(action, waiting))
            case Expire(id=id_):
                waiting = self._waiting[id_]
                _refuse(waiting, *self._expiry(action, waiting))
            case SetTimer(at_s=at_s):
                if self._timer is not None:
                    self._timer.cancel()
                loop = asyncio.get_running_loop()
                self._timer = loop.call_at(at_s, lambda: self._handle(Timer(loop.time())))
            case BatchAccounted(device=device, tier=tier):
                self._metrics.spent(
                    self.bundle.tiers[tier].name,
                    action.seconds,
                    batch=action.batch,
                    late=action.late,
                    cancelled=action.cancelled,
                    padding=self._padding[device],
                    predicted_s=self._predicted_s[device],
                )

    def _refusal(self, refuse: Refuse, waiting: _Waiting) -> tuple[RequestError, Outcome]:
        fastest = self.bundle.tiers[waiting.request.tiers[0]].name
        needed_ms = round(refuse.needed_s * 1e3, 1)
        match refuse.why:
            case "budget":
                too_small = BudgetTooSmall(
                    f"tier {fastest!r}, the fastest allowed, needs {needed_ms:g} ms on an idle"
                    f" machine: {waiting.ask.budget_ms:g} ms cannot be met",
                    needed_ms=needed_ms,
                )
                return too_small, Outcome.REFUSED_BUDGET
            case "load":
                overloaded = Overloaded(
                    f"the load leaves no allowed tier within {waiting.ask.budget_ms:g} ms, but for"
                    " making others late: retry later, allow a faster tier or a larger budget",
                    retry_after_s=refuse.retry_after_s,
                )
                return overloaded, Outcome.REFUSED_LOAD
            case "full":
                limit = self.settings.queue_limit
                return full(limit, refuse.retry_after_s), Outcome.REFUSED_FULL

    def _expiry(self, expire: Expire, waiting: _Waiting) -> tuple[RequestError, Outcome]:
        match expire.why:
            case "late":
                passed = DeadlineExceeded(
                    f"the budget of {waiting.ask.budget_ms:g} ms was used up before a tier"
                    " could run: retry with a larger one, or allow a faster tier"
                )
                return passed, Outcome.EXPIRED
            case "load":
                overloaded = Overloaded(
                    f"policy {self.policy!r} let this request go after some waiting, so that"
                    " others are answered in time: retry later, or with a larger budget",
                    retry_after_s=LET_GO_RETRY_S,
                )
                return overloaded, Outcome.LET_GO
            case "tier":
                return self._all_out(waiting.request.tiers), Outcome.FAILED

    def _dispatch(self, dispatch: Dispatch) -> None:
        now_s = asyncio.get_running_loop().time()
        batch = [self._waiting[id_] for id_ in dispatch.ids]
        pixels = [waiting.pixels for waiting in batch if waiting.pixels is not None]
        tier = self.bundle.tiers[dispatch.tier]
        forecast = self.latency.forecast(now_s)
        self._predicted_s[dispatch.device] = forecast.p50(dispatch.tier, len(batch))
        for waiting in batch:  # told now, while the forecast is the one it was chosen by
            waiting.reason = self._reason(dispatch, waiting, forecast, now_s)
        self._batches[dispatch.device] = batch
        worker, hung = self._workers[dispatch.device], list[TimeoutError]()

        def took_too_long(error: TimeoutError) -> None:
            hung.append(error)
            self._failed(dispatch, batch, "hung", error)

        worker.run(
            lambda: worker.compute(tier, np.stack(pixels)),
            lambda done: self._computed(dispatch, batch, now_s, done, hung=bool(hung)),
            took_too_long,
        )

    def _computed(
        self,
        dispatch: Dispatch,
        batch: list[_Waiting],
        start_s: float,
        computed: asyncio.Future[Output],
        *,
        hung: bool,
    ) -> None:
        """A batch came back; hung: so late that it was answered as failed before."""
        now_s, device = asyncio.get_running_loop().time(), dispatch.device
        self._batches.pop(device, None)
        try:
            output = computed.result()
        except (Exception, asyncio.CancelledError) as error:
            kind = "nan" if isinstance(error, NotFinite) else "raised"
            self._padding[device] = 0
            if not hung:
                self._failed(dispatch, batch, kind, error)
            if not self._stopped:
                self._task(self._recover(device))
            return
        self._padding[device] = output.padding
        if not hung:
            self._failures[dispatch.tier] = 0
        for row, waiting in enumerate(batch):
            self._answer(waiting, output, row, dispatch.tier, start_s, now_s)
        # not the engine's own seconds: what the event loop and the host add is in every answer
        self._handle(Done(now_s, device, now_s - start_s))

    def _failed(
        self, dispatch: Dispatch, batch: list[_Waiting], kind: str, error: BaseException
    ) -> None:
        """Answer a batch that did not run, and take a tier that goes on failing out of routing."""
        tier = dispatch.tier
        name = self.bundle.tiers[tier].name
        self._failures[tier] += 1
        log.error(
            "a batch of %d on tier %s failed on %s (%s, %d in a row): %s",
            len(batch),
            name,
            self._workers[dispatch.device].name,
            kind,
            self._failures[tier],
            one_line(error),
            exc_info=error if kind == "raised" else None,
            extra={"request_id": None},  # it is nobody's alone
        )
        self._metrics.failed(name, Failure(kind))
        for waiting in batch:
            failed = EngineFailed("the model failed on this batch: retry")
            _refuse(waiting, failed, Outcome.FAILED)
        if self._failures[tier] >= MAX_FAILURES and tier not in self._out_of_service:
            log.error("tier %s leaves routing; it is tried again every %g s", name, RETRY_S)
            self._out_of_service.add(tier)
            self._metrics.tier_out_of_service(name, True)
            self._handle(TierDisabled(asyncio.get_running_loop().time(), tier))
            self._task(self._reopen(tier))

    async def _recover(self, device: int) -> None:
        """A new engine for a device whose last batch failed; then the device is free again."""
        if await self._workers[device].renew():
            self._handle(Done(asyncio.get_running_loop().time(), device, None))

    def _broken(self) -> None:
        """A device has no engine: answer all in hand if none has one."""
        if not self.works:
            self._refuse_all(OutOfService("the engine failed: ask another server"), Outcome.FAILED)

    def _remake(self, device: int) -> Engine:
        """An engine from the same files. Raises BundleError where they are others by now."""
        assert self._make is not None
        if bundles.load(self.bundle.root).digest != self.bundle.digest:
            raise BundleError(f"{self.bundle.root} holds another bundle by now: reload")
        return self._make(self.bundle, device, at_once)

    async def _reopen(self, tier: int) -> None:
        """Try a tier that is out of routing until it answers."""
        image_size, name = self.bundle.image_size, self.bundle.tiers[tier].name
        noise = np.random.default_rng(0).integers(0, 256, (image_size, image_size, 3), np.uint8)

        def trial(device: int) -> Output:
            return self._workers[device].compute(self.bundle.tiers[tier], noise[None])

        while tier in self._out_of_service:
            await asyncio.sleep(RETRY_S)
            try:
                await self.errand(self.latency.idle(tier), trial)
            except Exception as error:
                log.warning("tier %s stays out of routing: %s", name, one_line(error))
            else:
                log.info("tier %s answers again", name)
                self._failures[tier] = 0
                self._out_of_service.discard(tier)
                self._metrics.tier_out_of_service(name, False)

    def _run_errand(self, errand: StartTask) -> None:
        work, terminate, result = self._errands.pop(errand.id)

        def then(done: asyncio.Future[Any]) -> None:
            if done.cancelled():
                result.cancel()
            elif not result.done():
                if (error := done.exception()) is not None:
                    result.set_exception(error)
                else:
                    result.set_result(done.result())
            self._handle(Done(asyncio.get_running_loop().time(), errand.device, None))

        def hung(error: BaseException) -> None:
            if not result.done():
                result.set_exception(error)

        self._workers[errand.device].run(partial(work, errand.device), then, hung, terminate)

    def _answer(
        self, waiting: _Waiting, output: Output, row: int, tier: int, start_s: float, now_s: float
    ) -> None:
        if waiting.answer.done():  # its client left
            return
        in_time = now_s <= waiting.request.deadline_s
        waiting.outcome = Outcome.IN_TIME if in_time else Outcome.LATE
        answer = InferenceResult(
            vector=output.vectors[row],
            kept=tuple(kept[row] for kept in output.kept),
            met_budget=in_time,
            bundle=self.bundle,
            tier=self.bundle.tiers[tier],
            reason=waiting.reason,
            decode_s=waiting.decode_s,
            queue_s=start_s - waiting.queued_s,
            compute_s=now_s - start_s,
            total_s=now_s - waiting.ask.arrival_s,
        )
        waiting.answer.set_result(answer)
        accuracy, best = self._accuracy[tier], self._accuracy[waiting.request.tiers[-1]]
        self._metrics.answered(
            answer.tier.name,
            decode_s=answer.decode_s,
            queue_s=answer.queue_s,
            compute_s=answer.compute_s,
            total_s=answer.total_s,
            in_time=in_time,
            degraded=waiting.ask.tier == "auto" and accuracy < best,
            accuracy=accuracy,
            best_accuracy=best,
        )

    def _reason(
        self, dispatch: Dispatch, waiting: _Waiting, forecast: Forecast, now_s: float
    ) -> str:
        """Why this tier, in what can be known: policies do not explain themselves."""
        tiers, tier, size = waiting.request.tiers, dispatch.tier, len(dispatch.ids)
        left_s = waiting.request.deadline_s - now_s
        left = f"the {left_s * 1e3:.0f} ms left" + (f", in a batch of {size}" if size > 1 else "")
        if waiting.ask.tier != "auto":
            return "asked for"
        if len(tiers) == 1:
            return "the only tier allowed"
        if forecast.p99(tier, size) > left_s:
            which = "the fastest allowed tier" if tier == tiers[0] else "a tier"
            return f"{which} that may be late with {left}, as policy {self.policy!r} chose"
        if tier == tiers[-1]:
            return f"the most accurate tier fits {left}"
        better = tiers[tiers.index(tier) + 1]
        if forecast.p99(better, size) <= left_s:
            return f"under the present load, policy {self.policy!r} chose it within {left}"
        if tier == tiers[0]:
            return f"only the fastest allowed tier fits {left}"
        return f"the most accurate tier that fits {left}"

    def _refuse_all(self, error: RequestError, outcome: Outcome) -> None:
        """Answer all in hand; whoever still uploads or is decoded is not waited for."""
        now_s = asyncio.get_running_loop().time()
        for waiting in list(self._waiting.values()):
            _refuse(waiting, error, outcome)
            self._handle(ClientLeft(now_s, waiting.request.id))
            if waiting.patience is not None and not waiting.patience.expired():
                waiting.patience.reschedule(now_s)

    def _task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def full(queue_limit: int, retry_after_s: float) -> Overloaded:
    """Why there is no room for another request."""
    return Overloaded(
        f"{queue_limit} requests wait already: retry later", retry_after_s=retry_after_s
    )


def tier_table(tiers: Sequence[Tier]) -> TierTable:
    """Names and accuracies of a bundle's tiers.

    Agreement with the full model stands in for accuracy. Where a tier has neither, all that is
    known is that more tokens are better: the tiers, which stand by MACs, are spaced evenly over the
    ten points that token reduction usually costs. From nought they would be so far apart that a
    policy gave up deadlines for accuracy that nobody measured.
    """
    measured = [tier.quality for tier in tiers if tier.quality is not None]
    if len(measured) < len(tiers):
        measured = np.linspace(*UNMEASURED, len(tiers)).tolist()
    accuracy = tuple(min(max(quality, 0.0), 1.0) for quality in measured)
    return TierTable(tuple(tier.name for tier in tiers), accuracy)


def _refuse(waiting: _Waiting, error: RequestError, outcome: Outcome) -> None:
    if not waiting.answer.done():
        waiting.outcome = outcome
        waiting.answer.set_exception(error)
