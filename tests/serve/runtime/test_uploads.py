"""Bodies that are being received: room, rates, and who makes room for whom."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pcae_serve.errors import Dropped, Overloaded, TooLarge, UploadTimeout
from pcae_serve.observability.outcomes import Outcome
from pcae_serve.runtime import uploads
from pcae_serve.runtime.memory_budget import MemoryBudget, Reservation
from pcae_serve.runtime.refusals import Refused
from pcae_serve.runtime.uploads import Upload, Uploads

HOUR_S = 3600.0


async def never(_: Upload) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


def registry_of(
    limit: int, memory: MemoryBudget | None = None, min_bytes_s: float = 1e4
) -> Uploads:
    return Uploads(limit, min_bytes_s, memory or MemoryBudget(1_000_000_000))


def begin(
    registry: Uploads,
    read: Callable[[Upload], Awaitable[bytes]],
    length: int = 1000,
    reservation: Reservation | None = None,
    copies: int = 1,
) -> asyncio.Task[bytes]:
    until_s = asyncio.get_running_loop().time() + HOUR_S
    held = reservation or MemoryBudget(1_000_000_000).reserve()
    upload = registry.receive(read, held, length=length, copies=copies, until_s=until_s)
    return asyncio.create_task(upload)


async def refusal(upload: asyncio.Task[bytes]) -> tuple[type[Exception], Outcome]:
    with pytest.raises(Refused) as refused:
        await upload
    error, outcome = refused.value.refusal
    return type(error), outcome


def test_an_upload_is_behind_by_what_its_rate_should_have_brought() -> None:
    async def scenario() -> None:
        now_s = asyncio.get_running_loop().time()
        memory = MemoryBudget(0)

        def upload(length: int, min_bytes_s: float = 10.0) -> Upload:
            return Upload(
                now_s,
                length=length,
                copies=1,
                until_s=now_s + 10.0,
                min_bytes_s=min_bytes_s,
                reservation=memory.reserve(),
                hold=lambda *_: None,
            )

        announced, chunked, early = upload(10_000), upload(0), upload(10_000)
        assert announced.lag_s(now_s + 1.0) == pytest.approx(1.0)
        announced.add(500)  # of 1,000 a second
        assert announced.lag_s(now_s + 1.0) == pytest.approx(0.5)
        assert not announced.is_too_slow(now_s + 54.9)
        assert announced.is_too_slow(now_s + 55.1)
        chunked.add(500)  # at least 50 a second, as so much arrived
        chunked.add(1500)
        assert -uploads.AHEAD_S - 0.1 < chunked.lag_s(now_s) < -0.9
        early.add(9_000)  # it is not ahead by 9 s
        assert early.lag_s(now_s + 2.0) > 0.9

    asyncio.run(scenario())


def test_a_body_is_returned_and_its_place_is_free_again() -> None:
    async def scenario() -> None:
        registry = registry_of(1)

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
        registry = registry_of(1)

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
        registry = registry_of(2)
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
        assert await refusal(idle) == (Dropped, Outcome.UPLOAD_FAILED)
        go_on.set()
        assert await diligent == await new == b"body"

    asyncio.run(scenario())


def test_without_an_upload_that_lags_a_new_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_S", HOUR_S)

    async def scenario() -> None:
        registry = registry_of(1)
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
        registry = registry_of(10)

        async def fast_enough(upload: Upload) -> bytes:
            upload.add(10_000_000)
            return await never(upload)

        idle, fast = begin(registry, never), begin(registry, fast_enough)
        assert await refusal(idle) == (UploadTimeout, Outcome.UPLOAD_FAILED)
        assert not fast.done()
        fast.cancel()
        await asyncio.wait([fast])

    asyncio.run(scenario())


async def whole(upload: Upload) -> bytes:
    upload.add(500)
    return b"body"


def stalled(count: int) -> Callable[[Upload], Awaitable[bytes]]:
    """A body of which only this much arrives."""

    async def read(upload: Upload) -> bytes:
        upload.add(count)
        return await never(upload)

    return read


@pytest.mark.parametrize("length", [1000, 0])
def test_a_body_holds_what_has_arrived_in_as_many_copies_as_are_made(length: int) -> None:
    async def scenario() -> None:
        memory = MemoryBudget(10_000)

        async def read(upload: Upload) -> bytes:
            assert memory.used_bytes == 0
            upload.add(700)
            assert memory.used_bytes == 1400
            upload.add(300)
            return b"body"

        with memory.reserve() as reservation:
            await begin(registry_of(10, memory), read, length, reservation, copies=2)
            assert memory.used_bytes == 2000  # the body is there
        assert memory.used_bytes == 0

    asyncio.run(scenario())


def test_uploads_leave_half_of_the_memory_to_others() -> None:
    async def scenario() -> None:
        memory = MemoryBudget(4000)
        registry = registry_of(10, memory)
        first = begin(registry, stalled(1500), 1500, memory.reserve())
        await asyncio.sleep(0)
        full = Overloaded, Outcome.REJECTED_FULL
        too_much = begin(registry, whole, 501, memory.reserve())
        assert await refusal(too_much) == full
        not_announced = begin(registry, stalled(501), 0, memory.reserve())
        assert await refusal(not_announced) == full
        for never_fits in (
            begin(registry, whole, 2001, memory.reserve()),
            begin(registry, stalled(2001), 0, memory.reserve()),
        ):
            assert await refusal(never_fits) == (TooLarge, Outcome.UNREADABLE)
        assert await begin(registry, whole, 500, memory.reserve()) == b"body"
        assert memory.reserve().try_resize(2000)
        first.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize("complete", [False, True])
def test_uploads_that_lag_are_dropped_first_if_memory_runs_short(
    monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_S", 0.0)

    async def scenario() -> None:
        memory = MemoryBudget(4000)
        registry = registry_of(10, memory, 1e9)
        idle = begin(registry, stalled(900), 1000, memory.reserve())
        later = begin(registry, stalled(900), 1000, memory.reserve())
        await asyncio.sleep(0.01)
        if complete:  # a request that needs memory for decoding
            assert memory.reserve().try_resize(3000)
        else:
            assert await begin(registry, whole, 500, memory.reserve()) == b"body"
        assert await refusal(idle) == (Dropped, Outcome.UPLOAD_FAILED)
        assert not later.done()
        later.cancel()

    asyncio.run(scenario())


def test_no_upload_is_dropped_if_that_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PATIENCE_S", 0.0)

    async def scenario() -> None:
        memory = MemoryBudget(4000)
        idle = begin(registry_of(10, memory, 1e9), stalled(900), 1000, memory.reserve())
        await asyncio.sleep(0.01)
        assert not memory.reserve().try_resize(4001)
        await asyncio.sleep(0.01)
        assert not idle.done()
        idle.cancel()

    asyncio.run(scenario())
