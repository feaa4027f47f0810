"""Bodies that are being received: how many at once, how fast, and which one makes room for another.

An upload takes no place in the queue and does not count as work. Two rates apply to it: the minimum
rate, and the rate that completes its body in time. One that falls behind the first by more than
GRACE_S is ended. If there is no room for a new one, the one that is furthest behind the second is
dropped. Clients that hold their bodies back therefore do not keep others out.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pcae_serve.runtime import refusals
from pcae_serve.runtime.refusals import Refusal, Refused

T = TypeVar("T")

#: Seconds by which an upload may be behind the minimum rate.
GRACE_S = 5.0
#: Seconds by which an upload has to be behind its own rate to be dropped for another: several round
#: trips, so that a body which its client sends at once is safe.
PATIENCE_S = 0.25
#: Interval of the check for uploads below the minimum rate.
CHECK_S = 1.0


class Upload:
    """One body that is being received."""

    def __init__(self, start_s: float, bytes_s: float) -> None:
        """bytes_s: the rate that completes the body in time."""
        self.start_s, self.bytes_s, self.received_bytes = start_s, bytes_s, 0
        self.refusal: Refusal | None = None  # why it was ended
        self.timeout = asyncio.timeout(None)  # of the wait for the body

    def add(self, count: int) -> None:
        """Count bytes that have arrived."""
        self.received_bytes += count

    def lag_s(self, now_s: float, bytes_s: float | None = None) -> float:
        """Return the seconds by which the body is behind a rate, by default its own."""
        return now_s - self.start_s - self.received_bytes / (bytes_s or self.bytes_s)

    def end(self, refusal: Refusal) -> None:
        """End the wait for the body now."""
        self.refusal = refusal
        self.timeout.reschedule(asyncio.get_running_loop().time())


class Uploads:
    """The bodies that are being received at the moment."""

    def __init__(self, limit: int, min_bytes_s: float) -> None:
        """limit: how many at once. min_bytes_s: minimum rate of each."""
        self._limit, self._min_bytes_s = limit, min_bytes_s
        self._uploads = set[Upload]()
        self._checking = False

    def __len__(self) -> int:
        return len(self._uploads)

    async def receive(
        self, read: Callable[[Upload], Awaitable[T]], *, length: int, until_s: float
    ) -> T:
        """Await a body of `length` bytes (0: unknown) that should be complete at `until_s`.

        read: reads the body and counts its bytes with `Upload.add`. The limit `until_s` is up to
        the caller. Raises Refused if there is no room or the body is too slow, and what `read`
        raises.
        """
        now_s = asyncio.get_running_loop().time()
        self._make_room(now_s)
        in_time_bytes_s = length / max(until_s - now_s, 1e-3)
        upload = Upload(now_s, max(self._min_bytes_s, in_time_bytes_s))
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
            self._uploads.discard(upload)

    def _make_room(self, now_s: float) -> None:
        """Drop the upload that is furthest behind if the limit is reached. Raises Refused."""
        if len(self._uploads) < self._limit:
            return
        slowest = max(self._uploads, key=lambda upload: upload.lag_s(now_s))
        if slowest.lag_s(now_s) < PATIENCE_S:
            raise Refused(refusals.uploads_full(self._limit))
        self._end(slowest, refusals.upload_dropped())

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
        self._uploads.discard(upload)
        upload.end(refusal)
