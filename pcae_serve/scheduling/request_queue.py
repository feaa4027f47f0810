"""The queue: requests by deadline, and sorted views of it by what they allow.

A request stands in several sorted lists at once (all, by tier it allows, by its cheapest tier), so
that nobody has to filter or copy the queue to decide. It knows no clock, no policy and no latency.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class Request:
    """What scheduling needs to know of a request. Times are seconds of one clock."""

    id: int
    arrival_s: float  # when its headers were parsed
    deadline_s: float  # arrival and budget
    tiers: tuple[int, ...]  # allowed, the cheapest first, never empty

    @property
    def budget_s(self) -> float:
        return self.deadline_s - self.arrival_s


#: The order of every list here: earliest deadline first, ties by age.
_urgency = attrgetter("deadline_s", "id")
_deadline = attrgetter("deadline_s")


class Queue:
    """Requests by deadline. O(log n) to find and count, a shift of pointers to add and remove."""

    def __init__(self) -> None:
        self._all: list[Request] = []
        self._allowing: dict[int, list[Request]] = {}
        self._cheapest: dict[int, list[Request]] = {}
        self._by_id: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._all)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._by_id

    @property
    def by_deadline(self) -> Sequence[Request]:
        """All requests, the earliest deadline first: a view, not to be changed."""
        return self._all

    def allowing(self, tier: int) -> Sequence[Request]:
        """Those that may be answered on `tier`, the earliest deadline first: a view."""
        return self._allowing.get(tier, ())

    @property
    def tiers(self) -> Sequence[int]:
        """Tiers that somebody here allows, the cheapest first."""
        return sorted(tier for tier, requests in self._allowing.items() if requests)

    @property
    def by_cheapest(self) -> dict[int, list[Request]]:
        """Requests by the cheapest tier they allow, each list by deadline: a view."""
        return self._cheapest

    def add(self, request: Request) -> None:
        self._by_id[request.id] = request
        for requests in self._lists(request):
            requests.insert(bisect_left(requests, _urgency(request), key=_urgency), request)

    def remove(self, id_: int) -> Request | None:
        """Take a request out; None where it is not here."""
        request = self._by_id.pop(id_, None)
        if request is not None:
            for requests in self._lists(request):
                del requests[bisect_left(requests, _urgency(request), key=_urgency)]
        return request

    def _lists(self, request: Request) -> Iterator[list[Request]]:
        yield self._all
        yield self._cheapest.setdefault(request.tiers[0], [])
        for tier in request.tiers:
            yield self._allowing.setdefault(tier, [])


def due(requests: Sequence[Request], by_s: float) -> int:
    """How many of a list by deadline have theirs at `by_s` or before."""
    return bisect_right(requests, by_s, key=_deadline)
