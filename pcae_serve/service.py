"""The service: puts the parts together, drives the scheduler from asyncio, owns start and stop.

    body -> decode (bounded pool) -> scheduler -> engine (one thread a device) -> answer

It knows nothing of HTTP.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

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
from pcae_serve.latency import Latency
from pcae_serve.policies import Policy, Request
from pcae_serve.policies.greedy import Greedy
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
    Timer,
    WakeAt,
)
from pcae_serve.settings import Settings

log = logging.getLogger(__name__)

POLICIES: dict[str, Callable[[], Policy]] = {"greedy": Greedy}


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


class Service:
    """A bundle being served. Everything but decoding and the engine runs on the event loop."""

    def __init__(self, settings: Settings, bundle: Bundle, engine: Engine) -> None:
        self.settings, self.bundle, self.engine = settings, bundle, engine
        self.latency: Latency | None = None  # measured by `start`
        self._scheduler: Scheduler | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._ids = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._device = ThreadPoolExecutor(1, "device")  # engines take one call at a time
        self._stopping = False

    @property
    def ready(self) -> bool:
        """Latencies are measured, every tier has run, and the service is not stopping."""
        return self._scheduler is not None and not self._stopping

    async def start(self) -> None:
        """Measure latencies, or read them from the cache; then requests are taken."""
        measure = partial(
            profile.load,
            self.bundle,
            self.engine,
            self.settings.cache_dir,
            self.settings.profile_s,
        )
        measured = await asyncio.get_running_loop().run_in_executor(self._device, measure)
        self.latency = measured.latency()
        self._scheduler = Scheduler(
            POLICIES[self.settings.policy](),
            self.latency,
            max_batch=self.settings.max_batch,
            queue_limit=self.settings.queue_limit,
        )
        now_s = asyncio.get_running_loop().time()
        log.info(
            "ready: %s on %s, backend %s (%s), one image takes %s",
            self.bundle.manifest.name,
            self.engine.device,
            self.engine.name,
            "; ".join(filter(None, (self.engine.version, NOTES.get(self.engine.name)))),
            ", ".join(
                f"{self.latency.expected(i, 1, now_s) * 1e3:.1f} ms ({tier.name})"
                for i, tier in enumerate(self.bundle.tiers)
            ),
        )

    async def stop(self) -> None:
        """Take nothing more, and let the batch on the device end."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for waiting in self._waiting.values():
            _refuse(waiting, Draining("the server is stopping: ask another one"))
        await asyncio.to_thread(self._decoders.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._device.shutdown)

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
            raise BudgetPassed(
                f"the budget of {waiting.ask.budget_ms:g} ms passed before the image was read:"
                " retry with a larger one"
            ) from None
        waiting.queued_s = loop.time()
        waiting.decode_s = waiting.queued_s - start_s

    def _handle(self, event: Event) -> None:
        if self._scheduler is not None and not self._stopping:
            for action in self._scheduler.handle(event):
                self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case Refuse(id=id_):
                waiting = self._waiting[id_]
                _refuse(waiting, self._refusal(action, waiting))
            case Expire(id=id_):
                waiting = self._waiting[id_]
                _refuse(
                    waiting,
                    BudgetPassed(
                        f"the budget of {waiting.ask.budget_ms:g} ms was used up before a tier"
                        " could run: retry with a larger one, or allow a faster tier"
                    ),
                )
            case WakeAt(at_s=at_s):
                if self._timer is not None:
                    self._timer.cancel()
                loop = asyncio.get_running_loop()
                self._timer = loop.call_at(at_s, lambda: self._handle(Timer(loop.time())))

    def _refusal(self, refuse: Refuse, waiting: _Waiting) -> RequestError:
        fastest = self.bundle.tiers[waiting.request.tiers[0]].name
        needed_ms = round(refuse.needed_s * 1e3, 1)
        match refuse.why:
            case "budget":
                return BudgetTooSmall(
                    f"tier {fastest!r}, the fastest allowed, needs {needed_ms:g} ms on an idle"
                    f" machine: {waiting.ask.budget_ms:g} ms cannot be met",
                    needed_ms=needed_ms,
                )
            case "load":
                return Overloaded(
                    f"the load leaves no allowed tier within {waiting.ask.budget_ms:g} ms:"
                    " retry later, allow a faster tier or a larger budget",
                    retry_after_s=refuse.retry_after_s,
                )
            case "full":
                return Overloaded(
                    f"{self.settings.queue_limit} requests are in hand already: retry later",
                    retry_after_s=refuse.retry_after_s,
                )

    def _dispatch(self, dispatch: Dispatch) -> None:
        loop = asyncio.get_running_loop()
        batch = [self._waiting[id_] for id_ in dispatch.ids]
        tier = self.bundle.tiers[dispatch.tier]
        pixels = [waiting.pixels for waiting in batch if waiting.pixels is not None]
        computed = loop.run_in_executor(self._device, self._compute, tier, pixels)
        computed.add_done_callback(partial(self._computed, dispatch, batch, loop.time()))

    def _compute(self, tier: Tier, pixels: list[NDArray[np.uint8]]) -> tuple[Output, float]:
        start_s = perf_counter()
        output = self.engine.run(tier, np.stack(pixels))
        return output, perf_counter() - start_s

    def _computed(
        self,
        dispatch: Dispatch,
        batch: list[_Waiting],
        start_s: float,
        computed: asyncio.Future[tuple[Output, float]],
    ) -> None:
        now_s = asyncio.get_running_loop().time()
        seconds: float | None = None
        try:
            output, seconds = computed.result()
        except (Exception, asyncio.CancelledError):
            log.exception("a batch on tier %s failed", self.bundle.tiers[dispatch.tier].name)
            for waiting in batch:
                _refuse(waiting, EngineFailed("the model failed on this batch: retry"))
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
        waiting.answer.set_result(
            Answer(
                vector=output.vectors[row],
                kept=tuple(kept[row] for kept in output.kept),
                tier=self.bundle.tiers[tier],
                reason=self._reason(tier, waiting, start_s),
                decode_s=waiting.decode_s,
                queue_s=start_s - waiting.queued_s,
                compute_s=now_s - start_s,
                total_s=now_s - waiting.ask.arrival_s,
            )
        )

    def _reason(self, tier: int, waiting: _Waiting, start_s: float) -> str:
        tiers, left_ms = waiting.request.tiers, (waiting.request.deadline_s - start_s) * 1e3
        if waiting.ask.tier != "auto":
            return "asked for"
        if len(tiers) == 1:
            return "the only tier allowed"
        if tier == tiers[0] and self._promised_ms(tier, start_s) > left_ms:
            return f"the fastest allowed tier, which may be late with {left_ms:.0f} ms left"
        if tier == tiers[-1]:
            return f"the most accurate tier fits the {left_ms:.0f} ms left"
        if tier == tiers[0]:
            return f"only the fastest allowed tier fits the {left_ms:.0f} ms left"
        return f"the most accurate tier that fits the {left_ms:.0f} ms left"

    def _promised_ms(self, tier: int, now_s: float) -> float:
        return 0.0 if self.latency is None else self.latency.promised(tier, 1, now_s) * 1e3


def _refuse(waiting: _Waiting, error: RequestError) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
