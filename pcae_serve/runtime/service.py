"""The service: the current servable, the devices that it runs on, start, reload, drain and stop.

    STARTING   latencies are measured; nothing is admitted
    SERVING    requests go to the current servable; a reload replaces it
    DRAINING   nothing new is admitted; what was admitted is answered
    STOPPED    unanswered requests have been refused

Several devices share one scheduler and one queue; they are assumed to be equally fast.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import inf
from typing import TypeVar

from pcae_serve.bundle.reader import Bundle
from pcae_serve.callers import Caller
from pcae_serve.descriptors import connection_capacity
from pcae_serve.engines import cpus
from pcae_serve.engines.base import BACKEND_NOTES, Engine
from pcae_serve.errors import (
    Draining,
    OutOfService,
    PcaeError,
    ReloadFailed,
    ReloadInProgress,
)
from pcae_serve.observability.metrics import Metrics, Reload
from pcae_serve.runtime import latency_profile, machine_memory, refusals, tier_health
from pcae_serve.runtime.decoders import Decoders
from pcae_serve.runtime.heap import Trimmer
from pcae_serve.runtime.memory_budget import MemoryBudget
from pcae_serve.runtime.offered import OfferedRequest
from pcae_serve.runtime.rate_limits import RateLimits
from pcae_serve.runtime.refusals import Refusal
from pcae_serve.runtime.replacement import load_replacement
from pcae_serve.runtime.request_group import RequestGroup
from pcae_serve.runtime.requests import InferenceRequest
from pcae_serve.runtime.resources import Resources
from pcae_serve.runtime.servable import EngineFactory, Servable
from pcae_serve.runtime.threads import Device
from pcae_serve.runtime.tiers import tier_table
from pcae_serve.runtime.uploads import Uploads
from pcae_serve.runtime.worker import TERMINATE_S
from pcae_serve.scheduling.event_log import Recorder, Setup
from pcae_serve.scheduling.latency import Latency
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Default limit of bodies that are received at once, or half the connections if that is less.
MAX_UPLOADS = 1024
#: Seconds that decoders have to finish when the service stops; their requests are refused by then.
DECODE_S = 1.0
#: Seconds that the current batch has to finish when the service stops, before it is terminated.
BATCH_S = 5.0
#: Interval, in seconds, at which a replaced servable is checked for requests left to answer.
RETIRE_CHECK_S = 0.05


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True)
class _Unmeasured:
    """The bundle and engines while latencies are unknown and no request is admitted."""

    bundle: Bundle
    engines: Sequence[Engine]
    latency: None = None
    disabled_tiers: frozenset[int] = frozenset()
    waiting: int = 0
    predicted_wait_s: float = 0.0
    works: bool = False


@dataclass(frozen=True)
class Reloaded:
    """The result of a reload."""

    bundle: Bundle
    seconds: float  # from the call until the new bundle was in service


class Service:
    """A bundle on its devices, and its replacement at a reload."""

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        engines: Sequence[Engine],
        make_engine: EngineFactory | None = None,
    ) -> None:
        """Create a service that has not started.

        engines: one per device. make_engine: creates an engine for a reload, or in place of one
        that failed. Raises StartError if the policy is unknown or the event log cannot be written.
        """
        self.settings = settings
        self.metrics = Metrics([tier.name for tier in bundle.tiers])
        self.policy = create(settings.policy, tier_table(bundle.tiers)).name  # fails if unknown
        self._recorder = Recorder(settings.event_log) if settings.event_log is not None else None
        self._make_engine = make_engine
        self._state = State.STARTING
        self._current: Servable | _Unmeasured = _Unmeasured(bundle, tuple(engines))
        self._retired: set[Servable] = set()  # replaced, and still answering their requests
        self._reloading = False
        self._weights, self._rate_limits = dict[str, float](), RateLimits()
        self._groups = 0  # requests for several images that are not answered
        self._decode_threads = settings.decode_threads or cpus.count_usable()
        self._resources = self._create_resources()
        self._resources.memory.reclaim = self._reclaim
        self._trimmer: asyncio.Task[None] | None = None
        self._loader = Device("reload")
        self._devices = [Device(f"device-{i}") for i in range(len(engines))]
        self.left_behind = False  # threads are still running, so the interpreter could not exit
        self.metrics.set_limits(max_batch=settings.max_batch, queue_limit=settings.queue_limit)
        self.metrics.watch(
            depth=lambda: self.waiting,
            predicted_wait_s=lambda: self.predicted_wait_s,
            ready=lambda: self.ready,
            uploads=lambda: len(self._resources.uploads),
            memory_bytes=lambda: self._resources.memory.used_bytes,
        )

    def set_callers(self, callers: Sequence[Caller]) -> None:
        """Set weight and rate of the callers with API keys, before `start`."""
        self._weights = {caller.name: caller.weight for caller in callers if caller.weight != 1}
        self._rate_limits = RateLimits(callers)
        self.metrics.callers.add(caller.name for caller in callers)

    async def start(self) -> None:
        """Measure latencies, or read them from the cache; then admit requests."""
        settings, bundle, engines = self.settings, self.bundle, self.engines
        _warn_if_devices_differ(engines)
        measure = partial(
            latency_profile.load, bundle, engines[0], settings.cache_dir, settings.profile_s
        )
        profile = await self._devices[0].submit(measure)
        memory = self._resources.memory
        memory.limit_bytes = machine_memory.budget_bytes(settings.memory_mb)
        self.metrics.set_memory_limit(memory.limit_bytes)
        self._trimmer = asyncio.create_task(Trimmer(memory).run())
        self._current = self._servable(bundle, engines, profile, self._recorder)
        if self._state is State.STARTING:
            self._state = State.SERVING
        self._record_build()
        log.info(
            "threads: %d usable CPUs, %d threads decode images, %s run a batch",
            cpus.count_usable(),
            self._decode_threads,
            engines[0].threads
            or (cpus.count_usable() if engines[0].device == "cpu" else "backend's"),
        )
        log.info("ready: %s", self._summary())

    def offer(
        self, request: InferenceRequest, *, draining: bool = False, counted: bool = False
    ) -> AbstractContextManager[OfferedRequest]:
        """Offer a request for one image; inside the context, `receive` its body and `run` it.

        draining: accept it during a drain, too. counted: it counts in its key's rate already.
        Raises a RequestError, here or when the context is entered, if the request is refused
        already.
        """
        self._refuse_unless_ready(request, draining=draining)
        if not counted:
            self._refuse_beyond_rate(request, self._rate_limits.take)
        assert isinstance(self._current, Servable)  # it is ready
        return self._current.offer(request, self._resources)

    @contextmanager
    def offer_group(self, image: InferenceRequest) -> Iterator[RequestGroup]:
        """Offer a request for several images, from its headers on.

        image: what is known of the images by then. Raises Draining, OutOfService, RateLimited, or
        Overloaded or OverShare if the load refuses an image like it already.
        """
        self._refuse_unless_ready(image)
        self._refuse_beyond_rate(image, self._rate_limits.wait_s)
        assert isinstance(self._current, Servable)  # it is ready
        if self._current.load_refuses(image):
            with self.offer(image):  # the scheduler refuses it, and learns that it was offered
                pass
        self._groups += 1
        offer = partial(self.offer, draining=True)
        count = partial(self.metrics.record_request, key_name=image.key_name)
        take = partial(self._beyond_rate, image, self._rate_limits.take)
        group = RequestGroup(self.settings.upload_s, count, take, self._resources, offer)
        try:
            with group.until_end():
                yield group
        finally:
            self._groups -= 1

    def require_ready(self) -> None:
        """Raise Draining or OutOfService if requests are not admitted."""
        if (refusal := self._refusal()) is not None:
            raise refusal.error

    def require_alive(self) -> None:
        """Raise OutOfService if only a new process can serve again."""
        if not self.alive:
            raise OutOfService("a device does not return from a call; restart this server")

    def _refusal(self, *, draining: bool = False) -> Refusal | None:
        """Return why requests are not admitted, or None. draining: those that a drain answers."""
        if self._state is State.STARTING:
            return refusals.starting()
        if self._state is State.STOPPED or (self._state is State.DRAINING and not draining):
            return refusals.stopping()
        if not self._current.works:
            return refusals.nothing_works(tier_health.PROBE_INTERVAL_S)
        return None

    def _refuse_unless_ready(self, request: InferenceRequest, *, draining: bool = False) -> None:
        if (refusal := self._refusal(draining=draining)) is not None:
            self._refuse(refusal, request)

    def _refuse_beyond_rate(
        self, request: InferenceRequest, wait_s: Callable[[str | None, float, int], float]
    ) -> None:
        """Refuse a request if its key has to wait, by a method of the rate limits."""
        if (refusal := self._beyond_rate(request, wait_s, 1)) is not None:
            self._refuse(refusal, request)

    def _beyond_rate(
        self,
        request: InferenceRequest,
        wait_s: Callable[[str | None, float, int], float],
        images: int,
    ) -> Refusal | None:
        """Return why N images are refused if their key has to wait, else None."""
        retry_after_s = wait_s(request.key_name, asyncio.get_running_loop().time(), images)
        if not retry_after_s:
            return None
        rate = self._rate_limits.rate(request.key_name)
        if retry_after_s == inf:
            return refusals.beyond_burst(rate, images)
        return refusals.rate_limited(rate, retry_after_s)

    def _refuse(self, refusal: Refusal, request: InferenceRequest) -> None:
        """Count a refused request, and raise its error."""
        self.metrics.record_request(refusal.outcome, request.key_name)
        raise refusal.error

    async def reload(self) -> Reloaded:
        """Serve what the bundle's folder holds now, without dropping a request.

        The new bundle is loaded, tried and measured while the old one serves; the old one finishes
        what it admitted. Raises ReloadInProgress during another reload, Draining unless the service
        is serving, or ReloadFailed if the new bundle cannot be served: then the old one stays.
        """
        if self._state is not State.SERVING:
            raise Draining("the server is starting or stopping and cannot reload", retry_after_s=1)
        if self._reloading:
            raise ReloadInProgress("a reload is in progress; wait until it ends", retry_after_s=5)
        old = self._current
        assert isinstance(old, Servable)
        self._reloading, begin_s = True, time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            load = partial(load_replacement, old, self._make_engine, loop)
            bundle, engines, profile = await self._loader.submit(load)
            if self._stopping:
                for engine in engines:
                    engine.close()
                raise Draining
            new = self._servable(bundle, engines, profile)
        except PcaeError as error:
            if self._stopping:  # the stop may have caused it: background tasks are cancelled
                raise Draining("the server is stopping; the bundle was not reloaded") from None
            self.metrics.record_reload(Reload.FAILED)
            log.error("reload failed, the old bundle stays in service: %s", error)
            raise ReloadFailed(f"{error}; the old bundle stays in service") from None
        finally:
            self._reloading = False
        self.metrics.add_tiers([tier.name for tier in new.bundle.tiers])
        self._current = new
        self._retired.add(old)
        old.end_looks()
        self.metrics.record_reload(Reload.DONE)
        self._record_build()
        seconds = time.monotonic() - begin_s
        log.info("reloaded in %.1f s: %s", seconds, self._summary())
        if self._recorder is not None:
            log.warning(
                "the event log %s ends; it can record only one bundle", self.settings.event_log
            )
            self._recorder = None
        loop.call_soon(self._retire, old)
        return Reloaded(new.bundle, seconds)

    def drain(self) -> None:
        """Admit no more requests; those admitted are answered."""
        if self._state is not State.STOPPED:
            self._state = State.DRAINING
            for servable in self._servables:
                servable.end_looks()

    def refuse_unanswered(self) -> None:
        """Admit no more requests, and refuse those that are unanswered."""
        self._state = State.STOPPED
        for servable in self._servables:
            servable.stop()

    async def stop(self) -> None:
        """Refuse what is unanswered, and let the current batches finish, in bounded time."""
        self.refuse_unanswered()
        if self._trimmer is not None:
            self._trimmer.cancel()
        self.left_behind |= not await self._resources.decoders.shutdown(DECODE_S)
        if isinstance(self._current, _Unmeasured):  # a measurement may be abandoned
            for device in self._devices:
                self.left_behind |= not await device.shutdown(0)
            if self._recorder is not None:
                self._recorder.close()
            return
        servables = self._servables
        for i, device in enumerate(self._devices):
            if not await device.shutdown(BATCH_S):
                for servable in servables:
                    servable.engines[i].terminate()
                device.lost = not await device.shutdown(TERMINATE_S)
        self.left_behind |= not (self.alive and await self._loader.shutdown(TERMINATE_S))
        for servable in servables:
            servable.close()

    @property
    def bundle(self) -> Bundle:
        """The bundle in service."""
        return self._current.bundle

    @property
    def engines(self) -> Sequence[Engine]:
        """The current engines, one per device."""
        return self._current.engines

    @property
    def latency(self) -> Latency | None:
        """The latency model; None until latencies are measured."""
        return self._current.latency

    @property
    def disabled_tiers(self) -> frozenset[int]:
        """Tiers that are out of rotation."""
        return self._current.disabled_tiers

    @property
    def state(self) -> State:
        return self._state

    @property
    def alive(self) -> bool:
        """Whether no device is lost; only a new process gets a lost one back."""
        return not any(device.lost for device in self._devices)

    @property
    def ready(self) -> bool:
        """Whether requests are admitted."""
        return self._refusal() is None

    @property
    def reloading(self) -> bool:
        """Whether a reload is in progress."""
        return self._reloading

    @property
    def unanswered(self) -> int:
        """Number of accepted requests that have not been answered, uploads included."""
        return self._groups + sum(servable.unanswered for servable in self._servables)

    @property
    def waiting(self) -> int:
        """Number of admitted requests that no device has started on; uploads are not admitted."""
        return self._current.waiting

    @property
    def predicted_wait_s(self) -> float:
        """Seconds until all admitted requests should be answered."""
        return self._current.predicted_wait_s

    @property
    def accuracy_range(self) -> float:
        """Accuracy of the tier that an idle device uses minus that of the worst."""
        assert isinstance(self._current, Servable)  # it is ready
        setup, tiers = self._current.setup, tuple(range(len(self.bundle.tiers)))
        worst = min(setup.counted_accuracy(tiers).values())
        return setup.idle_accuracy(tiers, self._current.latency) - worst

    @property
    def device(self) -> str:
        """All devices in one line."""
        return ", ".join(engine.device for engine in self.engines)

    @property
    def _stopping(self) -> bool:
        return self._state in (State.DRAINING, State.STOPPED)

    @property
    def _servables(self) -> list[Servable]:
        """All servables with requests: those that were replaced, then the current one."""
        current = [self._current] if isinstance(self._current, Servable) else []
        return [*self._retired, *current]

    def _create_resources(self) -> Resources:
        """Create what requests compete for; the memory's limit is set once the engines run."""
        settings, memory = self.settings, MemoryBudget(0)
        connections, _ = connection_capacity(settings.max_connections)
        max_uploads = settings.max_uploads or max(1, min(MAX_UPLOADS, connections // 2))
        return Resources(
            memory,
            Decoders(self._decode_threads, max_pixels=settings.max_pixels, memory=memory),
            Uploads(max_uploads, settings.min_upload_kb_s * 1e3, memory),
        )

    def _servable(
        self,
        bundle: Bundle,
        engines: Sequence[Engine],
        profile: latency_profile.Profile,
        recorder: Recorder | None = None,
    ) -> Servable:
        settings = self.settings
        calibration = bundle.manifest.calibration if settings.max_looks > 1 else None
        setup = Setup(
            policy=settings.policy,
            waiting_price=settings.waiting_price,
            tier_table=tier_table(bundle.tiers, calibration),
            seconds=profile.seconds(),
            max_batch=settings.max_batch,
            queue_limit=settings.queue_limit,
            devices=len(engines),
            weights=self._weights,
        )
        return Servable(
            settings,
            bundle,
            engines,
            setup,
            self._devices,
            self.metrics,
            make_engine=self._make_engine,
            recorder=recorder,
            on_device_lost=self._device_lost,
        )

    def _reclaim(self, missing_bytes: int) -> None:
        """Free memory: first the images that wait for a second look, then uploads that lag."""
        memory = self._resources.memory
        wanted_bytes = memory.free_bytes + missing_bytes
        for servable in self._servables:
            servable.send_first_answers(memory, wanted_bytes)
        if memory.free_bytes < wanted_bytes:
            self._resources.uploads.reclaim(wanted_bytes - memory.free_bytes)

    def _device_lost(self, device: int) -> None:
        for servable in self._servables:
            servable.device_lost(device)

    def _retire(self, old: Servable) -> None:
        """Close a replaced servable once it has answered all that it admitted."""
        if old.idle:
            self._retired.discard(old)
            old.close()
        elif not self._stopping:
            asyncio.get_running_loop().call_later(RETIRE_CHECK_S, self._retire, old)

    def _record_build(self) -> None:
        engine, bundle = self.engines[0], self.bundle
        self.metrics.set_accuracy_range(self.accuracy_range)
        self.metrics.set_build_info(
            bundle=bundle.manifest.name,
            digest=bundle.digest,
            backend=f"{engine.name} {engine.version}",
            device=self.device,
            policy=self.policy,
        )

    def _summary(self) -> str:
        """Return in one line what is served, once latencies are known."""
        assert self.latency is not None
        engine, bundle = self.engines[0], self.bundle
        forecast = self.latency.forecast(asyncio.get_running_loop().time())
        return "{} on {}, backend {} ({}), policy {}, one image takes {}".format(
            bundle.manifest.name,
            self.device,
            engine.name,
            "; ".join(filter(None, (engine.version, BACKEND_NOTES.get(engine.name)))),
            self.policy,
            ", ".join(
                f"{forecast.p50(i, 1) * 1e3:.1f} ms ({tier.name})"
                for i, tier in enumerate(bundle.tiers)
            ),
        )


def _warn_if_devices_differ(engines: Sequence[Engine]) -> None:
    kinds = {f"{each.name} on {latency_profile.gpu(each) or each.device}" for each in engines}
    if len(kinds) > 1:
        log.warning(
            "the devices differ (%s); all are scheduled as if they were as fast as %s",
            ", ".join(sorted(kinds)),
            engines[0].device,
        )
