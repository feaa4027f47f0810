"""Decoding as a bounded resource."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.decode_cost import DecodeCost
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import UnreadableImage, UnsupportedType
from pcae_serve.runtime.decoders import Decoders
from pcae_serve.runtime.memory_budget import MemoryBudget
from pcae_serve.runtime.refusals import Refused
from tests.support.images import image_bytes

PREPROCESS = Preprocess(image_size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3)
BODY = image_bytes(level=7, size=(400, 400))  # for a thread
TINY = image_bytes(level=7)


def decoders(memory: MemoryBudget | None = None) -> Decoders:
    return Decoders(2, max_pixels=1_000_000, memory=memory or MemoryBudget(10**9))


def ended() -> None:
    """Nothing is held."""


@pytest.mark.parametrize("body", [TINY, BODY])
def test_pixels_of_an_image(body: bytes) -> None:
    async def scenario() -> None:
        subject = decoders()
        pixels = await subject.decode(PREPROCESS, body, subject.predict(PREPROCESS, body), ended)
        np.testing.assert_array_equal(pixels, PREPROCESS(body))
        assert await subject.shutdown(5.0)

    asyncio.run(scenario())


def test_only_a_tiny_image_is_decoded_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    where, decode = list[int](), Preprocess.__call__

    def noting(self: Preprocess, body: bytes, *limits: Any) -> Any:
        where.append(threading.get_ident())
        return decode(self, body, *limits)

    monkeypatch.setattr(Preprocess, "__call__", noting)

    async def scenario() -> None:
        subject = decoders()
        for body in (TINY, BODY):
            await subject.decode(PREPROCESS, body, subject.predict(PREPROCESS, body), ended)
        await subject.shutdown(5.0)

    asyncio.run(scenario())
    assert [thread == threading.get_ident() for thread in where] == [True, False]


def test_a_tiny_image_holds_nothing_when_it_cannot_be_read() -> None:
    ends = list[str]()

    async def scenario() -> None:
        memory = MemoryBudget(10**9)
        subject = decoders(memory)
        cost = subject.predict(PREPROCESS, TINY)
        call = subject.decode(PREPROCESS, TINY[:45], cost, lambda: ends.append("x"))
        with pytest.raises(UnreadableImage):
            await call
        assert not subject.busy(cost)
        assert memory.used_bytes == 0
        await subject.shutdown(5.0)

    asyncio.run(scenario())
    assert ends == ["x"]


def test_the_wait_is_the_work_ahead_and_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stuck(*_: Any) -> None:
        release.wait(20)

    monkeypatch.setattr(Preprocess, "__call__", stuck)

    async def scenario() -> None:
        subject = decoders()
        cost = subject.predict(PREPROCESS, BODY)
        alone = subject.wait_s(cost)
        assert alone == pytest.approx(cost.seconds)
        calls = [subject.decode(PREPROCESS, BODY, cost, ended) for _ in range(4)]
        assert subject.wait_s(cost) == pytest.approx(3 * alone)
        calls[3].cancel()
        while subject.wait_s(cost) > 2.6 * alone:  # one that nothing awaits is forgotten
            await asyncio.sleep(0.001)
        release.set()
        await asyncio.gather(*calls, return_exceptions=True)
        await subject.shutdown(5.0)

    asyncio.run(scenario())


def test_predictions_follow_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcae_serve.runtime.decoders.MEMORY_S", 1e-9)

    async def scenario() -> None:
        subject = decoders()
        cost = subject.predict(PREPROCESS, BODY)
        clock = SimpleNamespace(monotonic=iter([1.0, 1.0 + 3 * cost.seconds]).__next__)
        monkeypatch.setattr("pcae_serve.runtime.decoders.time", clock)
        await subject.decode(PREPROCESS, BODY, cost, ended)
        assert subject.wait_s(cost) == pytest.approx(3 * cost.seconds, rel=0.01)
        await subject.shutdown(5.0)

    asyncio.run(scenario())


def test_a_large_image_that_is_cut_off_took_at_least_that_long() -> None:
    """Otherwise images that never finish would be admitted again and again."""
    subject = decoders()
    large = DecodeCost(seconds=1.0, bytes=1 << 30)
    subject._took(large, 0.5, finished=False)  # its client left
    assert subject.wait_s(large) == pytest.approx(1.0)
    subject._took(large, 7.0, finished=False)
    assert subject.wait_s(large) > 2
    assert subject.idle_s(large) == 1.0


def test_an_unreadable_header_is_refused_before_decoding() -> None:
    subject = decoders()
    with pytest.raises(UnsupportedType):
        subject.predict(PREPROCESS, b"text")
    with pytest.raises(UnreadableImage):
        subject.predict(PREPROCESS, BODY[:20])


def test_its_memory_is_free_when_no_thread_works_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling the wait for pixels does not end a thread that decodes them."""
    entered, release = threading.Event(), threading.Event()

    def stuck(*_: Any) -> None:
        entered.set()
        release.wait(20)

    monkeypatch.setattr(Preprocess, "__call__", stuck)

    async def scenario() -> None:
        cost = decoders().predict(PREPROCESS, BODY)
        memory = MemoryBudget(2 * cost.bytes)
        subject, ends = decoders(memory), list[int]()
        calls = [
            subject.decode(PREPROCESS, BODY, cost, lambda i=i: ends.append(i))  # type: ignore[misc]
            for i in range(4)
        ]
        assert memory.used_bytes == 2 * cost.bytes  # two are decoded at a time
        await asyncio.to_thread(entered.wait, 20)
        for call in calls:
            call.cancel()
        while len(ends) < 2:
            await asyncio.sleep(0.001)
        assert set(ends) == {2, 3}  # they never started
        assert memory.used_bytes == 2 * cost.bytes
        other = memory.reserve()
        assert not other.try_resize(1)
        release.set()
        while memory.used_bytes:
            await asyncio.sleep(0.001)
        assert sorted(ends) == [0, 1, 2, 3]
        await subject.shutdown(5.0)
        assert other.try_resize(memory.limit_bytes)
        with pytest.raises(Refused):
            subject.decode(PREPROCESS, BODY, cost, ended)

    asyncio.run(scenario())


def test_a_large_image_does_not_delay_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoded in a process, with equal pixels."""
    monkeypatch.setattr("pcae_serve.runtime.decoders.THREAD_S", 0.01)
    large = image_bytes(level=9, size=(2000, 2000))

    async def scenario() -> None:
        subject = Decoders(1, max_pixels=5_000_000, memory=MemoryBudget(10**9))
        costs = {body: subject.predict(PREPROCESS, body) for body in (large, BODY)}
        calls = [subject.decode(PREPROCESS, large, costs[large], ended) for _ in range(3)]
        assert subject.busy(costs[large])
        assert not subject.busy(costs[BODY])
        assert subject.wait_s(costs[BODY]) == pytest.approx(costs[BODY].seconds)
        assert subject.wait_s(costs[large]) == pytest.approx(4 * costs[large].seconds)
        await subject.decode(PREPROCESS, BODY, costs[BODY], ended)
        for call in calls:
            np.testing.assert_array_equal(await call, PREPROCESS(large))
        assert await subject.shutdown(5.0)

    asyncio.run(scenario())


def test_a_cancelled_image_frees_its_place_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcae_serve.runtime.decoders.THREAD_S", 0.0)
    ends = list[str]()

    async def scenario() -> None:
        memory = MemoryBudget(10**9)
        subject = decoders(memory)
        cost = subject.predict(PREPROCESS, BODY)
        calls = [subject.decode(PREPROCESS, BODY, cost, lambda: ends.append("x")) for _ in "abc"]
        await asyncio.sleep(0)  # they have begun
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert not subject.busy(cost)
        assert memory.free_bytes == memory.limit_bytes
        assert await subject.shutdown(5.0)

    asyncio.run(scenario())
    assert ends == ["x"] * 3
