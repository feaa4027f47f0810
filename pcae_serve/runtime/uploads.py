"""Uploads, the bodies that are being received: how many, how fast, and which one is dropped.

An upload takes no place in the queue and does not count as work. Two rates apply to it: the minimum
rate, and the rate that completes its body in time. One that falls behind the first by more than
GRACE_S is ended. If there is no room for a new one, the one that is furthest behind the second is
dropped, and so are others if the memory budget runs short. What an upload holds of it is what has
arrived, not what is announced. Clients that hold their bodies back therefore do not keep others
out.
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
#: Seconds by which bytes that arrive early keep an upload from being dropped for another. A body
#: that arrives fast and then stalls is therefore not kept for long.
AHEAD_S = 1.0
#: Share of the memory budget that uploads may take. The rest is left to requests whose body is
#: complete, so that uploads cannot keep them from being decoded.
MEMORY_SHARE = 0.5
#: Interval of the check for uploads below the minimum rate.
CHECK_S = 1.0


class Upload:
    """One body that is being received."""

    def __init__(
        self,
        now_s: float,
        *,
        length: int,
        copies: int,
        until_s: float,
        min_bytes_s: float,
        reservation: Reservation,
        hold: Callable[["Upload", int], None],
    ) -> None:
        """length: as announced, or 0. copies: how many of the body are made.

        hold: makes the reservation larger, or raises Refused.
        """
        self.received_bytes, self.reservation = 0, reservation
        self.refusal: Refusal | None = None  # why it was ended
        self.timeout = asyncio.timeout(None)  # of the wait for the body
        self._start_s, self._allowed_s = now_s, max(until_s - now_s, 1e-3)
        self._length, self._copies, self._min_bytes_s = length, copies, min_bytes_s
        self._hold = hold
        self._on_time_until_s = now_s

    def add(self, count: int) -> None:
        """Count bytes that have arrived. Raises Refused if they do not fit into memory."""
        if self.refusal is not None:
            raise Refused(self.refusal)
        self.received_bytes += count
        in_time_bytes_s = max(self._length, self.received_bytes) / self._allowed_s
        seconds = count / max(self._min_bytes_s, in_time_bytes_s)
        ahead_s = asyncio.get_running_loop().time() + AHEAD_S
        self._on_time_until_s = min(self._on_time_until_s + seconds, ahead_s)
        self._hold(self, self.received_bytes * self._copies)

    def lag_s(self, now_s: float) -> float:
        """Return the seconds by which the body is behind the rate that completes it in time."""
        return now_s - self._on_time_until_s

    def is_too_slow(self, now_s: float) -> bool:
        """Return whether the body is behind the minimum rate by more than GRACE_S."""
        return now_s - self._start_s - self.received_bytes / self._min_bytes_s > GRACE_S

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
        memory.reclaim = self.reclaim
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
        self._require_memory(length * copies)
        self._make_room(now_s)
        upload = Upload(
            now_s,
            length=length,
            copies=copies,
            until_s=until_s,
            min_bytes_s=self._min_bytes_s,
            reservation=reservation,
            hold=self._hold,
        )
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

    def _require_memory(self, count: int, held: int = 0) -> None:
        """Raise Refused if there is no room for `count` bytes, of which `held` are held already.

        Reserves nothing.
        """
        if count > self._share_bytes:
            raise Refused(refusals.over_memory(count, self._share_bytes))
        if (missing_bytes := count - held - self._free_bytes) > 0:
            self.reclaim(missing_bytes)
        if count - held > self._free_bytes:
            raise Refused(refusals.memory_full())

    def _hold(self, upload: Upload, count: int) -> None:
        """Have an upload hold `count` bytes instead of fewer. Raises Refused if they do not fit."""
        held = upload.reservation.held_bytes
        self._require_memory(count, held)
        if upload.refusal is not None or not upload.reservation.try_resize(count):
            raise Refused(upload.refusal or refusals.memory_full())
        self._held_bytes += count - held

    @property
    def _share_bytes(self) -> int:
        return int(MEMORY_SHARE * self._memory.limit_bytes)

    @property
    def _free_bytes(self) -> int:
        """Bytes that uploads may take in addition to those that they hold."""
        return min(self._memory.free_bytes, self._share_bytes - self._held_bytes)

    def reclaim(self, missing_bytes: int) -> None:
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
            if upload.is_too_slow(now_s):
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
