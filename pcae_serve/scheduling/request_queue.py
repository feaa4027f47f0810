"""A queue of requests by deadline, with sorted views by tier.

A request is in several sorted lists at once (all requests, one per tier that it allows, one for its
cheapest tier, one for its caller), so that no decision has to filter or copy the queue.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the scheduler sees it. Times are seconds of one monotonic clock."""

    id: int
    arrival_s: float  # when its headers were parsed
    deadline_s: float  # arrival plus budget
    tiers: tuple[int, ...]  # allowed tiers, the cheapest first, never empty
    decode_s: float = 0.0  # predicted seconds of decoding it on an idle server
    ready_s: float = 0.0  # predicted time at which it will be decoded; it cannot run before
    caller: str = ""  # who sent it, see shares.py; empty: unknown
    max_looks: int = 1  # how often it may run at most, see second_looks.py

    @property
    def budget_s(self) -> float:
        return self.deadline_s - self.arrival_s


#: Sort key of every list: earliest deadline first, then oldest request first.
urgency = attrgetter("deadline_s", "id")
_deadline = attrgetter("deadline_s")


class Queue:
    """Requests by deadline. Lookup and counting are O(log n); adding and removing shift a list."""

    def __init__(self) -> None:
        self._all: list[Request] = []
        self._allowing: dict[int, list[Request]] = {}
        self._cheapest: dict[int, list[Request]] = {}
        self._callers: dict[str, list[Request]] = {}
        self._by_id: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._all)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._by_id

    @property
    def by_deadline(self) -> Sequence[Request]:
        """All requests, the earliest deadline first. A view; do not modify it."""
        return self._all

    def allowing(self, tier: int) -> Sequence[Request]:
        """Return the requests that allow `tier`, the earliest deadline first. A view."""
        return self._allowing.get(tier, ())

    @property
    def tiers(self) -> Sequence[int]:
        """Tiers that any request allows, the cheapest first."""
        return sorted(tier for tier, requests in self._allowing.items() if requests)

    @property
    def by_cheapest(self) -> dict[int, list[Request]]:
        """Requests by the cheapest tier that they allow, each list by deadline. A view."""
        return self._cheapest

    @property
    def by_caller(self) -> Mapping[str, Sequence[Request]]:
        """Requests by caller, each list by deadline; no caller without requests. A view."""
        return self._callers

    @property
    def cheapest_tiers(self) -> set[int]:
        """Return the cheapest allowed tiers of the requests in the queue."""
        return {tier for tier, requests in self._cheapest.items() if requests}

    def add(self, request: Request) -> None:
        self._by_id[request.id] = request
        for requests in self._lists(request):
            requests.insert(bisect_left(requests, urgency(request), key=urgency), request)

    def remove(self, id_: int) -> Request | None:
        """Remove and return a request, or None if it is not in the queue."""
        request = self._by_id.pop(id_, None)
        if request is not None:
            for requests in self._lists(request):
                del requests[bisect_left(requests, urgency(request), key=urgency)]
            if not self._callers[request.caller]:
                del self._callers[request.caller]  # callers are many, unlike tiers
        return request

    def _lists(self, request: Request) -> Iterator[list[Request]]:
        yield self._all
        yield self._cheapest.setdefault(request.tiers[0], [])
        yield self._callers.setdefault(request.caller, [])
        for tier in request.tiers:
            yield self._allowing.setdefault(tier, [])


def due(requests: Sequence[Request], by_s: float) -> int:
    """Return how many of `requests`, sorted by deadline, are due at `by_s` or before."""
    return bisect_right(requests, by_s, key=_deadline)
