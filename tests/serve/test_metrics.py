import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pcae_serve.bundle import Bundle, Tier
from pcae_serve.engines import Output, Pixels
from pcae_serve.errors import RequestError
from pcae_serve.metrics import WASTE, Metrics, Outcome
from pcae_serve.service import Ask, Service
from pcae_serve.settings import Settings
from tests.serve.conftest import image_bytes

MakeSettings = Callable[..., Settings]


def read(metrics: Metrics, name: str) -> dict[str, float]:
    """A counter's values by its only label, as Prometheus would read them."""
    content, media_type = metrics.exposition()
    assert media_type.startswith("text/plain")
    return {
        next(iter(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
        if sample.name == name
    }


def test_every_series_is_there_from_the_start() -> None:
    metrics = Metrics(["fast", "full"])
    assert read(metrics, "pcae_requests_total") == dict.fromkeys(Outcome, 0)
    assert read(metrics, "pcae_compute_seconds_total") == {"fast": 0, "full": 0}
    assert read(metrics, "pcae_wasted_compute_seconds_total") == dict.fromkeys(WASTE, 0)


def test_there_are_no_series_but_the_counters() -> None:
    content, _ = Metrics(["fast", "full"]).exposition()
    samples = [line for line in content.decode().splitlines() if not line.startswith("#")]
    assert len(samples) == len(Outcome) + 2 + len(WASTE)
    assert b"_created" not in content
    plain = CollectorRegistry()
    Counter("others", "Somebody else's, in this process.", registry=plain)
    assert b"others_created" in generate_latest(plain)  # theirs to decide


def test_two_services_in_one_process_do_not_add_up() -> None:
    one, other = Metrics(["fast"]), Metrics(["fast"])
    one.ended(Outcome.IN_TIME)
    assert read(one, "pcae_requests_total")["in_time"] == 1
    assert read(other, "pcae_requests_total")["in_time"] == 0


def test_no_second_is_wasted_twice() -> None:
    metrics = Metrics(["fast", "full"])
    metrics.spent("full", 8.0, batch=6, late=3, cancelled=1, padding=2)
    metrics.spent("full", 1.0, batch=1, late=0, cancelled=0, padding=0)
    assert read(metrics, "pcae_compute_seconds_total") == {"fast": 0, "full": 9}
    wasted = read(metrics, "pcae_wasted_compute_seconds_total")
    assert wasted == {"late": 3, "cancelled": 1, "padding": 2}


class Bucketed:
    """An engine that fills every batch up to four, and fails or dawdles when told to."""

    name, version, device, threads = "bucketed", "1", "cpu", 0
    sizes = (1,)

    def terminate(self) -> None:
        """It is let through, not stopped."""

    def close(self) -> None:
        """Nothing to give back."""

    def __init__(self) -> None:
        self.fails, self.seconds, self.entered = False, 0.002, threading.Event()

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        self.entered.set()
        if self.fails:
            raise RuntimeError("out of memory")
        time.sleep(self.seconds)
        return Output(np.zeros((len(pixels), 4), np.float32), (), padding=4 - len(pixels) % 4)


def test_every_end_of_a_request_is_counted_once(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    engine = Bucketed()
    service = Service(settings(profile_s=0.05), small_bundle, [engine])

    async def ask(budget_ms: float, body: bytes = image_bytes(), reads_s: float = 0.0) -> None:
        async def read() -> bytes:
            await asyncio.sleep(reads_s)
            return body

        with contextlib.suppress(RequestError):
            await service.answer(Ask(asyncio.get_running_loop().time(), budget_ms), read)

    async def scenario() -> None:
        await ask(1000)  # before the start
        await service.start()
        await ask(10_000)
        await ask(0.001)
        await ask(10_000, b"no image")
        await ask(60, reads_s=9)  # it uploads too long
        engine.seconds = 0.5
        await ask(200)  # nobody could know
        engine.fails = True
        await ask(10_000)
        engine.fails = False
        engine.entered.clear()
        leaving = asyncio.create_task(ask(10_000))
        await asyncio.to_thread(engine.entered.wait, 20)
        leaving.cancel()
        while not read(service.metrics, "pcae_wasted_compute_seconds_total")["cancelled"]:
            await asyncio.sleep(0.02)
        await service.stop()

    asyncio.run(scenario())
    ends = read(service.metrics, "pcae_requests_total")
    assert {end: count for end, count in ends.items() if count} == {
        "refused_draining": 1,
        "in_time": 1,
        "refused_budget": 1,
        "unreadable": 1,
        "expired": 1,
        "late": 1,
        "failed": 1,
        "left": 1,
    }
    spent = read(service.metrics, "pcae_compute_seconds_total")
    wasted = read(service.metrics, "pcae_wasted_compute_seconds_total")
    total_s = sum(spent.values())
    assert total_s == pytest.approx(1.0, rel=0.2)  # two batches of half a second, one short one
    assert wasted["padding"] == pytest.approx(0.75 * total_s)  # of each batch, three rows in four
    assert wasted["late"] == pytest.approx(0.125, rel=0.2)
    assert wasted["cancelled"] == pytest.approx(0.125, rel=0.2)
