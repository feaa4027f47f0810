"""Bodies that are being received: room, rates, and who makes room for whom."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pcae_serve.errors import Dropped, Overloaded, UploadTimeout
from pcae_serve.observability.outcomes import Outcome
from pcae_serve.runtime import uploads
from pcae_serve.runtime.refusals import Refused
from pcae_serve.runtime.uploads import Upload, Uploads

HOUR_S = 3600.0


async def never(_: Upload) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


def begin(
    registry: Uploads, read: Callable[[Upload], Awaitable[bytes]], length: int = 1000
) -> asyncio.Task[bytes]:
    until_s = asyncio.get_running_loop().time() + HOUR_S
    return asyncio.create_task(registry.receive(read, length=length, until_s=until_s))


async def refusal(upload: asyncio.Task[bytes]) -> tuple[type[Exception], Outcome]:
    with pytest.raises(Refused) as refused:
        await upload
    error, outcome = refused.value.refusal
    return type(error), outcome


def test_an_upload_is_behind_by_what_its_rate_should_have_brought() -> None:
    async def scenario() -> None:
        upload = Upload(100.0, 1000.0)
        assert upload.lag_s(101.0) == 1.0
        upload.add(500)
        assert upload.lag_s(101.0) == 0.5
        assert upload.lag_s(101.0, bytes_s=250.0) == -1.0

    asyncio.run(scenario())


def test_a_body_is_returned_and_its_place_is_free_again() -> None:
    async def scenario() -> None:
        registry = Uploads(1, 1e4)

        async def read(upload: Upload) -> bytes:
            assert len(registry) == 1
            upload.add(4)
            return b"body"

        for _ in range(3):
            assert await begin(registry, read) == b"body"
        assert len(registry) == 0

    asyncio.run(scenario())


def test_an_error_of_the_reader_is_raised_and_its_place_is_free_again() -> None:
    async def scenario() -> None:
        registry = Uploads(1, 1e4)

        async def fail(_: Upload) -> bytes:
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await begin(registry, fail)
        assert len(registry) == 0

    asyncio.run(scenario())


def test_a_new_upload_drops_the_one_that_is_furthest_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_S", 0.0)

    async def scenario() -> None:
        registry = Uploads(2, 1e4)
        go_on = asyncio.Event()

        async def half_done(upload: Upload) -> bytes:
            upload.add(500_000)
            await go_on.wait()
            return b"body"

        diligent = begin(registry, half_done, 1_000_000)
        await asyncio.sleep(0)
        idle = begin(registry, never)
        await asyncio.sleep(0.01)
        new = begin(registry, half_done, 1_000_000)
        assert await refusal(idle) == (Dropped, Outcome.DROPPED)
        go_on.set()
        assert await diligent == await new == b"body"

    asyncio.run(scenario())


def test_without_an_upload_that_lags_a_new_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_S", HOUR_S)

    async def scenario() -> None:
        registry = Uploads(1, 1e4)
        first = begin(registry, never)
        await asyncio.sleep(0)
        assert await refusal(begin(registry, never)) == (Overloaded, Outcome.REJECTED_FULL)
        assert not first.done()
        first.cancel()
        await asyncio.wait([first])
        assert len(registry) == 0

    asyncio.run(scenario())


def test_an_upload_below_the_minimum_rate_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "CHECK_S", 0.01)
    monkeypatch.setattr(uploads, "GRACE_S", 0.1)

    async def scenario() -> None:
        registry = Uploads(10, 1e4)

        async def fast_enough(upload: Upload) -> bytes:
            upload.add(10_000_000)
            return await never(upload)

        idle, fast = begin(registry, never), begin(registry, fast_enough)
        assert await refusal(idle) == (UploadTimeout, Outcome.EXPIRED)
        assert not fast.done()
        fast.cancel()
        await asyncio.wait([fast])

    asyncio.run(scenario())
