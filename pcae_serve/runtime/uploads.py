"""Bodies that are being received: how many at once, how fast, and which one makes room for another.

An upload takes no place in the queue and does not count as work. Two rates apply to it: the minimum
rate, and the rate that completes its body in time. One that falls behind the first by more than
GRACE_S is ended. If there is no room for a new one, the one that is furthest behind the second is
dropped, and so are others if the memory budget runs short. Clients that hold their bodies back
therefore do not keep others out.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pcae_serve.runtime import refusals
from pcae_serve.runtime.memory_budget import MemoryBudget, Reservation
from pcae_serve.runtime.refusals import Refusal, Refused

T = TypeVar("T")

#: Seconds by which an upload may be behind the minimum rate.
GRACE_S = 5.0
#: Seconds by which an upload has to be behind its own rate to be dropped for another: several round
#: trips, so that a body which its client sends at once is safe.
PATIENCE_S = 0.25
#: Share of the memory budget that uploads may take. The rest is left to requests whose body is
#: complete, so that uploads cannot keep them from being decoded.
MEMORY_SHARE = 0.5
#: Interval of the check for uploads below the minimum rate.
CHECK_S = 1.0


class Upload:
    """One body that is being received."""

    def __init__(
        self,
        start_s: float,
        bytes_s: float,
        copies: int,
        reservation: Reservation,
        hold: Callable[["Upload", int], None],
    ) -> None:
        """bytes_s: the rate that completes the body in time. copies: how many of the body are made.

        hold: makes the reservation larger, or raises Refused.
        """
        self.start_s, self.bytes_s, self.received_bytes = start_s, bytes_s, 0
        self.reservation = reservation
        self._copies, self._hold = copies, hold
        self.refusal: Refusal | None = None  # why it was ended
        self.timeout = asyncio.timeout(None)  # of the wait for the body

    def add(self, count: int) -> None:
        """Count bytes that have arrived. Raises Refused if they do not fit into memory."""
        if self.refusal is not None:
            raise Refused(self.refusal)
        self.received_bytes += count
        needed_bytes = self.received_bytes * self._copies
        if needed_bytes > self.reservation.held_bytes:  # the length was not announced
            self._hold(self, needed_bytes)

    def lag_s(self, now_s: float, bytes_s: float | None = None) -> float:
        """Return the seconds by which the body is behind a rate, by default its own."""
        return now_s - self.start_s - self.received_bytes / (bytes_s or self.bytes_s)

    def end(self, refusal: Refusal) -> None:
        """End the wait for the body now; its bytes are free."""
        self.refusal = refusal
        self.reservation.release()
        self.timeout.reschedule(asyncio.get_running_loop().time())


class Uploads:
    """The bodies that are being received at the moment."""

    def __init__(self, limit: int, min_bytes_s: float, memory: MemoryBudget) -> None:
        """limit: how many at once. min_bytes_s: minimum rate of each."""
        self._limit, self._min_bytes_s, self._memory = limit, min_bytes_s, memory
        memory.reclaim = self._reclaim
        self._uploads, self._held_bytes = set[Upload](), 0
        self._checking = False

    def __len__(self) -> int:
        return len(self._uploads)

    async def receive(
        self,
        read: Callable[[Upload], Awaitable[T]],
        reservation: Reservation,
        *,
        length: int,
        copies: int,
        until_s: float,
    ) -> T:
        """Await a body of `length` bytes (0: unknown) that should be complete at `until_s`.

        read: reads the body and counts its bytes with `Upload.add`. reservation: of what the body
        takes, in `copies`; it stays with the caller. The limit `until_s` is up to the caller.
        Raises Refused if there is no room or the body is too slow, and what `read` raises.
        """
        now_s = asyncio.get_running_loop().time()
        self._make_room(now_s)
        bytes_s = max(self._min_bytes_s, length / max(until_s - now_s, 1e-3))
        upload = Upload(now_s, bytes_s, copies, reservation, self._hold)
        self._hold(upload, length * copies)
        self._uploads.add(upload)
        self._check_later()
        try:
            async with upload.timeout:
                return await read(upload)
        except TimeoutError:
            if upload.refusal is None:
                raise
            raise Refused(upload.refusal) from None
        finally:
            self._forget(upload)

    def _make_room(self, now_s: float) -> None:
        """Drop the upload that is furthest behind if the limit is reached. Raises Refused."""
        if len(self._uploads) < self._limit:
            return
        slowest = max(self._uploads, key=lambda upload: upload.lag_s(now_s))
        if slowest.lag_s(now_s) < PATIENCE_S:
            raise Refused(refusals.uploads_full(self._limit))
        self._end(slowest, refusals.upload_dropped())

    def _hold(self, upload: Upload, count: int) -> None:
        """Have an upload hold `count` bytes. Raises Refused if they do not fit."""
        share_bytes = int(MEMORY_SHARE * self._memory.limit_bytes)
        if count > share_bytes:
            raise Refused(refusals.over_memory(count, share_bytes))
        more = count - upload.reservation.held_bytes
        if self._held_bytes + more > share_bytes:
            self._reclaim(self._held_bytes + more - share_bytes)
        fits = self._held_bytes + more <= share_bytes and upload.reservation.try_resize(count)
        if not fits or upload.refusal is not None:
            raise Refused(upload.refusal or refusals.memory_full())
        self._held_bytes += more

    def _reclaim(self, missing_bytes: int) -> None:
        """Drop uploads that are behind, the furthest first, if that frees the missing bytes."""
        now_s = asyncio.get_running_loop().time()
        lagging = [
            upload
            for upload in self._uploads
            if upload.reservation.held_bytes and upload.lag_s(now_s) >= PATIENCE_S
        ]
        if sum(upload.reservation.held_bytes for upload in lagging) < missing_bytes:
            return
        for upload in sorted(lagging, key=lambda upload: upload.lag_s(now_s), reverse=True):
            if missing_bytes <= 0:
                break
            missing_bytes -= upload.reservation.held_bytes
            self._end(upload, refusals.upload_dropped())

    def _check_later(self) -> None:
        if not self._checking and self._uploads:
            self._checking = True
            asyncio.get_running_loop().call_later(CHECK_S, self._check)

    def _check(self) -> None:
        """End the uploads that are below the minimum rate."""
        self._checking = False
        now_s = asyncio.get_running_loop().time()
        for upload in list(self._uploads):
            if upload.lag_s(now_s, self._min_bytes_s) > GRACE_S:
                self._end(upload, refusals.upload_too_slow(self._min_bytes_s))
        self._check_later()

    def _end(self, upload: Upload, refusal: Refusal) -> None:
        self._forget(upload)
        upload.end(refusal)

    def _forget(self, upload: Upload) -> None:
        """Stop counting an upload, which has ended, among those in progress."""
        if upload in self._uploads:
            self._uploads.remove(upload)
            self._held_bytes -= upload.reservation.held_bytes
