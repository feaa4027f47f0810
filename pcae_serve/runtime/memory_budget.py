"""One budget of bytes over all requests: bodies, what decoding takes, pixels that wait.

    budget.reserve() -> Reservation of 0 bytes -> try_resize(...) ... -> released, once

What does not fit is refused at once. No request waits for bytes while it holds others, so that no
two requests wait for each other.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from types import TracebackType
from typing import Self


class MemoryBudget:
    """The bytes that requests may hold together."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self.peak_bytes = 0  # most that was used since it was last set
        #: Called with the bytes that are missing; may release reservations.
        self.reclaim: Callable[[int], None] = lambda _: None

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)

    def reserve(self) -> "Reservation":
        """Return a reservation of 0 bytes."""
        return Reservation(self)


class Reservation:
    """The bytes that one request, or one part of the server, holds; a context manager."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.held_bytes = 0
        self._budget, self._released = budget, False

    def try_resize(self, count: int) -> bool:
        """Hold `count` bytes instead of those held now; return False if they do not fit.

        A smaller number always fits. After `release` nothing is held, and nothing fits.
        """
        more = count - self.held_bytes
        if more > self._budget.free_bytes and not self._released:
            self._budget.reclaim(more - self._budget.free_bytes)
        if self._released or (more > 0 and more > self._budget.free_bytes):
            return False
        self._budget.used_bytes += more
        self._budget.peak_bytes = max(self._budget.peak_bytes, self._budget.used_bytes)
        self.held_bytes = count
        return True

    def release(self) -> None:
        """Return all bytes to the budget. May be called more than once."""
        self._budget.used_bytes -= self.held_bytes
        self.held_bytes, self._released = 0, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class AnswerReservation(Reservation):
    """The bytes of an answer that outlives its request.

    They are released once it has been sent, or forgotten because its client left.
    """

    def __del__(self) -> None:
        self.release()


class ParallelWork:
    """What work takes of which at most `parallel` pieces run at a time: its largest pieces.

    The pieces that wait take nothing yet, so the bytes of the `parallel` largest ones are an upper
    bound of what all of them take at any time.
    """

    def __init__(self, budget: MemoryBudget, parallel: int) -> None:
        self._reservation, self._parallel = budget.reserve(), parallel
        self._pieces = list[int]()  # ascending

    def try_add(self, count: int) -> bool:
        """Add a piece of `count` bytes; return False if it does not fit."""
        insort(self._pieces, count)
        if self._resize():
            return True
        self._remove(count)
        return False

    def remove(self, count: int) -> None:
        """Remove a piece of `count` bytes that was added."""
        self._remove(count)
        self._resize()

    def _resize(self) -> bool:
        return self._reservation.try_resize(sum(self._pieces[-self._parallel :]))

    def _remove(self, count: int) -> None:
        del self._pieces[bisect_left(self._pieces, count)]
