"""Decoding as a bounded resource."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import UnreadableImage, UnsupportedType
from pcae_serve.runtime.decoders import Decoders
from tests.support.images import image_bytes

PREPROCESS = Preprocess(image_size=8, resize=8, mean=(0.5,) * 3, std=(0.5,) * 3)
BODY = image_bytes(level=7, size=(100, 100))


def decoders() -> Decoders:
    return Decoders(2, max_pixels=1_000_000)


def test_pixels_of_an_image() -> None:
    async def scenario() -> None:
        subject = decoders()
        pixels = await subject.decode(PREPROCESS, BODY, subject.predict(PREPROCESS, BODY))
        np.testing.assert_array_equal(pixels, PREPROCESS(BODY))
        assert await subject.shutdown(5.0)

    asyncio.run(scenario())


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
        calls = [asyncio.create_task(subject.decode(PREPROCESS, BODY, cost)) for _ in range(4)]
        await asyncio.sleep(0)
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
        await subject.decode(PREPROCESS, BODY, cost)
        assert subject.wait_s(cost) == pytest.approx(3 * cost.seconds, rel=0.01)
        await subject.shutdown(5.0)

    asyncio.run(scenario())


def test_an_unreadable_header_is_refused_before_decoding() -> None:
    subject = decoders()
    with pytest.raises(UnsupportedType):
        subject.predict(PREPROCESS, b"text")
    with pytest.raises(UnreadableImage):
        subject.predict(PREPROCESS, BODY[:20])
