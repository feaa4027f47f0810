"""One engine on one device, by itself: calls that hang, engines that fail and are made anew."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Engine, Output, Pixels
from pcae_serve.errors import BundleError
from pcae_serve.runtime import worker as workers
from pcae_serve.runtime.threads import Device
from pcae_serve.runtime.worker import NotFinite, Worker

WATCHDOG_S = 0.3


class Fake:
    """An engine that waits until it is told to end; `value` is all that it answers with."""

    name, version, device, threads, sizes = "fake", "1", "cpu", 0, (1,)

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.closed, self.told = value, False, threading.Event()

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        return Output(np.full((len(pixels), 4), self.value, np.float32), ())

    def terminate(self) -> None:
        self.told.set()

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERMINATE_S", "RETRY_S"):
        monkeypatch.setattr(workers, name, 0.05)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What calls wait for that do not come back: the interpreter waits for their threads."""
    release = threading.Event()
    yield release
    release.set()


class Told:
    """What a worker tells of one call."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.back = asyncio.Event()

    def ended(self, _: asyncio.Future[Any]) -> None:
        self.order.append("ended")
        self.back.set()

    def hung(self, error: TimeoutError) -> None:
        self.order.append(f"hung: {error}")


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_a_call_that_comes_back_in_time_is_told_once() -> None:
    async def scenario() -> None:
        worker, told = Worker(Fake(), Device("d"), watchdog_s=WATCHDOG_S), Told()
        worker.run(lambda: None, told.ended, told.hung)
        assert worker.busy
        await told.back.wait()
        assert not worker.busy
        await asyncio.sleep(1.2 * WATCHDOG_S)
        assert told.order == ["ended"]

    play(scenario())


@pytest.mark.parametrize("own", [False, True], ids=["the engine", "the call's own way"])
def test_a_call_that_hangs_is_told_to_end(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TERMINATE_S", 0.5)  # what the thread needs to wake up, many times

    async def scenario() -> None:
        engine, other, told = Fake(), Fake(), Told()
        worker = Worker(engine, Device("d"), watchdog_s=WATCHDOG_S)
        tells = other if own else engine
        worker.run(tells.told.wait, told.ended, told.hung, other.terminate if own else None)
        await told.back.wait()
        assert told.order == ["hung: the call did not return within 0.3 s", "ended"]
        assert (engine.told.is_set(), other.told.is_set()) == (not own, own)
        await asyncio.sleep(1.2 * workers.TERMINATE_S)
        assert worker.works

    play(scenario())


def test_a_call_that_does_not_even_end_then_loses_its_device(
    release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        engine, lost, told = Fake(), asyncio.Event(), Told()
        worker = Worker(engine, Device("d"), watchdog_s=WATCHDOG_S, on_lost=lost.set)
        worker.run(release.wait, told.ended, told.hung)
        await lost.wait()
        assert worker.lost
        assert not worker.works
        worker.close()
        assert not engine.closed  # a call is still in it

    play(scenario())
    assert "d does not return from a call" in caplog.text


def test_the_watch_begins_with_the_call_and_not_with_its_wait(release: threading.Event) -> None:
    async def scenario() -> None:
        device, told = Device("d"), Told()
        other = device.submit(release.wait)  # another bundle's batch
        Worker(Fake(), device, watchdog_s=WATCHDOG_S).run(lambda: None, told.ended, told.hung)
        await asyncio.sleep(2 * WATCHDOG_S)
        assert told.order == []
        release.set()
        await told.back.wait()
        await other
        assert told.order == ["ended"]

    play(scenario())


def makes(*steps: Engine | Exception) -> Callable[[], Engine]:
    """What comes of making an engine, by turns."""
    left = list(steps)

    def make() -> Engine:
        step = left.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    return make


@pytest.mark.parametrize("error", [MemoryError("no memory"), TimeoutError("a lock was held")])
def test_an_engine_that_cannot_be_made_is_tried_again(error: Exception) -> None:
    async def scenario() -> None:
        old, new, seen = Fake(), Fake(), list[bool]()

        def broken() -> None:
            seen.append(worker.works)

        make = makes(error, error, new)
        worker = Worker(old, Device("d"), watchdog_s=9, make=make, on_broken=broken)
        assert await worker.recreate_engine()
        assert seen == [False, False]
        assert worker.works
        assert worker.engine is new
        assert (old.closed, new.closed) == (True, False)

    play(scenario())


@pytest.mark.parametrize("make", [None, makes(BundleError("another bundle by now"))])
def test_where_there_is_no_other_engine_the_old_one_is_used_again(
    make: Callable[[], Engine] | None,
) -> None:
    async def scenario() -> None:
        old = Fake()
        worker = Worker(old, Device("d"), watchdog_s=9, make=make)
        assert await worker.recreate_engine()
        assert worker.engine is old
        assert worker.works
        assert not old.closed

    play(scenario())


def test_an_engine_whose_making_never_ends_loses_the_device(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MAKE_S", 0.05)

    def make() -> Engine:
        release.wait()
        return Fake()

    async def scenario() -> None:
        lost = list[bool]()
        worker = Worker(
            Fake(), Device("d"), watchdog_s=9, make=make, on_lost=lambda: lost.append(True)
        )
        assert not await worker.recreate_engine()
        assert lost == [True]
        assert worker.lost

    play(scenario())


def test_numbers_that_are_none_are_no_output(small_bundle: Bundle) -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    worker = Worker(Fake(3.0), Device("d"), watchdog_s=9)
    assert worker.compute(small_bundle.tiers[0], pixels).vectors.shape == (2, 4)
    worker.engine = Fake(np.nan)
    with pytest.raises(NotFinite, match="'fast'"):
        worker.compute(small_bundle.tiers[0], pixels)
