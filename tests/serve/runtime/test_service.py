"""The service without HTTP: its start, its devices, its end."""

import asyncio
import contextlib
import re
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import Bundle
from pcae_serve.callers import Caller
from pcae_serve.engines import nvidia
from pcae_serve.engines.base import Engine, Output, Pixels
from pcae_serve.engines.loader import check_engine
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import (
    BudgetTooSmall,
    DeadlineExceeded,
    Draining,
    OutOfMemory,
    Overloaded,
    RateLimited,
    RequestError,
    Starting,
    TooLarge,
    UnsupportedType,
)
from pcae_serve.runtime import service as services
from pcae_serve.runtime.decoders import Decoders
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.servable import Servable
from pcae_serve.runtime.service import Service, State
from pcae_serve.runtime.uploads import Upload
from pcae_serve.scheduling import scheduler
from pcae_serve.scheduling.events import Reject, RejectReason
from pcae_serve.scheduling.scheduler import Scheduler
from pcae_serve.settings import Settings
from tests.support.apps import quick
from tests.support.gate import Gate
from tests.support.images import image_bytes
from tests.support.inference import infer

MakeSettings = Callable[..., Settings]

#: The header of a lossless WebP of 7,000 x 7,000 pixels, which takes 0.9 GB to decode.
HUGE_WEBP = struct.pack("<4sI8sIBI9x", b"RIFF", 26, b"WEBPVP8L", 14, 0x2F, 6999 * ((1 << 14) + 1))


def test_stopping_with_work_in_hand_answers_everybody_once(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> list[Any]:
        service = Service(settings(), small_bundle, [gate])
        await service.start()
        gate.shut()
        calls = [asyncio.create_task(classify(service, i, 60_000)) for i in range(5)]
        await asyncio.to_thread(gate.entered.wait, 20)
        await asyncio.sleep(0.05)  # the others are decoded meanwhile, or still at it
        stop = asyncio.create_task(service.stop())
        await asyncio.sleep(0.05)
        gate.open.set()
        await stop
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(scenario())
    assert all(isinstance(answer, Draining) for answer in answers)
    assert not caplog.records


def test_a_decoder_that_does_not_come_back_does_not_hold_the_end_up(
    small_bundle: Bundle, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()

    def stuck(*_: Any) -> None:
        entered.set()
        release.wait(20)

    monkeypatch.setattr(Preprocess, "__call__", stuck)
    monkeypatch.setattr(services, "DECODE_S", 0.1)

    async def scenario() -> bool:
        service = Service(settings(), small_bundle, [Gate()])
        await service.start()
        body = image_bytes(size=(400, 400))  # for a thread
        call = asyncio.create_task(infer(service, 60_000, body))
        await asyncio.to_thread(entered.wait, 20)
        await asyncio.wait_for(service.stop(), 15)
        with pytest.raises(Draining):
            await call
        return service.left_behind

    try:
        assert asyncio.run(scenario())
    finally:
        release.set()


def test_a_reload_that_a_stop_cuts_off_has_not_failed(
    small_bundle: Bundle,
    settings: MakeSettings,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its batches wait for a device that is busy to the end."""
    monkeypatch.setattr(services, "BATCH_S", 0.1)

    def make(bundle: Bundle, _: int, through: Callable[[Engine], Engine]) -> Engine:
        engine = SimulatedEngine(bundle, seconds=quick)
        check_engine(through(engine), bundle)
        return engine

    async def scenario() -> str:
        service = Service(settings(), small_bundle, [gate], make)
        await service.start()
        gate.shut()
        call = asyncio.create_task(classify(service, 1, 60_000))
        await asyncio.to_thread(gate.entered.wait, 20)
        reload = asyncio.create_task(service.reload())
        assert isinstance(service._current, Servable)
        while not service._current.background.waiting:
            await asyncio.sleep(0.005)
        stop = asyncio.create_task(service.stop())
        with pytest.raises(Draining, match="not reloaded"):
            await reload
        gate.open.set()
        await asyncio.gather(stop, call, return_exceptions=True)
        return service.metrics.exposition()[0].decode()

    counts = asyncio.run(scenario())
    assert 'pcae_reloads_total{result="failed"} 0.0' in counts
    assert "reload failed" not in caplog.text


def test_the_state_decides_what_is_admitted(small_bundle: Bundle, settings: MakeSettings) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        service = Service(settings(), small_bundle, [Gate()])

        def request() -> InferenceRequest:
            return InferenceRequest(loop.time(), budget_ms=60_000)

        assert (service.state, service.ready) == (State.STARTING, False)
        with pytest.raises(Starting, match="measuring"):
            service.offer(request())
        await service.start()
        assert (service.state, service.ready) == (State.SERVING, True)
        with service.offer_group(request()) as group:
            service.drain()
            assert (service.state, service.ready) == (State.DRAINING, False)
            assert service.unanswered == 1
            with pytest.raises(Draining):
                service.offer(request())
            with group.offer(request()) as offered:
                await offered.run(image_bytes())
            service.refuse_unanswered()
            assert service.state is State.STOPPED
            with pytest.raises(Draining):
                group.offer(request())
        assert service.unanswered == 0
        await service.stop()
        service.drain()
        assert service.state is State.STOPPED

    asyncio.run(scenario())


def test_an_upload_takes_no_place_in_the_queue(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    """A place begins with the whole body; headers that a full queue refuses upload nothing."""

    async def scenario() -> str:
        service = Service(settings(queue_limit=1), small_bundle, [gate])
        await service.start()
        gate.shut()
        complete = asyncio.Event()

        async def body(_: Upload) -> bytes:
            await complete.wait()
            return image_bytes()

        async def upload() -> InferenceResult:
            arrival_s = asyncio.get_running_loop().time()
            with service.offer(InferenceRequest(arrival_s, 60_000)) as offered:
                return await offered.run(await offered.receive(body, 1000))

        uploading = [asyncio.create_task(upload()) for _ in range(5)]
        await asyncio.sleep(0)
        assert (service.waiting, service.unanswered) == (0, 5)
        first = asyncio.create_task(classify(service, 1, 60_000))
        await asyncio.to_thread(gate.entered.wait, 20)
        second = asyncio.create_task(classify(service, 2, 60_000))
        while not service.waiting:
            await asyncio.sleep(0.005)
        arrival_s = asyncio.get_running_loop().time()
        with (
            pytest.raises(Overloaded, match="queue is full"),
            service.offer(InferenceRequest(arrival_s, 60_000)),
        ):
            raise AssertionError("it must not be uploaded")
        complete.set()
        refused = await asyncio.gather(*uploading, return_exceptions=True)
        assert [type(answer) for answer in refused] == [Overloaded] * 5
        gate.open.set()
        await asyncio.gather(first, second)
        await service.stop()
        return service.metrics.exposition()[0].decode()

    counts = asyncio.run(scenario())
    assert 'requests_total{outcome="rejected_full"} 6.0' in counts
    assert 'requests_total{outcome="in_time"} 2.0' in counts


def test_a_check_at_the_headers_that_is_wrong_costs_nothing(
    small_bundle: Bundle, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would not be refused after all arrives once more, with its body."""
    monkeypatch.setattr(Scheduler, "early_refusal", lambda *_: Reject(-1, "load", 1.0, 2.0))

    async def scenario() -> None:
        service = Service(settings(), small_bundle, [Gate()])
        await service.start()
        arrival_s = asyncio.get_running_loop().time()
        with service.offer(InferenceRequest(arrival_s, 60_000)) as offered:
            assert service.waiting == 0
            assert (await offered.run(image_bytes())).met_budget
        assert service.waiting == 0
        await service.stop()

    asyncio.run(scenario())


def test_a_group_is_refused_at_its_headers_if_the_load_refuses_one_image(
    small_bundle: Bundle, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> str:
        service = Service(settings(), small_bundle, [Gate()])
        await service.start()
        image = InferenceRequest(asyncio.get_running_loop().time(), 60_000)

        why: list[RejectReason | None] = ["load"]
        monkeypatch.setattr(scheduler, "check_admission", lambda *_: why[-1])
        with pytest.raises(Overloaded), service.offer_group(image):
            raise AssertionError("nothing may be uploaded")
        for _ in range(2):  # each image is refused by itself, or none is
            why.append("budget" if len(why) == 1 else None)
            with service.offer_group(image):
                pass
        await service.stop()
        return service.metrics.exposition()[0].decode()

    counts = asyncio.run(scenario())
    assert re.search(r'requests_total\{.*outcome="rejected_load".*\} 1.0', counts)
    assert not re.search(r'requests_total\{.*outcome="cancelled".*\} [1-9]', counts)


def test_a_group_whose_client_leaves_during_the_upload_is_counted(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    class Left(Exception):
        pass

    async def leave(_: Upload) -> bytes:
        raise Left

    async def scenario() -> str:
        service = Service(settings(), small_bundle, [Gate()])
        await service.start()
        image = InferenceRequest(asyncio.get_running_loop().time(), 60_000)
        with pytest.raises(Left), service.offer_group(image) as group:
            await group.receive(leave, 100)
        await service.stop()
        return service.metrics.exposition()[0].decode()

    assert 'requests_total{outcome="cancelled"} 1.0' in asyncio.run(scenario())


def test_a_group_takes_its_rate_at_once_or_not_at_all(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    async def scenario() -> str:
        service = Service(settings(), small_bundle, [Gate()])
        service.set_callers([Caller("ingest", rate=4.0)])
        await service.start()
        now_s = asyncio.get_running_loop().time()
        image = InferenceRequest(now_s, 60_000, caller="ingest", key_name="ingest")
        for images, refusal in ((5, TooLarge), (3, None), (3, RateLimited)):
            expected = pytest.raises(refusal) if refusal else contextlib.nullcontext()
            with expected, service.offer_group(image) as group:
                group.take(images)
        await service.stop()
        return service.metrics.exposition()[0].decode()

    assert 'requests_total{outcome="rejected_rate"} 2.0' in asyncio.run(scenario())


def test_requests_hold_their_bytes_until_they_end_and_no_longer(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    """An upload holds its body, a queued request its pixels; each way to end frees them."""
    pixels_bytes = 3 * small_bundle.image_size**2

    async def scenario() -> None:
        service = Service(settings(memory_mb=100), small_bundle, [gate])
        memory = service._resources.memory
        await service.start()
        assert memory.limit_bytes == 100_000_000
        gate.shut()
        calls = [asyncio.create_task(classify(service, i, 60_000)) for i in range(3)]
        await asyncio.to_thread(gate.entered.wait, 20)
        while service.waiting < 2 or memory.used_bytes > 3 * pixels_bytes:
            await asyncio.sleep(0.005)
        assert memory.used_bytes == 3 * pixels_bytes
        calls[2].cancel()  # its client leaves

        async def never(upload: Upload) -> bytes:
            upload.add(1000)
            await asyncio.Event().wait()
            raise AssertionError

        arrival_s = asyncio.get_running_loop().time()
        with service.offer(InferenceRequest(arrival_s, 50)) as offered:
            upload = asyncio.create_task(offered.receive(never, 5000))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert memory.used_bytes == 2 * pixels_bytes + 1000
            with pytest.raises(DeadlineExceeded):
                await upload
        with pytest.raises(UnsupportedType):
            await infer(service, 60_000, b"not an image")
        with pytest.raises(TooLarge, match="100,000,000"):
            await infer(service, 60_000, HUGE_WEBP)
        with service.offer_group(InferenceRequest(0.0, 60_000)) as group:
            assert await group.receive(whole, 1000, copies=2) == b""
            assert memory.used_bytes == 2 * pixels_bytes + 2000
        assert memory.used_bytes == 2 * pixels_bytes
        gate.open.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert memory.used_bytes == 0
        await service.stop()

    async def whole(upload: Upload) -> bytes:
        upload.add(1000)
        return b""

    asyncio.run(scenario())


def test_a_stop_frees_what_unanswered_requests_hold(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests on the device, in the queue, at a decoder, before it, and being uploaded."""
    release, decode = threading.Event(), Preprocess.__call__

    def slowly(self: Preprocess, body: bytes, *limits: Any) -> Any:
        if body.endswith(b"slow"):
            release.wait(20)
        return decode(self, body, *limits)

    monkeypatch.setattr(Preprocess, "__call__", slowly)

    async def scenario() -> None:
        service = Service(settings(memory_mb=100, decode_threads=1), small_bundle, [gate])
        memory = service._resources.memory
        await service.start()
        gate.shut()

        async def upload() -> InferenceResult:
            async def read(upload: Upload) -> bytes:
                upload.add(5000)
                return await asyncio.Future[bytes]()

            arrival_s = asyncio.get_running_loop().time()
            with service.offer(InferenceRequest(arrival_s, 60_000)) as offered:
                return await offered.run(await offered.receive(read, 9000))

        calls = [asyncio.create_task(classify(service, i, 60_000)) for i in range(2)]
        await asyncio.to_thread(gate.entered.wait, 20)
        while service.waiting > 1:
            await asyncio.sleep(0.005)
        slow = image_bytes(size=(400, 400)) + b"slow"
        calls += [asyncio.create_task(infer(service, 60_000, slow)) for _ in range(2)]
        calls += [asyncio.create_task(upload())]
        while len(service._resources.uploads) != 1 or service.waiting != 3:
            await asyncio.sleep(0.005)
        held = memory.used_bytes
        assert held > 5000
        service.refuse_unanswered()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Draining] * 5
        assert 0 < memory.used_bytes < held  # a thread still works on one of them
        release.set()
        gate.open.set()
        await service.stop()
        assert memory.used_bytes == 0

    asyncio.run(scenario())


def test_what_does_not_fit_into_memory_is_refused_at_once(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    async def scenario() -> None:
        service = Service(settings(memory_mb=100), small_bundle, [gate])
        await service.start()
        with service._resources.memory.reserve() as others:
            assert others.try_resize(99_990_000)
            with pytest.raises(Overloaded, match="use all memory that requests may take") as full:
                await classify(service, 1, 60_000)
            assert full.value.headers["Retry-After"] == "1"
        assert (await classify(service, 1, 60_000)).met_budget
        await service.stop()

    asyncio.run(scenario())


def test_lack_of_memory_is_not_an_error_of_the_image_or_the_model(
    small_bundle: Bundle, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    async def refused(service: Service) -> None:
        with pytest.raises(OutOfMemory):
            await classify(service, 1, 60_000)

    async def scenario() -> str:
        service = Service(settings(), small_bundle, [Gate()])
        await service.start()
        for owner, name in ((Preprocess, "__call__"), (Decoders, "predict"), (Gate, "run")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fail)
                await refused(service)
        image = InferenceRequest(0.0, 60_000)
        with pytest.raises(OutOfMemory), service.offer_group(image):
            fail()
        await service.stop()
        return service.metrics.exposition()[0].decode()

    assert 'requests_total{outcome="failed"} 4.0' in asyncio.run(scenario())


def test_what_decoding_leaves_no_time_for_is_refused_before_it_is_decoded(
    small_bundle: Bundle, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("it must not be decoded")

    monkeypatch.setattr(Preprocess, "__call__", decode)

    async def refused(idle_s: float, wait_s: float) -> RequestError:
        monkeypatch.setattr(Decoders, "busy", lambda *_: wait_s > idle_s)
        monkeypatch.setattr(Decoders, "idle_s", lambda *_: idle_s)
        monkeypatch.setattr(Decoders, "wait_s", lambda *_: wait_s)
        service = Service(settings(), small_bundle, [Gate()])
        await service.start()
        with pytest.raises(RequestError) as error:
            await classify(service, 1, 20_000)
        assert service.waiting == 0
        await service.stop()
        return error.value

    busy = asyncio.run(refused(1.0, 30.0))
    assert isinstance(busy, Overloaded)
    assert busy.members["retry_after_s"] == pytest.approx(29.0, abs=1.0)
    never = asyncio.run(refused(30.0, 30.0))
    assert isinstance(never, BudgetTooSmall)
    assert "decoding included" in never.detail


async def classify(service: Service, level: int, budget_ms: float) -> Any:
    return await infer(service, budget_ms, image_bytes(level))


def test_requests_that_wait_together_run_together(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    batches: list[int] = []
    entered, go_on = threading.Event(), threading.Event()

    class Counting(SimulatedEngine):
        def run(self, tier: Tier, pixels: Pixels) -> Output:
            batches.append(len(pixels))
            entered.set()
            assert go_on.wait(20)
            return super().run(tier, pixels)

    async def together() -> list[Any]:
        engine = Counting(small_bundle, seconds=lambda _, batch: 0.03 + 1e-4 * batch)
        go_on.set()
        service = Service(settings(profile_s=3), small_bundle, [engine])
        await service.start()
        go_on.clear()
        entered.clear()
        batches.clear()
        first = asyncio.create_task(classify(service, 0, 60_000))
        await asyncio.to_thread(entered.wait, 20)
        others = [asyncio.create_task(classify(service, i, 60_000)) for i in range(1, 12)]
        assert isinstance(service._current, Servable)
        while len(service._current._driver.scheduler._queue) < len(others):
            await asyncio.sleep(0.005)
        go_on.set()
        answers = await asyncio.gather(first, *others)
        await service.stop()
        return answers

    answers = asyncio.run(together())
    assert len(answers) == 12
    assert sum(batches) == 12
    assert max(batches) >= 4


def test_two_devices_run_two_batches_at_once(small_bundle: Bundle, settings: MakeSettings) -> None:
    both, meet = threading.Barrier(2, timeout=20), threading.Event()

    class Meeting(SimulatedEngine):
        def run(self, tier: Tier, pixels: Pixels) -> Output:
            if meet.is_set():
                both.wait()  # passes only while the other device is inside, too
            return super().run(tier, pixels)

    async def scenario() -> list[Any]:
        pair = [Meeting(small_bundle, f"cuda:{i}", quick) for i in range(2)]
        service = Service(settings(), small_bundle, pair)
        await service.start()
        meet.set()
        answers = await asyncio.gather(*(classify(service, i, 60_000) for i in range(2)))
        await service.stop()
        return answers

    answers = asyncio.run(scenario())
    assert [answer.tier.name for answer in answers] == ["full", "full"]


def test_devices_that_differ_are_told(
    small_bundle: Bundle,
    settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(gpus: list[str]) -> str:
        monkeypatch.setattr(nvidia, "list_gpus", lambda: gpus)
        caplog.clear()
        pair = [SimulatedEngine(small_bundle, f"cuda:{i}", quick) for i in range(2)]
        service = Service(settings(profile_s=0.1), small_bundle, pair)
        await service.start()
        await service.stop()
        return "".join(record.getMessage() for record in caplog.records)

    told = asyncio.run(start(["NVIDIA L4", "NVIDIA H200"]))
    assert "the devices differ (simulated on NVIDIA H200, simulated on NVIDIA L4)" in told
    assert not asyncio.run(start(["NVIDIA L4", "NVIDIA L4"]))
