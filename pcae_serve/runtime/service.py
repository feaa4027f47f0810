"""The service: what is served now, the devices it runs on, and the way from one bundle to the next.

    start    measure -> Servable         answer   to the servable of the moment
    reload   a new bundle beside the old: load, try, measure behind live traffic; then switch
    drain    take nothing more, answer what is in hand; then stop

Several devices share one scheduler and so one queue; they are taken to be equal. It knows nothing
of HTTP.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from pcae_serve.bundle import reader as bundles
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import cpus
from pcae_serve.engines.base import NOTES, Engine, at_once
from pcae_serve.errors import (
    Draining,
    OutOfService,
    PcaeError,
    ReloadFailed,
    ReloadInProgress,
    RequestError,
    Starting,
    UploadTimeout,
    one_line,
)
from pcae_serve.observability.metrics import Metrics, Outcome, Reload
from pcae_serve.runtime import latency_profile
from pcae_serve.runtime.background_engine import BackgroundEngine
from pcae_serve.runtime.servable import (
    RETRY_S,
    InferenceRequest,
    InferenceResult,
    Make,
    Servable,
    full,
    tier_table,
)
from pcae_serve.runtime.threads import Device, Threads
from pcae_serve.runtime.worker import TERMINATE_S
from pcae_serve.scheduling.event_log import Recorder, Setup
from pcae_serve.scheduling.latency import Latency
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

#: At the end, images that are being decoded, for nobody by then, have so long.
DECODE_S = 1.0
#: At the end, a batch in progress has so long before it is told to give up.
BATCH_S = 5.0
#: Seconds of compute to measure a new bundle with, beside live traffic.
MEASURE_BESIDE_S = 2.0


@dataclass(frozen=True)
class Reloaded:
    """What a reload came to."""

    bundle: Bundle
    seconds: float  # from the call to the switch


class Service:
    """What is served. `bundle`, `engines` and `latency` are those of the moment."""

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        engines: Sequence[Engine],
        make: Make | None = None,
    ) -> None:
        """engines: one a device. make: makes one for a bundle on a device, where it is needed anew.

        Raises StartError for an unknown policy, or no place for a log.
        """
        self.settings = settings
        self.metrics = Metrics([tier.name for tier in bundle.tiers])
        self._bundle, self._engines, self._make = bundle, tuple(engines), make
        create(settings.policy, tier_table(bundle.tiers))  # an unknown one is told now
        self._recorder = Recorder(settings.event_log) if settings.event_log is not None else None
        self._servable: Servable | None = None  # once latencies are known
        self._retired: set[Servable] = set()  # until what they took is answered
        self._decode_threads = settings.decode_threads or cpus.usable()
        self._decoders = Threads("decode", self._decode_threads)
        self._loader = Device("reload")
        self.metrics.limits(max_batch=settings.max_batch, queue_limit=settings.queue_limit)
        self.metrics.watch(
            depth=lambda: self.waiting,
            predicted_wait_s=lambda: self.wait_s,
            ready=lambda: self.ready,
        )
        self._devices = [Device(f"device-{i}") for i in range(len(engines))]
        self._draining = self._reloading = False
        self._taken = 0  # requests of several images in hand
        self.left_behind = False  # threads that the interpreter would wait for

    @property
    def bundle(self) -> Bundle:
        return self._bundle if self._servable is None else self._servable.bundle

    @property
    def engines(self) -> Sequence[Engine]:
        return self._engines if self._servable is None else self._servable.engines

    @property
    def latency(self) -> Latency | None:
        """None until it is measured."""
        return None if self._servable is None else self._servable.latency

    @property
    def out_of_service(self) -> frozenset[int]:
        """Tiers that have failed and are out of routing."""
        return frozenset() if self._servable is None else self._servable.out_of_service

    @property
    def alive(self) -> bool:
        """Whether no device is lost for good: only a new process gets one back."""
        return not any(device.lost for device in self._devices)

    @property
    def ready(self) -> bool:
        """Latencies are measured, every tier has run, something works, and nobody is stopping."""
        return self._servable is not None and not self._draining and self._servable.works

    @property
    def in_hand(self) -> int:
        """Requests that have not been answered yet."""
        return self._taken + sum(servable.in_hand for servable in self._servables)

    @property
    def _servables(self) -> list[Servable]:
        """That of the moment last, before it those that still answer what they had taken."""
        return [*self._retired, *([] if self._servable is None else [self._servable])]

    @property
    def reloading(self) -> bool:
        return self._reloading

    @property
    def waiting(self) -> int:
        """Requests in hand that no device works on yet."""
        return 0 if self._servable is None else self._servable.waiting

    @property
    def wait_s(self) -> float:
        """Seconds until the work in hand should be done; nan where that cannot be told."""
        return 0.0 if self._servable is None else self._servable.drain_s

    @property
    def accuracy_range(self) -> float:
        """What separates the best tier from the worst."""
        accuracy = tier_table(self.bundle.tiers).accuracy
        return max(accuracy) - min(accuracy)

    @property
    def device(self) -> str:
        """Where batches run, all devices in one line."""
        return ", ".join(engine.device for engine in self.engines)

    async def start(self) -> None:
        """Measure latencies, or read them from the cache; then requests are taken."""
        settings, engine = self.settings, self._engines[0]
        kinds = {
            f"{each.name} on {latency_profile.gpu(each) or each.device}" for each in self._engines
        }
        if len(kinds) > 1:
            log.warning(
                "the devices differ (%s): all are taken to be as fast as %s",
                ", ".join(sorted(kinds)),
                engine.device,
            )
        measure = partial(
            latency_profile.load, self._bundle, engine, settings.cache_dir, settings.profile_s
        )
        measured = await self._devices[0].submit(measure)
        self._servable = self._made(self._bundle, self._engines, measured, self._recorder)
        self._tell_build()
        log.info(
            "threads: %d cores may be used; %d decode images, %s run a batch",
            cpus.usable(),
            self._decode_threads,
            engine.threads or (cpus.usable() if engine.device == "cpu" else "the backend's own"),
        )
        log.info("ready: %s", self._words())

    async def answer(
        self, ask: InferenceRequest, read: Callable[[], Awaitable[bytes]], *, admitted: bool = False
    ) -> InferenceResult:
        """Read, decode, queue and run one image.

        `read` is awaited only if the image can still be answered in time, and no longer than that.
        admitted: it is one of several that were taken together, and is answered in a drain too.
        Raises a RequestError where it cannot be answered.
        """
        try:
            self.require_ready(admitted)
        except RequestError:
            self.metrics.ended(Outcome.REFUSED_DRAINING)
            raise
        assert self._servable is not None  # it is ready
        return await self._servable.answer(ask, read, self._decoders)

    def require_ready(self, admitted: bool = False) -> None:
        """Raises Draining or OutOfService where requests are not taken; `admitted` ones were."""
        if (self._draining and not admitted) or self._servable is None:
            if self._draining:
                raise Draining(retry_after_s=1)
            raise Starting("the server is still measuring latencies: retry", retry_after_s=1)
        if not self._servable.works:
            raise OutOfService(
                "every tier or device of this server has failed: ask another one",
                retry_after_s=RETRY_S,
            )

    def require_alive(self) -> None:
        """Raises OutOfService where only a new process can help."""
        if not self.alive:
            raise OutOfService("a device does not come back from a call: restart this server")

    async def receive(self, read: Callable[[], Awaitable[T]]) -> T:
        """The body of several images. Raises what `read` raises, or UploadTimeout."""
        try:
            async with asyncio.timeout(self.settings.upload_s):
                return await read()
        except TimeoutError:
            self.metrics.ended(Outcome.EXPIRED)
            raise UploadTimeout(
                f"the body did not arrive within {self.settings.upload_s:g} s: send it faster, or"
                " fewer images"
            ) from None
        except RequestError:
            self.metrics.ended(Outcome.UNREADABLE)
            raise

    @contextmanager
    def taking(self) -> Iterator[None]:
        """While a request of several images is in hand, from its headers on.

        Raises Draining, OutOfService, or Overloaded where there are as many as there may be.
        """
        self.require_ready()
        if self._taken + self.waiting >= self.settings.queue_limit:
            self.metrics.ended(Outcome.REFUSED_FULL)
            raise full(self.settings.queue_limit, retry_after_s=1)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def reload(self) -> Reloaded:
        """Serve what the bundle's folder holds now, without a request dropped.

        The new bundle is loaded and tried beside the old one, which serves on until the switch, and
        after it until what it had taken is answered. Raises ReloadInProgress, or ReloadFailed if
        the new one cannot be served: then the old one stays.
        """
        old = self._servable
        if old is None or self._draining:
            raise Draining("the server is starting or stopping: nothing to reload", retry_after_s=1)
        if self._reloading:
            raise ReloadInProgress("a reload is going on already: wait for it", retry_after_s=5)
        self._reloading, begin_s = True, time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            bundle, engines, measured = await self._loader.submit(
                partial(self._load_beside, old, loop)
            )
            if self._draining:
                for engine in engines:
                    engine.close()
                raise Draining
            new = self._made(bundle, engines, measured)
        except PcaeError as error:
            if self._draining:  # which may be why: its batches find no device any more
                raise Draining("the server is stopping: not reloaded") from None
            self.metrics.reloaded(Reload.FAILED)
            log.error("not reloaded, the old bundle serves on: %s", error)
            raise ReloadFailed(f"{error}; the old bundle serves on") from None
        finally:
            self._reloading = False
        self.metrics.add_tiers([tier.name for tier in new.bundle.tiers])
        self._servable = new
        self._retired.add(old)
        self.metrics.reloaded(Reload.DONE)
        self._tell_build()
        seconds = time.monotonic() - begin_s
        log.info("reloaded in %.1f s: %s", seconds, self._words())
        if self._recorder is not None:
            log.warning("the event log %s ends here: it is of one bundle", self.settings.event_log)
            self._recorder = None
        loop.call_soon(self._retire, old)
        return Reloaded(new.bundle, seconds)

    def drain(self) -> None:
        """Take no more requests; those in hand are answered."""
        self._draining = True

    async def stop(self) -> None:
        """Take nothing more, and let the batch on the device end: in bounded time."""
        self.give_up()
        servables = self._servables
        self.left_behind |= not await self._decoders.shutdown(DECODE_S)
        if self._servable is None:  # it measures, and nobody needs to know any more
            for device in self._devices:
                self.left_behind |= not await device.shutdown(0)
            if self._recorder is not None:
                self._recorder.close()
            return
        for i, device in enumerate(self._devices):
            if not await device.shutdown(BATCH_S):
                for servable in servables:
                    servable.engines[i].terminate()
                device.lost = not await device.shutdown(TERMINATE_S)
        self.left_behind |= not (self.alive and await self._loader.shutdown(TERMINATE_S))
        for servable in servables:
            servable.close()

    def give_up(self) -> None:
        """Take nothing more, and answer those in hand that the server is stopping."""
        self._draining = True
        for servable in self._servables:
            servable.stop()

    def _made(
        self,
        bundle: Bundle,
        engines: Sequence[Engine],
        measured: latency_profile.Profile,
        recorder: Recorder | None = None,
    ) -> Servable:
        settings = self.settings
        setup = Setup(
            policy=settings.policy,
            tier_table=tier_table(bundle.tiers),
            seconds=measured.seconds(),
            max_batch=settings.max_batch,
            queue_limit=settings.queue_limit,
            devices=len(engines),
        )
        return Servable(
            settings,
            bundle,
            engines,
            setup,
            self._devices,
            self.metrics,
            make=self._make,
            recorder=recorder,
            on_lost=self._lost,
        )

    def _lost(self, device: int) -> None:
        for servable in self._servables:
            servable.lost(device)

    def _load_beside(
        self, old: Servable, loop: asyncio.AbstractEventLoop
    ) -> tuple[Bundle, list[Engine], latency_profile.Profile]:
        """Bundle, engines and latencies from the same folder; every batch behind live traffic.

        Runs on a thread of its own. Raises PcaeError.
        """
        if self._make is None:
            raise ReloadFailed("this server cannot make engines")
        settings, engines = self.settings, list[Engine]()
        try:
            new = bundles.load(old.bundle.root)
            create(settings.policy, tier_table(new.tiers))
            for i in range(len(self._devices)):
                # where nothing works any more, there is no traffic to stay behind
                through = (
                    partial(BackgroundEngine, servable=old, loop=loop) if old.works else at_once
                )
                engines.append(self._make(new, i, through))
            limit_s = min(settings.profile_s, MEASURE_BESIDE_S)
            if old.works:
                aside = BackgroundEngine(engines[0], old, loop)
                measured = latency_profile.load(
                    new, aside, settings.cache_dir, limit_s, clock=aside.clock
                )
            else:
                measured = latency_profile.load(new, engines[0], settings.cache_dir, limit_s)
        except BaseException as error:
            for engine in engines:
                engine.close()
            if isinstance(error, PcaeError):
                raise
            raise ReloadFailed(f"the new bundle does not run: {one_line(error)}") from error
        return new, engines, measured

    def _retire(self, old: Servable) -> None:
        """Let an old servable go once it has answered all that it took."""
        if old.idle:
            self._retired.discard(old)
            old.close()
        elif not self._draining:
            asyncio.get_running_loop().call_later(0.05, self._retire, old)

    def _tell_build(self) -> None:
        assert self._servable is not None
        engine, bundle = self.engines[0], self.bundle
        self.metrics.accuracy_range(self.accuracy_range)
        self.metrics.build_info(
            bundle=bundle.manifest.name,
            digest=bundle.digest,
            backend=f"{engine.name} {engine.version}",
            device=self.device,
            policy=self._servable.policy,
        )

    def _words(self) -> str:
        """What is served, on one line."""
        assert self._servable is not None
        engine, bundle = self.engines[0], self.bundle
        forecast = self._servable.latency.forecast(asyncio.get_running_loop().time())
        return "{} on {}, backend {} ({}), policy {}, one image takes {}".format(
            bundle.manifest.name,
            self.device,
            engine.name,
            "; ".join(filter(None, (engine.version, NOTES.get(engine.name)))),
            self._servable.policy,
            ", ".join(
                f"{forecast.p50(i, 1) * 1e3:.1f} ms ({tier.name})"
                for i, tier in enumerate(bundle.tiers)
            ),
        )
