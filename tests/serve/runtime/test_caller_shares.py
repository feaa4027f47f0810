"""Caller shares and rate limits in a service, with an engine that runs when it is told to."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.callers import Caller
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.errors import Overloaded, OverShare, RateLimited, RequestError
from pcae_serve.runtime.requests import InferenceRequest
from pcae_serve.runtime.service import Service
from pcae_serve.scheduling.event_log import replay
from pcae_serve.settings import Settings
from tests.support.gate import Gate
from tests.support.inference import infer

MakeSettings = Callable[..., Settings]


class OneByOne(Gate):
    """A gate that, while it is shut, lets as many batches pass as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = threading.Semaphore(0)

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        self.entered.set()
        for _ in range(1000):
            if self.open.is_set() or self.turns.acquire(timeout=0.01):
                break
        return Output(np.zeros((len(pixels), 4), np.float32), ())


def test_a_caller_over_its_share_leaves_the_next_place_to_another(
    small_bundle: Bundle, settings: MakeSettings, tmp_path: Path
) -> None:
    log, gate = tmp_path / "events", OneByOne()

    async def scenario() -> None:
        chosen = settings(queue_limit=4, max_batch=1, event_log=log, profile_s=0.1)
        service = Service(chosen, small_bundle, [gate])
        service.set_callers([Caller("polite", weight=2.0)])
        await service.start()

        async def ask(caller: str) -> type[RequestError] | None:
            try:
                await infer(service, 3_600_000, caller=caller)
            except RequestError as error:
                return type(error)
            return None

        gate.shut()
        greedy = [asyncio.create_task(ask("greedy"))]
        await asyncio.to_thread(gate.entered.wait, 20)
        greedy += [asyncio.create_task(ask("greedy")) for _ in range(4)]
        while service.waiting < 4:
            await asyncio.sleep(0.005)
        assert await ask("polite") is Overloaded  # nothing that is admitted makes room
        assert {await ask("greedy") for _ in range(300)} == {Overloaded}

        gate.turns.release()
        await greedy[0]
        while service.waiting > 3:
            await asyncio.sleep(0.005)
        with pytest.raises(OverShare, match="more work waiting than its share") as refused:
            await infer(service, 3_600_000, caller="greedy")
        assert int(refused.value.headers["Retry-After"]) >= 1
        polite = asyncio.create_task(ask("polite"))
        while service.waiting < 4:
            await asyncio.sleep(0.005)
        gate.open.set()
        assert await asyncio.gather(polite, *greedy) == [None] * 6
        await service.stop()

    asyncio.run(scenario())
    assert '"why":"share"' in log.read_text()
    replayed = replay(log)
    assert replayed.difference is None
    assert replayed.setup.weights == {"polite": 2.0}


def test_a_group_that_a_full_queue_refuses_counts_as_offered(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    """Otherwise a caller that sends only groups would never have a share."""

    async def scenario() -> None:
        service = Service(settings(queue_limit=1, max_batch=1), small_bundle, [gate])
        await service.start()
        gate.shut()
        running = asyncio.create_task(infer(service, 3_600_000))
        await asyncio.to_thread(gate.entered.wait, 20)
        waiting = asyncio.create_task(infer(service, 3_600_000))
        while not service.waiting:
            await asyncio.sleep(0.005)
        now_s = asyncio.get_running_loop().time()
        image = InferenceRequest(now_s, 3_600_000, caller="polite", key_name="polite")
        service.metrics.callers.add(["polite"])
        with pytest.raises(Overloaded, match="queue is full"), service.offer_group(image):
            raise AssertionError("it must not be uploaded")
        shares = service._current._driver.scheduler._shares  # type: ignore[union-attr]
        assert set(shares._callers) == {"", "polite"}
        gate.open.set()
        await asyncio.gather(running, waiting)
        await service.stop()
        text = service.metrics.exposition()[0].decode()
        name = 'pcae_caller_requests_total{caller="polite",outcome="rejected_full"}'
        assert f"{name} 1.0" in text

    asyncio.run(scenario())


def test_each_image_beyond_the_rate_of_its_key_is_refused(
    small_bundle: Bundle, settings: MakeSettings, gate: Gate
) -> None:
    async def scenario() -> str:
        service = Service(settings(), small_bundle, [gate])
        service.set_callers([Caller("slow", rate=1e-3), Caller("free")])
        await service.start()
        now_s = asyncio.get_running_loop().time()
        slow = InferenceRequest(now_s, 60_000, key_name="slow")
        with service.offer_group(slow) as group:
            with group.offer(slow):
                pass
            with pytest.raises(RateLimited, match=r"is 0\.001 images/s") as refused:
                group.offer(slow)
        assert 900 < int(refused.value.headers["Retry-After"]) <= 1000
        with pytest.raises(RateLimited), service.offer_group(slow):
            raise AssertionError("it must not be uploaded")
        for name in ("free", None):
            for _ in range(5):
                with (
                    suppress(RequestError),
                    service.offer(InferenceRequest(now_s, 60_000, key_name=name)),
                ):
                    pass
        await service.stop()
        return service.metrics.exposition()[0].decode()

    text = asyncio.run(scenario())
    assert 'pcae_requests_total{outcome="rejected_rate"} 2.0' in text
    assert 'pcae_caller_requests_total{caller="slow",outcome="rejected_rate"} 2.0' in text
    assert 'pcae_caller_requests_total{caller="free",outcome="cancelled"} 5.0' in text
