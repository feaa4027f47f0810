"""The service: puts the parts together, drives the scheduler from asyncio, owns start and stop.

    body -> decode (bounded pool) -> scheduler -> engine (one thread a device) -> answer

Several devices share one scheduler and so one queue; they are taken to be equal. It knows nothing
of HTTP.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pcae_serve import profile
from pcae_serve.bundle import Bundle, Tier
from pcae_serve.engines import NOTES, Engine, Output
from pcae_serve.errors import (
    BudgetPassed,
    BudgetTooSmall,
    Draining,
    EngineFailed,
    InvalidParameter,
    Overloaded,
    RequestError,
)
from pcae_serve.events import Recorder, Setup
from pcae_serve.latency import Forecast, Latency
from pcae_serve.metrics import Metrics, Outcome
from pcae_serve.policies.catalogue import create
from pcae_serve.policies.ladder import Ladder
from pcae_serve.queue import Request
from pcae_serve.scheduler import (
    Action,
    Arrived,
    Decoded,
    Dispatch,
    Done,
    Event,
    Expire,
    Left,
    Refuse,
    Scheduler,
    Spent,
    Timer,
    WakeAt,
)
from pcae_serve.settings import Settings

log = logging.getLogger(__name__)

#: When to come back if a policy let a request go: what it served instead is done by then, and
#: HTTP counts in whole seconds.
LET_GO_RETRY_S = 1.0
#: Accuracies of tiers that nobody measured, the cheapest's and the best one's.
UNMEASURED = (0.9, 1.0)


@dataclass(frozen=True)
class Ask:
    """What a caller wants of one image; `arrival_s` is the loop's time after its headers."""

    arrival_s: float
    budget_ms: float
    tier: str = "auto"
    min_tier: str | None = None

    @property
    def deadline_s(self) -> float:
        return self.arrival_s + self.budget_ms / 1e3


@dataclass(frozen=True)
class Answer:
    """One image's share of a batch, and where its time went."""

    vector: NDArray[np.float32]  # [classes] logits, or [width] features
    kept: tuple[NDArray[np.int32], ...]  # per stage [m_i]
    tier: Tier
    reason: str
    decode_s: float
    queue_s: float
    compute_s: float
    total_s: float


@dataclass
class _Waiting:
    """A request in hand."""

    ask: Ask
    request: Request
    answer: asyncio.Future[Answer]
    pixels: NDArray[np.uint8] | None = None  # [H, W, 3], once decoded
    decode_s: float = 0.0
    queued_s: float = 0.0
    reason: str = ""  # why its tier, once it has one
    outcome: Outcome = Outcome.LEFT  # unless somebody says otherwise


class Service:
    """A bundle being served. Everything but decoding and the engine runs on the event loop."""

    def __init__(self, settings: Settings, bundle: Bundle, engines: Sequence[Engine]) -> None:
        """engines: one a device. Raises StartError for an unknown policy, or no place for a log."""
        self.settings, self.bundle, self.engines = settings, bundle, tuple(engines)
        self.metrics = Metrics([tier.name for tier in bundle.tiers])
        self.latency: Latency | None = None  # measured by `start`
        self._ladder = ladder(bundle.tiers)
        self._policy = create(settings.policy, self._ladder).name
        self._recorder = Recorder(settings.event_log) if settings.event_log is not None else None
        self._scheduler: Scheduler | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._ids = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        # engines take one call at a time
        self._devices = [ThreadPoolExecutor(1, f"device-{i}") for i in range(len(self.engines))]
        self._padding = [0] * len(self.engines)  # rows, of the batch that each device ended last
        self._stopping = False

    @property
    def ready(self) -> bool:
        """Latencies are measured, every tier has run, and the service is not stopping."""
        return self._scheduler is not None and not self._stopping

    @property
    def waiting(self) -> int:
        """Requests in hand that no device works on yet."""
        return 0 if self._scheduler is None else self._scheduler.waiting

    @property
    def device(self) -> str:
        """Where batches run, all devices in one line."""
        return ", ".join(engine.device for engine in self.engines)

    async def start(self) -> None:
        """Measure latencies, or read them from the cache; then requests are taken."""
        settings, engine = self.settings, self.engines[0]
        kinds = {f"{each.name} on {profile.gpu(each) or each.device}" for each in self.engines}
        if len(self.engines) > 1 and len(kinds) > 1:
            log.warning(
                "the devices differ (%s): all are taken to be as fast as %s",
                ", ".join(sorted(kinds)),
                engine.device,
            )
        measure = partial(profile.load, self.bundle, engine, settings.cache_dir, settings.profile_s)
        measured = await asyncio.get_running_loop().run_in_executor(self._devices[0], measure)
        setup = Setup(
            policy=settings.policy,
            ladder=self._ladder,
            seconds=measured.seconds(),
            max_batch=settings.max_batch,
            queue_limit=settings.queue_limit,
            devices=len(self.engines),
        )
        self.latency = setup.latency()
        if self._recorder is not None:
            self._recorder.begin(setup)
        self._scheduler = setup.scheduler(self.latency)
        forecast = self.latency.forecast(asyncio.get_running_loop().time())
        log.info(
            "ready: %s on %s, backend %s (%s), policy %s, one image takes %s",
            self.bundle.manifest.name,
            self.device,
            engine.name,
            "; ".join(filter(None, (engine.version, NOTES.get(engine.name)))),
            self._policy,
            ", ".join(
                f"{forecast.typical(i, 1) * 1e3:.1f} ms ({tier.name})"
                for i, tier in enumerate(self.bundle.tiers)
            ),
        )

    async def stop(self) -> None:
        """Take nothing more, and let the batch on the device end."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for waiting in self._waiting.values():
            draining = Draining("the server is stopping: ask another one")
            _refuse(waiting, draining, Outcome.REFUSED_DRAINING)
        await asyncio.to_thread(self._decoders.shutdown, cancel_futures=True)
        for device in self._devices:
            await asyncio.to_thread(device.shutdown)
        if self._recorder is not None:
            self._recorder.close()

    def allowed(self, tier: str, min_tier: str | None) -> tuple[int, ...]:
        """Tiers that may answer, cheapest first. Raises InvalidParameter for an unknown name."""
        names = [t.name for t in self.bundle.tiers]
        known = {"tier": (*names, "auto"), "min_tier": (*names, None)}
        for parameter, name in (("tier", tier), ("min_tier", min_tier)):
            if name not in known[parameter]:
                choice = ", ".join(filter(None, known[parameter]))
                raise InvalidParameter(f"{parameter} {name!r} is unknown: choose one of {choice}")
        lowest = 0 if min_tier is None else names.index(min_tier)
        if tier != "auto":
            pinned = names.index(tier)
            if pinned < lowest:
                raise InvalidParameter(f"tier {tier!r} is below min_tier {min_tier!r}")
            return (pinned,)
        tiers = range(lowest, len(names))
        return tuple(i for i in tiers if i == lowest or not self.bundle.tiers[i].dominated)

    async def answer(self, ask: Ask, read: Callable[[], Awaitable[bytes]]) -> Answer:
        """Read, decode, queue and run one image.

        `read` is awaited only if the image can still be answered in time, and no longer than that.
        Raises a RequestError where it cannot be answered.
        """
        loop = asyncio.get_running_loop()
        tiers = self.allowed(ask.tier, ask.min_tier)
        if not self.ready:
            self.metrics.ended(Outcome.REFUSED_DRAINING)
            raise Draining("the server is starting or stopping: ask /readyz", retry_after_s=1)
        request = Request(next(self._ids), ask.arrival_s, ask.deadline_s, tiers)
        waiting = _Waiting(ask, request, loop.create_future())
        self._waiting[request.id] = waiting
        try:
            self._handle(Arrived(loop.time(), request))
            if not waiting.answer.done():
                await self._decode(waiting, read)
                self._handle(Decoded(waiting.queued_s, request.id))
            return await waiting.answer
        finally:  # answered, refused, unreadable, or the client left and this was cancelled
            del self._waiting[request.id]
            self.metrics.ended(waiting.outcome)
            if not waiting.answer.done() or waiting.answer.cancelled():
                self._handle(Left(loop.time(), request.id))

    async def _decode(self, waiting: _Waiting, read: Callable[[], Awaitable[bytes]]) -> None:
        """Image file to pixels, for as long as the budget lasts."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(waiting.request.deadline_s):
                body = await read()
                start_s = loop.time()
                decode = partial(self.bundle.preprocess, body, self.settings.max_pixels)
                waiting.pixels = await loop.run_in_executor(self._decoders, decode)
        except TimeoutError:
            waiting.outcome = Outcome.EXPIRED
            raise BudgetPassed(
                f"the budget of {waiting.ask.budget_ms:g} ms passed before the image was read:"
                " retry with a larger one"
            ) from None
        except RequestError:
            waiting.outcome = Outcome.UNREADABLE
            raise
        waiting.queued_s = loop.time()
        waiting.decode_s = waiting.queued_s - start_s

    def _handle(self, event: Event) -> None:
        if self._scheduler is not None and not self._stopping:
            actions = self._scheduler.handle(event)
            if self._recorder is not None:
                self._recorder.record(event, actions)
            for action in actions:
                self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case Refuse(id=id_):
                waiting = self._waiting[id_]
                _refuse(waiting, *self._refusal(action, waiting))
            case Expire(id=id_):
                waiting = self._waiting[id_]
                _refuse(waiting, *self._expiry(action, waiting))
            case WakeAt(at_s=at_s):
                if self._timer is not None:
                    self._timer.cancel()
                loop = asyncio.get_running_loop()
                self._timer = loop.call_at(at_s, lambda: self._handle(Timer(loop.time())))
            case Spent(device=device, tier=tier):
                self.metrics.spent(
                    self.bundle.tiers[tier].name,
                    action.seconds,
                    batch=action.batch,
                    late=action.late,
                    cancelled=action.cancelled,
                    padding=self._padding[device],
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
                full = Overloaded(
                    f"{self.settings.queue_limit} requests are in hand already: retry later",
                    retry_after_s=refuse.retry_after_s,
                )
                return full, Outcome.REFUSED_FULL

    def _expiry(self, expire: Expire, waiting: _Waiting) -> tuple[RequestError, Outcome]:
        match expire.why:
            case "late":
                passed = BudgetPassed(
                    f"the budget of {waiting.ask.budget_ms:g} ms was used up before a tier"
                    " could run: retry with a larger one, or allow a faster tier"
                )
                return passed, Outcome.EXPIRED
            case "load":
                overloaded = Overloaded(
                    f"policy {self._policy!r} let this request go after some waiting, so that"
                    " others are answered in time: retry later, or with a larger budget",
                    retry_after_s=LET_GO_RETRY_S,
                )
                return overloaded, Outcome.LET_GO

    def _dispatch(self, dispatch: Dispatch) -> None:
        loop = asyncio.get_running_loop()
        batch = [self._waiting[id_] for id_ in dispatch.ids]
        tier = self.bundle.tiers[dispatch.tier]
        pixels = [waiting.pixels for waiting in batch if waiting.pixels is not None]
        computed = loop.run_in_executor(
            self._devices[dispatch.device], _compute, self.engines[dispatch.device], tier, pixels
        )
        now_s = loop.time()
        computed.add_done_callback(partial(self._computed, dispatch, batch, now_s))
        if self.latency is not None:  # told now, while the forecast is the one it was chosen by
            forecast = self.latency.forecast(now_s)
            for waiting in batch:
                waiting.reason = self._reason(dispatch, waiting, forecast, now_s)

    def _computed(
        self,
        dispatch: Dispatch,
        batch: list[_Waiting],
        start_s: float,
        computed: asyncio.Future[Output],
    ) -> None:
        now_s = asyncio.get_running_loop().time()
        seconds: float | None = None
        self._padding[dispatch.device] = 0
        try:
            output = computed.result()
            # not the engine's own seconds: what the event loop and the host add is in every answer
            seconds = now_s - start_s
            self._padding[dispatch.device] = output.padding
        except (Exception, asyncio.CancelledError):
            log.exception("a batch on tier %s failed", self.bundle.tiers[dispatch.tier].name)
            for waiting in batch:
                failed = EngineFailed("the model failed on this batch: retry")
                _refuse(waiting, failed, Outcome.FAILED)
        else:
            for row, waiting in enumerate(batch):
                self._answer(waiting, output, row, dispatch.tier, start_s, now_s)
        finally:
            self._handle(Done(now_s, dispatch.device, seconds))

    def _answer(
        self, waiting: _Waiting, output: Output, row: int, tier: int, start_s: float, now_s: float
    ) -> None:
        if waiting.answer.done():  # its client left
            return
        in_time = now_s <= waiting.request.deadline_s
        waiting.outcome = Outcome.IN_TIME if in_time else Outcome.LATE
        waiting.answer.set_result(
            Answer(
                vector=output.vectors[row],
                kept=tuple(kept[row] for kept in output.kept),
                tier=self.bundle.tiers[tier],
                reason=waiting.reason,
                decode_s=waiting.decode_s,
                queue_s=start_s - waiting.queued_s,
                compute_s=now_s - start_s,
                total_s=now_s - waiting.ask.arrival_s,
            )
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
        if forecast.promised(tier, size) > left_s:
            which = "the fastest allowed tier" if tier == tiers[0] else "a tier"
            return f"{which} that may be late with {left}, as policy {self._policy!r} chose"
        if tier == tiers[-1]:
            return f"the most accurate tier fits {left}"
        better = tiers[tiers.index(tier) + 1]
        if forecast.promised(better, size) <= left_s:
            return f"under the present load, policy {self._policy!r} chose it within {left}"
        if tier == tiers[0]:
            return f"only the fastest allowed tier fits {left}"
        return f"the most accurate tier that fits {left}"


def ladder(tiers: Sequence[Tier]) -> Ladder:
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
    return Ladder(tuple(tier.name for tier in tiers), accuracy)


def _compute(engine: Engine, tier: Tier, pixels: list[NDArray[np.uint8]]) -> Output:
    return engine.run(tier, np.stack(pixels))


def _refuse(waiting: _Waiting, error: RequestError, outcome: Outcome) -> None:
    if not waiting.answer.done():
        waiting.outcome = outcome
        waiting.answer.set_exception(error)
